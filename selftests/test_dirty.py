"""GM-DIRTY: dirty tracking beside gmem, which itself is never tracked."""

from collections.abc import Iterator

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MemFlag, MiB
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine
from kvmgmem.errors import Errno
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, SIZE, Bound
from kvmgmem.testing.stats import Stats
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
PAGES = SIZE // PAGE_SIZE
PLAIN_GPA = 2 * GPA
PLAIN_SLOT = 1
USER_SLOTS = 32764
RING_OFFSET = 64 * PAGE_SIZE  # KVM_DIRTY_LOG_PAGE_OFFSET on x86
RING_SIZE = 64 * 1024
ENTRY_SIZE = 16
INITIALLY_SET = 2  # KVM_DIRTY_LOG_INITIALLY_SET, include/uapi/linux/kvm.h


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """Host memory for a plain slot."""
    with Mapping.anonymous(SIZE) as memory:
        yield memory


def plain(hva: int, *, logged: bool = True) -> MemoryRegion:
    """A plain slot over host memory, with or without a dirty log."""
    return MemoryRegion(PLAIN_SLOT, PLAIN_GPA, SIZE, hva, flags=MemFlag.LOG_DIRTY if logged else 0)


def log_answers(vm: Vm, slot: int, as_id: int = 0) -> tuple[object, object]:
    """What reading and clearing a slot's dirty log answer."""
    log = vm.raw.dirty_log(slot, PAGES, as_id)
    return (log if isinstance(log, Errno) else OK), vm.raw.clear_dirty_log(slot | as_id << 16, 0, PAGES)


@contract("GM-DIRTY-001")
def test_a_gmem_slot_has_no_dirty_log(bound: Bound, memory: Mapping) -> None:
    """Reading or clearing the dirty log of a slot with gmem is ENOENT: there is none."""
    bound.vm.set_region(plain(memory.address))
    assert log_answers(bound.vm, PLAIN_SLOT) == (OK, OK)  # the control: a plain slot beside it
    assert log_answers(bound.vm, bound.region.slot) == (Errno.ENOENT, Errno.ENOENT)


@contract("GM-DIRTY-002")
@vm_types("default", "sw-protected")
def test_only_a_slot_with_logging_has_a_dirty_log(vm: Vm, memory: Mapping) -> None:
    """No slot or no logging is ENOENT; a slot number or an address space that cannot be is EINVAL."""
    vm.set_region(plain(memory.address))
    assert log_answers(vm, PLAIN_SLOT) == (OK, OK)
    assert log_answers(vm, PLAIN_SLOT + 1) == (Errno.ENOENT, Errno.ENOENT)
    assert log_answers(vm, USER_SLOTS - 1) == (Errno.ENOENT, Errno.ENOENT)
    for slot in (USER_SLOTS, USER_SLOTS + 2, 0xFFFF):
        assert log_answers(vm, slot) == (Errno.EINVAL, Errno.EINVAL)
    spaces = max(1, vm.check_extension(Cap.MULTI_ADDRESS_SPACE))
    assert log_answers(vm, PLAIN_SLOT, as_id=spaces) == (Errno.EINVAL, Errno.EINVAL)
    assert log_answers(vm, PLAIN_SLOT, as_id=0xFFFF) == (Errno.EINVAL, Errno.EINVAL)
    if spaces > 1:
        assert log_answers(vm, PLAIN_SLOT, as_id=1) == (Errno.ENOENT, Errno.ENOENT)
    vm.set_region(plain(memory.address, logged=False))
    assert log_answers(vm, PLAIN_SLOT) == (Errno.ENOENT, Errno.ENOENT)


