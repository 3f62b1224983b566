"""GM-RUN: what guests read, write and execute in gmem, and what the slot's userspace_addr has to do with it."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvmgmem.abi import PAGE_SIZE, MiB
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu, programs
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.memory import Fault, Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, known_bug, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.stats import read_stats
from kvmgmem.vm import Vm

PROT_NONE = 0
GROUP = 8  # PTE_PREFETCH_NUM, arch/x86/kvm/mmu/mmu.c
PLAIN_GPA = 2 * GPA
STAMP = 0x5EED_0000
ROUNDS = 24
FILLER = 0xEE
FILLED = 0xEEEE_EEEE_EEEE_EEEE


@contextmanager
def backings(size: int, own: Mapping | None) -> Iterator[dict[str, int]]:
    """Values for userspace_addr: none, unusable, unrelated, and the gmem's own mapping if there is one."""
    with ExitStack() as stack:
        gone = Mapping.anonymous(size)
        gone.unmap()
        unreadable = stack.enter_context(Mapping.anonymous(size, prot=PROT_NONE))
        filled = [stack.enter_context(Mapping.anonymous(size)) for _ in range(2)]
        for memory in filled:
            memory.fill(FILLER)
        assert filled[0].protect(mmap.PROT_READ) == 0
        found = {
            "none": 0,
            "unmapped": gone.address,
            "PROT_NONE": unreadable.address,
            "read-only": filled[0].address,
            "unrelated": filled[1].address,
        }
        yield found | ({"own mapping": own.address} if own else {})


@contract("GM-RUN-001")
@vm_types("default")
@gmem_kinds("gMS")
def test_guest_and_host_share_a_mappable_gmem(running: Running) -> None:
    """On a default VM guest and host see each other's stores to a mappable gmem, although the slot has no userspace_addr."""
    with running.gmem.map() as host:
        for page in (0, 1, running.gmem.pages - 1):
            host.store(STAMP + page, page * PAGE_SIZE)
            assert running.cpu.load(GPA + page * PAGE_SIZE) == STAMP + page
            running.cpu.store(GPA + page * PAGE_SIZE + 8, ~page & 0xFFFF)
            assert host.load(page * PAGE_SIZE + 8) == ~page & 0xFFFF
    assert running.gmem.allocated_pages() == 3


@contract("GM-RUN-002")
@vm_types("default")
@gmem_kinds("gM")
def test_gmem_without_init_shared_is_the_guests_alone(running: Running) -> None:
    """On a default VM a gmem with MMAP but not INIT_SHARED is zeroed memory for the guest, which the host cannot touch."""
    assert running.cpu.load(GPA) == 0
    running.cpu.stamp(GPA, STAMP, 4)
    assert running.cpu.first_unstamped(GPA, STAMP, 4) is None
    assert running.gmem.allocated_pages() == 4
    with running.gmem.map() as host:
        for page in (0, 4):
            fault = host.try_load(page * PAGE_SIZE)
            assert isinstance(fault, Fault)
            assert fault.signal.name == "SIGBUS"
    assert running.cpu.first_unstamped(GPA, STAMP, 4) is None


