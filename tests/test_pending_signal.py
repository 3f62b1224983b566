"""The tracer that lets a system call meet a pending signal."""

import os
import select

import pytest

from kvmgmem import syscalls
from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.processes import ChildError
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing.pending_signal import in_child_with_signal_pending

EPOLL_PWAIT = {"x86_64": 281, "aarch64": 22}[os.uname().machine]


def test_the_call_meets_the_signal_and_the_function_goes_on() -> None:
    """A wait for nothing is EINTR at once, the call after it is left alone, and the function's result comes back."""
    # Of the calls that wait, epoll is one that the kernel never restarts (signal(7)).
    with select.epoll() as nothing:
        event = ffi.new("char[16]")

        def wait_twice() -> list[Answer]:
            return [syscall(EPOLL_PWAIT, nothing.fileno(), address_of(event), 1, limit, 0, 0) for limit in (20_000, 1)]

        seen = in_child_with_signal_pending(wait_twice, lambda call: call.number == EPOLL_PWAIT)
    assert seen == [Errno.EINTR, 0]


def test_a_function_that_never_makes_the_call_is_an_error() -> None:
    """If the function ends without the call, that is said, and its process is gone."""
    with pytest.raises(AssertionError, match="without the call"):
        in_child_with_signal_pending(lambda: 1, lambda call: call.number == NUMBER["fallocate"])


def test_an_exception_in_the_function_comes_back() -> None:
    """What the function raises after the call is raised here, with its traceback as text."""

    def fail() -> None:
        syscalls.fallocate(-1, 0, 0, 0)
        raise RuntimeError("on purpose")

    with pytest.raises(ChildError, match="on purpose"):
        in_child_with_signal_pending(fail, lambda call: call.number == NUMBER["fallocate"])
