"""GM-OWN: one struct kvm owns each guest_memfd file, and nobody else gets at its memory through a binding.

The ids C1 to C33 are the statements that the guest_memfd design discussion settled; Documentation/virt/kvm/api.rst 4.142
words the outcome as ABI: the inode is the memory of the virtual machine, a file is one struct kvm's view of it.
"""

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MemFlag, MiB, VmType
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import MmioExit
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import DEVICE, Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess, in_child
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import (
    contract,
    disruptive,
    gmem_kinds,
    known_bug,
    need,
    requires,
    vm_types,
    wait_until,
)
from kvmgmem.testing.dead_slots import assert_dead, is_dead
from kvmgmem.testing.fixtures import GPA, PLAIN_TYPES, SIZE, Bound, Running
from kvmgmem.testing.meminfo import meminfo
from kvmgmem.testing.tracing import traced
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm, region2

STAMP = 0x5EED_0000_0000_0001
ELSEWHERE = 0x2_0000_0000  # guest memory that no other slot of these tests uses

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> float:
    """The factor on the volume of long tests (--effort)."""
    return float(request.config.getoption("--effort"))


# -- C1 to C4: nobody but the creator ----------------------------------------------------------------------------------


def binds(vm: Vm, gmem: GuestMemfd) -> list[MemoryRegion]:
    """Good binds of one page, at the edges of what a VM offers: slot ids, file offsets, address spaces."""
    first = MemoryRegion(slot=0, gpa=GPA, size=PAGE_SIZE, gmem=gmem)
    last_slot = vm.check_extension(Cap.NR_MEMSLOTS) - 1
    found = [first, first.but(slot=last_slot), first.but(gmem_offset=gmem.size - PAGE_SIZE)]
    if vm.check_extension(Cap.MULTI_ADDRESS_SPACE) > 1:
        found.append(first.but(as_id=1))
    return found


def complaints_about(other: Vm, gmem: GuestMemfd, name: str) -> list[str]:
    """What a foreign VM may do with a gmem and must not, or must be able to do with its own and cannot."""
    wrong: list[str] = []
    with other.create_guest_memfd(gmem.size) as own:
        for request in binds(other, gmem):
            answer = other.raw.set_region(request)
            if answer != Errno.EINVAL:
                wrong.append(f"{name}: {request} -> {answer!r}")
            control = other.raw.set_region(request.but(gmem=own))
            if control != OK:
                wrong.append(f"{name}: its own gmem: {request} -> {control!r}")
            other.raw.delete_region(request.slot, request.as_id)
    return wrong


def complaints(kvm: Kvm, older: Vm, gmem: GuestMemfd) -> list[str]:
    """`complaints_about` for VMs of this process: one older than the gmem, and younger ones of every type."""
    wrong = complaints_about(older, gmem, "an older VM")
    for vm_type in (offered for offered in kvm.vm_types() if offered in PLAIN_TYPES):
        with kvm.create_vm(vm_type) as younger:
            wrong += complaints_about(younger, gmem, f"a younger {vm_type.label} VM")
    return wrong


def crowd(vm: Vm) -> None:
    """Give a VM more slots than the others have, out of their way."""
    for slot in range(1, 9):
        vm.set_region(MemoryRegion(slot, ELSEWHERE + slot * PAGE_SIZE, PAGE_SIZE))


class Stranger:
    """Somebody else with VMs of their own, in this thread, another thread, or another process that is sent the gmem."""

    def __init__(self, kvm: Kvm, where: str, vm_type: VmType) -> None:
        self._kvm = kvm
        self._where = where
        self._older: Vm | None = None
        self._child: ChildProcess | None = None
        if where == "other-process":
            self._child = ChildProcess(lambda channel: _stranger(channel, vm_type))
        else:
            self._older = kvm.create_vm(vm_type)
            crowd(self._older)

    def complaints(self, gmem: GuestMemfd) -> list[str]:
        """What is wrong about how the gmem is refused there."""
        if self._child is not None:
            self._child.send((gmem.size, int(gmem.flags)), fds=[gmem.fileno()])
            answer: list[str] = self._child.receive()
            return answer
        assert self._older is not None
        if self._where == "same-thread":
            return complaints(self._kvm, self._older, gmem)
        found: list[str] = ["the thread died"]

        def in_thread() -> None:
            assert self._older is not None
            found[:] = complaints(self._kvm, self._older, gmem)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        return found

    def close(self) -> None:
        """Be gone."""
        if self._child is not None:
            with self._child:
                pass
        if self._older is not None:
            self._older.close()


def _stranger(channel: Channel, vm_type: VmType) -> None:
    with Kvm.open() as kvm, kvm.create_vm(vm_type) as older:
        crowd(older)
        while True:
            (size, flags), (number,) = channel.receive_with_fds()
            with GuestMemfd(number, size, flags) as received:
                channel.send(complaints(kvm, older, received))


@contract("C1")
@gmem_kinds("g0")
@pytest.mark.parametrize("where", ["same-thread", "other-thread", "other-process"])
def test_only_the_creating_vm_can_bind(kvm: Kvm, vm_type: VmType, gmem_kind: GmemFlag, where: str) -> None:
    """Only the VM that created a gmem can bind it: never any other VM, whatever its type, age, process, slots or state.

    A refusal changes nothing: the other VM binds its own gmem in the same place, and the creator its own as before.
    """
    with (
        contextlib.closing(Stranger(kvm, where, vm_type)) as stranger,
        kvm.create_vm(vm_type) as vm,
        vm.create_guest_memfd(SIZE, gmem_kind) as gmem,
    ):
        assert stranger.complaints(gmem) == []  # never bound
        vm.bind(gmem, gpa=GPA)
        assert stranger.complaints(gmem) == []  # bound
        vm.delete_region(0)
        assert stranger.complaints(gmem) == []  # bound and deleted
        for request in binds(vm, gmem):
            assert vm.raw.set_region(request) == OK
            vm.delete_region(request.slot, request.as_id)


@contract("C2", "C31")
@requires("debugfs")
@gmem_kinds("g0")
def test_refusal_lasts_as_long_as_the_gmem(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """No other VM can bind a gmem at any point of its creator's life, not even one that took over its descriptor number.

    After the creator's process is gone: GM-LIFE-018. After the creator is marked dead: C27.
    """
    directory, number, vcpu = VmDirectory.of(vm), vm.fileno(), vm.create_vcpu()
    with kvm.create_vm(vm.type) as older, kvm.create_vm(vm.type) as spare:
        vm.close()
        assert complaints(kvm, older, gmem) == []  # only a vCPU and the gmem are left
        vcpu.close()
        assert directory.exists
        assert complaints(kvm, older, gmem) == []  # only the gmem is left
        os.dup2(spare.fileno(), number)
        with Vm(number, vm.type, vm.vcpu_mmap_size) as heir:
            assert complaints_about(heir, gmem, "a VM behind the creator's number") == []


@contract("C3")
@requires("debugfs")
def test_refusals_leak_nothing(kvm: Kvm, vm: Vm, effort: float) -> None:
    """Refused binds leave nothing behind: neither kernel memory nor references to the gmem file or to either VM."""
    rounds = max(1000, int(10_000 * effort))
    with kvm.create_vm(vm.type) as other, vm.create_guest_memfd(SIZE) as gmem:
        directories = VmDirectory.of(vm), VmDirectory.of(other)
        request = region2(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem))
        assert vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) == OK
        before = meminfo("SUnreclaim")
        answers = {other.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) for _ in range(rounds)}
        assert answers == {Errno.EINVAL}
        # Each refusal has a struct kvm_memory_slot of some 200 bytes in hand; half of that would be seen here.
        wait_until(lambda: meminfo("SUnreclaim") < before + rounds * 100, "kernel memory is back where it was")
    vm.close()
    for directory in directories:
        directory.wait_gone()


