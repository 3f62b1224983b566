"""GM-RACE: the ends of a guest_memfd, its slots, its vCPUs and its VM, all at nearly the same time."""

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, GmemFlag
from kvmgmem.arch.x86_64 import GuestCpu, is_report
from kvmgmem.entry import ioctl_struct
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.testing import contract, disruptive, gmem_kinds, requires, vm_types, wait_until, would_show
from kvmgmem.testing.dead_slots import assert_dead, is_dead
from kvmgmem.testing.descriptor_limit import no_descriptors
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.storm import Resident, Storm, patrol
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001
PAGES = 16
SPAN = PAGES * PAGE_SIZE
FAR_AWAY = 1 << 44  # guest addresses without slots

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Storm:
    """How long to rage."""
    return Storm.of(request)


@contract("GM-RACE-005")
@guest_reaches
def test_a_guest_beside_the_last_close_reads_data_or_leaves(vm: Vm, cpu: GuestCpu, gmem_kind: int, storm: Storm) -> None:
    """A guest that reads and writes a gmem while its last reference goes leaves with EFAULT and the fault's page, once."""
    for number in storm.rounds(4):
        with vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA, size=SPAN)
            patrol(cpu, GPA, PAGES, STAMP)
            with Resident(cpu) as guest:
                # In turn: a guest that only reads mapped pages, and one that is busy getting them.
                if number % 2:
                    storm.clash(gmem.close)
                else:
                    storm.clash(partial(gmem.punch, 0, SPAN), partial(gmem.allocate, 0, SPAN))
                    assert guest.inside, guest
                    gmem.close()
                result = guest.wait_out()
        assert any(is_dead(result, GPA + page * PAGE_SIZE) for page in range(PAGES)), guest
        assert guest.mmio_exits == 0
        assert_dead(cpu, GPA)
        vm.delete_region(0)


@contract("GM-RACE-005", "GM-LIFE-004", "C9")
@vm_types("sw-protected")
@gmem_kinds("g0", "gM")
def test_a_gmem_is_dead_as_soon_as_its_end_has_begun(vm: Vm, cpu: GuestCpu, gmem_kind: GmemFlag, storm: Storm) -> None:
    """Once the last reference is gone a guest finds the slot dead, also while the end of the file waits for its turn.

    It waits for the lock of the slots, which a long conversion of other memory holds (GM-ATTR-017).
    """
    private = not gmem_kind & GmemFlag.MMAP
    if private:
        vm.set_private(GPA, SIZE)
    for pages in (1 << shift for shift in range(15, 21)):
        gmem = vm.create_guest_memfd(SIZE, gmem_kind)
        vm.bind(gmem, gpa=GPA)
        descriptor = Path(f"/proc/self/fd/{gmem.fileno()}")
        begun, over = threading.Event(), threading.Event()

        def convert(pages: int = pages, begun: threading.Event = begun) -> None:
            begun.set()
            vm.set_private(FAR_AWAY, pages * PAGE_SIZE)

        def close(gmem: GuestMemfd = gmem, begun: threading.Event = begun, over: threading.Event = over) -> None:
            begun.wait()
            gmem.close()
            over.set()

        def touch(descriptor: Path = descriptor, over: threading.Event = over) -> tuple[RunResult, bool]:
            wait_until(lambda: not descriptor.exists(), "the descriptor is gone")
            return cpu.try_load(GPA), over.is_set()

        _, _, (result, late) = storm.clash(convert, close, touch)
        # A report: that was too early, for the descriptor is gone a moment before its reference.
        early = is_report(result)
        assert early or is_dead(result, GPA, private=private)
        assert_dead(cpu, GPA, private=private)
        vm.delete_region(0)
        vm.set_shared(FAR_AWAY, pages * PAGE_SIZE)
        if not (early or late):
            break
    else:
        pytest.skip("no access met a file whose end had begun and was not over, however long the conversion beside it")


