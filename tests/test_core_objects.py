"""The objects over the kernel's: ownership of descriptors, errors that explain themselves, runs that end."""

import errno
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmgmem import entry
from kvmgmem._native import lib
from kvmgmem.abi import OK, PAGE_SIZE, GiB, MiB
from kvmgmem.errors import Errno, HarnessError, KvmError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.exits import HALT, IoExit, OtherExit
from kvmgmem.fd import OwnedFd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.vm import Vm

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")


def _open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_double_close_spares_a_reused_number() -> None:
    """Closing twice closes once: the number may belong to somebody else by then."""
    owned = OwnedFd(os.open("/dev/null", os.O_RDONLY))
    number = owned.fileno()
    owned.close()
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == number
    owned.close()
    os.fstat(other)
    os.close(other)


def test_a_closed_object_has_no_number() -> None:
    """Use after close is an error of ours, not an ioctl on a stranger."""
    owned = OwnedFd(os.open("/dev/null", os.O_RDONLY))
    owned.close()
    assert owned.closed
    with pytest.raises(ValueError, match="closed"):
        owned.fileno()


def test_the_garbage_collector_closes() -> None:
    """An object that nobody holds gives its descriptor back, in a cycle too."""
    before = _open_fds()
    owned = OwnedFd(os.open("/dev/null", os.O_RDONLY))
    owned.myself = owned  # type: ignore[attr-defined]
    assert _open_fds() != before
    del owned
    gc.collect()
    assert _open_fds() == before


def test_dup_and_cloexec() -> None:
    """A duplicate is its own descriptor, close-on-exec or not as asked."""
    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as owned:
        with owned.dup() as copy, owned.dup(cloexec=False) as inherited:
            assert len({owned.fileno(), copy.fileno(), inherited.fileno()}) == 3
            assert [copy.cloexec, inherited.cloexec] == [True, False]
            inherited.set_cloexec(True)
            assert [copy.cloexec, inherited.cloexec] == [True, True]
        assert not owned.closed


def test_ioctl_answers_negative_errno() -> None:
    """An ioctl that fails answers its errno as a negative value, and errno itself is not involved."""
    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as null:
        assert entry.ioctl(null.fileno(), lib.KVM_GET_API_VERSION) is Errno.ENOTTY
    assert entry.ioctl(-1, 0) is Errno.EBADF
    assert int(Errno.ENOTTY) == -errno.ENOTTY


def test_ioctl_releases_the_gil(tmp_path: Path) -> None:
    """While one thread is inside an ioctl, Python goes on in others."""
    fifo_reader, fifo_writer = os.pipe()
    done = threading.Event()

    def block() -> None:
        # read(2) through the same door stands for an ioctl that blocks.
        entry.syscall(0, fifo_reader, 0, 1)
        done.set()

    thread = threading.Thread(target=block)
    start = time.monotonic()
    thread.start()
    while time.monotonic() - start < 0.2:
        assert not done.wait(0)
    os.write(fifo_writer, b"x")
    thread.join(5)
    assert done.wait(0)
    os.close(fifo_reader)
    os.close(fifo_writer)


@pytest.mark.parametrize(
    ("path", "needle"),
    [("missing", "there is no"), ("plain", "answers API version ENOTTY")],
)
def test_what_is_no_kvm_is_refused_in_one_line(tmp_path: Path, path: str, needle: str) -> None:
    """A missing device and a file that is no KVM each give one line and a remedy."""
    (tmp_path / "plain").write_text("")
    with pytest.raises(HarnessError) as caught:
        Kvm.open(tmp_path / path)
    assert needle in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.code == ExitCode.HARNESS


def test_no_permission_is_refused_in_one_line(tmp_path: Path) -> None:
    """A device that may not be opened says so; root may open everything, so the check runs as somebody else."""
    device = tmp_path / "kvm"
    device.write_text("")
    device.chmod(0)
    tmp_path.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                for parent in tmp_path.parents[:2]:
                    parent.chmod(0o755)
                os.setuid(65534)
            Kvm.open(device)
        except HarnessError as error:
            status = 0 if "no permission" in error.message and error.hint else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_kvm_error_says_call_arguments_and_errno() -> None:
    """The message of a failed call is enough to know what was asked and what was answered."""
    region = MemoryRegion(slot=7, gpa=GiB, size=2 * MiB, gmem=99, gmem_offset=0x1000, flags=0x80000004, as_id=1)
    error = KvmError("KVM_SET_USER_MEMORY_REGION2", str(region), Errno.EBADF)
    assert str(error) == (
        "KVM_SET_USER_MEMORY_REGION2(slot=1:7, gpa=0x40000000, size=0x200000, hva=0x0, "
        "flags=GUEST_MEMFD|0x80000000, gmem=fd 99 offset=0x1000) -> EBADF"
    )
    assert error.errno == errno.EBADF


def test_region_words() -> None:
    """What a request sends: address space in the high half of the slot, a negative descriptor as u32, flags by default."""
    assert MemoryRegion(slot=3, as_id=1).slot_word == 0x10003
    assert MemoryRegion(gmem=-1).gmem_number == 0xFFFF_FFFF
    assert MemoryRegion(gmem=5).flag_word == 4
    assert MemoryRegion(gmem=5, flags=0).flag_word == 0
    assert MemoryRegion().flag_word == 0


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        yield vm