@contract("GM-RUN-003")
@vm_types("default")
@gmem_kinds("g0", "gS")
def test_gmem_that_cannot_be_mapped_is_never_used_by_a_default_vm(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """On a default VM nothing is private, so that a slot whose gmem lacks MMAP is served by userspace_addr alone."""
    with Mapping.anonymous(SIZE) as memory:
        memory.fill(FILLER)
        vm.bind(gmem, gpa=GPA, hva=memory.address)
        assert cpu.load(GPA) == FILLED
        cpu.store(GPA + PAGE_SIZE, STAMP)
        assert memory.load(PAGE_SIZE) == STAMP
        memory.store(STAMP + 1, PAGE_SIZE)
        assert cpu.load(GPA + PAGE_SIZE) == STAMP + 1
        assert gmem.allocated_pages() == 0


@contract("GM-RUN-004", "GM-RUN-021")
@gmem_kinds("gM", "gMS")
def test_userspace_addr_means_nothing_to_guests_of_a_mappable_gmem(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Guest accesses to a slot with a mappable gmem go to the gmem, whatever userspace_addr is and may be used for."""
    # One page a slot: this is about the page that faults, test_neighbours_... is about those beside it.
    with gmem.map() as own, backings(PAGE_SIZE, own) as found:
        pages = dict(enumerate(found))
        for page, name in pages.items():
            vm.bind(gmem, slot=page, gpa=GPA + page * MiB, size=PAGE_SIZE, offset=page * PAGE_SIZE, hva=found[name])
        assert {name: cpu.load(GPA + page * MiB) for page, name in pages.items()} == dict.fromkeys(found, 0)
        for page in pages:
            cpu.store(GPA + page * MiB, STAMP + page)
        seen = {name: cpu.load(GPA + page * MiB) for page, name in pages.items()}
        assert seen == {name: STAMP + page for page, name in pages.items()}
        assert gmem.allocated_pages() == len(found)
        if gmem.kind == "gMS":
            assert {name: own.load(page * PAGE_SIZE) for page, name in pages.items()} == seen
        for name in ("read-only", "unrelated"):
            assert Mapping(found[name], PAGE_SIZE).is_filled_with(FILLER)


def neighbours(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, hva: int) -> list[int]:
    """What the guest reads on a group of pages, of which it touches the first one first; page n of the gmem holds n+1."""
    with gmem.map(GROUP * PAGE_SIZE) as host:
        for page in range(GROUP):
            host.store(page + 1, page * PAGE_SIZE)
    vm.bind(gmem, gpa=GPA, hva=hva)
    return [cpu.load(GPA + page * PAGE_SIZE) for page in range(GROUP)]


GMEM_BESIDE = list(range(1, GROUP + 1))


@contract("GM-RUN-005")
@vm_types("default")
@gmem_kinds("gMS")
def test_neighbours_of_a_faulting_page_come_from_gmem(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, host: Host) -> None:
    """Where KVM maps the neighbours of a faulting page on its own account, they are the gmem's pages too.

    The shadow MMU fills the free entries beside the faulting one from userspace_addr (kvm_mmu_prefetch_sptes, 7.3.4). The
    TDP MMU never does; without it (kvm.tdp_mmu=N) direct page tables are filled in the same way.
    """
    with Mapping.anonymous(SIZE) as unrelated:
        unrelated.fill(FILLER)
        seen = neighbours(vm, gmem, cpu, unrelated.address)
        if not host.tdp_mmu:
            known_bug("B24").expect(seen, GMEM_BESIDE, shows=[1] + [FILLED] * (GROUP - 1))
        else:
            assert seen == GMEM_BESIDE


@contract("GM-RUN-006")
@vm_types("default")
@gmem_kinds("gMS")
def test_neighbours_come_from_gmem_if_nothing_else_is_there(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """With userspace_addr 0, without pages, or on the gmem itself, the neighbours of a faulting page are the gmem's."""
    with gmem.map() as own, Mapping.anonymous(SIZE) as unpopulated:
        for hva in (0, unpopulated.address, own.address):
            assert neighbours(vm, gmem, cpu, hva) == GMEM_BESIDE
            vm.delete_region(0)
        assert not any(unpopulated.resident_pages())


@contract("GM-RUN-007", "GM-RUN-008", "GM-RUN-009")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_hole_under_the_guest_reads_zero_and_is_filled_for_both(running: Running) -> None:
    """After a punch, by fallocate or MADV_REMOVE, the guest reads zeros without an exit, then what the host stores there."""
    cpu, gmem = running.cpu, running.gmem
    with gmem.map() as host:
        punches: dict[str, Callable[[], object]] = {
            "fallocate": lambda: gmem.punch(PAGE_SIZE, PAGE_SIZE),
            "MADV_REMOVE": lambda: host.advise(Advice.REMOVE, PAGE_SIZE, PAGE_SIZE),
        }
        for name, punch in punches.items():
            cpu.stamp(GPA, STAMP, 3)
            assert [host.load(page * PAGE_SIZE) for page in range(3)] == [STAMP, STAMP + 1, STAMP + 2]
            assert punch() in (None, 0), name
            assert gmem.allocated_pages() == 2
            assert cpu.load(GPA + PAGE_SIZE) == 0
            assert gmem.allocated_pages() == 3
            host.store(STAMP + 7, PAGE_SIZE)
            assert cpu.load(GPA + PAGE_SIZE) == STAMP + 7
            assert [cpu.load(GPA), cpu.load(GPA + 2 * PAGE_SIZE)] == [STAMP, STAMP + 2]


@contract("GM-RUN-007", "GM-RUN-008")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_running_guest_sees_the_hole_and_then_the_hosts_store(running: Running) -> None:
    """A punch reaches a vCPU that is just reading the page: it goes on with zeros, then with what the host stores."""
    with running.gmem.map() as host:
        # The guest stores the stamp itself, and then waits for it to change.
        running.cpu.start("store8_jump", rdi=GPA, rsi=STAMP, rdx=running.machine.entry("watch"))
        with running.cpu.running() as run:
            wait_until(lambda: host.load(0) == STAMP, "the guest stores its stamp")
            running.gmem.punch(0, PAGE_SIZE)
            assert running.cpu.finish(run.result()).rax == 0
        running.cpu.start("watch", rdi=GPA, rsi=0, rdx=0)
        with running.cpu.running() as run:
            host.store(STAMP + 1, 0)
            assert running.cpu.finish(run.result()).rax == STAMP + 1


@contract("GM-RUN-007", "GM-RACE-001")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_hole_is_there_when_the_punch_returns(running: Running) -> None:
    """A vCPU that reads a page over and over finds zeros there as soon as the punch has returned, not a moment later.

    Until then it may use what its processor remembers of the page tables, which every way out of the guest makes it forget:
    hence some rounds, and a page that the host has not touched, for to take that from the host would interrupt the vCPU.
    """
    flag, told = PAGE_SIZE, PAGE_SIZE + 8
    with running.gmem.map() as host:
        for _ in range(ROUNDS):
            running.cpu.store(GPA, STAMP)
            host.store(0, flag)
            host.store(0, told)
            running.cpu.start("load_when", rdi=GPA, rsi=GPA + flag)
            with running.cpu.running() as run:
                wait_until(lambda: host.load(told) == STAMP, "the guest reads the page")
                running.gmem.punch(0, PAGE_SIZE)
                host.store(1, flag)
                assert running.cpu.finish(run.result()).rax == 0


@contract("GM-RUN-023")
@vm_types("default")
@gmem_kinds("gMS")
def test_guests_execute_code_in_gmem(running: Running) -> None:
    """Instructions are fetched from a mappable gmem that has no userspace_addr; what the host puts there is what runs."""
    # The report is made elsewhere: on kvm-pvm `out` goes through the emulator, which would fetch it by userspace_addr.
    code = programs()["store8_jump"]
    report = running.machine.entry("report")
    with running.gmem.map() as host:
        for at in (0, 5 * PAGE_SIZE - len(code) // 2):  # the second one lies on a page boundary
            host.write(at, code)
            running.cpu.call(GPA + at, rdi=GPA + MiB, rsi=STAMP + at, rdx=report)
            assert host.load(MiB) == STAMP + at


@contract("GM-RUN-042")
@vm_types("default")
@gmem_kinds("gMS")
@requires("huge-pages")
def test_gmem_is_mapped_by_small_pages_only(running: Running) -> None:
    """Guest mappings of gmem are 4 KiB pages even where slot, file and guest address are aligned to 2 MiB."""
    assert read_stats(running.vm)["pages_2m"] == 0
    with Mapping.anonymous(2 * SIZE) as memory:
        # The control: an aligned huge page behind a plain slot of the same VM is mapped by one entry.
        aligned = -(-memory.address // SIZE) * SIZE
        assert memory.advise(Advice.HUGEPAGE) == 0
        memory.fill(FILLER)
        running.vm.set_region(MemoryRegion(slot=1, gpa=PLAIN_GPA, size=SIZE, hva=aligned))
        assert running.cpu.load(PLAIN_GPA) == FILLED
        running.cpu.load(GPA)
        first = read_stats(running.vm)
        assert first["pages_2m"] == 1
        running.cpu.stamp(GPA, STAMP, running.gmem.pages)
        assert running.cpu.first_unstamped(GPA, STAMP, running.gmem.pages) is None
        mapped = read_stats(running.vm)
        assert mapped["pages_2m"] == 1
        # At least: the support slot's pages count too, and shadow paging maps some of them ahead of their use.
        assert mapped["pages_4k"] - first["pages_4k"] >= running.gmem.pages - 1
