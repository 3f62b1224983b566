"""GM-OWN: one gmem, one file: copies of a descriptor are the same file, and there is no way to a second one (C11, C12)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import syscalls
from kvmgmem._native import ffi
from kvmgmem.abi import OK
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.processes import in_child
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    known_bug,
    requires,
    vm_types,
)
from kvmgmem.testing.descriptor_copies import COPIES
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.reopening import link_of, try_open
from kvmgmem.vm import Vm


@contract("C11")
@requires("kcmp")
@gmem_kinds("g0")
def test_copies_of_a_descriptor_are_the_same_file(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """However a gmem's descriptor is copied, the copy is the same file: its VM can bind it, no other can.

    The bindings are the file's, too: what one copy has bound, no other can bind again; and closing a copy changes nothing.
    """
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    with kvm.create_vm(vm.type) as other, other.create_guest_memfd(SIZE) as own:
        for name, copy_of in COPIES.items():
            with GuestMemfd(copy_of(gmem), SIZE, gmem.flags) as copy:
                assert syscalls.kcmp_same_file(os.getpid(), gmem.fileno(), os.getpid(), copy.fileno()), name
                assert other.raw.set_region(request.but(gmem=copy)) == Errno.EINVAL, name
                assert vm.raw.set_region(request.but(gmem=copy)) == OK, name
                known_bug("B14").expect(
                    vm.raw.set_region(request.but(slot=1, gpa=GPA + SIZE)), Errno.EEXIST, shows=Errno.EINVAL
                )
            # Still bound, although the descriptor that bound it is closed.
            assert vm.raw.set_region(request.but(slot=1, gpa=GPA + SIZE)) in (Errno.EEXIST, Errno.EINVAL), name
            vm.delete_region(0)
            assert vm.raw.set_region(request.but(slot=1, gpa=GPA + SIZE)) == OK, name
            vm.delete_region(1)
        assert other.raw.set_region(request.but(gmem=own)) == OK
        assert not syscalls.kcmp_same_file(os.getpid(), gmem.fileno(), os.getpid(), own.fileno())


def _text(data: bytes | str) -> Any:
    return ffi.new("char[]", data.encode() if isinstance(data, str) else data)


AT_FDCWD = -100

AT_SYMLINK_FOLLOW = 0x400

AT_EMPTY_PATH = 0x1000

AT_HANDLE_FID = 0x200

OPEN_TREE_CLONE = 1

PR_SET_MM = 35

PR_SET_MM_EXE_FILE = 13


def _openat2(gmem: GuestMemfd) -> Answer:
    path, how = _text(link_of(gmem)), ffi.new("uint64_t[3]", [os.O_RDWR, 0, 0])
    return syscall(NUMBER["openat2"], AT_FDCWD, address_of(path), address_of(how), 24)


def _handle(gmem: GuestMemfd, flags: int) -> tuple[Answer, Any]:
    """name_to_handle_at(2) of the file itself: the answer and the struct file_handle."""
    handle, mount_id, empty = ffi.new("uint32_t[34]", [128]), ffi.new("int *"), _text("")
    arguments = (gmem.fileno(), address_of(empty), address_of(handle), address_of(mount_id))
    return syscall(NUMBER["name_to_handle_at"], *arguments, AT_EMPTY_PATH | flags), handle


def _open_by_handle(gmem: GuestMemfd) -> Answer:
    """With the kind of handle that only identifies a file (AT_HANDLE_FID, Linux 6.5), the kernel gives one: to no avail."""
    answer, handle = _handle(gmem, AT_HANDLE_FID)
    if isinstance(answer, Errno):
        return answer
    return syscall(NUMBER["open_by_handle_at"], gmem.fileno(), address_of(handle), os.O_RDWR)


def _clone_mount(gmem: GuestMemfd) -> Answer:
    empty = _text("")
    return syscall(NUMBER["open_tree"], gmem.fileno(), address_of(empty), AT_EMPTY_PATH | OPEN_TREE_CLONE | os.O_CLOEXEC)


def _link_out(gmem: GuestMemfd) -> Answer:
    empty, target = _text(""), _text(f"/tmp/kvmgmem-link-{os.getpid()}")
    return syscall(NUMBER["linkat"], gmem.fileno(), address_of(empty), AT_FDCWD, address_of(target), AT_EMPTY_PATH)


def _link_out_by_proc(gmem: GuestMemfd) -> Answer:
    source, target = _text(link_of(gmem)), _text(f"/tmp/kvmgmem-link-{os.getpid()}")
    return syscall(NUMBER["linkat"], AT_FDCWD, address_of(source), AT_FDCWD, address_of(target), AT_SYMLINK_FOLLOW)


def _file_system(_: GuestMemfd) -> Answer:
    name = _text("guest_memfd")
    return syscall(NUMBER["fsopen"], address_of(name), 1)


def _mount(_: GuestMemfd) -> Answer:
    name, target = _text("guest_memfd"), _text("/tmp")
    return syscall(NUMBER["mount"], address_of(name), address_of(target), address_of(name), 0, 0)


def _execute(gmem: GuestMemfd) -> Answer:
    empty, nothing = _text(""), ffi.new("char *[1]")
    vector = address_of(nothing)
    return syscall(NUMBER["execveat"], gmem.fileno(), address_of(empty), vector, vector, AT_EMPTY_PATH)


def _become_executable(file: OwnedFd) -> Answer:
    return syscall(NUMBER["prctl"], PR_SET_MM, PR_SET_MM_EXE_FILE, file.fileno())


@contract("C12")
@gmem_kinds("g0", "gMS")
def test_gmem_cannot_be_opened_again(gmem: GuestMemfd) -> None:
    """No second file can be made for a gmem's inode: its links in /proc do not open, in any mode, from any process.

    The inode's default open answers ENXIO (fs/inode.c: no_open).
    """
    path, from_outside = link_of(gmem), f"/proc/{os.getpid()}/fd/{gmem.fileno()}"
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_CREAT, 3):
        assert try_open(path, flags) == Errno.ENXIO
    assert in_child(lambda: try_open(from_outside, os.O_RDWR)) == Errno.ENXIO
    assert _openat2(gmem) == Errno.ENXIO
    assert try_open(path, os.O_TMPFILE | os.O_RDWR) == Errno.ENOTDIR
    with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as inert:  # the control: the path itself is right
        assert os.fstat(inert.fileno()).st_ino == os.fstat(gmem.fileno()).st_ino


@contract("C12")
@requires("root")
@vm_types("default")
@gmem_kinds("gMS")
def test_mapped_gmem_cannot_be_opened_again(gmem: GuestMemfd) -> None:
    """Nor does the link to a mapping of a gmem open."""
    with gmem.map() as mapping:
        path = f"/proc/self/map_files/{mapping.address:x}-{mapping.address + mapping.length:x}"
        assert Path(path).is_symlink()
        assert try_open(path, os.O_RDWR) == Errno.ENXIO


ROUTES: dict[str, tuple[Callable[[GuestMemfd], Answer], Errno]] = {
    "name_to_handle_at": (lambda gmem: _handle(gmem, 0)[0], Errno.ENOTSUP),
    "open_by_handle_at": (_open_by_handle, Errno.ESTALE),
    "open_tree": (_clone_mount, Errno.EINVAL),
    "linkat": (_link_out, Errno.EXDEV),
    "linkat-proc": (_link_out_by_proc, Errno.EXDEV),
    "fsopen": (_file_system, Errno.ENODEV),
    "mount": (_mount, Errno.ENODEV),
    "execveat": (_execute, Errno.EACCES),
}


@contract("C12")
@requires("root")
@vm_types("default")
@gmem_kinds("g0")
def test_no_other_way_to_a_second_file(gmem: GuestMemfd) -> None:
    """Neither file handles, mount clones, hard links, the file system's name nor execution make a second file of a gmem."""
    answers = {name: route(gmem) for name, (route, _) in ROUTES.items()}
    assert answers == {name: wanted for name, (_, wanted) in ROUTES.items()}


@contract("C12")
@vm_types("default")
@gmem_kinds("g0")
def test_gmem_cannot_become_the_executable(gmem: GuestMemfd) -> None:
    """Nor does a process get it as its executable, whose link in /proc could then be used."""
    with OwnedFd(os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)) as program:
        control = _become_executable(program)
    if control == Errno.EPERM:
        pytest.skip("prctl(PR_SET_MM_EXE_FILE) needs CAP_SYS_RESOURCE, which this process lacks")
    assert control == Errno.EBUSY  # a program would do, were the present one not mapped
    assert _become_executable(gmem) == Errno.EACCES
