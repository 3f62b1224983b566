"""GM-HWP: memory errors in gmem pages.

Only pages that the host can map can be poisoned by madvise, so what a guest sees is shown on gMS gmem; the private half of
GM-HWP-005 (exit flag 8) takes a memory error that comes from hardware.
"""

from contextlib import closing

import pytest

from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.advice import Advice
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import MemoryFaultExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, disruptive, gmem_kinds, requires, vm_types, wait_until, would_show
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.host_faults import assert_sigbus
from kvmgmem.testing.hwpoison import machine_check, poison, run_guarded
from kvmgmem.testing.kernel_log import KernelLog
from kvmgmem.testing.meminfo import meminfo

STAMP = 0x1DEA_0000_0000_0001
PAGE = 5
AT = PAGE * PAGE_SIZE
PLAIN_GPA = 2 * GPA
MF_DELAYED = 2  # include/linux/mm.h, enum mf_result


def corrupted_pages() -> int:
    """How many pages this kernel has taken out of use because they were reported broken."""
    return meminfo("HardwareCorrupted") // PAGE_SIZE


def poisoned(gpa: int) -> RunResult:
    """What KVM_RUN answers when a guest needs a broken page of gmem."""
    return RunResult(Errno.EHWPOISON, MemoryFaultExit(0, gpa, PAGE_SIZE))


def poison_at(gmem: GuestMemfd, offset: int = AT) -> None:
    """Break one page, by a mapping that is gone again afterwards."""
    with gmem.map(PAGE_SIZE, offset) as mapping:
        assert poison(mapping)[0] == Errno.EBUSY


@contract("GM-HWP-001")
@requires("no-memory-failure")
@vm_types("default")
@gmem_kinds("gMS")
@pytest.mark.parametrize("advice", [Advice.HWPOISON, Advice.SOFT_OFFLINE], ids=["hwpoison", "soft-offline"])
def test_without_memory_failure_the_advice_is_unknown(gmem: GuestMemfd, advice: Advice) -> None:
    """A kernel without CONFIG_MEMORY_FAILURE does not know the advice to poison a page or to move off it: EINVAL."""
    with gmem.map() as mapping:
        mapping.store(STAMP)
        assert mapping.advise(Advice.COLD, 0, PAGE_SIZE) == OK
        assert mapping.advise(advice, 0, PAGE_SIZE) == Errno.EINVAL
        assert mapping.load() == STAMP


@contract("GM-HWP-002")
@disruptive()
@requires("memory-failure", "root")
@vm_types("default")
@gmem_kinds("gMS")
@pytest.mark.parametrize("use", ["read", "host-store", "guest-store"])
def test_poisoning_reports_busy_although_the_page_is_out_of_use(running: Running, use: str) -> None:
    """Poisoning a gmem page takes it out of use, keeps it in the file, and is EBUSY: "delayed" counts as failed.

    Who poisons a page gets SIGBUS for it if the page was dirty, by a store of the host or a guest's fault.
    """
    gmem, before = running.gmem, corrupted_pages()
    if use == "guest-store":
        running.cpu.store(GPA + AT, STAMP)
    with gmem.map() as mapping:
        mapping.store(STAMP, AT + PAGE_SIZE)
        mapping.load(AT - PAGE_SIZE)
        if use == "host-store":
            mapping.store(STAMP, AT)
        else:
            mapping.load(AT)
        signalled = None if use == "read" else machine_check(mapping.address + AT)
        assert poison(mapping, AT) == (Errno.EBUSY, signalled)
        assert corrupted_pages() == before + 1
        assert gmem.allocated_pages(AT, PAGE_SIZE) == 1
        assert mapping.load(AT + PAGE_SIZE) == STAMP
        assert mapping.load(AT - PAGE_SIZE) == 0
        # A broken page is not there to be broken again.
        assert poison(mapping, AT)[0] == Errno.EFAULT
        assert corrupted_pages() == before + 1


@contract("GM-HWP-002")
@disruptive()
@requires("memory-failure", "root")
@vm_types("default")
@gmem_kinds("gMS")
def test_the_log_tells_what_gmem_said_of_a_broken_page(gmem: GuestMemfd) -> None:
    """What gmem answers where a page must go is "delayed", neither done nor failed; the kernel's log has the number."""
    with gmem.map() as mapping, closing(KernelLog()) as log:
        assert not log.error
        mapping.store(STAMP, AT)
        assert poison(mapping, AT)[0] == Errno.EBUSY
        lines = log.new_lines()
    told = [line.rpartition(": ")[2] for line in lines if "Failed to punch page" in line]
    assert told == [str(MF_DELAYED)], lines


