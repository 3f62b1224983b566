"""GM-LIFE: who keeps a guest_memfd, its bindings and its VM alive, and what is left when they go."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmgmem.abi import OK, PAGE_SIZE, GmemFlag, MiB, VmType
from kvmgmem.entry import syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import MODULES, Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess, in_child, spawn_python
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import contract, disruptive, gmem_kinds, requires, vm_types, wait_until
from kvmgmem.testing.dead_slots import assert_dead, is_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Bound, Running
from kvmgmem.testing.meminfo import unevictable
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001
BIG = 16 * MiB
MARGIN = BIG // 4
HAMMERED = 0xF_0000  # in the guest's support memory, far behind its page tables

# Guests reach a gmem without the MMAP flag only where memory is private; those cases have tests of their own.
guest_reaches = gmem_kinds("gM", "gMS")


@contextmanager
def spinning(running: Running) -> Iterator[None]:
    """The vCPU is in KVM_RUN, seen to store to plain memory over and over."""
    running.machine.memory.store(0, HAMMERED)
    running.cpu.start("hammer", rdi=running.machine.gpa + HAMMERED)
    with running.cpu.running():
        wait_until(lambda: running.machine.memory.load(HAMMERED) > 0, "the vCPU runs")
        yield


@contextmanager
def owner(vm_type: VmType, kind: GmemFlag, size: int) -> Iterator[Running]:
    """A VM of this process with an allocated gmem of `size` bytes, bound, which its vCPU has touched."""
    from kvmgmem.arch.x86_64 import GuestMachine

    with Kvm.open() as kvm, kvm.create_vm(vm_type) as vm, vm.create_guest_memfd(size, kind) as gmem:
        gmem.allocate()
        region = vm.bind(gmem, gpa=GPA)
        machine = GuestMachine(vm)
        cpu = machine.cpu()
        cpu.store(GPA, STAMP)
        yield Running(vm, gmem, region, machine, cpu)


@contract("GM-LIFE-001", "C5")
@requires("debugfs")
@gmem_kinds("g0", "gMS")
def test_open_gmem_keeps_the_vm_alive(vm: Vm, gmem: GuestMemfd) -> None:
    """A VM lives as long as any gmem it created is open, whatever becomes of its own descriptor."""
    directory = VmDirectory.of(vm)
    vm.close()
    assert directory.exists
    assert gmem.raw.allocate(0, PAGE_SIZE) == OK
    assert directory.exists
    gmem.close()
    directory.wait_gone()


@contract("GM-LIFE-001")
@requires("debugfs")
def test_vm_without_gmem_dies_with_its_descriptor(vm: Vm) -> None:
    """Without a gmem or a vCPU, closing the VM's descriptor destroys the VM: what pins it elsewhere is the gmem."""
    vm.create_guest_memfd(SIZE).close()
    directory = VmDirectory.of(vm)
    vm.close()
    directory.wait_gone()


@contract("GM-LIFE-001", "C5")
@requires("debugfs")
def test_every_gmem_pins_the_vm_on_its_own(vm: Vm) -> None:
    """Of several gmem files each one alone keeps the VM alive; the last one closed frees it."""
    directory = VmDirectory.of(vm)
    gmems = [vm.create_guest_memfd(SIZE) for _ in range(3)]
    vm.close()
    for gmem in gmems:
        assert directory.exists
        gmem.close()
    directory.wait_gone()


@contract("GM-LIFE-002", "C7")
@requires("debugfs")
@gmem_kinds("g0", "gM")
def test_a_slot_does_not_keep_the_file_alive(bound: Bound) -> None:
    """A binding holds no reference to the gmem file: the last close releases it although the slot is still there.

    If the slot held the file, and the file the VM, closing everything would leave the VM behind for ever.
    """
    directory = VmDirectory.of(bound.vm)
    bound.gmem.close()
    assert bound.vm.raw.set_region(bound.region.but(gmem=None, flags=0, slot=1)) == Errno.EEXIST  # the slot is there
    assert directory.exists
    bound.vm.close()
    directory.wait_gone()


