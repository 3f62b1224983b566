"""GM-NUMA: memory policies of a guest_memfd, what they mean for its pages, and that those never move.

Since 6.19 a policy set through a mapping belongs to the file (gm:kvm_gmem_set_policy); in 6.18 it belonged to that mapping
alone, and played no part when gmem's pages were allocated. Which of the two it is gets probed, never guessed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmgmem import numa
from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import HasFileno, Mapping
from kvmgmem.numa import DEFAULT, MF_MOVE, MF_STRICT, Mode, Policy
from kvmgmem.processes import in_child
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.numa_policy import policy_belongs_to_the_file
from kvmgmem.testing.shmem import shmem
from kvmgmem.vm import Vm

pytestmark = requires(config="NUMA")

HALF = SIZE // 2
SOME = 8
STAMP = 0x5EED_0000_0000_0001

mappable = gmem_kinds("gM", "gMS")
shared_from_start = gmem_kinds("gMS")
two_nodes = requires("two-nodes")
policy_rules = requires("file-policy")


@pytest.fixture
def near() -> int:
    """The first node with memory."""
    return numa.memory_nodes()[0]


@pytest.fixture
def far() -> int:
    """The last node with memory."""
    return numa.memory_nodes()[-1]


@contextmanager
def task_policy(policy: Policy) -> Iterator[None]:
    """The calling thread allocates by this policy."""
    numa.set_task_policy(policy)
    try:
        yield
    finally:
        numa.set_task_policy(DEFAULT)


def pages_of(host: Mapping, first: int = 0, count: int = SOME) -> list[int]:
    """The addresses of some pages of a mapping."""
    return [host.address + page * PAGE_SIZE for page in range(first, first + count)]


def nodes_behind(host: Mapping, first: int = 0, count: int = SOME) -> list[Answer]:
    """The nodes of some pages that are allocated already: the loads only map them."""
    for page in range(first, first + count):
        host.load(page * PAGE_SIZE)
    return numa.nodes_of(pages_of(host, first, count))


def mbind(host: Mapping, policy: Policy, flags: int = 0) -> Answer:
    """mbind(2) of the whole mapping."""
    return numa.mbind(host.address, host.length, policy, flags)


@contract("GM-NUMA-001")
@mappable
def test_policy_of_a_mapping_reads_back(gmem: GuestMemfd, near: int) -> None:
    """What mbind sets for a range of a gmem mapping, get_mempolicy(MPOL_F_ADDR) reports for its addresses and no others."""
    with gmem.map() as host:
        assert numa.get_policy(host.address) == DEFAULT
        for policy in (Policy.of(Mode.BIND, near), Policy.of(Mode.INTERLEAVE, near), Policy.of(Mode.PREFERRED, near)):
            assert numa.mbind(host.address, HALF, policy) == OK
            assert numa.get_policy(host.address) == policy
            assert numa.get_policy(host.address + HALF - 1) == policy
            assert numa.get_policy(host.address + HALF) == DEFAULT
        assert numa.mbind(host.address, PAGE_SIZE, DEFAULT) == OK
        assert numa.get_policy(host.address) == DEFAULT
        assert numa.get_policy(host.address + PAGE_SIZE) == Policy.of(Mode.PREFERRED, near)
    assert gmem.allocated_pages() == 0


@contract("GM-NUMA-002")
@mappable
def test_policy_belongs_to_the_file_or_to_the_mapping(gmem: GuestMemfd, near: int) -> None:
    """Other mappings of the file, also another process's, report the policy too (before 6.19 none of them does)."""
    policy = Policy.of(Mode.BIND, near)
    elsewhere = policy if policy_belongs_to_the_file() else DEFAULT

    def seen_by_a_new_mapping() -> tuple[Policy | Errno, ...]:
        with gmem.map(PAGE_SIZE, HALF - PAGE_SIZE) as last, gmem.map(PAGE_SIZE, HALF) as behind:
            return numa.get_policy(last.address), numa.get_policy(behind.address)

    with gmem.map() as other, gmem.map() as host:
        assert numa.mbind(host.address, HALF, policy) == OK
        assert numa.get_policy(host.address) == policy
        assert (numa.get_policy(other.address), numa.get_policy(other.address + HALF)) == (elsewhere, DEFAULT)
        assert seen_by_a_new_mapping() == (elsewhere, DEFAULT)
        assert in_child(seen_by_a_new_mapping) == (elsewhere, DEFAULT)


