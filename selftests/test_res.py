"""GM-RES: what gmem costs, who pays for it, and what limits it. RLIMIT_NOFILE (GM-RES-010) is in test_cre.py."""

import os
import resource
import signal
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmgmem import numa, syscalls
from kvmgmem.abi import OK, PAGE_SIZE, GiB, GmemFlag, KiB, MiB
from kvmgmem.advice import Advice
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.numa import Mode, Policy
from kvmgmem.processes import Channel, ChildProcess, in_child
from kvmgmem.testing import contract, disruptive, gmem_kinds, makes_gmem, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, Running
from kvmgmem.testing.meminfo import meminfo
from kvmgmem.testing.memory_cgroup import MemoryCgroup
from kvmgmem.testing.slab_caches import objects_in_use, slab_caches
from kvmgmem.testing.slot_metadata import metadata_bytes
from kvmgmem.testing.smaps import Smaps
from kvmgmem.vm import Vm

STAMP = 0x0E50_0000_0000_0001
SHARE = 8 * MiB
# How far memory.stat may be behind, and what Python itself may need meanwhile.
SLACK = 2 * MiB
NOBODY = 65534


def about(value: int, wanted: int) -> bool:
    """Whether a measured number of bytes is the wanted one but for noise."""
    return abs(value - wanted) < SLACK


def await_stat(group: MemoryCgroup, name: str, wanted: int) -> None:
    """Return once the kernel's figure for the group has come to be about the wanted one."""
    wait_until(lambda: about(group.stat(name), wanted), f"{name} of the group is about {wanted:#x}")


def allocate_in(group: MemoryCgroup, gmem: GuestMemfd, offset: int = 0, size: int = SHARE) -> None:
    """Allocate pages from a process in the group that ends afterwards."""

    def allocate() -> None:
        group.join()
        gmem.allocate(offset, size)

    in_child(allocate)