@contract("GM-LIFE-002", "GM-LIFE-019", "C7")
@gmem_kinds("g0", "gMS")
def test_last_close_frees_the_pages_of_a_bound_gmem(vm: Vm, gmem_kind: GmemFlag) -> None:
    """When the last descriptor of a gmem is closed, its pages are freed at once, bound or not."""
    for bind in (False, True):
        base = unevictable()
        with vm.create_guest_memfd(BIG, gmem_kind) as gmem:
            if bind:
                vm.bind(gmem, gpa=GPA)
            gmem.allocate()
            wait_until(lambda base=base: unevictable() > base + BIG - MARGIN, "the pages count as unevictable")  # type: ignore[misc]
        wait_until(lambda base=base: unevictable() < base + MARGIN, "the pages are free again")  # type: ignore[misc]


@contract("GM-LIFE-019")
@gmem_kinds("gMS")
def test_a_mapping_keeps_the_pages_of_a_closed_gmem(gmem: GuestMemfd) -> None:
    """Pages of a closed gmem are freed only when no mapping is left, contents intact until then."""
    base = unevictable()
    with Mapping.of(gmem, SIZE) as mapping:
        mapping.fill(0x5A)
        gmem.close()
        assert mapping.is_filled_with(0x5A)
    wait_until(lambda: unevictable() < base + SIZE // 2, "the pages are free again")


@contract("GM-LIFE-003", "C7", "C9")
@gmem_kinds("g0", "gM")
def test_slot_remains_after_its_gmem_is_gone(bound: Bound) -> None:
    """The slot of a closed gmem stays: its id and its guest addresses are taken until userspace deletes it."""
    vm, region = bound.vm, bound.region
    with vm.create_guest_memfd(SIZE, bound.gmem.flags) as fresh:
        again = region.but(gmem=fresh)
        bound.gmem.close()
        assert vm.raw.set_region(again) == Errno.EINVAL
        assert vm.raw.set_region(again.but(gpa=GPA + SIZE)) == Errno.EINVAL
        assert vm.raw.set_region(again.but(slot=1)) == Errno.EEXIST
        assert vm.raw.delete_region(0) == OK
        assert vm.raw.delete_region(0) == Errno.EINVAL
        assert vm.raw.set_region(again) == OK


@contract("GM-LIFE-004", "GM-LIFE-005", "C9")
@guest_reaches
def test_a_dead_slot_is_no_business_of_later_gmems(running: Running) -> None:
    """A gmem that is made after another one is gone keeps its bindings when the other's slot is deleted.

    The kernel gives out the memory of closed files again, the last one first, so a slot that still pointed to one would now
    point to a file that it never knew.
    """
    vm, elsewhere = running.vm, running.region.but(slot=1, gpa=2 * GPA)
    running.gmem.close()
    for _ in range(4):
        with vm.create_guest_memfd(SIZE, running.gmem.flags) as later:
            vm.set_region(elsewhere.but(gmem=later))
            assert is_dead(running.cpu.try_load(running.gpa), running.gpa)
            vm.delete_region(0)
            running.cpu.store(elsewhere.gpa, STAMP)
            assert running.cpu.load(elsewhere.gpa) == STAMP
            later.punch(0, PAGE_SIZE)
            assert running.cpu.load(elsewhere.gpa) == 0
            vm.delete_region(1)
            vm.set_region(running.region.but(gmem=later))


@contract("GM-LIFE-004", "GM-LIFE-005", "C7", "C9")
@guest_reaches
def test_dead_slot_faults_until_it_is_replaced(running: Running) -> None:
    """Access to a slot whose gmem is gone leaves the guest with EFAULT and a memory fault exit, as often as it is tried.

    With the slot deleted and a fresh gmem in its place, the same instruction completes and reads zero.
    """
    cpu, gpa = running.cpu, running.gpa + 5 * PAGE_SIZE
    cpu.store(gpa, STAMP)
    assert cpu.load(gpa) == STAMP
    running.gmem.close()
    first = cpu.try_load(gpa + 8)
    assert is_dead(first, gpa), first
    rip = cpu.registers().rip
    assert is_dead(cpu.run(), gpa)
    assert cpu.registers().rip == rip
    running.vm.delete_region(0)
    with running.vm.create_guest_memfd(SIZE, running.gmem.flags) as fresh:
        running.vm.set_region(running.region.but(gmem=fresh))
        assert cpu.finish(cpu.run()).rax == 0
        assert cpu.load(gpa) == 0
        assert fresh.allocated_pages() == 1


@contract("GM-LIFE-004", "GM-LIFE-005", "C7", "C9")
@vm_types("sw-protected")
def test_dead_slot_of_private_memory_says_private(running: Running) -> None:
    """The memory fault exit of a dead slot says PRIVATE exactly where the page's attribute does."""
    cpu, gpa = running.cpu, running.gpa
    running.vm.set_private(gpa, SIZE // 2)
    cpu.store(gpa, STAMP)
    assert cpu.load(gpa) == STAMP
    running.gmem.close()
    assert_dead(cpu, gpa, private=True)
    if running.gmem.flags & GmemFlag.MMAP:  # without it the shared half is the slot's userspace_addr
        assert_dead(cpu, gpa + SIZE // 2)
    running.vm.delete_region(0)
    with running.vm.create_guest_memfd(SIZE, running.gmem.flags) as fresh:
        running.vm.set_region(running.region.but(gmem=fresh))
        assert cpu.load(gpa) == 0


@contract("GM-LIFE-006", "C11")
@guest_reaches
def test_duplicate_descriptor_keeps_binding_and_data(running: Running) -> None:
    """A second descriptor of the file is as good as the first: closing either one alone changes nothing for the guest."""
    cpu, gpa = running.cpu, running.gpa
    cpu.store(gpa, STAMP)
    with running.gmem.duplicate() as second:
        running.gmem.close()
        assert cpu.load(gpa) == STAMP
        cpu.store(gpa + PAGE_SIZE, STAMP + 1)  # a page that nobody has touched yet
        assert cpu.load(gpa + PAGE_SIZE) == STAMP + 1
        assert second.allocated_pages() == 2
    assert_dead(cpu, gpa)


@contract("GM-LIFE-007", "C8")
@guest_reaches
def test_mapping_alone_keeps_the_binding_alive(running: Running) -> None:
    """A host mapping keeps file and binding alive without any descriptor; unmapping its last page is the last release."""
    cpu, gpa = running.cpu, running.gpa
    cpu.store(gpa, STAMP)
    with running.gmem.map() as mapping:
        running.gmem.close()
        assert cpu.load(gpa) == STAMP
        cpu.store(gpa + PAGE_SIZE, STAMP + 1)
        assert cpu.load(gpa + PAGE_SIZE) == STAMP + 1
        # All but the last page go: the file cares about the mapping, not about what it covers.
        left = Mapping(mapping.address + SIZE - PAGE_SIZE, PAGE_SIZE)
        with left:
            syscall(NUMBER["munmap"], mapping.address, SIZE - PAGE_SIZE)
            assert cpu.load(gpa) == STAMP
        assert_dead(cpu, gpa)


@contract("GM-LIFE-007", "C8")
@requires("debugfs")
@guest_reaches
def test_mapping_alone_keeps_the_vm_alive(vm: Vm, gmem: GuestMemfd) -> None:
    """A host mapping of a gmem keeps the VM alive with neither a VM nor a gmem descriptor left."""
    directory = VmDirectory.of(vm)
    with gmem.map() as mapping:
        gmem.close()
        vm.close()
        assert directory.exists
        if gmem.flags & GmemFlag.INIT_SHARED:
            mapping.store(STAMP)
            assert mapping.load() == STAMP
    directory.wait_gone()


@contract("GM-LIFE-008")
@gmem_kinds("gM")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_forked_child_keeps_the_binding_alive(running: Running, end: str) -> None:
    """A forked child that holds the gmem keeps the binding alive in its parent's VM, until the child ends."""
    cpu, gpa = running.cpu, running.gpa
    cpu.store(gpa, STAMP)
    with ChildProcess(lambda channel: channel.receive(), close_fds=[running.vm.fileno()]) as child:
        running.gmem.close()
        assert cpu.load(gpa) == STAMP
        cpu.store(gpa + PAGE_SIZE, STAMP + 1)
        if end == "exit":
            child.send()
            child.wait()
        else:
            child.kill()
        assert_dead(cpu, gpa)
        assert_dead(cpu, gpa + PAGE_SIZE)


@contract("GM-LIFE-009", "C14")
@requires("debugfs")
@gmem_kinds("g0")
def test_exec_inherits_the_gmem_and_pins_the_vm(vm: Vm, gmem: GuestMemfd) -> None:
    """A gmem is not close-on-exec: any program started meanwhile inherits it and keeps the VM alive until it ends."""
    directory = VmDirectory.of(vm)
    helper = spawn_python("import sys; print(flush=True); sys.stdin.read()")
    with helper:
        assert helper.stdin
        assert helper.stdout
        helper.stdout.readline()
        gmem.close()
        vm.close()
        assert directory.exists
        helper.stdin.close()
    directory.wait_gone()


@contract("GM-LIFE-009")
@requires("debugfs")
@gmem_kinds("g0")
def test_close_on_exec_is_the_remedy(vm: Vm, gmem: GuestMemfd) -> None:
    """With FD_CLOEXEC set on it, a gmem is not inherited by a program that happens to be started."""
    directory = VmDirectory.of(vm)
    gmem.set_cloexec(True)
    helper = spawn_python("import sys; print(flush=True); sys.stdin.read()")
    with helper:
        assert helper.stdin
        assert helper.stdout
        helper.stdout.readline()
        gmem.close()
        vm.close()
        directory.wait_gone()
        helper.stdin.close()


@contract("GM-LIFE-010")
@requires("debugfs")
@gmem_kinds("g0")
def test_descriptor_in_flight_keeps_the_vm_alive(vm: Vm, gmem: GuestMemfd) -> None:
    """A gmem in flight in a socket keeps the VM alive with no descriptor anywhere; it can be received and used later."""
    directory = VmDirectory.of(vm)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [gmem.fileno()])
        gmem.close()
        vm.close()
        sender.close()
        assert directory.exists
        _, fds, _, _ = socket.recv_fds(receiver, 1, 1)
        with GuestMemfd(fds[0], SIZE, gmem.flags) as received:
            assert received.raw.allocate(0, 2 * PAGE_SIZE) == OK
            assert received.allocated_pages() == 2
            assert directory.exists
    directory.wait_gone()


@contract("GM-LIFE-010")
@requires("debugfs")
@gmem_kinds("g0")
@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "cycle"])
def test_dropping_the_socket_releases_what_is_in_flight(vm: Vm, gmem: GuestMemfd, cycle: bool) -> None:
    """A gmem in flight in a socket that nobody can read any more is released, even where the sockets hold each other.

    The latter are found by the garbage collector of net/unix, which any closing of another socket wakes.
    """
    directory = VmDirectory.of(vm)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [gmem.fileno(), *([sender.fileno(), receiver.fileno()] if cycle else [])])
        gmem.close()
        vm.close()
        assert directory.exists
    for end in socket.socketpair():
        end.close()
    directory.wait_gone()


