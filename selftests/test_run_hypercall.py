"""GM-RUN: the hypercall by which a guest asks userspace to convert its memory (KVM_HC_MAP_GPA_RANGE)."""

from collections.abc import Iterator

import pytest

from kvmgmem._native import lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine, Mode, hypercall_program
from kvmgmem.errors import Errno
from kvmgmem.exits import HypercallExit, IoExit, RunResult
from kvmgmem.host import Host
from kvmgmem.testing import contract, known_bug, requires, vm_types
from kvmgmem.testing.fixtures import GPA
from kvmgmem.vm import Vm

MAP_GPA_RANGE = lib.KVM_HC_MAP_GPA_RANGE
ENABLE = 1 << MAP_GPA_RANGE
PAGES = 3
SPOILT = 0xDEAD
U64 = (1 << 64) - 1

# What a guest gets, include/uapi/linux/kvm_para.h
KVM_ENOSYS, KVM_EINVAL, KVM_EPERM = 1000, 22, 1


class Caller:
    """A guest that makes one hypercall after another."""

    def __init__(self, cpu: GuestCpu, program: str) -> None:
        self.cpu = cpu
        self._program = program

    def attempt(self, *arguments: int, number: int = MAP_GPA_RANGE) -> RunResult:
        """Make the hypercall; whatever comes of it. The exit's old `ret` is spoilt first."""
        self.cpu.vcpu.kvm_run.hypercall.ret = SPOILT
        names = ("rbx", "rcx", "rdx", "rsi")
        return self.cpu.attempt(self._program, rax=number, **dict(zip(names, arguments, strict=False)))

    def answer(self, *arguments: int, number: int = MAP_GPA_RANGE) -> int:
        """Make a hypercall that must not reach userspace: what the guest finds in RAX, as a signed number."""
        return signed(self.cpu.finish(self.attempt(*arguments, number=number)).rax)


def signed(value: int) -> int:
    """A 64-bit register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def convert_exit(result: RunResult, gpa: int, pages: int, attributes: int, *, flags: int) -> bool:
    """Whether a run ended in the exit of this conversion, with `ret` preset to 0."""
    call = result.exit
    if result.answer != OK or not isinstance(call, HypercallExit):
        return False
    preset = known_bug("B31").shows_if(call.ret == SPOILT) or call.ret == 0
    wanted = (MAP_GPA_RANGE, (gpa, pages, attributes), flags)
    return preset and (call.number, call.arguments[:3], call.flags) == wanted


@pytest.fixture
def mode() -> Mode:
    """How the caller's code runs."""
    return Mode.KERNEL


@pytest.fixture
def caller(machine: GuestMachine, host: Host, mode: Mode) -> Iterator[Caller]:
    """A guest of `vm` that makes hypercalls."""
    cpu = machine.cpu(0, mode)
    yield Caller(cpu, hypercall_program(host.backend))
    cpu.close()


@contract("GM-RUN-036", "GM-RUN-039")
@requires("hardware-mode", cap=Cap.EXIT_HYPERCALL)
@vm_types("default", "sw-protected")
def test_a_conversion_request_reaches_userspace(vm: Vm, caller: Caller) -> None:
    """Once enabled, the hypercall exits with its arguments, `ret` 0 and LONG_MODE, and RAX gets userspace's `ret`."""
    vm.enable_cap(Cap.EXIT_HYPERCALL, ENABLE)
    run = caller.cpu.vcpu.kvm_run
    for attributes in (lib.KVM_MAP_GPA_RANGE_ENCRYPTED, lib.KVM_MAP_GPA_RANGE_DECRYPTED, U64):
        result = caller.attempt(GPA, PAGES, attributes)
        assert convert_exit(result, GPA, PAGES, attributes, flags=lib.KVM_EXIT_HYPERCALL_LONG_MODE), result
        preset = run.hypercall.ret
        assert caller.cpu.finish(caller.cpu.run()).rax == preset
    for ret in (0x1_2345_6789, U64):
        caller.attempt(GPA, PAGES, 0)
        run.hypercall.ret = ret
        assert caller.cpu.finish(caller.cpu.run()).rax == ret


@contract("GM-RUN-036", "GM-RUN-039")
@requires("hardware-mode", cap=Cap.EXIT_HYPERCALL)
@vm_types("default")
@pytest.mark.parametrize("mode", [Mode.COMPATIBILITY], ids=["32-bit"])
def test_a_conversion_request_of_32_bit_code_is_truncated(vm: Vm, caller: Caller) -> None:
    """Outside 64-bit mode the hypercall's arguments and its result are 32 bits wide, and LONG_MODE is not set."""
    vm.enable_cap(Cap.EXIT_HYPERCALL, ENABLE)
    high = 0xABCD << 32
    result = caller.attempt(high | GPA, high | PAGES, high | 0x10, number=high | MAP_GPA_RANGE)
    if known_bug("B32").shows_if(isinstance(result.exit, IoExit) and caller.cpu.finish(result).rax == 0):
        result = caller.attempt(high | GPA, high | PAGES, high | 0x10)
    assert convert_exit(result, GPA, PAGES, 0x10, flags=0), result
    caller.cpu.vcpu.kvm_run.hypercall.ret = high | 0x8765_4321
    assert caller.cpu.finish(caller.cpu.run()).rax == 0x8765_4321


