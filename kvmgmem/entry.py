"""The one door into the kernel: ioctls and system calls, with the kernel's answer as a value.

Whatever this package asks of the kernel on behalf of a test goes through here, so that one place can be measured and one
place can be watched. What is not watched pays nothing for it: a watcher stands in for the binding itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from kvmgmem._native import ffi, lib
from kvmgmem.errors import Answer, Errno


class Watcher(Protocol):
    """What sees every entry into the kernel: it has the binding's functions by their own names, and is told the rest."""

    def through(self, caller: Any, **facts: Any) -> None:
        """From now on `caller`, which has the binding's functions, makes the calls; `facts` say what is special about it."""

    def opened(self, path: str, fd: int) -> None:
        """A device was opened."""

    def closing(self, fd: int) -> None:
        """A descriptor is about to be closed."""

    def duplicated(self, fd: int, copy: int) -> None:
        """A descriptor got a second number."""

    def event(self, name: str, peer: int = 0, fds: Sequence[int] = ()) -> None:
        """Something between processes: `peer` is the other one's pid, `fds` the descriptors that pass."""

    def expect(self, seen: object, wanted: object, *, shows: object = None, bug: str = "", peer: int = 0) -> None:
        """A test compares what it saw with what it wants; `shows` is what a known bug makes of it.

        `peer` is the pid of the process that the answer is of, if that is another one.
        """

    def lives(self, directory: str, alive: bool) -> None:
        """Somebody looked whether a VM lives: whether its directory below debugfs's kvm is there."""

    def should_live(self, directory: str, wanted: bool) -> None:
        """A test wanted the last look at that directory to tell this, and it did not."""

    def statistic(self, fd: int, name: str, value: int) -> int:
        """Somebody read a statistic of a VM or a vCPU; `value` again, in a form that comparisons are recognised by."""


native: Any = lib
"""What makes the calls: the binding, or a watcher around it."""

watcher: Watcher | None = None


def watch(new: Watcher | None) -> None:
    """Let a watcher stand between this process and the binding from now on; None takes it away."""
    global native, watcher
    native, watcher = (lib if new is None else new), new


@contextmanager
def through(caller: Any, **facts: Any) -> Iterator[None]:
    """Have the calls within the block made by `caller` in place of the binding; a watcher still sees them, and `facts`."""
    global native  # noqa: PLW0603 - one door is the point
    usual = native
    if watcher is None:
        native = caller
    else:
        watcher.through(caller, **facts)
    try:
        yield
    finally:
        native = usual
        if watcher is not None:
            watcher.through(lib)


def tell(event: str, peer: int = 0, fds: Sequence[int] = ()) -> None:
    """Tell the watcher, if there is one, what happens between processes."""
    if watcher is not None:
        watcher.event(event, peer, fds)


def answer_of(value: int) -> Answer:
    """The kernel's return value as an `Answer`: negative values become their `Errno`."""
    return value if value >= 0 else Errno(value)


def ioctl(fd: int, request: int, argument: int = 0) -> Answer:
    """Issue an ioctl whose argument is a number (or an address the caller vouches for)."""
    return answer_of(native.kvmgmem_ioctl(fd, request, argument & 0xFFFF_FFFF_FFFF_FFFF))


def ioctl_struct(fd: int, request: int, pointer: Any) -> Answer:
    """Issue an ioctl whose argument is a cffi structure."""
    return answer_of(native.kvmgmem_ioctl_ptr(fd, request, pointer))


def syscall(number: int, *arguments: int) -> Answer:
    """Make a system call with up to six numeric arguments; negative ones are passed as 64-bit two's complement."""
    padded = [argument & 0xFFFF_FFFF_FFFF_FFFF for argument in arguments]
    padded += [0] * (6 - len(padded))
    return answer_of(native.kvmgmem_syscall(number, *padded))


def address_of(pointer: Any) -> int:
    """The address of a cffi object, as a number for `ioctl` and `syscall`."""
    return int(ffi.cast("uintptr_t", pointer))