@needs_kvm
def test_checked_calls_raise_what_raw_calls_answer(vm: Vm) -> None:
    """vm.x() raises exactly where vm.raw.x() answers an Errno."""
    region = MemoryRegion(slot=0, gpa=GiB, size=PAGE_SIZE + 1)
    assert vm.raw.set_region(region) is Errno.EINVAL
    with pytest.raises(KvmError, match=r"size=0x1001.*-> EINVAL"):
        vm.set_region(region)
    assert vm.raw.create_guest_memfd(1) is Errno.EINVAL
    with pytest.raises(KvmError, match="KVM_CREATE_GUEST_MEMFD"):
        vm.create_guest_memfd(1)


@needs_kvm
def test_closing_a_vcpu_gives_its_page_back(vm: Vm) -> None:
    """A vCPU's kvm_run goes with it."""
    vcpu = vm.create_vcpu()
    assert vcpu.kvm_run.exit_reason == 0
    assert "kvm-vcpu" in Path("/proc/self/maps").read_text()
    vcpu.close()
    vcpu.close()
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()


x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest programs are x86-64's")


@needs_kvm
@x86
def test_a_run_ends_at_its_deadline(vm: Vm) -> None:
    """A guest that never exits is brought back by the deadline, and the result says so."""
    from kvmgmem.arch.x86_64 import GuestMachine

    machine = GuestMachine(vm)
    with machine.cpu().vcpu as vcpu, pytest.raises(TimeoutError, match="did not exit within"):
        machine_cpu_spin(machine, vcpu)
    machine.close()


def machine_cpu_spin(machine: object, vcpu: object) -> None:
    """Let a vCPU spin with a short deadline."""
    from kvmgmem._native import ffi
    from kvmgmem.arch.x86_64 import RFLAGS_FIXED, GuestMachine
    from kvmgmem.vcpu import Vcpu

    assert isinstance(machine, GuestMachine)
    assert isinstance(vcpu, Vcpu)
    regs = ffi.new("struct kvm_regs *", {"rip": machine.entry("spin"), "rflags": RFLAGS_FIXED})
    assert vcpu.raw.set_regs(regs) == OK
    result = vcpu.raw.run(0.05)
    assert (result.answer, result.expired, result.kicked) == (Errno.EINTR, True, False)
    vcpu.run(0.05)


@needs_kvm
@x86
def test_a_kick_ends_a_run_and_one_before_it_too(vm: Vm) -> None:
    """A kick gets a running vCPU out; one that comes before KVM_RUN is not lost; the run after it goes on."""
    from kvmgmem.arch.x86_64 import GuestMachine

    machine = GuestMachine(vm)
    cpu = machine.cpu()
    cpu.start("spin")
    with cpu.running() as run:
        while not cpu.vcpu.runner.tid:
            assert run.alive
        ended = run.kick()
    assert (ended.answer, ended.kicked, ended.expired) == (Errno.EINTR, True, False)
    cpu.vcpu.kick()
    early = cpu.run(5)
    assert (early.answer, early.kicked, early.expired) == (Errno.EINTR, True, False)
    assert isinstance(cpu.attempt("report").exit, IoExit)
    cpu.start("report")
    with cpu.running() as run:
        run.result()
        assert isinstance(run.kick().exit, IoExit), "a kick after the end changes nothing"
    assert isinstance(cpu.attempt("report").exit, IoExit)
    cpu.close()
    machine.close()


@needs_kvm
@x86
def test_programs_read_write_fetch_report_and_halt(vm: Vm) -> None:
    """Every kind of guest program works on this backend, on plain memory."""
    from kvmgmem.arch.x86_64 import GuestMachine, Mode, programs
    from kvmgmem.memory import Mapping

    machine = GuestMachine(vm)
    with Mapping.anonymous(16 * PAGE_SIZE) as memory:
        vm.set_region(MemoryRegion(slot=1, gpa=GiB, size=memory.length, hva=memory.address))
        cpu = machine.cpu()
        for width in (1, 2, 4, 8):
            memory.store(0x8877665544332211, 64)
            assert cpu.load(GiB + 64, width) == 0x8877665544332211 & (1 << 8 * width) - 1
            cpu.store(GiB + 64, 0, width)
            assert memory.load(64) == 0x8877665544332211 >> 8 * width << 8 * width
        cpu.stamp(GiB, 100, 16)
        assert [memory.load(page * PAGE_SIZE) for page in range(16)] == list(range(100, 116))
        assert cpu.first_unstamped(GiB, 100, 16) is None
        memory.store(0, 5 * PAGE_SIZE)
        assert cpu.first_unstamped(GiB, 100, 16) == 5
        machine.map(5 * GiB, GiB + 3 * PAGE_SIZE)
        assert cpu.load(5 * GiB) == 103
        memory.write(0, programs()["report"])
        assert cpu.call("jump", rdi=GiB, rax=7).rip in (GiB, GiB + 2)
        cpu.close()
        halting = machine.cpu(1, Mode.KERNEL)
        assert halting.attempt("halt").exit == HALT
        halting.close()
    machine.close()


@needs_kvm
@x86
def test_an_exception_in_the_guest_is_a_shutdown(vm: Vm) -> None:
    """A guest without descriptor tables ends in SHUTDOWN instead of going astray."""
    from kvmgmem.arch.x86_64 import GuestMachine
    from kvmgmem.exits import SHUTDOWN

    machine = GuestMachine(vm)
    cpu = machine.cpu()
    assert cpu.attempt("load8", rdi=1 << 46).exit == SHUTDOWN
    assert isinstance(SHUTDOWN, OtherExit)
    cpu.close()
    machine.close()