class Ring:
    """The dirty ring of a vCPU, as userspace reads it (api.rst, KVM_CAP_DIRTY_LOG_RING)."""

    def __init__(self, cpu: GuestCpu) -> None:
        self.mapping = Mapping.of(cpu.vcpu, RING_SIZE, RING_OFFSET)
        self._entries = ffi.cast("struct kvm_dirty_gfn *", self.mapping.address)
        self._next = 0

    def take(self) -> list[tuple[int, int]]:
        """Slot and page of each new entry; they are handed back for KVM_RESET_DIRTY_RINGS."""
        found: list[tuple[int, int]] = []
        while self._entries[self._next].flags & lib.KVM_DIRTY_GFN_F_DIRTY:
            entry = self._entries[self._next]
            found.append((entry.slot, entry.offset))
            entry.flags |= lib.KVM_DIRTY_GFN_F_RESET
            self._next = (self._next + 1) % (RING_SIZE // ENTRY_SIZE)
        return found


@contract("GM-DIRTY-003")
@requires("default-vm", cap=Cap.DIRTY_LOG_RING)
@vm_types("default")
def test_the_dirty_ring_knows_no_gmem_and_replaces_the_bitmap(kvm: Kvm, memory: Mapping) -> None:
    """With the dirty ring on, the bitmap calls are ENXIO; the ring names pages of logged slots, and never those of gmem."""
    with kvm.create_vm() as vm:
        vm.enable_cap(Cap.DIRTY_LOG_RING, RING_SIZE)
        machine = GuestMachine(vm)
        cpu = machine.cpu()
        ring = Ring(cpu)
        with vm.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem, ring.mapping:
            vm.bind(gmem, gpa=GPA)
            vm.set_region(plain(memory.address))
            assert log_answers(vm, PLAIN_SLOT) == (Errno.ENXIO, Errno.ENXIO)
            assert log_answers(vm, 0) == (Errno.ENXIO, Errno.ENXIO)
            cpu.stamp(GPA, STAMP, 8)
            assert ring.take() == []
            cpu.store(PLAIN_GPA + 3 * PAGE_SIZE, STAMP)
            assert ring.take() == [(PLAIN_SLOT, 3)]
            assert vm.raw.ioctl(lib.KVM_RESET_DIRTY_RINGS) == 1
            cpu.store(GPA, STAMP)
            cpu.store(PLAIN_GPA + 5 * PAGE_SIZE, STAMP)
            assert ring.take() == [(PLAIN_SLOT, 5)]
        cpu.close()
        machine.close()


@contract("GM-DIRTY-004")
@vm_types("default")
@gmem_kinds("gMS")
def test_an_alias_of_gmem_logs_what_is_written_through_it(bound: Bound, cpu: GuestCpu) -> None:
    """A plain slot over a mapping of the gmem has a dirty log like any other, of the writes that guests make through it."""
    with bound.gmem.map() as own:
        bound.vm.set_region(plain(own.address))
        assert bound.vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        for page in (0, 9, PAGES - 1):
            cpu.store(PLAIN_GPA + page * PAGE_SIZE, STAMP + page)
        assert bound.vm.dirty_pages(PLAIN_SLOT, PAGES) == {0, 9, PAGES - 1}
        assert bound.vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        cpu.store(PLAIN_GPA + 9 * PAGE_SIZE, STAMP)
        assert bound.vm.dirty_pages(PLAIN_SLOT, PAGES) == {9}
        assert [own.load(9 * PAGE_SIZE), cpu.load(GPA + 9 * PAGE_SIZE)] == [STAMP, STAMP]


@contract("GM-DIRTY-005")
@vm_types("default")
@gmem_kinds("gMS")
def test_the_log_of_an_alias_knows_nothing_of_other_writers(bound: Bound, cpu: GuestCpu) -> None:
    """Stores of the host, holes, and guest writes through the gmem slot leave the dirty log of an alias empty."""
    vm, gmem = bound.vm, bound.gmem
    with gmem.map() as own:
        own.fill(0)
        vm.set_region(plain(own.address))
        cpu.store(PLAIN_GPA, STAMP)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == {0}  # the control: the log works
        own.store(STAMP, 2 * PAGE_SIZE)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        cpu.store(GPA + 4 * PAGE_SIZE, STAMP)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        gmem.punch(0, 8 * PAGE_SIZE)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        own.store(STAMP, 2 * PAGE_SIZE)
        cpu.store(GPA + 4 * PAGE_SIZE, STAMP)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == set()
        assert own.load(4 * PAGE_SIZE) == STAMP


@contract("GM-DIRTY-006")
@requires("tdp")
@vm_types("default")
@gmem_kinds("gM", "gMS")
def test_toggling_a_log_leaves_mappings_of_gmem_alone(bound: Bound, cpu: GuestCpu, memory: Mapping) -> None:
    """Switching the dirty log of a plain slot on and off takes nothing from the guest's mappings of gmem: no new faults."""
    vm = bound.vm
    vm.set_region(plain(memory.address, logged=False))
    cpu.stamp(GPA, STAMP, 16)
    cpu.stamp(PLAIN_GPA, STAMP, 16)
    assert cpu.first_unstamped(GPA, STAMP, 16) is None
    with Stats(cpu.vcpu) as stats:
        for logged in (True, False, True):
            vm.set_region(plain(memory.address, logged=logged))
            before = stats["pf_taken"]
            assert cpu.first_unstamped(GPA, STAMP, 16) is None
            cpu.stamp(GPA, STAMP, 16)
            assert stats["pf_taken"] == before
        cpu.store(PLAIN_GPA, STAMP)  # the control: the statistic counts, and the log was switched
        assert stats["pf_taken"] > before
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == {0}


@contract("GM-DIRTY-006")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_running_guest_does_not_notice_a_log_being_toggled(bound: Bound, cpu: GuestCpu, memory: Mapping) -> None:
    """A vCPU that writes to gmem keeps running, and its stores keep arriving, while a plain slot's log goes on and off."""
    vm = bound.vm
    with bound.gmem.map() as own:
        vm.set_region(plain(memory.address, logged=False))
        cpu.start("hammer", rdi=GPA)
        with cpu.running() as run:
            for logged in (True, False) * 4:
                vm.set_region(plain(memory.address, logged=logged))
                seen = own.load(0)
                wait_until(lambda seen=seen: own.load(0) > seen, "the guest's counter goes on")  # type: ignore[misc]
            assert run.alive
            assert run.kick().answer == Errno.EINTR
        assert own.load(0) > 0


@contract("GM-DIRTY-007")
@vm_types("default")
def test_clearing_takes_whole_words_inside_the_slot(vm: Vm, cpu: GuestCpu) -> None:
    """CLEAR_DIRTY_LOG wants a range in the slot that begins at a multiple of 64 pages, and ends at one or with the slot."""
    pages = 200  # no multiple of 64
    vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    with Mapping.anonymous(MiB) as memory:
        vm.set_region(plain(memory.address).but(size=pages * PAGE_SIZE))

        def dirty() -> set[int]:
            return vm.dirty_pages(PLAIN_SLOT, pages)

        for page in (0, 70, 130, 199):
            cpu.store(PLAIN_GPA + page * PAGE_SIZE, STAMP)
        assert dirty() == {0, 70, 130, 199}
        refused = [(1, 64), (32, 64), (63, 1), (64, 137), (0, 201), (192, 9), (256, 0), (1 << 63, 64), (0, 100), (64, 65)]
        for first, count in refused:
            assert vm.raw.clear_dirty_log(PLAIN_SLOT, first, count) == Errno.EINVAL, (first, count)
            assert dirty() == {0, 70, 130, 199}
        assert vm.raw.clear_dirty_log(PLAIN_SLOT, 64, 64) == OK
        assert dirty() == {0, 130, 199}
        assert vm.raw.clear_dirty_log(PLAIN_SLOT, 192, 8) == OK
        assert dirty() == {0, 130}
        assert vm.raw.clear_dirty_log(PLAIN_SLOT, 128, 72, bytes(16)) == OK  # no bit set: nothing to clear
        assert dirty() == {0, 130}
        assert vm.raw.clear_dirty_log(PLAIN_SLOT, 0, pages) == OK
        assert dirty() == set()
        cpu.store(PLAIN_GPA + 130 * PAGE_SIZE, STAMP)
        assert dirty() == {130}


@contract("GM-DIRTY-007")
@vm_types("default")
def test_a_log_that_begins_full_is_cleared_word_by_word(vm: Vm, cpu: GuestCpu) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET a new log names every page of the slot, until CLEAR_DIRTY_LOG takes them off it."""
    wanted = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | INITIALLY_SET
    if not vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & INITIALLY_SET:
        pytest.skip("this KVM offers no KVM_DIRTY_LOG_INITIALLY_SET")
    vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, wanted)
    with Mapping.anonymous(SIZE) as memory:
        vm.set_region(plain(memory.address))
        everything = set(range(PAGES))
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == everything
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == everything
        assert vm.raw.clear_dirty_log(PLAIN_SLOT, 64, 64) == OK
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == everything - set(range(64, 128))
        cpu.store(PLAIN_GPA + 70 * PAGE_SIZE, STAMP)
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == everything - set(range(64, 128)) | {70}
        # A log that is switched on later begins full as well; one that stays on keeps what it has.
        vm.set_region(plain(memory.address, logged=False))
        vm.set_region(plain(memory.address))
        assert vm.dirty_pages(PLAIN_SLOT, PAGES) == everything


@contract("GM-DIRTY-007")
@vm_types("default")
def test_a_bitmap_out_of_reach_is_a_fault(vm: Vm, cpu: GuestCpu, memory: Mapping) -> None:
    """Where the bitmap's memory cannot be written, or read, GET_DIRTY_LOG and CLEAR_DIRTY_LOG are EFAULT."""
    vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    vm.set_region(plain(memory.address))
    cpu.store(PLAIN_GPA + 3 * PAGE_SIZE, STAMP)
    with Mapping.anonymous(PAGE_SIZE) as gone:
        nowhere = gone.address
    get = ffi.new("struct kvm_dirty_log *", {"slot": PLAIN_SLOT, "dirty_bitmap": nowhere})
    clear = ffi.new("struct kvm_clear_dirty_log *", {"slot": PLAIN_SLOT, "num_pages": PAGES, "dirty_bitmap": nowhere})
    assert vm.raw.ioctl_struct(lib.KVM_GET_DIRTY_LOG, get) == Errno.EFAULT
    assert vm.raw.ioctl_struct(lib.KVM_CLEAR_DIRTY_LOG, clear) == Errno.EFAULT
    assert vm.dirty_pages(PLAIN_SLOT, PAGES) == {3}


@contract("GM-SLOT-023")
@vm_types("default")
def test_the_log_of_a_slot_moves_along(vm: Vm, cpu: GuestCpu, memory: Mapping) -> None:
    """A slot that is moved with its log on keeps the log: what was written before the move is in it, and what is after."""
    vm.set_region(plain(memory.address))
    cpu.store(PLAIN_GPA + 3 * PAGE_SIZE, STAMP)
    moved = plain(memory.address).but(gpa=GPA)
    assert vm.raw.set_region(moved) == OK
    assert vm.dirty_pages(PLAIN_SLOT, PAGES) == {3}
    assert cpu.load(moved.gpa + 3 * PAGE_SIZE) == STAMP
    # Kernels may map a page that is read writable at once, and log it then (6.12 does).
    assert vm.dirty_pages(PLAIN_SLOT, PAGES) <= {3}
    cpu.store(moved.gpa + 5 * PAGE_SIZE, STAMP)
    assert vm.dirty_pages(PLAIN_SLOT, PAGES) == {5}
