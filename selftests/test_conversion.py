"""Conversion in place, by an ioctl of the gmem file (KVM_SET_MEMORY_ATTRIBUTES2): what its published interface promises.

No kernel that is released has it; the tests follow the last posting and run as soon as a kernel answers to it.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, VmType
from kvmgmem.arch.x86_64 import GuestCpu
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.io_uring import IoUring
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Fault, Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.proposed_abi import Conversion, convert
from kvmgmem.testing import requires, vm_types
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.reopening import link_of
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

PRIVATE = 1 << 3
STAMP = 0xC0DE_0000_0000_0001
SHARED = GmemFlag.MMAP | GmemFlag.INIT_SHARED

in_place = requires("in-place-conversion", "sw-protected")
private_vms = vm_types("sw-protected")


@pytest.fixture
def shared(vm: Vm) -> Iterator[GuestMemfd]:
    """A gmem that starts shared and can be mapped."""
    with vm.create_guest_memfd(SIZE, SHARED) as gmem:
        yield gmem


def make_private(gmem: OwnedFd, page: int = 0, pages: int = 1) -> Answer:
    """Convert pages of the file to private."""
    return convert(gmem, Conversion(page * PAGE_SIZE, pages * PAGE_SIZE, PRIVATE))[0]


def make_shared(gmem: OwnedFd, page: int = 0, pages: int = 1) -> Answer:
    """Convert pages of the file to shared."""
    return convert(gmem, Conversion(page * PAGE_SIZE, pages * PAGE_SIZE))[0]


def is_private(mapping: Mapping, page: int = 0) -> bool:
    """Whether the host is kept from a page: its access is a SIGBUS and nothing else."""
    answer = mapping.try_load(page * PAGE_SIZE)
    if isinstance(answer, Fault):
        assert answer.signal is signal.SIGBUS, answer
        return True
    return False


@in_place
@private_vms
def test_requests_are_checked(vm: Vm, shared: GuestMemfd) -> None:
    """A conversion names whole pages of the file and an attribute that there is; all else is EINVAL and changes nothing."""
    good = Conversion(PAGE_SIZE, PAGE_SIZE, PRIVATE)
    with shared.map() as mapping:
        for bad in (
            Conversion(good.offset + 1, good.size, PRIVATE),
            Conversion(good.offset, good.size + 1, PRIVATE),
            Conversion(good.offset, 0, PRIVATE),
            Conversion(SIZE, good.size, PRIVATE),
            Conversion(SIZE - PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE),
            Conversion(2**64 - PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE),
            Conversion(good.offset, good.size, PRIVATE | 1),
            Conversion(good.offset, good.size, 1 << 63),
            Conversion(good.offset, good.size, PRIVATE, flags=1 << 63),
            Conversion(good.offset, good.size, PRIVATE, reserved=1),
        ):
            assert convert(shared, bad)[0] == Errno.EINVAL, bad
            assert not is_private(mapping, 1), bad
        assert convert(shared, good)[0] == OK
        assert [is_private(mapping, page) for page in range(3)] == [False, True, False]


@in_place
def test_a_vm_without_private_memory_converts_nothing(kvm: Kvm) -> None:
    """A gmem of a VM that has no private memory cannot become private: EINVAL, and shared it is already."""
    with kvm.create_vm() as vm, vm.create_guest_memfd(SIZE, SHARED) as gmem, gmem.map() as mapping:
        assert make_private(gmem) == Errno.EINVAL
        assert not is_private(mapping)
        assert make_shared(gmem) == OK


@in_place
@private_vms
def test_attributes_belong_to_the_file_alone(vm: Vm, shared: GuestMemfd) -> None:
    """Where the file knows what is private, the VM does not: it offers no attributes, and its own ioctl refuses."""
    assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == 0
    assert vm.raw.set_attributes(GPA, PAGE_SIZE, PRIVATE) in (Errno.EINVAL, Errno.ENOTTY)
    assert make_private(shared) == OK


@in_place
@private_vms
def test_private_memory_may_start_shared(vm: Vm) -> None:
    """A VM with private memory makes gmem that starts shared, and gmem that starts private, mapped or not."""
    assert vm.gmem_flags() & SHARED == SHARED
    for flags, starts_private in ((SHARED, False), (GmemFlag.MMAP, True)):
        with vm.create_guest_memfd(SIZE, flags) as gmem, gmem.map() as mapping:
            assert is_private(mapping) is starts_private
            assert make_shared(gmem) == OK
            assert not is_private(mapping)


@in_place
@private_vms
@pytest.mark.parametrize("flags", [0, 1, 2, 3], ids=["g0", "gM", "gS", "gMS"])
def test_every_slot_is_served_by_its_gmem_alone(vm: Vm, cpu: GuestCpu, flags: int) -> None:
    """Private or shared, what the guest reaches through a gmem slot is the gmem: the host address is not used."""
    with vm.create_guest_memfd(SIZE, flags) as gmem, Mapping.anonymous(SIZE) as memory:
        vm.bind(gmem, gpa=GPA, hva=memory.address)
        assert make_shared(gmem) == OK
        cpu.store(GPA, STAMP)
        assert make_private(gmem, 1) == OK
        cpu.store(GPA + PAGE_SIZE, STAMP + 1)
        assert (cpu.load(GPA), cpu.load(GPA + PAGE_SIZE)) == (STAMP, STAMP + 1)
        assert gmem.allocated_pages() == 2
        assert memory.is_filled_with(0, 0, 2 * PAGE_SIZE)


@in_place
@private_vms
def test_the_host_loses_and_regains_a_page(vm: Vm, cpu: GuestCpu, shared: GuestMemfd) -> None:
    """A page that became private raises SIGBUS in the host, touched before or not, and is the host's again when shared."""
    vm.bind(shared, gpa=GPA)
    with shared.map() as mapping:
        mapping.store(STAMP)
        for page in (0, 1):
            assert make_private(shared, page) == OK
            assert is_private(mapping, page)
            assert isinstance(mapping.try_store(1, page * PAGE_SIZE), Fault)
            cpu.store(GPA + page * PAGE_SIZE, STAMP + page)
            assert cpu.load(GPA + page * PAGE_SIZE) == STAMP + page
            assert make_shared(shared, page) == OK
            mapping.store(STAMP + 7, page * PAGE_SIZE)
            assert cpu.load(GPA + page * PAGE_SIZE) == STAMP + 7
        assert not is_private(mapping, 2)