@contract("GM-HWP-003")
@disruptive()
@requires("memory-failure", "root")
@gmem_kinds("gM")
def test_memory_the_host_may_not_touch_cannot_be_poisoned(gmem: GuestMemfd) -> None:
    """madvise finds no page to poison or to move off where the host may not touch the memory: EFAULT, nothing happens."""
    gmem.allocate(0, 2 * PAGE_SIZE)
    before = corrupted_pages()
    with gmem.map() as mapping:
        assert poison(mapping) == (Errno.EFAULT, None)
        assert mapping.advise(Advice.SOFT_OFFLINE, 0, PAGE_SIZE) == Errno.EFAULT
        assert corrupted_pages() == before
        assert_sigbus(mapping)  # and not a machine check
    assert gmem.allocated_pages() == 2
    # The control: memory that it may touch.
    with Mapping.anonymous(PAGE_SIZE) as plain:
        plain.store(STAMP)
        assert poison(plain) == (OK, machine_check(plain.address))
    assert corrupted_pages() == before + 1


@contract("GM-HWP-004")
@disruptive()
@requires("memory-failure", "root")
@vm_types("default")
@gmem_kinds("gMS")
def test_host_access_to_poison_is_a_machine_check(gmem: GuestMemfd) -> None:
    """The host gets SIGBUS with BUS_MCEERR_AR at the address it touches, in mappings made before and after the error."""
    with gmem.map() as old, gmem.map() as never_touched:
        old.store(STAMP, AT)
        old.store(STAMP, AT + PAGE_SIZE)
        poison(old, AT)
        with gmem.map() as new:
            for mapping in (old, never_touched, new):
                for offset, width in ((AT, 8), (AT + PAGE_SIZE - 1, 1)):
                    assert mapping.try_load(offset, width) == machine_check(mapping.address + offset)
                    assert mapping.try_store(0, offset, width) == machine_check(mapping.address + offset)
                assert mapping.load(AT + PAGE_SIZE) == STAMP
                assert mapping.load(AT - PAGE_SIZE) == 0


@contract("GM-HWP-005")
@disruptive()
@requires("memory-failure", "root", "x86")
@vm_types("default")
@gmem_kinds("gMS")
@would_show("B13")
def test_guest_access_to_poison_goes_to_userspace(running: Running) -> None:
    """A guest's access to a broken gmem page is EHWPOISON with a MEMORY_FAULT exit, as often as it is tried."""
    cpu = running.cpu
    with running.gmem.map(PAGE_SIZE, AT) as mapping:
        mapping.store(STAMP)
        assert cpu.load(GPA + AT) == STAMP
    poison_at(running.gmem)
    for _ in range(2):
        assert cpu.try_load(GPA + AT + 8) == poisoned(GPA + AT)
        assert cpu.try_store(GPA + AT, STAMP, 1) == poisoned(GPA + AT)
    cpu.store(GPA + AT + PAGE_SIZE, STAMP)
    assert cpu.load(GPA + AT + PAGE_SIZE) == STAMP


@contract("GM-HWP-006")
@disruptive()
@requires("memory-failure", "root", "hardware-mode")
@vm_types("default")
@gmem_kinds("gMS")
def test_poison_is_taken_from_a_running_guest(running: Running) -> None:
    """A gmem page that breaks is unmapped from guests at once: one that is storing to it is thrown out."""
    gmem, cpu = running.gmem, running.cpu
    with gmem.map(PAGE_SIZE, AT) as mapping:
        cpu.start("hammer", rdi=GPA + AT)
        with cpu.running() as runs:
            wait_until(lambda: mapping.load() > 0, "the guest stores")
            stored = mapping.load()
            wait_until(lambda: mapping.load() > stored, "the guest goes on storing")
            assert poison(mapping)[0] == Errno.EBUSY
            assert runs.result() == poisoned(GPA + AT)