def become_nobody() -> None:
    """Give up root and with it CAP_IPC_LOCK, for ever."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def process_status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KiB for line in lines if line.startswith(f"{field}:"))


@contract("GM-RES-001")
def test_creation_allocates_no_pages(vm: Vm) -> None:
    """A gmem has no pages until some are allocated, however large it is."""
    with vm.create_guest_memfd(1 << 62) as gmem:
        assert gmem.allocated_pages() == 0
        assert os.fstat(gmem.fileno()).st_blocks == 0
        gmem.allocate(1 << 61, 2 * PAGE_SIZE)
        assert gmem.allocated_pages() == 2


@contract("GM-RES-001")
@requires("memcg", "root")
def test_creation_costs_no_memory(vm: Vm) -> None:
    """Creating a gmem costs what a file costs, and nothing for its size: its data is paid for when it is allocated."""
    with MemoryCgroup() as group:
        group.join()
        before = group.usage()
        gmems = [vm.create_guest_memfd(1 << 62) for _ in range(64)]
        assert about(group.usage(), before)
        gmems[0].allocate(1 << 61, SHARE)
        assert about(group.usage(), before + SHARE)
        for gmem in gmems:
            gmem.close()


def nowhere(length: int) -> Mapping:
    """Addresses behind which there is nothing, for the userspace_addr of a slot of more than 4 MiB.

    Not 0: where B24 shows, the slot's page n is filled from address n * 4096 of this process, and an interpreter that is
    not position independent lies at 4 MiB (seen with Debian's on 6.18 under kvm_pvm: the guest wrote into it).
    """
    return Mapping.anonymous(length, prot=0)


@contract("GM-RES-002")
@requires("memcg", "root", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_whoever_allocates_a_page_pays_for_it(running: Running, vm: Vm) -> None:
    """A page is charged to the memory cgroup of who needs it first: by fallocate, by a host access, or running a guest."""
    cpu = running.cpu
    with (
        vm.create_guest_memfd(3 * SHARE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem,
        MemoryCgroup() as allocating,
        MemoryCgroup() as touching,
        MemoryCgroup() as guests,
        MemoryCgroup() as late,
        nowhere(3 * SHARE) as nothing,
    ):
        vm.bind(gmem, slot=1, gpa=2 * GPA, hva=nothing.address)

        def touch() -> None:
            touching.join()
            with gmem.map(SHARE, SHARE) as mapping:
                mapping.fill(0xA5)

        def touch_all() -> None:
            late.join()
            with gmem.map() as mapping:
                mapping.fill(0x5A, 0, 2 * SHARE)
                assert mapping.load(2 * SHARE) == STAMP

        allocate_in(allocating, gmem)
        in_child(touch)
        guests.join()
        cpu.stamp(2 * GPA + 2 * SHARE, STAMP, SHARE // PAGE_SIZE)
        in_child(touch_all)
        for group in (allocating, touching, guests):
            await_stat(group, "file", SHARE)
            assert group.usage() >= SHARE
        await_stat(late, "file", 0)
        assert gmem.allocated_pages() == 3 * SHARE // PAGE_SIZE


@contract("GM-RES-003")
@requires("memcg", "root")
def test_a_hole_or_the_last_close_gives_the_charge_back(vm: Vm) -> None:
    """Pages are uncharged when a hole is punched over them or the file goes, not when its first descriptor does."""
    with vm.create_guest_memfd(2 * SHARE) as gmem, MemoryCgroup() as group:
        allocate_in(group, gmem, 0, 2 * SHARE)
        await_stat(group, "file", 2 * SHARE)
        gmem.punch(0, SHARE)
        await_stat(group, "file", SHARE)
        with gmem.duplicate() as other:
            gmem.close()
            assert other.allocated_pages() == SHARE // PAGE_SIZE
            await_stat(group, "file", SHARE)
        await_stat(group, "file", 0)
        wait_until(lambda: group.usage() < SLACK, "the group pays for nothing")


@contract("GM-RES-002", "GM-RES-003", "GM-LIFE-019")
@requires("memcg", "root", "x86")
@gmem_kinds("gM", "gMS")
def test_a_hole_gives_back_what_guests_were_charged_for(running: Running, vm: Vm, gmem_kind: GmemFlag) -> None:
    """A page that a guest's access has allocated is given back by a hole or the last close, with nobody left holding it."""
    pages = SHARE // PAGE_SIZE
    with vm.create_guest_memfd(2 * SHARE, gmem_kind) as gmem, MemoryCgroup() as group, nowhere(2 * SHARE) as nothing:
        vm.bind(gmem, slot=1, gpa=2 * GPA, hva=nothing.address)
        group.join()
        before = group.usage()
        running.cpu.stamp(2 * GPA, STAMP, 2 * pages)
        assert group.usage() > before + 2 * SHARE - SLACK
        gmem.punch(0, SHARE)
        wait_until(lambda: group.usage() < before + SHARE + SLACK, "the hole's pages are free")
        gmem.close()
        wait_until(lambda: group.usage() < before + SLACK, "the file's pages are free")


@contract("GM-RES-004")
@disruptive()
@requires("memcg", "root")
def test_at_its_limit_the_allocating_process_is_killed(vm: Vm) -> None:
    """Who hits the limit of his memory cgroup in fallocate is killed; what he allocated stays with the file."""
    limit = 3 * SHARE
    with vm.create_guest_memfd(16 * SHARE) as gmem, MemoryCgroup() as group:

        def allocate(channel: Channel) -> Answer:
            group.join()
            channel.send(group.usage())
            return gmem.raw.allocate(0, gmem.size)

        group.limit(limit)
        with ChildProcess(allocate) as process:
            used = process.receive()
            status = process.wait()
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        done = gmem.allocated_pages()
        assert limit - used - SLACK < done * PAGE_SIZE <= limit
        await_stat(group, "file", done * PAGE_SIZE)
        # Outside the group nothing is missing.
        gmem.allocate(0, 4 * SHARE)
        assert gmem.allocated_pages() == 4 * SHARE // PAGE_SIZE


@contract("GM-RES-005")
@requires("memcg", "root")
def test_pages_are_unevictable_file_pages(vm: Vm) -> None:
    """Allocated pages count as file pages and as unevictable, and as neither shmem nor dirty, mapped or locked ones."""
    with vm.create_guest_memfd(2 * SHARE) as gmem, MemoryCgroup() as group:
        allocate_in(group, gmem, 0, 2 * SHARE)
        for name, wanted in (
            ("file", 2 * SHARE),
            ("unevictable", 2 * SHARE),
            ("shmem", 0),
            ("file_dirty", 0),
            ("file_mapped", 0),
            ("anon" if "anon" in stat_names(group) else "rss", 0),
        ):
            await_stat(group, name, wanted)
        assert meminfo("Cached") > 2 * SHARE - SLACK
        assert meminfo("Unevictable") - meminfo("Mlocked") > 2 * SHARE - SLACK


def stat_names(group: MemoryCgroup) -> set[str]:
    """The fields of a group's memory.stat."""
    return {line.split()[0] for line in (group.path / "memory.stat").read_text().splitlines()}


@contract("GM-RES-006")
def test_locked_memory_limit_does_not_bound_gmem(gmem: GuestMemfd) -> None:
    """Allocating and touching gmem needs no locked-memory allowance, and counts as neither locked nor pinned memory."""

    def unprivileged() -> tuple[Answer, Answer, int, int]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        become_nobody()
        answer = gmem.raw.allocate(0, gmem.size)
        if gmem.kind == "gMS":
            with gmem.map() as mapping:
                mapping.fill(0x11)
                return lock_anonymous(), answer, process_status("VmLck"), process_status("VmPin")
        return lock_anonymous(), answer, process_status("VmLck"), process_status("VmPin")

    def lock_anonymous() -> Answer:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            return syscalls.mlock(memory.address, PAGE_SIZE)

    assert in_child(unprivileged) == (Errno.EPERM, OK, 0, 0)
    assert gmem.allocated_pages() == gmem.pages


@contract("GM-RES-007")
@vm_types("default")
@gmem_kinds("gMS")
def test_locking_a_mapping_is_charged_as_for_any_memory(gmem: GuestMemfd) -> None:
    """mlock of a gmem mapping counts against RLIMIT_MEMLOCK like that of any other: ENOMEM over it, EPERM without any."""
    allowed = 16 * PAGE_SIZE

    def unprivileged() -> list[tuple[Answer, Answer, int, Answer]]:
        become_nobody()
        found = []
        with gmem.map() as ours, Mapping.anonymous(gmem.size) as plain:
            for mapping in (plain, ours):
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (allowed, allowed))
                over = syscalls.mlock(mapping.address, allowed + PAGE_SIZE)
                within = syscalls.mlock(mapping.address, allowed)
                locked = process_status("VmLck")
                more = syscalls.mlock(mapping.address + allowed, PAGE_SIZE)
                found.append((over, within, locked, more))
                mapping.unmap()
        return found

    assert in_child(unprivileged) == [(Errno.ENOMEM, OK, allowed, Errno.ENOMEM)] * 2
    assert gmem.allocated_pages() == allowed // PAGE_SIZE


