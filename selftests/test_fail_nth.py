"""What calls do when an allocation in the middle of them fails: each is repeated with its first, second, ... one failing.

Every call must answer ENOMEM and leave everything as it was, or do all of its work; and the same call must then succeed.
Twice each: once with that allocation failing alone, and once with those after it failing too. Only the second reaches what
tries again with more effort, such as the nodes of an XArray, which are first asked for without sleep.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, Attribute, Cap, GiB, GmemFlag, MemFlag, MiB
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine, is_report
from kvmgmem.errors import Errno
from kvmgmem.exits import MemoryFaultExit, RunResult
from kvmgmem.fail_nth import MemoryShortage, Outcome, Shortage
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import DEBUGFS
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import (
    contract,
    disruptive,
    gmem_kinds,
    known_bug,
    requires,
    test_timeout,
    vm_types,
    wait_until,
    would_show,
)
from kvmgmem.testing.announcements import Announcements
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.slab_caches import objects_in_use
from kvmgmem.testing.stats import read_stat
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

pytestmark = [requires("failing-allocations", "root", "debugfs"), disruptive(), test_timeout(60)]

T = TypeVar("T")

ELSEWHERE = 3 * GiB
STAMP = 0x5EED_0000_0000_0001
VIRTUAL = 8 * GiB
PRIVATE = Attribute.PRIVATE
AT_EACH_END = 24
"""So many allocations at the beginning and at the end of a call fail one by one, and as many of those between."""
NO_END = 10_000
"""A call that makes so many allocations does not end."""


class Sweep:
    """A call again and again, one after another of its allocations failing, and none at the beginning and at the end."""

    def __init__(self, memory: MemoryShortage, effort: float) -> None:
        self.memory = memory
        self._dense = max(1, int(AT_EACH_END * effort))

    def over(self, call: Callable[[], T]) -> Iterator[Outcome[T]]:
        """Make the call; whoever takes the outcomes brings back the state that it starts from."""
        untouched = self.memory.call(NO_END, call)
        assert not untouched.injected, f"the call makes {NO_END} allocations"
        yield untouched
        for nth in self._chosen(untouched.allocations):
            yield self.memory.call(nth, call)
        # Where fewer allocations are made at first: no two calls are quite the same.
        for nth in range(untouched.allocations + 1, 2 * untouched.allocations + AT_EACH_END):
            outcome = self.memory.call(nth, call)
            yield outcome
            if not outcome.injected:
                return
        raise AssertionError(f"the call made {untouched.allocations} allocations once, and now more than {nth}")

    def _chosen(self, allocations: int) -> list[int]:
        every = range(1, allocations + 1)
        between = every[self._dense : -self._dense]
        return [
            *every[: self._dense],
            *between[:: max(1, len(between) // self._dense)],
            *every[self._dense :][-self._dense :],
        ]

    def answers(self, call: Callable[[], T], after: Callable[[Outcome[T]], None]) -> list[Outcome[T]]:
        """All outcomes, with `after` called behind each; the last one of a call that nothing was in the way of."""
        outcomes: list[Outcome[T]] = []
        for outcome in self.over(call):
            after(outcome)
            outcomes.append(outcome)
        return outcomes


@pytest.fixture(params=list(Shortage), ids=str)
def sweep(request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """A sweep through each sort of shortage."""
    with MemoryShortage(request.param) as memory:
        yield Sweep(memory, float(request.config.getoption("--effort")))


def descriptors() -> list[str]:
    """The numbers of the open descriptors."""
    return sorted(os.listdir("/proc/self/fd"))


def failed(outcomes: list[Outcome[T]]) -> int:
    """How many calls failed; the last one, for which memory was enough, must not have."""
    assert not outcomes[-1].injected
    assert not isinstance(outcomes[-1].answer, Errno)
    return sum(isinstance(outcome.answer, Errno) for outcome in outcomes)


@contract("GM-RES-014")
@would_show("B29")
def test_a_vm_comes_whole_or_not_at_all(kvm: Kvm, vm: Vm, sweep: Sweep) -> None:
    """Creating a VM while memory is short is ENOMEM and leaves nothing behind, or makes a VM that works."""
    _ = kvm.vcpu_mmap_size
    before = descriptors()
    lowest_free = os.dup(0)
    os.close(lowest_free)
    # Its files in debugfs may be missing, or a part of them: KVM does without (kvm_create_vm_debugfs).
    place = DEBUGFS / "kvm" / f"{threading.get_native_id()}-{lowest_free}"

    def check(outcome: Outcome[Vm | Errno]) -> None:
        if isinstance(outcome.answer, Vm):
            with outcome.answer as made:
                assert made.check_extension(Cap.GUEST_MEMFD) == vm.check_extension(Cap.GUEST_MEMFD)
                with made.create_guest_memfd(SIZE, GmemFlag.MMAP) as gmem, made.create_vcpu() as vcpu:
                    made.bind(gmem, gpa=GPA)
                    gmem.allocate(0, PAGE_SIZE)
                    assert vcpu.raw.get_regs()[0] == OK
        else:
            assert outcome.answer == Errno.ENOMEM, outcome
        assert descriptors() == before, outcome
        wait_until(lambda: not place.exists(), f"the VM is gone, {outcome}", 1)

    assert failed(sweep.answers(lambda: kvm.raw.create_vm(vm.type), check)) > 0


@contract("GM-RES-014")
@would_show("B29")
@vm_types("default")
def test_a_vm_that_never_came_is_not_counted(kvm: Kvm, vm: Vm) -> None:
    """KVM counts the VMs there are, and announces their number, whatever creations failed for want of memory before."""
    _ = kvm.vcpu_mmap_size
    with closing(Announcements()) as announced, MemoryShortage() as memory:

        def count() -> int:
            kvm.create_vm(vm.type).close()
            return announced.next("create")

        before = count()
        announced.next("destroy")
        for outcome in Sweep(memory, 1).over(lambda: kvm.raw.create_vm(vm.type)):
            if isinstance(outcome.answer, Vm):
                outcome.answer.close()
        # 7.3.4: without memory for the VM's file the VM is destroyed, and leaves a count that it joins with that file only.
        after = count()
        if after < before or after >= 1 << 63:
            known_bug("B28").shows_if(True)  # its absence is another test's to tell: the file's memory may not have failed
        else:
            assert after == before


@contract("C20", "GM-CRE-013")
@gmem_kinds("g0", "gMS", "gM")
def test_a_gmem_comes_whole_or_not_at_all(vm: Vm, gmem_kind: GmemFlag, sweep: Sweep) -> None:
    """Creating a gmem while memory is short is ENOMEM and leaves neither descriptor nor VM, or makes a gmem that works."""
    directory = VmDirectory.of(vm)
    before = descriptors()

    def check(outcome: Outcome[GuestMemfd | Errno]) -> None:
        if isinstance(outcome.answer, GuestMemfd):
            with outcome.answer as made:
                assert made.allocated_pages() == 0
                vm.bind(made, gpa=GPA)
                made.allocate(0, PAGE_SIZE)
                assert made.allocated_pages() == 1
            vm.delete_region(0)
        else:
            assert outcome.answer == Errno.ENOMEM, outcome
        assert descriptors() == before, outcome

    assert failed(sweep.answers(lambda: vm.raw.create_guest_memfd(SIZE, gmem_kind), check)) > 0
    vm.close()
    directory.wait_gone()


FAILURES = 400


@contract("C20", "GM-CRE-013", "GM-RES-011")
@requires("gmem-inode-cache", "no-quarantine")
@vm_types("default")
@gmem_kinds("g0")
@pytest.mark.parametrize("cache", [r"kvm_gmem_inode_cache", r"kmalloc(-rnd-\d+)?-64"], ids=["inodes", "files"])
def test_gmems_that_never_came_keep_no_memory(vm: Vm, gmem_kind: GmemFlag, cache: str) -> None:
    """What a creation had allocated when memory ran out is given back: the inode, and what KVM keeps of each file.

    The latter is a struct of 40 bytes, which comes from a cache that many use.
    """
    failures = 0
    with MemoryShortage() as memory:
        sweep = Sweep(memory, 1)
        before = objects_in_use(cache)
        for _ in range(FAILURES):
            for outcome in sweep.over(lambda: vm.raw.create_guest_memfd(SIZE, gmem_kind)):
                if isinstance(outcome.answer, GuestMemfd):
                    outcome.answer.close()
                else:
                    failures += 1
            if failures >= FAILURES:
                break
    assert failures >= FAILURES
    # Inodes go after an RCU grace period. A leak is one object for each sort of allocation that is made after it.
    wait_until(lambda: objects_in_use(cache) < before + FAILURES // 6, "what failed has given its memory back")


@contract("GM-RES-014")
def test_a_vcpu_comes_whole_or_not_at_all(vm: Vm, machine: GuestMachine, sweep: Sweep) -> None:
    """Creating a vCPU while memory is short is ENOMEM and leaves its id free, or makes a vCPU that works."""
    before = descriptors()
    last = 0

    def create() -> Vcpu | Errno:
        return vm.raw.create_vcpu(last)

    def check(outcome: Outcome[Vcpu | Errno]) -> None:
        nonlocal last
        if isinstance(outcome.answer, Vcpu):
            with outcome.answer as made:
                answer, sregs = made.raw.get_sregs()
                assert (answer, made.raw.set_sregs(sregs)) == (OK, OK)
                assert vm.raw.create_vcpu(last) == Errno.EEXIST, outcome
            last += 1  # a vCPU stays until its VM ends
        else:
            assert outcome.answer == Errno.ENOMEM, outcome
        assert descriptors() == before, outcome

    assert failed(sweep.answers(create, check)) > 0
    with closing(machine.cpu(last)) as cpu:
        machine.memory.store(STAMP, machine.memory.length - PAGE_SIZE)
        assert cpu.load(machine.gpa + machine.memory.length - PAGE_SIZE) == STAMP


@contract("C20", "GM-BIND-026")
@gmem_kinds("g0", "gM", "gMS")
def test_binding_is_whole_or_not_at_all(vm: Vm, gmem_kind: GmemFlag, sweep: Sweep) -> None:
    """A bind while memory is short is ENOMEM and binds no page of the range, or succeeds and binds all of it."""
    begin, pages = 60, 4100  # three nodes of the table of bindings, and two levels
    with vm.create_guest_memfd((begin + pages + 8) * PAGE_SIZE, gmem_kind) as gmem:
        region = MemoryRegion(0, GPA, pages * PAGE_SIZE, gmem=gmem, gmem_offset=begin * PAGE_SIZE)
        edges = [
            region.but(slot=1, gpa=ELSEWHERE, size=PAGE_SIZE, gmem_offset=page * PAGE_SIZE)
            for page in (begin, 63, 64, 4095, 4096, begin + pages - 1)
        ]

        def check(outcome: Outcome[int | Errno]) -> None:
            if outcome.answer == OK:
                for edge in edges:
                    again = vm.raw.set_region(edge)
                    if known_bug("B6").shows_if(again == OK):
                        vm.delete_region(1)
                    else:
                        assert again in (Errno.EEXIST, Errno.EINVAL), (outcome, edge)  # which of them: B14
                vm.delete_region(0)
            else:
                assert outcome.answer == Errno.ENOMEM, outcome
                assert vm.raw.delete_region(0) == Errno.EINVAL, outcome
                for edge in edges:
                    assert vm.raw.set_region(edge) == OK, (outcome, edge)
                    vm.delete_region(1)

        assert failed(sweep.answers(lambda: vm.raw.set_region(region), check)) > 0
        vm.set_region(region)


@contract("GM-SLOT-026")
def test_a_plain_slot_comes_whole_or_not_at_all(vm: Vm, sweep: Sweep) -> None:
    """Making a plain slot while memory is short is ENOMEM and takes neither its id nor its address, or makes the slot."""
    with Mapping.anonymous(SIZE) as memory:
        region = MemoryRegion(0, GPA, SIZE, memory.address, flags=MemFlag.LOG_DIRTY)

        def check(outcome: Outcome[int | Errno]) -> None:
            neighbour = region.but(slot=1, flags=0)
            if outcome.answer == OK:
                assert vm.raw.set_region(neighbour) == Errno.EEXIST, outcome
                assert vm.dirty_pages(0, SIZE // PAGE_SIZE) == set()
                vm.delete_region(0)
            else:
                assert outcome.answer == Errno.ENOMEM, outcome
                assert vm.raw.delete_region(0) == Errno.EINVAL, outcome
                assert vm.raw.set_region(neighbour) == OK, outcome
                vm.delete_region(1)

        assert failed(sweep.answers(lambda: vm.raw.set_region(region), check)) > 0


@contract("GM-SLOT-026", "GM-SLOT-023")
@requires("x86")
def test_a_slot_moves_wholly_or_stays(vm: Vm, machine: GuestMachine, sweep: Sweep) -> None:
    """Moving a plain slot while memory is short is ENOMEM and the guest finds it where it was, or moves it."""
    with Mapping.anonymous(SIZE) as memory, closing(machine.cpu()) as cpu:
        memory.store(STAMP)
        region = MemoryRegion(0, GPA, SIZE, memory.address)
        moved = region.but(gpa=ELSEWHERE)
        vm.set_region(region)
        assert cpu.load(GPA) == STAMP

        def check(outcome: Outcome[int | Errno]) -> None:
            assert outcome.answer in (OK, Errno.ENOMEM), outcome
            here, there = (ELSEWHERE, GPA) if outcome.answer == OK else (GPA, ELSEWHERE)
            assert cpu.load(here) == STAMP, outcome
            neighbour = MemoryRegion(1, there, SIZE, memory.address)
            assert vm.raw.set_region(neighbour) == OK, outcome
            vm.delete_region(1)
            vm.set_region(region)

        assert failed(sweep.answers(lambda: vm.raw.set_region(moved), check)) > 0


@contract("GM-SLOT-026", "GM-SLOT-022")
@requires("x86")
def test_flags_of_a_slot_change_or_stay(vm: Vm, machine: GuestMachine, sweep: Sweep) -> None:
    """Switching the dirty log of a plain slot on or off while memory is short is ENOMEM and changes nothing, or does it."""
    with Mapping.anonymous(SIZE) as memory, closing(machine.cpu()) as cpu:
        plain = MemoryRegion(0, GPA, SIZE, memory.address)
        logged = plain.but(flags=MemFlag.LOG_DIRTY)
        vm.set_region(plain)
        cpu.store(GPA, STAMP)

        def check(outcome: Outcome[int | Errno]) -> None:
            if outcome.answer == OK:
                cpu.store(GPA + PAGE_SIZE, STAMP)
                assert vm.dirty_pages(0, SIZE // PAGE_SIZE) == {1}, outcome
                vm.set_region(plain)
            else:
                assert outcome.answer == Errno.ENOMEM, outcome
                assert vm.raw.dirty_log(0, SIZE // PAGE_SIZE) == Errno.ENOENT, outcome
            assert cpu.load(GPA) == STAMP, outcome

        assert failed(sweep.answers(lambda: vm.raw.set_region(logged), check)) > 0

        # To switch it off takes memory as well, for the new slot that stands beside the old one meanwhile.
        def check_off(outcome: Outcome[int | Errno]) -> None:
            if outcome.answer == OK:
                assert vm.raw.dirty_log(0, SIZE // PAGE_SIZE) == Errno.ENOENT, outcome
                vm.set_region(logged)
            else:
                assert outcome.answer == Errno.ENOMEM, outcome
                cpu.store(GPA + 2 * PAGE_SIZE, STAMP)
                assert vm.dirty_pages(0, SIZE // PAGE_SIZE) == {2}, outcome
            assert cpu.load(GPA) == STAMP, outcome

        vm.set_region(logged)
        assert failed(sweep.answers(lambda: vm.raw.set_region(plain), check_off)) > 0


@contract("GM-BIND-020")
@gmem_kinds("gM", "gMS")
def test_a_bound_slot_is_as_immutable_when_memory_is_short(running: Running, sweep: Sweep) -> None:
    """Moving a bound slot, or changing its flags, is EINVAL however short memory is, and its guest does not notice."""
    vm, cpu = running.vm, running.cpu
    cpu.store(GPA, STAMP)
    for change in (running.region.but(gpa=ELSEWHERE), running.region.but(flags=0), running.region.but(gmem=-1, flags=0)):
        for outcome in sweep.over(lambda change=change: vm.raw.set_region(change)):  # type: ignore[misc]
            assert outcome.answer == Errno.EINVAL, (change, outcome)
            assert cpu.load(GPA) == STAMP


@contract("GM-SLOT-026", "C20")
@gmem_kinds("gM", "gMS")
def test_a_bound_slot_goes_wholly_or_stays(running: Running, sweep: Sweep) -> None:
    """Deleting a bound slot while memory is short is ENOMEM and guest and file keep it, or unbinds all of its range."""
    vm, gmem, cpu, region = running.vm, running.gmem, running.cpu, running.region
    cpu.store(GPA, STAMP)
    ends = [
        region.but(slot=1, gpa=ELSEWHERE, size=PAGE_SIZE, gmem_offset=offset) for offset in (0, SIZE // 2, SIZE - PAGE_SIZE)
    ]

    def check(outcome: Outcome[int | Errno]) -> None:
        assert outcome.answer in (OK, Errno.ENOMEM), outcome
        for end in ends:
            answer = vm.raw.set_region(end)
            if outcome.answer == OK:
                assert answer == OK, (outcome, end)
                vm.delete_region(1)
            else:
                assert answer in (Errno.EEXIST, Errno.EINVAL), (outcome, end)  # which of them: B14
        if outcome.answer == OK:
            vm.set_region(region)
        assert cpu.load(GPA) == STAMP, outcome
        assert gmem.allocated_pages() == 1, outcome

    assert failed(sweep.answers(lambda: vm.raw.delete_region(0), check)) > 0


@contract("GM-SLOT-026")
@requires("x86")
def test_a_plain_slot_goes_wholly_or_stays(vm: Vm, machine: GuestMachine, sweep: Sweep) -> None:
    """Deleting a plain slot while memory is short is ENOMEM and the guest keeps it, or frees its address."""
    with Mapping.anonymous(SIZE) as memory, closing(machine.cpu()) as cpu:
        memory.store(STAMP)
        region = MemoryRegion(0, GPA, SIZE, memory.address)
        vm.set_region(region)

        def check(outcome: Outcome[int | Errno]) -> None:
            assert outcome.answer in (OK, Errno.ENOMEM), outcome
            neighbour = region.but(slot=1)
            assert vm.raw.set_region(neighbour) == (OK if outcome.answer == OK else Errno.EEXIST), outcome
            assert cpu.load(GPA) == STAMP, outcome
            if outcome.answer == OK:
                vm.delete_region(1)
                vm.set_region(region)

        assert failed(sweep.answers(lambda: vm.raw.delete_region(0), check)) > 0


@contract("GM-RES-015")
@vm_types("sw-protected")
@gmem_kinds("g0")
def test_a_conversion_is_whole_or_not_at_all(vm: Vm, gmem: GuestMemfd, machine: GuestMachine, sweep: Sweep) -> None:
    """Making pages private while memory is short is ENOMEM and all are as they were, or makes all of them private."""
    pages = 512
    with Mapping.anonymous(SIZE) as shared, closing(machine.cpu()) as cpu:
        for page in range(pages):
            shared.store(STAMP, page * PAGE_SIZE)
        vm.bind(gmem, gpa=GPA, hva=shared.address)

        def check(outcome: Outcome[int | Errno]) -> None:
            assert outcome.answer in (OK, Errno.ENOMEM), outcome
            seen = 0 if outcome.answer == OK else STAMP
            assert cpu.first_not(seen, GPA, pages) is None, outcome
            # What a failed conversion has reserved stays until a whole one is taken back (kvm_vm_set_mem_attributes).
            vm.set_private(GPA, SIZE)
            assert cpu.first_not(0, GPA, pages) is None, outcome
            vm.set_shared(GPA, SIZE)
            assert cpu.first_not(STAMP, GPA, pages) is None, outcome

        failures = failed(sweep.answers(lambda: vm.raw.set_attributes(GPA, SIZE, PRIVATE), check))
        # All it allocates are nodes of an XArray, and a node that comes at the second try is no failure (__xas_nomem).
        assert failures > 0 or sweep.memory.shortage is Shortage.MOMENTARY
        # To make them shared takes no memory: "Storing NULL never allocates" (kvm_vm_set_mem_attributes).
        vm.set_private(GPA, SIZE)
        for outcome in sweep.over(lambda: vm.raw.set_attributes(GPA, SIZE, 0)):
            assert outcome.answer == OK, outcome
            assert cpu.first_not(STAMP, GPA, pages) is None, outcome
            vm.set_private(GPA, SIZE)
            assert cpu.first_not(0, GPA, pages) is None, outcome


@contract("GM-ATTR-013", "GM-ATTR-009")
@requires(config="TRANSPARENT_HUGEPAGE")
@vm_types("sw-protected")
def test_a_conversion_that_failed_leaves_no_mark(vm: Vm, machine: GuestMachine) -> None:
    """After a conversion that failed for want of memory, memory whose pages are all shared is mapped by a huge page."""
    with MemoryShortage(Shortage.LASTING) as memory, Mapping.anonymous(2 * SIZE) as room, closing(machine.cpu()) as cpu:
        aligned = -(-room.address // SIZE) * SIZE
        assert room.advise(Advice.HUGEPAGE) == OK
        for page in range(SIZE // PAGE_SIZE):
            room.store(STAMP, aligned - room.address + page * PAGE_SIZE)
        region = MemoryRegion(0, GPA, SIZE, aligned)
        vm.set_region(region)
        assert (cpu.load(GPA), read_stat(vm, "pages_2m")) == (STAMP, 1)  # the control: no conversion was ever tried
        vm.delete_region(0)
        # The first node of the table is there when the next is asked for, so that entries stay reserved.
        reserved = 0
        for nth in range(1, 40):
            outcome = memory.call(nth, lambda: vm.raw.set_attributes(GPA, SIZE, PRIVATE))
            if outcome.answer == OK:
                break
            assert outcome.answer == Errno.ENOMEM
            reserved += 1
            assert vm.raw.set_attributes(GPA, SIZE, 0) == OK
            vm.set_region(region)
            seen = (cpu.load(GPA), read_stat(vm, "pages_2m"))
            known_bug("B10").expect(seen, (STAMP, 1), shows=(STAMP, 0))
            vm.delete_region(0)
            vm.set_private(GPA, SIZE)
            vm.set_shared(GPA, SIZE)
        assert reserved > 1


@contract("GM-RES-018")
@requires("prefault")
@gmem_kinds("g0", "gM", "gMS")
def test_a_prefault_goes_as_far_as_memory_does(vm: Vm, gmem: GuestMemfd, machine: GuestMachine, sweep: Sweep) -> None:
    """A prefault while memory is short is ENOMEM with gpa and size unchanged, or 0 with the remainder, which then comes."""
    pages = 8
    private = not gmem.flags & GmemFlag.MMAP
    if private and not vm.type.has_private_memory:
        pytest.skip("a gmem without the MMAP flag is prefaulted through private memory only")
    vcpus = iter(range(NO_END))
    places = iter(range(GPA, GPA * NO_END, GPA))

    def fresh() -> tuple[Vcpu, int]:
        # A vCPU whose caches are empty, and an address that no page table leads to.
        gpa = next(places)
        vm.bind(gmem, gpa=gpa)
        if private:
            vm.set_private(gpa, pages * PAGE_SIZE)
        return vm.create_vcpu(next(vcpus)), gpa

    vcpu, gpa = fresh()

    def check(outcome: Outcome[tuple[int | Errno, int, int]]) -> None:
        nonlocal vcpu, gpa
        answer, left_gpa, left = outcome.answer
        assert answer in (OK, Errno.ENOMEM), outcome
        done = pages - left // PAGE_SIZE
        assert left_gpa == gpa + done * PAGE_SIZE, outcome
        assert done > 0 or answer == Errno.ENOMEM, outcome
        assert answer == OK or done == 0, outcome
        assert done <= gmem.allocated_pages() <= done + 1, outcome
        assert vcpu.raw.pre_fault(gpa, pages * PAGE_SIZE)[0] == OK, outcome
        assert gmem.allocated_pages() == pages, outcome
        vcpu.close()
        vm.delete_region(0)
        gmem.punch()
        vcpu, gpa = fresh()

    outcomes = sweep.answers(lambda: vcpu.raw.pre_fault(gpa, pages * PAGE_SIZE), check)
    assert any(outcome.answer[0] == Errno.ENOMEM for outcome in outcomes)
    assert outcomes[-1].answer[0] == OK
    vcpu.close()


@contract("GM-RES-016")
@gmem_kinds("g0", "gMS")
def test_an_allocation_goes_as_far_as_memory_does(gmem: GuestMemfd, sweep: Sweep) -> None:
    """Allocating pages while memory is short is ENOMEM and keeps the pages done so far, or allocates all."""
    pages = 70  # more than one node of the page cache's tree
    length = pages * PAGE_SIZE

    def check(outcome: Outcome[int | Errno]) -> None:
        assert outcome.answer in (OK, Errno.ENOMEM), outcome
        done = gmem.allocated_pages()
        assert done == pages if outcome.answer == OK else done < pages, outcome
        assert gmem.allocated_pages(0, done * PAGE_SIZE or PAGE_SIZE) == done, outcome  # the first ones, without a gap
        gmem.allocate(0, length)
        assert gmem.allocated_pages() == pages, outcome
        gmem.punch()
        assert gmem.allocated_pages() == 0, outcome

    assert failed(sweep.answers(lambda: gmem.raw.allocate(0, length), check)) > 0


@contract("GM-RES-016", "GM-FAL-003")
@gmem_kinds("gM", "gMS")
def test_a_punch_takes_no_memory(running: Running, sweep: Sweep) -> None:
    """Punching a hole frees the pages and takes them from the guest, however short memory is."""
    gmem, cpu = running.gmem, running.cpu
    cpu.stamp(GPA, STAMP, 4)
    for outcome in sweep.over(lambda: gmem.raw.punch(0, 3 * PAGE_SIZE)):
        assert outcome.answer == OK, outcome
        assert gmem.allocated_pages() == 1, outcome
        assert [cpu.load(GPA + page * PAGE_SIZE) for page in range(4)] == [0, 0, 0, STAMP + 3], outcome
        cpu.stamp(GPA, STAMP, 4)


@contract("GM-RES-017")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_mapping_comes_whole_or_not_at_all(gmem: GuestMemfd, sweep: Sweep) -> None:
    """Mapping a gmem while memory is short is ENOMEM and maps nothing, or maps it."""
    maps = Path("/proc/self/maps")

    def check(outcome: Outcome[Mapping | Errno]) -> None:
        if isinstance(outcome.answer, Mapping):
            with outcome.answer as made:
                made.store(STAMP)
                assert made.load() == STAMP
        else:
            assert outcome.answer == Errno.ENOMEM, outcome
        assert "kvm-gmem" not in maps.read_text(), outcome

    assert failed(sweep.answers(gmem.raw.map, check)) > 0


@contract("GM-RES-017")
@vm_types("default")
@gmem_kinds("gMS")
@pytest.mark.parametrize("write", [False, True], ids=["load", "store"])
def test_a_host_access_waits_for_memory(gmem: GuestMemfd, sweep: Sweep, write: bool) -> None:
    """A host's access to a gmem page while memory is short is tried again until it has its page, without a signal.

    The fault is VM_FAULT_OOM (guest_memfd.c:kvm_gmem_fault_user_mapping), which the processor's fault handler takes to the
    OOM killer, and goes back to the instruction (mm/oom_kill.c:pagefault_out_of_memory).
    """
    with gmem.map() as neighbour:
        neighbour.store(STAMP, PAGE_SIZE)
        mapping = gmem.map()  # each time a new one, which has no page tables yet

        def access() -> object:
            return mapping.try_store(STAMP) if write else mapping.try_load()

        injected = 0
        for outcome in sweep.over(access):
            assert outcome.answer == (None if write else 0), outcome
            assert mapping.load() == (STAMP if write else 0), outcome
            assert (gmem.allocated_pages(), mapping.load(PAGE_SIZE)) == (2, STAMP), outcome
            injected += outcome.injected
            mapping.unmap()
            gmem.punch(0, PAGE_SIZE)
            mapping = gmem.map()
        mapping.unmap()
    assert injected > 0


@pytest.fixture
def room_for_page_tables(vm: Vm) -> Iterator[None]:
    """A slot that is only there to be large.

    With shadow paging, KVM keeps one page table for 50 pages of slots, and 64 at least. A vCPU that has run keeps its root
    until it runs again: some sixty of them leave no room for the tables of the next, whose KVM_RUN then makes and drops the
    same ones for ever (arch/x86/kvm/mmu/mmu.c:make_mmu_pages_available(); seen on 7.3.4 with npt=0).
    """
    with Mapping.anonymous(64 * MiB) as memory:
        region = MemoryRegion(1, GPA // 2, memory.length, memory.address)
        vm.set_region(region)
        yield
        vm.delete_region(region.slot)


@contract("GM-RUN-044")
@gmem_kinds("g0", "gM", "gMS")
def test_a_guest_access_fails_for_once_and_is_tried_again(
    vm: Vm, gmem: GuestMemfd, machine: GuestMachine, sweep: Sweep, room_for_page_tables: None
) -> None:
    """A guest's access to gmem while memory is short is ENOMEM, whatever exit_reason says, and the next KVM_RUN makes it."""
    private = not gmem.flags & GmemFlag.MMAP
    if private and not vm.type.has_private_memory:
        pytest.skip("a guest reaches a gmem without the MMAP flag through private memory only")
    ids, places = iter(range(NO_END)), iter(range(GPA, GPA * NO_END, GPA))
    errors, exits = 0, set()

    def fresh() -> GuestCpu:
        # A vCPU whose caches are empty, and an address that no page table of the host's leads to.
        cpu, gpa = machine.cpu(next(ids)), next(places)
        vm.bind(gmem, gpa=gpa)
        if private:
            vm.set_private(gpa, PAGE_SIZE)
        machine.map(VIRTUAL, gpa)
        _ = cpu.vcpu.kvm_run
        cpu.start("store8", rdi=VIRTUAL, rsi=STAMP)
        return cpu

    def store() -> RunResult:
        return cpu.run()

    cpu = fresh()
    for outcome in sweep.over(store):
        result = outcome.answer
        if result.answer == Errno.ENOMEM:
            errors += 1
            exits.add(type(result.exit))
            assert gmem.allocated_pages() <= 1, outcome
            result = cpu.run()
        assert result.answer == OK, outcome
        assert is_report(result), outcome
        assert gmem.allocated_pages() == 1, outcome
        assert cpu.load(VIRTUAL) == STAMP, outcome
        cpu.close()
        vm.delete_region(0)
        gmem.punch()
        cpu = fresh()
    cpu.close()
    assert not outcome.injected
    assert errors > 0
    # Of the many allocations, those of page tables first, not all are tried one by one, and the page's is a single one.
    assert MemoryFaultExit in exits or sweep.memory.shortage is Shortage.MOMENTARY