@contract("GM-LIFE-011", "C13")
@guest_reaches
def test_received_copy_works_but_for_vm_ioctls(running: Running) -> None:
    """A process that receives a gmem may allocate, punch, map and write it; only the VM's ioctls are its creator's alone."""
    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    cpu.store(running.gpa, STAMP)

    def receiver(channel: Channel) -> tuple[Answer, Answer, Answer, Answer, int | Errno]:
        _, (number,) = channel.receive_with_fds()
        request = MemoryRegion(slot=1, gpa=GPA + SIZE, size=PAGE_SIZE, gmem=number, gmem_offset=PAGE_SIZE)
        with GuestMemfd(number, SIZE, gmem.flags) as copy:
            stored = 0
            if copy.flags & GmemFlag.INIT_SHARED:
                with copy.map() as mapping:
                    stored = mapping.load()
                    mapping.store(STAMP + 3, 3 * PAGE_SIZE)
            answers = copy.raw.allocate(PAGE_SIZE, PAGE_SIZE), copy.raw.punch(0, PAGE_SIZE)
            return *answers, vm.raw.set_region(request), vm.raw.check_extension(0), stored

    with ChildProcess(receiver, close_fds=[gmem.fileno()]) as child:
        child.send(fds=[gmem.fileno()])
        shared = bool(gmem.flags & GmemFlag.INIT_SHARED)
        assert child.result() == (OK, OK, Errno.EIO, Errno.EIO, STAMP if shared else 0)
    assert cpu.load(running.gpa) == 0  # punched by the other process
    assert cpu.load(running.gpa + 3 * PAGE_SIZE) == (STAMP + 3 if shared else 0)
    # The control: the refused request is a good one for the VM's creator.
    vm.delete_region(0)
    assert vm.raw.set_region(MemoryRegion(1, GPA + SIZE, PAGE_SIZE, gmem=gmem, gmem_offset=PAGE_SIZE)) == OK


