"""GM-OWN: a gmem pins the VM that made it, a slot does not pin the gmem, and the data outlives the slot (C5 to C10)."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmgmem import syscalls
from kvmgmem._native import ffi
from kvmgmem.abi import OK, PAGE_SIZE, GmemFlag
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    need,
    requires,
    vm_types,
)
from kvmgmem.testing.dead_slots import assert_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@contract("C5")
@requires("debugfs", "modules")
@vm_types("default")
def test_pinned_vm_holds_the_module(vm: Vm) -> None:
    """A VM that only a gmem keeps alive keeps KVM's modules loaded as well."""
    with vm.create_guest_memfd(SIZE):
        vm.close()
        assert int(Path("/sys/module/kvm/refcnt").read_text()) > 0


class Holder:
    """Something that may keep a gmem's file open: made from the gmem, then dropped."""

    def __init__(self, drop: Callable[[], None]) -> None:
        self.drop = drop


def _hold_dup(gmem: GuestMemfd) -> Holder:
    return Holder(gmem.duplicate().close)


def _hold_fork(gmem: GuestMemfd) -> Holder:
    child = ChildProcess(lambda channel: channel.receive())
    return Holder(lambda: child.__exit__(None, None, None))


def _hold_received(gmem: GuestMemfd) -> Holder:
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [gmem.fileno()])
        _, fds, _, _ = socket.recv_fds(receiver, 1, 1)
    return Holder(OwnedFd(fds[0]).close)


def _hold_mapping(gmem: GuestMemfd) -> Holder:
    return Holder(gmem.map(prot=0).unmap)


def _hold_io_uring(gmem: GuestMemfd) -> Holder:
    need("io-uring")
    parameters = ffi.new("char[120]")
    ring = syscall(NUMBER["io_uring_setup"], 1, address_of(parameters))
    assert not isinstance(ring, Errno), ring
    owned = OwnedFd(ring)
    files = ffi.new("int[1]", [gmem.fileno()])
    register_files = 2
    assert syscall(NUMBER["io_uring_register"], ring, register_files, address_of(files), 1) == OK
    return Holder(owned.close)


HOLDERS = {
    "dup": _hold_dup,
    "forked-child": _hold_fork,
    "received": _hold_received,
    "mapping": _hold_mapping,
    "io-uring-file": _hold_io_uring,
}


@contract("C6")
@requires("debugfs")
@vm_types("default")
@gmem_kinds("gMS")
@pytest.mark.parametrize("holder", HOLDERS)
def test_last_real_reference_frees_the_vm(vm: Vm, gmem: GuestMemfd, holder: str) -> None:
    """A VM whose descriptors are closed is freed when the last reference to its gmem goes, of whatever sort it is."""
    directory = VmDirectory.of(vm)
    vm.bind(gmem, gpa=GPA)
    gmem.allocate(0, PAGE_SIZE)
    vm.close()
    held = HOLDERS[holder](gmem)
    gmem.close()
    assert directory.exists
    held.drop()
    directory.wait_gone()


@contract("C6")
@requires("debugfs")
@gmem_kinds("g0")
def test_path_descriptor_does_not_keep_the_vm(vm: Vm, gmem: GuestMemfd) -> None:
    """An O_PATH descriptor of a gmem keeps its inode but neither its file nor the VM: it is no reference to the memory."""
    directory = VmDirectory.of(vm)
    with OwnedFd(os.open(f"/proc/self/fd/{gmem.fileno()}", os.O_PATH | os.O_CLOEXEC)) as path:
        vm.close()
        gmem.close()
        directory.wait_gone()
        assert os.fstat(path.fileno()).st_size == SIZE
        assert syscalls.fallocate(path.fileno(), syscalls.FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE) == Errno.EBADF


@contract("C8")
@guest_reaches
def test_forked_mapping_keeps_the_binding_alive(running: Running) -> None:
    """A mapping that a forked child inherited keeps the binding alive in its parent's VM, with no descriptor left."""
    cpu, gpa, gmem = running.cpu, running.gpa, running.gmem
    cpu.store(gpa, STAMP)
    with gmem.map() as mapping:

        def child(channel: Channel) -> None:
            channel.receive()
            mapping.unmap()
            channel.send("unmapped")
            channel.receive()

        with ChildProcess(child, close_fds=[gmem.fileno(), running.vm.fileno()]) as holder:
            gmem.close()
            mapping.unmap()
            assert cpu.load(gpa) == STAMP
            holder.send()
            assert holder.receive() == "unmapped"
            assert_dead(cpu, gpa)
            holder.send()
            holder.wait()


@contract("C10")
@guest_reaches
def test_deleting_a_slot_does_not_touch_the_data(running: Running) -> None:
    """Deleting a slot leaves the file's contents as they are, for any later binding of any part of it anywhere."""
    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    cpu.stamp(running.gpa, STAMP, 8)
    vm.delete_region(0)
    assert gmem.allocated_pages() == 8
    if gmem.flags & GmemFlag.INIT_SHARED:
        with gmem.map() as mapping:
            assert [mapping.load(page * PAGE_SIZE) for page in range(8)] == list(range(STAMP, STAMP + 8))
    for slot, gpa, first, pages in (
        (0, GPA, 0, 8),
        (0, GPA + SIZE, 0, 8),  # another address
        (77, GPA, 0, 8),  # another slot
        (0, GPA, 0, 3),  # another size
        (0, GPA, 0, 512),
        (5, GPA + PAGE_SIZE, 2, 6),  # shifted
        (6, 0x1_0000, 7, 1),
    ):
        vm.bind(gmem, slot=slot, gpa=gpa, size=pages * PAGE_SIZE, offset=first * PAGE_SIZE)
        assert cpu.first_unstamped(gpa, STAMP + first, min(pages, 8 - first)) is None
        vm.delete_region(slot)
    assert gmem.allocated_pages() == 8


@contract("C10")
@vm_types("sw-protected")
@gmem_kinds("g0")
def test_deleting_a_slot_does_not_touch_private_data(running: Running) -> None:
    """Private contents survive the deletion of their slot as well."""
    running.vm.set_private(GPA, 2 * SIZE)
    running.cpu.stamp(GPA, STAMP, 8)
    running.vm.delete_region(0)
    running.vm.set_region(running.region.but(slot=3, gpa=GPA + SIZE))
    assert running.cpu.first_unstamped(GPA + SIZE, STAMP, 8) is None
