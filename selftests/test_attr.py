"""GM-ATTR: memory attributes, which say per guest page whether it is private or shared."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Attribute, Cap, GiB, GmemFlag, MiB
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine, max_gpa_bits
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import MmioExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import in_child
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires, vm_types, wait_until, would_show
from kvmgmem.testing.dead_slots import assert_dead, is_dead, memory_fault
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.memory_cgroup import MemoryCgroup
from kvmgmem.testing.stats import Stats, read_stats
from kvmgmem.vm import Vm

PRIVATE = Attribute.PRIVATE
TOP = (1 << 64) - PAGE_SIZE  # the last page of the address space
NOWHERE = 0x9000_0000  # no slot
SHARED_STAMP = 0x5EED_0000
PRIVATE_STAMP = 0xBEEF_0000
ENTRIES_PER_NODE = 64  # of an XArray, XA_CHUNK_SIZE in include/linux/xarray.h (without CONFIG_BASE_SMALL)
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15

private_memory = vm_types("sw-protected")


@contextmanager
def two_copies(vm: Vm, gmem: GuestMemfd, *, size: int = SIZE, stamped: int = 0) -> Iterator[Mapping]:
    """A slot whose shared pages are anonymous memory, by small pages, and whose private ones are `gmem`; yields the former.

    The first `stamped` shared pages hold SHARED_STAMP, SHARED_STAMP+1, ...
    """
    with Mapping.anonymous(size) as shared:
        assert shared.advise(MADV_NOHUGEPAGE) == OK
        for page in range(stamped):
            shared.store(SHARED_STAMP + page, page * PAGE_SIZE)
        vm.bind(gmem, gpa=GPA, size=size, hva=shared.address)
        yield shared


@contextmanager
def huge_page_slot(vm: Vm, size: int, gmem: GuestMemfd | None = None, *, slot: int = 0) -> Iterator[Mapping]:
    """A slot at GPA whose shared memory is filled transparent huge pages; its whole mapping, aligned."""
    with Mapping.anonymous(size + SIZE) as room:
        aligned = -(-room.address // SIZE) * SIZE
        start = aligned - room.address
        assert room.advise(MADV_HUGEPAGE) == OK
        for page in range(size // PAGE_SIZE):
            room.store(SHARED_STAMP + page, start + page * PAGE_SIZE)
        vm.set_region(MemoryRegion(slot, GPA, size, aligned, gmem))
        yield room


@contract("GM-ATTR-001")
@requires("x86", "no-attributes")
def test_without_the_option_there_is_no_such_ioctl(vm: Vm) -> None:
    """A kernel without CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES answers ENOTTY whatever is asked, as to any unknown ioctl."""
    assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == 0
    for gpa, size, attributes, flags in ((GPA, SIZE, 0, 0), (GPA, SIZE, PRIVATE, 0), (1, 0, 1 << 40, 1)):
        assert vm.raw.set_attributes(gpa, size, attributes, flags) == Errno.ENOTTY
    assert vm.raw.ioctl(lib.KVM_SET_MEMORY_ATTRIBUTES, 8) == Errno.ENOTTY
    assert vm.raw.check_extension(Cap.GUEST_MEMFD) == 1  # the VM does take ioctls


@contract("GM-ATTR-002")
@vm_types("default")
@requires("attributes")
def test_default_vms_have_no_attributes_to_set(vm: Vm) -> None:
    """A VM without private memory takes the ioctl with attributes 0 on any valid range, and refuses each attribute."""
    assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == 0
    # On such a VM no page ever has an attribute, so that the largest range costs nothing.
    for gpa, size in ((GPA, SIZE), (0, PAGE_SIZE), (TOP - PAGE_SIZE, PAGE_SIZE), (0, TOP)):
        assert vm.raw.set_attributes(gpa, size, 0) == OK
    for bit in range(64):
        assert vm.raw.set_attributes(GPA, SIZE, 1 << bit) == Errno.EINVAL
    assert vm.raw.set_attributes(GPA, SIZE, PRIVATE) == Errno.EINVAL
    assert vm.raw.set_attributes(GPA, 0, 0) == Errno.EINVAL
    assert vm.raw.set_attributes(GPA + 1, SIZE, 0) == Errno.EINVAL


@contract("GM-ATTR-003")
@requires("attributes")
def test_flags_are_refused(vm: Vm) -> None:
    """Every flag bit is EINVAL, on a range that would be accepted without it."""
    assert vm.raw.set_attributes(GPA, SIZE, 0) == OK
    for bit in range(64):
        assert vm.raw.set_attributes(GPA, SIZE, 0, flags=1 << bit) == Errno.EINVAL


@contract("GM-ATTR-004")
@private_memory
def test_private_is_the_only_attribute(vm: Vm) -> None:
    """Of the 64 attribute bits only PRIVATE (bit 3) is accepted; each other bit is EINVAL, alone and together with it."""
    answers = [vm.raw.set_attributes(GPA, PAGE_SIZE, 1 << bit) for bit in range(64)]
    assert answers == [OK if 1 << bit == PRIVATE else Errno.EINVAL for bit in range(64)]
    assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == PRIVATE
    for bit in range(64):
        if 1 << bit != PRIVATE:
            assert vm.raw.set_attributes(GPA, PAGE_SIZE, PRIVATE | 1 << bit) == Errno.EINVAL
    assert vm.raw.set_attributes(GPA, PAGE_SIZE, 0) == OK


@contract("GM-ATTR-005")
@private_memory
def test_empty_and_wrapping_ranges_are_refused(vm: Vm) -> None:
    """A size of 0, and a range whose end does not fit into 64 bits, be it exactly 2^64, are EINVAL."""
    for attributes in (PRIVATE, 0):
        assert vm.raw.set_attributes(TOP - PAGE_SIZE, PAGE_SIZE, attributes) == OK
        assert vm.raw.set_attributes(GPA, PAGE_SIZE, attributes) == OK
        for gpa, size in (
            (GPA, 0),
            (0, 0),
            (TOP, PAGE_SIZE),
            (TOP - PAGE_SIZE, 2 * PAGE_SIZE),
            (PAGE_SIZE, TOP),
            (TOP, TOP),
            (TOP, 2 * PAGE_SIZE),
        ):
            assert vm.raw.set_attributes(gpa, size, attributes) == Errno.EINVAL


@contract("GM-ATTR-006")
@private_memory
def test_unaligned_ranges_are_refused(vm: Vm) -> None:
    """Address and size are multiples of the page size; anything else is EINVAL."""
    for attributes in (PRIVATE, 0):
        for odd in (1, 8, 511, 2048, PAGE_SIZE - 1):
            assert vm.raw.set_attributes(GPA + odd, PAGE_SIZE, attributes) == Errno.EINVAL
            assert vm.raw.set_attributes(GPA, PAGE_SIZE + odd, attributes) == Errno.EINVAL
            assert vm.raw.set_attributes(GPA, odd, attributes) == Errno.EINVAL
            assert vm.raw.set_attributes(GPA + odd, PAGE_SIZE - odd, attributes) == Errno.EINVAL
        assert vm.raw.set_attributes(GPA, PAGE_SIZE, attributes) == OK


@contract("GM-ATTR-007")
@private_memory
@gmem_kinds("g0")
@would_show("B5")
def test_ranges_need_no_slots(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, host: Host) -> None:
    """A range may lie where no slot can ever be, and may cover slots and gaps; all of it gets the attributes."""
    beyond = 1 << max_gpa_bits(host.paging)
    for gpa in (GPA + GiB, beyond - PAGE_SIZE, beyond, 1 << 52, 1 << 63, TOP - PAGE_SIZE):
        for attributes in (PRIVATE, 0):
            assert vm.raw.set_attributes(gpa, PAGE_SIZE, attributes) == OK
    with Mapping.anonymous(4 * PAGE_SIZE) as plain:
        # Neither slot starts or ends on 2 MiB, and the range reaches beyond both: what B5 got wrong (KASAN tells).
        first, second = GPA + 3 * PAGE_SIZE, GPA + 20 * PAGE_SIZE
        vm.set_region(MemoryRegion(slot=1, gpa=first, size=4 * PAGE_SIZE, hva=plain.address))
        vm.bind(gmem, slot=2, gpa=second, size=4 * PAGE_SIZE)
        vm.set_private(GPA, 4 * MiB)
        assert_dead(cpu, first, private=True)
        assert_dead(cpu, first + 3 * PAGE_SIZE, private=True)
        assert_dead(cpu, GPA, private=True)  # the gaps: before, between, behind
        assert_dead(cpu, GPA + 10 * PAGE_SIZE, private=True)
        assert_dead(cpu, GPA + 4 * MiB - PAGE_SIZE, private=True)
        cpu.stamp(second, PRIVATE_STAMP, 4)
        assert gmem.allocated_pages() == 4
        assert isinstance(cpu.try_load(GPA + 4 * MiB).exit, MmioExit)
        cpu.answer_mmio(0)
        vm.set_shared(GPA, 4 * MiB)
        assert cpu.load(first) == 0


@contract("GM-ATTR-008")
@private_memory
@gmem_kinds("g0")
def test_attributes_belong_to_the_address(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """An attribute can be set before there is a slot, and stays when the slot is deleted and made again, of any sort."""
    page = GPA + PAGE_SIZE
    vm.set_private(page, PAGE_SIZE)
    assert_dead(cpu, page, private=True)
    with Mapping.anonymous(SIZE) as plain:
        region = MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=plain.address)
        for _ in range(2):
            vm.set_region(region)
            cpu.store(GPA, SHARED_STAMP)
            assert plain.load(0) == SHARED_STAMP
            assert_dead(cpu, page, private=True)
            vm.delete_region(1)
        for _ in range(2):
            vm.set_region(region.but(gmem=gmem))
            assert cpu.load(GPA) == SHARED_STAMP
            cpu.store(page, PRIVATE_STAMP)
            assert (plain.load(PAGE_SIZE), gmem.allocated_pages(), gmem.allocated_pages(PAGE_SIZE, PAGE_SIZE)) == (0, 1, 1)
            assert cpu.load(page) == PRIVATE_STAMP
            vm.delete_region(1)
        vm.set_region(region.but(slot=2, gpa=page, size=PAGE_SIZE))  # another slot, and the gmem's other page
        assert_dead(cpu, page, private=True)
        vm.set_shared(page, PAGE_SIZE)
        assert cpu.load(page) == SHARED_STAMP


@contract("GM-ATTR-009")
@private_memory
@gmem_kinds("g0")
def test_setting_what_is_set_already_does_nothing(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Setting the attributes that a range has already flushes no translation and makes no page fault again."""
    with two_copies(vm, gmem, stamped=8), Stats(vm) as of_vm:
        vm.set_private(GPA, 4 * PAGE_SIZE)
        cpu.stamp(GPA, PRIVATE_STAMP, 4)
        assert cpu.first_unstamped(GPA + 4 * PAGE_SIZE, SHARED_STAMP + 4, 4) is None
        before = (of_vm["remote_tlb_flush_requests"], faults(cpu))
        for _ in range(3):
            vm.set_private(GPA, 4 * PAGE_SIZE)
            vm.set_private(GPA + PAGE_SIZE, PAGE_SIZE)
            vm.set_shared(GPA + 4 * PAGE_SIZE, SIZE - 4 * PAGE_SIZE)
            assert cpu.first_unstamped(GPA, PRIVATE_STAMP, 4) is None
            assert cpu.first_unstamped(GPA + 4 * PAGE_SIZE, SHARED_STAMP + 4, 4) is None
        assert (of_vm["remote_tlb_flush_requests"], faults(cpu)) == before
        # The control: one page more, and it is a conversion.
        vm.set_private(GPA, 5 * PAGE_SIZE)
        assert of_vm["remote_tlb_flush_requests"] > before[0]