@contract("GM-HWP-007")
@disruptive()
@requires("memory-failure", "root", "hardware-mode")
@vm_types("default")
@gmem_kinds("gMS")
def test_poison_in_plain_memory_is_signalled_to_the_vcpu_thread(running: Running) -> None:
    """In a plain slot it is the thread in KVM_RUN that gets SIGBUS, with the host address; in gmem there is no signal."""
    cpu, gmem = running.cpu, running.gmem
    with Mapping.anonymous(SIZE) as memory:
        running.vm.set_region(MemoryRegion(slot=1, gpa=PLAIN_GPA, size=SIZE, hva=memory.address))
        cpu.store(PLAIN_GPA + AT, STAMP)
        assert poison(memory, AT)[0] == OK
        poison_at(gmem)
        for gpa, wanted in (
            (PLAIN_GPA, (Errno.EINTR, machine_check(memory.address + AT))),
            (GPA, (Errno.EHWPOISON, None)),
        ):
            cpu.start("load8", rdi=gpa + AT)
            assert run_guarded(cpu.vcpu) == wanted
        # Only that page is lost.
        assert cpu.load(PLAIN_GPA + AT + PAGE_SIZE) == 0
        running.vm.delete_region(1)


@contract("GM-HWP-008")
@disruptive()
@requires("memory-failure", "root", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_punching_a_hole_heals_the_address(running: Running) -> None:
    """A hole punched over a broken page makes the address good again, with a fresh page of zeroes; the page stays lost."""
    gmem, cpu = running.gmem, running.cpu
    cpu.stamp(GPA, STAMP, 2 * PAGE)
    poison_at(gmem)
    broken = corrupted_pages()
    assert cpu.try_load(GPA + AT) == poisoned(GPA + AT)
    gmem.punch(AT, PAGE_SIZE)
    assert gmem.allocated_pages(AT, PAGE_SIZE) == 0
    assert cpu.load(GPA + AT) == 0
    cpu.store(GPA + AT, STAMP + PAGE)
    assert cpu.first_unstamped(GPA, STAMP, 2 * PAGE) is None
    with gmem.map() as mapping:
        assert mapping.load(AT) == STAMP + PAGE
    assert corrupted_pages() == broken


def prefault(running: Running, offset: int, size: int) -> tuple[Answer, int, int]:
    """Prefault part of the gmem: the answer, and the offset and the size of what is left."""
    answer, gpa, left = running.cpu.vcpu.raw.pre_fault(GPA + offset, size)
    return answer, gpa - GPA, left


@contract("GM-HWP-009")
@disruptive()
@requires("memory-failure", "root", "prefault")
@vm_types("default")
@gmem_kinds("gMS")
def test_prefaulting_stops_at_poison(running: Running) -> None:
    """Prefaulting does the pages before a broken one, and is EHWPOISON at it; allocating over it is no cure."""
    gmem = running.gmem
    poison_at(gmem)
    assert gmem.raw.allocate(0, SIZE) == OK
    assert prefault(running, AT, PAGE_SIZE) == (Errno.EHWPOISON, AT, PAGE_SIZE)
    assert prefault(running, 0, SIZE) == (OK, AT, SIZE - AT)
    assert prefault(running, AT, SIZE - AT) == (Errno.EHWPOISON, AT, SIZE - AT)
    assert prefault(running, AT + PAGE_SIZE, PAGE_SIZE) == (OK, AT + PAGE_SIZE + PAGE_SIZE, 0)
    assert running.cpu.try_load(GPA + AT) == poisoned(GPA + AT)
    gmem.punch(AT, PAGE_SIZE)
    assert prefault(running, AT, PAGE_SIZE) == (OK, AT + PAGE_SIZE, 0)


@contract("GM-HWP-010")
@disruptive()
@requires("memory-failure", "root", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_pages_in_use_cannot_be_moved_away_from(running: Running) -> None:
    """Soft offlining would migrate the page, which gmem does not do: EBUSY, and data and page stay as they are."""
    gmem, cpu, before = running.gmem, running.cpu, corrupted_pages()
    cpu.store(GPA + AT, STAMP)
    with gmem.map() as mapping, Mapping.anonymous(PAGE_SIZE) as plain:
        plain.store(STAMP)
        assert plain.advise(Advice.SOFT_OFFLINE) == OK
        assert corrupted_pages() == before + 1
        assert mapping.advise(Advice.SOFT_OFFLINE, AT, PAGE_SIZE) == Errno.EBUSY
        assert corrupted_pages() == before + 1
        assert (plain.load(), mapping.load(AT), cpu.load(GPA + AT)) == (STAMP, STAMP, STAMP)
        assert gmem.allocated_pages() == 1
