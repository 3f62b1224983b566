"""GM-MAP: advice on a mapping (madvise), and what else is asked of mappings: locking, residency, syncing, growing."""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kvmgmem import syscalls
from kvmgmem.abi import OK, PAGE_SIZE, MiB
from kvmgmem.advice import Advice
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import Fault, Mapping
from kvmgmem.processes import in_child
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.host_faults import assert_sigbus
from kvmgmem.testing.smaps import Smaps

PROT_NONE = 0
MAP_FIXED_NOREPLACE = 0x10_0000
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
HUGE = 2 * MiB
STAMP = 0x5EED_0000_0000_0001
SOME = 4 * PAGE_SIZE

mappable = gmem_kinds("gM", "gMS")
shared_from_start = gmem_kinds("gMS")


def stamp(host: Mapping, pages: int) -> None:
    """Give each of the first pages a value of its own."""
    for page in range(pages):
        host.store(STAMP + page, page * PAGE_SIZE)


def stamps(host: Mapping, pages: int) -> list[int]:
    """What the first pages hold, less the stamp: 0, 1, 2, ... if nothing was lost."""
    return [host.load(page * PAGE_SIZE) - STAMP for page in range(pages)]


@contextmanager
def aligned_anonymous(size: int) -> Iterator[Mapping]:
    """Anonymous memory at a multiple of its size; it may be unmapped within the block."""
    with Mapping.anonymous(2 * size) as reserve:
        start = -(-reserve.address // size) * size
    mapping = Mapping.try_map(size, address=start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE)
    assert isinstance(mapping, Mapping)
    with mapping:
        yield mapping


@contract("GM-MAP-019")
@shared_from_start
def test_dontneed_keeps_the_data(gmem: GuestMemfd) -> None:
    """MADV_DONTNEED drops the page tables' entries only: the pages stay allocated and keep their contents."""
    with gmem.map() as host:
        stamp(host, 4)
        assert Smaps(host).size("Rss") == SOME
        assert host.advise(Advice.DONTNEED) == OK
        assert Smaps(host).size("Rss") == 0
        assert gmem.allocated_pages() == 4
        assert stamps(host, 4) == [0, 1, 2, 3]
        assert gmem.allocated_pages() == 4


@contract("GM-MAP-020")
@mappable
def test_remove_punches_a_hole(running: Running) -> None:
    """MADV_REMOVE frees the pages of exactly its range; mappings and guest find new zero pages there."""
    for page in range(4):
        running.cpu.store(GPA + page * PAGE_SIZE, STAMP + page)
    # The mapping starts in the middle, so that an offset within it is not one within the file.
    with running.gmem.map(SOME, PAGE_SIZE) as host:
        assert host.advise(Advice.REMOVE, 0, 2 * PAGE_SIZE) == OK
        assert running.gmem.allocated_pages() == 2
        assert [running.cpu.load(GPA + page * PAGE_SIZE) for page in range(4)] == [STAMP, 0, 0, STAMP + 3]
        if running.gmem.kind == "gMS":
            assert [host.load(page * PAGE_SIZE) for page in range(3)] == [0, 0, STAMP + 3]


@contract("GM-MAP-020")
@shared_from_start
def test_remove_takes_the_pages_from_other_mappings(gmem: GuestMemfd) -> None:
    """A page removed through one mapping is gone from the others, which fault a new zero page in."""
    with gmem.map() as host, gmem.map() as other:
        stamp(host, 2)
        assert (other.load(), other.load(PAGE_SIZE)) == (STAMP, STAMP + 1)
        assert host.advise(Advice.REMOVE, 0, PAGE_SIZE) == OK
        assert (other.load(), other.load(PAGE_SIZE)) == (0, STAMP + 1)
        other.store(STAMP + 7)
        assert host.load() == STAMP + 7


@contract("GM-MAP-021")
@mappable
def test_remove_needs_no_writable_protection(gmem: GuestMemfd) -> None:
    """MADV_REMOVE asks whether the shared mapping could be made writable, not whether it is, and touches no memory."""
    for prot in (PROT_NONE, mmap.PROT_READ):
        gmem.allocate(0, SOME)
        with gmem.map(prot=prot) as host:
            assert host.advise(Advice.REMOVE, 0, 3 * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == 1


@contract("GM-MAP-021")
@mappable
def test_remove_of_locked_memory_is_refused(gmem: GuestMemfd) -> None:
    """MADV_REMOVE refuses a locked range and leaves it alone; unlocked, the same range can be removed."""
    gmem.allocate(0, SOME)
    with gmem.map(SOME) as host:
        # On memory that cannot be touched mlock fails to populate, after it has marked the mapping as locked (mm/mlock.c).
        assert syscalls.mlock(host.address, SOME) == (OK if gmem.kind == "gMS" else Errno.ENOMEM)
        assert host.advise(Advice.REMOVE) == Errno.EINVAL
        assert gmem.allocated_pages() == 4
        assert syscalls.munlock(host.address, SOME) == OK
        assert host.advise(Advice.REMOVE) == OK
        assert gmem.allocated_pages() == 0


@contract("GM-MAP-022")
@mappable
def test_advice_for_anonymous_memory_is_refused(gmem: GuestMemfd) -> None:
    """What is meant for anonymous memory only, freeing it lazily or wiping it on fork, is EINVAL for gmem."""
    with Mapping.anonymous(SOME) as anonymous, gmem.map() as host:
        assert host.advise(Advice.DONTNEED) == OK
        for advice in (Advice.FREE, Advice.WIPEONFORK):
            assert anonymous.advise(advice) == OK, advice
            assert host.advise(advice) == Errno.EINVAL, advice


def assert_changes_nothing(gmem: GuestMemfd, *advices: Advice) -> None:
    """Each piece of advice must be accepted, and leave contents and residency alone."""
    with gmem.map() as host:
        stamp(host, 4)
        for advice in advices:
            assert host.advise(advice) == OK, advice
            assert gmem.allocated_pages() == 4, advice
            assert host.resident_pages() == [True] * 4 + [False] * (gmem.pages - 4), advice
            assert stamps(host, 4) == [0, 1, 2, 3], advice


@contract("GM-MAP-023")
@shared_from_start
def test_advice_about_reclaim_changes_nothing(gmem: GuestMemfd) -> None:
    """gmem is never reclaimed: advice to do it soon, now or not at all is accepted and without effect."""
    assert_changes_nothing(gmem, Advice.COLD, Advice.PAGEOUT, Advice.WILLNEED)


@contract("GM-MAP-023")
@requires(config="KSM")
@shared_from_start
def test_advice_to_merge_changes_nothing(gmem: GuestMemfd) -> None:
    """Merging equal pages is for anonymous memory: MADV_MERGEABLE is accepted and does not even mark the mapping."""
    with gmem.map() as host:
        assert host.advise(Advice.MERGEABLE) == OK
        assert "mg" not in Smaps(host).flags
    assert_changes_nothing(gmem, Advice.MERGEABLE)


@contract("GM-MAP-023")
@requires(config="TRANSPARENT_HUGEPAGE")
@shared_from_start
def test_advice_to_use_huge_pages_changes_nothing(gmem: GuestMemfd) -> None:
    """gmem consists of base pages: MADV_HUGEPAGE is accepted and without effect."""
    assert_changes_nothing(gmem, Advice.HUGEPAGE)


@contract("GM-MAP-024")
@requires(config="TRANSPARENT_HUGEPAGE")
@shared_from_start
def test_collapse_is_refused(gmem: GuestMemfd) -> None:
    """gmem consists of base pages: a whole, aligned huge page of it cannot be collapsed."""
    with aligned_anonymous(HUGE) as anonymous:
        anonymous.fill(1)
        # No huge page may be free (ENOMEM, EAGAIN), but what is EINVAL for gmem is not a matter of the request.
        assert anonymous.advise(Advice.COLLAPSE) in (OK, Errno.ENOMEM, Errno.EAGAIN)
        anonymous.unmap()
        place = mmap.MAP_SHARED | MAP_FIXED_NOREPLACE
        mapping = Mapping.try_map(HUGE, fd=gmem, address=anonymous.address, flags=place)
        assert isinstance(mapping, Mapping)
        with mapping as host:
            host.fill(2)
            answer = host.advise(Advice.COLLAPSE)
            known_bug("B17").expect(answer, Errno.EINVAL, shows=OK)
            if answer != OK:  # a large folio in a gmem makes the next fault warn
                assert host.is_filled_with(2)
    assert gmem.allocated_pages() == gmem.pages


@contract("GM-MAP-025")
@mappable
def test_populate_reports_what_it_cannot_fault_in(gmem: GuestMemfd) -> None:
    """MADV_POPULATE faults shared memory in; memory the host may not touch, or past the end, is EFAULT."""
    wanted, pages = (OK, 4) if gmem.kind == "gMS" else (Errno.EFAULT, 0)
    for advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        with gmem.map(SIZE + PAGE_SIZE) as host:
            assert host.advise(advice, PAGE_SIZE, SOME) == wanted, advice
            assert gmem.allocated_pages() == pages, advice
            assert host.resident_pages()[:6] == [False] + [bool(pages)] * 4 + [False], advice
            assert Smaps(host).size("Rss") == pages * PAGE_SIZE, advice
            assert host.advise(advice, SIZE, PAGE_SIZE) == Errno.EFAULT, advice
        gmem.punch()


@contract("GM-MAP-026")
@mappable
def test_map_populate_never_fails(gmem: GuestMemfd) -> None:
    """MAP_POPULATE fills in what it can: the mapping succeeds whether its memory can be touched or not."""
    for pages, length in ((0, SOME), (4, SOME), (gmem.pages, SIZE + PAGE_SIZE)):
        populate = mmap.MAP_POPULATE if pages else 0
        mapping = gmem.raw.map(length, flags=mmap.MAP_SHARED | populate)
        assert isinstance(mapping, Mapping)
        with mapping as host:
            expected = pages if gmem.kind == "gMS" else 0
            assert gmem.allocated_pages() == expected
            assert Smaps(host).size("Rss") == expected * PAGE_SIZE


@contract("GM-MAP-027")
@mappable
def test_mlock_populates_or_reports(gmem: GuestMemfd) -> None:
    """mlock populates shared memory; memory the host may not touch, or past the end of the file, is ENOMEM."""
    with gmem.map(SIZE + PAGE_SIZE) as host:
        wanted, pages = (OK, 4) if gmem.kind == "gMS" else (Errno.ENOMEM, 0)
        assert syscalls.mlock(host.address, SOME) == wanted
        assert gmem.allocated_pages() == pages
        assert syscalls.mlock(host.address + SIZE, PAGE_SIZE) == Errno.ENOMEM
        assert syscalls.munlock(host.address, SIZE + PAGE_SIZE) == OK
        assert "lo" not in Smaps(host).flags


@contract("GM-MAP-028")
@shared_from_start
def test_guards_hide_pages_and_give_them_back(gmem: GuestMemfd) -> None:
    """A guard makes accesses to its pages raise SIGSEGV, in this mapping only; removed, the data is back."""
    with gmem.map() as host, gmem.map() as other:
        stamp(host, 4)
        assert host.advise(Advice.GUARD_INSTALL, PAGE_SIZE, 2 * PAGE_SIZE) == OK
        for page in (1, 2):
            fault = host.try_load(page * PAGE_SIZE)
            assert isinstance(fault, Fault)
            assert (fault.signal.name, fault.address) == ("SIGSEGV", host.address + page * PAGE_SIZE)
            assert host.try_store(0, page * PAGE_SIZE) == fault
        assert (host.load(), host.load(3 * PAGE_SIZE)) == (STAMP, STAMP + 3)
        assert stamps(other, 4) == [0, 1, 2, 3]
        assert gmem.allocated_pages() == 4
        assert host.advise(Advice.GUARD_REMOVE, PAGE_SIZE, 2 * PAGE_SIZE) == OK
        assert stamps(host, 4) == [0, 1, 2, 3]


@contract("GM-MAP-029")
@shared_from_start
def test_dontfork_keeps_the_mapping_from_children(gmem: GuestMemfd) -> None:
    """MADV_DONTFORK leaves the mapping out of a child, where its addresses raise SIGSEGV; MADV_DOFORK brings it back."""
    with gmem.map() as host:
        host.store(STAMP)
        assert in_child(host.try_load) == STAMP
        assert host.advise(Advice.DONTFORK) == OK
        fault = in_child(host.try_load)
        assert isinstance(fault, Fault)
        assert (fault.signal.name, fault.address) == ("SIGSEGV", host.address)
        assert host.load() == STAMP
        assert host.advise(Advice.DOFORK) == OK
        assert in_child(host.try_load) == STAMP


@contract("GM-MAP-030")
@mappable
def test_mincore_reports_populated_pages(running: Running) -> None:
    """mincore tells pages that were populated, by guest or host; those only allocated count for nothing, mapped or not."""
    running.gmem.allocate(0, SOME)
    with running.gmem.map(SOME) as host, running.gmem.map(SOME) as other:
        assert host.resident_pages() == [False] * 4
        running.cpu.store(GPA + 2 * PAGE_SIZE, STAMP)
        expected = [False, False, True, False]
        if running.gmem.kind == "gMS":
            other.load()
            expected[0] = True
        assert host.resident_pages() == expected
        assert running.gmem.allocated_pages() == 4
        running.gmem.punch(2 * PAGE_SIZE, PAGE_SIZE)
        assert host.resident_pages() == [expected[0], False, False, False]


@contract("GM-MAP-031")
@mappable
def test_msync_has_nothing_to_write_to(gmem: GuestMemfd) -> None:
    """There is no storage behind gmem: msync with MS_SYNC is EINVAL, while ASYNC and INVALIDATE have nothing to do."""
    with gmem.map() as host:
        if gmem.kind == "gMS":
            stamp(host, 4)
        for flags in (0, MS_ASYNC, MS_INVALIDATE, MS_ASYNC | MS_INVALIDATE):
            assert syscalls.msync(host.address, SIZE, flags) == OK
        for flags in (MS_SYNC, MS_SYNC | MS_INVALIDATE):
            assert syscalls.msync(host.address, SIZE, flags) == Errno.EINVAL
        if gmem.kind == "gMS":
            assert stamps(host, 4) == [0, 1, 2, 3]


@contract("GM-MAP-032")
@shared_from_start
def test_mapping_can_grow_past_the_end_of_the_file(gmem: GuestMemfd) -> None:
    """mremap can grow a mapping beyond the file's size: data and pages stay, and only the new tail raises SIGBUS."""
    with gmem.map(SIZE - PAGE_SIZE) as host:
        stamp(host, 4)
        assert not isinstance(host.resize(SIZE + 2 * PAGE_SIZE), Errno)
        assert stamps(host, 4) == [0, 1, 2, 3]
        host.store(STAMP, SIZE - 8)
        for offset in (SIZE, SIZE + PAGE_SIZE):
            assert_sigbus(host, offset)
        assert gmem.allocated_pages() == 5


@contract("GM-MAP-042")
@shared_from_start
def test_smaps_shows_shared_file_memory_of_base_pages(gmem: GuestMemfd) -> None:
    """In smaps a gmem mapping is shared file memory in base pages: touched pages are resident, none is anonymous or huge."""
    with ExitStack() as stack:
        host, other = (stack.enter_context(gmem.map()) for _ in range(2))
        for mapping in (host, other):
            stamp(mapping, 4)
        smaps = Smaps(host)
        assert "kvm-gmem" in smaps.header
        assert " rw-s " in smaps.header
        assert {"sh", "rd", "wr"} <= smaps.flags
        assert (smaps.size("Size"), smaps.size("Rss"), smaps.size("Pss")) == (SIZE, SOME, SOME // 2)
        assert smaps.size("Shared_Clean") + smaps.size("Shared_Dirty") == SOME
        assert (smaps.size("KernelPageSize"), smaps.size("MMUPageSize")) == (PAGE_SIZE, PAGE_SIZE)
        for field in ("Anonymous", "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Swap", "Locked"):
            assert smaps.size(field) == 0, field
        assert smaps.number("THPeligible") == 0
