"""GM-FD: a guest_memfd as a file and as a descriptor: what it shows, and what it lets nobody do."""

import ctypes
import fcntl
import os
import platform
import select
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Mapping as MappingOf
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi
from kvmgmem.abi import OK, PAGE_SIZE, GmemFlag
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import in_child
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import contract, disruptive, gmem_kinds, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, Running
from kvmgmem.vm import Vm

# What the file system code does does not depend on the kind; tests that differ by it name their own.
pytestmark = gmem_kinds("g0")

ANON_INODE_FS_MAGIC = 0x09041934
GUEST_MEMFD_MAGIC = 0x474D454D  # "GMEM"
O_LARGEFILE = {"x86_64": 0o100000, "aarch64": 0o400000}  # of the kernel: 0 in a 64-bit C library
AT_EMPTY_PATH = 0x1000
AT_FDCWD = -100

FIONREAD, FIOQSIZE, FIGETBSZ, FS_IOC_FIEMAP = 0x541B, 0x5460, 2, 0xC020660B
UNKNOWN_IOCTL = 0x7A7A

Call = Callable[[int], object]


def attempt(call: Callable[..., object], *arguments: object) -> object:
    """What a call of Python's returns, or the `Errno` that it raises."""
    try:
        return call(*arguments)
    except OSError as error:
        return Errno(-(error.errno or 0))


def answers(calls: MappingOf[str, Call], fd: OwnedFd) -> dict[str, object]:
    """What each call answers for a file."""
    return {name: attempt(call, fd.fileno()) for name, call in calls.items()}