@contract("GM-RES-008")
@requires("x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_only_mapped_pages_are_resident(running: Running, vm: Vm) -> None:
    """Mapped pages are in a process's RSS, as file pages; those only allocated, or touched by guests, are in nobody's."""
    fields = ("VmRSS", "RssFile", "RssAnon", "RssShmem")
    before = {field: process_status(field) for field in fields}
    with (
        vm.create_guest_memfd(2 * SHARE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem,
        nowhere(2 * SHARE) as nothing,
    ):
        vm.bind(gmem, slot=1, gpa=2 * GPA, hva=nothing.address)
        gmem.allocate(0, SHARE)
        running.cpu.stamp(2 * GPA + SHARE, STAMP, SHARE // PAGE_SIZE)
        assert gmem.allocated_pages() == 2 * SHARE // PAGE_SIZE
        assert all(about(process_status(field), before[field]) for field in fields)
        with gmem.map() as mapping:
            assert Smaps(mapping).size("Rss") == 0
            for page in range(gmem.pages):
                mapping.load(page * PAGE_SIZE)
            assert Smaps(mapping).size("Rss") == 2 * SHARE
            grown = {field: process_status(field) - before[field] for field in fields}
        assert about(grown["VmRSS"], 2 * SHARE)
        assert about(grown["RssFile"], 2 * SHARE)
        assert about(grown["RssAnon"], 0)
        assert about(grown["RssShmem"], 0)


@contract("GM-RES-009")
@disruptive()
@requires("memcg", "root", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_pressure_takes_no_pages(running: Running, vm: Vm) -> None:
    """Gmem pages are never swapped out or reclaimed: however short memory gets, all of them stay with their contents."""
    with (
        vm.create_guest_memfd(2 * SHARE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem,
        MemoryCgroup() as group,
        Mapping.anonymous(64 * MiB) as hogged,
        nowhere(2 * SHARE) as nothing,
    ):
        vm.bind(gmem, slot=1, gpa=2 * GPA, hva=nothing.address)
        allocate_in(group, gmem, 0, 2 * SHARE)
        running.cpu.stamp(2 * GPA, STAMP, SHARE // PAGE_SIZE)  # the rest stays clean and untouched

        def hog() -> None:
            group.join()
            # Locked, so that swap space does not help.
            syscalls.mlock(hogged.address, hogged.length)
            hogged.fill(0x77)

        group.limit(5 * SHARE)
        with ChildProcess(lambda _: hog()) as process:
            status = process.wait()
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert gmem.allocated_pages() == gmem.pages
        await_stat(group, "file", 2 * SHARE)
        assert running.cpu.first_unstamped(2 * GPA, STAMP, SHARE // PAGE_SIZE) is None
        assert running.cpu.first_not(0, 2 * GPA + SHARE, SHARE // PAGE_SIZE) is None


SLAB = "kvm_gmem_inode_cache"
GMEMS = 256


@contract("GM-RES-011")
@requires("gmem-inode-cache", "root")
@vm_types("default")
def test_inodes_come_and_go_with_their_files(vm: Vm) -> None:
    """Each gmem has one object in the cache of gmem inodes, which is given back after its file is gone."""
    before = objects_in_use(SLAB)
    gmems = [vm.create_guest_memfd(PAGE_SIZE) for _ in range(GMEMS)]
    held = objects_in_use(SLAB)
    # Not "before and as many more": what earlier files left may have gone since it was counted.
    assert held >= GMEMS
    for gmem in gmems:
        gmem.close()
    # Inodes go after an RCU grace period; others may have made some meanwhile.
    few = most_left(before, held)
    wait_until(lambda: objects_in_use(SLAB) < few, "the inodes are given back")


def most_left(before: int, held: int) -> int:
    """Fewer objects than this are in use once GMEMS files are gone: about as many as before, and most of theirs less."""
    return min(before + GMEMS // 4, held - GMEMS * 3 // 4)


@contract("GM-NUMA-003")
@requires("file-policy", "policy-cache", "root", config="NUMA")
@vm_types("default")
def test_policies_go_with_their_files(vm: Vm) -> None:
    """The policy of a file is given back after the file is gone, also where pages were allocated by it."""
    policy = Policy.of(Mode.BIND, numa.memory_nodes()[0])
    before = objects_in_use("numa_policy")
    with ExitStack() as files:
        for _ in range(GMEMS):
            gmem = files.enter_context(vm.create_guest_memfd(PAGE_SIZE, GmemFlag.MMAP))
            with gmem.map() as host:
                assert numa.mbind(host.address, host.length, policy) == OK
            gmem.allocate()
        held = objects_in_use("numa_policy")
        # The control: each file has one. What earlier files left may have gone since it was counted.
        assert held >= GMEMS
    few = most_left(before, held)
    wait_until(lambda: objects_in_use("numa_policy") < few, "the policies are given back")


@contract("GM-RES-011")
@requires("gmem-inode-cache", "memcg", "root")
@vm_types("default")
def test_inodes_are_charged_to_the_creator(vm: Vm) -> None:
    """The inode of a gmem is kernel memory of its creator's memory cgroup, beside the file that any descriptor costs."""
    size = slab_caches(SLAB)[0].size
    with MemoryCgroup() as group:
        group.join()

        def cost(create: Callable[[], OwnedFd]) -> int:
            before = exact_kernel_bytes(group)
            files = [create() for _ in range(GMEMS)]
            after = exact_kernel_bytes(group)
            for file in files:
                file.close()
            return after - before

        plain = cost(lambda: OwnedFd(os.eventfd(0)))
        assert cost(lambda: vm.create_guest_memfd(PAGE_SIZE)) - plain > GMEMS * size * 3 // 4


def exact_kernel_bytes(group: MemoryCgroup) -> int:
    """The kernel memory of a group that this process is in, after making the kernel sum up what it has put off."""
    batch = 64 * (os.cpu_count() or 1) * PAGE_SIZE  # mm/memcontrol.c: MEMCG_CHARGE_BATCH
    with Mapping.anonymous(2 * batch, populate=True):
        return group.kernel_bytes()


@contract("GM-RES-012")
@requires("memcg", "root", "x86")
@vm_types("default")
def test_slot_metadata_is_charged_to_the_caller(host: Host, vm: Vm) -> None:
    """KVM's tables for a slot are charged to who makes it: by its large pages, without the TDP MMU by every page too."""
    size = 1 << 39 if host.tdp_mmu else 2 * GiB
    wanted = metadata_bytes(host, size // PAGE_SIZE)
    # The address is never looked at unless a guest touches the slot.
    region = MemoryRegion(slot=1, gpa=size, size=size, hva=MiB)
    with MemoryCgroup() as group:
        group.join()
        before = exact_kernel_bytes(group)
        assert vm.raw.set_region(region) == OK
        grown = exact_kernel_bytes(group) - before
        assert wanted * 7 // 8 < grown < wanted * 5 // 4
        vm.delete_region(1)
        wait_until(lambda: exact_kernel_bytes(group) - before < wanted // 4, "the tables are given back")


@contract("GM-RES-012", "GM-BIND-026", "C19")
@requires("memcg", "root", "x86")
@vm_types("default")
@makes_gmem()
def test_a_refused_bind_keeps_no_tables(host: Host, vm: Vm) -> None:
    """A bind that fails because the pages of the file are bound already gives the tables of its slot back."""
    attempts = 32
    pages = next(1 << shift for shift in range(32) if metadata_bytes(host, 1 << shift) >= 256 * KiB)
    with vm.create_guest_memfd(pages * PAGE_SIZE) as gmem, MemoryCgroup() as group:
        vm.bind(gmem, slot=1, gpa=GPA, size=PAGE_SIZE)
        group.join()
        request = MemoryRegion(slot=2, gpa=2 * GPA, size=gmem.size, gmem=gmem)
        before = exact_kernel_bytes(group)
        for _ in range(attempts):
            assert vm.raw.set_region(request) in (Errno.EEXIST, Errno.EINVAL)  # which of them: B14
        few = attempts * metadata_bytes(host, pages) // 4
        wait_until(lambda: exact_kernel_bytes(group) - before < few, "the tables are given back")
        vm.delete_region(1)
        assert vm.raw.set_region(request) == OK  # the control: nothing else is wrong with it


def frames(mapping: Mapping) -> list[int]:
    """The physical page behind each page of a mapping, 0 where there is none (admin-guide/mm/pagemap.rst)."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(mapping.address // PAGE_SIZE * 8)
        words = struct.unpack(f"<{mapping.length // PAGE_SIZE}Q", pagemap.read(mapping.length // PAGE_SIZE * 8))
    return [word & ((1 << 55) - 1) if word >> 63 else 0 for word in words]


SPREADS = [MiB << shift for shift in range(8)]
"""Anonymous memory to be compacted, more from time to time: whether compaction finds holes depends on where memory lies."""
HOLE_PAGES = 7


@contract("GM-RES-013")
@requires("root", "config:COMPACTION")
@disruptive()
@vm_types("default")
@gmem_kinds("gMS")
def test_compaction_moves_no_pages(gmem: GuestMemfd) -> None:
    """Compaction leaves gmem pages where they are, while it moves anonymous memory that lies between them."""
    with ExitStack() as kept, gmem.map() as ours:
        for page in range(gmem.pages):
            ours.store(STAMP + page, page * PAGE_SIZE)
            neighbours(kept, HOLE_PAGES * PAGE_SIZE)
        before = frames(ours)
        assert all(before)
        for spread in SPREADS:
            plain = neighbours(kept, spread)
            for at in range(0, spread, (HOLE_PAGES + 1) * PAGE_SIZE):
                plain.advise(Advice.DONTNEED, at, HOLE_PAGES * PAGE_SIZE)
            plain_before = frames(plain)
            Path("/proc/sys/vm/compact_memory").write_text("1")
            assert frames(ours) == before
            if frames(plain) != plain_before:
                break
        else:
            pytest.fail("compaction moved no anonymous memory either, so that gmem stayed shows nothing")
        assert all(ours.load(page * PAGE_SIZE) == STAMP + page for page in range(gmem.pages))


def neighbours(kept: ExitStack, size: int) -> Mapping:
    """Anonymous memory in small pages, all of them there."""
    mapping = kept.enter_context(Mapping.anonymous(size))
    mapping.advise(Advice.NOHUGEPAGE)
    mapping.advise(Advice.POPULATE_WRITE)
    return mapping