@in_place
@private_vms
def test_state_follows_the_file_through_slots(vm: Vm, cpu: GuestCpu, shared: GuestMemfd) -> None:
    """What is private is a range of the file, not of guest memory: it stays so through slots deleted and made elsewhere."""
    half = SIZE // 2
    with shared.map() as mapping:
        vm.bind(shared, gpa=GPA, size=half)
        assert make_private(shared) == OK
        cpu.store(GPA, STAMP)
        vm.delete_region(0)
        assert is_private(mapping)
        vm.bind(shared, gpa=GPA, size=half, offset=half)  # the same guest address, another part of the file
        assert not is_private(mapping, half // PAGE_SIZE)
        mapping.store(STAMP + 1, half)
        assert cpu.load(GPA) == STAMP + 1
        vm.bind(shared, slot=1, gpa=GPA + 4 * SIZE, size=half)
        assert is_private(mapping)
        assert cpu.load(GPA + 4 * SIZE) == STAMP


@in_place
@private_vms
def test_a_punch_leaves_the_state_alone(vm: Vm, cpu: GuestCpu, shared: GuestMemfd) -> None:
    """A hole is as private or shared as the pages were that it took the place of."""
    vm.bind(shared, gpa=GPA)
    with shared.map() as mapping:
        mapping.store(STAMP, PAGE_SIZE)
        assert make_private(shared) == OK
        cpu.store(GPA, STAMP)
        shared.punch()
        assert shared.allocated_pages() == 0
        assert [is_private(mapping, page) for page in range(2)] == [True, False]
        assert (cpu.load(GPA), mapping.load(PAGE_SIZE)) == (0, 0)


@in_place
@private_vms
@requires("io-uring")
def test_a_page_in_use_cannot_become_private(vm: Vm, shared: GuestMemfd) -> None:
    """A page that something in the kernel still refers to stays shared: EAGAIN, with its place in the file."""
    busy = 3
    with shared.map() as mapping, IoUring() as ring:
        mapping.fill(1)
        assert ring.register(mapping.address + busy * PAGE_SIZE, PAGE_SIZE) == OK
        answer, place = convert(shared, Conversion(0, 8 * PAGE_SIZE, PRIVATE))
        assert (answer, place) == (Errno.EAGAIN, busy * PAGE_SIZE)
        assert not is_private(mapping, busy)
        assert make_private(shared, busy + 1, 4) == OK  # the control: others are free to change
        assert ring.unregister() == OK
        assert make_private(shared, 0, 8) == OK
        assert all(is_private(mapping, page) for page in range(8))


@in_place
@private_vms
@requires("debugfs")
def test_the_ioctl_outlives_the_vm(vm: Vm, shared: GuestMemfd) -> None:
    """Memory belongs to the file: it is converted as before when the VM that made it has no descriptor left."""
    directory = VmDirectory.of(vm)
    with shared.map() as mapping:
        vm.close()
        assert directory.exists
        assert make_private(shared) == OK
        assert is_private(mapping)
        assert make_shared(shared) == OK
        assert not is_private(mapping)
    shared.close()
    directory.wait_gone()


@in_place
@private_vms
def test_other_processes_lose_the_page_at_once(vm: Vm, shared: GuestMemfd) -> None:
    """When the conversion returns, no mapping of any process reaches the page."""

    def holder(channel: Channel) -> None:
        with shared.map() as mapping:
            mapping.store(STAMP)
            channel.send(mapping.load())
            while channel.receive():
                channel.send(is_private(mapping))

    with ChildProcess(holder) as child:
        assert child.receive() == STAMP
        for convert_page, private in ((make_private, True), (make_shared, False), (make_private, True)):
            assert convert_page(shared) == OK
            child.send(True)
            assert child.receive() is private
        child.send(False)
        child.wait()


@in_place
def test_only_the_gmem_file_converts(kvm: Kvm) -> None:
    """The ioctl is one of gmem files: neither /dev/kvm nor a path descriptor has it."""
    with kvm.create_vm(VmType.SW_PROTECTED) as vm, vm.create_guest_memfd(SIZE, SHARED) as gmem:
        request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
        assert vm.raw.set_region(request) == OK
        assert convert(kvm, Conversion(0, PAGE_SIZE, PRIVATE))[0] == Errno.EINVAL  # as of any ioctl it does not know
        with OwnedFd(os.open(link_of(gmem), os.O_PATH | os.O_CLOEXEC)) as path:
            assert make_private(path) == Errno.EBADF
        assert make_private(gmem) == OK
