"""Entering a system call with a signal already pending, which a program cannot do to itself.

A signal is delivered on the way back to user mode, so that what is pending when a program makes a call has been delivered
before. A tracer stands in between: it sends the signal while its tracee is stopped at the entry of the call (ptrace(2),
PTRACE_SYSCALL), and takes it away once the call has returned.
"""

import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvmgmem.entry import syscall
from kvmgmem.errors import Errno, KvmError
from kvmgmem.processes import LIMIT, ChildProcess
from kvmgmem.syscalls import NUMBER

PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GET_SYSCALL_INFO = 0x420E
PTRACE_O_TRACESYSGOOD = 1
SYSCALL_STOP = signal.SIGTRAP | 0x80
SYSCALL_ENTRY = 1

T = TypeVar("T")

# op, arch, instruction and stack pointers, then for an entry: number and six arguments (struct ptrace_syscall_info).
_INFO = struct.Struct("<B3xI2Q7Q")


@dataclass(frozen=True)
class Call:
    """A system call at its entry."""

    number: int
    arguments: tuple[int, ...]


def in_child_with_signal_pending(function: Callable[[], T], at: Callable[[Call], bool]) -> T:
    """Run a function in a forked process, in which the first call that `at` recognises meets a pending signal.

    Returns what the function returned. Raises AssertionError if no such call was made, `KvmError` if ptrace(2) is refused,
    `ChildError` if the function raised.
    """

    def body(child: "_Traced") -> T:
        child.interrupt_call(at)
        value: T = child.process.result()
        child.process.wait()
        return value

    with ChildProcess(lambda channel: (channel.receive(), function())[1]) as process:
        return body(_Traced(process))


class _Traced:
    """A child process under ptrace, from its start to the end of the one call."""

    def __init__(self, process: ChildProcess) -> None:
        self.process = process
        self.pid = process.pid
        self._ptrace("PTRACE_SEIZE", PTRACE_SEIZE, 0, PTRACE_O_TRACESYSGOOD)
        self._ptrace("PTRACE_INTERRUPT", PTRACE_INTERRUPT)
        self._stop()

    def interrupt_call(self, at: Callable[[Call], bool]) -> None:
        """Let the child go, send the signal at the entry of the call, take it away behind it, and let go for good."""
        self.process.send()
        while (call := self._next_entry()) is None or not at(call):
            if call and call.number == NUMBER["exit_group"]:
                raise AssertionError("the function came to its end without the call that was to be interrupted")
        os.kill(self.pid, signal.SIGUSR1)
        self._ptrace("PTRACE_CONT", PTRACE_CONT)
        while self._stop() != signal.SIGUSR1:
            self._ptrace("PTRACE_CONT", PTRACE_CONT)
        self._ptrace("PTRACE_DETACH", PTRACE_DETACH)

    def _next_entry(self) -> Call | None:
        """Run to the next stop; None if it is not the entry of a system call."""
        self._ptrace("PTRACE_SYSCALL", PTRACE_SYSCALL)
        if self._stop() != SYSCALL_STOP:
            return None
        info = ctypes.create_string_buffer(_INFO.size)
        self._ptrace("PTRACE_GET_SYSCALL_INFO", PTRACE_GET_SYSCALL_INFO, _INFO.size, ctypes.addressof(info))
        operation, _, _, _, number, *arguments = _INFO.unpack(info.raw)
        return Call(number, tuple(arguments)) if operation == SYSCALL_ENTRY else None

    def _stop(self) -> int:
        """Wait for the child to stop, and say for which signal."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            stop = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG)
            if stop:
                return stop.si_status
            time.sleep(0.0001)
        raise AssertionError(f"the process did not stop within {LIMIT:g} s")

    def _ptrace(self, name: str, request: int, address: int = 0, data: int = 0) -> None:
        answer = syscall(NUMBER["ptrace"], request, self.pid, address, data)
        if isinstance(answer, Errno):
            raise KvmError("ptrace", f"{name}, pid={self.pid}", answer)
