"""Poisoned memory: MADV_HWPOISON, the SIGBUS it brings, and KVM_RUN by a thread that may get one."""

import signal

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import PAGE_SIZE
from kvmgmem.advice import Advice
from kvmgmem.errors import Answer
from kvmgmem.memory import Fault, Mapping
from kvmgmem.syscalls import NUMBER
from kvmgmem.vcpu import Vcpu

_BUS_MCEERR_AR = 4


def machine_check(address: int) -> Fault:
    """SIGBUS because the memory at this address is broken and was needed (BUS_MCEERR_AR)."""
    return Fault(signal.SIGBUS, _BUS_MCEERR_AR, address)


def poison(mapping: Mapping, offset: int = 0) -> tuple[Answer, Fault | None]:
    """Poison the page at `offset` (MADV_HWPOISON): the answer, and the signal that the caller got on the way."""
    return _guarded("madvise", mapping.address + offset, PAGE_SIZE, Advice.HWPOISON)


def run_guarded(vcpu: Vcpu) -> tuple[Answer, Fault | None]:
    """One KVM_RUN without a deadline: its answer, and the SIGBUS that came with it."""
    return _guarded("ioctl", vcpu.fileno(), lib.KVM_RUN, 0)


def _guarded(call: str, *arguments: int) -> tuple[Answer, Fault | None]:
    raw = ffi.new("struct kvmgmem_fault *")
    answer = entry.answer_of(entry.native.kvmgmem_guarded_syscall(NUMBER[call], *arguments, 0, 0, 0, raw))
    return answer, Fault(signal.Signals(raw.signo), raw.code, raw.address) if raw.signo else None
