"""The QEMU machine: which accelerator, and one literal command line with a comment per group."""

import os
import shlex
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab.guest.init import CONTROL_PORT, RESULTS_PORT, SPARE_CPU

QEMU = "qemu-system-x86_64"

CONSOLE, CONTROL, RESULTS, QMP = "console", "control", "results", "qmp"
CHANNELS = (CONSOLE, CONTROL, RESULTS, QMP)
"""The lines between guest and supervisor; each is one end of a socket pair that QEMU inherits."""


@dataclass(frozen=True)
class Accelerator:
    """How QEMU executes the guest, `tcg` or `kvm`, and why that one; `time_scale` stretches limits meant for a host."""

    name: str
    why: str

    @property
    def time_scale(self) -> float:
        return {"kvm": 1.0, "tcg": 5.0}[self.name]


@dataclass(frozen=True)
class Machine:
    """A guest to start. `memory_mib` is in MiB; `append` goes to the end of the kernel's command line, where it wins."""

    kernel: Path
    initrd: Path
    accelerator: str
    memory_mib: int = 1536
    cpus: int = 2
    numa_nodes: int = 1
    append: str = ""
    verbose: bool = False
    """The whole boot log on the console; without it the log starts with warnings until init is up."""
    gdb: bool = False
    """Wait for a debugger on TCP port 1234 before the first instruction."""
    qemu: str = QEMU
    incoming: Path | None = None
    """The state of a guest that was kept (kvmgmem.lab.guest.snapshot), to go on from; it waits for the monitor's `cont`."""

    @property
    def spares_a_cpu(self) -> bool:
        """Whether the guest has one CPU more than asked for, its first one, on which no test runs.

        QEMU's cpu_clear_ignne(), which any CPU calls that loads FPU state without a pending exception (XRSTOR, with every
        switch of tasks), reads, changes and writes `hflags2` of the *first* CPU, without a lock. What that CPU does in
        between is undone, and VMRUN and #VMEXIT do a lot there: with HF2_NPT_MASK set again it leaves a guest twice, with
        HF2_VINTR_MASK or HF2_HIF_MASK gone it never leaves it for an interrupt (7.2.22; with the time between stretched by
        a loop of 300, one run of eight storms had 13 double exits and a hang, and one with this none). A CPU that runs no
        guest has nothing to lose.
        """
        return self.accelerator == "tcg" and self.cpus > 1

    @property
    def all_cpus(self) -> int:
        """How many CPUs QEMU has: those asked for, and the one that is spared."""
        return self.cpus + self.spares_a_cpu


def command_line(machine: Machine, channels: Mapping[str, int]) -> list[str]:
    """QEMU's arguments for a machine.

    `channels` gives the inherited socket's descriptor for each of CHANNELS; without any the console is the terminal.

    For QEMU 7.2 and newer. QEMU's own exit status says nothing about the guest: it is 0 after a panic with -no-reboot.
    """
    return [
        machine.qemu,
        # Nothing that is not asked for: no default devices, no configuration of the user's, no window.
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-nic", "none"),
        # q35 rather than microvm, which never boots under TCG without its pic and pit. No disks, no SMBus to probe.
        *("-machine", "q35,sata=off,smbus=off" + _numa_machine(machine)),
        *_accelerator(machine.accelerator),
        *("-smp", _processors(machine), "-m", str(machine.memory_mib)),
        *_numa(machine),
        # A reset of the guest ends QEMU, so that a panic (panic=-1) or a triple fault ends the boot at once.
        "-no-reboot",
        *("-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", kernel_command_line(machine)),
        *(_channels(channels) if channels else _terminal()),
        *(("-s", "-S") if machine.gdb else ()),
        *(("-incoming", f"exec:cat {shlex.quote(str(machine.incoming))}") if machine.incoming else ()),
    ]