@contract("GM-RUN-037", "GM-RUN-040")
@requires("hardware-mode", cap=Cap.EXIT_HYPERCALL)
@vm_types("default")
def test_the_hypercall_exits_only_while_enabled(vm: Vm, caller: Caller) -> None:
    """The guest gets -ENOSYS for the hypercall before it is enabled and after it is disabled again, also with vCPUs."""
    for _ in range(2):
        assert caller.answer(GPA, PAGES, 0) == -KVM_ENOSYS
        vm.enable_cap(Cap.EXIT_HYPERCALL, ENABLE)
        assert convert_exit(caller.attempt(GPA, PAGES, 0), GPA, PAGES, 0, flags=lib.KVM_EXIT_HYPERCALL_LONG_MODE)
        caller.cpu.finish(caller.cpu.run())
        assert caller.answer(GPA, PAGES, 0, number=99) == -KVM_ENOSYS
        vm.enable_cap(Cap.EXIT_HYPERCALL, 0)


@contract("GM-RUN-037")
@requires("hardware-mode", cap=Cap.EXIT_HYPERCALL)
@vm_types("default")
def test_a_nonsensical_conversion_request_is_refused_to_the_guest(vm: Vm, caller: Caller) -> None:
    """A misaligned address, no pages, or a range that wraps: the guest gets -EINVAL, and userspace sees nothing."""
    vm.enable_cap(Cap.EXIT_HYPERCALL, ENABLE)
    good = (GPA, PAGES, 0)
    assert convert_exit(caller.attempt(*good), *good, flags=lib.KVM_EXIT_HYPERCALL_LONG_MODE)
    caller.cpu.finish(caller.cpu.run())
    first_page = GPA // PAGE_SIZE
    for gpa, pages in ((GPA + 1, PAGES), (GPA + PAGE_SIZE // 2, PAGES), (GPA, 0), (GPA, U64), (GPA, U64 - first_page + 1)):
        assert caller.answer(gpa, pages, 0) == -KVM_EINVAL, (gpa, pages)
    longest = (GPA, U64 - first_page, 0)  # the control: one page less does not wrap
    assert convert_exit(caller.attempt(*longest), *longest, flags=lib.KVM_EXIT_HYPERCALL_LONG_MODE)


@contract("GM-RUN-038")
@requires(cap=Cap.EXIT_HYPERCALL)
@vm_types("default")
@pytest.mark.parametrize("mode", [Mode.USER], ids=["cpl3"])
def test_user_code_may_not_ask_for_conversions(vm: Vm, caller: Caller, host: Host, machine: GuestMachine) -> None:
    """The hypercall from another privilege level than 0 gives the guest -EPERM, whether it is enabled or not."""
    assert caller.answer(GPA, PAGES, 0) == -KVM_EPERM
    vm.enable_cap(Cap.EXIT_HYPERCALL, ENABLE)
    assert caller.answer(GPA, PAGES, 0) == -KVM_EPERM
    # The control: only the privilege level differs. kvm-pvm emulates such code, and there a hypercall never comes back.
    if host.backend != "kvm_pvm":
        kernel = Caller(machine.cpu(1, Mode.KERNEL), hypercall_program(host.backend))
        assert convert_exit(kernel.attempt(GPA, PAGES, 0), GPA, PAGES, 0, flags=lib.KVM_EXIT_HYPERCALL_LONG_MODE)
        kernel.cpu.close()


@contract("GM-RUN-040")
@vm_types("default", "sw-protected")
def test_only_the_known_hypercall_can_be_enabled(vm: Vm) -> None:
    """KVM_CAP_EXIT_HYPERCALL takes the bits it reports and no flags; it may be set and cleared again, vCPUs or not."""
    valid = vm.check_extension(Cap.EXIT_HYPERCALL)
    assert valid == ENABLE

    def check() -> None:
        for bits in (valid, 0, valid):
            assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, bits) == OK
            assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, bits, flags=1) == Errno.EINVAL
        for bit in range(64):
            if not valid >> bit & 1:
                assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 1 << bit) == Errno.EINVAL, bit
                assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, valid | 1 << bit) == Errno.EINVAL, bit

    check()
    with vm.create_vcpu():
        check()