@contextlib.contextmanager
def taken(number: int) -> Iterator[None]:
    """A descriptor number is taken: a new VM with the number of one that is still pinned would share its debugfs name."""
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if null != number:
            os.dup2(null, number)
        yield
    finally:
        os.close(null)
        if null != number:
            os.close(number)


def _walk_the_allocator(kvm: Kvm, request: Any, rounds: int, cpu: int, answers: list[Answer]) -> None:
    """Make VMs and let each try the bind, with 0 to 3 older ones alive, all on one CPU."""
    # The allocator hands back the object that this CPU freed last, so creator and closer stay on one.
    os.sched_setaffinity(0, {cpu})
    types = [vm_type for vm_type in kvm.vm_types() if vm_type in PLAIN_TYPES]
    held: list[Vm] = []
    for index in range(rounds):
        other = kvm.create_vm(types[index % len(types)])
        answers.append(other.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request))
        held.append(other)
        while len(held) > index // 8 % 4:
            held.pop(0).close()
    for other in held:
        other.close()


@contract("C4", "C30")
@pytest.mark.parametrize("threads", [1, 4])
def test_address_of_the_owner_is_never_reused(kvm: Kvm, vm: Vm, threads: int, effort: float) -> None:
    """A gmem pins the struct kvm that created it, so that no later VM can come to lie at its address and pass for it.

    Whether addresses would come back if it did not is what the power check C4p measures.
    """
    rounds = max(2, int(48 * effort / threads))
    cpus = sorted(os.sched_getaffinity(0))
    with vm.create_guest_memfd(SIZE) as gmem:
        request = region2(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem))
        assert vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) == OK
        vm.delete_region(0)
        number = vm.fileno()
        vm.close()
        answers: list[Answer] = []
        workers = [
            threading.Thread(target=_walk_the_allocator, args=(kvm, request, rounds, cpus[i % len(cpus)], answers))
            for i in range(threads)
        ]
        with taken(number):
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert len(answers) == rounds * threads > 0
        assert set(answers) == {Errno.EINVAL}


# struct kvm is the first charged allocation by the code of KVM_CREATE_VM, into which kvm_create_vm and kvm_arch_alloc_vm are
# inlined or not (7.3.4: 7360 bytes for kvm_amd; seen so on 6.18 too).
STRUCT_KVM = re.compile(
    r"kmalloc: call_site=(?:kvm_dev_ioctl|kvm_create_vm|kvm_arch_alloc_vm)\S*(?: \[kvm\])? ptr=(\w+) .*accounted=true"
)


@contract("C4p")
@requires("trace-events", "text-patching")
@vm_types("default")
def test_addresses_of_dead_vms_come_back(kvm: Kvm, effort: float, record_property: Callable[[str, object], None]) -> None:
    """The power of C4: once a VM is really gone, the next one often lies at its address.

    The event shows addresses hashed, which is enough to tell whether two are the same. Where struct kvm is not from the
    slab allocator (6.12 takes it from __vmalloc) nothing is seen, and nothing is known about the power of C4.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rounds = max(8, int(32 * effort))
    addresses: list[str] = []
    with traced("kmem/kmalloc", "bytes_req > 2048") as trace:
        for _ in range(rounds):
            trace.write_text("")
            vm = kvm.create_vm()
            found = STRUCT_KVM.search(trace.read_text())
            vm.close()
            if found is not None:
                addresses.append(found[1])
    if not addresses:
        pytest.skip("struct kvm is not allocated by kmalloc on this kernel, so its address cannot be seen in kmem/kmalloc")
    assert len(addresses) == rounds
    reused = sum(now == before for before, now in itertools.pairwise(addresses))
    record_property("struct kvm addresses reused", f"{reused} of {rounds - 1}")
    assert reused > rounds // 4, f"only {reused} of {rounds - 1} VMs came to lie where the one before them had lain"


# -- C5 to C10: lifetime of file, slot and data ------------------------------------------------------------------------


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


# -- C11 to C15: other descriptors, other processes --------------------------------------------------------------------


def _by_pidfd(gmem: GuestMemfd) -> int:
    pidfd = syscalls.pidfd_open(os.getpid())
    assert not isinstance(pidfd, Errno), pidfd
    with OwnedFd(pidfd):
        copy = syscalls.pidfd_getfd(pidfd, gmem.fileno())
    assert not isinstance(copy, Errno), copy
    return copy


def _by_socket(gmem: GuestMemfd) -> int:
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [gmem.fileno()])
        _, fds, _, _ = socket.recv_fds(receiver, 1, 1)
    return fds[0]


def _by_child(gmem: GuestMemfd) -> int:
    """A forked child sends its inherited descriptor back."""
    with ChildProcess(lambda channel: channel.send(fds=[gmem.fileno()])) as child:
        _, fds = child.channel.receive_with_fds()
    return int(fds[0])


def _onto_a_number(gmem: GuestMemfd) -> int:
    number = os.open("/dev/null", os.O_RDONLY)
    return os.dup2(gmem.fileno(), number, inheritable=False)  # dup3(2) with O_CLOEXEC


COPIES: dict[str, Callable[[GuestMemfd], int]] = {
    "dup": lambda gmem: os.dup(gmem.fileno()),
    "dup2": lambda gmem: os.dup2(gmem.fileno(), os.open("/dev/null", os.O_RDONLY)),
    "dup3": _onto_a_number,
    "F_DUPFD": lambda gmem: fcntl.fcntl(gmem.fileno(), fcntl.F_DUPFD, 100),
    "F_DUPFD_CLOEXEC": lambda gmem: fcntl.fcntl(gmem.fileno(), fcntl.F_DUPFD_CLOEXEC, 100),
    "pidfd_getfd": _by_pidfd,
    "SCM_RIGHTS": _by_socket,
    "fork": _by_child,
}


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


def _link(gmem: GuestMemfd) -> str:
    return f"/proc/self/fd/{gmem.fileno()}"


AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_HANDLE_FID = 0x200
OPEN_TREE_CLONE = 1
PR_SET_MM = 35
PR_SET_MM_EXE_FILE = 13


def _open(path: str, flags: int) -> Answer:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        return Errno(-(error.errno or 0))


def _openat2(gmem: GuestMemfd) -> Answer:
    path, how = _text(_link(gmem)), ffi.new("uint64_t[3]", [os.O_RDWR, 0, 0])
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
    source, target = _text(_link(gmem)), _text(f"/tmp/kvmgmem-link-{os.getpid()}")
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
    path, from_outside = _link(gmem), f"/proc/{os.getpid()}/fd/{gmem.fileno()}"
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_CREAT, 3):
        assert _open(path, flags) == Errno.ENXIO
    assert in_child(lambda: _open(from_outside, os.O_RDWR)) == Errno.ENXIO
    assert _openat2(gmem) == Errno.ENXIO
    assert _open(path, os.O_TMPFILE | os.O_RDWR) == Errno.ENOTDIR
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
        assert _open(path, os.O_RDWR) == Errno.ENXIO


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


@contract("C13")
@guest_reaches
def test_forked_child_is_not_the_owner(running: Running) -> None:
    """A forked child inherits the descriptors but not the VM: every VM and vCPU ioctl answers EIO.

    A VM of its own is a stranger to the gmem. The memory is the file's, though: the child can allocate, map and punch it,
    and the parent's guest sees that.
    """
    vm, gmem, vcpu = running.vm, running.gmem, running.cpu.vcpu
    request = MemoryRegion(slot=1, gpa=GPA + SIZE, size=SIZE, gmem=gmem)

    def ioctls() -> dict[str, Answer]:
        return {
            "KVM_CHECK_EXTENSION": vm.raw.check_extension(Cap.GUEST_MEMFD),
            "KVM_CREATE_GUEST_MEMFD": _number(vm.raw.create_guest_memfd(SIZE)),
            "KVM_SET_USER_MEMORY_REGION": vm.raw.set_region_v1(MemoryRegion(slot=1)),
            "KVM_SET_USER_MEMORY_REGION2": vm.raw.set_region(request),
            "KVM_SET_MEMORY_ATTRIBUTES": vm.raw.set_attributes(GPA, PAGE_SIZE, 0),
            "KVM_CREATE_VCPU": vm.raw.ioctl(lib.KVM_CREATE_VCPU, 1),
            "KVM_ENABLE_CAP": vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0),
            "KVM_CREATE_IRQCHIP": vm.raw.create_irqchip(),
            "KVM_GET_STATS_FD": _number(vm.raw.stats_fd()),
            "KVM_RUN": vcpu.raw.ioctl(lib.KVM_RUN),
            "KVM_GET_REGS": vcpu.raw.get_regs()[0],
        }

    def child() -> tuple[dict[str, Answer], list[str], Answer, Answer, int]:
        with Kvm.open() as kvm, kvm.create_vm(vm.type) as own:
            wrong = complaints_about(own, gmem, "the child's VM")
        seen = 0
        if gmem.flags & GmemFlag.INIT_SHARED:
            with gmem.map() as mapping:
                seen = mapping.load()
        return ioctls(), wrong, gmem.raw.allocate(PAGE_SIZE, PAGE_SIZE), gmem.raw.punch(0, PAGE_SIZE), seen

    running.cpu.store(GPA, STAMP)
    answers, wrong, allocated, punched, seen = in_child(child)
    assert answers == dict.fromkeys(answers, Errno.EIO)
    assert (wrong, allocated, punched) == ([], OK, OK)
    assert seen == (STAMP if gmem.flags & GmemFlag.INIT_SHARED else 0)
    assert running.cpu.load(GPA) == 0
    assert gmem.allocated_pages() == 2
    # The control: to the owner none of this is EIO.
    assert vm.raw.check_extension(Cap.GUEST_MEMFD) == 1
    assert vcpu.raw.get_regs()[0] == OK


def _number(made: OwnedFd | Errno) -> Answer:
    """A creator's answer as a value, closing what it made."""
    if isinstance(made, Errno):
        return made
    made.close()
    return OK