@contextmanager
def ordinary_file(size: int) -> Iterator[OwnedFd]:
    """A memfd of that size: memory behind a descriptor as well, and a file that lets everybody do everything."""
    with OwnedFd(os.memfd_create("control", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as file:
        os.ftruncate(file.fileno(), size)
        yield file


def gmem_alone_refuses(gmem: GuestMemfd, wanted: Errno, calls: MappingOf[str, Call]) -> None:
    """Assert that each call works on an ordinary file of the same size and answers `wanted` on the gmem."""
    with ordinary_file(gmem.size) as other:
        accepted = answers(calls, other)
    assert not {name: answer for name, answer in accepted.items() if isinstance(answer, Errno)}
    assert answers(calls, gmem) == dict.fromkeys(calls, wanted)


def proc_path(fd: OwnedFd) -> str:
    """The file by its magic link."""
    return f"/proc/self/fd/{fd.fileno()}"


def filesystem_magic(fd: OwnedFd) -> int:
    """f_type of fstatfs(2)."""
    buffer = ffi.new("long[32]")
    assert entry.syscall(NUMBER["fstatfs"], fd.fileno(), entry.address_of(buffer)) == OK
    return int(buffer[0])


@contract("GM-FD-001")
@gmem_kinds("g0", "gM", "gMS", "gS")
def test_descriptor_is_not_close_on_exec(vm: Vm, gmem: GuestMemfd) -> None:
    """A gmem's descriptor is inherited by exec'd programs, where those of its VM and its vCPUs are close-on-exec."""
    assert fcntl.fcntl(gmem.fileno(), fcntl.F_GETFD) == 0
    assert fcntl.fcntl(vm.fileno(), fcntl.F_GETFD) == fcntl.FD_CLOEXEC


@contract("GM-FD-002")
@gmem_kinds("g0", "gM", "gMS", "gS")
def test_open_mode(gmem: GuestMemfd, host: Host) -> None:
    """A gmem is open for reading and writing, as a large file, with no other flag."""
    assert fcntl.fcntl(gmem.fileno(), fcntl.F_GETFL) == os.O_RDWR | O_LARGEFILE[host.machine]


@contract("GM-FD-003")
@gmem_kinds("g0", "gM", "gMS", "gS")
def test_looks_like_a_regular_file_of_its_creator(gmem: GuestMemfd) -> None:
    """A gmem is a regular file of mode 0600 that belongs to who created it."""
    found = os.fstat(gmem.fileno())
    assert (found.st_mode, found.st_uid, found.st_gid) == (stat.S_IFREG | 0o600, os.geteuid(), os.getegid())


@contract("GM-FD-003")
@requires("root")
def test_owner_is_the_file_system_user(kvm: Kvm) -> None:
    """A gmem belongs to the file system user and group of its creator, not to the effective ones."""

    def owner() -> tuple[int, int, int]:
        libc = ctypes.CDLL(None)
        with kvm.create_vm() as vm:
            libc.setfsgid(54321)
            libc.setfsuid(12345)
            with vm.create_guest_memfd(PAGE_SIZE) as gmem:
                found = os.fstat(gmem.fileno())
                return os.geteuid(), found.st_uid, found.st_gid

    assert in_child(owner) == (0, 12345, 54321)


@contract("GM-FD-004", "GM-FD-005")
@gmem_kinds("g0", "gM", "gMS", "gS")
def test_size_and_blocks(gmem: GuestMemfd) -> None:
    """st_size is the size asked for and st_blksize a page; st_blocks stays 0 and st_nlink 1 however much is allocated."""
    for allocated in (0, 1, gmem.pages):
        if allocated:
            gmem.allocate(0, allocated * PAGE_SIZE)
        found = os.fstat(gmem.fileno())
        assert gmem.allocated_pages() == allocated
        assert (found.st_size, found.st_blksize, found.st_blocks, found.st_nlink) == (gmem.size, PAGE_SIZE, 0, 1)


@contract("GM-FD-006", "GM-FD-007", "GM-FD-008")
def test_file_system(kvm: Kvm, vm: Vm, gmem: GuestMemfd, host: Host) -> None:
    """All gmems lie on one pseudo file system: their own with magic GMEM, or before 6.19 that of anonymous inodes."""
    # The magic decides which of the two it is; what else can be seen has to agree with it.
    magic = filesystem_magic(gmem)
    assert magic in (GUEST_MEMFD_MAGIC, ANON_INODE_FS_MAGIC)
    own = magic == GUEST_MEMFD_MAGIC
    device = os.fstat(gmem.fileno()).st_dev
    mappable = bool(host.caps["GUEST_MEMFD_FLAGS"] & GmemFlag.MMAP)
    with kvm.create_vm(vm.type) as other, other.create_guest_memfd(PAGE_SIZE, GmemFlag.MMAP if mappable else 0) as far:
        assert filesystem_magic(far) == magic
        assert os.fstat(far.fileno()).st_dev == device
        for fd in (gmem, far):
            assert os.readlink(proc_path(fd)) == ("/[kvm-gmem] (deleted)" if own else "anon_inode:[kvm-gmem]")
        if mappable:
            with far.map() as mapping:
                maps = Path("/proc/self/maps").read_text()
            name = " /[kvm-gmem] (deleted)" if own else "anon_inode:[kvm-gmem]"
            assert f"{mapping.address:x}-" in maps.partition(name)[0]
    assert filesystem_magic(vm) == ANON_INODE_FS_MAGIC  # a VM is an anonymous inode
    assert (device != os.fstat(vm.fileno()).st_dev) == own


@contract("GM-FD-009")
@gmem_kinds("g0", "gMS")
def test_no_read_and_no_write(gmem: GuestMemfd) -> None:
    """Nobody reads or writes a gmem through its descriptor, although it is open for both: EINVAL, for no bytes too."""
    gmem.allocate(0, PAGE_SIZE)
    gmem_alone_refuses(
        gmem,
        Errno.EINVAL,
        {
            "read": lambda fd: os.read(fd, 8),
            "read of nothing": lambda fd: os.read(fd, 0),
            "readv": lambda fd: os.readv(fd, [bytearray(8)]),
            "write": lambda fd: os.write(fd, b"12345678"),
            "write of nothing": lambda fd: os.write(fd, b""),
            "writev": lambda fd: os.writev(fd, [b"12345678"]),
        },
    )


@contract("GM-FD-010")
@gmem_kinds("g0", "gMS")
def test_no_positioned_read_and_write(gmem: GuestMemfd) -> None:
    """Reading and writing at a position is refused for want of a position: ESPIPE."""
    gmem_alone_refuses(
        gmem,
        Errno.ESPIPE,
        {
            "pread": lambda fd: os.pread(fd, 8, 0),
            "preadv": lambda fd: os.preadv(fd, [bytearray(8)], 0),
            "pwrite": lambda fd: os.pwrite(fd, b"12345678", 0),
            "pwritev": lambda fd: os.pwritev(fd, [b"12345678"], 0),
        },
    )


@contract("GM-FD-011")
@gmem_kinds("g0", "gMS")
def test_not_seekable(gmem: GuestMemfd) -> None:
    """A gmem has no position: lseek is ESPIPE for every whence, those for data and holes included."""
    gmem.allocate(0, PAGE_SIZE)
    whences = {"SEEK_SET": 0, "SEEK_CUR": 1, "SEEK_END": 2, "SEEK_HOLE": os.SEEK_HOLE}
    calls: dict[str, Call] = {name: partial(_seek, whence=whence) for name, whence in whences.items()}
    calls["SEEK_DATA"] = _seek_data
    gmem_alone_refuses(gmem, Errno.ESPIPE, calls)


def _seek(fd: int, whence: int) -> int:
    return os.lseek(fd, 0, whence)


def _seek_data(fd: int) -> int:
    attempt(os.pwrite, fd, b"data", 0)  # for the ordinary file; a gmem refuses
    return os.lseek(fd, 0, os.SEEK_DATA)


@contract("GM-FD-012")
def test_no_fsync(gmem: GuestMemfd) -> None:
    """There is nothing to synchronise: fsync and fdatasync are EINVAL."""
    gmem_alone_refuses(gmem, Errno.EINVAL, {"fsync": os.fsync, "fdatasync": os.fdatasync})


@contract("GM-FD-013")
@vm_types("default")
@gmem_kinds("gMS")
def test_sync_file_range_and_syncfs_do_nothing(vm: Vm, gmem: GuestMemfd) -> None:
    """sync_file_range with any legal flags and syncfs succeed, and neither pages nor contents change."""
    # Poison in a dirty page is an error of the file system in which all gmems are: EIO, once, for each that was there before
    # somebody was told (mm/memory-failure.c:me_pagecache_dirty; errseq_sample). So the one to be looked at comes later.
    entry.syscall(NUMBER["syncfs"], gmem.fileno())
    with vm.create_guest_memfd(gmem.size, gmem.flags) as later, later.map() as mapping:
        mapping.fill(0x5A, 0, 4 * PAGE_SIZE)
        for flags in range(8):
            assert entry.syscall(NUMBER["sync_file_range"], later.fileno(), 0, later.size, flags) == OK
        assert entry.syscall(NUMBER["sync_file_range"], later.fileno(), 0, later.size, 8) == Errno.EINVAL
        assert entry.syscall(NUMBER["syncfs"], later.fileno()) == OK
        assert later.allocated_pages() == 4
        assert mapping.is_filled_with(0x5A, 0, 4 * PAGE_SIZE)


@contract("GM-FD-014")
@gmem_kinds("g0", "gMS")
def test_size_is_immutable(gmem: GuestMemfd) -> None:
    """The size never changes: ftruncate to more, less, nothing and the same is EINVAL, and so is truncate by /proc."""
    gmem.allocate(0, PAGE_SIZE)
    sizes = {"same": gmem.size, "more": gmem.size + PAGE_SIZE, "less": PAGE_SIZE, "nothing": 0, "odd": 1}
    calls: dict[str, Call] = {}
    for name, size in sizes.items():
        calls[f"ftruncate, {name}"] = partial(_ftruncate, size=size)
        calls[f"truncate, {name}"] = partial(_truncate, size=size)
    gmem_alone_refuses(gmem, Errno.EINVAL, calls)
    assert os.fstat(gmem.fileno()).st_size == gmem.size
    assert gmem.allocated_pages() == 1


def _ftruncate(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def _truncate(fd: int, size: int) -> None:
    os.truncate(f"/proc/self/fd/{fd}", size)


@contract("GM-FD-015")
def test_attributes_are_immutable(gmem: GuestMemfd) -> None:
    """Mode, owner and times never change by request: fchmod, fchown and futimens are EINVAL, and chmod by /proc too."""
    before = os.fstat(gmem.fileno())
    gmem_alone_refuses(
        gmem,
        Errno.EINVAL,
        {
            "fchmod": lambda fd: os.fchmod(fd, 0o600),
            "fchmod, another mode": lambda fd: os.fchmod(fd, 0o644),
            "fchown": lambda fd: os.fchown(fd, os.geteuid(), os.getegid()),
            "futimens": lambda fd: os.utime(fd, (1, 2)),
            "futimens, now": os.utime,
            "chmod by /proc": lambda fd: Path(f"/proc/self/fd/{fd}").chmod(0o600),
            "chown by /proc": lambda fd: os.chown(f"/proc/self/fd/{fd}", os.geteuid(), os.getegid()),
            "utimensat by /proc": lambda fd: os.utime(f"/proc/self/fd/{fd}", (1, 2)),
        },
    )
    assert os.fstat(gmem.fileno()) == before


@contract("GM-FD-016")
def test_no_extended_attributes(gmem: GuestMemfd) -> None:
    """A gmem has no extended attributes: setting, getting and removing one is EOPNOTSUPP, and the list is empty."""
    calls: dict[str, Call] = {
        "set": lambda fd: os.setxattr(fd, "user.kvmgmem", b"value"),
        "get": lambda fd: os.getxattr(fd, "user.kvmgmem"),
        "remove": lambda fd: os.removexattr(fd, "user.kvmgmem"),
    }
    assert answers(calls, gmem) == dict.fromkeys(calls, Errno.ENOTSUP)
    # Security modules keep theirs outside of the file system.
    assert [name for name in os.listxattr(gmem.fileno()) if not name.startswith("security.")] == []


OPEN_MODES = {
    "O_RDONLY": os.O_RDONLY,
    "O_WRONLY": os.O_WRONLY,
    "O_RDWR": os.O_RDWR,
    "O_RDWR|O_TRUNC": os.O_RDWR | os.O_TRUNC,
    "O_RDONLY|O_NONBLOCK": os.O_RDONLY | os.O_NONBLOCK,
}


def open_and_close(path: str, flags: int) -> None:
    """Open a path, which raises OSError if refused."""
    os.close(os.open(path, flags | os.O_CLOEXEC))


@contract("GM-FD-017")
@gmem_kinds("g0", "gMS")
def test_cannot_be_reopened_by_proc(gmem: GuestMemfd) -> None:
    """There is no second open file of a gmem: opening it through /proc/PID/fd is ENXIO in every mode."""
    gmem.allocate(0, PAGE_SIZE)
    gmem_alone_refuses(
        gmem,
        Errno.ENXIO,
        {name: partial(_reopen, flags=flags) for name, flags in OPEN_MODES.items()},
    )
    assert (os.fstat(gmem.fileno()).st_size, gmem.allocated_pages()) == (gmem.size, 1)


def _reopen(fd: int, flags: int) -> None:
    open_and_close(f"/proc/self/fd/{fd}", flags)


@contract("GM-FD-018")
@requires("root")
@gmem_kinds("gM", "gMS")
def test_cannot_be_reopened_by_its_mapping(gmem: GuestMemfd) -> None:
    """There is no second open file of a gmem: opening it through /proc/PID/map_files is ENXIO in every mode."""
    with ordinary_file(gmem.size) as other, Mapping.of(other, gmem.size) as control, gmem.map() as mapping:
        for flags in OPEN_MODES.values():
            assert attempt(open_and_close, map_file(control), flags) is None
            assert attempt(open_and_close, map_file(mapping), flags) == Errno.ENXIO


def map_file(mapping: Mapping) -> str:
    """The link of a whole mapping in /proc."""
    return f"/proc/self/map_files/{mapping.address:x}-{mapping.address + mapping.length:x}"


@contract("GM-FD-019")
@requires("default-vm")
@vm_types("default")
def test_o_path_descriptor_is_inert(vm: Vm, gmem: GuestMemfd) -> None:
    """An O_PATH descriptor of a gmem can be had and shows the file, but neither allocates nor binds it: EBADF."""
    with OwnedFd(os.open(proc_path(gmem), os.O_PATH | os.O_CLOEXEC)) as path_only:
        assert os.fstat(path_only.fileno()).st_ino == os.fstat(gmem.fileno()).st_ino
        for fd, wanted in ((gmem, OK), (path_only, Errno.EBADF)):
            assert syscalls.fallocate(fd.fileno(), syscalls.FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE) == wanted
            request = MemoryRegion(slot=0, gpa=GPA, size=gmem.size, gmem=fd)
            assert vm.raw.set_region(request) == wanted
            vm.raw.delete_region(slot=0)


@contract("GM-FD-020")
def test_cannot_be_given_a_name(gmem: GuestMemfd) -> None:
    """A gmem cannot be linked into a directory: linkat of its descriptor is EXDEV."""
    with tempfile.TemporaryDirectory() as directory, tempfile.NamedTemporaryFile(dir=directory) as file:
        assert link(file.fileno(), f"{directory}/file") == OK
        assert link(gmem.fileno(), f"{directory}/gmem") == Errno.EXDEV
        assert sorted(os.listdir(directory)) == sorted(["file", os.path.basename(file.name)])  # noqa: PTH119
        os.unlink(f"{directory}/file")  # noqa: PTH108


def link(fd: int, path: str) -> Answer:
    """linkat(2) of a descriptor."""
    empty, target = ffi.new("char[]", b""), ffi.new("char[]", path.encode())
    return entry.syscall(NUMBER["linkat"], fd, entry.address_of(empty), AT_FDCWD, entry.address_of(target), AT_EMPTY_PATH)


@contract("GM-FD-021")
@gmem_kinds("g0", "gMS")
def test_not_executable(gmem: GuestMemfd) -> None:
    """A gmem cannot be executed: EACCES, where an ordinary file that is no program gets as far as ENOEXEC."""
    gmem.allocate(0, PAGE_SIZE)
    with ordinary_file(PAGE_SIZE) as other:
        os.fchmod(other.fileno(), 0o700)
        assert in_child(partial(execute, other.fileno())) == Errno.ENOEXEC
    assert in_child(partial(execute, gmem.fileno())) == Errno.EACCES
    if filesystem_magic(gmem) == GUEST_MEMFD_MAGIC:  # a mount of their own, which says so, too
        assert os.fstatvfs(gmem.fileno()).f_flag & os.ST_NOEXEC


def execute(fd: int) -> Answer:
    """execveat(2) of a descriptor, with no arguments to speak of."""
    empty = ffi.new("char[]", b"")
    argv = ffi.new("char *[]", [empty, ffi.NULL])
    where = entry.address_of(argv)
    return entry.syscall(NUMBER["execveat"], fd, entry.address_of(empty), where, where, AT_EMPTY_PATH)


@contract("GM-FD-022")
def test_no_seals(gmem: GuestMemfd) -> None:
    """A gmem is no memfd: reading its seals and adding one are EINVAL."""
    gmem_alone_refuses(
        gmem,
        Errno.EINVAL,
        {
            "F_GET_SEALS": lambda fd: fcntl.fcntl(fd, fcntl.F_GET_SEALS),
            "F_ADD_SEALS": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW),
        },
    )


@contract("GM-FD-023")
def test_no_direct_io_and_append_means_nothing(gmem: GuestMemfd) -> None:
    """O_APPEND can be switched on and changes nothing, other flags as well; O_DIRECT is EINVAL."""
    flags = fcntl.fcntl(gmem.fileno(), fcntl.F_GETFL)
    assert attempt(fcntl.fcntl, gmem.fileno(), fcntl.F_SETFL, flags | os.O_APPEND) == OK
    assert fcntl.fcntl(gmem.fileno(), fcntl.F_GETFL) == flags | os.O_APPEND
    assert attempt(os.write, gmem.fileno(), b"x") == Errno.EINVAL
    assert gmem.raw.allocate(0, PAGE_SIZE) == OK
    assert attempt(fcntl.fcntl, gmem.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT) == Errno.EINVAL
    assert fcntl.fcntl(gmem.fileno(), fcntl.F_GETFL) == flags | os.O_APPEND
    assert (os.fstat(gmem.fileno()).st_size, gmem.allocated_pages()) == (gmem.size, 1)


@contract("GM-FD-024")
def test_advisory_locks(gmem: GuestMemfd) -> None:
    """Advisory locks work as on any file: flock, and record locks that keep other processes off the range."""
    fd = gmem.fileno()

    def lock_of_another_process(start: int) -> object:
        return in_child(lambda: attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, PAGE_SIZE, start))

    for operation in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN):
        assert attempt(fcntl.flock, fd, operation | fcntl.LOCK_NB) is None
    assert lock_of_another_process(0) is None
    assert attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, PAGE_SIZE, 0) is None
    assert lock_of_another_process(0) == Errno.EAGAIN
    assert lock_of_another_process(PAGE_SIZE) is None
    assert attempt(fcntl.lockf, fd, fcntl.LOCK_UN, PAGE_SIZE, 0) is None
    assert lock_of_another_process(0) is None


