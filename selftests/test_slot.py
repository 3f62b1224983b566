"""GM-SLOT: memory slots in general, and the two requests that set them.

The gmem fields get their own area, GM-BIND; here they matter only where the plain rules meet them.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GiB, MemFlag, MiB, VmType
from kvmgmem.arch.x86_64 import GuestCpu, is_report, max_gpa_bits
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import MmioExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import in_child
from kvmgmem.testing import contract, gmem_kinds, known_bug, need, requires, test_timeout, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.stats import read_stat
from kvmgmem.vm import Vm, region1, region2

SLOT_IDS = 32764  # x86: SHRT_MAX minus the three of KVM's own (kh:KVM_USER_MEM_SLOTS)
MAX_PAGES = 2**31 - 1  # kh:KVM_MEM_MAX_NR_PAGES
ELSEWHERE = GPA + 64 * MiB
OLD, NEW = 0x01D, 0x2E3

Setter = Callable[[Vm, MemoryRegion], Answer]


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """Two pages for plain slots."""
    with Mapping.anonymous(2 * PAGE_SIZE) as memory:
        yield memory


@pytest.fixture
def plain(memory: Mapping) -> MemoryRegion:
    """A good request for a plain slot of one page; each test changes one field."""
    return MemoryRegion(slot=5, gpa=GPA, size=PAGE_SIZE, hva=memory.address)


def assert_accepted(vm: Vm, region: MemoryRegion) -> None:
    """The control: the request makes a slot, which is taken away again."""
    assert vm.raw.set_region(region) == OK
    assert vm.raw.delete_region(region.slot, region.as_id) == OK


def assert_refused(vm: Vm, region: MemoryRegion, answer: Errno = Errno.EINVAL) -> None:
    """The request fails, and left nothing behind that could be deleted."""
    assert vm.raw.set_region(region) == answer, region
    if region.size:
        assert vm.raw.delete_region(region.slot, region.as_id) == Errno.EINVAL


@contract("GM-SLOT-001")
@gmem_kinds("g0")
def test_v1_knows_two_flags(vm: Vm, gmem: GuestMemfd, plain: MemoryRegion) -> None:
    """KVM_SET_USER_MEMORY_REGION accepts LOG_DIRTY and READONLY and no other flag, before it looks at anything else."""
    for flags in (0, MemFlag.LOG_DIRTY, MemFlag.READONLY, MemFlag.LOG_DIRTY | MemFlag.READONLY):
        assert vm.raw.set_region_v1(plain.but(flags=flags)) == OK
        if flags != 0:
            assert vm.raw.set_region_v1(plain.but(slot=6, flags=flags)) == Errno.EEXIST
        vm.delete_region(plain.slot)
    vm.set_region(plain)
    overlapping = plain.but(slot=6)
    assert vm.raw.set_region_v1(overlapping) == Errno.EEXIST
    for bit in range(2, 32):
        assert vm.raw.set_region_v1(overlapping.but(flags=1 << bit)) == Errno.EINVAL, f"bit {bit}"


@contract("GM-SLOT-001")
@gmem_kinds("g0")
@vm_types("default")
def test_v1_never_binds_descriptor_zero(vm: Vm, gmem: GuestMemfd) -> None:
    """The old request has no gmem fields: KVM_MEM_GUEST_MEMFD in it does not mean descriptor 0, even if that is a gmem."""
    bind_zero = MemoryRegion(slot=5, gpa=GPA, size=gmem.size, gmem=0)
    saved = os.dup(0)
    try:
        os.dup2(gmem.fileno(), 0)
        assert_accepted(vm, bind_zero)
        assert vm.raw.set_region_v1(bind_zero) == Errno.EINVAL
        assert vm.raw.delete_region(bind_zero.slot) == Errno.EINVAL
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@contract("GM-SLOT-002")
def test_v2_refuses_undefined_flags(vm: Vm, plain: MemoryRegion) -> None:
    """KVM_SET_USER_MEMORY_REGION2 refuses every flag that is not defined, those among them that KVM keeps for itself."""
    for flags in (0, MemFlag.LOG_DIRTY, MemFlag.READONLY):
        assert_accepted(vm, plain.but(flags=flags))
    for bit in range(3, 32):
        assert_refused(vm, plain.but(flags=1 << bit))


@contract("GM-SLOT-002")
@gmem_kinds("g0", "gM")
def test_v2_refuses_internal_flags_beside_gmem(vm: Vm, gmem: GuestMemfd) -> None:
    """Userspace cannot set KVM's internal slot flags, invalid (bit 16) and gmem-only (bit 17), on a gmem slot either."""
    bind = MemoryRegion(slot=5, gpa=GPA, size=gmem.size, gmem=gmem)
    assert_accepted(vm, bind)
    for bit in range(3, 32):
        assert_refused(vm, bind.but(flags=MemFlag.GUEST_MEMFD | 1 << bit))


