"""GM-MAP: which mappings of a guest_memfd there are, what accesses to them find, and who shares them.

The advice and the other calls on a mapping are in test_map_advice.py, the kernel's own accesses in test_map_io.py.
"""

import mmap
import os
import threading

from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MiB
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.memory import Mapping
from kvmgmem.processes import Channel, ChildProcess, in_child
from kvmgmem.testing import contract, gmem_kinds, requires
from kvmgmem.testing.dead_slots import assert_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.host_faults import assert_sigbus, sigsegv
from kvmgmem.vm import Vm

PROT_NONE = 0
PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
MAP_SHARED_VALIDATE = 0x03
MAP_GROWSDOWN = 0x0100
MAP_HUGETLB = 0x4_0000
MAP_SYNC = 0x8_0000
END_OF_OFFSETS = 1 << 63
STAMP = 0x5EED_0000_0000_0001
NOBODY = 65534

mappable = gmem_kinds("gM", "gMS")
shared_from_start = gmem_kinds("gMS")
PROTECTIONS = {"none": PROT_NONE, "read": mmap.PROT_READ, "read-write": PROT_RW}


def try_map(gmem: GuestMemfd, length: int = PAGE_SIZE, offset: int = 0, **how: int) -> int:
    """OK or the errno of a mapping request, whose mapping is gone when this returns."""
    mapping = gmem.raw.map(length, offset, **how)
    if isinstance(mapping, Errno):
        return mapping
    mapping.unmap()
    return OK


def map_each(gmem: GuestMemfd, flags: int) -> dict[str, int]:
    """What comes of mapping a page with each protection."""
    return {name: try_map(gmem, prot=prot, flags=flags) for name, prot in PROTECTIONS.items()}


@contract("GM-MAP-001", "GM-MAP-003")
@requires(cap=Cap.GUEST_MEMFD_FLAGS)
@gmem_kinds("g0", "gS")
def test_gmem_without_the_mmap_flag_cannot_be_mapped(vm: Vm, gmem: GuestMemfd) -> None:
    """Only a gmem created with the MMAP flag can be mapped; without it every mapping is ENODEV, private ones too."""
    with vm.create_guest_memfd(SIZE, gmem.flags | GmemFlag.MMAP) as other:
        assert map_each(other, mmap.MAP_SHARED) == dict.fromkeys(PROTECTIONS, OK)
    assert map_each(gmem, mmap.MAP_SHARED) == dict.fromkeys(PROTECTIONS, Errno.ENODEV)
    assert map_each(gmem, mmap.MAP_PRIVATE) == dict.fromkeys(PROTECTIONS, Errno.ENODEV)


@contract("GM-MAP-002", "GM-MAP-003")
@mappable
def test_private_mappings_are_refused(gmem: GuestMemfd) -> None:
    """A gmem can be mapped MAP_SHARED only: a private mapping would copy guest memory on write."""
    assert map_each(gmem, mmap.MAP_SHARED) == dict.fromkeys(PROTECTIONS, OK)
    assert map_each(gmem, mmap.MAP_PRIVATE) == dict.fromkeys(PROTECTIONS, Errno.EINVAL)


@contract("GM-MAP-004")
def test_executable_mappings_are_refused_first_of_all(gmem: GuestMemfd, host: Host) -> None:
    """gmem lies on a noexec mount: PROT_EXEC is EPERM, before it matters whether or how the gmem can be mapped at all.

    Before 6.16 the mount of anonymous inodes was not noexec; there no gmem can be mapped anyway.
    """
    refused = Errno.EPERM
    if not host.caps["GUEST_MEMFD_FLAGS"] and try_map(gmem, prot=mmap.PROT_EXEC, flags=mmap.MAP_SHARED) == Errno.ENODEV:
        refused = Errno.ENODEV
    can_be_mapped = bool(gmem.flags & GmemFlag.MMAP)
    without = {mmap.MAP_SHARED: OK, mmap.MAP_PRIVATE: Errno.EINVAL} if can_be_mapped else {}
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        for prot in PROTECTIONS.values():
            assert try_map(gmem, prot=prot, flags=flags) == without.get(flags, Errno.ENODEV), (flags, prot)
            assert try_map(gmem, prot=prot | mmap.PROT_EXEC, flags=flags) == refused, (flags, prot)