def _channels(channels: Mapping[str, int]) -> tuple[str, ...]:
    """The lines to the supervisor, all socket pairs: no paths, nothing left behind, and an end of file when QEMU dies."""
    return (
        *(word for name in CHANNELS for word in ("-chardev", f"socket,id={name},fd={channels[name]}")),
        *("-serial", f"chardev:{CONSOLE}"),
        *("-mon", f"chardev={QMP},mode=control"),
        # Without ioeventfd the vCPU thread itself hands a record to the socket, before the guest's write returns: the
        # start record of a test that kills the machine with its next instruction has left the machine by then.
        *("-device", "virtio-serial-pci,ioeventfd=off"),
        *("-device", f"virtserialport,chardev={CONTROL},name={CONTROL_PORT}"),
        *("-device", f"virtserialport,chardev={RESULTS},name={RESULTS_PORT}"),
    )


def _terminal() -> tuple[str, ...]:
    """The serial console on the terminal that QEMU was started from, shared with its monitor (Ctrl-A)."""
    return ("-serial", "mon:stdio")


def _accelerator(name: str) -> tuple[str, ...]:
    if name == "kvm":
        return ("-accel", "kvm", "-cpu", "host")
    # thread=multi: a vCPU that spins must not starve the others. TCG emulates SVM with nested paging under `max`.
    # phys-bits as of common hardware: the default of 40 makes GPAs invalid that a VMM may well use. Without erms and
    # fsrm the kernel copies by words instead of REP MOVSB, which TCG executes byte by byte (unpacking the kernel: half
    # the time). Without la57 a TLB miss walks four levels instead of five.
    return ("-accel", "tcg,thread=multi", "-cpu", "max,phys-bits=48,erms=off,fsrm=off,la57=off")


def _numa_machine(machine: Machine) -> str:
    return "" if machine.numa_nodes > 1 else ",memory-backend=ram"


def _cores_of_a_node(machine: Machine) -> int:
    return -(-machine.all_cpus // machine.numa_nodes)


def _processors(machine: Machine) -> str:
    """A socket for each node: cores that share a cache over a border of nodes make the kernel warn (topology_sane)."""
    if machine.numa_nodes == 1:
        return str(machine.all_cpus)
    cores, sockets = _cores_of_a_node(machine), machine.numa_nodes
    return f"{machine.all_cpus},sockets={sockets},cores={cores},threads=1,maxcpus={cores * sockets}"


def _numa(machine: Machine) -> tuple[str, ...]:
    """Memory and CPUs in equal parts on the nodes; the first nodes take what does not divide."""
    if machine.numa_nodes == 1:
        return ("-object", f"memory-backend-ram,id=ram,size={machine.memory_mib}M")
    words: list[str] = []
    cores = _cores_of_a_node(machine)
    for node in range(machine.numa_nodes):
        memory = machine.memory_mib // machine.numa_nodes
        memory += machine.memory_mib % machine.numa_nodes if node == 0 else 0
        words += ["-object", f"memory-backend-ram,id=ram{node},size={memory}M"]
        # QEMU numbers CPUs socket by socket, and wants those that could still be plugged in on a node as well.
        words += ["-numa", f"node,nodeid={node},memdev=ram{node},cpus={node * cores}-{(node + 1) * cores - 1}"]
    return tuple(words)


def kernel_command_line(machine: Machine) -> str:
    """The kernel's command line; options as in Documentation/admin-guide/kernel-parameters.txt."""
    words = [
        "console=ttyS0",
        # Boot at once after a panic: QEMU then ends (-no-reboot), and the console ends with the panic.
        "panic=-1",
        # The supervisor sends an NMI to a guest that has gone silent, to learn where it stands.
        "unknown_nmi_panic",
        # Level 5 is warnings and worse, splats among them; init raises it to 7 once it is up. Each line less saves
        # its serial output, which under TCG is an exit for every character.
        f"loglevel={7 if machine.verbose else 5}",
        # A guest need not wait for entropy, and stack traces are comparable between boots.
        *("random.trust_cpu=on", "nokaslr"),
    ]
    if machine.accelerator == "tcg":
        # Speculation is not emulated; the timer check and the TSC's watchdog cost time, and fail on a busy host.
        words += ["mitigations=off", "no_timer_check", "tsc=reliable"]
        # A grace period of RCU looks for idle CPUs at once, not after a tick. Every VM that goes waits for some, and under
        # TCG a sixth of a run was that wait (7.2.13 base, test_bind and test_slot: 19 s, with this 16 s).
        words.append("rcutree.jiffies_till_first_fqs=0")
    if machine.spares_a_cpu:
        # The guest's init keeps to the others, and devices interrupt where the tests are. SRCU in its small form does its
        # work on the boot CPU, whoever waits (srcu_gp_start_if_needed, 7.3), and every change of a slot waits for it: in
        # its big form it does it where it is asked (whole set, 7.3.4, two guests: 85.4 s, with this 77.7 s).
        words += [SPARE_CPU, "irqaffinity=1", "srcutree.convert_to_big=1"]
    return " ".join([*words, machine.append]).strip()


def require_qemu(name: str = QEMU) -> str:
    """The path of QEMU. Raises HarnessError if it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise HarnessError(f"{name} is not installed", hint="install it: apt install qemu-system-x86")
    return found


def require_kernel_image(path: Path) -> Path:
    """The path, if QEMU can boot it: a bzImage (Documentation/arch/x86/boot.rst), or a vmlinux with a PVH entry.

    Raises HarnessError otherwise.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x210)
            elf = path.read_bytes() if head[:4] == b"\x7fELF" else b""
    except OSError as error:
        raise HarnessError(
            f"cannot read the kernel image {path}: {error.strerror}",
            hint="name a bzImage, or build one: kvmgmem kernel build",
        ) from error
    if len(head) >= 0x206 and head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa":
        return path
    if elf and has_pvh_entry(elf):
        return path
    what = "an ELF file without a PVH entry (CONFIG_PVH)" if elf else "no x86 kernel image"
    raise HarnessError(f"{path} is {what}", hint="name the bzImage (arch/x86/boot/bzImage in a build directory)")