@contract("GM-SLOT-003")
@vm_types("default")
def test_v1_reads_32_bytes_and_v2_160(vm: Vm, plain: MemoryRegion) -> None:
    """The old request is 32 bytes long and the new one 160: the kernel reads all of its own and nothing beyond."""
    short, long = bytes(ffi.buffer(region1(plain))), bytes(ffi.buffer(region2(plain)))
    assert (len(short), len(long)) == (32, 160)
    with Mapping.anonymous(2 * PAGE_SIZE) as page:
        assert page.protect(0, PAGE_SIZE, PAGE_SIZE) == OK

        def send(request: int, text: bytes, missing: int = 0) -> Answer:
            at = PAGE_SIZE - len(text) + missing
            page.write(at, text[: len(text) - missing])
            return vm.raw.ioctl(request, page.address + at)

        assert send(lib.KVM_SET_USER_MEMORY_REGION, short, missing=1) == Errno.EFAULT
        assert send(lib.KVM_SET_USER_MEMORY_REGION2, short) == Errno.EFAULT
        assert send(lib.KVM_SET_USER_MEMORY_REGION2, long, missing=1) == Errno.EFAULT
        assert vm.raw.delete_region(plain.slot) == Errno.EINVAL
        assert send(lib.KVM_SET_USER_MEMORY_REGION, short) == OK
        assert vm.raw.delete_region(plain.slot) == OK
        assert send(lib.KVM_SET_USER_MEMORY_REGION2, long) == OK


@contract("GM-SLOT-004")
@gmem_kinds("g0", "gM")
@vm_types("default")
def test_padding_is_not_checked(vm: Vm, gmem: GuestMemfd, plain: MemoryRegion) -> None:
    """The padding of KVM_SET_USER_MEMORY_REGION2 may hold anything, with and without a gmem."""
    for region in (plain, MemoryRegion(slot=5, gpa=GPA, size=gmem.size, gmem=gmem)):
        assert_accepted(vm, region.but(pad1=0xFFFF_FFFF))
        assert_accepted(vm, region.but(pad2=0xFFFF_FFFF_FFFF_FFFF))
    vm.set_region(plain)
    assert vm.raw.set_region(MemoryRegion(slot=plain.slot, pad1=1, pad2=1)) == OK


@contract("GM-SLOT-005")
@gmem_kinds("g0")
@vm_types("default")
def test_gmem_fields_mean_nothing_without_the_flag(vm: Vm, gmem: GuestMemfd, plain: MemoryRegion) -> None:
    """Without KVM_MEM_GUEST_MEMFD the gmem descriptor and offset are ignored, whatever they are."""
    for fields in ({"gmem": -1}, {"gmem": gmem, "gmem_offset": 0x123}, {"gmem": gmem, "gmem_offset": 2**64 - PAGE_SIZE}):
        assert_accepted(vm, plain.but(flags=0, **fields))
        assert vm.raw.set_region(plain.but(flags=MemFlag.GUEST_MEMFD, **fields)) in (Errno.EINVAL, Errno.EBADF)
    assert_accepted(vm, plain.but(gmem=gmem))
    vm.set_region(plain.but(flags=0, gmem=gmem))
    whole_file = MemoryRegion(slot=6, gpa=ELSEWHERE, size=gmem.size, gmem=gmem)
    assert vm.raw.set_region(whole_file) == OK, "the first page is bound although the flag was not set"


