"""GM-OWN: fresh pages are zero, a punch is seen in every view, and no other VM sees the data (C22, C23, C30)."""

import mmap

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, GmemFlag, MiB
from kvmgmem.errors import Errno
from kvmgmem.exits import MmioExit
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    requires,
    vm_types,
)
from kvmgmem.testing.descriptor_copies import COPIES
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.meminfo import meminfo

STAMP = 0x5EED_0000_0000_0001

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@contract("C22", "C30")
@guest_reaches
def test_fresh_pages_are_zero_and_stay(running: Running, effort: float) -> None:
    """A page is zero when guest or host first touch it, whatever the machine's memory held, and is not zeroed again.

    fallocate gives pages to the file without touching those it has.
    """
    gmem, cpu, pages = running.gmem, running.cpu, running.gmem.pages
    with Mapping.anonymous(int(min(8 * MiB * effort, meminfo("MemAvailable") // 4)) & -PAGE_SIZE) as dirt:
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