def has_pvh_entry(elf: bytes) -> bool:
    """Whether an ELF file has the Xen note of type 18, XEN_ELFNOTE_PHYS32_ENTRY, which QEMU boots a vmlinux by."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return False
    (offset,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for index in range(count):
        kind, start, length = struct.unpack_from("<I4xQ16xQ", elf, offset + index * size)
        if kind == 4 and b"Xen\0" in elf[start : start + length]:  # PT_NOTE
            return struct.pack("<I", 18) + b"Xen\0" in elf[start : start + length]
    return False


def choose_accelerator(wanted: str = "auto", root: Path = Path("/")) -> Accelerator:
    """Decide between KVM and TCG: KVM only where a guest of it can itself run KVM.

    `root` is where /dev and /sys are looked up. Raises HarnessError if KVM is wanted and cannot be had.
    """
    if wanted == "tcg":
        return Accelerator("tcg", "asked for")
    obstacle = nested_kvm_obstacle(root)
    if obstacle is None:
        return Accelerator("kvm", "asked for" if wanted == "kvm" else "this machine's KVM runs nested guests")
    if wanted == "kvm":
        raise HarnessError(f"KVM cannot accelerate the guest: {obstacle}", hint="use --accel tcg")
    return Accelerator("tcg", obstacle)


def nested_kvm_obstacle(root: Path = Path("/")) -> str | None:
    """Why a guest under this machine's KVM would have no KVM of its own; None if nothing stands in the way."""
    device = root / "dev/kvm"
    if not device.exists():
        return "there is no /dev/kvm"
    if not os.access(device, os.R_OK | os.W_OK):
        return "no permission on /dev/kvm"
    for module in ("kvm_amd", "kvm_intel"):
        parameter = root / "sys/module" / module / "parameters/nested"
        if parameter.exists():
            enabled = parameter.read_text().strip() in {"1", "Y"}
            return None if enabled else f"nested virtualisation is off (parameter nested of {module})"
    if (root / "sys/module/kvm_pvm").exists():
        return "kvm_pvm does not offer virtualisation to its guests"
    return "no KVM module here says that it can nest"
