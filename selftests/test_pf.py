"""GM-PF: prefaulting guest memory (KVM_PRE_FAULT_MEMORY)."""

import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GiB, GmemFlag, MemFlag, MiB, VmType
from kvmgmem.arch.x86_64 import GuestCpu, max_gpa_bits
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import IoExit, decode
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires, vm_types, wait_until
from kvmgmem.testing.dead_slots import memory_fault
from kvmgmem.testing.encryption import sev_device, sev_init, snp_launch_finish, snp_launch_start, tdx_command, tdx_init
from kvmgmem.testing.fixtures import GPA, SIZE, Bound, Running
from kvmgmem.testing.interruption import within
from kvmgmem.testing.nested_svm import EFER_SVME, KVM_SET_NESTED_STATE, NOT_NESTED, nested_state
from kvmgmem.testing.pending_signal import in_child_with_signal_pending
from kvmgmem.testing.stats import read_stats
from kvmgmem.testing.waiting import TIME_SCALE
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
FILLER = 0xEE
FILLED = 0xEEEE_EEEE_EEEE_EEEE
TOP = (1 << 64) - PAGE_SIZE  # the last page of the address space
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15

# A gmem without the MMAP flag serves private memory only; the tests that take `reachable` make it so.
reachable_kinds = gmem_kinds("g0", "gM", "gMS")
private_memory = vm_types("sw-protected")


@pytest.fixture
def reachable(bound: Bound) -> Bound:
    """A bound gmem whose slot guests reach: all of it is private where the file has no MMAP flag."""
    if not bound.gmem.flags & GmemFlag.MMAP:
        if not bound.vm.type.has_private_memory:
            pytest.fail("a default VM never reaches a gmem without MMAP: restrict the kinds of this test")
        bound.vm.set_private(GPA, bound.gmem.size)
    return bound


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    """A vCPU as it was made, for those who do not run it."""
    with vm.create_vcpu() as vcpu:
        yield vcpu


@contextmanager
def plain_slot(vm: Vm, size: int, *, gpa: int = GPA, slot: int = 1, flags: int = 0, fill: bool = False) -> Iterator[Mapping]:
    """A slot of anonymous memory that is never backed by huge pages."""
    with Mapping.anonymous(size) as memory:
        assert memory.advise(MADV_NOHUGEPAGE) == OK
        if fill:
            memory.fill(FILLER)
        vm.set_region(MemoryRegion(slot, gpa, size, memory.address, flags=flags))
        yield memory


@contract("GM-PF-001")
@requires("x86")
def test_flags_are_refused_before_anything_else(vm: Vm, vcpu: Vcpu, host: Host) -> None:
    """Every flag bit is EINVAL and leaves the range as it was, whatever else the request would have answered."""
    with plain_slot(vm, SIZE):
        accepted = vcpu.raw.pre_fault(GPA, PAGE_SIZE)
        assert accepted == ((OK, GPA + PAGE_SIZE, 0) if host.caps["PRE_FAULT_MEMORY"] else (Errno.ENOTSUP, GPA, PAGE_SIZE))
        for bit in range(64):
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE, 1 << bit) == (Errno.EINVAL, GPA, PAGE_SIZE)
        hole = vcpu.raw.pre_fault(2 * GPA, PAGE_SIZE)
        assert hole[0] == (Errno.ENOENT if host.caps["PRE_FAULT_MEMORY"] else Errno.ENOTSUP)
        assert vcpu.raw.pre_fault(2 * GPA, PAGE_SIZE, 1) == (Errno.EINVAL, 2 * GPA, PAGE_SIZE)


@contract("GM-PF-002")
@requires("x86")
def test_empty_unaligned_and_wrapping_ranges_are_refused(vm: Vm, vcpu: Vcpu, host: Host) -> None:
    """A size of 0, an unaligned address or size, and a range that ends at 2^64 or wraps are EINVAL and change nothing."""
    with plain_slot(vm, SIZE):
        accepted = OK if host.caps["PRE_FAULT_MEMORY"] else Errno.ENOTSUP
        absent = Errno.ENOENT if host.caps["PRE_FAULT_MEMORY"] else Errno.ENOTSUP
        assert vcpu.raw.pre_fault(GPA, 2 * PAGE_SIZE)[0] == accepted
        assert vcpu.raw.pre_fault(TOP - PAGE_SIZE, PAGE_SIZE)[0] == absent
        refused = [(GPA, 0), (TOP, PAGE_SIZE), (TOP - PAGE_SIZE, 2 * PAGE_SIZE), (GPA, TOP), (TOP, TOP), (0, 0)]
        for odd in (1, 512, PAGE_SIZE - 1):
            refused += [(GPA + odd, PAGE_SIZE), (GPA, PAGE_SIZE + odd), (GPA, odd), (GPA + odd, PAGE_SIZE - odd)]
        for gpa, size in refused:
            assert vcpu.raw.pre_fault(gpa, size) == (Errno.EINVAL, gpa, size)


