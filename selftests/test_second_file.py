"""A second file on one inode, for another VM (KVM_LINK_GUEST_MEMFD): what its published interface promises.

No kernel that is released has it; the tests follow the last posting and run as soon as a kernel answers to it. The inode is
the memory of a virtual machine, each file one struct kvm's view of it (api.rst 4.142).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.proposed_abi import link
from kvmgmem.syscalls import kcmp_same_file
from kvmgmem.testing import contract, gmem_kinds, requires
from kvmgmem.testing.dead_slots import assert_dead
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.shmem import shmem
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm

STAMP = 0x11C0_0000_0000_0001

second_files = requires("second-file")


def linked(target: Vm, gmem: GuestMemfd) -> GuestMemfd:
    """A second file of the gmem's inode, for the target VM."""
    number = link(target, gmem)
    assert not isinstance(number, Errno), number
    return GuestMemfd(number, gmem.size, gmem.flags)


@contextmanager
def a_guest(vm: Vm, gmem: GuestMemfd) -> Iterator[GuestCpu]:
    """A vCPU of a VM that sees the whole file at `GPA`."""
    vm.bind(gmem, gpa=GPA)
    machine = GuestMachine(vm)
    cpu = machine.cpu()
    yield cpu
    cpu.close()
    machine.close()


@contract("C12")
@second_files
@requires("kcmp")
@gmem_kinds("gM", "gMS")
def test_a_link_is_another_file_of_the_same_inode(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """The new file has the inode, size and kind of the old one, and is nevertheless another file."""
    with kvm.create_vm(vm.type) as target, linked(target, gmem) as second:
        one, two = os.fstat(gmem.fileno()), os.fstat(second.fileno())
        assert (one.st_dev, one.st_ino, one.st_size) == (two.st_dev, two.st_ino, two.st_size)
        assert not kcmp_same_file(os.getpid(), gmem.fileno(), os.getpid(), second.fileno())
        gmem.allocate(0, PAGE_SIZE)
        assert second.allocated_pages() == 1


@contract("C1")
@second_files
@gmem_kinds("gM", "gMS")
def test_each_file_has_one_owner(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Each file can be bound by the VM that it was made for and by no other, and each has bindings of its own."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE)
    with kvm.create_vm(vm.type) as target, kvm.create_vm(vm.type) as stranger, linked(target, gmem) as second:
        for file, owner, others in ((gmem, vm, (target, stranger)), (second, target, (vm, stranger))):
            for other in others:
                assert other.raw.set_region(request.but(gmem=file)) == Errno.EINVAL
            assert owner.raw.set_region(request.but(gmem=file)) == OK  # while the other file's binding stands
        assert target.raw.set_region(request.but(slot=1, gpa=GPA + SIZE, gmem=second)) == Errno.EEXIST


@second_files
@gmem_kinds("gM", "gMS")
def test_both_files_are_views_of_the_same_memory(kvm: Kvm, running: Running) -> None:
    """What one VM's guest writes the other's reads, and a punch through either file is a hole in both."""
    with (
        kvm.create_vm(running.vm.type) as target,
        linked(target, running.gmem) as second,
        a_guest(target, second) as cpu,
    ):
        running.cpu.stamp(GPA, STAMP, 8)
        assert cpu.first_unstamped(GPA, STAMP, 8) is None
        cpu.store(GPA, STAMP + 99)
        assert running.cpu.load(GPA) == STAMP + 99
        for file, page in ((second, 1), (running.gmem, 2)):
            file.punch(page * PAGE_SIZE, PAGE_SIZE)
            assert (running.cpu.load(GPA + page * PAGE_SIZE), cpu.load(GPA + page * PAGE_SIZE)) == (0, 0)


@second_files
@requires("debugfs")
@gmem_kinds("gM", "gMS")
def test_memory_outlives_the_first_file(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Closing the first file kills its own VM's slots and frees that VM; the memory lives on in the second file."""
    directory = VmDirectory.of(vm)
    with kvm.create_vm(vm.type) as target, linked(target, gmem) as second:
        with a_guest(vm, gmem) as first:
            first.stamp(GPA, STAMP, 8)
            gmem.close()
            assert_dead(first, GPA)
        vm.close()
        directory.wait_gone()
        with a_guest(target, second) as cpu:
            assert second.allocated_pages() == 8
            assert cpu.first_unstamped(GPA, STAMP, 8) is None


@second_files
@requires("debugfs")
@gmem_kinds("gM")
def test_a_link_pins_its_own_vm_only(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """A file pins the VM that it was made for: each VM goes with its own file, in either order."""
    with kvm.create_vm(vm.type) as target:
        directories = VmDirectory.of(vm), VmDirectory.of(target)
        second = linked(target, gmem)
    with second:
        vm.close()
        assert all(directory.exists for directory in directories)
        gmem.close()
        directories[0].wait_gone()
        assert directories[1].exists
    directories[1].wait_gone()


@second_files
@gmem_kinds("gM", "gMS")
def test_only_gmem_can_be_linked(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """A link wants an open gmem and no unknown flag: EBADF for what is not open, EINVAL for all else."""
    with kvm.create_vm(vm.type) as target, shmem(SIZE) as file:
        before = sorted(os.listdir("/proc/self/fd"))
        for source, wanted in ((file, Errno.EINVAL), (kvm, Errno.EINVAL), (vm, Errno.EINVAL), (-1, Errno.EBADF)):
            assert link(target, source) == wanted, source
        for bit in range(32, 64):
            assert link(target, gmem, flags=1 << bit) == Errno.EINVAL
        assert sorted(os.listdir("/proc/self/fd")) == before
        linked(target, gmem).close()