def _close_vm(running: Running) -> None:
    running.vm.close()


def _close_gmem(running: Running) -> None:
    running.gmem.close()


def _close_cpu(running: Running) -> None:
    running.cpu.close()


def _delete_slot(running: Running) -> None:
    assert running.vm.raw.delete_region(0) == OK


ORDERS: dict[str, tuple[Callable[[Running], None], ...]] = {
    "cpu-vm-gmem": (_close_cpu, _close_vm, _close_gmem),
    "vm-gmem-cpu": (_close_vm, _close_gmem, _close_cpu),
    "gmem-vm-cpu": (_close_gmem, _close_vm, _close_cpu),
    "gmem-slot-cpu-vm": (_close_gmem, _delete_slot, _close_cpu, _close_vm),
    "cpu-slot-gmem-vm": (_close_cpu, _delete_slot, _close_gmem, _close_vm),
    "slot-vm-cpu-gmem": (_delete_slot, _close_vm, _close_cpu, _close_gmem),
}


@contract("GM-LIFE-012")
@requires("debugfs")
@gmem_kinds("gM")
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_closing_is_clean(running: Running, order: str) -> None:
    """In whatever order VM, gmem, slot and vCPU go, all of it goes, and the kernel has nothing to say about it."""
    directory = VmDirectory.of(running.vm)
    running.cpu.stamp(running.gpa, STAMP, 16)
    for step in ORDERS[order]:
        assert directory.exists
        step(running)
    directory.wait_gone()


