"""GM-CRE: creating a guest_memfd."""

import mmap
import os
import threading

import pytest

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MiB
from kvmgmem.arch.x86_64 import GuestCpu
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires, vm_types, wait_until
from kvmgmem.testing.descriptor_limit import no_descriptors
from kvmgmem.testing.fixtures import GPA
from kvmgmem.testing.selinux import Selinux
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

LARGEST = (1 << 63) - PAGE_SIZE
STRUCT_SIZE = 64
BAD_FLAG = 1 << 63
PROT_NONE = 0  # Python's mmap has no name for it


def created(vm: Vm, size: int, flags: int = 0) -> Answer:
    """0 if such a gmem can be created, else the errno."""
    gmem = vm.raw.create_guest_memfd(size, flags)
    if isinstance(gmem, Errno):
        return gmem
    with gmem:
        assert os.fstat(gmem.fileno()).st_size == size
    return OK


def create_at(fd: OwnedFd, address: int) -> Answer:
    """KVM_CREATE_GUEST_MEMFD on any file with its argument at any address: 0 or the errno; what it creates is closed."""
    answer = entry.ioctl(fd.fileno(), lib.KVM_CREATE_GUEST_MEMFD, address)
    if isinstance(answer, Errno):
        return answer
    os.close(answer)
    return OK


@contract("GM-CRE-001")
def test_zero_size_is_refused(vm: Vm) -> None:
    """A gmem of no size is refused with EINVAL; one page is enough."""
    assert created(vm, PAGE_SIZE) == OK
    assert created(vm, 0) == Errno.EINVAL


@contract("GM-CRE-002")
def test_size_must_be_whole_pages(vm: Vm, effort: float) -> None:
    """A size that is not a multiple of the page size is refused with EINVAL, small or large."""
    for pages in (0, 1, 1 << 20):
        start = pages * PAGE_SIZE
        assert created(vm, start + PAGE_SIZE) == OK
        # All of them take seconds under emulation; those with one or two bits set or clear stand for the rest.
        sizes = [start + odd for odd in range(1, PAGE_SIZE) if effort >= 2 or odd.bit_count() in (1, 2, 10, 11, 12)]
        answers = {size: created(vm, size) for size in sizes}
        assert answers == dict.fromkeys(sizes, Errno.EINVAL)


@contract("GM-CRE-003")
def test_negative_size_is_refused(vm: Vm) -> None:
    """A size with its top bit set is negative for the kernel and refused with EINVAL, though it is whole pages."""
    assert created(vm, LARGEST) == OK
    for size in (1 << 63, (1 << 63) + PAGE_SIZE, (1 << 64) - 2 * MiB, (1 << 64) - PAGE_SIZE):
        assert created(vm, size) == Errno.EINVAL, f"{size:#x}"


@contract("GM-CRE-004")
@pytest.mark.parametrize("size", [LARGEST, 1 << 62, 1 << 50], ids=hex)
def test_largest_size_reserves_nothing(vm: Vm, size: int) -> None:
    """A gmem of the largest positive size exists at no cost: its size is as asked, and no page is allocated until used."""
    with vm.create_guest_memfd(size) as gmem:
        assert os.fstat(gmem.fileno()).st_size == size
        assert gmem.allocated_pages() == 0
        assert gmem.raw.allocate(size - PAGE_SIZE, PAGE_SIZE) == OK
        assert (gmem.allocated_pages(), gmem.allocated_pages(size - PAGE_SIZE, PAGE_SIZE)) == (1, 1)


@contract("GM-CRE-005")
def test_each_flag_bit_is_accepted_if_the_vm_offers_it(vm: Vm) -> None:
    """Each of the 64 flag bits is accepted if and only if KVM_CAP_GUEST_MEMFD_FLAGS of the VM has it; others are EINVAL."""
    offered = vm.gmem_flags()
    assert created(vm, PAGE_SIZE) == OK
    answers = {bit: created(vm, PAGE_SIZE, 1 << bit) for bit in range(64)}
    assert answers == {bit: OK if offered & 1 << bit else Errno.EINVAL for bit in range(64)}
    assert created(vm, PAGE_SIZE, offered) == OK
    assert created(vm, PAGE_SIZE, offered | BAD_FLAG) == Errno.EINVAL


