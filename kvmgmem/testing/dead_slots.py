"""Dead slots: those whose gmem file is gone, so that every guest access to them leaves the guest."""

from kvmgmem.abi import PAGE_SIZE
from kvmgmem.arch.x86_64 import GuestCpu
from kvmgmem.errors import Errno
from kvmgmem.exits import MemoryFaultExit, RunResult


def memory_fault(gpa: int, *, private: bool = False) -> MemoryFaultExit:
    """The exit that reports one inaccessible page (kvm_prepare_memory_fault_exit in include/linux/kvm_host.h)."""
    return MemoryFaultExit(flags=8 if private else 0, gpa=gpa & -PAGE_SIZE, size=PAGE_SIZE)


def is_dead(result: RunResult, gpa: int, *, private: bool = False) -> bool:
    """Whether a run ended in EFAULT with the memory fault exit for the page of `gpa`."""
    return result.answer == Errno.EFAULT and result.exit == memory_fault(gpa, private=private)


def assert_dead(cpu: GuestCpu, gpa: int, *, private: bool = False) -> None:
    """Let the guest read at `gpa`: it must get nothing but the memory fault exit."""
    result = cpu.try_load(gpa)
    assert (result.answer, result.exit) == (Errno.EFAULT, memory_fault(gpa, private=private))