@contract("GM-PF-003")
@requires("prefault")
@gmem_kinds("gM")
def test_the_padding_is_not_looked_at(reachable: Bound, vcpu: Vcpu) -> None:
    """Whatever stands in the padding of the request, it is served, and the padding comes back as it was."""
    padding = [0xDEAD_BEEF + word for word in range(5)]
    for page, words in enumerate(([0] * 5, padding)):
        request = ffi.new(
            "struct kvm_pre_fault_memory *", {"gpa": GPA + page * PAGE_SIZE, "size": PAGE_SIZE, "padding": words}
        )
        assert vcpu.raw.ioctl_struct(lib.KVM_PRE_FAULT_MEMORY, request) == OK
        assert (request.size, list(request.padding)) == (0, words)
        assert reachable.gmem.allocated_pages() == page + 1


@contract("GM-PF-004")
@requires("x86", "shadow")
@gmem_kinds("gM")
def test_shadow_paging_cannot_prefault(bound: Bound, cpu: GuestCpu) -> None:
    """With shadow paging the capability is 0 and the ioctl EOPNOTSUPP, before and after the vCPU has run; no page comes."""
    assert bound.vm.check_extension(Cap.PRE_FAULT_MEMORY) == 0
    assert cpu.vcpu.raw.pre_fault(GPA, SIZE) == (Errno.ENOTSUP, GPA, SIZE)
    cpu.store(GPA, STAMP)
    assert cpu.vcpu.raw.pre_fault(GPA, SIZE) == (Errno.ENOTSUP, GPA, SIZE)
    assert bound.gmem.allocated_pages() == 1


@contract("GM-PF-005")
@vm_types("default")
@requires("prefault", "nested-svm")
@gmem_kinds("gMS")
def test_a_nested_guest_with_page_tables_of_its_own_cannot_prefault(running: Running) -> None:
    """While a vCPU is in a nested guest with nested paging, prefaulting is EOPNOTSUPP, and works again when it has left."""
    vcpu, gmem = running.cpu.vcpu, running.gmem
    answer, sregs = vcpu.raw.get_sregs()
    assert answer == OK
    sregs.efer |= EFER_SVME
    assert vcpu.raw.set_sregs(sregs) == OK

    def set_nested(state: bytes) -> Answer:
        return vcpu.raw.ioctl_struct(KVM_SET_NESTED_STATE, ffi.new("char[]", state))

    states = {
        "not nested": (NOT_NESTED, OK),
        "nested, without nested paging": (nested_state(running.machine, nested_paging=False), OK),
        "nested paging": (nested_state(running.machine, nested_paging=True), Errno.ENOTSUP),
        "left": (NOT_NESTED, OK),
    }
    assert running.vm.check_extension(Cap.PRE_FAULT_MEMORY) == 1
    for page, (name, (state, wanted)) in enumerate(states.items()):
        assert set_nested(state) == OK, name
        assert vcpu.raw.pre_fault(GPA + page * PAGE_SIZE, PAGE_SIZE)[0] == wanted, name
        assert gmem.allocated_pages(page * PAGE_SIZE, PAGE_SIZE) == (wanted == OK), name


