"""GM-RUN: accesses that memory does not answer, and how KVM_RUN says so."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, MiB, VmType
from kvmgmem.arch.x86_64 import GuestCpu, Mode, is_report, programs
from kvmgmem.errors import Errno
from kvmgmem.exits import UNKNOWN, InternalErrorExit, MemoryFaultExit, MmioExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing import contract, disruptive, gmem_kinds, known_bug, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.memory_cgroup import MemoryCgroup
from kvmgmem.testing.waiting import TIME_SCALE
from kvmgmem.vm import Vm

PROT_NONE = 0
STAMP = 0x5EED_0000
NOWHERE = 0x9000_0000  # no slot
INTERNAL_ERROR_EMULATION = 1
INTERNAL_ERROR_DELIVERY = 3
UNDEFINED_OPCODE = 6  # vector of #UD
GATE_SIZE = 16  # of an entry of the interrupt descriptor table in long mode


def memory_fault(gpa: int, flags: int = 0) -> RunResult:
    """What KVM_RUN answers when userspace must resolve an access to the page at `gpa`."""
    return RunResult(Errno.EFAULT, MemoryFaultExit(flags, gpa, PAGE_SIZE))


HVA_FAULT = RunResult(Errno.EFAULT, UNKNOWN)


@contract("GM-RUN-010")
@vm_types("default")
@gmem_kinds("gM", "gMS")
def test_memory_of_a_closed_gmem_faults_out(running: Running) -> None:
    """After a gmem's last reference is gone, guest accesses to its slot end in EFAULT with a shared MEMORY_FAULT exit."""
    running.cpu.store(GPA, STAMP)
    assert running.cpu.load(GPA) == STAMP
    running.gmem.close()
    for page in (0, 1, running.gmem.pages - 1):
        gpa = GPA + page * PAGE_SIZE
        assert running.cpu.try_load(gpa) == memory_fault(gpa)
        assert running.cpu.try_store(gpa, STAMP) == memory_fault(gpa)


@contract("GM-RUN-014")
@vm_types("default")
@gmem_kinds("gMS")
def test_the_reported_range_is_one_page_whatever_the_access(running: Running) -> None:
    """A MEMORY_FAULT exit names one 4 KiB page and never the kind of access: reads, writes and fetches look alike."""
    cpu, page = running.cpu, GPA + 3 * PAGE_SIZE
    with running.gmem.map() as host:
        host.write(3 * PAGE_SIZE, programs()["store8_jump"])
    report = running.machine.entry("report")
    cpu.call(page, rdi=page + 256, rsi=STAMP, rdx=report)
    assert cpu.load(page + 251) == STAMP << 40 & (1 << 64) - 1
    running.gmem.close()
    for width in (1, 2, 4, 8):
        for offset in (0, 1, 123, PAGE_SIZE - width):
            assert cpu.try_load(page + offset, width) == memory_fault(page)
            assert cpu.try_store(page + offset, 1, width) == memory_fault(page)
    assert cpu.attempt(page, rdi=page + 256, rsi=STAMP, rdx=report) == memory_fault(page)
    # Which half of an access over two pages a processor tries first is its own affair.
    either = (memory_fault(page), memory_fault(page + PAGE_SIZE))
    assert cpu.try_load(page + PAGE_SIZE - 3) in either
    assert cpu.try_store(page + PAGE_SIZE - 3, 1) in either


@contract("GM-RUN-015")
@vm_types("default")
@gmem_kinds("gM")
def test_a_fault_repeats_until_it_is_resolved(running: Running) -> None:
    """Running again without resolving a memory fault gives the very same exit, and the guest has not moved."""
    running.cpu.store(GPA, STAMP)
    running.gmem.close()
    running.cpu.start("load8", rdi=GPA, rax=7)
    before = running.cpu.registers()
    for _ in range(3):
        assert running.cpu.run() == memory_fault(GPA)
        assert running.cpu.registers() == before


