"""GM-RACE: slots that are made, bound, deleted and made again while vCPUs run, descriptors close and mappings change."""

import os
from contextlib import closing
from functools import partial

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, GiB, MemFlag
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import MmioExit
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import ChildProcess
from kvmgmem.testing import contract, disruptive, gmem_kinds, known_bug, vm_types, would_show
from kvmgmem.testing.dead_slots import assert_dead, is_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.storm import Resident, Storm, patrol
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001
OTHER = 0x0DD5_0000_0000_0002
ELSEWHERE = GPA + GiB
PAGES = 8
SPAN = PAGES * PAGE_SIZE

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Storm:
    """How long to rage."""
    return Storm.of(request)


def store_same(cpu: GuestCpu, gpa: int, value: int, pages: int = PAGES) -> None:
    """Let the guest write one value to the start of each page."""
    for page in range(pages):
        cpu.store(gpa + page * PAGE_SIZE, value)


@contract("GM-RACE-004")
@guest_reaches
def test_a_guest_whose_slot_goes_and_comes_sees_data_or_mmio(running: Running, storm: Storm) -> None:
    """While a slot is deleted and bound to other pages under a running guest, it reads old data, new data, or MMIO."""
    vm, cpu, region = running.vm, running.cpu, running.region.but(size=SPAN)
    shifted = region.but(gmem_offset=SPAN)
    vm.delete_region(0)
    for request, value in ((region, STAMP), (shifted, OTHER)):
        vm.set_region(request)
        store_same(cpu, GPA, value)
        vm.delete_region(0)

    def rebind() -> None:
        for request in (region, shifted):
            vm.set_region(request)
            vm.delete_region(0)

    patrol(cpu, GPA, PAGES, STAMP, OTHER, write=False)
    with Resident(cpu) as guest:
        storm.rage(rebind)
        assert guest.inside, guest
    assert cpu.registers().rcx > PAGES
    vm.set_region(shifted)
    result = cpu.try_load(GPA)
    if not known_bug("B19").shows_if(isinstance(result.exit, MmioExit)):
        assert cpu.finish(result).rax == OTHER
        assert cpu.first_not(OTHER, GPA, PAGES) is None
    assert running.gmem.allocated_pages() == 2 * PAGES


@contract("GM-RACE-007")
@guest_reaches
def test_a_bind_beside_the_last_close_is_ebadf_or_a_dead_slot(vm: Vm, cpu: GuestCpu, gmem_kind: int, storm: Storm) -> None:
    """Binding a number while its last descriptor is closed is EBADF and no slot, or a slot that is dead right after it."""
    for _ in storm.rounds(4):
        gmem = vm.create_guest_memfd(SIZE, gmem_kind)
        number = gmem.fileno()
        request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=number)
        answer, _ = storm.clash(partial(vm.raw.set_region, request), gmem.close)
        assert answer in (OK, Errno.EBADF)
        result = cpu.try_load(GPA)
        if answer == OK:
            assert is_dead(result, GPA), result
            assert vm.raw.delete_region(0) == OK
        else:
            assert isinstance(result.exit, MmioExit), result
            cpu.finish(cpu.answer_mmio(0))
            assert vm.raw.delete_region(0) == Errno.EINVAL
        assert vm.raw.set_region(request) == Errno.EBADF