EXECUTED = """
import ctypes, mmap, os, pickle, socket, sys
channel, gmem, vm, vcpu, size, fallocate = map(int, sys.argv[1:])
talk = socket.socket(fileno=channel)
libc = ctypes.CDLL(None, use_errno=True)
def call(mode, offset, length):
    answer = libc.syscall(fallocate, gmem, mode, ctypes.c_long(offset), ctypes.c_long(length))
    return -ctypes.get_errno() if answer < 0 else answer
with mmap.mmap(gmem, size) as memory:
    seen = memory[0]
    memory[4096] = 7
    answers = call(1, 8192, 4096), call(3, 0, 4096), memory[0], memory[4096]
links = [os.path.lexists(f"/proc/self/fd/{number}") for number in (gmem, vm, vcpu)]
talk.send(pickle.dumps((seen, answers, links)))
talk.recv(100)
os.close(gmem)
talk.send(pickle.dumps("closed"))
talk.recv(100)
"""


@contract("C14")
@requires("debugfs", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_gmem_survives_the_exec_of_its_owner(vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """When the owner of a VM executes another program, only the gmem is left of it: memory to map, allocate and punch.

    VM and vCPU are close-on-exec and their process's memory is gone, but the VM lives until the gmem is closed.
    """

    def owner(channel: Channel) -> None:
        import sys

        from kvmgmem.arch.x86_64 import GuestMachine

        with Kvm.open() as kvm, kvm.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA)
            cpu = GuestMachine(vm).cpu()
            cpu.store(GPA, 0x5A, width=1)
            channel.send(VmDirectory.of(vm))
            talk = os.dup(channel._socket.fileno())
            numbers = (talk, gmem.fileno(), vm.fileno(), cpu.vcpu.fileno(), SIZE, NUMBER["fallocate"])
            os.set_inheritable(talk, True)
            os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", EXECUTED, *map(str, numbers)])

    with ChildProcess(owner) as child:
        directory: VmDirectory = child.receive()
        seen, answers, links = child.receive()
        assert (seen, answers) == (0x5A, (OK, OK, 0, 7))
        assert links == [True, False, False]
        assert directory.exists
        child.send()
        assert child.receive() == "closed"
        directory.wait_gone()
        child.send()
        child.wait()


@contract("C15", "C2")
@requires("debugfs", "x86")
@gmem_kinds("gM")
def test_gmem_survives_the_death_of_its_running_owner(kvm: Kvm, vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """When the owner is killed with its vCPU running in a gmem, whoever holds the gmem can punch and close it in peace."""

    def owner(channel: Channel) -> None:
        from kvmgmem.arch.x86_64 import GuestMachine

        with Kvm.open() as mine, mine.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA)
            cpu = GuestMachine(vm).cpu()
            cpu.stamp(GPA + PAGE_SIZE, STAMP, 16)
            cpu.start("hammer", rdi=GPA)
            with cpu.running():
                wait_until(lambda: gmem.allocated_pages() == 17, "the vCPU runs")
                channel.send(VmDirectory.of(vm), fds=[gmem.fileno()])
                channel.receive()

    with ChildProcess(owner) as child, kvm.create_vm(vm_type) as other:
        directory, (number,) = child.channel.receive_with_fds()
        with GuestMemfd(number, SIZE, gmem_kind) as gmem:
            gmem.punch(PAGE_SIZE, PAGE_SIZE)
            child.kill()
            assert directory.exists
            assert gmem.allocated_pages() == 16
            assert complaints_about(other, gmem, "the survivor's VM") == []
            gmem.punch()
            assert gmem.allocated_pages() == 0
        directory.wait_gone()


# -- C16 to C21: slots -------------------------------------------------------------------------------------------------


@contract("C16")
@gmem_kinds("gM")
def test_many_files_interleaved_in_one_vm(running: Running, effort: float) -> None:
    """A VM with many gmem files whose pages interleave in guest memory keeps them apart: in data, in punches, in closing."""
    vm, cpu = running.vm, running.cpu
    files = max(3, min(64, int(8 * effort)))
    slots = max(2, min(64, int(4 * effort)))
    count = files * slots
    vm.delete_region(0)
    with contextlib.ExitStack() as stack:
        gmems = [stack.enter_context(vm.create_guest_memfd(slots * PAGE_SIZE, running.gmem.flags)) for _ in range(files)]
        for index in range(count):  # page `index` of guest memory is page index // files of file index % files
            offset = index // files * PAGE_SIZE
            vm.bind(gmems[index % files], slot=index, gpa=GPA + index * PAGE_SIZE, size=PAGE_SIZE, offset=offset)
        cpu.stamp(GPA, STAMP, count)
        assert [gmem.allocated_pages() for gmem in gmems] == [slots] * files
        wanted = list(range(STAMP, STAMP + count))

        gmems[1].punch(PAGE_SIZE, PAGE_SIZE)
        wanted[files + 1] = 0
        assert [cpu.load(GPA + index * PAGE_SIZE) for index in range(count)] == wanted

        gmems[2].close()
        for index in range(count):
            result = cpu.try_load(GPA + index * PAGE_SIZE)
            if index % files == 2:
                assert is_dead(result, GPA + index * PAGE_SIZE), (index, result)
            else:
                assert cpu.finish(result).rax == wanted[index], index


@contract("C17")
@gmem_kinds("gM")
@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_many_slots_on_one_file(running: Running, order: str, effort: float) -> None:
    """Disjoint ranges of one file can be bound in any order, down to single pages side by side, and the guest sees each."""
    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    count = max(8, min(512, int(32 * effort)))
    pages = list(range(count))
    if order == "descending":
        pages.reverse()
    elif order == "random":
        random.Random(17).shuffle(pages)
    cpu.stamp(running.gpa, STAMP, count)
    vm.delete_region(0)
    request = MemoryRegion(slot=0, gpa=0, size=PAGE_SIZE, gmem=gmem)
    for slot, page in enumerate(pages):
        # Guest addresses run the other way than the file, so that neither order can stand in for the other.
        gpa = GPA + (count - 1 - page) * PAGE_SIZE
        assert vm.raw.set_region(request.but(slot=slot, gpa=gpa, gmem_offset=page * PAGE_SIZE)) == OK
    for page in range(count):
        assert cpu.load(GPA + (count - 1 - page) * PAGE_SIZE) == STAMP + page
    for slot in range(count):
        assert vm.raw.delete_region(slot) == OK


# Two ranges of pages can lie in thirteen ways to each other (Allen's relations): the second as the first's start and end,
# each shifted by so many pages.
RELATIONS: dict[str, tuple[int, int, bool]] = {
    # the first is always [0, 8); here start and end of the second, and whether they overlap
    "before": (-6, -2, False),
    "meets": (-4, 0, False),
    "overlaps": (-4, 1, True),
    "is finished by": (-2, 8, True),
    "contains": (-2, 10, True),
    "starts": (0, 1, True),
    "equals": (0, 8, True),
    "is started by": (0, 9, True),
    "during": (3, 4, True),
    "finishes": (7, 8, True),
    "is overlapped by": (7, 12, True),
    "is met by": (8, 12, False),
    "after": (9, 12, False),
}


@contract("C18")
@pytest.mark.parametrize("edge", [64, 4096, 262144])
def test_a_page_is_bound_once_at_most(vm: Vm, edge: int) -> None:
    """Each page of a gmem is bound to one slot at most, whichever way two ranges lie to each other.

    A binding takes and gives back exactly its own pages. The ranges cross an edge between nodes of the file's table of
    bindings by exactly one page, at their start and at their end, where an entry that covers too much would show.
    """
    request = MemoryRegion(slot=0, gpa=GPA, gmem_offset=0, size=8 * PAGE_SIZE)
    other = request.but(slot=1, gpa=GPA + MiB)
    with vm.create_guest_memfd((edge + 64) * PAGE_SIZE) as gmem:
        for start in (edge - 1, edge - 7):
            first = request.but(gmem=gmem, gmem_offset=start * PAGE_SIZE)
            for name, (begin, end, overlap) in RELATIONS.items():
                second = other.but(gmem=gmem, gmem_offset=(start + begin) * PAGE_SIZE, size=(end - begin) * PAGE_SIZE)
                assert vm.raw.set_region(first) == OK, name
                answer = vm.raw.set_region(second)
                if not overlap:
                    assert answer == OK, name
                    assert vm.raw.delete_region(1) == OK
                    # The neighbour gave back its own pages only.
                    last = first.but(
                        slot=2, gpa=GPA + 2 * MiB, gmem_offset=first.gmem_offset + 7 * PAGE_SIZE, size=PAGE_SIZE
                    )
                    known_bug("B14").expect(vm.raw.set_region(last), Errno.EEXIST, shows=Errno.EINVAL)
                    assert vm.raw.delete_region(0) == OK
                    continue
                known_bug("B14").expect(answer, Errno.EEXIST, shows=Errno.EINVAL)
                assert vm.raw.delete_region(0) == OK
                assert vm.raw.set_region(second) == OK, name  # the control: free now, all of it
                assert vm.raw.delete_region(1) == OK


@contract("C19")
@requires("debugfs")
@gmem_kinds("g0")
def test_failed_binds_have_no_effect(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """A bind that fails, for whatever reason, leaves slot, file and VM as they were: the good one then works.

    No reference stays behind either: closing the descriptors frees the VM.
    """
    directory = VmDirectory.of(vm)
    good = MemoryRegion(slot=0, gpa=GPA, size=SIZE // 2, gmem=gmem)
    with kvm.create_vm(vm.type) as other, other.create_guest_memfd(SIZE) as foreign:
        assert vm.raw.set_region(good.but(slot=1, gpa=GPA + 4 * SIZE, gmem_offset=SIZE // 2)) == OK
        bad: dict[str, tuple[MemoryRegion, set[Errno]]] = {
            "no descriptor": (good.but(gmem=-1), {Errno.EBADF}),
            "not a gmem": (good.but(gmem=kvm), {Errno.EINVAL}),
            "another VM's": (good.but(gmem=foreign), {Errno.EINVAL}),
            "odd offset": (good.but(gmem_offset=1), {Errno.EINVAL}),
            "odd size": (good.but(size=SIZE // 2 + 1), {Errno.EINVAL}),
            "odd address": (good.but(gpa=GPA + 1), {Errno.EINVAL}),
            "odd host address": (good.but(hva=1), {Errno.EINVAL}),
            "beyond the end": (good.but(gmem_offset=SIZE), {Errno.EINVAL}),
            "across the end": (good.but(size=SIZE + PAGE_SIZE), {Errno.EINVAL}),
            "wraps": (good.but(gmem_offset=2**64 - PAGE_SIZE), {Errno.EINVAL}),
            "dirty log": (good.but(flags=MemFlag.GUEST_MEMFD | MemFlag.LOG_DIRTY), {Errno.EINVAL}),
            "read-only": (good.but(flags=MemFlag.GUEST_MEMFD | MemFlag.READONLY), {Errno.EINVAL}),
            "unknown flag": (good.but(flags=MemFlag.GUEST_MEMFD | 1 << 30), {Errno.EINVAL}),
            "no such slot": (good.but(slot=0xFFFF), {Errno.EINVAL}),
            "address taken": (good.but(gpa=GPA + 4 * SIZE), {Errno.EEXIST}),
            "address too high": (good.but(gpa=1 << 62), {Errno.EINVAL}),
            "file range taken": (good.but(gmem_offset=SIZE // 4), {Errno.EEXIST, Errno.EINVAL}),  # which of them: B14
        }
        for name, (request, wanted) in bad.items():
            assert vm.raw.set_region(request) in wanted, name
            assert vm.raw.set_region(good) == OK, f"after: {name}"
            assert vm.raw.delete_region(0) == OK
    gmem.close()
    vm.close()
    directory.wait_gone()


FAULT_KNOBS = Path("/sys/kernel/debug")


@contextlib.contextmanager
def failing_allocations() -> Iterator[None]:
    """Let fail-nth hit the allocations that may sleep, which are all that matter here, and say nothing about it."""
    wanted = {"ignore-gfp-wait": "N", "ignore-gfp-highmem": "N", "min-order": "0", "verbose": "0"}
    places = [FAULT_KNOBS / injector / knob for injector in ("failslab", "fail_page_alloc") for knob in wanted]
    before = {place: place.read_text().strip() for place in places if place.exists()}
    try:
        for place in before:
            place.write_text(wanted[place.name])
        yield
    finally:
        for place, value in before.items():
            place.write_text(value)


def fail_nth(nth: int, call: Callable[[], Answer]) -> tuple[Answer, bool]:
    """Make a call whose nth allocation fails: its answer, and whether there was an nth (fault-injection.rst, fail-nth)."""
    switch = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(switch, str(nth).encode())
        answer = call()
        left = int(os.pread(switch, 32, 0).split(b"\0")[0])
        os.write(switch, b"0")
    finally:
        os.close(switch)
    return answer, left == 0


@contract("C20")
@requires("fault-injection", "debugfs", "root")
@disruptive()
def test_binding_is_atomic_when_memory_is_short(vm: Vm) -> None:
    """A bind during which an allocation fails answers ENOMEM and binds nothing, or succeeds and binds everything."""
    begin, pages = 60, 4100  # three nodes of the table of bindings, and two levels
    with vm.create_guest_memfd((begin + pages + 8) * PAGE_SIZE) as gmem, failing_allocations():
        region = MemoryRegion(0, GPA, pages * PAGE_SIZE, gmem=gmem, gmem_offset=begin * PAGE_SIZE)
        request = region2(region)
        edges = [region.but(slot=1, gpa=ELSEWHERE, size=PAGE_SIZE, gmem_offset=page * PAGE_SIZE)
                 for page in (begin, 63, 64, 4095, 4096, begin + pages - 1)]  # fmt: skip
        failures = 0
        for nth in range(1, 500):
            answer, injected = fail_nth(nth, lambda: vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request))
            if answer == OK:
                for edge in edges:
                    again = vm.raw.set_region(edge)
                    if known_bug("B6").shows_if(again == OK):
                        vm.delete_region(1)
                    else:
                        assert again in (Errno.EEXIST, Errno.EINVAL), (nth, again)
                vm.delete_region(0)
            else:
                assert answer == Errno.ENOMEM, nth
                failures += 1
                for edge in edges:
                    assert vm.raw.set_region(edge) == OK, (nth, edge)
                    vm.delete_region(1)
            if not injected:
                break
        assert answer == OK
        assert not injected
        assert failures > 0


@contract("C20")
@requires("fault-injection", "debugfs", "root")
@disruptive()
def test_creation_is_clean_when_memory_is_short(vm: Vm) -> None:
    """Creating a gmem while an allocation fails answers ENOMEM and leaves no descriptor and no reference to the VM."""
    directory = VmDirectory.of(vm)
    fields = ffi.new("struct kvm_create_guest_memfd *", {"size": SIZE})
    descriptors = sorted(os.listdir("/proc/self/fd"))
    failures = 0
    with failing_allocations():
        for nth in range(1, 500):
            answer, injected = fail_nth(nth, lambda: vm.raw.ioctl_struct(lib.KVM_CREATE_GUEST_MEMFD, fields))
            if not isinstance(answer, Errno):
                os.close(answer)
            else:
                assert answer == Errno.ENOMEM, nth
                failures += 1
            if not injected:
                break
    assert not isinstance(answer, Errno)
    assert failures > 0
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    vm.close()
    directory.wait_gone()


@contract("C21")
@guest_reaches
def test_gmem_slots_are_immutable(running: Running) -> None:
    """A gmem slot can be deleted but not changed in any way, identical requests included, and its guest does not notice."""
    vm, region, cpu = running.vm, running.region.but(size=SIZE), running.cpu
    cpu.store(GPA, STAMP)
    with vm.create_guest_memfd(SIZE, running.gmem.flags) as other:
        changes: dict[str, dict[str, Any]] = {
            "identical": {},
            "address": {"gpa": GPA + SIZE},
            "smaller": {"size": SIZE // 2},
            "larger": {"size": 2 * SIZE},
            "offset": {"size": SIZE // 2, "gmem_offset": SIZE // 2},
            "file": {"gmem": other},
            "no file": {"gmem": -1, "flags": MemFlag.GUEST_MEMFD},
            "dirty log": {"flags": MemFlag.GUEST_MEMFD | MemFlag.LOG_DIRTY},
            "read-only": {"flags": MemFlag.GUEST_MEMFD | MemFlag.READONLY},
            "host address": {"hva": PAGE_SIZE},
        }
        for name, change in changes.items():
            assert vm.raw.set_region(region.but(**change)) == Errno.EINVAL, name
            assert cpu.load(GPA) == STAMP, name
        # The control: after its deletion the slot can be made anew in most of these ways.
        for name in ("identical", "address", "smaller", "offset", "file", "host address"):
            vm.delete_region(0)
            assert vm.raw.set_region(region.but(**changes[name])) == OK, name


@contract("C21")
@disruptive()
@gmem_kinds("g0", "gM")
def test_gmem_flag_cannot_be_cleared(bound: Bound) -> None:
    """A gmem slot cannot be turned into a plain one, by either call.

    Where it can (B3) the file keeps a pointer to a slot that is freed without it: this may take such a kernel down.
    """
    plain = bound.region.but(gmem=None, flags=0)
    for request in (plain, plain.but(flags=MemFlag.LOG_DIRTY)):
        known_bug("B3").expect(bound.vm.raw.set_region(request), Errno.EINVAL, shows=OK)
        known_bug("B3").expect(bound.vm.raw.set_region_v1(request), Errno.EINVAL, shows=OK)
    bound.gmem.punch()
    bound.vm.delete_region(0)
    assert bound.vm.raw.set_region(bound.region) == OK


# -- C22 and C23: contents ---------------------------------------------------------------------------------------------


@contract("C22", "C30")
@guest_reaches
def test_fresh_pages_are_zero_and_stay(running: Running, effort: float) -> None:
    """A page is zero when guest or host first touch it, whatever the machine's memory held, and is not zeroed again.

    fallocate gives pages to the file without touching those it has.
    """
    gmem, cpu, pages = running.gmem, running.cpu, running.gmem.pages
    with Mapping.anonymous(int(min(32 * MiB * effort, meminfo("MemAvailable") // 4)) & -PAGE_SIZE) as dirt:
        dirt.fill(0xD1)
    half = pages // 2
    assert cpu.first_not(0, GPA, half) is None
    gmem.allocate()  # the other half is the file's before anybody touches it
    assert gmem.allocated_pages() == pages
    assert cpu.first_not(0, GPA + half * PAGE_SIZE, half - 8) is None
    if gmem.flags & GmemFlag.INIT_SHARED:
        with gmem.map() as mapping:
            assert mapping.is_filled_with(0)
    cpu.stamp(GPA, STAMP, pages)
    gmem.allocate()
    gmem.allocate(PAGE_SIZE, 3 * PAGE_SIZE)
    assert cpu.first_unstamped(GPA, STAMP, pages) is None
    assert gmem.allocated_pages() == pages


@contract("C23")
@guest_reaches
def test_punch_zaps_every_view(running: Running) -> None:
    """After a punch nobody sees the old contents: no vCPU, whichever slot it looks through, no mapping, no process."""
    vm, gmem, first = running.vm, running.gmem, running.cpu
    vm.delete_region(0)
    half = SIZE // 2
    vm.bind(gmem, slot=0, gpa=GPA, size=half)
    vm.bind(gmem, slot=1, gpa=GPA + SIZE, size=half, offset=half)
    second = running.machine.cpu(1)
    shared = bool(gmem.flags & GmemFlag.INIT_SHARED)
    places = (GPA, GPA + half - PAGE_SIZE, GPA + SIZE, GPA + SIZE + half - PAGE_SIZE)
    offsets = (0, half - PAGE_SIZE, half, SIZE - PAGE_SIZE)

    def look(mapping: Mapping) -> list[int]:
        return [mapping.load(offset) for offset in offsets] if shared else []

    def other_process(channel: Channel) -> None:
        with gmem.map() as mapping:
            while channel.receive():
                channel.send(look(mapping))

    try:
        with ChildProcess(other_process) as child, gmem.map() as one, gmem.map() as two:
            for index, place in enumerate(places):
                first.store(place, STAMP + index)
            wanted = [STAMP + index for index in range(4)]
            for expected in (wanted, [0] * 4):
                for cpu in (second, first):
                    assert [cpu.load(place) for place in places] == expected
                child.send(True)
                assert child.receive() == (expected if shared else [])
                assert look(one) == look(two) == (expected if shared else [])
                if expected is wanted:
                    assert gmem.allocated_pages() == 4
                    gmem.punch()
                    assert gmem.allocated_pages() == 0
            child.send(False)
            child.wait()
    finally:
        second.close()


@contract("C23")
@guest_reaches
@pytest.mark.parametrize(("gpa", "offset"), [(GPA, 0), (0x1_0000, 1 << 40)], ids=["plain", "low-gfn-high-offset"])
def test_punch_hits_exactly_its_range(running: Running, gpa: int, offset: int) -> None:
    """A punch clears exactly the pages it names, wherever it starts and ends in relation to the slots.

    Guest addresses below the file's offsets are the case in which a range computed in the wrong order would wrap.
    """
    vm, cpu = running.vm, running.cpu
    vm.delete_region(0)
    with vm.create_guest_memfd(offset + 16 * PAGE_SIZE, running.gmem.flags) as gmem:
        # Pages 4..7 and 8..11 of the file are bound, in swapped order and with a gap in guest memory.
        vm.bind(gmem, slot=0, gpa=gpa + 16 * PAGE_SIZE, size=4 * PAGE_SIZE, offset=offset + 4 * PAGE_SIZE)
        vm.bind(gmem, slot=1, gpa=gpa, size=4 * PAGE_SIZE, offset=offset + 8 * PAGE_SIZE)
        for begin, end in ((0, 4), (12, 16), (3, 5), (7, 9), (11, 13), (5, 6), (4, 8), (0, 16)):
            cpu.stamp(gpa + 16 * PAGE_SIZE, STAMP + 4, 4)
            cpu.stamp(gpa, STAMP + 8, 4)
            gmem.punch(offset + begin * PAGE_SIZE, (end - begin) * PAGE_SIZE)
            left = [page for page in range(4, 12) if not begin <= page < end]
            assert gmem.allocated_pages(offset) == len(left), (begin, end)
            seen = [cpu.load(gpa + (page + 12 if page < 8 else page - 8) * PAGE_SIZE) for page in range(4, 12)]
            assert seen == [STAMP + page if page in left else 0 for page in range(4, 12)], (begin, end)


@contract("C23")
@requires("prefault")
@guest_reaches
def test_punch_zaps_what_was_prefaulted(running: Running) -> None:
    """Pages that a vCPU has mapped by prefault alone are zapped by a punch like any other."""
    cpu, gmem = running.cpu, running.gmem
    second = running.machine.cpu(1)
    try:
        cpu.stamp(GPA, STAMP, 8)
        assert second.vcpu.pre_fault(GPA, 8 * PAGE_SIZE) == (GPA + 8 * PAGE_SIZE, 0)
        gmem.punch(0, 4 * PAGE_SIZE)
        assert [second.load(GPA + page * PAGE_SIZE) for page in range(8)] == [0] * 4 + list(range(STAMP + 4, STAMP + 8))
    finally:
        second.close()


@contract("C23")
@vm_types("default")
@gmem_kinds("gMS")
def test_removing_mapped_pages_punches(running: Running) -> None:
    """MADV_REMOVE on a mapping is a punch: the pages are freed and the guest reads zero."""
    cpu, gmem = running.cpu, running.gmem
    cpu.stamp(GPA, STAMP, 4)
    with gmem.map() as mapping:
        assert mapping.load(PAGE_SIZE) == STAMP + 1
        assert mapping.advise(mmap.MADV_REMOVE, PAGE_SIZE, 2 * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == 2
        assert [cpu.load(GPA + page * PAGE_SIZE) for page in range(4)] == [STAMP, 0, 0, STAMP + 3]
        assert [mapping.load(page * PAGE_SIZE) for page in range(4)] == [STAMP, 0, 0, STAMP + 3]


# -- C26 to C29: encrypted VMs -----------------------------------------------------------------------------------------


def encrypt(vm: Vm) -> None:
    """KVM_SEV_INIT2, or a skip that says what it answered (amd-memory-encryption.rst)."""
    device = _open("/dev/sev", os.O_RDWR)
    if isinstance(device, Errno):
        pytest.skip(f"/dev/sev does not open: {device.name}")
    with OwnedFd(device):
        init = ffi.new("struct kvm_sev_init *")
        fields = {"id": lib.KVM_SEV_INIT2, "data": address_of(init), "sev_fd": device}
        answer = vm.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, ffi.new("struct kvm_sev_cmd *", fields))
    if isinstance(answer, Errno):
        pytest.skip(f"KVM_SEV_INIT2 on a {vm.type.label} VM answers {answer.name}")


def mirror(vm: Vm, source: OwnedFd | int) -> Answer:
    """Make `vm` a mirror of the source (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, api.rst section 7)."""
    number = source if isinstance(source, int) else source.fileno()
    return vm.raw.enable_cap(Cap.VM_COPY_ENC_CONTEXT_FROM, number)


def move(vm: Vm, source: OwnedFd | int) -> Answer:
    """Move the source's encryption to `vm` (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, api.rst section 7)."""
    number = source if isinstance(source, int) else source.fileno()
    return vm.raw.enable_cap(Cap.VM_MOVE_ENC_CONTEXT_FROM, number)


@contract("C26")
@requires("sev", "debugfs")
def test_mirror_does_not_inherit_gmem(kvm: Kvm) -> None:
    """A mirror shares its owner's encryption key but not its gmem: to the file it is just another VM."""
    with kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as helper, kvm.create_vm(VmType.SEV) as third:
        encrypt(vm)
        directory, helpers = VmDirectory.of(vm), VmDirectory.of(helper)
        with vm.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem:
            assert mirror(helper, vm) == OK
            assert complaints_about(helper, gmem, "the mirror") == []
            assert mirror(third, helper) == Errno.EINVAL
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)) == OK
        vm.close()
        assert directory.exists  # the mirror holds its owner, and with it the key
        helper.close()
        helpers.wait_gone()
        directory.wait_gone()


@contract("C27", "C2")
@requires("sev", "debugfs")
def test_move_does_not_move_the_gmem(kvm: Kvm) -> None:
    """Moving a VM's encryption to another leaves its gmem with the dead source, which it goes on pinning."""
    with kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as target:
        encrypt(vm)
        directory = VmDirectory.of(vm)
        with vm.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem:
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)) == OK
            assert move(target, vm) == OK
            assert vm.raw.check_extension(Cap.GUEST_MEMFD) == Errno.EIO
            assert vm.raw.delete_region(0) == Errno.EIO
            assert complaints_about(target, gmem, "the target") == []
            assert gmem.raw.allocate(0, 2 * PAGE_SIZE) == OK
            assert gmem.raw.punch(0, PAGE_SIZE) == OK
            assert gmem.allocated_pages() == 1
            vm.close()
            assert directory.exists
        directory.wait_gone()


@contract("C28")
@requires("x86")
@vm_types("default")
@gmem_kinds("g0")
def test_mirror_and_move_are_refused_without_encryption(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Without encryption there is nothing to mirror or move: EINVAL for every VM, and no effect on either.

    A kernel with CONFIG_KVM_AMD_SEV on AMD looks at the descriptor first and answers EBADF for what is not a VM; one
    without, or any other vendor's, does not look (x86.c: kvm_vm_ioctl_enable_cap). The capability reads 1 on both.
    """
    assert vm.check_extension(Cap.VM_COPY_ENC_CONTEXT_FROM) == 1
    assert vm.check_extension(Cap.VM_MOVE_ENC_CONTEXT_FROM) == 1
    with kvm.create_vm() as other, other.create_vcpu() as vcpu:
        for act in (mirror, move):
            looks = act(vm, -1)
            assert looks in (Errno.EBADF, Errno.EINVAL)
            for not_a_vm in (kvm, gmem, vcpu, 0xFFFF):
                assert act(vm, not_a_vm) == looks
            assert act(vm, other) == Errno.EINVAL
            assert act(vm, vm) == Errno.EINVAL
        for survivor in (vm, other):
            assert survivor.raw.check_extension(Cap.GUEST_MEMFD) == 1
            with survivor.create_guest_memfd(SIZE) as own:
                assert survivor.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=own)) == OK


@contract("C29")
@requires("snp", "sev")
def test_snp_is_neither_mirrored_nor_moved(kvm: Kvm) -> None:
    """An SNP VM can be the source of neither a mirror nor a move."""
    for act in (mirror, move):
        with kvm.create_vm(VmType.SEV) as plain, kvm.create_vm(VmType.SEV) as accepted:
            encrypt(plain)
            assert act(accepted, plain) == OK  # the control: only the type differs
        with kvm.create_vm(VmType.SNP) as vm, kvm.create_vm(VmType.SNP) as target:
            encrypt(vm)
            known_bug("B15").expect(act(target, vm), Errno.EINVAL, shows=OK)


# -- C30 to C33: identity ----------------------------------------------------------------------------------------------


@contract("C30")
@requires("x86")
@vm_types("default")
@guest_reaches
def test_dumper_vm_sees_nothing(kvm: Kvm, running: Running) -> None:
    """A VM made to read another's memory gets none of it: by no copy of the descriptor, nor after the gmem is closed."""
    from kvmgmem.arch.x86_64 import GuestMachine

    secret, pages = 0x5EC2_E700_0000_0000, 64
    running.cpu.stamp(GPA, secret, pages)
    with kvm.create_vm() as dumper:
        machine = GuestMachine(dumper)
        cpu = machine.cpu()
        request = MemoryRegion(slot=0, gpa=GPA, size=SIZE)
        for name, copy_of in COPIES.items():
            with GuestMemfd(copy_of(running.gmem), SIZE, 0) as copy:
                assert dumper.raw.set_region(request.but(gmem=copy)) == Errno.EINVAL, name
        assert isinstance(cpu.try_load(GPA).exit, MmioExit)  # no memory there at all
        cpu.close()
        cpu = machine.cpu(1)
        with dumper.create_guest_memfd(SIZE, running.gmem.flags) as own:
            dumper.set_region(request.but(gmem=own))
            assert cpu.first_not(0, GPA, own.pages) is None
            dumper.delete_region(0)
        running.gmem.close()
        with dumper.create_guest_memfd(SIZE, running.gmem.flags) as own:
            dumper.set_region(request.but(gmem=own))
            assert cpu.first_not(0, GPA, own.pages) is None
        cpu.close()
        machine.close()


@contract("C31")
@gmem_kinds("g0")
def test_ownership_follows_the_file_not_its_number(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Nothing about a gmem but the file itself says whose it is: not its descriptor's number, size, owner or device."""
    number, looks = gmem.fileno(), os.fstat(gmem.fileno())
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=number)
    with kvm.create_vm(vm.type) as other:
        assert (vm.raw.set_region(request), other.raw.set_region(request)) == (OK, Errno.EINVAL)
        vm.delete_region(0)
        with other.create_guest_memfd(SIZE, gmem.flags) as theirs:
            same = os.fstat(theirs.fileno())
            assert [getattr(same, name) for name in ("st_dev", "st_mode", "st_uid", "st_size", "st_nlink")] == [
                getattr(looks, name) for name in ("st_dev", "st_mode", "st_uid", "st_size", "st_nlink")
            ]
            with gmem.duplicate() as original:
                os.dup2(theirs.fileno(), number)  # another VM's gmem behind the very number that was good
                assert (vm.raw.set_region(request), other.raw.set_region(request)) == (Errno.EINVAL, OK)
                other.delete_region(0)
                os.dup2(original.fileno(), number)
                assert (vm.raw.set_region(request), other.raw.set_region(request)) == (OK, Errno.EINVAL)


@contract("C31")
@gmem_kinds("g0")
def test_bindings_follow_the_file_not_its_number(kvm: Kvm, bound: Bound) -> None:
    """A slot stays bound to the file it was made with, whatever its descriptor's number is given to afterwards."""
    elsewhere = bound.region.but(slot=1, gpa=GPA + SIZE)
    number = bound.gmem.fileno()
    with kvm.create_vm(bound.vm.type) as other, other.create_guest_memfd(SIZE) as theirs, bound.gmem.duplicate() as original:
        os.dup2(theirs.fileno(), number)
        assert bound.vm.raw.set_region(elsewhere.but(gmem=original)) in (Errno.EEXIST, Errno.EINVAL)  # bound already
        assert other.raw.set_region(bound.region.but(gmem=number)) == OK
        original.close()
        # The slot of the file that is gone is dead, and the number is the other VM's.
        assert bound.vm.raw.set_region(elsewhere.but(gmem=number)) == Errno.EINVAL


@contract("C32")
@requires("x86")
@vm_types("default")
@gmem_kinds("gM")
def test_bind_races_with_the_number_changing_hands(kvm: Kvm, running: Running, effort: float) -> None:
    """While a number changes between two VMs' gmems, each bind gets its own VM's memory or EINVAL, never a mixture."""
    from kvmgmem.arch.x86_64 import GuestMachine

    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    cpu.store(GPA, STAMP)
    vm.delete_region(0)
    stop = threading.Event()
    with kvm.create_vm() as other, other.create_guest_memfd(SIZE, gmem.flags) as theirs, gmem.duplicate() as shared:
        machine = GuestMachine(other)
        other_cpu = machine.cpu()
        other.bind(theirs, gpa=GPA)
        other_cpu.store(GPA, STAMP + 1)
        other.delete_region(0)
        number = shared.fileno()

        def swap() -> None:
            while not stop.is_set():
                os.dup2(theirs.fileno(), number)
                os.dup2(gmem.fileno(), number)

        swapper = threading.Thread(target=swap)
        swapper.start()
        answers: set[tuple[str, Answer]] = set()
        try:
            for _ in range(max(2, int(20 * effort))):
                for name, one, reader, stamp in (("own", vm, cpu, STAMP), ("other", other, other_cpu, STAMP + 1)):
                    answer = one.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=number))
                    answers.add((name, answer))
                    if answer == OK:
                        assert reader.load(GPA) == stamp
                        one.delete_region(0)
        finally:
            stop.set()
            swapper.join()
            other_cpu.close()
            machine.close()
        assert answers <= {(name, answer) for name in ("own", "other") for answer in (OK, Errno.EINVAL)}


@contract("C33")
@gmem_kinds("g0")
def test_other_descriptors_are_no_gmem(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Only a gmem can be bound: any other open descriptor is EINVAL, and one that is not open, or O_PATH, is EBADF."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    assert vm.raw.set_region(request) == OK
    vm.delete_region(0)
    with contextlib.ExitStack() as stack:

        def keep(number: int) -> OwnedFd:
            return stack.enter_context(OwnedFd(number))

        vcpu = stack.enter_context(vm.create_vcpu())
        reader, writer = (keep(number) for number in os.pipe())
        one, two = socket.socketpair()
        stack.callback(one.close)
        stack.callback(two.close)
        memfd = keep(os.memfd_create("plain"))
        os.ftruncate(memfd.fileno(), SIZE)
        pidfd = syscalls.pidfd_open(os.getpid())
        assert not isinstance(pidfd, Errno)
        others: dict[str, OwnedFd | int] = {
            str(DEVICE): kvm,
            "the VM": vm,
            "a vCPU": vcpu,
            "VM statistics": stack.enter_context(vm.stats_fd()),
            "a memfd of the same size": memfd,
            "an eventfd": keep(os.eventfd(0)),
            "a pidfd": keep(pidfd),
            "a directory": keep(os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
            "a file": keep(os.open("/proc/self/exe", os.O_RDONLY)),
            "a device": keep(os.open("/dev/null", os.O_RDWR)),
            "a pipe": reader,
            "the pipe's other end": writer,
            "a socket": one.fileno(),
        }
        for name, other in others.items():
            assert vm.raw.set_region(request.but(gmem=other)) == Errno.EINVAL, name
        path = keep(os.open(_link(gmem), os.O_PATH))
        closed = os.dup(gmem.fileno())
        os.close(closed)
        for name, number in {"O_PATH": path.fileno(), "closed": closed, "-1": -1, "2^31": 1 << 31}.items():
            assert vm.raw.set_region(request.but(gmem=number)) == Errno.EBADF, name
    assert vm.raw.set_region(request) == OK


def _memfd_secret() -> int:
    answer = syscall(NUMBER["memfd_secret"], os.O_CLOEXEC)
    if isinstance(answer, Errno):
        pytest.skip(f"memfd_secret answers {answer.name} (CONFIG_SECRETMEM, secretmem.enable)")
    os.ftruncate(answer, SIZE)
    return answer


def _hugetlb() -> int:
    try:
        number = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no hugetlb memfd: {errno.errorcode.get(error.errno or 0)} (CONFIG_HUGETLBFS)")
    os.ftruncate(number, SIZE)
    return number


def _dma_buf() -> int:
    """A buffer from the memfd-backed exporter (include/uapi/linux/udmabuf.h)."""
    device = _open("/dev/udmabuf", os.O_RDWR)
    if isinstance(device, Errno):
        pytest.skip(f"/dev/udmabuf does not open: {device.name} (CONFIG_UDMABUF)")
    with OwnedFd(device), OwnedFd(os.memfd_create("backing", os.MFD_ALLOW_SEALING)) as memfd:
        os.ftruncate(memfd.fileno(), SIZE)
        fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        fields = memfd.fileno() | 1 << 32, 0, SIZE  # struct udmabuf_create: memfd, flags (CLOEXEC), offset, size
        answer = entry.ioctl_struct(device, 0x40187542, ffi.new("uint64_t[3]", fields))
    assert not isinstance(answer, Errno), answer
    return answer


@contract("C33")
@vm_types("default")
@gmem_kinds("g0")
@pytest.mark.parametrize("make", [_memfd_secret, _hugetlb, _dma_buf], ids=["memfd_secret", "hugetlb", "dma-buf"])
def test_other_kinds_of_memory_are_no_gmem(vm: Vm, gmem: GuestMemfd, make: Callable[[], int]) -> None:
    """Other files of memory that are kept from the host, huge, or shared with devices cannot be bound as gmem either."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    with OwnedFd(make()) as other:
        assert vm.raw.set_region(request.but(gmem=other)) == Errno.EINVAL
        assert vm.raw.set_region(request) == OK
