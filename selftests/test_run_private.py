"""GM-RUN: guests of VMs with private memory: which copy they see, and what happens where there is none."""

from collections.abc import Iterator

import pytest

from kvmgmem._native import lib
from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine
from kvmgmem.errors import Errno
from kvmgmem.exits import IoExit, MemoryFaultExit, MmioExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, known_bug, vm_types
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
SHARED_BYTE = 0x77
SHARED = 0x7777_7777_7777_7777
NOWHERE = 0x9000_0000  # no slot
OUTPUT_PORT = 0x11
LOCAL_APIC = 0xFEE0_0000
APIC_VERSION_AT = 0x30
APIC_VERSION = 0x14  # arch/x86/kvm/lapic.c

pytestmark = [vm_types("sw-protected")]


def private_fault(gpa: int) -> RunResult:
    """What KVM_RUN answers when userspace must resolve a private access to the page at `gpa`."""
    return RunResult(Errno.EFAULT, MemoryFaultExit(lib.KVM_MEMORY_EXIT_FLAG_PRIVATE, gpa, PAGE_SIZE))


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """Host memory for the shared side, filled with `SHARED_BYTE`."""
    with Mapping.anonymous(SIZE) as memory:
        memory.fill(SHARED_BYTE)
        yield memory


@contract("GM-RUN-010", "GM-RUN-011", "GM-RUN-015")
@gmem_kinds("g0", "gM")
def test_private_memory_of_a_closed_gmem_faults_out_as_private(running: Running) -> None:
    """Once a gmem's last reference is gone, private accesses end in a private MEMORY_FAULT, shared ones in a shared one."""
    vm, cpu, gmem = running.vm, running.cpu, running.gmem
    vm.set_private(GPA, 2 * PAGE_SIZE)
    cpu.store(GPA, STAMP)
    assert cpu.load(GPA) == STAMP
    gmem.close()
    for page in (0, 1):
        gpa = GPA + page * PAGE_SIZE
        cpu.start("load8", rdi=gpa + 123)
        assert [cpu.run(), cpu.run()] == [private_fault(gpa)] * 2
        assert cpu.try_store(gpa, 1) == private_fault(gpa)
    if gmem.kind == "gM":
        shared = GPA + 2 * PAGE_SIZE
        assert cpu.try_load(shared) == RunResult(Errno.EFAULT, MemoryFaultExit(0, shared, PAGE_SIZE))


@contract("GM-RUN-012")
def test_a_private_access_to_no_slot_faults_out(vm: Vm, cpu: GuestCpu) -> None:
    """Where no slot is, a private access is a private MEMORY_FAULT, and no MMIO.

    The pages are new to the guest; test_mmio_that_became_private_... is about others.
    """
    vm.set_private(NOWHERE, 2 * PAGE_SIZE)
    assert cpu.try_load(NOWHERE + 8, 4) == private_fault(NOWHERE)
    assert cpu.try_load(NOWHERE + 16, 4) == private_fault(NOWHERE)  # and nothing of it is cached as MMIO
    assert cpu.try_store(NOWHERE + PAGE_SIZE + 8, 1, 4) == private_fault(NOWHERE + PAGE_SIZE)
    beyond = NOWHERE + 2 * PAGE_SIZE  # the control: only the attribute differs
    shared = cpu.try_load(beyond, 4)
    assert isinstance(shared.exit, MmioExit)
    assert shared.exit.gpa == beyond
    cpu.answer_mmio(0)
    vm.set_shared(NOWHERE, PAGE_SIZE)
    assert isinstance(cpu.try_load(NOWHERE + 8, 4).exit, MmioExit)
    cpu.answer_mmio(0)