@contract("GM-MAP-005")
@mappable
def test_mapping_cannot_be_made_executable(gmem: GuestMemfd) -> None:
    """mprotect cannot add PROT_EXEC to a gmem mapping later either."""
    with gmem.map() as host:
        for prot in (PROT_NONE, mmap.PROT_READ, PROT_RW):
            assert host.protect(prot) == OK
            assert host.protect(prot | mmap.PROT_EXEC) == Errno.EACCES


@contract("GM-MAP-006")
@shared_from_start
def test_protection_can_be_raised_to_read_write(gmem: GuestMemfd) -> None:
    """A shared mapping may start with any protection but execution, and can be given PROT_WRITE later."""
    for prot in PROTECTIONS.values():
        with gmem.map(prot=prot) as host, gmem.map() as other:
            assert (host.try_store(0) is None) == (prot == PROT_RW)
            assert host.protect(PROT_RW) == OK
            host.store(STAMP + prot)
            assert other.load() == STAMP + prot


@contract("GM-MAP-007")
@mappable
def test_map_sync_is_refused_where_flags_are_validated(gmem: GuestMemfd) -> None:
    """MAP_SHARED_VALIDATE is accepted, and with MAP_SYNC refused; plain MAP_SHARED ignores MAP_SYNC."""
    assert try_map(gmem, flags=MAP_SHARED_VALIDATE) == OK
    assert try_map(gmem, flags=MAP_SHARED_VALIDATE | MAP_SYNC) == Errno.ENOTSUP
    assert try_map(gmem, flags=mmap.MAP_SHARED | MAP_SYNC) == OK


