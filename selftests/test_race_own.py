"""GM-OWN: whose memory a guest sees, and that everything goes, while what it belongs to is used and torn down at once."""

import itertools
import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from kvmgmem._native import lib
from kvmgmem.abi import PAGE_SIZE, Cap, GiB, GmemFlag
from kvmgmem.arch.x86_64 import GuestMachine
from kvmgmem.entry import ioctl_struct, syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import RunResult
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import contract, disruptive, gmem_kinds, requires, wait_until, would_show
from kvmgmem.testing.dead_slots import is_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.storm import Dirt, Resident, Storm, patrol
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm, region2

STAMP = 0x5EED_0000_0000_0001
ELSEWHERE = GPA + GiB
PAGES = 16
SPAN = PAGES * PAGE_SIZE


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Storm:
    """How long to rage."""
    return Storm.of(request)


@contract("C24")
@gmem_kinds("gM", "gMS")
def test_guests_in_a_storm_see_their_own_memory(running: Running, storm: Storm) -> None:
    """Beside punches, allocations and slots that come and go, guests see what they wrote or zero, and never leave."""
    vm, gmem, region = running.vm, running.gmem, running.region
    vm.delete_region(0)
    vm.set_region(region.but(size=SPAN))
    with closing(running.machine.cpu(1)) as second, Dirt() as dirt, Mapping.anonymous(SPAN) as memory:

        def punch() -> None:
            first = storm.random.randrange(PAGES)
            gmem.punch(first * PAGE_SIZE, storm.random.randint(1, PAGES - first) * PAGE_SIZE)

        def allocate() -> None:
            gmem.allocate(storm.random.randrange(PAGES) * PAGE_SIZE, PAGE_SIZE)

        def neighbours() -> None:
            # Pages that are punched never belong to these: that would show B8.
            vm.set_region(region.but(slot=1, gpa=GPA + SPAN, size=SPAN, gmem_offset=SPAN))
            vm.set_region(MemoryRegion(slot=2, gpa=ELSEWHERE, size=SPAN, hva=memory.address))
            vm.delete_region(1)
            vm.delete_region(2)

        patrol(running.cpu, GPA, PAGES, STAMP)
        patrol(second, GPA, PAGES, STAMP)
        with Resident(running.cpu) as one, Resident(second) as two:
            storm.rage(punch, allocate, neighbours, dirt)
            assert one.inside, one
            assert two.inside, two
        assert (one.mmio_exits, two.mmio_exits) == (0, 0)
        running.cpu.stamp(GPA, STAMP, PAGES)
        assert second.first_unstamped(GPA, STAMP, PAGES) is None
        assert gmem.allocated_pages() == PAGES
        gmem.punch()
        assert second.first_not(0, GPA, PAGES) is None


class Doomed:
    """A VM with a bound gmem and a vCPU that reads it, and the four ways in which it is taken apart."""

    def __init__(self, kvm: Kvm, vm_type: int, kind: int) -> None:
        self.vm = kvm.create_vm(vm_type)
        self.directory = VmDirectory.of(self.vm)
        self.gmem = self.vm.create_guest_memfd(SIZE, kind)
        self.vm.bind(self.gmem, gpa=GPA, size=SPAN)
        self.machine = GuestMachine(self.vm)
        self.cpu = self.machine.cpu()
        # The number, because a Vm that another thread has closed would refuse before the kernel does.
        self._number = self.vm.fileno()

    def delete(self) -> Answer:
        """Delete the slot; EBADF once the VM's descriptor is closed."""
        return ioctl_struct(self._number, lib.KVM_SET_USER_MEMORY_REGION2, region2(MemoryRegion(slot=0)))

    def parts(self) -> list[Callable[[], object]]:
        """What is done to it, in no order."""
        return [self.gmem.close, self.delete, self.cpu.vcpu.close_fd, self.vm.close]

    def end(self) -> None:
        """Give up the memory of the machine and wait for the VM to be gone."""
        self.cpu.vcpu.unmap_run()
        self.directory.wait_gone()
        self.machine.close()


def in_this_order(actions: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same actions, each of which begins no earlier than the one before it has begun."""
    begun = [threading.Event() for _ in actions]

    def after_its_elder(index: int) -> object:
        if index:
            begun[index - 1].wait(20)
        begun[index].set()
        return actions[index]()

    return [partial(after_its_elder, index) for index in range(len(actions))]


def left_properly(result: RunResult | None) -> bool:
    """Whether a guest was still inside, or had to leave because its slot was dead or its vCPU closed as it came back."""
    return (
        result is None
        or result.answer == Errno.EBADF
        or any(is_dead(result, GPA + page * PAGE_SIZE) for page in range(PAGES))
    )


def lives_or_left(doomed: Doomed, guest: Resident) -> bool:
    """Whether the VM is there, as it must be as long as its guest runs."""
    return doomed.directory.exists or not guest.inside


@contract("C25")
@disruptive()
@requires("debugfs", "x86")
@gmem_kinds("gM")
@would_show("B2")
def test_a_running_vm_ends_in_any_order(kvm: Kvm, vm: Vm, gmem_kind: int, storm: Storm) -> None:
    """In whatever order gmem, slot, vCPU and VM go under a running guest, it sees its data or leaves, and the VM ends."""
    orders = list(itertools.permutations(range(4)))
    storm.random.shuffle(orders)
    for _, order in zip(storm.rounds(6), itertools.cycle(orders), strict=False):
        doomed = Doomed(kvm, vm.type, gmem_kind)
        patrol(doomed.cpu, GPA, PAGES, STAMP)
        with Resident(doomed.cpu) as guest:
            parts = doomed.parts()
            storm.clash(*in_this_order([parts[index] for index in order]))
            # With all descriptors closed it is the vCPU that runs which keeps the VM.
            wait_until(partial(lives_or_left, doomed, guest), "the VM is there, or its guest is out")
        assert left_properly(guest.result), guest
        doomed.end()


def _exit_group() -> None:
    syscall(NUMBER["exit_group"], 0)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _close_range_and_exit() -> None:
    syscall(NUMBER["close_range"], 3, 0xFFFF_FFFF, 0)
    syscall(NUMBER["exit_group"], 0)


@contract("C25")
@disruptive()
@requires("debugfs", "x86", cap=Cap.GUEST_MEMFD_FLAGS)
@pytest.mark.parametrize("die", [_exit_group, _kill, _close_range_and_exit], ids=["exit_group", "SIGKILL", "close_range"])
def test_a_process_that_dies_takes_its_running_vm_along(vm: Vm, die: Callable[[], None], storm: Storm) -> None:
    """A process that dies, or closes all it has, while its guest runs and its slots change leaves no VM behind."""

    def live_and_die(channel: Channel) -> None:
        with Kvm.open() as kvm:
            doomed = Doomed(kvm, vm.type, GmemFlag.MMAP)
            patrol(doomed.cpu, GPA, PAGES, STAMP)
            with Resident(doomed.cpu):
                wait_until(lambda: doomed.gmem.allocated_pages() == PAGES, "the guest runs")
                channel.send(doomed.directory)
                channel.receive()

                def change() -> None:
                    doomed.delete()
                    doomed.gmem.punch()
                    doomed.gmem.close()

                storm.clash(change, die)

    for _ in storm.rounds():
        with ChildProcess(live_and_die) as child:
            directory: VmDirectory = child.receive()
            assert directory.exists
            child.send()
            status = child.wait()
            assert os.WIFSIGNALED(status) == (die is _kill)
        directory.wait_gone()