@contract("GM-RACE-006")
@disruptive()
@guest_reaches
@would_show("B2")
def test_a_delete_beside_the_last_close_leaves_slot_and_range_free(
    vm: Vm, cpu: GuestCpu, gmem_kind: int, storm: Storm
) -> None:
    """Deleting a slot while its gmem's last reference goes succeeds, and what comes after at its place is all new."""
    for _ in storm.rounds(4):
        gmem = vm.create_guest_memfd(SIZE, gmem_kind)
        vm.bind(gmem, gpa=GPA)
        cpu.store(GPA, STAMP)
        assert storm.clash(partial(vm.raw.delete_region, 0), gmem.close)[0] == OK
        assert vm.raw.delete_region(0) == Errno.EINVAL
        with vm.create_guest_memfd(SIZE, gmem_kind) as fresh:
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=fresh)) == OK
            assert (cpu.load(GPA), fresh.allocated_pages()) == (0, 1)
            vm.delete_region(0)
            # So is each of two slots of one file, unbound at the same time.
            quarter = SIZE // 4
            requests = [
                MemoryRegion(slot=index, gpa=GPA + index * SIZE, size=quarter, gmem=fresh, gmem_offset=index * quarter)
                for index in (0, 1)
            ]
            for request in requests:
                assert vm.raw.set_region(request) == OK
            assert storm.clash(*[partial(vm.raw.delete_region, request.slot) for request in requests]) == [OK, OK]
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=fresh)) == OK
            vm.delete_region(0)


@contract("GM-RACE-013")
@requires("debugfs")
@gmem_kinds("g0", "gM")
def test_vm_dies_once_however_its_descriptors_close(kvm: Kvm, vm: Vm, gmem_kind: int, storm: Storm) -> None:
    """With VM, gmem and vCPU closed by three threads at once, the VM is there until the last of them, and then gone."""
    for number in storm.rounds(4):
        one = kvm.create_vm(vm.type)
        directory = VmDirectory.of(one)
        gmem, vcpu = one.create_guest_memfd(SIZE, gmem_kind), one.create_vcpu()
        _ = vcpu.kvm_run
        one.bind(gmem, gpa=GPA)
        parts = [one.close, gmem.close, vcpu.close]
        # Either all three at once, or one of them alone at the end.
        last = parts.pop(number % 4) if number % 4 < 3 else None
        storm.clash(*parts)
        if last is not None:
            assert directory.exists
            last()
        directory.wait_gone()


def _create_by_number(number: int, size: int, flags: int) -> GuestMemfd | Errno:
    """KVM_CREATE_GUEST_MEMFD on a descriptor that may be closed: a `Vm` would refuse before the kernel could."""
    request = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags})
    answer = ioctl_struct(number, lib.KVM_CREATE_GUEST_MEMFD, request)
    return answer if isinstance(answer, Errno) else GuestMemfd(answer, size, flags)


@contract("GM-RACE-020")
@requires("debugfs")
@gmem_kinds("g0", "gMS")
def test_a_gmem_beside_the_death_of_its_vm_comes_whole_or_not_at_all(
    kvm: Kvm, vm: Vm, gmem_kind: GmemFlag, storm: Storm
) -> None:
    """Creating a gmem while its VM's descriptor is closed is EBADF, or makes a gmem that keeps the VM and works."""
    for _ in storm.rounds(4):
        one = kvm.create_vm(vm.type)
        directory = VmDirectory.of(one)
        made, _ = storm.clash(partial(_create_by_number, one.fileno(), SIZE, gmem_kind), one.close)
        if isinstance(made, GuestMemfd):
            with made:
                assert directory.exists
                made.allocate()
                assert made.allocated_pages() == made.pages
        else:
            assert made == Errno.EBADF
        directory.wait_gone()


@contract("GM-RACE-020")
@gmem_kinds("g0", "gMS")
def test_a_gmem_beside_the_descriptor_limit_comes_whole_or_not_at_all(vm: Vm, gmem_kind: GmemFlag, storm: Storm) -> None:
    """Creating gmems while the limit on descriptors comes and goes is EMFILE or a new gmem, and nothing is left behind."""
    answers: set[Answer] = set()
    open_before = sorted(os.listdir("/proc/self/fd"))

    def limit() -> None:
        with no_descriptors():
            made = vm.raw.create_guest_memfd(SIZE, gmem_kind)
            assert made == Errno.EMFILE

    def create() -> None:
        made = vm.raw.create_guest_memfd(SIZE, gmem_kind)
        if isinstance(made, GuestMemfd):
            with made:
                made.allocate(0, PAGE_SIZE)
                assert made.allocated_pages() == 1
                answers.add(OK)
        else:
            answers.add(made)

    counts = storm.rage(limit, create)
    create()
    assert OK in answers
    assert answers <= {OK, Errno.EMFILE}
    assert sum(counts) > 0
    assert sorted(os.listdir("/proc/self/fd")) == open_before
