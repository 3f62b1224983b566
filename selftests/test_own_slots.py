"""GM-OWN: many files and many slots, each page bound once at most, all of a binding or nothing (C16 to C21)."""

import contextlib
import random
from typing import Any

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, MemFlag, MiB
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.testing import (
    contract,
    disruptive,
    gmem_kinds,
    known_bug,
    makes_gmem,
    requires,
)
from kvmgmem.testing.dead_slots import is_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Bound, Running
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001

ELSEWHERE = 0x2_0000_0000  # guest memory that no other slot of these tests uses

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


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
    count = max(8, min(512, int(16 * effort)))
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
@makes_gmem()
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