@contract("GM-CRE-006")
@requires("default-vm")
@vm_types("default")
@gmem_kinds("gS")
def test_init_shared_without_mmap_can_never_be_mapped(vm: Vm, gmem: GuestMemfd) -> None:
    """INIT_SHARED without MMAP is legal and makes a file that allocates and binds but can never be mapped (ENODEV)."""
    assert gmem.flags == GmemFlag.INIT_SHARED
    gmem.allocate()
    assert gmem.allocated_pages() == gmem.pages
    vm.bind(gmem, gpa=GPA)
    with vm.create_guest_memfd(gmem.size, GmemFlag.INIT_SHARED | GmemFlag.MMAP) as mappable:
        for prot in (PROT_NONE, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            mappable.map(prot=prot).unmap()
            assert gmem.raw.map(prot=prot) == Errno.ENODEV


@contract("GM-CRE-007")
@requires("default-vm", cap=Cap.GUEST_MEMFD_FLAGS)
@vm_types("sw-protected")
def test_init_shared_is_not_for_private_memory(kvm: Kvm, vm: Vm) -> None:
    """A VM with private memory refuses INIT_SHARED with EINVAL, alone and with MMAP, and accepts MMAP alone."""
    both = GmemFlag.MMAP | GmemFlag.INIT_SHARED
    kinds = (GmemFlag(0), GmemFlag.MMAP, GmemFlag.INIT_SHARED, both)
    with kvm.create_vm() as default:
        assert [created(default, PAGE_SIZE, flags) for flags in kinds] == [OK, OK, OK, OK]
    assert [created(vm, PAGE_SIZE, flags) for flags in kinds] == [OK, OK, Errno.EINVAL, Errno.EINVAL]


@contract("GM-CRE-008")
def test_reserved_words_are_not_looked_at(vm: Vm) -> None:
    """The six reserved words may hold anything: the gmem is what size and flags say."""
    garbage = tuple(0xDEAD_BEEF_0000_0001 + word for word in range(6))
    for reserved in (garbage, (1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1 << 63)):
        gmem = vm.raw.create_guest_memfd(3 * PAGE_SIZE, 0, reserved)
        assert not isinstance(gmem, Errno)
        with gmem:
            assert os.fstat(gmem.fileno()).st_size == 3 * PAGE_SIZE
    assert vm.raw.create_guest_memfd(3 * PAGE_SIZE + 1, 0, garbage) == Errno.EINVAL
    assert vm.raw.create_guest_memfd(3 * PAGE_SIZE, BAD_FLAG, garbage) == Errno.EINVAL


@contract("GM-CRE-009")
def test_request_is_never_written_back(vm: Vm) -> None:
    """The request is input only, although its ioctl number says otherwise: no answer changes a byte of it."""
    for size, flags, wanted in (
        (PAGE_SIZE, 0, OK),
        (PAGE_SIZE, BAD_FLAG, Errno.EINVAL),
        (PAGE_SIZE + 1, 0, Errno.EINVAL),
    ):
        request = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags, "reserved": [0x55] * 6})
        before = bytes(ffi.buffer(request))
        assert create_at(vm, entry.address_of(request)) == wanted
        assert bytes(ffi.buffer(request)) == before


@contract("GM-CRE-009", "GM-CRE-010")
def test_request_may_be_read_only(vm: Vm) -> None:
    """A request in memory that cannot be written works: the kernel only reads it."""
    with Mapping.anonymous(PAGE_SIZE) as memory:
        memory.store(PAGE_SIZE)
        assert memory.protect(mmap.PROT_READ) == OK
        assert create_at(vm, memory.address) == OK