@contract("GM-PF-006")
@requires("snp", "root")
def test_an_snp_vm_prefaults_once_it_is_finished(kvm: Kvm) -> None:
    """An SNP VM cannot prefault before KVM_SEV_SNP_LAUNCH_FINISH (EOPNOTSUPP), and can from then on."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SNP) as vm,
        vm.create_guest_memfd(SIZE, GmemFlag.MMAP) as gmem,
    ):
        assert sev_init(vm, device) == OK
        vm.bind(gmem, gpa=GPA)
        vm.set_private(GPA, SIZE)
        with vm.create_vcpu() as vcpu:
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (Errno.ENOTSUP, GPA, PAGE_SIZE)
            assert snp_launch_start(vm, device) == OK
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (Errno.ENOTSUP, GPA, PAGE_SIZE)
            assert gmem.allocated_pages() == 0
            assert snp_launch_finish(vm, device) == OK
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
            assert gmem.allocated_pages() == 1


@contract("GM-PF-006")
@requires("tdx")
def test_a_tdx_vm_prefaults_once_it_is_finalised(kvm: Kvm) -> None:
    """A TDX VM cannot prefault before KVM_TDX_FINALIZE_VM (EOPNOTSUPP), and can from then on."""
    with kvm.create_vm(VmType.TDX) as vm, vm.create_guest_memfd(SIZE) as gmem:
        assert tdx_init(vm) == OK
        vm.bind(gmem, gpa=GPA)
        vm.set_private(GPA, SIZE)
        with vm.create_vcpu() as vcpu:
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (Errno.ENOTSUP, GPA, PAGE_SIZE)
            assert tdx_command(vcpu, lib.KVM_TDX_INIT_VCPU) == OK
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (Errno.ENOTSUP, GPA, PAGE_SIZE)
            assert gmem.allocated_pages() == 0
            assert tdx_command(vm, lib.KVM_TDX_FINALIZE_VM) == OK
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
            assert gmem.allocated_pages() == 1


@contract("GM-PF-007", "GM-PF-011")
@vm_types("default")
@requires("prefault")
@gmem_kinds("gM", "gMS")
def test_a_whole_range_is_prefaulted(reachable: Bound, vcpu: Vcpu) -> None:
    """Where all of a range is memory, its prefault answers 0 with nothing left, and has allocated exactly its pages."""
    assert_whole_range(reachable, vcpu)


@contract("GM-PF-007", "GM-PF-011")
@private_memory
@requires("prefault")
@gmem_kinds("g0", "gM")
def test_a_whole_private_range_is_prefaulted(reachable: Bound, vcpu: Vcpu) -> None:
    """Where all of a range is private or gmem-backed memory, its prefault allocates exactly its pages, in the gmem."""
    assert_whole_range(reachable, vcpu)


def assert_whole_range(bound: Bound, vcpu: Vcpu) -> None:
    """Prefault a part of the slot, a part that overlaps it, and all of it."""
    gmem = bound.gmem
    assert vcpu.raw.pre_fault(GPA + 3 * PAGE_SIZE, 5 * PAGE_SIZE) == (OK, GPA + 8 * PAGE_SIZE, 0)
    assert (gmem.allocated_pages(), gmem.allocated_pages(3 * PAGE_SIZE, 5 * PAGE_SIZE)) == (5, 5)
    assert vcpu.raw.pre_fault(GPA + 6 * PAGE_SIZE, 4 * PAGE_SIZE) == (OK, GPA + 10 * PAGE_SIZE, 0)
    assert (gmem.allocated_pages(), gmem.allocated_pages(3 * PAGE_SIZE, 7 * PAGE_SIZE)) == (7, 7)
    assert vcpu.raw.pre_fault(GPA, gmem.size) == (OK, GPA + gmem.size, 0)
    assert gmem.allocated_pages() == gmem.pages


@contract("GM-PF-008")
@requires("prefault")
@gmem_kinds("gM")
def test_prefault_stops_at_the_first_hole(reachable: Bound, vcpu: Vcpu) -> None:
    """A prefault that meets a hole answers 0 and what is left; from the hole on it is ENOENT and changes nothing."""
    vm, end = reachable.vm, GPA + SIZE
    left = end - PAGE_SIZE, 4 * PAGE_SIZE
    assert vcpu.raw.pre_fault(*left) == (OK, end, 3 * PAGE_SIZE)
    for _ in range(2):
        assert vcpu.raw.pre_fault(end, 3 * PAGE_SIZE) == (Errno.ENOENT, end, 3 * PAGE_SIZE)
    assert vcpu.raw.pre_fault(GPA - PAGE_SIZE, 2 * PAGE_SIZE) == (Errno.ENOENT, GPA - PAGE_SIZE, 2 * PAGE_SIZE)
    assert reachable.gmem.allocated_pages() == 1
    # With memory there, the same call goes on; over the border of two slots it does not stop.
    with vm.create_guest_memfd(2 * PAGE_SIZE, reachable.gmem.flags) as beside:
        vm.bind(beside, slot=1, gpa=end)
        assert vcpu.raw.pre_fault(end - 2 * PAGE_SIZE, 5 * PAGE_SIZE) == (OK, end + 2 * PAGE_SIZE, PAGE_SIZE)
        assert (reachable.gmem.allocated_pages(), beside.allocated_pages()) == (2, 2)


@contract("GM-PF-009")
@requires("prefault")
def test_there_is_nothing_beyond_the_processors_addresses(vm: Vm, vcpu: Vcpu, host: Host) -> None:
    """Guest addresses that no slot can have are holes like any other: ENOENT."""
    with plain_slot(vm, SIZE):
        assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
        limit = 1 << max_gpa_bits(host.paging)
        for gpa in (limit - PAGE_SIZE, limit, 1 << 48, 1 << 52, 1 << 63, TOP - PAGE_SIZE):
            assert vcpu.raw.pre_fault(gpa, PAGE_SIZE) == (Errno.ENOENT, gpa, PAGE_SIZE)


@dataclass
class Repeated:
    """A thread that prefaults one page over and over; `answers` has the answers in the order they changed."""

    vcpu: Vcpu
    gpa: int
    answers: list[Answer] = field(default_factory=list)
    stop: bool = False

    def run(self) -> None:
        """Until told to stop."""
        while not self.stop:
            answer = self.vcpu.raw.pre_fault(self.gpa, PAGE_SIZE)[0]
            if not self.answers or self.answers[-1] != answer:
                self.answers.append(answer)


@contract("GM-PF-010")
@requires("prefault")
@gmem_kinds("gM")
def test_prefault_of_a_slot_under_deletion_is_eagain(vm: Vm, gmem: GuestMemfd, vcpu: Vcpu) -> None:
    """While a slot is being deleted its prefault answers EAGAIN instead of waiting, then ENOENT, and works when it is back.

    A deletion waits for every vCPU that is in KVM (synchronize_srcu), and so for a long prefault of another slot.
    """
    region = vm.bind(gmem, slot=0, gpa=GPA)
    with vm.create_vcpu(1) as busy, vm.create_guest_memfd(16 * MiB, gmem.flags) as large:
        vm.bind(large, slot=1, gpa=GiB * 2)
        for _ in range(10):
            seen = answers_around_deletion(vm, vcpu, busy, large)
            assert seen in ([OK, Errno.EAGAIN, Errno.ENOENT], [OK, Errno.ENOENT])
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (Errno.ENOENT, GPA, PAGE_SIZE)
            vm.set_region(region)
            assert vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
            if Errno.EAGAIN in seen:
                break
            large.punch()
        assert Errno.EAGAIN in seen


def answers_around_deletion(vm: Vm, vcpu: Vcpu, busy: Vcpu, large: GuestMemfd) -> list[Answer]:
    """What prefaulting slot 0 answers one after the other while it is deleted and `busy` prefaults all of `large`."""
    repeated = Repeated(vcpu, GPA)
    threads = [
        threading.Thread(target=repeated.run),
        threading.Thread(target=busy.raw.pre_fault, args=(2 * GiB, large.size)),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(repeated.answers) and large.allocated_pages() > 0, "both vCPUs prefault")
    vm.delete_region(0)
    wait_until(lambda: repeated.answers[-1] == Errno.ENOENT, "the deletion is seen")
    repeated.stop = True
    for thread in threads:
        thread.join()
    return repeated.answers


RACED = 64 * PAGE_SIZE


@contract("GM-PF-010", "GM-RACE-011")
@requires("prefault")
@gmem_kinds("gM")
def test_prefault_against_deletions_always_returns(
    vm: Vm, gmem: GuestMemfd, vcpu: Vcpu, request: pytest.FixtureRequest
) -> None:
    """A prefault of a slot that is deleted and made again answers 0, EAGAIN or ENOENT; what is left only ever gets less."""
    region = vm.bind(gmem, gpa=GPA)
    found: list[tuple[Answer, int, int]] = []
    stop = threading.Event()

    def prefault() -> None:
        while not stop.is_set():
            found.append(vcpu.raw.pre_fault(GPA, RACED))

    thread = threading.Thread(target=prefault, daemon=True)
    thread.start()
    for _ in range(int(10 * request.config.getoption("--effort"))):
        rounds = len(found)
        vm.delete_region(0)
        vm.set_region(region)
        gmem.punch()
        wait_until(lambda rounds=rounds: len(found) > rounds, "a prefault returns")  # type: ignore[misc]
    stop.set()
    thread.join(20)
    if known_bug("B18").shows_if(thread.is_alive()):
        pytest.fail("a prefault never returned")
    assert {answer for answer, _, _ in found} <= {OK, Errno.EAGAIN, Errno.ENOENT}
    for answer, gpa, size in found:
        assert gpa + size == GPA + RACED
        assert (size < RACED) == (answer == OK)
    assert vcpu.raw.pre_fault(GPA, RACED) == (OK, GPA + RACED, 0)


@contract("GM-PF-012")
@private_memory
@requires("prefault")
@gmem_kinds("g0")
def test_prefault_takes_the_view_that_the_attribute_says(vm: Vm, gmem: GuestMemfd, vcpu: Vcpu) -> None:
    """On a VM with private memory, a prefault populates private pages in the gmem and shared ones in the host's memory."""
    with Mapping.anonymous(SIZE) as shared:
        assert shared.advise(MADV_NOHUGEPAGE) == OK
        vm.bind(gmem, gpa=GPA, hva=shared.address)
        vm.set_private(GPA + 2 * PAGE_SIZE, 3 * PAGE_SIZE)
        assert vcpu.raw.pre_fault(GPA, 8 * PAGE_SIZE) == (OK, GPA + 8 * PAGE_SIZE, 0)
        assert (gmem.allocated_pages(), gmem.allocated_pages(2 * PAGE_SIZE, 3 * PAGE_SIZE)) == (3, 3)
        assert [page for page, there in enumerate(shared.resident_pages()) if there] == [0, 1, 5, 6, 7]
        # After a conversion the same call takes the other view.
        vm.set_shared(GPA, SIZE)
        vm.set_private(GPA + 8 * PAGE_SIZE, PAGE_SIZE)
        assert vcpu.raw.pre_fault(GPA, 9 * PAGE_SIZE) == (OK, GPA + 9 * PAGE_SIZE, 0)
        assert (gmem.allocated_pages(), gmem.allocated_pages(8 * PAGE_SIZE, PAGE_SIZE)) == (4, 1)
        assert sum(shared.resident_pages()) == 8


