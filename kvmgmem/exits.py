"""Exits: what kvm_run says after KVM_RUN, as typed values."""

from dataclasses import dataclass
from typing import Any

from kvmgmem._native import ffi, lib
from kvmgmem.abi import ExitReason
from kvmgmem.errors import Answer


@dataclass(frozen=True)
class IoExit:
    """Port I/O (KVM_EXIT_IO): `data` are the `size * count` bytes of an output."""

    port: int
    write: bool
    size: int
    count: int
    data: bytes


@dataclass(frozen=True)
class MmioExit:
    """An access to a GPA that no memory answers (KVM_EXIT_MMIO)."""

    gpa: int
    length: int
    write: bool
    data: bytes


@dataclass(frozen=True)
class MemoryFaultExit:
    """An access that userspace must resolve (KVM_EXIT_MEMORY_FAULT, api.rst section 5).

    It arrives together with EFAULT or EHWPOISON as the answer.
    """

    flags: int
    gpa: int
    size: int

    @property
    def private(self) -> bool:
        """Whether the access was a private one."""
        return bool(self.flags & lib.KVM_MEMORY_EXIT_FLAG_PRIVATE)


@dataclass(frozen=True)
class HypercallExit:
    """A hypercall handed to userspace (KVM_EXIT_HYPERCALL)."""

    number: int
    arguments: tuple[int, ...]
    ret: int
    flags: int


@dataclass(frozen=True)
class InternalErrorExit:
    """KVM gave up on the guest (KVM_EXIT_INTERNAL_ERROR)."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True)
class FailEntryExit:
    """The hardware refused the guest state (KVM_EXIT_FAIL_ENTRY)."""

    hardware_reason: int


@dataclass(frozen=True)
class SystemEventExit:
    """The guest asked to stop or crashed (KVM_EXIT_SYSTEM_EVENT)."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True)
class OtherExit:
    """An exit without fields of interest: HLT, SHUTDOWN, INTR, UNKNOWN, ..."""

    reason: ExitReason | int

    def __str__(self) -> str:
        return self.reason.name if isinstance(self.reason, ExitReason) else f"exit {self.reason}"


Exit = IoExit | MmioExit | MemoryFaultExit | HypercallExit | InternalErrorExit | FailEntryExit | SystemEventExit | OtherExit

UNKNOWN = OtherExit(ExitReason.UNKNOWN)
HALT = OtherExit(ExitReason.HLT)
SHUTDOWN = OtherExit(ExitReason.SHUTDOWN)


@dataclass(frozen=True)
class RunResult:
    """One KVM_RUN: its answer, what kvm_run said, and whether our own deadline or kick ended it."""

    answer: Answer
    exit: Exit
    expired: bool = False
    kicked: bool = False


def decode(run: Any) -> Exit:
    """The exit that a `struct kvm_run *` describes."""
    reason = run.exit_reason
    if reason == ExitReason.IO:
        return _io(run)
    if reason == ExitReason.MMIO:
        mmio = run.mmio
        return MmioExit(mmio.phys_addr, mmio.len, bool(mmio.is_write), bytes(ffi.buffer(mmio.data, min(mmio.len, 8))))
    if reason == ExitReason.MEMORY_FAULT:
        return MemoryFaultExit(run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size)
    if reason == ExitReason.HYPERCALL:
        call = run.hypercall
        return HypercallExit(call.nr, tuple(call.args[i] for i in range(6)), call.ret, call.flags)
    if reason == ExitReason.INTERNAL_ERROR:
        return InternalErrorExit(run.internal.suberror, _words(run.internal))
    if reason == ExitReason.FAIL_ENTRY:
        return FailEntryExit(run.fail_entry.hardware_entry_failure_reason)
    if reason == ExitReason.SYSTEM_EVENT:
        return SystemEventExit(run.system_event.type, _words(run.system_event))
    known = reason in ExitReason.__members__.values()
    return OtherExit(ExitReason(reason) if known else reason)


def _io(run: Any) -> IoExit:
    io = run.io
    start = ffi.cast("uint8_t *", run) + io.data_offset
    data = bytes(ffi.buffer(start, io.size * io.count))
    return IoExit(io.port, io.direction == lib.KVM_EXIT_IO_OUT, io.size, io.count, data)


def _words(part: Any) -> tuple[int, ...]:
    return tuple(part.data[i] for i in range(min(part.ndata, 16)))
