"""userfaultfd: registering memory for the handling of its faults by this process (include/uapi/linux/userfaultfd.h)."""

import os
import select
import struct
from enum import IntFlag

from kvmgmem._native import ffi
from kvmgmem.abi import PAGE_SIZE
from kvmgmem.entry import address_of, ioctl_struct, syscall
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.syscalls import NUMBER

FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_WP_ASYNC = 1 << 15

_USER_MODE_ONLY = 1
_API_VERSION = 0xAA
_API = 0xC018_AA3F
_REGISTER = 0xC020_AA00
_WRITEPROTECT = 0xC018_AA06
_WRITEPROTECT_MODE_WP = 1
_COPY = 0xC028_AA03
_CONTINUE = 0xC020_AA07
_EVENT_PAGEFAULT = 0x12
_MESSAGE = struct.Struct("<B7xQQQ")  # the event; of a page fault: flags, address, thread


class RegisterMode(IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults of a range are told."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Userfaultfd(OwnedFd):
    """A userfaultfd, non-blocking and close-on-exec. Closing it lets those who wait go on with the kernel's own page.

    Faults in user mode need no privilege. Those that the kernel takes, for a guest say, need CAP_SYS_PTRACE.
    """

    def __init__(self, features: int = 0, *, user_mode_only: bool = True) -> None:
        """Open it and agree on `features`; raises `KvmError` (EINVAL for a feature this kernel lacks)."""
        only = _USER_MODE_ONLY if user_mode_only else 0
        answer = syscall(NUMBER["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK | only)
        if isinstance(answer, Errno):
            raise KvmError("userfaultfd", "UFFD_USER_MODE_ONLY" if only else "", answer)
        super().__init__(answer)
        agreed = ioctl_struct(answer, _API, ffi.new("uint64_t[]", [_API_VERSION, features, 0]))
        if isinstance(agreed, Errno):
            raise KvmError("UFFDIO_API", f"features={features:#x}", agreed)

    def register(self, address: int, length: int, mode: int) -> Answer:
        """UFFDIO_REGISTER of a range for `mode`."""
        return self.try_register(address, length, mode)[0]

    def try_register(self, address: int, length: int, mode: int) -> tuple[Answer, int]:
        """The same: the answer, and the bits of the ioctls that the kernel offers for the range."""
        request = ffi.new("uint64_t[]", [address, length, mode, 0])
        return ioctl_struct(self.fileno(), _REGISTER, request), int(request[3])

    def write_protect(self, address: int, length: int) -> Answer:
        """UFFDIO_WRITEPROTECT: arm write protection on a range registered with `RegisterMode.WP`."""
        request = ffi.new("uint64_t[]", [address, length, _WRITEPROTECT_MODE_WP])
        return ioctl_struct(self.fileno(), _WRITEPROTECT, request)

    def wait(self, limit: float) -> int:
        """Wait for a fault and return the address of its page; raises TimeoutError after `limit` seconds."""
        if not select.select([self.fileno()], [], [], limit)[0]:
            raise TimeoutError(f"nobody faulted within {limit:g} s")
        event, _, address, _ = _MESSAGE.unpack(os.read(self.fileno(), _MESSAGE.size))
        if event != _EVENT_PAGEFAULT:
            raise ValueError(f"userfaultfd event {event:#x} is no page fault")
        return int(address) & ~(PAGE_SIZE - 1)

    def copy(self, address: int, page: bytes) -> Answer:
        """UFFDIO_COPY of one page: put it at `address` and let those go on who wait for it."""
        room = ffi.new("char[]", 2 * PAGE_SIZE)
        source = -(-address_of(room) // PAGE_SIZE) * PAGE_SIZE
        ffi.memmove(ffi.cast("char *", source), page.ljust(PAGE_SIZE, b"\0"), PAGE_SIZE)
        return ioctl_struct(self.fileno(), _COPY, ffi.new("uint64_t[]", [address, source, PAGE_SIZE, 0, 0]))

    def proceed(self, address: int) -> Answer:
        """UFFDIO_CONTINUE of one page: map what the page cache holds and let those go on who wait for it."""
        return ioctl_struct(self.fileno(), _CONTINUE, ffi.new("uint64_t[]", [address, PAGE_SIZE, 0, 0]))