LEAKS = DEBUGFS / "kmemleak"
TOO_YOUNG = 5.0
"""kmemleak does not report what was allocated in the last seconds (mm/kmemleak.c: MSECS_MIN_AGE)."""


def suspects() -> str:
    """What the kernel points to no more, after two scans: a first one only remembers what objects look like."""
    for _ in range(2):
        LEAKS.write_text("scan")
    return LEAKS.read_text()


@contract("C20", "GM-RES-014")
@requires("kmemleak")
@would_show("B29")
@test_timeout(120)
@gmem_kinds("gM")
def test_what_failed_leaks_no_memory(kvm: Kvm, vm: Vm, gmem_kind: GmemFlag, request: pytest.FixtureRequest) -> None:
    """Of what a call had allocated when memory ran out, nothing stays: kmemleak finds no object without an owner."""
    _ = kvm.vcpu_mmap_size
    with suppress(OSError):
        suspects()
        LEAKS.write_text("clear")
    for shortage in Shortage:
        with MemoryShortage(shortage) as memory, kvm.create_vm(vm.type) as one:
            sweep = Sweep(memory, float(request.config.getoption("--effort")))
            for call, take_back in every_call(kvm, one, gmem_kind):
                for outcome in sweep.over(call):
                    if isinstance(outcome.answer, (Vm, GuestMemfd, Vcpu)):
                        outcome.answer.close()
                    elif isinstance(outcome.answer, Mapping):
                        outcome.answer.unmap()
                    take_back()
    finished = time.monotonic()
    wait_until(lambda: time.monotonic() > finished + TOO_YOUNG + 1, "what leaked is old enough", TOO_YOUNG + 5)
    assert suspects() == ""