@contract("GM-FD-025")
def test_no_ioctls_of_regular_files(gmem: GuestMemfd, host: Host) -> None:
    """A gmem has no ioctls of its own and counts as anonymous: FIONREAD and FIOQSIZE are ENOTTY as any unknown one.

    Before 6.16 anonymous inodes did not count as such, and a gmem has the ioctls of a regular file without blocks.
    """
    assert ioctl_number(gmem.fileno(), FIGETBSZ) == PAGE_SIZE
    if counts_as_anonymous(gmem, host):
        gmem_alone_refuses(
            gmem,
            Errno.ENOTTY,
            {"FIONREAD": lambda fd: ioctl_number(fd, FIONREAD), "FIOQSIZE": lambda fd: ioctl_number(fd, FIOQSIZE)},
        )
    else:
        assert [ioctl_number(gmem.fileno(), request) for request in (FIONREAD, FIOQSIZE)] == [gmem.size, 0]
    assert entry.ioctl(gmem.fileno(), UNKNOWN_IOCTL) == Errno.ENOTTY
    extents = ffi.new("uint64_t[4]", [0, gmem.size])  # struct fiemap without room for extents
    assert entry.ioctl_struct(gmem.fileno(), FS_IOC_FIEMAP, extents) == Errno.ENOTSUP