@contract("GM-MAP-008")
@mappable
def test_malformed_mapping_requests_are_refused(gmem: GuestMemfd) -> None:
    """What mmap refuses for any file it refuses for gmem: stacks, huge pages, no type, no length, no page's offset."""
    request = {"length": PAGE_SIZE, "offset": 0, "flags": mmap.MAP_SHARED}
    changes: dict[str, dict[str, int]] = {
        "growsdown": {"flags": mmap.MAP_SHARED | MAP_GROWSDOWN},
        "hugetlb": {"flags": mmap.MAP_SHARED | MAP_HUGETLB},
        "no type": {"flags": 0},
        "no length": {"length": 0},
        "offset of a byte": {"offset": 1},
        "offset of half a page": {"offset": PAGE_SIZE // 2},
    }
    assert try_map(gmem, **request) == OK
    answers = {name: try_map(gmem, **request | change) for name, change in changes.items()}
    assert answers == dict.fromkeys(changes, Errno.EINVAL)


@contract("GM-MAP-009")
@mappable
def test_mappings_may_lie_past_the_end_of_the_file(gmem: GuestMemfd) -> None:
    """mmap does not compare with the file's size: ranges past its end can be mapped, and only an access fails."""
    cut_by_the_end = [(0, SIZE + PAGE_SIZE), (SIZE - PAGE_SIZE, SIZE)]
    behind_the_end = [(SIZE, PAGE_SIZE), (SIZE + 64 * MiB, PAGE_SIZE)]
    for offset, length in cut_by_the_end + behind_the_end:
        with gmem.map(length, offset) as host:
            assert_sigbus(host, max(SIZE - offset, 0))
    assert gmem.allocated_pages() == 0


@contract("GM-MAP-010")
@mappable
def test_offsets_at_the_end_of_the_offset_space_overflow(gmem: GuestMemfd) -> None:
    """A mapping must end below the largest file size, 2^63-1: the last page of offsets cannot be mapped."""
    assert try_map(gmem, PAGE_SIZE, END_OF_OFFSETS - 2 * PAGE_SIZE) == OK
    assert try_map(gmem, PAGE_SIZE, END_OF_OFFSETS - PAGE_SIZE) == Errno.EOVERFLOW
    assert try_map(gmem, 2 * PAGE_SIZE, END_OF_OFFSETS - 2 * PAGE_SIZE) == Errno.EOVERFLOW
    assert try_map(gmem, PAGE_SIZE, END_OF_OFFSETS) == Errno.EOVERFLOW


@contract("GM-MAP-011")
@shared_from_start
def test_accesses_past_the_end_of_the_file_raise_sigbus(gmem: GuestMemfd) -> None:
    """The last byte of the file can be accessed, the first one behind it raises SIGBUS, and the file never grows."""
    with gmem.map(SIZE + 2 * PAGE_SIZE) as host:
        host.store(0xA5, SIZE - 1, width=1)
        assert host.load(SIZE - 1, width=1) == 0xA5
        for offset in (SIZE, SIZE + 8, SIZE + PAGE_SIZE):
            assert_sigbus(host, offset)
        assert host.load(SIZE - 1, width=1) == 0xA5
    assert gmem.allocated_pages() == 1
    assert os.fstat(gmem.fileno()).st_size == SIZE


@contract("GM-MAP-012")
@shared_from_start
def test_each_touched_page_is_allocated_and_zero(gmem: GuestMemfd) -> None:
    """Host accesses allocate page by page, loads as well as stores; a new page is zero, whatever was there before."""
    with gmem.map() as host:
        host.fill(0xA5)
        assert gmem.allocated_pages() == gmem.pages
        gmem.punch()
        assert gmem.allocated_pages() == 0
        for count, page in enumerate((3, 4, 100, gmem.pages - 1), 1):
            if page % 2:
                assert host.load(page * PAGE_SIZE) == 0
            else:
                host.store(0, page * PAGE_SIZE)
            assert gmem.allocated_pages() == count
            assert gmem.allocated_pages(page * PAGE_SIZE, PAGE_SIZE) == 1
            assert host.is_filled_with(0, page * PAGE_SIZE, PAGE_SIZE)
        assert host.is_filled_with(0)


@contract("GM-MAP-013")
@gmem_kinds("gM")
def test_memory_that_is_not_shared_cannot_be_touched(gmem: GuestMemfd) -> None:
    """A gmem without INIT_SHARED can be mapped, but every access raises SIGBUS and allocates nothing."""
    with gmem.map() as host:
        for offset in (0, PAGE_SIZE, SIZE - 8):
            assert_sigbus(host, offset)
    assert gmem.allocated_pages() == 0


@contract("GM-MAP-014")
@gmem_kinds("gM")
def test_populated_memory_that_is_not_shared_cannot_be_touched(running: Running) -> None:
    """It makes no difference to the host whether the guest or fallocate has populated the page: SIGBUS all the same."""
    with running.gmem.map() as host:
        running.cpu.store(GPA, STAMP)
        running.gmem.allocate(PAGE_SIZE, PAGE_SIZE)
        assert running.gmem.allocated_pages() == 2
        for offset in (0, PAGE_SIZE):
            assert_sigbus(host, offset)
        assert running.cpu.load(GPA) == STAMP
        assert running.cpu.load(GPA + PAGE_SIZE) == 0
    assert running.gmem.allocated_pages() == 2


@contract("GM-MAP-015")
@shared_from_start
def test_all_mappings_show_the_same_pages(gmem: GuestMemfd) -> None:
    """All mappings of a range, of this process, its threads and other processes, are views of the same pages."""

    def store_elsewhere(value: int) -> None:
        with gmem.map(PAGE_SIZE, PAGE_SIZE) as elsewhere:
            elsewhere.store(value)

    with gmem.map() as first, gmem.map(2 * PAGE_SIZE) as second:
        first.store(STAMP, PAGE_SIZE)
        assert second.load(PAGE_SIZE) == STAMP
        thread = threading.Thread(target=store_elsewhere, args=(STAMP + 1,))
        thread.start()
        thread.join()
        assert (first.load(PAGE_SIZE), second.load(PAGE_SIZE)) == (STAMP + 1, STAMP + 1)
        in_child(lambda: store_elsewhere(STAMP + 2))
        assert (first.load(PAGE_SIZE), second.load(PAGE_SIZE)) == (STAMP + 2, STAMP + 2)
    assert gmem.allocated_pages() == 1


@contract("GM-MAP-016")
@shared_from_start
def test_fork_shares_the_mapping_both_ways(gmem: GuestMemfd) -> None:
    """A child inherits the mapping, and what either stores from then on the other sees."""

    def child(channel: Channel) -> int:
        host.store(STAMP + 1, 8)
        host.store(STAMP + 2, PAGE_SIZE)
        channel.send("stored")
        channel.receive()
        return host.load()

    with gmem.map() as host:
        host.store(STAMP)
        # Without the descriptor, so that the inherited mapping is all there is.
        with ChildProcess(child, close_fds=[gmem.fileno()]) as process:
            assert process.receive() == "stored"
            assert (host.load(8), host.load(PAGE_SIZE)) == (STAMP + 1, STAMP + 2)
            host.store(STAMP + 3)
            process.send("go on")
            assert process.result() == STAMP + 3


@contract("GM-MAP-017")
@mappable
def test_mapping_keeps_file_and_bindings_alive(running: Running) -> None:
    """A mapping holds the file after its descriptor is closed, so that bound slots work until it is unmapped."""
    with running.gmem.map() as host:
        running.cpu.store(GPA, STAMP)
        running.gmem.close()
        running.cpu.store(GPA + PAGE_SIZE, STAMP + 1)
        assert (running.cpu.load(GPA), running.cpu.load(GPA + PAGE_SIZE)) == (STAMP, STAMP + 1)
        if running.gmem.kind == "gMS":
            assert (host.load(), host.load(PAGE_SIZE)) == (STAMP, STAMP + 1)
    assert_dead(running.cpu, GPA)


@contract("GM-MAP-018")
@shared_from_start
def test_protections_are_honoured(gmem: GuestMemfd) -> None:
    """Stores through a read-only mapping and any access through a PROT_NONE one raise SIGSEGV; the page stays as it was."""
    with gmem.map() as host, gmem.map(prot=mmap.PROT_READ) as reader, gmem.map(prot=PROT_NONE) as blind:
        host.store(STAMP)
        assert reader.load() == STAMP
        assert reader.try_store(STAMP + 1) == sigsegv(reader)
        assert blind.try_load() == sigsegv(blind)
        assert blind.try_store(STAMP + 1) == sigsegv(blind)
        assert host.load() == STAMP
        assert host.protect(mmap.PROT_READ) == OK
        assert host.try_store(STAMP + 1) == sigsegv(host)
        assert host.load() == STAMP


@contract("GM-MAP-018")
@gmem_kinds("gM")
def test_protections_come_before_the_memory(gmem: GuestMemfd) -> None:
    """What the mapping's protection forbids is SIGSEGV even where the memory itself would raise SIGBUS."""
    with gmem.map(prot=mmap.PROT_READ) as reader, gmem.map(prot=PROT_NONE) as blind:
        assert reader.try_store(STAMP) == sigsegv(reader)
        assert blind.try_load() == sigsegv(blind)
        assert_sigbus_on_load(reader)


def assert_sigbus_on_load(mapping: Mapping) -> None:
    """The same mapping, where its protection allows the access."""
    assert mapping.protect(PROT_RW) == OK
    assert_sigbus(mapping)


@contract("GM-MAP-043")
@requires("root")
@shared_from_start
def test_receiving_the_descriptor_is_all_the_permission_there_is(gmem: GuestMemfd) -> None:
    """A process without any privilege that was sent the descriptor can map, read and write the memory."""

    def stranger(channel: Channel) -> tuple[int, int]:
        _, (number,) = channel.receive_with_fds()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with GuestMemfd(number, SIZE, gmem.flags) as received, received.map() as memory:
            memory.store(STAMP + 1, SIZE - 8)
            return os.geteuid(), memory.load()

    with gmem.map() as host:
        host.store(STAMP)
        with ChildProcess(stranger, close_fds=[gmem.fileno()]) as process:
            process.send(fds=[gmem.fileno()])
            assert process.result() == (NOBODY, STAMP)
        assert host.load(SIZE - 8) == STAMP + 1
    assert gmem.allocated_pages() == 2