def faults(cpu: GuestCpu) -> int:
    """How many page faults of this vCPU KVM has handled."""
    return read_stats(cpu.vcpu)["pf_taken"]


@contract("GM-ATTR-010")
@private_memory
@gmem_kinds("g0")
def test_setting_replaces_all_attributes(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Setting attributes replaces those of every page in the range, whatever each had, and writes nothing back."""
    request = ffi.new("struct kvm_memory_attributes *", {"address": GPA, "size": 6 * PAGE_SIZE, "attributes": PRIVATE})
    sent = bytes(ffi.buffer(request))
    with two_copies(vm, gmem, stamped=8):
        assert vm.raw.ioctl_struct(lib.KVM_SET_MEMORY_ATTRIBUTES, request) == OK
        assert bytes(ffi.buffer(request)) == sent
        assert private_pages(cpu, 8) == [0, 1, 2, 3, 4, 5]
        vm.set_shared(GPA + PAGE_SIZE, PAGE_SIZE)
        vm.set_shared(GPA + 3 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert private_pages(cpu, 8) == [0, 2, 5]
        request.attributes = 0
        assert vm.raw.ioctl_struct(lib.KVM_SET_MEMORY_ATTRIBUTES, request) == OK
        assert private_pages(cpu, 8) == []
        assert vm.raw.ioctl(lib.KVM_SET_MEMORY_ATTRIBUTES, 8) == Errno.EFAULT


def private_pages(cpu: GuestCpu, count: int) -> list[int]:
    """Which of the first pages the guest finds private: no shared stamp stands there."""
    seen = [cpu.load(GPA + page * PAGE_SIZE) for page in range(count)]
    assert all(value in (0, SHARED_STAMP + page) for page, value in enumerate(seen))
    return [page for page, value in enumerate(seen) if value == 0]


@contract("GM-ATTR-011")
@private_memory
@gmem_kinds("g0")
def test_a_conversion_unmaps_its_own_pages_only(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A conversion takes the converted pages from the guest's mappings and leaves their private and shared neighbours."""
    with two_copies(vm, gmem, stamped=16):
        vm.set_private(GPA + 4 * PAGE_SIZE, 4 * PAGE_SIZE)
        cpu.stamp(GPA + 4 * PAGE_SIZE, PRIVATE_STAMP + 4, 4)
        values = [SHARED_STAMP + page for page in range(16)]
        values[4:8] = [PRIVATE_STAMP + page for page in range(4, 8)]
        assert [cpu.load(GPA + page * PAGE_SIZE) for page in range(16)] == values
        for page, convert in ((5, vm.set_shared), (10, vm.set_private)):
            before = faults(cpu)
            convert(GPA + page * PAGE_SIZE, PAGE_SIZE)
            neighbours = [other for other in range(16) if other != page]
            assert [cpu.load(GPA + other * PAGE_SIZE) for other in neighbours] == [values[other] for other in neighbours]
            assert faults(cpu) == before
            values[page] = SHARED_STAMP + page if page == 5 else 0
            assert cpu.load(GPA + page * PAGE_SIZE) == values[page]
            assert faults(cpu) == before + 1


@contract("GM-ATTR-012")
@private_memory
@gmem_kinds("g0")
def test_a_conversion_frees_and_moves_nothing(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A conversion keeps both copies of a page as they are, allocated and unchanged: the guest only looks elsewhere."""
    with two_copies(vm, gmem, size=8 * PAGE_SIZE, stamped=4) as shared:
        vm.set_private(GPA, 6 * PAGE_SIZE)
        assert (gmem.allocated_pages(), sum(shared.resident_pages())) == (0, 4)
        cpu.stamp(GPA, PRIVATE_STAMP, 3)
        for _ in range(3):
            vm.set_shared(GPA, 8 * PAGE_SIZE)
            assert (gmem.allocated_pages(), sum(shared.resident_pages())) == (3, 4)
            assert cpu.first_unstamped(GPA, SHARED_STAMP, 4) is None
            vm.set_private(GPA, 3 * PAGE_SIZE)
            assert (gmem.allocated_pages(), sum(shared.resident_pages())) == (3, 4)
            assert cpu.first_unstamped(GPA, PRIVATE_STAMP, 3) is None


@contract("GM-ATTR-013")
@private_memory
@requires("huge-pages")
@gmem_kinds("g0")
def test_a_mixed_range_is_mapped_by_small_pages(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A 2 MiB range of mixed attributes is mapped by small pages; uniform again, it may be mapped by a large one again."""
    first, second, odd = GPA, GPA + SIZE, GPA + 7 * PAGE_SIZE
    with vm.create_guest_memfd(2 * SIZE) as both, huge_page_slot(vm, 2 * SIZE, both):
        assert cpu.load(first) == SHARED_STAMP
        assert cpu.load(second) == SHARED_STAMP + 512
        assert read_stats(vm)["pages_2m"] == 2
        for _ in range(2):
            vm.set_private(odd, PAGE_SIZE)
            assert read_stats(vm)["pages_2m"] == 1
            assert cpu.first_unstamped(first, SHARED_STAMP, 7) is None
            cpu.store(odd, PRIVATE_STAMP)
            assert cpu.first_unstamped(odd + PAGE_SIZE, SHARED_STAMP + 8, 504) is None
            assert (read_stats(vm)["pages_2m"], both.allocated_pages()) == (1, 1)
            assert cpu.load(second) == SHARED_STAMP + 512
            vm.set_shared(odd, PAGE_SIZE)
            assert cpu.load(odd) == SHARED_STAMP + 7
            assert read_stats(vm)["pages_2m"] == 2
        # A whole range at once is never mixed.
        vm.set_private(first, SIZE)
        assert cpu.load(odd) == PRIVATE_STAMP
        vm.set_shared(first, SIZE)
        assert cpu.load(first) == SHARED_STAMP
        assert read_stats(vm)["pages_2m"] == 2
    gmem.close()


@contract("GM-ATTR-014")
@private_memory
@requires("huge-pages")
def test_a_new_slot_over_mixed_attributes_knows_them(vm: Vm, cpu: GuestCpu) -> None:
    """A slot made over a range of mixed attributes maps it by small pages at once, and a uniform one by a large page."""
    vm.set_private(GPA + 7 * PAGE_SIZE, PAGE_SIZE)
    with huge_page_slot(vm, 2 * SIZE):
        assert cpu.load(GPA) == SHARED_STAMP
        assert read_stats(vm)["pages_2m"] == 0
        assert cpu.load(GPA + SIZE) == SHARED_STAMP + 512
        assert read_stats(vm)["pages_2m"] == 1
        assert_dead(cpu, GPA + 7 * PAGE_SIZE, private=True)
        vm.set_shared(GPA + 7 * PAGE_SIZE, PAGE_SIZE)
        assert cpu.load(GPA + 7 * PAGE_SIZE) == SHARED_STAMP + 7
        assert read_stats(vm)["pages_2m"] == 2


@contract("GM-ATTR-015")
@private_memory
def test_private_over_a_plain_slot_faults_out(vm: Vm, cpu: GuestCpu) -> None:
    """PRIVATE is accepted over a slot without a gmem; the guest then gets memory faults there, until it is shared again."""
    with Mapping.anonymous(SIZE) as plain:
        vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=plain.address))
        cpu.stamp(GPA, SHARED_STAMP, 4)
        for _ in range(2):
            assert vm.raw.set_attributes(GPA + PAGE_SIZE, 2 * PAGE_SIZE, PRIVATE) == OK
            for page in (1, 2):
                assert_dead(cpu, GPA + page * PAGE_SIZE, private=True)
                assert is_dead(cpu.try_store(GPA + page * PAGE_SIZE, 0), GPA + page * PAGE_SIZE, private=True)
            assert [cpu.load(GPA), cpu.load(GPA + 3 * PAGE_SIZE)] == [SHARED_STAMP, SHARED_STAMP + 3]
            vm.set_shared(GPA + PAGE_SIZE, 2 * PAGE_SIZE)
            assert cpu.first_unstamped(GPA, SHARED_STAMP, 4) is None
        assert plain.load(PAGE_SIZE) == SHARED_STAMP + 1