@contract("GM-NUMA-003")
@mappable
def test_policy_outlives_the_mapping_and_the_process(gmem: GuestMemfd, near: int) -> None:
    """A policy outlives the mapping and the process that set it (before 6.19 it goes with the mapping)."""
    policies = [Policy.of(Mode.BIND, near), Policy.of(Mode.INTERLEAVE, near)]

    def set_policy(policy: Policy) -> Answer:
        with gmem.map() as host:
            return mbind(host, policy)

    def current() -> Policy | Errno:
        with gmem.map() as host:
            return numa.get_policy(host.address)

    kept = policy_belongs_to_the_file()
    assert current() == DEFAULT
    assert set_policy(policies[0]) == OK
    assert current() == (policies[0] if kept else DEFAULT)
    assert in_child(lambda: set_policy(policies[1])) == OK
    assert current() == (policies[1] if kept else DEFAULT)


@contract("GM-NUMA-003")
@policy_rules
@mappable
def test_policy_set_through_another_mapping_counts_as_for_shmem(gmem: GuestMemfd, near: int) -> None:
    """mbind does nothing if the mapping itself was given that very policy before, whatever has become of the file's.

    mm/mempolicy.c:mbind_range compares with the mapping's own policy only (7.3). This is so for every file with policies,
    and gmem must not differ from shmem: a new mapping cannot take a policy back that another one has set.
    """
    bind, interleave = Policy.of(Mode.BIND, near), Policy.of(Mode.INTERLEAVE, near)

    def history(file: HasFileno) -> list[Policy | Errno]:
        seen = []
        with Mapping.of(file, SIZE) as first, Mapping.of(file, SIZE) as second:
            for host, policy in ((first, bind), (second, DEFAULT), (second, interleave), (first, bind), (first, DEFAULT)):
                assert mbind(host, policy) == OK
                seen.append(numa.get_policy(host.address))
        return seen

    with shmem(SIZE) as control:
        assert history(gmem) == history(control)
    with gmem.map() as host:
        assert numa.get_policy(host.address) == DEFAULT


@contract("GM-NUMA-003")
@mappable
def test_policy_is_the_files_own(vm: Vm, gmem: GuestMemfd, near: int) -> None:
    """A policy is no other gmem's business, and ends with the file: a gmem that is made after it has none."""
    with gmem.map() as host:
        assert mbind(host, Policy.of(Mode.BIND, near)) == OK
        for _ in range(4):
            with vm.create_guest_memfd(SIZE, gmem.flags) as other, other.map() as elsewhere:
                assert numa.get_policy(elsewhere.address) == DEFAULT
                assert mbind(elsewhere, Policy.of(Mode.INTERLEAVE, near)) == OK
        assert numa.get_policy(host.address) == Policy.of(Mode.BIND, near)