@contract("GM-PF-013")
@vm_types("default")
@requires("prefault")
@gmem_kinds("gM", "gMS")
def test_prefault_of_a_closed_gmem_leaves_an_exit_behind(running: Running) -> None:
    """With its gmem closed, a slot's prefault is EFAULT, and kvm_run then shows a memory fault although nothing has run."""
    assert_closed_gmem(running, private=False)


@contract("GM-PF-013")
@private_memory
@requires("prefault")
@gmem_kinds("g0", "gM")
def test_prefault_of_a_closed_private_gmem_leaves_an_exit_behind(running: Running) -> None:
    """With its gmem closed, the prefault of private memory is EFAULT, and kvm_run then shows a private memory fault."""
    running.vm.set_private(GPA, SIZE)
    assert_closed_gmem(running, private=True)


def assert_closed_gmem(running: Running, *, private: bool) -> None:
    """Prefault before and after the close, each time with the exit of a real run in kvm_run."""
    vcpu, page = running.cpu.vcpu, GPA + PAGE_SIZE
    running.cpu.store(GPA, STAMP)
    assert vcpu.raw.pre_fault(page, PAGE_SIZE) == (OK, page + PAGE_SIZE, 0)
    assert isinstance(decode(vcpu.kvm_run), IoExit)
    running.gmem.close()
    for gpa in (page, GPA):
        assert vcpu.raw.pre_fault(gpa, 2 * PAGE_SIZE) == (Errno.EFAULT, gpa, 2 * PAGE_SIZE)
        assert decode(vcpu.kvm_run) == memory_fault(gpa, private=private)
        running.cpu.call("report")
        assert isinstance(decode(vcpu.kvm_run), IoExit)