@contract("GM-ATTR-016")
@private_memory
@requires("memcg", "root")
def test_tracking_attributes_is_charged_to_the_caller(vm: Vm) -> None:
    """The kernel memory that remembers attributes, some nine bytes a page, is charged to the caller's memory cgroup."""
    pages = 1 << 16
    with MemoryCgroup() as group:

        def in_group() -> tuple[int, int]:
            group.join()
            with Kvm.open() as kvm, kvm.create_vm(vm.type) as own:
                before = group.kernel_bytes()
                own.set_private(GPA, pages * PAGE_SIZE)
                private = group.kernel_bytes()
                own.set_shared(GPA, pages * PAGE_SIZE)
                # The nodes go after an RCU grace period.
                wait_until(lambda: group.kernel_bytes() - before < (private - before) // 4, "the memory is given back")
                return before, private

        before, private = in_child(in_group)
    least = pages // ENTRIES_PER_NODE * 512  # a node holds 64 pointers, and some fields
    grown = private - before
    if known_bug("B11").shows_if(grown < least // 4):
        return
    assert least <= grown < 2 * least


class Conversion:
    """KVM_SET_MEMORY_ATTRIBUTES in a thread of its own, which then waits, so that its processor time can be read."""

    def __init__(self, vm: Vm, gpa: int, size: int, attributes: int) -> None:
        self.answers: list[Answer] = []
        self.may_go = threading.Event()
        self._arguments = (vm, gpa, size, attributes)
        self.thread = threading.Thread(target=self._convert)
        self.thread.start()
        assert self.thread.ident is not None
        self._clock = time.pthread_getcpuclockid(self.thread.ident)

    def _convert(self) -> None:
        vm, gpa, size, attributes = self._arguments
        self.answers.append(vm.raw.set_attributes(gpa, size, attributes))
        self.may_go.wait()

    def cpu_seconds(self) -> float:
        """What the thread has computed until now."""
        return time.clock_gettime(self._clock)

    def end(self) -> float:
        """Wait for the answer; all the thread has computed."""
        wait_until(lambda: bool(self.answers), "the conversion ends", 20)
        seconds = self.cpu_seconds()
        self.may_go.set()
        self.thread.join()
        return seconds


@contract("GM-ATTR-017")
@private_memory
def test_a_long_conversion_keeps_other_slot_changes_waiting(vm: Vm, request: pytest.FixtureRequest) -> None:
    """A conversion goes page by page under the lock of the slots: a slot is made only when it is over.

    What does not need that lock, as creating a gmem, does not wait. The measure is the processor time of the thread that
    converts, so that a busy machine changes nothing.
    """
    size = (int(request.config.getoption("--effort")) << 17 or 1 << 16) * PAGE_SIZE
    least = _cpu_seconds(vm, size, PRIVATE) / 8
    assert _cpu_seconds(vm, size, 0) > 0
    with Mapping.anonymous(PAGE_SIZE) as memory:
        region = MemoryRegion(slot=1, gpa=NOWHERE, size=PAGE_SIZE, hva=memory.address)
        for attempt in range(10):
            conversion = Conversion(vm, GPA, size, PRIVATE if attempt % 2 == 0 else 0)
            wait_until(lambda running=conversion: running.cpu_seconds() > least, "the conversion goes on")  # type: ignore[misc]
            gmem = vm.create_guest_memfd(PAGE_SIZE)
            early = conversion.cpu_seconds()
            assert vm.raw.set_region(region) == OK
            late = conversion.cpu_seconds()
            whole = conversion.end()
            gmem.close()  # which takes that lock too (kvm_gmem_release)
            vm.delete_region(1)
            if early < whole / 2:  # else the conversion was nearly over before the slot was asked for
                break
        assert early < whole / 2
        assert late > whole * 0.9
        assert conversion.answers == [OK]


def _cpu_seconds(vm: Vm, size: int, attributes: int) -> float:
    """The processor time that one call took."""
    started = time.thread_time()
    assert vm.raw.set_attributes(GPA, size, attributes) == OK
    return time.thread_time() - started


@contract("GM-ATTR-017")
@private_memory
def test_clearing_is_cheap_only_where_nothing_is_set(vm: Vm) -> None:
    """Clearing attributes that no page of a range has costs nothing, however large it is; one page that has them costs all.

    The bound is on the kernel's way of asking (kvm_range_has_memory_attributes), not on a speed.
    """
    size = 1 << 16 << 12
    empty = min(_cpu_seconds(vm, 1 << 50, 0) for _ in range(3))
    vm.set_private(GPA + size - PAGE_SIZE, PAGE_SIZE)
    one_set = _cpu_seconds(vm, size, 0)
    again = min(_cpu_seconds(vm, size, 0) for _ in range(3))
    assert one_set > 10 * empty
    assert one_set > 10 * again


@contract("GM-ATTR-018", "C24")
@private_memory
@requires("huge-pages")
def test_a_conversion_beside_a_running_guest_leaves_no_stale_page(
    vm: Vm, machine: GuestMachine, cpu: GuestCpu, request: pytest.FixtureRequest
) -> None:
    """From its return on a conversion shows the other copy, and the neighbours keep theirs, while a vCPU runs beside it.

    That vCPU makes KVM map the neighbours over and over: by a huge page as soon as none of the 2 MiB is private.
    """
    page = GPA + 7 * PAGE_SIZE
    rounds = int(15 * request.config.getoption("--effort"))
    with vm.create_guest_memfd(SIZE) as gmem, huge_page_slot(vm, SIZE, gmem):
        vm.set_private(page, PAGE_SIZE)
        cpu.store(page, PRIVATE_STAMP)
        neighbour = machine.cpu(1)
        neighbour.start("watch", rdi=page + PAGE_SIZE, rsi=SHARED_STAMP + 8, rdx=SHARED_STAMP + 8)
        with neighbour.running() as beside:
            for _ in range(rounds):
                vm.set_shared(page, PAGE_SIZE)
                known_bug("B4").expect(cpu.load(page), SHARED_STAMP + 7, shows=PRIVATE_STAMP)
                vm.set_private(page, PAGE_SIZE)
                known_bug("B4").expect(cpu.load(page), PRIVATE_STAMP, shows=SHARED_STAMP + 7)
                assert [cpu.load(page - PAGE_SIZE), cpu.load(page + PAGE_SIZE)] == [SHARED_STAMP + 6, SHARED_STAMP + 8]
            assert beside.alive
        neighbour.close()


@contract("GM-ATTR-018")
@private_memory
@gmem_kinds("g0", "gM")
def test_storms_of_conversions_show_only_the_two_copies(
    vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, request: pytest.FixtureRequest
) -> None:
    """Whatever a guest reads while its page is converted over and over is one of the two copies, or a memory fault."""
    with two_copies(vm, gmem, stamped=1) as shared:
        vm.set_private(GPA, PAGE_SIZE)
        cpu.store(GPA, PRIVATE_STAMP)
        # Shared accesses of a slot that gmem alone backs go to the gmem as well (kvm_memslot_is_gmem_only).
        shared_view = PRIVATE_STAMP if gmem.flags & GmemFlag.MMAP else SHARED_STAMP
        for _ in range(int(5 * request.config.getoption("--effort"))):
            cpu.start("watch", rdi=GPA, rsi=PRIVATE_STAMP, rdx=shared_view)
            with cpu.running() as run:
                for _ in range(20):
                    vm.set_shared(GPA, PAGE_SIZE)
                    vm.set_private(GPA, PAGE_SIZE)
                assert run.alive or is_dead(run.result(), GPA) or is_dead(run.result(), GPA, private=True)
            assert cpu.load(GPA) == PRIVATE_STAMP
        vm.set_shared(GPA, PAGE_SIZE)
        assert cpu.load(GPA) == shared_view
        assert shared.load(0) == SHARED_STAMP


@contract("GM-ATTR-019")
@private_memory
def test_private_ends_mmio(vm: Vm, cpu: GuestCpu) -> None:
    """Where PRIVATE is set and no slot is, every access is a private memory fault, one to a page used as MMIO before too.

    KVM keeps MMIO pages in the guest's page tables. Attributes walk the slots (kvm_handle_gfn_range) and leave such an entry
    alone, and a fault on it never counts as private (kvm_mmu_page_fault, 7.3.4): until slots change it stays MMIO, and from
    then on it is refused as a shared access. Without kvm.mmio_caching there is no such entry.
    """
    touched, untouched = NOWHERE, NOWHERE + PAGE_SIZE
    for _ in range(2):
        assert_mmio(cpu, touched)
    vm.set_private(NOWHERE, 2 * PAGE_SIZE)
    assert_dead(cpu, untouched, private=True)
    result = cpu.try_load(touched)
    if known_bug("B25").shows_if(isinstance(result.exit, MmioExit)):
        assert cpu.finish(cpu.answer_mmio(SHARED_STAMP)).rax == SHARED_STAMP
    else:
        assert is_dead(result, touched, private=True)
    with Mapping.anonymous(PAGE_SIZE) as memory:
        vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=PAGE_SIZE, hva=memory.address))
        vm.delete_region(1)
    assert_dead(cpu, untouched, private=True)
    known_bug("B25").expect(cpu.try_load(touched), dead(touched, private=True), shows=dead(touched, private=False))
    vm.set_shared(NOWHERE, 2 * PAGE_SIZE)
    for gpa in (touched, untouched):
        assert_mmio(cpu, gpa)