@contract("GM-SLOT-006")
@vm_types("default")
def test_slot_ids_end_at_32763(vm: Vm, plain: MemoryRegion) -> None:
    """The low half of the slot word is an id below 32764; the rest of the 16 bits is KVM's own or nothing."""
    assert vm.check_extension(Cap.NR_MEMSLOTS) == SLOT_IDS
    for slot in (0, 1, SLOT_IDS // 2, SLOT_IDS - 2, SLOT_IDS - 1):
        assert_accepted(vm, plain.but(slot=slot))
    vm.set_region(plain.but(slot=0))
    beyond = [SLOT_IDS, SLOT_IDS + 1, SLOT_IDS + 2, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF]
    for slot in beyond:
        # At once the same GPA as slot 0: the id is judged before that would be EEXIST.
        assert_refused(vm, plain.but(slot=slot))
        assert vm.raw.delete_region(slot) == Errno.EINVAL


def address_spaces(vm: Vm) -> int:
    """How many address spaces the VM has: KVM_CAP_MULTI_ADDRESS_SPACE, absent without CONFIG_KVM_SMM."""
    return vm.check_extension(Cap.MULTI_ADDRESS_SPACE) or 1


@contract("GM-SLOT-007")
def test_address_spaces_beyond_the_second_are_refused(vm: Vm, plain: MemoryRegion) -> None:
    """The high half of the slot word names an address space, and no x86 VM has more than two."""
    assert_accepted(vm, plain)
    for as_id in (2, 3, 4, 0x7FFF, 0x8000, 0xFFFF):
        assert_refused(vm, plain.but(as_id=as_id))


@contract("GM-SLOT-008")
def test_second_address_space_is_for_smm(vm: Vm, plain: MemoryRegion) -> None:
    """Address space 1 exists for system management mode only: not without it, and not where memory is private."""
    assert_accepted(vm, plain)
    if vm.type.has_private_memory:
        assert address_spaces(vm) == 1
    if address_spaces(vm) == 1:
        assert_refused(vm, plain.but(as_id=1))
    else:
        assert_accepted(vm, plain.but(as_id=1))


@contract("GM-SLOT-009")
@vm_types("default")
@requires("smm")
def test_address_spaces_have_tables_of_their_own(vm: Vm, plain: MemoryRegion, memory: Mapping) -> None:
    """The same slot id at the same GPA can exist in both address spaces; each is deleted on its own."""
    assert vm.raw.set_region(plain) == OK
    assert vm.raw.set_region(plain.but(slot=6)) == Errno.EEXIST
    second = plain.but(as_id=1, hva=memory.address + PAGE_SIZE)
    assert vm.raw.set_region(second) == OK
    assert vm.raw.set_region(second.but(slot=6)) == Errno.EEXIST
    assert vm.raw.delete_region(plain.slot, as_id=1) == OK
    assert vm.raw.delete_region(plain.slot, as_id=1) == Errno.EINVAL
    assert vm.raw.set_region(plain.but(slot=6)) == Errno.EEXIST
    assert vm.raw.delete_region(plain.slot) == OK


@contract("GM-SLOT-010")
@vm_types("default")
def test_geometry_is_in_whole_pages(vm: Vm, plain: MemoryRegion) -> None:
    """Size, GPA and HVA of a slot are multiples of the page size."""
    assert_accepted(vm, plain)
    for excess in (1, 2, 8, 512, 0x800, PAGE_SIZE - 1):
        assert_refused(vm, plain.but(size=plain.size + excess))
        assert_refused(vm, plain.but(gpa=plain.gpa + excess))
        assert_refused(vm, plain.but(hva=plain.hva + excess))
    assert_accepted(vm, plain.but(size=2 * PAGE_SIZE, gpa=GPA + PAGE_SIZE, hva=plain.hva + PAGE_SIZE))


@contract("GM-SLOT-011")
@vm_types("default")
def test_hva_is_a_user_address_for_its_whole_length(vm: Vm, plain: MemoryRegion) -> None:
    """The whole range at userspace_addr must lie in user space: up to its last page, and not one page further."""
    need("x86")
    # 47 or 56 bits by the paging levels; with linear address masking the kernel checks the sign alone, so everything
    # below 2^63 counts as a user address (arch/x86/kernel/cpu/common.c: USER_PTR_MAX).
    ends = [(1 << bits) - PAGE_SIZE for bits in (47, 56, 63)]
    accepted = [end for end in ends if vm.raw.set_region(plain.but(hva=end - PAGE_SIZE)) == OK and delete(vm, plain)]
    assert accepted == ends[: len(accepted)]
    assert accepted, "the last page of a 47-bit user space is refused"
    end = accepted[-1]
    assert_accepted(vm, plain.but(hva=end - 2 * PAGE_SIZE, size=2 * PAGE_SIZE))
    assert_refused(vm, plain.but(hva=end))
    assert_refused(vm, plain.but(hva=end - PAGE_SIZE, size=2 * PAGE_SIZE))
    assert_refused(vm, plain.but(hva=end - GiB, size=GiB + PAGE_SIZE))
    for kernel in (1 << 63, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_8000_0000, 2**64 - PAGE_SIZE):
        assert_refused(vm, plain.but(hva=kernel))


def delete(vm: Vm, region: MemoryRegion) -> bool:
    """Delete the slot of a request; True, so that it can stand in a condition."""
    vm.delete_region(region.slot, region.as_id)
    return True


@contract("GM-SLOT-012")
def test_hva_need_not_be_mapped(vm: Vm, plain: MemoryRegion, cpu: GuestCpu) -> None:
    """A slot may point to an HVA that is not mapped (yet): the access decides, when it comes."""
    with Mapping.anonymous(PAGE_SIZE) as hole:
        vm.set_region(plain.but(hva=hole.address))
        assert hole.advise(4) == OK  # MADV_DONTNEED: nothing of it was ever there
        hole.store(OLD)
        assert cpu.load(GPA) == OLD
        address = hole.address
    vm.delete_region(plain.slot)
    assert vm.raw.set_region(plain.but(hva=address)) == OK
    assert cpu.try_load(GPA).answer == Errno.EFAULT
    fixed = 0x100000 | 0x22  # MAP_FIXED_NOREPLACE | MAP_PRIVATE | MAP_ANONYMOUS
    late = Mapping.try_map(PAGE_SIZE, address=address, flags=fixed)
    assert isinstance(late, Mapping)
    with late:
        late.store(NEW)
        assert cpu.load(GPA) == NEW


@contract("GM-SLOT-013")
@gmem_kinds("g0")
@vm_types("default")
def test_gpa_range_must_not_wrap(vm: Vm, gmem: GuestMemfd, plain: MemoryRegion) -> None:
    """GPA plus size must not wrap at 2^64."""
    assert_accepted(vm, plain)
    for gpa, size in ((2**64 - PAGE_SIZE, PAGE_SIZE), (2**64 - PAGE_SIZE, SIZE), (2**64 - SIZE, SIZE)):
        assert_refused(vm, plain.but(gpa=gpa, size=size))
        # The GPA limit, which these break as well, is judged after a bad descriptor (EBADF), the wrap before.
        bad_fd = MemoryRegion(slot=5, gpa=gpa, size=size, gmem=-1)
        assert vm.raw.set_region(bad_fd) == Errno.EINVAL
        assert vm.raw.set_region(bad_fd.but(gpa=gpa - PAGE_SIZE)) == (Errno.EBADF if gpa + size == 2**64 else Errno.EINVAL)


@contract("GM-SLOT-014")
@requires("x86")
def test_gpa_limit(vm: Vm, host: Host, plain: MemoryRegion) -> None:
    """Slots reach up to the host's MAXPHYADDR with two-dimensional paging and to 52 bits with shadow paging."""
    limit = 1 << max_gpa_bits(host.paging)
    assert_accepted(vm, plain.but(gpa=limit - PAGE_SIZE))
    assert_accepted(vm, plain.but(gpa=limit - 2 * PAGE_SIZE, size=2 * PAGE_SIZE))
    assert_refused(vm, plain.but(gpa=limit))
    assert_refused(vm, plain.but(gpa=limit - PAGE_SIZE, size=2 * PAGE_SIZE))
    assert_refused(vm, plain.but(gpa=2 * limit))


@contract("GM-SLOT-014")
@requires("x86")
@vm_types("default")
def test_moving_beyond_the_gpa_limit_is_refused(vm: Vm, host: Host, plain: MemoryRegion) -> None:
    """A slot cannot be moved across the GPA limit, and stays where it is when that is tried."""
    limit = 1 << max_gpa_bits(host.paging)
    vm.set_region(plain)
    assert vm.raw.set_region(plain.but(gpa=limit)) == Errno.EINVAL
    assert vm.raw.set_region(plain.but(slot=6)) == Errno.EEXIST
    assert vm.raw.set_region(plain.but(gpa=limit - PAGE_SIZE)) == OK
    assert vm.raw.set_region(plain.but(slot=6)) == OK


@contract("GM-SLOT-015")
@requires("slot-of-8-tib")
def test_slot_of_2_to_the_31_pages_is_refused(vm: Vm) -> None:
    """A slot has fewer than 2^31 pages."""
    big = MemoryRegion(slot=5, gpa=0, size=(MAX_PAGES + 1) * PAGE_SIZE, hva=0)
    assert_accepted(vm, big.but(size=SIZE))
    assert_refused(vm, big)
    assert_refused(vm, big.but(size=big.size + PAGE_SIZE))


@contract("GM-SLOT-015")
@requires("slot-of-8-tib", "memory-for-8-tib-slot")
@vm_types("default")
def test_largest_slot(vm: Vm) -> None:
    """A slot of exactly 2^31-1 pages is accepted, memory permitting."""
    biggest = MemoryRegion(slot=5, gpa=0, size=MAX_PAGES * PAGE_SIZE, hva=0)
    assert vm.raw.set_region(biggest) == OK
    last_page = MemoryRegion(slot=6, gpa=biggest.size - PAGE_SIZE, size=PAGE_SIZE)
    assert vm.raw.set_region(last_page) == Errno.EEXIST
    assert vm.raw.set_region(last_page.but(gpa=biggest.size)) == OK
    assert vm.raw.delete_region(biggest.slot) == OK
    assert vm.raw.set_region(last_page.but(slot=7)) == OK


@contract("GM-SLOT-016")
@vm_types("default")
@test_timeout(120)
def test_as_many_slots_as_ids(vm: Vm, memory: Mapping, request: pytest.FixtureRequest) -> None:
    """Exactly 32764 slots can exist in a VM at a time."""
    if os.environ.get("KVMGMEM_ACCELERATOR") == "tcg" and request.config.getoption("--effort") < 2:
        pytest.skip("making 32764 slots takes half a minute under emulation: give --effort 2")
    page = region2(MemoryRegion(size=PAGE_SIZE, hva=memory.address))
    for slot in range(SLOT_IDS):
        page.slot, page.guest_phys_addr = slot, GPA + slot * PAGE_SIZE
        assert vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, page) == OK
    assert vm.raw.set_region(MemoryRegion(slot=SLOT_IDS, gpa=0, size=PAGE_SIZE, hva=memory.address)) == Errno.EINVAL
    assert vm.raw.set_region(MemoryRegion(slot=SLOT_IDS - 1, gpa=0, size=PAGE_SIZE, hva=memory.address)) == OK
    vm.delete_region(0)
    assert_accepted(vm, MemoryRegion(slot=0, gpa=GPA, size=PAGE_SIZE, hva=memory.address))