@contract("GM-LIFE-013")
@guest_reaches
def test_vcpu_runs_on_after_the_vm_descriptor_is_closed(running: Running) -> None:
    """A vCPU goes on running against bound gmem after the VM's descriptor is closed."""
    cpu, gpa = running.cpu, running.gpa
    cpu.store(gpa, STAMP)
    running.vm.close()
    assert cpu.load(gpa) == STAMP
    cpu.store(gpa + PAGE_SIZE, STAMP + 1)
    assert running.gmem.allocated_pages() == 2
    if running.gmem.flags & GmemFlag.INIT_SHARED:
        with running.gmem.map() as mapping:
            assert mapping.load(PAGE_SIZE) == STAMP + 1
            mapping.store(STAMP + 2, 2 * PAGE_SIZE)
        assert cpu.load(gpa + 2 * PAGE_SIZE) == STAMP + 2
    running.gmem.punch(0, PAGE_SIZE)
    assert cpu.load(gpa) == 0


@contract("GM-LIFE-014")
@requires("debugfs")
@pytest.mark.parametrize("holder", ["vcpu", "kvm-run-mapping", "vm-stats", "vcpu-stats"])
def test_other_objects_of_a_vm_keep_it_alive(vm: Vm, holder: str) -> None:
    """A vCPU, the mapping of its run page, and a statistics descriptor each keep the VM alive on their own."""
    directory = VmDirectory.of(vm)
    vcpu = vm.create_vcpu()
    last: Callable[[], None]
    if holder == "vcpu":
        last = vcpu.close
    elif holder == "kvm-run-mapping":
        assert vcpu.kvm_run.exit_reason == 0
        vcpu.close_fd()
        last = vcpu.unmap_run
    elif holder == "vm-stats":
        last = vm.stats_fd().close
        vcpu.close()
    else:
        last = vcpu.stats_fd().close
        vcpu.close()
    vm.close()
    assert directory.exists
    last()
    directory.wait_gone()