@contract("GM-RUN-012")
def test_mmio_that_became_private_faults_out_as_private(vm: Vm, cpu: GuestCpu, memory: Mapping) -> None:
    """A private access to no slot is a private MEMORY_FAULT also where the guest has met MMIO before.

    KVM caches MMIO in page table entries, whose faults count as shared (kvm_mmu_page_fault, 7.3.4) and which a change of
    attributes does not reach, as it only walks slots. A new slot makes the entries stale; the fault is then taken again, and
    refused because the page is private, but as the shared access that it was taken for.
    """
    assert isinstance(cpu.try_load(NOWHERE, 4).exit, MmioExit)
    cpu.answer_mmio(0)
    vm.set_private(NOWHERE, PAGE_SIZE)
    still = cpu.try_load(NOWHERE, 4)
    if isinstance(still.exit, MmioExit):
        cpu.answer_mmio(0)
    vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=memory.address))
    later = cpu.try_load(NOWHERE, 4)
    found = (type(still.exit), still.answer, later)
    wanted = (MemoryFaultExit, Errno.EFAULT, private_fault(NOWHERE))
    as_shared = RunResult(Errno.EFAULT, MemoryFaultExit(0, NOWHERE, PAGE_SIZE))
    known_bug("B25").expect(found, wanted, shows=(MmioExit, OK, as_shared))
    assert cpu.try_load(NOWHERE + PAGE_SIZE, 4).answer == OK  # the page beside it is MMIO as ever
    cpu.answer_mmio(0)


@contract("GM-RUN-013", "GM-RUN-014", "GM-RUN-016")
def test_a_private_access_to_a_slot_without_gmem_faults_out(vm: Vm, cpu: GuestCpu, memory: Mapping) -> None:
    """A private access to a plain slot is a private MEMORY_FAULT of its page; sharing the page resumes the instruction."""
    vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=memory.address))
    assert cpu.load(GPA + PAGE_SIZE) == SHARED
    vm.set_private(GPA, 2 * PAGE_SIZE)
    for width in (1, 8):
        for offset in (0, 5, PAGE_SIZE - width):
            assert cpu.try_load(GPA + offset, width) == private_fault(GPA)
            assert cpu.try_store(GPA + offset, 1, width) == private_fault(GPA)
    cpu.start("load8", rdi=GPA + PAGE_SIZE)
    assert cpu.run() == private_fault(GPA + PAGE_SIZE)
    vm.set_shared(GPA + PAGE_SIZE, PAGE_SIZE)
    assert cpu.finish(cpu.run()).rax == SHARED
    assert memory.is_filled_with(SHARED_BYTE)


