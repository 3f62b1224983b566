"""System calls by name, with the kernel's answer as a value; those whose libc wrappers hide or change something."""

import os
from typing import Any

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno, KvmError

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

# x86-64 and the generic table of arm64 differ in all but the newest numbers.
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "mmap": 9, "mprotect": 10, "munmap": 11, "ioctl": 16, "pread64": 17, "pwrite64": 18,
        "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28, "ptrace": 101, "fstatfs": 138, "mlock": 149,
        "munlock": 150, "prctl": 157, "mount": 165, "delete_module": 176, "readahead": 187, "exit_group": 231,
        "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "linkat": 265, "unshare": 272, "splice": 275,
        "sync_file_range": 277, "vmsplice": 278, "move_pages": 279, "fallocate": 285, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "syncfs": 306, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "execveat": 322, "userfaultfd": 323, "copy_file_range": 326,
    },
    "aarch64": {
        "ioctl": 29, "linkat": 37, "mount": 40, "fstatfs": 44, "fallocate": 47, "read": 63, "write": 64,
        "pread64": 67, "pwrite64": 68, "vmsplice": 75, "splice": 76, "sync_file_range": 84, "exit_group": 94,
        "unshare": 97, "delete_module": 106, "ptrace": 117, "prctl": 167, "readahead": 213, "munmap": 215,
        "mremap": 216, "mmap": 222, "mprotect": 226, "msync": 227, "mlock": 228, "munlock": 229, "mincore": 232,
        "madvise": 233, "mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "move_pages": 239,
        "name_to_handle_at": 264, "open_by_handle_at": 265, "syncfs": 267, "process_vm_readv": 270,
        "process_vm_writev": 271, "kcmp": 272, "execveat": 281, "userfaultfd": 282, "copy_file_range": 285,
    },
}  # fmt: skip
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "fsopen": 430, "pidfd_open": 434, "close_range": 436, "openat2": 437, "pidfd_getfd": 438,
    "memfd_secret": 447, "cachestat": 451, "mseal": 462,
}  # fmt: skip
NUMBER = {**_COMMON, **_NUMBERS.get(os.uname().machine, {})}


def mmap(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> Answer:
    """mmap(2): the address, or an `Errno`. Unlike Python's own module it keeps no descriptor of the file."""
    return syscall(NUMBER["mmap"], address, length, prot, flags, fd, offset)


def munmap(address: int, length: int) -> Answer:
    """munmap(2)."""
    return syscall(NUMBER["munmap"], address, length)


def mprotect(address: int, length: int, prot: int) -> Answer:
    """mprotect(2)."""
    return syscall(NUMBER["mprotect"], address, length, prot)


def madvise(address: int, length: int, advice: int) -> Answer:
    """madvise(2)."""
    return syscall(NUMBER["madvise"], address, length, advice)


def mincore(address: int, length: int, vector: Any) -> Answer:
    """mincore(2) into a cffi array of one byte per page."""
    return syscall(NUMBER["mincore"], address, length, address_of(vector))


def fallocate(fd: int, mode: int, offset: int, length: int) -> Answer:
    """fallocate(2) with any mode; glibc's posix_fallocate would emulate what the kernel refuses."""
    return syscall(NUMBER["fallocate"], fd, mode, offset, length)


def cachestat(fd: int, offset: int, length: int) -> int:
    """How many pages of the file are allocated in a range (cachestat(2), Linux 6.5); length 0: to the end.

    For a guest_memfd this is exact whether or not the file can be mapped. Raises `KvmError` (ENOSYS without
    CONFIG_CACHESTAT_SYSCALL).
    """
    span = ffi.new("struct kvmgmem_cachestat_range *", {"off": offset, "len": length})
    found = ffi.new("struct kvmgmem_cachestat *")
    answer = syscall(NUMBER["cachestat"], fd, address_of(span), address_of(found), 0)
    if isinstance(answer, Errno):
        raise KvmError("cachestat", f"fd={fd}, offset={offset:#x}, length={length:#x}", answer)
    return int(found.nr_cache)


def kcmp_same_file(pid_a: int, fd_a: int, pid_b: int, fd_b: int) -> bool:
    """Whether two descriptors refer to one open file (kcmp(2) KCMP_FILE)."""
    answer = syscall(NUMBER["kcmp"], pid_a, pid_b, 0, fd_a, fd_b)
    if isinstance(answer, Errno):
        raise KvmError("kcmp", f"pid {pid_a} fd {fd_a}, pid {pid_b} fd {fd_b}", answer)
    return answer == 0


def pidfd_open(pid: int) -> Answer:
    """pidfd_open(2)."""
    return syscall(NUMBER["pidfd_open"], pid, 0)


def pidfd_getfd(pidfd: int, fd: int) -> Answer:
    """pidfd_getfd(2): a copy of another process's descriptor."""
    return syscall(NUMBER["pidfd_getfd"], pidfd, fd, 0)


def mremap(address: int, length: int, new_length: int) -> Answer:
    """mremap(2) that may move the mapping: its new address."""
    return syscall(NUMBER["mremap"], address, length, new_length, 1)


def msync(address: int, length: int, flags: int) -> Answer:
    """msync(2)."""
    return syscall(NUMBER["msync"], address, length, flags)


def mlock(address: int, length: int) -> Answer:
    """mlock(2)."""
    return syscall(NUMBER["mlock"], address, length)


def munlock(address: int, length: int) -> Answer:
    """munlock(2)."""
    return syscall(NUMBER["munlock"], address, length)


def read(fd: int, address: int, length: int) -> Answer:
    """read(2) into memory at an address, good or bad."""
    return syscall(NUMBER["read"], fd, address, length)


def write(fd: int, address: int, length: int) -> Answer:
    """write(2) from memory at an address, good or bad."""
    return syscall(NUMBER["write"], fd, address, length)


def pread(fd: int, address: int, length: int, offset: int = 0) -> Answer:
    """pread(2) into memory at an address, good or bad."""
    return syscall(NUMBER["pread64"], fd, address, length, offset)


def pwrite(fd: int, address: int, length: int, offset: int = 0) -> Answer:
    """pwrite(2) from memory at an address, good or bad."""
    return syscall(NUMBER["pwrite64"], fd, address, length, offset)


def vmsplice(pipe: int, address: int, length: int) -> Answer:
    """vmsplice(2) of one range into a pipe."""
    vector = ffi.new("uint64_t[]", [address, length])
    return syscall(NUMBER["vmsplice"], pipe, address_of(vector), 1, 0)


def process_vm_readv(pid: int, local: int, remote: int, length: int) -> Answer:
    """process_vm_readv(2) of one range: from another process's address to one of ours."""
    return _process_vm("process_vm_readv", pid, local, remote, length)


def process_vm_writev(pid: int, local: int, remote: int, length: int) -> Answer:
    """process_vm_writev(2) of one range: from an address of ours to another process's."""
    return _process_vm("process_vm_writev", pid, local, remote, length)


def _process_vm(call: str, pid: int, local: int, remote: int, length: int) -> Answer:
    ours, theirs = ffi.new("uint64_t[]", [local, length]), ffi.new("uint64_t[]", [remote, length])
    return syscall(NUMBER[call], pid, address_of(ours), 1, address_of(theirs), 1, 0)