def counts_as_anonymous(gmem: GuestMemfd, host: Host) -> bool:
    """Whether the kernel has to tell anonymous inodes from regular files: all do that have gmem flags, which came later.

    Where there are none FIONREAD shows it (S_ANON_INODE, since 6.16).
    """
    return bool(host.caps["GUEST_MEMFD_FLAGS"]) or attempt(ioctl_number, gmem.fileno(), FIONREAD) == Errno.ENOTTY


def ioctl_number(fd: int, request: int) -> int:
    """An ioctl that writes a number; raises OSError."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, request, buffer)
    return int.from_bytes(buffer, "little")


@contract("GM-FD-026")
@gmem_kinds("g0", "gMS")
def test_copy_helpers_move_no_data(vm: Vm, gmem: GuestMemfd) -> None:
    """The kernel's copy helpers neither take data out of a gmem nor put any in: each refuses, with the errno of its own."""
    gmem.allocate(0, PAGE_SIZE)
    with vm.create_guest_memfd(gmem.size, gmem.flags) as twin:  # on the same file system, which a memfd is not
        assert attempt(os.copy_file_range, gmem.fileno(), twin.fileno(), 8, 0, 0) == Errno.EINVAL
        assert twin.allocated_pages() == 0
    with ordinary_file(gmem.size) as other, ordinary_file(gmem.size) as plain:
        os.pwrite(other.fileno(), b"secret", 0)
        wanted: dict[str, tuple[Call, Errno]] = {
            "copy_file_range from": (lambda fd: os.copy_file_range(fd, other.fileno(), 8, 0, 64), Errno.EXDEV),
            "copy_file_range to": (lambda fd: os.copy_file_range(other.fileno(), fd, 8, 64, 0), Errno.EXDEV),
            "sendfile from": (lambda fd: os.sendfile(other.fileno(), fd, None, 8), Errno.EINVAL),
            "sendfile from, with offset": (lambda fd: os.sendfile(other.fileno(), fd, 0, 8), Errno.ESPIPE),
            "sendfile to": (lambda fd: os.sendfile(fd, other.fileno(), 0, 8), Errno.EINVAL),
            "splice from": (splice_from, Errno.EINVAL),
            "splice to": (splice_to, Errno.EINVAL),
        }
        calls = {name: call for name, (call, _) in wanted.items()}
        accepted = answers(calls, plain)
        assert not {name: answer for name, answer in accepted.items() if isinstance(answer, Errno)}
        assert answers(calls, gmem) == {name: errno for name, (_, errno) in wanted.items()}
    assert gmem.allocated_pages() == 1
    if gmem.flags & GmemFlag.INIT_SHARED:
        with gmem.map() as mapping:
            assert mapping.is_filled_with(0, 0, PAGE_SIZE)