@contract("GM-RUN-016")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_resolved_fault_resumes_the_instruction(running: Running) -> None:
    """After the slot was bound to a live gmem, running again completes the instruction that had faulted."""
    vm, cpu = running.vm, running.cpu
    cpu.store(GPA, STAMP)
    running.gmem.close()
    with vm.create_guest_memfd(SIZE, running.gmem.flags) as fresh:
        for program, gpa in (("store8", GPA), ("load8", GPA + PAGE_SIZE)):
            assert cpu.attempt(program, rdi=gpa, rsi=STAMP + 1, rax=7) == memory_fault(gpa)
            vm.delete_region(0)
            vm.bind(fresh, gpa=GPA)
            registers = cpu.finish(cpu.run())
            assert registers.rax == (7 if program == "store8" else 0)
            vm.delete_region(0)
            # A slot whose gmem is closed again, for the next round.
            with vm.create_guest_memfd(SIZE, running.gmem.flags) as dying:
                vm.bind(dying, gpa=GPA)
        vm.delete_region(0)
        vm.bind(fresh, gpa=GPA)
        assert cpu.load(GPA) == STAMP + 1


@contract("GM-RUN-017")
@vm_types("default", "sw-protected")
def test_an_access_to_no_slot_is_mmio(vm: Vm, cpu: GuestCpu) -> None:
    """A shared access where no slot is ends in an MMIO exit with its exact address, length and, for a write, data."""
    value = 0x8877_6655_4433_2211
    for width in (1, 2, 4, 8):
        data = value & (1 << 8 * width) - 1
        for offset in (0, 3, PAGE_SIZE - width):
            gpa = NOWHERE + offset
            read = cpu.try_load(gpa, width)
            assert read.answer == OK
            assert isinstance(read.exit, MmioExit)
            assert (read.exit.gpa, read.exit.length, read.exit.write) == (gpa, width, False)
            assert cpu.finish(cpu.answer_mmio(value)).rax == data
            written = cpu.try_store(gpa, value, width)
            assert written == RunResult(OK, MmioExit(gpa, width, True, data.to_bytes(width, "little")))
            assert is_report(cpu.run())


@contract("GM-RUN-018")
@vm_types("default")
@gmem_kinds("gM")
def test_a_slot_deleted_under_a_running_guest_is_mmio_until_it_is_back(running: Running) -> None:
    """A vCPU that uses a slot meets MMIO once the slot is deleted, and the memory with its contents once it is back."""
    vm, cpu = running.vm, running.cpu
    for round_ in range(4):
        stamp = STAMP + round_
        # The guest stores the stamp, and then reads it until it changes.
        cpu.start("store8_jump", rdi=GPA, rsi=stamp, rdx=running.machine.entry("watch"))
        with cpu.running() as run:
            wait_until(lambda: running.gmem.allocated_pages() == 1, "the guest stores its stamp")
            vm.delete_region(0)
            gone = run.result()
        assert gone.answer == OK
        assert isinstance(gone.exit, MmioExit)
        assert (gone.exit.gpa, gone.exit.length) == (GPA, 8)
        if gone.exit.write:  # the page was there already, but not yet the stamp: this store goes nowhere
            stamp = 0
            cpu.run()
        vm.set_region(running.region)
        # The load that is pending gets what userspace says; it is the next one that shows where the memory is.
        assert cpu.finish(cpu.answer_mmio(0)).rax == 0
        again = cpu.try_load(GPA)
        if isinstance(again.exit, MmioExit):
            # Noted where it shows, and nothing said where not: it takes a race that these few rounds seldom hit.
            known_bug("B19").shows_if(True)
            cpu.answer_mmio(0)
        else:
            assert cpu.finish(again).rax == stamp
        running.gmem.punch()


@contract("GM-RUN-019")
@vm_types("default", "sw-protected")
def test_an_unusable_userspace_addr_gives_efault_without_a_reason(vm: Vm, cpu: GuestCpu) -> None:
    """A shared access that userspace_addr cannot serve ends in EFAULT with exit reason UNKNOWN, not MEMORY_FAULT."""
    with Mapping.anonymous(3 * PAGE_SIZE) as memory:
        memory.fill(0x5A)
        vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=3 * PAGE_SIZE, hva=memory.address))
        assert cpu.load(GPA, 4) == 0x5A5A5A5A
        assert memory.protect(PROT_NONE) == OK
        for page in (0, 1):
            assert cpu.try_load(GPA + page * PAGE_SIZE) == HVA_FAULT
            assert cpu.try_store(GPA + page * PAGE_SIZE, 1) == HVA_FAULT
    assert cpu.try_load(GPA) == HVA_FAULT  # unmapped by now
    assert cpu.try_load(GPA + 2 * PAGE_SIZE) == HVA_FAULT