@contract("GM-SLOT-017")
@vm_types("default")
def test_deleting_an_absent_slot_is_refused(vm: Vm, plain: MemoryRegion) -> None:
    """Only a slot that exists can be deleted, and only once."""
    assert vm.raw.delete_region(plain.slot) == Errno.EINVAL
    vm.set_region(plain)
    assert vm.raw.delete_region(plain.slot + 1) == Errno.EINVAL
    assert vm.raw.delete_region(plain.slot) == OK
    assert vm.raw.delete_region(plain.slot) == Errno.EINVAL
    assert vm.raw.set_region_v1(MemoryRegion(slot=plain.slot)) == Errno.EINVAL
    assert_accepted(vm, plain)


@contract("GM-SLOT-018")
@vm_types("default")
def test_delete_is_validated_like_any_request(vm: Vm, plain: MemoryRegion) -> None:
    """A delete request with bad flags, a bad alignment or a kernel HVA is refused, and the slot stays."""
    vm.set_region(plain)
    delete = MemoryRegion(slot=plain.slot)
    for bad in (
        delete.but(flags=1 << 3),
        delete.but(flags=1 << 17),
        delete.but(flags=MemFlag.GUEST_MEMFD | MemFlag.READONLY),
        delete.but(flags=MemFlag.GUEST_MEMFD | MemFlag.LOG_DIRTY),
        delete.but(hva=1),
        delete.but(hva=0xFFFF_8000_0000_0000),
        delete.but(gpa=1),
        delete.but(flags=MemFlag.GUEST_MEMFD, gmem_offset=0x123),
    ):
        assert vm.raw.set_region(bad) == Errno.EINVAL, bad
        assert vm.raw.set_region(plain.but(slot=6)) == Errno.EEXIST, f"deleted by {bad}"
    assert vm.raw.set_region(delete) == OK