@contract("GM-CRE-010")
def test_request_is_64_readable_bytes(vm: Vm) -> None:
    """The kernel reads exactly 64 bytes: a request that ends with the last readable byte works, one byte less is EFAULT."""
    with Mapping.anonymous(2 * PAGE_SIZE) as memory:
        assert memory.protect(PROT_NONE, PAGE_SIZE, PAGE_SIZE) == OK
        memory.store(PAGE_SIZE, PAGE_SIZE - STRUCT_SIZE)
        assert create_at(vm, memory.address + PAGE_SIZE - STRUCT_SIZE) == OK
        for length in (STRUCT_SIZE - 1, STRUCT_SIZE - 8, 16, 1):
            memory.fill(0, 0, PAGE_SIZE)
            if length >= 8:
                memory.store(PAGE_SIZE, PAGE_SIZE - length)
            assert create_at(vm, memory.address + PAGE_SIZE - length) == Errno.EFAULT, f"{length} readable bytes"
        assert create_at(vm, memory.address + PAGE_SIZE) == Errno.EFAULT
    for address in (0, 8, 1 << 63, (1 << 64) - PAGE_SIZE):
        assert create_at(vm, address) == Errno.EFAULT, f"{address:#x}"


@contract("GM-CRE-011")
def test_only_a_vm_creates_a_gmem(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """KVM_CREATE_GUEST_MEMFD is an ioctl of a VM: EINVAL on /dev/kvm and on a vCPU, ENOTTY on a gmem."""
    request = ffi.new("struct kvm_create_guest_memfd *", {"size": PAGE_SIZE})
    address = entry.address_of(request)
    with vm.create_vcpu() as vcpu:
        answers = [create_at(fd, address) for fd in (vm, kvm, vcpu, gmem)]
    assert answers == [OK, Errno.EINVAL, Errno.EINVAL, Errno.ENOTTY]


@contract("GM-CRE-012", "GM-RES-010")
def test_bad_requests_are_reported_before_a_missing_descriptor(vm: Vm) -> None:
    """Flags and size are judged before a descriptor is taken: EINVAL where the request is bad, EMFILE where it is good."""
    requests = [(PAGE_SIZE, 0), (PAGE_SIZE, BAD_FLAG), (PAGE_SIZE + 1, 0), (0, 0)]
    with no_descriptors():
        short = [created(vm, size, flags) for size, flags in requests]
    assert short == [Errno.EMFILE, Errno.EINVAL, Errno.EINVAL, Errno.EINVAL]
    assert [created(vm, size, flags) for size, flags in requests] == [OK, Errno.EINVAL, Errno.EINVAL, Errno.EINVAL]


@contract("GM-CRE-013")
@requires("debugfs")
def test_failed_creation_leaves_nothing_behind(kvm: Kvm, vm: Vm) -> None:
    """A creation that fails keeps no descriptor and no reference on the VM: closing the VM still destroys it."""
    with kvm.create_vm(vm.type) as other:  # the control: a gmem that was created keeps its VM
        kept = VmDirectory.of(other)
        gmem = other.create_guest_memfd(PAGE_SIZE)
    assert kept.exists
    gmem.close()
    kept.wait_gone()

    directory = VmDirectory.of(vm)
    before = os.listdir("/proc/self/fd")
    for _ in range(50):
        assert created(vm, PAGE_SIZE, BAD_FLAG) == created(vm, 1) == created(vm, 0) == Errno.EINVAL
        assert create_at(vm, 8) == Errno.EFAULT
        with no_descriptors():
            answer = created(vm, PAGE_SIZE)
        assert answer == Errno.EMFILE
    assert os.listdir("/proc/self/fd") == before
    vm.close()
    directory.wait_gone()


@contract("GM-CRE-014")
def test_gmems_of_a_vm_are_separate_files(vm: Vm) -> None:
    """A VM can have many gmems: each is an inode of its own, with its own size and its own pages."""
    sizes = [(index + 1) * PAGE_SIZE for index in range(64)]
    gmems = [vm.create_guest_memfd(size) for size in sizes]
    stats = [os.fstat(gmem.fileno()) for gmem in gmems]
    assert [stat.st_size for stat in stats] == sizes
    assert len({(stat.st_dev, stat.st_ino) for stat in stats}) == len(gmems)
    for gmem in gmems[::2]:
        gmem.allocate()
    assert [gmem.allocated_pages() for gmem in gmems] == [0 if index % 2 else index + 1 for index in range(len(gmems))]
    for gmem in gmems:
        gmem.close()


@contract("GM-CRE-015")
@requires("default-vm")
def test_creation_through_a_duplicate_and_from_a_thread(vm: Vm) -> None:
    """Any descriptor of the VM and any thread of its process creates gmems, and they are the VM's like all others."""
    with vm.dup() as duplicate:
        found: list[GuestMemfd | Errno] = []
        again = Vm(duplicate.release(), vm.type, vm.vcpu_mmap_size)
    with again:
        threads = [
            threading.Thread(target=lambda via=via: found.append(via.raw.create_guest_memfd(PAGE_SIZE)))
            for via in (vm, again)
        ]
        for thread in threads:
            thread.start()
            thread.join()
        found.append(again.raw.create_guest_memfd(PAGE_SIZE))
    assert not [answer for answer in found if isinstance(answer, Errno)]
    for slot, gmem in enumerate(found):
        assert isinstance(gmem, GuestMemfd)
        assert vm.raw.set_region(MemoryRegion(slot, GPA + slot * PAGE_SIZE, PAGE_SIZE, gmem=gmem)) == OK
        gmem.close()


@contract("GM-CRE-016")
def test_creation_does_not_wait_for_a_running_vcpu(vm: Vm, cpu: GuestCpu) -> None:
    """A gmem can be created after vCPUs exist and while one runs: creation waits for nothing that KVM_RUN holds."""
    with Mapping.anonymous(PAGE_SIZE) as memory:
        vm.set_region(MemoryRegion(0, GPA, PAGE_SIZE, memory.address))
        cpu.start("hammer", rdi=GPA)
        with cpu.running() as run:
            wait_until(lambda: memory.load() > 0, "the guest counts")
            assert [created(vm, 2 * MiB) for _ in range(20)] == [OK] * 20
            counted = memory.load()
            wait_until(lambda: memory.load() > counted, "the guest goes on counting")
            assert run.alive
            assert run.kick().kicked


@contract("GM-CRE-017")
@requires("selinux-enforcing")
@vm_types("default")
def test_selinux_can_veto_creation(kvm: Kvm) -> None:
    """A security module is asked for leave to make an anonymous inode [kvm-gmem]: where policy denies it, it is EACCES."""
    selinux = Selinux()
    here = selinux.current()
    assert selinux.may_create_anon_inode(here, "[kvm-gmem]"), f"policy denies it to {here} itself: run in another domain"
    with kvm.create_vm() as vm:
        assert created(vm, PAGE_SIZE) == OK
    domain = selinux.denied_domain("[kvm-gmem]")
    if domain is None:
        pytest.skip(f"SELinux's policy has no domain that {here} may enter and that may not create [kvm-gmem]")
    known_bug("B20").expect(created_in_domain(selinux, domain), Errno.EACCES, shows=OK)


def created_in_domain(selinux: Selinux, domain: str) -> Answer:
    """Whether a process can create a gmem after it has entered a domain, by its exit status: that is never denied to it."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            with Kvm.open() as kvm, kvm.create_vm() as vm:
                selinux.enter(domain)
                if vm.raw.check_extension(Cap.GUEST_MEMFD) == 1:  # the control: the domain may use the VM
                    status = -created(vm, PAGE_SIZE)
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(ended)
    assert 0 <= status < 255, f"a process in {domain} could not use its own VM (exit status {status})"
    return entry.answer_of(-status)
