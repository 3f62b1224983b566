"""GM-OWN: other processes hold the gmem, and its owner forks, executes another program or is killed (C13 to C15)."""

import os

from kvmgmem._native import lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, VmType
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.processes import Channel, ChildProcess, in_child
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    requires,
    vm_types,
    wait_until,
)
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.strangers import complaints_about
from kvmgmem.testing.vm_directory import VmDirectory

STAMP = 0x5EED_0000_0000_0001

# Guests reach a gmem without the MMAP flag only where memory is private.
guest_reaches = gmem_kinds("gM", "gMS")


@contract("C13")
@guest_reaches
def test_forked_child_is_not_the_owner(running: Running) -> None:
    """A forked child inherits the descriptors but not the VM: every VM and vCPU ioctl answers EIO.

    A VM of its own is a stranger to the gmem. The memory is the file's, though: the child can allocate, map and punch it,
    and the parent's guest sees that.
    """
    vm, gmem, vcpu = running.vm, running.gmem, running.cpu.vcpu
    request = MemoryRegion(slot=1, gpa=GPA + SIZE, size=SIZE, gmem=gmem)

    def ioctls() -> dict[str, Answer]:
        return {
            "KVM_CHECK_EXTENSION": vm.raw.check_extension(Cap.GUEST_MEMFD),
            "KVM_CREATE_GUEST_MEMFD": _number(vm.raw.create_guest_memfd(SIZE)),
            "KVM_SET_USER_MEMORY_REGION": vm.raw.set_region_v1(MemoryRegion(slot=1)),
            "KVM_SET_USER_MEMORY_REGION2": vm.raw.set_region(request),
            "KVM_SET_MEMORY_ATTRIBUTES": vm.raw.set_attributes(GPA, PAGE_SIZE, 0),
            "KVM_CREATE_VCPU": vm.raw.ioctl(lib.KVM_CREATE_VCPU, 1),
            "KVM_ENABLE_CAP": vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0),
            "KVM_CREATE_IRQCHIP": vm.raw.create_irqchip(),
            "KVM_GET_STATS_FD": _number(vm.raw.stats_fd()),
            "KVM_RUN": vcpu.raw.ioctl(lib.KVM_RUN),
            "KVM_GET_REGS": vcpu.raw.get_regs()[0],
        }

    def child() -> tuple[dict[str, Answer], list[str], Answer, Answer, int]:
        with Kvm.open() as kvm, kvm.create_vm(vm.type) as own:
            wrong = complaints_about(own, gmem, "the child's VM")
        seen = 0
        if gmem.flags & GmemFlag.INIT_SHARED:
            with gmem.map() as mapping:
                seen = mapping.load()
        return ioctls(), wrong, gmem.raw.allocate(PAGE_SIZE, PAGE_SIZE), gmem.raw.punch(0, PAGE_SIZE), seen

    running.cpu.store(GPA, STAMP)
    answers, wrong, allocated, punched, seen = in_child(child)
    assert answers == dict.fromkeys(answers, Errno.EIO)
    assert (wrong, allocated, punched) == ([], OK, OK)
    assert seen == (STAMP if gmem.flags & GmemFlag.INIT_SHARED else 0)
    assert running.cpu.load(GPA) == 0
    assert gmem.allocated_pages() == 2
    # The control: to the owner none of this is EIO.
    assert vm.raw.check_extension(Cap.GUEST_MEMFD) == 1
    assert vcpu.raw.get_regs()[0] == OK


def _number(made: OwnedFd | Errno) -> Answer:
    """A creator's answer as a value, closing what it made."""
    if isinstance(made, Errno):
        return made
    made.close()
    return OK


EXECUTED = """
import ctypes, mmap, os, pickle, socket, sys
channel, gmem, vm, vcpu, size, fallocate = map(int, sys.argv[1:])
talk = socket.socket(fileno=channel)
libc = ctypes.CDLL(None, use_errno=True)
def call(mode, offset, length):
    answer = libc.syscall(fallocate, gmem, mode, ctypes.c_long(offset), ctypes.c_long(length))
    return -ctypes.get_errno() if answer < 0 else answer
with mmap.mmap(gmem, size) as memory:
    seen = memory[0]
    memory[4096] = 7
    answers = call(1, 8192, 4096), call(3, 0, 4096), memory[0], memory[4096]
links = [os.path.lexists(f"/proc/self/fd/{number}") for number in (gmem, vm, vcpu)]
talk.send(pickle.dumps((seen, answers, links)))
talk.recv(100)
os.close(gmem)
talk.send(pickle.dumps("closed"))
talk.recv(100)
"""


@contract("C14")
@requires("debugfs", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_gmem_survives_the_exec_of_its_owner(vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """When the owner of a VM executes another program, only the gmem is left of it: memory to map, allocate and punch.

    VM and vCPU are close-on-exec and their process's memory is gone, but the VM lives until the gmem is closed.
    """

    def owner(channel: Channel) -> None:
        import sys

        from kvmgmem.arch.x86_64 import GuestMachine

        with Kvm.open() as kvm, kvm.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA)
            cpu = GuestMachine(vm).cpu()
            cpu.store(GPA, 0x5A, width=1)
            channel.send(VmDirectory.of(vm))
            talk = os.dup(channel._socket.fileno())
            numbers = (talk, gmem.fileno(), vm.fileno(), cpu.vcpu.fileno(), SIZE, NUMBER["fallocate"])
            os.set_inheritable(talk, True)
            os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", EXECUTED, *map(str, numbers)])

    with ChildProcess(owner) as child:
        directory: VmDirectory = child.receive()
        seen, answers, links = child.receive()
        assert (seen, answers) == (0x5A, (OK, OK, 0, 7))
        assert links == [True, False, False]
        assert directory.exists
        child.send()
        assert child.receive() == "closed"
        directory.wait_gone()
        child.send()
        child.wait()


@contract("C15", "C2")
@requires("debugfs", "x86")
@gmem_kinds("gM")
def test_gmem_survives_the_death_of_its_running_owner(kvm: Kvm, vm_type: VmType, gmem_kind: GmemFlag) -> None:
    """When the owner is killed with its vCPU running in a gmem, whoever holds the gmem can punch and close it in peace."""

    def owner(channel: Channel) -> None:
        from kvmgmem.arch.x86_64 import GuestMachine

        with Kvm.open() as mine, mine.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
            vm.bind(gmem, gpa=GPA)
            cpu = GuestMachine(vm).cpu()
            cpu.stamp(GPA + PAGE_SIZE, STAMP, 16)
            cpu.start("hammer", rdi=GPA)
            with cpu.running():
                wait_until(lambda: gmem.allocated_pages() == 17, "the vCPU runs")
                channel.send(VmDirectory.of(vm), fds=[gmem.fileno()])
                channel.receive()

    with ChildProcess(owner) as child, kvm.create_vm(vm_type) as other:
        directory, (number,) = child.channel.receive_with_fds()
        with GuestMemfd(number, SIZE, gmem_kind) as gmem:
            gmem.punch(PAGE_SIZE, PAGE_SIZE)
            child.kill()
            assert directory.exists
            assert gmem.allocated_pages() == 16
            assert complaints_about(other, gmem, "the survivor's VM") == []
            gmem.punch()
            assert gmem.allocated_pages() == 0
        directory.wait_gone()