@contract("GM-SLOT-019")
@vm_types("default")
def test_delete_ignores_what_it_does_not_need(vm: Vm, plain: MemoryRegion) -> None:
    """A delete request may carry any aligned GPA, any user HVA, any descriptor and any valid flag."""
    delete = MemoryRegion(slot=plain.slot)
    requests = [
        delete,
        delete.but(gpa=plain.gpa + SIZE),
        delete.but(gpa=2**64 - PAGE_SIZE),
        delete.but(hva=0x1000),
        delete.but(flags=MemFlag.LOG_DIRTY),
        delete.but(flags=MemFlag.LOG_DIRTY | MemFlag.READONLY),
    ]
    if vm.check_extension(Cap.GUEST_MEMFD):  # before 6.18 the flag is none of a default VM's
        requests.append(delete.but(flags=MemFlag.GUEST_MEMFD, gmem=-1))
        requests.append(delete.but(flags=MemFlag.GUEST_MEMFD, gmem=vm, gmem_offset=2**64 - PAGE_SIZE))
    for good in requests:
        vm.set_region(plain)
        assert vm.raw.set_region(good) == OK, good
        assert vm.raw.delete_region(plain.slot) == Errno.EINVAL, f"{good} deleted nothing"


@contract("GM-SLOT-020")
def test_same_plain_slot_again_is_nothing_new(vm: Vm, plain: MemoryRegion, cpu: GuestCpu, memory: Mapping) -> None:
    """Setting a plain slot again as it is changes nothing and succeeds."""
    memory.store(OLD)
    for region in (plain, plain.but(flags=MemFlag.LOG_DIRTY)):
        vm.set_region(region)
        assert cpu.load(GPA) == OLD
        before = read_stat(cpu.vcpu, "pf_fixed")
        assert vm.raw.set_region(region) == OK
        assert vm.raw.set_region_v1(region) == OK
        assert cpu.load(GPA) == OLD
        assert read_stat(cpu.vcpu, "pf_fixed") == before, "the guest had to fault again"
        vm.delete_region(plain.slot)


@contract("GM-SLOT-021")
@vm_types("default")
def test_plain_slot_keeps_size_hva_and_readonly(vm: Vm, plain: MemoryRegion) -> None:
    """Size, HVA and READONLY of a plain slot cannot be changed in place."""
    for old in (plain.but(size=2 * PAGE_SIZE), plain.but(size=2 * PAGE_SIZE, flags=MemFlag.READONLY)):
        vm.set_region(old)
        for new in (
            old.but(size=PAGE_SIZE),
            old.but(size=3 * PAGE_SIZE),
            old.but(hva=old.hva + PAGE_SIZE),
            old.but(hva=0),
            old.but(flags=old.flag_word ^ MemFlag.READONLY),
            old.but(flags=old.flag_word ^ (MemFlag.READONLY | MemFlag.LOG_DIRTY)),
            old.but(gpa=ELSEWHERE, size=PAGE_SIZE),
            old.but(gpa=ELSEWHERE, flags=old.flag_word ^ MemFlag.READONLY),
        ):
            assert vm.raw.set_region(new) == Errno.EINVAL, new
            assert vm.raw.set_region_v1(new) == Errno.EINVAL, new
        assert vm.raw.set_region(old) == OK
        vm.delete_region(old.slot)
        assert_accepted(vm, old.but(hva=old.hva + PAGE_SIZE, size=PAGE_SIZE, flags=0))


@contract("GM-SLOT-022")
def test_dirty_log_is_toggled_in_place(vm: Vm, plain: MemoryRegion, cpu: GuestCpu, memory: Mapping) -> None:
    """LOG_DIRTY of a plain slot can be set and cleared in place: a flags-only update, the memory stays."""
    vm.set_region(plain)
    cpu.store(GPA, OLD)
    assert vm.raw.dirty_log(plain.slot, 1) == Errno.ENOENT
    for _ in range(2):
        assert vm.raw.set_region(plain.but(flags=MemFlag.LOG_DIRTY)) == OK
        vm.dirty_pages(plain.slot, 1)
        assert vm.dirty_pages(plain.slot, 1) == set()
        cpu.store(GPA, NEW)
        assert vm.dirty_pages(plain.slot, 1) == {0}
        assert memory.load() == NEW
        assert vm.raw.set_region(plain) == OK
        assert vm.raw.dirty_log(plain.slot, 1) == Errno.ENOENT
        assert cpu.load(GPA) == NEW


@contract("GM-SLOT-023")
def test_plain_slot_moves(vm: Vm, cpu: GuestCpu, memory: Mapping) -> None:
    """A plain slot can be moved: its memory appears at the new GPA and is gone from the old one."""
    region = MemoryRegion(slot=5, gpa=GPA, size=2 * PAGE_SIZE, hva=memory.address)
    memory.store(OLD)
    memory.store(NEW, PAGE_SIZE)
    vm.set_region(region)
    assert cpu.load(GPA) == OLD
    assert vm.raw.set_region(region.but(gpa=ELSEWHERE)) == OK
    assert_mmio(cpu, GPA)
    assert (cpu.load(ELSEWHERE), cpu.load(ELSEWHERE + PAGE_SIZE)) == (OLD, NEW)


def assert_mmio(cpu: GuestCpu, gpa: int) -> None:
    """The guest's read at `gpa` meets no memory."""
    result = cpu.try_load(gpa)
    assert result.answer == OK
    assert isinstance(result.exit, MmioExit)
    assert (result.exit.gpa, result.exit.length, result.exit.write) == (gpa, 8, False)
    cpu.finish(cpu.answer_mmio(0))