Call = Callable[[], object]


def every_call(kvm: Kvm, vm: Vm, gmem_kind: GmemFlag) -> Iterator[tuple[Call, Call]]:
    """The calls that allocate what stays, and what takes it back, but for descriptors and mappings."""

    def nothing() -> None:
        """Closing it is enough."""

    ids = iter(range(NO_END))
    yield partial(kvm.raw.create_vm, vm.type), nothing
    yield partial(vm.raw.create_guest_memfd, SIZE, gmem_kind), nothing
    yield lambda: vm.raw.create_vcpu(next(ids)), nothing
    with vm.create_guest_memfd(SIZE, gmem_kind) as gmem, Mapping.anonymous(SIZE) as plain:
        delete = partial(vm.raw.delete_region, 0)
        yield partial(vm.raw.set_region, MemoryRegion(0, GPA, SIZE, gmem=gmem)), delete
        yield partial(vm.raw.set_region, MemoryRegion(0, GPA, SIZE, plain.address, flags=MemFlag.LOG_DIRTY)), delete
        yield gmem.raw.map, nothing
        yield partial(gmem.raw.allocate, 0, SIZE), gmem.punch
    if vm.type.has_private_memory:
        yield partial(vm.raw.set_attributes, GPA, SIZE, PRIVATE), partial(vm.raw.set_attributes, GPA, SIZE, 0)