@contract("GM-NUMA-004")
@two_nodes
@policy_rules
@shared_from_start
def test_policy_rules_host_faults(gmem: GuestMemfd, near: int, far: int) -> None:
    """A page that the host faults in comes from the node that the file's policy binds its range to."""
    with gmem.map() as host:
        assert numa.mbind(host.address, HALF, Policy.of(Mode.BIND, near)) == OK
        assert numa.mbind(host.address + HALF, HALF, Policy.of(Mode.BIND, far)) == OK
        for policy in (DEFAULT, Policy.of(Mode.BIND, near), Policy.of(Mode.BIND, far)):
            gmem.punch()
            with task_policy(policy):
                assert nodes_behind(host) == [near] * SOME
                assert nodes_behind(host, gmem.pages // 2) == [far] * SOME


@contract("GM-NUMA-004")
@two_nodes
@policy_rules
@shared_from_start
def test_interleaving_alternates_on_host_faults(gmem: GuestMemfd, near: int, far: int) -> None:
    """Under MPOL_INTERLEAVE the pages that the host faults in come from the nodes in turn."""
    with gmem.map() as host:
        assert mbind(host, Policy.of(Mode.INTERLEAVE, near, far)) == OK
        assert_alternating(nodes_behind(host), near, far)


def assert_alternating(nodes: list[Answer], near: int, far: int) -> None:
    """The nodes take turns; which one is first depends on what the thread allocated before."""
    first = nodes[0]
    second = far if first == near else near
    known_bug("B23").expect(nodes, [first, second] * (len(nodes) // 2), shows=[first] * len(nodes))


@contract("GM-NUMA-005")
@two_nodes
@policy_rules
@shared_from_start
def test_policy_rules_guest_faults(running: Running, near: int, far: int) -> None:
    """A page that the guest faults in comes from the node that the file's policy binds its range to."""
    behind = running.gmem.pages // 2
    with running.gmem.map() as host:
        assert numa.mbind(host.address, HALF, Policy.of(Mode.BIND, near)) == OK
        assert numa.mbind(host.address + HALF, HALF, Policy.of(Mode.BIND, far)) == OK
        for page in range(SOME):
            running.cpu.store(GPA + page * PAGE_SIZE, STAMP)
            running.cpu.store(GPA + HALF + page * PAGE_SIZE, STAMP)
        assert running.gmem.allocated_pages() == 2 * SOME
        assert nodes_behind(host) == [near] * SOME
        assert nodes_behind(host, behind) == [far] * SOME


@contract("GM-NUMA-005")
@two_nodes
@policy_rules
@shared_from_start
def test_policy_rules_fallocate(gmem: GuestMemfd, near: int, far: int) -> None:
    """A page that fallocate allocates comes from the node that the file's policy binds its range to."""
    with gmem.map() as host:
        assert numa.mbind(host.address, HALF, Policy.of(Mode.BIND, near)) == OK
        assert numa.mbind(host.address + HALF, HALF, Policy.of(Mode.BIND, far)) == OK
        gmem.allocate()
        half = gmem.pages // 2
        assert nodes_behind(host, 0, half) == [near] * half
        assert nodes_behind(host, half, half) == [far] * half


@contract("GM-NUMA-005")
@two_nodes
@policy_rules
@shared_from_start
def test_interleaving_alternates_on_fallocate(gmem: GuestMemfd, near: int, far: int) -> None:
    """Under MPOL_INTERLEAVE the pages that fallocate allocates come from the nodes in turn."""
    with gmem.map() as host:
        assert mbind(host, Policy.of(Mode.INTERLEAVE, near, far)) == OK
        gmem.allocate(0, SOME * PAGE_SIZE)
        assert_alternating(nodes_behind(host), near, far)


@contract("GM-NUMA-006")
@two_nodes
@shared_from_start
def test_without_a_policy_the_allocating_task_decides(running: Running, near: int, far: int) -> None:
    """A gmem without a policy takes pages by that of the task that allocates: host fault, guest fault or fallocate."""
    with running.gmem.map() as host:
        for node in (far, near):
            running.gmem.punch()
            with task_policy(Policy.of(Mode.BIND, node)):
                host.load()
                running.cpu.store(GPA + PAGE_SIZE, STAMP)
                running.gmem.allocate(2 * PAGE_SIZE, PAGE_SIZE)
            assert running.gmem.allocated_pages() == 3
            assert nodes_behind(host, 0, 3) == [node] * 3


@contract("GM-NUMA-007")
@mappable
def test_malformed_policies_are_refused(gmem: GuestMemfd, near: int) -> None:
    """Modes and flags that mbind does not know, and nodes that are missing or absent, are EINVAL and change nothing."""
    good = Policy.of(Mode.BIND, near)
    with gmem.map() as host:
        assert mbind(host, good) == OK
        for bad in (Policy.of(999, near), Policy.of(Mode.BIND), Policy.of(Mode.DEFAULT, near), Policy.of(Mode.BIND, 1000)):
            assert mbind(host, bad) == Errno.EINVAL, bad
        assert mbind(host, good, 1 << 15) == Errno.EINVAL
        assert numa.mbind(host.address + 1, PAGE_SIZE, good) == Errno.EINVAL
        assert numa.get_policy(host.address) == good


@contract("GM-NUMA-008")
@mappable
def test_policy_needs_no_memory_that_can_be_touched(gmem: GuestMemfd, near: int) -> None:
    """A policy can be set on memory that the host may not touch; only asking for the node of a page there is EFAULT."""
    policy = Policy.of(Mode.BIND, near)
    with gmem.map() as host:
        assert mbind(host, policy) == OK
        assert numa.get_policy(host.address) == policy
        assert numa.nodes_of([host.address]) == [Errno.ENOENT]
        if gmem.kind == "gMS":
            assert numa.node_behind(host.address) == near
            assert numa.nodes_of([host.address]) == [near]
            assert gmem.allocated_pages() == 1
        else:
            assert numa.node_behind(host.address) == Errno.EFAULT
            gmem.allocate(0, PAGE_SIZE)
            assert numa.node_behind(host.address) == Errno.EFAULT
            assert numa.nodes_of([host.address]) == [Errno.ENOENT]


@contract("GM-NUMA-009")
@two_nodes
@shared_from_start
def test_pages_never_migrate(gmem: GuestMemfd, near: int, far: int) -> None:
    """gmem's pages cannot be migrated: move_pages leaves them where they are, and mbind with MOVE and STRICT is EIO."""
    with Mapping.anonymous(PAGE_SIZE) as control, gmem.map() as host, task_policy(Policy.of(Mode.BIND, near)):
        control.store(STAMP)
        assert numa.move_pages([control.address], far) == (0, [far])
        for page in range(SOME):
            host.store(STAMP + page, page * PAGE_SIZE)
        assert nodes_behind(host) == [near] * SOME

        unmoved, _ = numa.move_pages(pages_of(host), far)
        assert unmoved == SOME
        assert nodes_behind(host) == [near] * SOME

        for flags in (MF_STRICT, MF_MOVE | MF_STRICT):
            assert mbind(host, Policy.of(Mode.BIND, near), flags) == OK
            assert mbind(host, Policy.of(Mode.BIND, far), flags) == Errno.EIO
        assert nodes_behind(host) == [near] * SOME
        assert [host.load(page * PAGE_SIZE) - STAMP for page in range(SOME)] == list(range(SOME))


@contract("GM-NUMA-010")
@two_nodes
@policy_rules
@shared_from_start
def test_new_policy_is_for_new_pages(gmem: GuestMemfd, near: int, far: int) -> None:
    """A change of policy leaves pages where they are; those punched and allocated again follow the new one."""
    with gmem.map() as host:
        assert mbind(host, Policy.of(Mode.BIND, near)) == OK
        host.store(STAMP)
        assert nodes_behind(host) == [near] * SOME
        for flags in (0, MF_MOVE):
            assert mbind(host, Policy.of(Mode.BIND, far), flags) == OK
            assert nodes_behind(host) == [near] * SOME
        gmem.punch(0, 4 * PAGE_SIZE)
        assert nodes_behind(host) == [far] * 4 + [near] * 4
        assert host.load() == 0