@contract("GM-SLOT-023")
@pytest.mark.parametrize("flags", [MemFlag(0), MemFlag.LOG_DIRTY], ids=["same-flags", "log-dirty"])
@pytest.mark.parametrize("pages", [1, -1], ids=["up", "down"])
def test_plain_slot_moves_onto_its_own_range(vm: Vm, cpu: GuestCpu, memory: Mapping, flags: MemFlag, pages: int) -> None:
    """A plain slot can be moved to where it overlaps its own old range, with a change of LOG_DIRTY in the same request."""
    memory.store(OLD)
    memory.store(NEW, PAGE_SIZE)
    region = MemoryRegion(slot=5, gpa=GPA, size=2 * PAGE_SIZE, hva=memory.address)
    vm.set_region(region)
    assert (cpu.load(GPA), cpu.load(GPA + PAGE_SIZE)) == (OLD, NEW)
    moved = region.but(gpa=GPA + pages * PAGE_SIZE, flags=int(flags))
    assert vm.raw.set_region(moved) == OK
    assert (cpu.load(moved.gpa), cpu.load(moved.gpa + PAGE_SIZE)) == (OLD, NEW)
    left = GPA if pages > 0 else GPA + PAGE_SIZE
    assert_mmio(cpu, left)
    if flags:
        cpu.store(moved.gpa + PAGE_SIZE, OLD)
        assert 1 in vm.dirty_pages(5, 2)


OVERLAPS = {
    "same": (0, 4),
    "front": (-1, 4),
    "back": (1, 4),
    "first": (0, 1),
    "last": (3, 1),
    "inside": (1, 2),
    "around": (-1, 6),
}


@contract("GM-SLOT-024")
@vm_types("default")
def test_gpa_overlap_is_refused(vm: Vm, memory: Mapping) -> None:
    """No two slots of an address space may share a guest page, neither by creation nor by a move."""
    held = MemoryRegion(slot=5, gpa=GPA, size=4 * PAGE_SIZE, hva=memory.address)
    vm.set_region(held)
    other = held.but(slot=6, gpa=ELSEWHERE)
    for name, (start, pages) in OVERLAPS.items():
        request = other.but(gpa=GPA + start * PAGE_SIZE, size=pages * PAGE_SIZE)
        assert vm.raw.set_region(request) == Errno.EEXIST, name
        assert vm.raw.set_region_v1(request) == Errno.EEXIST, name
        assert vm.raw.set_region(request.but(gpa=ELSEWHERE)) == OK, name
        assert vm.raw.set_region(request) == Errno.EEXIST, f"move, {name}"
        vm.delete_region(other.slot)
    for gpa in (GPA - PAGE_SIZE, GPA + held.size):
        assert_accepted(vm, other.but(gpa=gpa, size=PAGE_SIZE))
        vm.set_region(other.but(size=PAGE_SIZE))
        assert vm.raw.set_region(other.but(gpa=gpa, size=PAGE_SIZE)) == OK
        vm.delete_region(other.slot)


@contract("GM-SLOT-025")
def test_one_hva_backs_many_slots(vm: Vm, cpu: GuestCpu, plain: MemoryRegion, memory: Mapping) -> None:
    """Any number of slots may have the same HVA: one memory at several GPAs."""
    count = 8
    for index in range(count):
        assert vm.raw.set_region(plain.but(slot=index, gpa=GPA + index * SIZE)) == OK
    for index in range(count):
        cpu.store(GPA + index * SIZE, NEW + index)
        assert memory.load() == NEW + index
        assert cpu.first_not(NEW + index, GPA, count, step=SIZE) is None


@contract("GM-SLOT-026")
def test_failed_change_leaves_the_table_as_it_was(vm: Vm, cpu: GuestCpu, plain: MemoryRegion, memory: Mapping) -> None:
    """A create or a move that fails changes nothing: the slots there still work, and the id is still free."""
    neighbour = plain.but(slot=6, gpa=ELSEWHERE, hva=memory.address + PAGE_SIZE)
    vm.set_region(plain)
    vm.set_region(neighbour)
    memory.store(OLD)
    memory.store(NEW, PAGE_SIZE)
    for _ in range(20):
        assert vm.raw.set_region(plain.but(gpa=ELSEWHERE)) == Errno.EEXIST
        assert vm.raw.set_region(plain.but(gpa=1 << 60)) == Errno.EINVAL
        assert vm.raw.set_region(plain.but(slot=7)) == Errno.EEXIST
        assert vm.raw.set_region(plain.but(slot=7, gpa=1 << 60)) == Errno.EINVAL
        assert (cpu.load(GPA), cpu.load(ELSEWHERE)) == (OLD, NEW)
    assert vm.raw.delete_region(7) == Errno.EINVAL
    assert vm.raw.set_region(plain.but(slot=7, gpa=ELSEWHERE + SIZE)) == OK
    assert cpu.load(ELSEWHERE + SIZE) == OLD
    assert vm.raw.delete_region(plain.slot) == OK


class Watcher:
    """A vCPU that runs its program in a thread, with `OLD` as the answer to each read that meets no memory."""

    def __init__(self, cpu: GuestCpu) -> None:
        self.cpu = cpu
        self.mmio_reads = 0
        self.result: RunResult | None = None
        self._stop = threading.Event()
        _ = cpu.vcpu.kvm_run  # mapped here, so that a kick never races with the mapping
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        result = self.cpu.run()
        while isinstance(result.exit, MmioExit) and not self._stop.is_set():
            self.mmio_reads += 1
            result = self.cpu.answer_mmio(OLD)
        self.result = result

    def wait_for_mmio(self) -> None:
        """Wait until the vCPU has met no memory three times."""
        wait_until(lambda: self.mmio_reads > 2, "the vCPU notices that its slot is gone")

    @property
    def done(self) -> bool:
        """Whether the program ended by itself (or something else than a missing page ended it)."""
        return self.result is not None

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

        def ended() -> bool:
            if self._thread.is_alive():
                self.cpu.vcpu.kick()
            return not self._thread.is_alive()

        wait_until(ended, "the vCPU is out of the kernel")
        # A kick that came too late would end the next run.
        self.cpu.vcpu.kvm_run.immediate_exit = 0
        self.cpu.vcpu.runner.kicked = 0