@contract("GM-LIFE-015")
@gmem_kinds("gMS")
def test_gmem_stays_usable_without_its_vm_descriptor(vm: Vm, gmem: GuestMemfd) -> None:
    """After the VM's descriptor is closed its gmem still maps, stores, allocates and punches; nothing new can be bound."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    assert vm.raw.set_region(request) == OK
    vm.close()
    with gmem.map() as mapping:
        mapping.store(STAMP)
        assert mapping.load() == STAMP
        gmem.allocate(PAGE_SIZE, PAGE_SIZE)
        assert gmem.allocated_pages() == 2
        gmem.punch(0, PAGE_SIZE)
        assert gmem.allocated_pages() == 1
        assert mapping.load() == 0
    with Kvm.open() as kvm, kvm.create_vm() as other:
        assert other.raw.set_region(request) == Errno.EINVAL


@contract("GM-LIFE-016", "C16")
@guest_reaches
def test_closing_one_gmem_kills_only_its_own_slots(running: Running) -> None:
    """Closing one of two gmem files of a VM zaps the slots bound to it and leaves the other's alone."""
    vm, cpu, size = running.vm, running.cpu, SIZE // 2
    vm.delete_region(0)
    with vm.create_guest_memfd(SIZE, running.gmem.flags) as other:
        # Interleaved in guest memory, so that a zap that goes by guest address would hit both.
        for slot, (gmem, offset) in enumerate([(running.gmem, 0), (other, 0), (running.gmem, size), (other, size)]):
            vm.bind(gmem, slot=slot, gpa=GPA + slot * size, size=size, offset=offset)
            cpu.store(GPA + slot * size, STAMP + slot)
        running.gmem.close()
        for slot in (0, 2):
            assert_dead(cpu, GPA + slot * size)
        for slot in (1, 3):
            assert cpu.load(GPA + slot * size) == STAMP + slot
        assert other.allocated_pages() == 2


def _die_running(vm_type: VmType, kind: GmemFlag, how: str) -> Callable[[Channel], None]:
    """A child that ends with everything open and a vCPU in KVM_RUN."""

    def child(channel: Channel) -> None:
        with owner(vm_type, kind, BIG) as running, spinning(running):
            channel.send(VmDirectory.of(running.vm))
            if how == "exit":
                os._exit(0)
            channel.receive()

    return child


@contract("GM-LIFE-017", "GM-LIFE-023", "C15")
@requires("debugfs", "x86")
@gmem_kinds("gM")
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_process_that_ends_mid_run_leaves_nothing(vm_type: VmType, gmem_kind: GmemFlag, how: str) -> None:
    """A process that is killed, or exits, with VM, slots, gmem and running vCPU open leaves neither VM nor pages behind."""
    base = unevictable()
    with ChildProcess(_die_running(vm_type, gmem_kind, how)) as child:
        directory: VmDirectory = child.receive()
        if how == "kill":
            assert directory.exists
            wait_until(lambda: unevictable() > base + BIG - MARGIN, "the child's pages count as unevictable")
            child.kill()
        assert child.wait() == (9 if how == "kill" else 0)
        directory.wait_gone()
        wait_until(lambda: unevictable() < base + MARGIN, "the child's pages are free again")


@contract("GM-LIFE-018", "C2", "C15")
@requires("debugfs")
@gmem_kinds("g0")
def test_vm_outlives_its_process_in_whoever_holds_the_gmem(kvm: Kvm, vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """When the process of a VM dies, another that holds only a gmem of it keeps the VM alive, and frees it by its close.

    What is alive there is of no use to the survivor: it cannot bind the file to a VM of its own.
    """

    def creator(channel: Channel) -> None:
        with Kvm.open() as theirs, theirs.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA)
            gmem.allocate(0, PAGE_SIZE)
            channel.send(VmDirectory.of(vm), fds=[gmem.fileno()])
            channel.receive()

    with ChildProcess(creator) as child:
        directory, (number,) = child.channel.receive_with_fds()
        with GuestMemfd(number, SIZE, gmem_kind) as survivor, kvm.create_vm(vm_type) as mine:
            child.kill()
            assert directory.exists
            assert survivor.allocated_pages() == 1
            assert survivor.raw.allocate(PAGE_SIZE, PAGE_SIZE) == OK
            assert survivor.raw.punch(0, PAGE_SIZE) == OK
            assert survivor.allocated_pages() == 1
            request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=survivor)
            assert mine.raw.set_region(request) == Errno.EINVAL
            with mine.create_guest_memfd(SIZE, gmem_kind) as own:
                assert mine.raw.set_region(request.but(gmem=own)) == OK
            assert directory.exists
        directory.wait_gone()