@contract("GM-RUN-020")
@vm_types("default")
def test_a_write_through_a_read_only_mapping_waits_for_mprotect(vm: Vm, cpu: GuestCpu) -> None:
    """A guest's write through a read-only mapping ends in EFAULT; once the mapping is writable, running again does it."""
    with Mapping.anonymous(SIZE) as memory:
        memory.fill(0x5A)
        assert memory.protect(mmap.PROT_READ) == OK
        vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=memory.address))
        assert cpu.load(GPA, 4) == 0x5A5A5A5A
        assert cpu.try_store(GPA, STAMP) == HVA_FAULT
        assert cpu.run() == HVA_FAULT
        assert memory.load(0, 4) == 0x5A5A5A5A
        assert memory.protect(mmap.PROT_READ | mmap.PROT_WRITE) == OK
        assert is_report(cpu.run())
        assert memory.load(0) == STAMP


@contract("GM-RUN-022")
@gmem_kinds("gM")
def test_a_plain_slot_over_a_mapping_that_cannot_be_touched_gives_efault(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A gmem without INIT_SHARED serves no plain slot through its mapping: EFAULT with exit reason UNKNOWN."""
    vm.bind(gmem, gpa=GPA)
    with gmem.map() as host, Mapping.anonymous(SIZE) as memory:
        request = MemoryRegion(slot=1, gpa=2 * GPA, size=SIZE, hva=memory.address)
        vm.set_region(request)
        assert cpu.load(2 * GPA) == 0  # the control: only the mapping differs
        vm.delete_region(1)
        vm.set_region(request.but(hva=host.address))
        assert cpu.try_load(2 * GPA) == HVA_FAULT
        assert cpu.try_store(2 * GPA, 1) == HVA_FAULT
        assert gmem.allocated_pages() == 0


@contract("GM-RUN-041")
@vm_types("default")
def test_a_vcpu_without_any_slot_gives_up(kvm: Kvm, vm_type: VmType, host: Host) -> None:
    """A vCPU of a VM without slots cannot fetch its first instruction: an internal error, or no room for page tables.

    The number of shadow pages a VM may have follows from its slots (kvm_arch_commit_memory_region), so that without any
    the shadow MMU has no root to give (make_mmu_pages_available): ENOSPC. The TDP MMU's roots do not count.
    """
    with kvm.create_vm(vm_type) as vm, vm.create_vcpu() as vcpu:
        result = vcpu.raw.run()
        if not host.tdp_mmu:
            assert result == RunResult(Errno.ENOSPC, UNKNOWN)
        else:
            assert result.answer == OK
            assert isinstance(result.exit, InternalErrorExit)
            assert result.exit.suberror == INTERNAL_ERROR_EMULATION


@contextmanager
def spared_by_the_oom_killer() -> Iterator[None]:
    """Nobody kills this process for want of memory; what it lacks, it is told."""
    adjustment = Path("/proc/self/oom_score_adj")
    before = adjustment.read_text()
    adjustment.write_text("-1000")
    yield
    adjustment.write_text(before)


@contract("GM-RUN-044")
@disruptive()
@requires("memcg", "root")
@vm_types("default")
@gmem_kinds("gM")
def test_a_fault_that_lacks_memory_gives_enomem_whatever_the_exit_says(running: Running) -> None:
    """A guest fault for which no page can be had ends in that error itself, beside the MEMORY_FAULT exit of its page."""
    cpu, pages = running.cpu, running.gmem.pages
    cpu.stamp(GPA, STAMP, 1)
    with MemoryCgroup() as cgroup:
        if not (cgroup.path / "memory.events").exists():
            pytest.skip("memory cgroups of version 1 do not say when memory ran out")

        def relieve(_: Channel) -> None:
            # At the limit the test's own process can do nothing any more, not even open a file: another one raises it.
            wait_until(lambda: "\noom 0\n" not in (cgroup.path / "memory.events").read_text(), "memory runs out", 20)
            cgroup.limit(1 << 40)

        with ChildProcess(relieve) as reliever, spared_by_the_oom_killer():
            cgroup.join()
            cgroup.limit(cgroup.usage() + SIZE // 2)
            result = cpu.attempt("store_each", rdi=GPA, rsi=STAMP, rcx=pages, rdx=PAGE_SIZE)
            reliever.result()
        allocated = running.gmem.allocated_pages()
        assert 0 < allocated < pages
        assert result == RunResult(Errno.ENOMEM, MemoryFaultExit(0, GPA + allocated * PAGE_SIZE, PAGE_SIZE))
        # With memory enough the very store goes on.
        cpu.finish(cpu.run())
        assert running.gmem.allocated_pages() == pages
        assert cpu.first_unstamped(GPA, STAMP, pages) is None


@contract("GM-RUN-045")
@vm_types("default")
@gmem_kinds("gMS")
def test_the_exit_reason_of_an_earlier_run_does_not_survive(running: Running) -> None:
    """The exit reason is cleared on entry: an EFAULT without a reason never shows the MEMORY_FAULT of the run before."""
    with Mapping.anonymous(SIZE) as memory:
        running.vm.set_region(MemoryRegion(slot=1, gpa=2 * GPA, size=SIZE, hva=memory.address))
        assert running.cpu.load(2 * GPA) == 0
    running.cpu.load(GPA)
    running.gmem.close()
    for _ in range(2):
        assert running.cpu.try_load(GPA) == memory_fault(GPA)
        assert running.cpu.try_load(2 * GPA) == HVA_FAULT


@contract("GM-RUN-048")
@vm_types("default")
@requires("hardware-mode")
@pytest.mark.parametrize("mode", [Mode.USER, Mode.KERNEL], ids=["cpl3", "cpl0"])
def test_an_event_that_cannot_be_delivered_is_an_internal_error(vm: Vm, cpu: GuestCpu, mode: Mode) -> None:
    """An exception whose descriptor lies in no slot is an internal error of event delivery that reports the address."""
    if mode is Mode.KERNEL:
        cpu.close()
        cpu = cpu.machine.cpu(1, mode)
    cpu.set_interrupt_table(NOWHERE)
    result = cpu.attempt("undefined", timeout=3 * TIME_SCALE)
    no_emulation = isinstance(result.exit, InternalErrorExit) and result.exit.suberror == INTERNAL_ERROR_EMULATION
    if not known_bug("B33").shows_if(result.expired if mode is Mode.USER else no_emulation):
        assert result.answer == OK
        assert isinstance(result.exit, InternalErrorExit)
        assert result.exit.suberror == INTERNAL_ERROR_DELIVERY
        assert result.exit.data[3] == NOWHERE + UNDEFINED_OPCODE * GATE_SIZE
    cpu.close()


@contract("GM-RUN-049")
@vm_types("default")
@gmem_kinds("gMS")
def test_an_access_over_two_pages_faults_for_the_one_that_failed(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """An access over two pages of which one fails is reported with that page's address, also if it is the second one."""
    value = 0x8877_6655_4433_2211
    with gmem.map() as host, vm.create_guest_memfd(MiB, gmem.flags) as other:
        for edge in (GPA + SIZE, GPA):  # the gmem before and behind what fails
            failing = edge if edge > GPA else edge - PAGE_SIZE
            beside = MemoryRegion(slot=1, gpa=failing, size=PAGE_SIZE, gmem=other)
            vm.bind(gmem, gpa=GPA, hva=host.address)
            vm.set_region(beside)
            host.fill(0)
            cpu.store(edge - 4, value)
            assert cpu.load(edge - 4) == value
            vm.delete_region(1)
            # No slot: the part within the slot is memory, the other one MMIO.
            read = cpu.try_load(edge - 4)
            assert read.answer == OK
            assert isinstance(read.exit, MmioExit)
            missing = edge if failing == edge else edge - 4
            assert (read.exit.gpa, read.exit.length, read.exit.write) == (missing, 4, False)
            if failing == edge:
                assert cpu.finish(cpu.answer_mmio(0x1234_5678)).rax == 0x1234_5678_4433_2211
            else:
                assert cpu.finish(cpu.answer_mmio(0x1234_5678)).rax == 0x8877_6655_1234_5678
            # A slot without its gmem: a fault for its page alone.
            with vm.create_guest_memfd(PAGE_SIZE, gmem.flags) as dying:
                vm.set_region(beside.but(gmem=dying))
            assert cpu.try_load(edge - 4) == memory_fault(failing)
            vm.delete_region(0)
            vm.delete_region(1)
