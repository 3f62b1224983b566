"""The QEMU command line and the choice of accelerator."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kvmgmem.cli import main
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import vm_cli
from kvmgmem.lab.guest import machine
from kvmgmem.lab.guest.init import CONTROL_PORT, RESULTS_PORT
from kvmgmem.lab.guest.machine import (
    CHANNELS,
    Machine,
    choose_accelerator,
    command_line,
    has_pvh_entry,
    kernel_command_line,
    require_kernel_image,
    require_qemu,
)

MACHINE = Machine(kernel=Path("/k/bzImage"), initrd=Path("/k/root.cpio"), accelerator="tcg")
DESCRIPTORS = {name: 10 + index for index, name in enumerate(CHANNELS)}


def value_after(words: list[str], option: str) -> str:
    """The value of an option that occurs once."""
    assert words.count(option) == 1
    return words[words.index(option) + 1]


def test_every_channel_is_an_inherited_socket() -> None:
    """Console, control, results and monitor each sit on the descriptor that was given for it."""
    words = command_line(MACHINE, DESCRIPTORS)
    for name, descriptor in DESCRIPTORS.items():
        assert f"socket,id={name},fd={descriptor}" in words
    assert any(f"name={CONTROL_PORT}" in word for word in words)
    assert any(f"name={RESULTS_PORT}" in word for word in words)


def test_a_record_leaves_the_machine_before_the_write_returns() -> None:
    """With ioeventfd a start record could die with the machine."""
    assert "virtio-serial-pci,ioeventfd=off" in command_line(MACHINE, DESCRIPTORS)


def test_a_reset_ends_qemu_and_nothing_comes_by_default() -> None:
    """A panicking guest must not boot again unseen, and no default device may appear in it."""
    words = command_line(MACHINE, DESCRIPTORS)
    assert {"-no-reboot", "-nodefaults", "-no-user-config"} <= set(words)
    assert "panic=-1" in kernel_command_line(MACHINE).split()


def test_what_is_appended_comes_last() -> None:
    """The kernel takes the last of two settings of one option, so the user's win."""
    assert kernel_command_line(replace(MACHINE, append="loglevel=8 kvm_amd.npt=0")).endswith(" loglevel=8 kvm_amd.npt=0")


def test_kvm_takes_the_hosts_processor_and_no_emulation_tricks() -> None:
    """What makes TCG fast is not for a kernel on real hardware."""
    words = command_line(replace(MACHINE, accelerator="kvm"), DESCRIPTORS)
    assert value_after(words, "-cpu") == "host"
    assert "mitigations=off" not in value_after(words, "-append").split()
    assert "mitigations=off" in value_after(command_line(MACHINE, DESCRIPTORS), "-append").split()


@pytest.mark.parametrize(("nodes", "cpus", "memory"), [(1, 2, 1536), (2, 2, 1536), (2, 4, 1025), (3, 5, 1000)])
@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_memory_and_processors_are_all_on_nodes(nodes: int, cpus: int, memory: int, accelerator: str) -> None:
    """The parts add up to the whole, and no CPU is left out or given twice."""
    machine = replace(MACHINE, numa_nodes=nodes, cpus=cpus, memory_mib=memory, accelerator=accelerator)
    cpus += accelerator == "tcg"
    words = command_line(machine, DESCRIPTORS)
    backends = [word for word in words if word.startswith("memory-backend-ram")]
    assert sum(int(word.partition("size=")[2].removesuffix("M")) for word in backends) == memory
    topology = dict(part.split("=") for part in value_after(words, "-smp").split(",")[1:])
    possible = int(topology.get("maxcpus", cpus))
    assert value_after(words, "-smp").split(",")[0] == str(cpus)
    assert cpus <= possible < cpus + nodes
    placed = [word.partition("cpus=")[2].split("-") for word in words if word.startswith("node,")]
    ranges = [range(int(first), int(last) + 1) for first, last in placed]
    assert [cpu for node in ranges for cpu in node] == (list(range(possible)) if nodes > 1 else [])
    # A node's CPUs are just one socket's: a cache that two nodes share is what the kernel warns of.
    if nodes > 1:
        assert {len(node) for node in ranges} == {int(topology["cores"])}
        assert (int(topology["sockets"]), int(topology["cores"]) * nodes) == (nodes, possible)


@pytest.mark.parametrize(("accelerator", "cpus", "has"), [("tcg", 2, 3), ("tcg", 4, 5), ("tcg", 1, 1), ("kvm", 2, 2)])
def test_a_cpu_is_spared_where_emulation_spoils_the_first(accelerator: str, cpus: int, has: int) -> None:
    """One more than asked for, which init is told to leave alone; none where there is no other one to spoil it."""
    words = command_line(replace(MACHINE, accelerator=accelerator, cpus=cpus), DESCRIPTORS)
    assert value_after(words, "-smp") == str(has)
    told = value_after(words, "-append").split()
    assert ("kvmgmem.spare_cpu" in told) == ("irqaffinity=1" in told) == (has > cpus)


def test_a_debugger_is_waited_for() -> None:
    """-S stops the machine before its first instruction, -s listens."""
    assert {"-s", "-S"} <= set(command_line(replace(MACHINE, gdb=True), DESCRIPTORS))
    assert not {"-s", "-S"} & set(command_line(MACHINE, DESCRIPTORS))