@contract("GM-LIFE-020")
@gmem_kinds("g0", "gMS")
def test_pages_outlive_the_process_that_allocated_them(gmem: GuestMemfd) -> None:
    """Pages belong to the file: those that another process allocated and wrote stay after it died."""

    def worker() -> None:
        gmem.allocate(0, 16 * PAGE_SIZE)
        if gmem.flags & GmemFlag.INIT_SHARED and gmem.flags & GmemFlag.MMAP:
            with gmem.map() as mapping:
                mapping.fill(0xC3, 0, 16 * PAGE_SIZE)

    assert gmem.allocated_pages() == 0
    in_child(worker)
    assert gmem.allocated_pages() == 16
    if gmem.flags & GmemFlag.INIT_SHARED and gmem.flags & GmemFlag.MMAP:
        with gmem.map() as mapping:
            assert mapping.is_filled_with(0xC3, 0, 16 * PAGE_SIZE)
            assert mapping.is_filled_with(0, 16 * PAGE_SIZE)


@contract("GM-LIFE-021", "C22", "C30")
@requires("x86")
@guest_reaches
def test_new_vm_never_sees_pages_of_an_older_one(vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """A fresh gmem of a new VM reads zero throughout, whatever a VM that died just before had written to its memory."""
    size, pages = 2 * MiB, 2 * MiB // PAGE_SIZE
    for _ in range(2):
        with owner(vm_type, gmem_kind, size) as old:
            assert old.cpu.first_not(0, GPA + PAGE_SIZE, pages - 1) is None
            if gmem_kind & GmemFlag.INIT_SHARED:
                with old.gmem.map() as mapping:
                    assert mapping.is_filled_with(0, 8)  # but for the stamp that `owner` left
                    mapping.fill(0xEE)
            old.cpu.stamp(GPA, STAMP, pages)
            assert old.cpu.first_unstamped(GPA, STAMP, pages) is None


@contract("GM-LIFE-022")
@requires("modules")
@vm_types("default")
def test_gmem_pins_the_vendor_module(vm: Vm, host: Host) -> None:
    """An open gmem holds a reference to the module its file operations live in."""
    count = MODULES / host.backend / "refcnt"

    def change() -> int:
        before = int(Path(count).read_text())
        with vm.create_guest_memfd(SIZE):
            return int(Path(count).read_text()) - before

    # Other VMs of this machine come and go, and each changes the count: one quiet moment is enough.
    assert 1 in [change() for _ in range(20)]


@contract("GM-LIFE-022")
@requires("modules", "root")
@disruptive()
@vm_types("default")
@gmem_kinds("g0")
def test_vendor_module_cannot_be_removed_under_a_gmem(vm: Vm, gmem: GuestMemfd, host: Host) -> None:
    """While a gmem is open, removing the vendor module fails although the VM's descriptor is closed."""
    from kvmgmem._native import ffi
    from kvmgmem.entry import address_of

    vm.close()
    assert gmem.allocated_pages() == 0
    name = ffi.new("char[]", host.backend.encode())
    assert syscall(NUMBER["delete_module"], address_of(name), os.O_NONBLOCK) == Errno.EAGAIN


@contract("GM-LIFE-024")
@guest_reaches
def test_unmapping_the_hva_of_a_gmem_slot_is_invisible(running: Running) -> None:
    """The host address of a slot that gmem alone backs may be unmapped under the guest, which goes on reading gmem."""
    vm, cpu, gpa = running.vm, running.cpu, running.gpa
    vm.delete_region(0)
    with Mapping.anonymous(SIZE) as unrelated:
        unrelated.store(STAMP)
        vm.set_region(running.region.but(hva=unrelated.address))
        assert cpu.load(gpa) == 0
        cpu.store(gpa, STAMP + 1)
        assert unrelated.load() == STAMP
    assert cpu.load(gpa) == STAMP + 1
    cpu.store(gpa + SIZE // 2, STAMP + 2)  # a page that the guest has not touched before
    assert cpu.load(gpa + SIZE // 2) == STAMP + 2
    assert running.gmem.allocated_pages() == 2