@contract("GM-PF-014")
@private_memory
@requires("prefault")
def test_prefault_of_private_memory_without_gmem_leaves_an_exit_behind(vm: Vm, cpu: GuestCpu) -> None:
    """Prefaulting a private page of a slot without gmem is EFAULT, and kvm_run then shows a private memory fault."""
    with plain_slot(vm, SIZE):
        cpu.call("report")
        assert cpu.vcpu.raw.pre_fault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
        vm.set_private(GPA + PAGE_SIZE, PAGE_SIZE)
        assert cpu.vcpu.raw.pre_fault(GPA, 2 * PAGE_SIZE) == (OK, GPA + PAGE_SIZE, PAGE_SIZE)
        cpu.call("report")
        assert cpu.vcpu.raw.pre_fault(GPA + PAGE_SIZE, PAGE_SIZE) == (Errno.EFAULT, GPA + PAGE_SIZE, PAGE_SIZE)
        assert decode(cpu.vcpu.kvm_run) == memory_fault(GPA + PAGE_SIZE, private=True)


@contract("GM-PF-015")
@requires("prefault")
def test_prefault_of_unusable_host_memory_is_efault(vm: Vm, cpu: GuestCpu) -> None:
    """Where userspace_addr leads nowhere a prefault is EFAULT, and kvm_run shows what the last run left there."""
    with plain_slot(vm, 2 * PAGE_SIZE) as memory:
        cpu.call("report")
        before = decode(cpu.vcpu.kvm_run)
        assert isinstance(before, IoExit)
        assert cpu.vcpu.raw.pre_fault(GPA, 2 * PAGE_SIZE) == (OK, GPA + 2 * PAGE_SIZE, 0)
        assert memory.protect(0, PAGE_SIZE) == OK
        assert cpu.vcpu.raw.pre_fault(GPA, 2 * PAGE_SIZE) == (OK, GPA + PAGE_SIZE, PAGE_SIZE)
        assert cpu.vcpu.raw.pre_fault(GPA + PAGE_SIZE, PAGE_SIZE) == (Errno.EFAULT, GPA + PAGE_SIZE, PAGE_SIZE)
        memory.unmap()
        assert cpu.vcpu.raw.pre_fault(GPA, 2 * PAGE_SIZE) == (Errno.EFAULT, GPA, 2 * PAGE_SIZE)
        assert decode(cpu.vcpu.kvm_run) == before