@contract("GM-ATTR-019")
@private_memory
@gmem_kinds("g0", "gM")
def test_private_memory_can_come_where_mmio_was(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A gmem bound where the guest has met MMIO, and made private before or after that, is what the guest sees there.

    7.3.4 refuses the access as a shared one for good, since the stale MMIO entry stays (see test_private_ends_mmio).
    """
    for private_first in (True, False):
        assert_mmio(cpu, GPA)
        if private_first:
            vm.set_private(GPA, 2 * PAGE_SIZE)
        vm.bind(gmem, gpa=GPA)
        if not private_first:
            vm.set_private(GPA, 2 * PAGE_SIZE)
        cpu.store(GPA + PAGE_SIZE, PRIVATE_STAMP)  # the control: the page beside was never touched
        for _ in range(2):
            result = cpu.try_store(GPA, PRIVATE_STAMP)
            if known_bug("B25").shows_if(result == dead(GPA, private=False)):
                continue
            cpu.finish(result)
            assert cpu.load(GPA) == PRIVATE_STAMP
        vm.delete_region(0)
        vm.set_shared(GPA, 2 * PAGE_SIZE)
        gmem.punch()


def dead(gpa: int, *, private: bool) -> RunResult:
    """What KVM_RUN answers to an access to the page that memory cannot serve."""
    return RunResult(Errno.EFAULT, memory_fault(gpa, private=private))


def assert_mmio(cpu: GuestCpu, gpa: int) -> None:
    """The guest's read is handed to userspace, and gets what userspace answers."""
    result = cpu.try_load(gpa)
    assert result.answer == OK
    assert isinstance(result.exit, MmioExit)
    assert (result.exit.gpa, result.exit.length, result.exit.write) == (gpa, 8, False)
    assert cpu.finish(cpu.answer_mmio(SHARED_STAMP)).rax == SHARED_STAMP


def after_conversion(cpu: GuestCpu, result: RunResult) -> int:
    """What a vCPU reads that ran while its page was converted.

    A fault that was under way is refused, because what it found out about the page holds no longer (kvm_mmu_faultin_pfn,
    7.3.4); the VMM is to let the vCPU go on.
    """
    caught = is_dead(result, GPA) or is_dead(result, GPA, private=True)
    return cpu.finish(cpu.run() if caught else result).rax


@contract("GM-ATTR-020")
@private_memory
@gmem_kinds("g0")
def test_all_vcpus_see_a_conversion(vm: Vm, gmem: GuestMemfd, machine: GuestMachine, cpu: GuestCpu) -> None:
    """Attributes are the VM's: once the ioctl returns, every vCPU sees the other copy, one that is just running too."""
    other = machine.cpu(1)
    with two_copies(vm, gmem, stamped=1):
        vm.set_private(GPA, PAGE_SIZE)
        cpu.store(GPA, PRIVATE_STAMP)
        assert other.load(GPA) == PRIVATE_STAMP
        for convert, old, new in (
            (vm.set_shared, PRIVATE_STAMP, SHARED_STAMP),
            (vm.set_private, SHARED_STAMP, PRIVATE_STAMP),
        ):
            for each in (cpu, other):
                each.start("watch", rdi=GPA, rsi=old, rdx=old)
            with cpu.running() as first, other.running() as second:
                convert(GPA, PAGE_SIZE)
                assert after_conversion(cpu, first.result()) == new
                assert after_conversion(other, second.result()) == new
            assert [cpu.load(GPA), other.load(GPA)] == [new, new]
    # There is no second address space that could have attributes of its own.
    if vm.raw.check_extension(Cap.MULTI_ADDRESS_SPACE):
        assert vm.check_extension(Cap.MULTI_ADDRESS_SPACE) == 1
    other.close()