@contract("GM-RUN-016")
@gmem_kinds("g0", "gM")
def test_binding_a_gmem_resumes_a_private_access(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A private access that found no slot goes on where it stopped once a gmem is bound there."""
    vm.set_private(GPA, SIZE)
    assert cpu.attempt("store8", rdi=GPA, rsi=STAMP) == private_fault(GPA)
    vm.bind(gmem, gpa=GPA)
    cpu.finish(cpu.run())
    assert cpu.load(GPA) == STAMP
    assert gmem.allocated_pages() == 1


@contract("GM-RUN-030")
@gmem_kinds("g0")
def test_emulated_reads_of_private_memory_show_the_shared_copy(
    vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, memory: Mapping
) -> None:
    """KVM's emulator knows no attributes: it reads a private page's shared copy, where the guest reads the private one."""
    vm.bind(gmem, gpa=GPA, hva=memory.address)
    vm.set_private(GPA, PAGE_SIZE)
    cpu.store(GPA, STAMP)
    result = cpu.attempt("outs", rsi=GPA, rcx=1, rdx=OUTPUT_PORT)
    assert result == RunResult(OK, IoExit(OUTPUT_PORT, True, 1, 1, bytes([SHARED_BYTE])))
    cpu.finish(cpu.run())
    assert cpu.load(GPA) == STAMP


@contract("GM-RUN-031")
def test_a_private_local_apic_is_not_emulated(vm: Vm, machine: GuestMachine) -> None:
    """With PRIVATE on the page of the local APIC, accesses to it are private memory faults; without, KVM answers them."""
    assert vm.raw.create_irqchip() == OK
    cpu = machine.cpu()
    # The attribute must be there before KVM caches the page as MMIO: test_mmio_that_became_private_... says why.
    vm.set_private(LOCAL_APIC, PAGE_SIZE)
    assert cpu.try_load(LOCAL_APIC + APIC_VERSION_AT, 4) == private_fault(LOCAL_APIC)
    vm.set_shared(LOCAL_APIC, PAGE_SIZE)
    assert cpu.finish(cpu.run()).rax & 0xFF == APIC_VERSION
    cpu.close()


@contract("GM-RUN-032", "GM-RUN-035")
@gmem_kinds("g0")
def test_shared_and_private_copies_are_independent(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, memory: Mapping) -> None:
    """Where the gmem cannot be mapped, the attribute chooses between two copies: userspace_addr and the gmem.

    Neither changes when the other is written, and both persist over conversions.
    """
    vm.bind(gmem, gpa=GPA, hva=memory.address)
    pages = (0, 5)
    assert [cpu.load(GPA + page * PAGE_SIZE) for page in pages] == [SHARED, SHARED]
    assert gmem.allocated_pages() == 0
    for page in pages:
        gpa = GPA + page * PAGE_SIZE
        for round_ in range(2):
            vm.set_private(gpa, PAGE_SIZE)
            assert cpu.load(gpa) == (0 if round_ == 0 else STAMP + page)
            cpu.store(gpa, STAMP + page)
            assert memory.load(page * PAGE_SIZE) == SHARED + round_
            vm.set_shared(gpa, PAGE_SIZE)
            assert cpu.load(gpa) == SHARED + round_
            cpu.store(gpa, SHARED + round_ + 1)
            assert memory.load(page * PAGE_SIZE) == SHARED + round_ + 1
    assert gmem.allocated_pages() == len(pages)


@contract("GM-RUN-033", "GM-RUN-035")
@gmem_kinds("gM")
def test_a_mappable_gmem_is_both_copies(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, memory: Mapping) -> None:
    """Where the gmem can be mapped, shared and private accesses both go to it: conversion keeps data, either way."""
    vm.bind(gmem, gpa=GPA, hva=memory.address)
    assert cpu.load(GPA) == 0
    cpu.store(GPA, STAMP)
    for round_ in range(2):
        vm.set_private(GPA, PAGE_SIZE)
        assert cpu.load(GPA) == STAMP + 2 * round_
        cpu.store(GPA, STAMP + 2 * round_ + 1)
        vm.set_shared(GPA, PAGE_SIZE)
        assert cpu.load(GPA) == STAMP + 2 * round_ + 1
        cpu.store(GPA, STAMP + 2 * round_ + 2)
    assert gmem.allocated_pages() == 1
    assert memory.is_filled_with(SHARED_BYTE)


@contract("GM-RUN-034", "GM-RUN-035")
@gmem_kinds("g0", "gM")
def test_private_pages_are_zero_until_written_and_after_a_punch(
    vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, memory: Mapping
) -> None:
    """New private pages read as zero, keep what is written while shared in between, and are zero again after a punch."""
    vm.bind(gmem, gpa=GPA, hva=memory.address)
    vm.set_private(GPA, 4 * PAGE_SIZE)
    assert cpu.first_not(0, GPA, 4) is None
    cpu.stamp(GPA, STAMP, 4)
    vm.set_shared(GPA, 4 * PAGE_SIZE)
    vm.set_private(GPA, 4 * PAGE_SIZE)
    assert cpu.first_unstamped(GPA, STAMP, 4) is None
    gmem.punch(PAGE_SIZE, 2 * PAGE_SIZE)
    assert gmem.allocated_pages() == 2
    seen = [cpu.load(GPA + page * PAGE_SIZE) for page in range(4)]
    assert seen == [STAMP, 0, 0, STAMP + 3]
    assert gmem.allocated_pages() == 4