@contract("GM-PF-016")
@vm_types("default")
@requires("prefault")
def test_prefault_reads(vm: Vm, cpu: GuestCpu) -> None:
    """A prefault is a read: read-only slots and memory will do, and no private copy of a file's page is made."""
    # None of the slots is deleted while the test goes on, because B30 would show.
    prefault = cpu.vcpu.raw.pre_fault
    with plain_slot(vm, PAGE_SIZE, flags=MemFlag.READONLY, fill=True, gpa=GPA + MiB, slot=2):
        assert prefault(GPA + MiB, PAGE_SIZE) == (OK, GPA + MiB + PAGE_SIZE, 0)
        assert cpu.load(GPA + MiB) == FILLED
    with plain_slot(vm, PAGE_SIZE, fill=True, gpa=GPA + 2 * MiB, slot=3) as memory:
        assert memory.protect(mmap.PROT_READ) == OK
        assert prefault(GPA + 2 * MiB, PAGE_SIZE) == (OK, GPA + 2 * MiB + PAGE_SIZE, 0)
        assert cpu.load(GPA + 2 * MiB) == FILLED
    file = os.memfd_create("shared", os.MFD_CLOEXEC)
    try:
        os.pwrite(file, struct.pack("<Q", STAMP).ljust(PAGE_SIZE, b"\0"), 0)
        copy = Mapping.try_map(PAGE_SIZE, fd=file, flags=mmap.MAP_PRIVATE)
        assert isinstance(copy, Mapping)
        with copy:
            vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=PAGE_SIZE, hva=copy.address))
            assert prefault(GPA, PAGE_SIZE) == (OK, GPA + PAGE_SIZE, 0)
            os.pwrite(file, struct.pack("<Q", STAMP + 1), 0)
            assert (copy.load(0), cpu.load(GPA)) == (STAMP + 1, STAMP + 1)
            # The control: a guest's write makes the copy, and the file's page goes its own way.
            cpu.store(GPA, STAMP + 2)
            os.pwrite(file, struct.pack("<Q", STAMP + 3), 0)
            assert (copy.load(0), cpu.load(GPA)) == (STAMP + 2, STAMP + 2)
    finally:
        os.close(file)


