"""The one door into the kernel: ioctls and system calls, with the kernel's answer as a value.

Whatever this package asks of the kernel on behalf of a test goes through here, so that one place can be measured and one
place can be watched.
"""

from typing import Any

from kvmgmem._native import ffi, lib
from kvmgmem.errors import Answer, Errno


def answer_of(value: int) -> Answer:
    """The kernel's return value as an `Answer`: negative values become their `Errno`."""
    return value if value >= 0 else Errno(value)


def ioctl(fd: int, request: int, argument: int = 0) -> Answer:
    """Issue an ioctl whose argument is a number (or an address the caller vouches for)."""
    return answer_of(lib.kvmgmem_ioctl(fd, request, argument & 0xFFFF_FFFF_FFFF_FFFF))


def ioctl_struct(fd: int, request: int, pointer: Any) -> Answer:
    """Issue an ioctl whose argument is a cffi structure."""
    return answer_of(lib.kvmgmem_ioctl_ptr(fd, request, pointer))


def syscall(number: int, *arguments: int) -> Answer:
    """Make a system call with up to six numeric arguments; negative ones are passed as 64-bit two's complement."""
    padded = [argument & 0xFFFF_FFFF_FFFF_FFFF for argument in arguments]
    padded += [0] * (6 - len(padded))
    return answer_of(lib.kvmgmem_syscall(number, *padded))


def address_of(pointer: Any) -> int:
    """The address of a cffi object, as a number for `ioctl` and `syscall`."""
    return int(ffi.cast("uintptr_t", pointer))