@contract("GM-RACE-008")
@guest_reaches
def test_of_two_binds_of_overlapping_pages_exactly_one_wins(running: Running, storm: Storm) -> None:
    """When two threads bind overlapping ranges of a file exactly one succeeds, the other gets EEXIST and makes no slot."""
    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    cpu.stamp(GPA, STAMP, 12)
    vm.delete_region(0)
    requests = [
        MemoryRegion(slot=1, gpa=GPA, size=SPAN, gmem=gmem, gmem_offset=0),
        MemoryRegion(slot=2, gpa=ELSEWHERE, size=SPAN, gmem=gmem, gmem_offset=4 * PAGE_SIZE),
    ]
    for _ in storm.rounds(4):
        answers: list[Answer] = storm.clash(*[partial(vm.raw.set_region, request) for request in requests])
        assert answers.count(OK) == 1
        loser, winner = answers.index(OK) ^ 1, answers.index(OK)
        known_bug("B14").expect(answers[loser], Errno.EEXIST, shows=Errno.EINVAL)
        won = requests[winner]
        assert cpu.first_unstamped(won.gpa, STAMP + won.gmem_offset // PAGE_SIZE, PAGES) is None
        assert vm.raw.delete_region(requests[loser].slot) == Errno.EINVAL
        assert vm.raw.delete_region(won.slot) == OK
        assert vm.raw.set_region(requests[loser]) == OK
        vm.delete_region(requests[loser].slot)
    assert gmem.allocated_pages() == 12


@contract("GM-RACE-009", "GM-RACE-003", "C24")
@disruptive()
@guest_reaches
@would_show("B8")
def test_a_slot_and_a_long_punch_of_its_pages_take_turns(vm: Vm, cpu: GuestCpu, gmem_kind: int, storm: Storm) -> None:
    """A slot made or deleted while many pages of it are punched comes before or after all of that, never in between.

    A punch announces at its beginning and at its end what it takes from guests. A slot that was not there at both leaves
    KVM with a wrong count: the VM is ended (kvm_mmu_invalidate_end), or its guests never get the pages.
    """
    pages = 2048
    with vm.create_guest_memfd(pages * PAGE_SIZE, gmem_kind) as gmem:
        request = MemoryRegion(slot=0, gpa=GPA, size=gmem.size, gmem=gmem)
        for _ in storm.rounds(4):
            for change in (partial(vm.raw.set_region, request), partial(vm.raw.delete_region, 0)):
                gmem.allocate()
                assert storm.clash(partial(gmem.raw.punch, 0, gmem.size), change) == [OK, OK]
                assert gmem.allocated_pages() == 0
        vm.set_region(request)
        store_same(cpu, GPA, STAMP)
        assert cpu.first_not(STAMP, GPA, PAGES) is None
        assert gmem.allocated_pages() == PAGES


@contract("GM-RACE-014", "GM-RACE-005", "GM-RACE-007")
@vm_types("default")
@gmem_kinds("gM")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_end_of_a_sharing_process_beside_a_bind(vm: Vm, cpu: GuestCpu, gmem_kind: int, end: str, storm: Storm) -> None:
    """While the owner binds and closes a gmem and a process that shares it ends, a guest reads it, MMIO or a dead slot."""
    for _ in storm.rounds():
        gmem = vm.create_guest_memfd(SIZE, gmem_kind)
        request = vm.bind(gmem, gpa=GPA, size=SPAN)
        store_same(cpu, GPA, STAMP)
        vm.delete_region(0)
        with ChildProcess(lambda channel: channel.receive()) as child:
            # A fork has a copy of the gmem and is ready when it has one: at once.
            def bind_and_close(gmem: GuestMemfd = gmem, request: MemoryRegion = request) -> Answer:
                answer = vm.raw.set_region(request)
                gmem.close()
                return answer

            def let_go(child: ChildProcess = child) -> None:
                if end == "exit":
                    child.send()
                else:
                    child.kill()
                child.wait()

            patrol(cpu, GPA, PAGES, STAMP, write=False)
            with Resident(cpu) as guest:
                answer, _ = storm.clash(bind_and_close, let_go)
                assert answer == OK
                result = guest.wait_out()
        assert any(is_dead(result, GPA + page * PAGE_SIZE) for page in range(PAGES)), guest
        assert_dead(cpu, GPA)
        assert vm.raw.delete_region(0) == OK


@contract("GM-RACE-016")
@guest_reaches
def test_slots_elsewhere_leave_running_guests_alone(running: Running, storm: Storm) -> None:
    """Slots made and deleted elsewhere, plain ones and gmem ones of the same file, change nothing for guests on a slot."""
    vm, gmem, region = running.vm, running.gmem, running.region
    vm.delete_region(0)
    vm.set_region(region.but(size=SPAN))
    store_same(running.cpu, GPA, STAMP)
    with closing(running.machine.cpu(1)) as second, Mapping.anonymous(SPAN) as memory:

        def plain() -> None:
            vm.set_region(MemoryRegion(slot=1, gpa=ELSEWHERE, size=SPAN, hva=memory.address))
            vm.delete_region(1)

        def beside() -> None:
            vm.set_region(region.but(slot=2, gpa=GPA + SPAN, size=SPAN, gmem_offset=SPAN))
            vm.delete_region(2)

        for cpu in (running.cpu, second):
            cpu.start("watch", rdi=GPA + (0 if cpu is second else SPAN - PAGE_SIZE), rsi=STAMP, rdx=STAMP)
        with Resident(running.cpu) as one, Resident(second) as two:
            storm.rage(plain, beside)
            assert one.inside, one
            assert two.inside, two
        assert (one.mmio_exits, two.mmio_exits) == (0, 0)
        assert second.first_not(STAMP, GPA, PAGES) is None
        assert running.cpu.registers().rcx > 0
    assert gmem.allocated_pages() == PAGES


@contract("GM-RACE-019")
def test_slot_changes_end_beside_endless_changes_of_the_mapping(
    vm: Vm, machine: GuestMachine, cpu: GuestCpu, storm: Storm
) -> None:
    """Slots are made, changed and deleted in bounded time while their memory is remapped without end, and nothing is lost.

    Such changes hold KVM's list of slots (km:kvm_swap_active_memslots waits for the invalidations under way).
    """
    with OwnedFd(os.memfd_create("backing")) as file:
        os.truncate(file.fileno(), SPAN)
        with Mapping.of(file, SPAN) as memory, closing(machine.cpu(1)) as second:
            for page in range(PAGES):
                memory.store(STAMP, page * PAGE_SIZE)
            kept = MemoryRegion(slot=1, gpa=GPA, size=SPAN, hva=memory.address)
            vm.set_region(kept)

            def drop() -> None:
                memory.advise(Advice.DONTNEED)

            def forbid_writes() -> None:
                memory.protect(1)
                memory.protect(3)

            def change() -> None:
                vm.set_region(kept.but(flags=MemFlag.LOG_DIRTY))
                vm.set_region(kept.but(slot=2, gpa=ELSEWHERE))
                vm.set_region(kept)
                vm.delete_region(2)

            cpu.start("watch", rdi=GPA, rsi=STAMP, rdx=STAMP)
            patrol(second, ELSEWHERE, PAGES, STAMP, write=False)
            with Resident(cpu) as guest, Resident(second) as elsewhere:
                counts = storm.rage(drop, forbid_writes, change)
                assert guest.inside, guest
                assert elsewhere.inside, elsewhere
            assert min(counts) > 1
            assert guest.mmio_exits == 0
            assert cpu.first_not(STAMP, GPA, PAGES) is None
            vm.set_region(kept.but(slot=2, gpa=ELSEWHERE))
            if not known_bug("B19").shows_if(isinstance(second.try_load(ELSEWHERE).exit, MmioExit)):
                assert second.first_not(STAMP, ELSEWHERE, PAGES) is None
