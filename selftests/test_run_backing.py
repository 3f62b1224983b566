"""GM-RUN: plain slots whose pages come late, or are huge, as a VMM has them beside gmem."""

import os
from collections.abc import Iterator

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, MemFlag
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu, is_report
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, requires, vm_types
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.stats import read_stat
from kvmgmem.testing.waiting import TIME_SCALE
from kvmgmem.userfaultfd import FEATURE_MINOR_SHMEM, RegisterMode, Userfaultfd
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
PAGES = SIZE // PAGE_SIZE


@contract("GM-RUN-046")
@vm_types("default")
@requires("userfaultfd", "root")
@pytest.mark.parametrize("mode", [RegisterMode.MISSING, RegisterMode.MINOR], ids=["missing", "minor"])
def test_a_vcpu_waits_for_a_page_that_userspace_supplies(vm: Vm, cpu: GuestCpu, mode: RegisterMode) -> None:
    """A guest's access to a page that userfaultfd watches waits until userspace supplies the page, and then sees it."""
    with OwnedFd(os.memfd_create("backing")) as file:
        os.truncate(file.fileno(), SIZE)
        with Mapping.of(file, SIZE) as memory, Userfaultfd(FEATURE_MINOR_SHMEM, user_mode_only=False) as faults:
            if mode is RegisterMode.MINOR:
                # Through another mapping: the pages are in the file, and not yet in the mapping that is watched.
                with Mapping.of(file, SIZE) as other:
                    for page in range(4):
                        other.store(STAMP + page, page * PAGE_SIZE)
            assert faults.register(memory.address, memory.length, mode) == OK
            vm.set_region(MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=memory.address))
            for page, program in ((1, "load8"), (2, "store1")):
                cpu.start(program, rdi=GPA + page * PAGE_SIZE, rsi=0x11)
                with cpu.running() as run:
                    address = faults.wait(10 * TIME_SCALE)
                    assert address == memory.address + page * PAGE_SIZE
                    assert run.alive
                    if mode is RegisterMode.MINOR:
                        assert faults.proceed(address) == OK
                    else:
                        assert faults.copy(address, (STAMP + page).to_bytes(8, "little")) == OK
                    assert is_report(run.result())
            assert cpu.load(GPA + PAGE_SIZE) == STAMP + 1
            assert memory.load(2 * PAGE_SIZE) == STAMP | 0x11


@contract("GM-ATTR-018", "GM-RUN-046", "C24")
@vm_types("sw-protected")
@gmem_kinds("g0")
@requires("userfaultfd", "root")
def test_a_page_converted_while_a_vcpu_waits_for_it_is_not_mapped(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A vCPU that waits for a shared page which becomes private meanwhile sees the private one once it goes on.

    The conversion has nothing to unmap, and is over when the vCPU has its page: only the count of invalidations tells that
    it must ask again (mmu_invalidate_seq).
    """
    with Mapping.anonymous(SIZE) as shared, Userfaultfd(user_mode_only=False) as faults:
        assert faults.register(shared.address, shared.length, RegisterMode.MISSING) == OK
        vm.bind(gmem, gpa=GPA, hva=shared.address)
        for page, converted in ((1, False), (2, True)):
            cpu.start("load8", rdi=GPA + page * PAGE_SIZE)
            with cpu.running() as run:
                address = faults.wait(10 * TIME_SCALE)
                assert address == shared.address + page * PAGE_SIZE
                if converted:
                    vm.set_private(GPA + page * PAGE_SIZE, PAGE_SIZE)
                assert faults.copy(address, (STAMP + page).to_bytes(8, "little")) == OK
                assert cpu.finish(run.result()).rax == (0 if converted else STAMP + page)
            assert shared.load(page * PAGE_SIZE) == STAMP + page
        assert gmem.allocated_pages() == 1


@pytest.fixture
def huge_page() -> Iterator[Mapping]:
    """An aligned 2 MiB of anonymous memory that asks for a huge page."""
    with Mapping.anonymous(2 * SIZE) as room:
        aligned = Mapping(-(-room.address // SIZE) * SIZE, SIZE)
        assert aligned.advise(Advice.HUGEPAGE) == 0
        aligned.fill(0)
        yield aligned
        aligned._mapped = False  # it is part of `room`


@contract("GM-RUN-047")
@vm_types("default")
@requires("huge-pages")
def test_huge_mappings_are_split_while_dirty_pages_are_logged(vm: Vm, cpu: GuestCpu, huge_page: Mapping) -> None:
    """A huge guest mapping of a plain slot is split while dirty pages are logged, and comes back after, contents and all."""
    region = MemoryRegion(slot=1, gpa=GPA, size=SIZE, hva=huge_page.address)

    def holds(*written: int) -> bool:
        """Whether guest and host see a stamp on each page, and a different one where the guest has written since."""
        wanted = [STAMP + page + (PAGES if page in written else 0) for page in range(PAGES)]
        return wanted == [huge_page.load(page * PAGE_SIZE) for page in range(PAGES)] and all(
            cpu.load(GPA + page * PAGE_SIZE) == wanted[page] for page in (0, 2, 3, 4, 7, PAGES - 1)
        )

    vm.set_region(region)
    cpu.stamp(GPA, STAMP, PAGES)
    assert read_stat(vm, "pages_2m") == 1
    assert holds()

    vm.set_region(region.but(flags=MemFlag.LOG_DIRTY))
    assert vm.dirty_pages(1, PAGES) == set()
    for page in (3, 7):
        cpu.store(GPA + page * PAGE_SIZE, STAMP + page + PAGES)
    assert vm.dirty_pages(1, PAGES) == {3, 7}
    assert read_stat(vm, "pages_2m") == 0
    assert holds(3, 7)

    vm.set_region(region)
    assert holds(3, 7)
    assert read_stat(vm, "pages_2m") == 1
    cpu.store(GPA + 4 * PAGE_SIZE, STAMP + 4 + PAGES)
    assert holds(3, 4, 7)