@contract("GM-PF-007")
@requires("prefault")
@vm_types("default")
def test_prefault_after_a_slot_was_deleted(vm: Vm, cpu: GuestCpu) -> None:
    """A vCPU that has run prefaults what is there after a slot was deleted, without running in between, and at once."""
    with plain_slot(vm, PAGE_SIZE), plain_slot(vm, PAGE_SIZE, gpa=2 * GPA, slot=2, fill=True):
        assert cpu.load(GPA) == 0
        assert cpu.vcpu.raw.pre_fault(2 * GPA, PAGE_SIZE) == (OK, 2 * GPA + PAGE_SIZE, 0)  # the control
        vm.delete_region(1)
        answer = within(2 * TIME_SCALE, lambda: cpu.vcpu.raw.pre_fault(2 * GPA, PAGE_SIZE))
        known_bug("B30").expect(answer, (OK, 2 * GPA + PAGE_SIZE, 0), shows=(Errno.EINTR, 2 * GPA, PAGE_SIZE))
        assert cpu.load(2 * GPA) == FILLED
        assert cpu.vcpu.raw.pre_fault(2 * GPA, PAGE_SIZE) == (OK, 2 * GPA + PAGE_SIZE, 0)


@contract("GM-PF-017")
@requires("prefault", cap=Cap.GUEST_MEMFD_FLAGS)
def test_prefault_under_a_pending_signal_does_nothing(vm: Vm) -> None:
    """With a signal already pending, a prefault is EINTR before its first page; the next one is not affected."""

    def prefault_twice() -> list[tuple[Answer, int, int, int]]:
        seen: list[tuple[Answer, int, int, int]] = []
        with Kvm.open() as kvm, kvm.create_vm(vm.type) as own, own.create_guest_memfd(SIZE, GmemFlag.MMAP) as gmem:
            own.bind(gmem, gpa=GPA)
            with own.create_vcpu() as vcpu:
                for _ in range(2):
                    seen.append((*vcpu.raw.pre_fault(GPA, SIZE), gmem.allocated_pages()))
        return seen

    seen = in_child_with_signal_pending(
        prefault_twice, lambda call: call.number == NUMBER["ioctl"] and call.arguments[1] == lib.KVM_PRE_FAULT_MEMORY
    )
    assert seen == [(Errno.EINTR, GPA, SIZE, 0), (OK, GPA + SIZE, 0, SIZE // PAGE_SIZE)]


@contract("GM-PF-017")
@requires("prefault", cap=Cap.GUEST_MEMFD_FLAGS)
def test_a_signal_ends_a_long_prefault(vm: Vm, vcpu: Vcpu) -> None:
    """A prefault that a signal interrupts answers 0 with exactly what is left, and can go on from there."""
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with vm.create_guest_memfd(16 * MiB, GmemFlag.MMAP) as gmem:
            vm.bind(gmem, gpa=GPA)
            for _ in range(20):  # a prefault that was over before the signal came is no answer
                answer, gpa, left = prefault_under_signal(vcpu, gmem)
                if left:
                    break
                gmem.punch()
            assert answer == OK
            assert 0 < left < gmem.size
            assert gpa == GPA + gmem.size - left
            done = (gmem.size - left) // PAGE_SIZE
            # The page it was at when the signal came may be there already, without a mapping.
            assert gmem.allocated_pages() - done in (0, 1)
            assert vcpu.raw.pre_fault(gpa, 2 * PAGE_SIZE) == (OK, gpa + 2 * PAGE_SIZE, 0)
            assert gmem.allocated_pages() == done + 2
    finally:
        signal.signal(signal.SIGUSR1, handler)


def prefault_under_signal(vcpu: Vcpu, gmem: GuestMemfd) -> tuple[Answer, int, int]:
    """Prefault the whole file in a thread, and signal that thread when some pages are there."""
    answers: list[tuple[Answer, int, int]] = []
    thread = threading.Thread(target=lambda: answers.append(vcpu.raw.pre_fault(GPA, gmem.size)))
    thread.start()
    wait_until(lambda: gmem.allocated_pages() > 1, "some pages are prefaulted")
    if thread.ident is not None and thread.is_alive():
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
    thread.join()
    return answers[0]


@contract("GM-PF-018")
@requires("prefault")
@gmem_kinds("gM")
def test_the_range_is_written_back_whatever_the_answer(reachable: Bound, vcpu: Vcpu) -> None:
    """What is left is written back after every answer: into a read-only request it is EFAULT, with the work done."""
    request = ffi.new("struct kvm_pre_fault_memory *", {"gpa": GPA, "size": 2 * PAGE_SIZE})
    with Mapping.anonymous(PAGE_SIZE) as memory:
        memory.write(0, bytes(ffi.buffer(request)))
        assert vcpu.raw.ioctl(lib.KVM_PRE_FAULT_MEMORY, memory.address) == OK
        assert memory.load(8) == 0
        memory.store(2 * PAGE_SIZE, 8)  # gpa went on to the third page
        assert memory.protect(mmap.PROT_READ) == OK
        assert vcpu.raw.ioctl(lib.KVM_PRE_FAULT_MEMORY, memory.address) == Errno.EFAULT
        assert (memory.load(0), memory.load(8)) == (GPA + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert reachable.gmem.allocated_pages() == 4
        # A request that is refused is written back too.
        assert memory.protect(mmap.PROT_READ | mmap.PROT_WRITE) == OK
        memory.store(1, 16)  # flags
        assert vcpu.raw.ioctl(lib.KVM_PRE_FAULT_MEMORY, memory.address) == Errno.EINVAL
        assert memory.protect(mmap.PROT_READ) == OK
        assert vcpu.raw.ioctl(lib.KVM_PRE_FAULT_MEMORY, memory.address) == Errno.EFAULT
    assert vcpu.raw.ioctl(lib.KVM_PRE_FAULT_MEMORY, 8) == Errno.EFAULT


@contract("GM-PF-019")
@requires("prefault", "huge-pages")
def test_prefault_steps_by_what_was_mapped(vm: Vm, vcpu: Vcpu) -> None:
    """Inside a huge page a prefault maps it as a whole and goes on to its end or to the end of the range, never further."""
    with Mapping.anonymous(2 * SIZE) as memory:
        aligned = -(-memory.address // SIZE) * SIZE
        assert memory.advise(MADV_HUGEPAGE) == OK
        memory.fill(FILLER)
        vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=aligned))
        middle = GPA + 77 * PAGE_SIZE
        before = read_stats(vm)
        assert vcpu.raw.pre_fault(middle, PAGE_SIZE) == (OK, middle + PAGE_SIZE, 0)
        mapped = read_stats(vm)
        assert (mapped["pages_2m"] - before["pages_2m"], mapped["pages_4k"] - before["pages_4k"]) == (1, 0)
        # What is behind the huge page is a hole, so that the step's end shows.
        assert vcpu.raw.pre_fault(middle, SIZE) == (OK, GPA + SIZE, 77 * PAGE_SIZE)
        assert vcpu.raw.pre_fault(GPA - PAGE_SIZE, SIZE) == (Errno.ENOENT, GPA - PAGE_SIZE, SIZE)
        assert vcpu.raw.pre_fault(GPA, SIZE) == (OK, GPA + SIZE, 0)
        assert read_stats(vm)["pages_2m"] == mapped["pages_2m"]


@contract("GM-PF-020")
@vm_types("default")
@requires("prefault")
@gmem_kinds("gM", "gMS")
def test_the_guest_does_not_fault_where_prefault_was(reachable: Bound, cpu: GuestCpu) -> None:
    """What was prefaulted the guest reads and writes without a page fault, and each page beyond costs it one."""
    assert_no_faults(cpu)


@contract("GM-PF-020")
@private_memory
@requires("prefault")
@gmem_kinds("g0", "gM")
def test_the_guest_does_not_fault_where_private_prefault_was(reachable: Bound, cpu: GuestCpu) -> None:
    """What was prefaulted the guest reads and writes without a page fault, in private memory too."""
    assert_no_faults(cpu)


def assert_no_faults(cpu: GuestCpu) -> None:
    """Prefault eight pages of the slot and use sixteen."""
    cpu.load(GPA + 100 * PAGE_SIZE)  # code, page tables and the like are there
    assert cpu.vcpu.raw.pre_fault(GPA, 8 * PAGE_SIZE) == (OK, GPA + 8 * PAGE_SIZE, 0)
    before = faults(cpu)
    assert cpu.first_not(0, GPA, 8) is None
    cpu.stamp(GPA, STAMP, 8)
    assert cpu.first_unstamped(GPA, STAMP, 8) is None
    assert faults(cpu) == before
    cpu.stamp(GPA, STAMP, 16)
    assert faults(cpu) == (before[0] + 8, before[1] + 8)


def faults(cpu: GuestCpu) -> tuple[int, int]:
    """How many page faults of this vCPU KVM has met, and how many of them it has mended."""
    stats = read_stats(cpu.vcpu)
    return stats["pf_taken"], stats["pf_fixed"]