@contextmanager
def zap_all_quirk(vm: Vm, enabled: bool) -> Iterator[None]:
    """Run with or without KVM_X86_QUIRK_SLOT_ZAP_ALL (6.12): whether a deleted slot takes every mapping with it."""
    if not enabled:
        if not vm.check_extension(Cap.DISABLE_QUIRKS2) & lib.KVM_X86_QUIRK_SLOT_ZAP_ALL:
            pytest.skip("this KVM cannot switch the zap-all quirk off (KVM_CAP_DISABLE_QUIRKS2 lacks its bit, 6.12 has it)")
        vm.enable_cap(Cap.DISABLE_QUIRKS2, lib.KVM_X86_QUIRK_SLOT_ZAP_ALL)
    yield


QUIRK = pytest.mark.parametrize(
    "quirk",
    [
        pytest.param(True, id="zap-all", marks=contract("GM-SLOT-027")),
        pytest.param(False, id="zap-slot", marks=contract("GM-SLOT-028")),
    ],
)


@QUIRK
def test_running_vcpu_sees_a_slot_go_and_come(
    vm: Vm, cpu: GuestCpu, plain: MemoryRegion, memory: Mapping, quirk: bool, request: pytest.FixtureRequest
) -> None:
    """A vCPU that reads a slot while it is deleted and made again sees old memory, then MMIO, then the new memory."""
    memory.store(OLD)
    memory.store(NEW, PAGE_SIZE)
    stale = False
    with zap_all_quirk(vm, quirk):
        for _ in range(max(2, round(5 * request.config.getoption("--effort")))):
            vm.set_region(plain)
            cpu.start("await", rdi=GPA, rsi=OLD)
            with Watcher(cpu) as watcher:
                vm.delete_region(plain.slot)
                watcher.wait_for_mmio()
                vm.set_region(plain.but(hva=plain.hva + PAGE_SIZE))
                stale = stale or not finishes(watcher)
            if not stale:
                assert watcher.result is not None
                assert is_report(watcher.result)
                assert cpu.registers().rax == NEW
            vm.delete_region(plain.slot)
            if stale:
                break
    known_bug("B19").shows_if(stale)


def finishes(watcher: Watcher) -> bool:
    """Whether the vCPU's program ends soon."""
    try:
        wait_until(lambda: watcher.done, "the vCPU sees the new slot", 2.0)
    except AssertionError:
        return False
    return True


@QUIRK
@pytest.mark.parametrize("change", ["delete", "move"])
@vm_types("default")
def test_running_vcpu_never_sees_garbage(
    vm: Vm,
    cpu: GuestCpu,
    plain: MemoryRegion,
    memory: Mapping,
    quirk: bool,
    change: str,
    request: pytest.FixtureRequest,
) -> None:
    """Whatever happens to a slot under a running vCPU, what it reads there is old memory, MMIO or new memory."""
    memory.store(OLD)
    memory.store(NEW, PAGE_SIZE)
    with zap_all_quirk(vm, quirk):
        cpu.start("watch", rdi=GPA, rsi=OLD, rdx=NEW)
        with Watcher(cpu) as watcher:
            # Without a slot each read is an exit, so this proves that the vCPU runs before the slot starts to change: on a
            # busy machine all rounds can be over before its thread is scheduled once.
            watcher.wait_for_mmio()
            vm.set_region(plain)
            for index in range(max(2, round(12 * request.config.getoption("--effort")))):
                if change == "move":
                    vm.set_region(plain.but(gpa=GPA if index % 2 else ELSEWHERE))
                else:
                    vm.delete_region(plain.slot)
                    vm.set_region(plain.but(hva=plain.hva + (0 if index % 2 else PAGE_SIZE)))
                assert not watcher.done, f"round {index}: {watcher.result}, rax={cpu.registers().rax:#x}"
        assert watcher.result is not None
        assert watcher.result.kicked or isinstance(watcher.result.exit, MmioExit)
        assert cpu.registers().rcx > 0, "the vCPU never read a thing"


PAGES = 16


def faults_after_deleting_a_neighbour(vm: Vm, cpu: GuestCpu, memory: Mapping) -> int:
    """How many of 16 mapped pages of a slot the guest must fault in again once an unrelated slot is deleted."""
    vm.set_region(MemoryRegion(slot=5, gpa=GPA, size=PAGES * PAGE_SIZE, hva=memory.address))
    vm.set_region(MemoryRegion(slot=6, gpa=ELSEWHERE, size=PAGE_SIZE, hva=memory.address))
    cpu.store(ELSEWHERE, OLD)
    cpu.stamp(GPA, NEW, PAGES)
    assert cpu.first_unstamped(GPA, NEW, PAGES) is None
    before = read_stat(cpu.vcpu, "pf_fixed")
    assert cpu.first_unstamped(GPA, NEW, PAGES) is None
    assert read_stat(cpu.vcpu, "pf_fixed") == before, "reading mapped pages faults"
    vm.delete_region(6)
    assert cpu.first_unstamped(GPA, NEW, PAGES) is None
    return read_stat(cpu.vcpu, "pf_fixed") - before