def splice_from(fd: int) -> int:
    """splice(2) from the file into a pipe."""
    reader, writer = os.pipe()
    try:
        return os.splice(fd, writer, 8)
    finally:
        os.close(reader)
        os.close(writer)


def splice_to(fd: int) -> int:
    """splice(2) from a pipe into the file."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"12345678")
        return os.splice(reader, fd, 8)
    finally:
        os.close(reader)
        os.close(writer)


@contract("GM-FD-027")
@vm_types("default")
@gmem_kinds("gMS")
def test_fadvise_frees_nothing(gmem: GuestMemfd) -> None:
    """posix_fadvise takes every advice and acts on none, DONTNEED least of all; an unknown one is EINVAL."""
    with gmem.map() as mapping:
        mapping.fill(0x77, 0, 4 * PAGE_SIZE)
        for advice in range(6):
            assert attempt(os.posix_fadvise, gmem.fileno(), 0, gmem.size, advice) is None
            assert attempt(os.posix_fadvise, gmem.fileno(), 0, 0, advice) is None
        assert attempt(os.posix_fadvise, gmem.fileno(), 0, gmem.size, 99) == Errno.EINVAL
        assert gmem.allocated_pages() == 4
        assert mapping.is_filled_with(0x77, 0, 4 * PAGE_SIZE)


@contract("GM-FD-028")
@gmem_kinds("g0", "gMS")
def test_no_readahead(gmem: GuestMemfd, host: Host) -> None:
    """There is nothing to read ahead of: readahead(2) is EINVAL (before 6.16 it does nothing), and allocates nothing."""
    readahead = NUMBER["readahead"]
    with ordinary_file(gmem.size) as other:
        assert entry.syscall(readahead, other.fileno(), 0, gmem.size) == OK
    refused = Errno.EINVAL if counts_as_anonymous(gmem, host) else OK
    assert entry.syscall(readahead, gmem.fileno(), 0, gmem.size) == refused
    assert gmem.allocated_pages() == 0


@contract("GM-FD-029")
def test_poll_and_epoll(gmem: GuestMemfd) -> None:
    """A gmem has no events: poll says at once that it is readable and writable, and epoll refuses to watch it (EPERM)."""
    poller = select.poll()
    poller.register(gmem.fileno(), select.POLLIN | select.POLLOUT | select.POLLPRI)
    assert poller.poll(0) == [(gmem.fileno(), select.POLLIN | select.POLLOUT)]
    with select.epoll() as epoll, OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) as event:
        assert attempt(epoll.register, event.fileno(), select.EPOLLIN) is None
        assert attempt(epoll.register, gmem.fileno(), select.EPOLLIN) == Errno.EPERM


@contract("GM-FD-030")
@requires("x86")
@gmem_kinds("gM", "gMS")
def test_cachestat_counts_allocated_pages(running: Running) -> None:
    """cachestat counts each page once it is allocated, by fallocate, guest or host, and none as dirty or written back."""
    gmem = running.gmem
    host_maps = bool(gmem.flags & GmemFlag.INIT_SHARED)
    assert cachestat(gmem) == (0, 0, 0, 0, 0)
    gmem.allocate(0, 2 * PAGE_SIZE)
    assert cachestat(gmem) == (2, 0, 0, 0, 0)
    running.cpu.store(running.gpa + 5 * PAGE_SIZE, 1)
    running.cpu.load(running.gpa + 7 * PAGE_SIZE)
    if host_maps:
        with gmem.map() as mapping:
            mapping.store(1, 9 * PAGE_SIZE)
            mapping.store(1, 9 * PAGE_SIZE + 8)
    expected = {0, 1, 5, 7} | ({9} if host_maps else set())
    # With shadow paging KVM prefetches the neighbours of a page that are allocated already; it allocates none.
    assert {page for page in range(16) if gmem.allocated_pages(page * PAGE_SIZE, PAGE_SIZE)} == expected
    assert cachestat(gmem) == (len(expected), 0, 0, 0, 0)
    gmem.punch(5 * PAGE_SIZE, PAGE_SIZE)
    assert cachestat(gmem) == (len(expected) - 1, 0, 0, 0, 0)


def cachestat(gmem: GuestMemfd) -> tuple[int, int, int, int, int]:
    """The whole answer of cachestat(2): cached, dirty, under writeback, evicted, recently evicted."""
    span = ffi.new("struct kvmgmem_cachestat_range *", {"off": 0, "len": 0})
    found = ffi.new("struct kvmgmem_cachestat *")
    answer = entry.syscall(NUMBER["cachestat"], gmem.fileno(), entry.address_of(span), entry.address_of(found), 0)
    assert answer == OK
    return found.nr_cache, found.nr_dirty, found.nr_writeback, found.nr_evicted, found.nr_recently_evicted


@contract("GM-FD-031")
@requires("x86")
@gmem_kinds("gM", "gMS")
def test_times_move_with_fallocate_and_not_with_stores(running: Running) -> None:
    """mtime and ctime move when fallocate allocates or punches, not with a guest's stores nor a host's to mapped pages."""
    gmem, cpu = running.gmem, running.cpu
    for change in (gmem.allocate, gmem.punch):
        before = times_that_can_move(gmem)
        change(0, PAGE_SIZE)
        assert [after > old for after, old in zip(times(gmem), before, strict=True)] == [True, True]
    with gmem.map() as mapping:
        if gmem.flags & GmemFlag.INIT_SHARED:
            assert mapping.load(PAGE_SIZE) == 0
        before = times_that_can_move(gmem)
        for page in range(4):
            cpu.store(running.gpa + page * PAGE_SIZE, page)
        if gmem.flags & GmemFlag.INIT_SHARED:
            mapping.store(1, PAGE_SIZE)
            assert (mapping.load(PAGE_SIZE), mapping.load(2 * PAGE_SIZE)) == (1, 2)
    assert gmem.allocated_pages() == 4
    assert gmem.raw.allocate(1, PAGE_SIZE) == Errno.EINVAL  # what fails moves nothing either
    assert times(gmem) == before


@contract("GM-FD-031")
@requires("default-vm")
@vm_types("default")
@gmem_kinds("gMS")
def test_times_move_with_a_write_fault_of_the_host(gmem: GuestMemfd) -> None:
    """mtime and ctime move when a store of the host faults the page in, as in any shared mapping; loads move neither."""
    # mm/memory.c:fault_dirty_shared_page calls file_update_time for every mapping without page_mkwrite (Linux 7.3).
    with gmem.map() as mapping:
        before = times_that_can_move(gmem)
        assert mapping.load(0) == 0
        assert times(gmem) == before
        mapping.store(1, PAGE_SIZE)
        assert [after > old for after, old in zip(times(gmem), before, strict=True)] == [True, True]


def times(gmem: GuestMemfd) -> tuple[int, int]:
    """mtime and ctime in nanoseconds."""
    found = os.fstat(gmem.fileno())
    return found.st_mtime_ns, found.st_ctime_ns


def times_that_can_move(gmem: GuestMemfd) -> tuple[int, int]:
    """mtime and ctime, once the coarse clock that they are taken from has gone on and a change would show."""
    found = times(gmem)
    coarse = 5  # CLOCK_REALTIME_COARSE, which Python's time has no name for
    wait_until(lambda: time.clock_gettime_ns(coarse) > max(found), "the coarse clock moves on")
    return found


@contract("GM-FD-032")
@requires("default-vm")
@vm_types("default")
def test_copies_are_the_same_open_file(vm: Vm, gmem: GuestMemfd) -> None:
    """dup, F_DUPFD, pidfd_getfd and SCM_RIGHTS give descriptors of the same open file, each as good for binding."""
    request = MemoryRegion(slot=0, gpa=GPA, size=gmem.size, gmem=gmem)
    assert vm.raw.set_region(request) == OK
    vm.delete_region(slot=0)
    with vm.create_guest_memfd(PAGE_SIZE) as unrelated:
        assert not same_open_file(gmem, unrelated)
    for name, copy in copies(gmem).items():
        with copy:
            assert same_open_file(gmem, copy), name
            assert copy.cloexec == (name in ("F_DUPFD_CLOEXEC", "pidfd_getfd")), name
            assert vm.raw.set_region(request.but(gmem=copy)) == OK, name
            assert vm.raw.set_region(request.but(gmem=copy, slot=1, gpa=2 * GPA)) in (Errno.EEXIST, Errno.EINVAL), name
        vm.delete_region(slot=0)


def copies(gmem: GuestMemfd) -> dict[str, OwnedFd]:
    """The same file by every way that a descriptor can be copied."""
    fd = gmem.fileno()
    pidfd = syscalls.pidfd_open(os.getpid())
    assert not isinstance(pidfd, Errno)
    with OwnedFd(pidfd):
        fetched = syscalls.pidfd_getfd(pidfd, fd)
    assert not isinstance(fetched, Errno)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
    return {
        "F_DUPFD": gmem.dup(cloexec=False),
        "F_DUPFD_CLOEXEC": gmem.dup(cloexec=True),
        "dup2": OwnedFd(os.dup2(fd, fd + 100, inheritable=True)),
        "pidfd_getfd": OwnedFd(fetched),
        "SCM_RIGHTS": OwnedFd(received),
    }


def same_open_file(a: OwnedFd, b: OwnedFd) -> bool:
    """Whether two descriptors share one open file, by kcmp(2) and by the flags that belong to the open file."""
    flags = fcntl.fcntl(a.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(a.fileno(), fcntl.F_SETFL, flags | os.O_APPEND)
    shared = bool(fcntl.fcntl(b.fileno(), fcntl.F_GETFL) & os.O_APPEND)
    fcntl.fcntl(a.fileno(), fcntl.F_SETFL, flags)
    answer = entry.syscall(NUMBER["kcmp"], os.getpid(), os.getpid(), 0, a.fileno(), b.fileno())
    if answer != Errno.ENOSYS:  # CONFIG_KCMP
        assert (answer == 0) == shared
    return shared


@contract("GM-FD-033")
@disruptive()
@requires("root", "x86")
@gmem_kinds("gM", "gMS")
def test_drop_caches_drops_no_contents(running: Running) -> None:
    """Dropping the page cache of the whole machine takes no page from a gmem, and host and guest read what was there."""
    gmem, cpu, pages = running.gmem, running.cpu, 16
    cpu.stamp(running.gpa, 1000, pages)
    for _ in range(2):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert gmem.allocated_pages() == pages
        assert cpu.first_unstamped(running.gpa, 1000, pages) is None
        if gmem.flags & GmemFlag.INIT_SHARED:
            with gmem.map() as mapping:
                assert [mapping.load(page * PAGE_SIZE) for page in range(pages)] == list(range(1000, 1000 + pages))


@contract("GM-FD-034")
@gmem_kinds("g0", "gMS")
def test_posix_fallocate_fails_in_its_emulation(gmem: GuestMemfd) -> None:
    """fallocate without KEEP_SIZE is EOPNOTSUPP, and glibc's posix_fallocate then fails to emulate it: ESPIPE."""
    with ordinary_file(gmem.size) as other:
        assert syscalls.fallocate(other.fileno(), 0, 0, PAGE_SIZE) == OK
        assert attempt(os.posix_fallocate, other.fileno(), 0, PAGE_SIZE) is None
    assert syscalls.fallocate(gmem.fileno(), syscalls.FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE) == OK
    assert syscalls.fallocate(gmem.fileno(), 0, 0, PAGE_SIZE) == Errno.ENOTSUP
    # Other C libraries hand the kernel's answer on.
    emulates = platform.libc_ver()[0] == "glibc"
    answer = attempt(os.posix_fallocate, gmem.fileno(), 0, PAGE_SIZE)
    assert answer == (Errno.ESPIPE if emulates else Errno.ENOTSUP)