def test_without_channels_the_console_is_the_terminal() -> None:
    """That is the shell's way."""
    words = command_line(MACHINE, {})
    assert value_after(words, "-serial") == "mon:stdio"
    assert not any("virtserialport" in word for word in words)


def fake_host(root: Path, *, module: str = "", nested: str = "", device: bool = True) -> Path:
    """A root directory with as much of /dev and /sys as the choice looks at."""
    (root / "dev").mkdir()
    if device:
        (root / "dev/kvm").touch()
    if module:
        parameters = root / "sys/module" / module / "parameters"
        parameters.mkdir(parents=True)
        if nested:
            (parameters / "nested").write_text(f"{nested}\n")
    return root


@pytest.mark.parametrize(("module", "nested"), [("kvm_amd", "1"), ("kvm_intel", "Y")])
def test_kvm_is_taken_where_it_nests(tmp_path: Path, module: str, nested: str) -> None:
    """Both spellings of a true parameter count."""
    assert choose_accelerator("auto", fake_host(tmp_path, module=module, nested=nested)).name == "kvm"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"module": "kvm_amd", "nested": "0"}, "nested virtualisation is off"),
        ({"module": "kvm_intel", "nested": "N"}, "nested virtualisation is off"),
        ({"module": "kvm_pvm"}, "kvm_pvm"),
        ({}, "no KVM module"),
        ({"module": "kvm_amd", "nested": "1", "device": False}, "no /dev/kvm"),
    ],
)
def test_emulation_is_taken_where_kvm_does_not_nest(tmp_path: Path, facts: dict[str, str], why: str) -> None:
    """Everything else is emulation, and the reason is named; whoever insists on KVM gets an error that names it, too."""
    root = fake_host(tmp_path, **facts)  # type: ignore[arg-type]
    chosen = choose_accelerator("auto", root)
    assert chosen.name == "tcg"
    assert why in chosen.why
    with pytest.raises(HarnessError, match=why):
        choose_accelerator("kvm", root)


def test_emulation_can_be_asked_for(tmp_path: Path) -> None:
    """Even where KVM would nest."""
    assert choose_accelerator("tcg", fake_host(tmp_path, module="kvm_amd", nested="1")).name == "tcg"


def test_a_missing_qemu_names_the_package() -> None:
    """The remedy is a package's name."""
    with pytest.raises(HarnessError) as caught:
        require_qemu("qemu-system-of-another-planet")
    assert "qemu-system-x86" in caught.value.hint


def bzimage() -> bytes:
    """The head of a bzImage: boot flag and magic where the boot protocol has them."""
    head = bytearray(0x300)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    return bytes(head)


def vmlinux(note: bytes) -> bytes:
    """An ELF file with one PT_NOTE that holds `note`."""
    header = b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 0, 64 + 56, 0, 0, len(note), len(note), 4)
    return header + program + note


PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x1000000)
OTHER_NOTE = struct.pack("<III", 4, 4, 6) + b"Xen\0" + struct.pack("<I", 0x1000000)


def test_images_that_qemu_boots_are_taken(tmp_path: Path) -> None:
    """A bzImage, and a vmlinux with a PVH entry."""
    for name, content in (("bzImage", bzimage()), ("vmlinux", vmlinux(PVH_NOTE))):
        (tmp_path / name).write_bytes(content)
        assert require_kernel_image(tmp_path / name) == tmp_path / name
    assert not has_pvh_entry(bzimage())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no x86 kernel image"),
        (b"#!/bin/sh\n" * 99, "no x86 kernel image"),
        (vmlinux(OTHER_NOTE), "without a PVH entry"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    """One line says what it is instead, and that a bzImage is wanted."""
    (tmp_path / "image").write_bytes(content)
    with pytest.raises(HarnessError, match=what) as caught:
        require_kernel_image(tmp_path / "image")
    assert "bzImage" in caught.value.hint


def test_an_image_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file gives the same kind of line."""
    with pytest.raises(HarnessError, match="No such file"):
        require_kernel_image(tmp_path / "missing")


def test_insisting_on_kvm_in_vain_is_one_line_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kvmgmem vm --accel kvm` says why not before it builds a kernel for it."""
    monkeypatch.setattr(machine, "nested_kvm_obstacle", lambda _root: "the moon is full")
    monkeypatch.setattr(vm_cli, "require_qemu", lambda _name: "qemu")
    monkeypatch.setattr(vm_cli, "build", lambda **_: pytest.fail("a kernel was built"))
    assert main(["vm", "--accel=kvm", "--source=/a/tree"]) == ExitCode.BISECT_STOP
    told = capsys.readouterr().err.splitlines()
    assert told == ["kvmgmem: error: KVM cannot accelerate the guest: the moon is full", "  hint: use --accel tcg"]


def test_what_is_no_path_reaches_the_guests_runner_as_it_is() -> None:
    """An expression for -k, be it longer than a file's name may be (ENAMETOOLONG)."""
    selftests = Path(__file__).parent.parent / "selftests"
    expression = " or ".join(["test_a_name"] * 40)
    assert [vm_cli._as_in_guest(word, selftests) for word in ("-k", expression)] == ["-k", expression]
    assert vm_cli._as_in_guest(f"{selftests}/test_cre.py::test_x", selftests) == "selftests/test_cre.py::test_x"