@contract("GM-SLOT-028", "GM-SLOT-029")
@pytest.mark.parametrize("quirk", [True, False], ids=["zap-all", "zap-slot"])
def test_zap_all_quirk_is_for_default_vms(vm: Vm, cpu: GuestCpu, quirk: bool) -> None:
    """Deleting a slot unmaps all others on a default VM unless the zap-all quirk is off, and never on another type."""
    with Mapping.anonymous(PAGES * PAGE_SIZE) as memory, zap_all_quirk(vm, quirk):
        assert memory.advise(15) in (OK, Errno.EINVAL)  # MADV_NOHUGEPAGE: each page a mapping of its own
        faults = faults_after_deleting_a_neighbour(vm, cpu, memory)
    # With shadow paging one fault may bring in neighbours, too.
    assert (faults > 0) == (quirk and vm.type is VmType.DEFAULT), faults


@contract("GM-SLOT-030")
@vm_types("default")
@requires("apic-access-slot")
def test_slot_of_the_apic_takes_its_guest_page(vm: Vm, plain: MemoryRegion) -> None:
    """The page that KVM itself puts at 0xfee00000 for a virtual APIC takes part in overlap checks."""
    apic = plain.but(gpa=0xFEE0_0000)
    assert vm.raw.create_irqchip() == OK
    assert_accepted(vm, apic)
    with vm.create_vcpu():
        assert vm.raw.set_region(apic) == Errno.EEXIST
        assert vm.raw.set_region(apic.but(gpa=apic.gpa - PAGE_SIZE, size=2 * PAGE_SIZE)) == Errno.EEXIST
        assert_accepted(vm, apic.but(gpa=apic.gpa - PAGE_SIZE))
        assert_accepted(vm, apic.but(gpa=apic.gpa + PAGE_SIZE))


@contract("GM-SLOT-030")
@vm_types("default")
@requires("tss-slot")
def test_slot_of_the_tss_takes_its_guest_pages(vm: Vm, plain: MemoryRegion) -> None:
    """The three pages that KVM_SET_TSS_ADDR puts into the guest take part in overlap checks."""
    tss = plain.but(gpa=0xFFFB_D000)
    assert_accepted(vm, tss)
    assert vm.raw.ioctl(lib.KVM_SET_TSS_ADDR, tss.gpa) == OK
    for page in range(3):
        assert vm.raw.set_region(tss.but(gpa=tss.gpa + page * PAGE_SIZE)) == Errno.EEXIST
    assert_accepted(vm, tss.but(gpa=tss.gpa - PAGE_SIZE))
    assert_accepted(vm, tss.but(gpa=tss.gpa + 3 * PAGE_SIZE))


@contract("GM-SLOT-031")
@pytest.mark.parametrize(
    "protection",
    [pytest.param(kind, id=kind.label, marks=requires(kind.label)) for kind in (VmType.SEV_ES, VmType.SNP, VmType.TDX)],
)
def test_readonly_is_refused_where_state_is_protected(kvm: Kvm, plain: MemoryRegion, protection: VmType) -> None:
    """A VM whose registers KVM cannot see cannot have read-only slots, since their writes need emulation."""
    with kvm.create_vm() as open_vm, kvm.create_vm(protection) as protected:
        assert (open_vm.check_extension(Cap.READONLY_MEM), protected.check_extension(Cap.READONLY_MEM)) == (1, 0)
        assert_accepted(open_vm, plain.but(flags=MemFlag.READONLY))
        assert_accepted(protected, plain)
        assert_refused(protected, plain.but(flags=MemFlag.READONLY))
        assert protected.raw.set_region_v1(plain.but(flags=MemFlag.READONLY)) == Errno.EINVAL


@contract("GM-SLOT-032")
def test_write_to_a_readonly_slot_is_mmio(vm: Vm, cpu: GuestCpu, plain: MemoryRegion, memory: Mapping) -> None:
    """The guest reads a READONLY slot as memory; its writes leave as MMIO and change nothing."""
    memory.store(OLD)
    vm.set_region(plain.but(flags=MemFlag.READONLY))
    assert cpu.load(GPA) == OLD
    result = cpu.try_store(GPA + 16, NEW, width=4)
    assert (result.answer, result.exit) == (OK, MmioExit(GPA + 16, 4, True, NEW.to_bytes(4, "little")))
    cpu.finish(cpu.run())
    assert memory.load(16, width=4) == 0
    assert cpu.load(GPA) == OLD
    memory.store(NEW)
    assert cpu.load(GPA) == NEW
    vm.delete_region(plain.slot)
    vm.set_region(plain)
    cpu.store(GPA + 16, NEW, width=4)
    assert memory.load(16, width=4) == NEW


@contract("GM-SLOT-033")
def test_only_the_owner_changes_slots(vm: Vm, plain: MemoryRegion) -> None:
    """A process with another address space than the VM's creator cannot make, change or delete slots."""
    other = plain.but(slot=6, gpa=ELSEWHERE)
    vm.set_region(plain)
    assert in_child(lambda: (vm.raw.set_region(other), vm.raw.set_region_v1(other), vm.raw.delete_region(plain.slot))) == (
        Errno.EIO,
        Errno.EIO,
        Errno.EIO,
    )
    assert vm.raw.set_region(other) == OK
    assert vm.raw.delete_region(plain.slot) == OK
