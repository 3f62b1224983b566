"""GM-OWN: what a gmem is, and whose, is told by the file alone (C31 to C33)."""

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable

import pytest

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi
from kvmgmem.abi import OK
from kvmgmem.entry import syscall
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import DEVICE, Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    requires,
    vm_types,
)
from kvmgmem.testing.fixtures import GPA, SIZE, Bound, Running
from kvmgmem.testing.reopening import link_of, try_open
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000_0000_0001


@contract("C31")
@gmem_kinds("g0")
def test_ownership_follows_the_file_not_its_number(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Nothing about a gmem but the file itself says whose it is: not its descriptor's number, size, owner or device."""
    number, looks = gmem.fileno(), os.fstat(gmem.fileno())
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=number)
    with kvm.create_vm(vm.type) as other:
        assert (vm.raw.set_region(request), other.raw.set_region(request)) == (OK, Errno.EINVAL)
        vm.delete_region(0)
        with other.create_guest_memfd(SIZE, gmem.flags) as theirs:
            same = os.fstat(theirs.fileno())
            assert [getattr(same, name) for name in ("st_dev", "st_mode", "st_uid", "st_size", "st_nlink")] == [
                getattr(looks, name) for name in ("st_dev", "st_mode", "st_uid", "st_size", "st_nlink")
            ]
            with gmem.duplicate() as original:
                os.dup2(theirs.fileno(), number)  # another VM's gmem behind the very number that was good
                assert (vm.raw.set_region(request), other.raw.set_region(request)) == (Errno.EINVAL, OK)
                other.delete_region(0)
                os.dup2(original.fileno(), number)
                assert (vm.raw.set_region(request), other.raw.set_region(request)) == (OK, Errno.EINVAL)


@contract("C31")
@gmem_kinds("g0")
def test_bindings_follow_the_file_not_its_number(kvm: Kvm, bound: Bound) -> None:
    """A slot stays bound to the file it was made with, whatever its descriptor's number is given to afterwards."""
    elsewhere = bound.region.but(slot=1, gpa=GPA + SIZE)
    number = bound.gmem.fileno()
    with kvm.create_vm(bound.vm.type) as other, other.create_guest_memfd(SIZE) as theirs, bound.gmem.duplicate() as original:
        os.dup2(theirs.fileno(), number)
        assert bound.vm.raw.set_region(elsewhere.but(gmem=original)) in (Errno.EEXIST, Errno.EINVAL)  # bound already
        assert other.raw.set_region(bound.region.but(gmem=number)) == OK
        original.close()
        # The slot of the file that is gone is dead, and the number is the other VM's.
        assert bound.vm.raw.set_region(elsewhere.but(gmem=number)) == Errno.EINVAL


@contract("C32")
@requires("x86")
@vm_types("default")
@gmem_kinds("gM")
def test_bind_races_with_the_number_changing_hands(kvm: Kvm, running: Running, effort: float) -> None:
    """While a number changes between two VMs' gmems, each bind gets its own VM's memory or EINVAL, never a mixture."""
    from kvmgmem.arch.x86_64 import GuestMachine

    vm, gmem, cpu = running.vm, running.gmem, running.cpu
    cpu.store(GPA, STAMP)
    vm.delete_region(0)
    stop = threading.Event()
    with kvm.create_vm() as other, other.create_guest_memfd(SIZE, gmem.flags) as theirs, gmem.duplicate() as shared:
        machine = GuestMachine(other)
        other_cpu = machine.cpu()
        other.bind(theirs, gpa=GPA)
        other_cpu.store(GPA, STAMP + 1)
        other.delete_region(0)
        number = shared.fileno()

        def swap() -> None:
            while not stop.is_set():
                os.dup2(theirs.fileno(), number)
                os.dup2(gmem.fileno(), number)

        swapper = threading.Thread(target=swap)
        swapper.start()
        answers: set[tuple[str, Answer]] = set()
        try:
            for _ in range(max(2, int(10 * effort))):
                for name, one, reader, stamp in (("own", vm, cpu, STAMP), ("other", other, other_cpu, STAMP + 1)):
                    answer = one.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=number))
                    answers.add((name, answer))
                    if answer == OK:
                        assert reader.load(GPA) == stamp
                        one.delete_region(0)
        finally:
            stop.set()
            swapper.join()
            other_cpu.close()
            machine.close()
        assert answers <= {(name, answer) for name in ("own", "other") for answer in (OK, Errno.EINVAL)}


@contract("C33")
@gmem_kinds("g0")
def test_other_descriptors_are_no_gmem(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Only a gmem can be bound: any other open descriptor is EINVAL, and one that is not open, or O_PATH, is EBADF."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    assert vm.raw.set_region(request) == OK
    vm.delete_region(0)
    with contextlib.ExitStack() as stack:

        def keep(number: int) -> OwnedFd:
            return stack.enter_context(OwnedFd(number))

        vcpu = stack.enter_context(vm.create_vcpu())
        reader, writer = (keep(number) for number in os.pipe())
        one, two = socket.socketpair()
        stack.callback(one.close)
        stack.callback(two.close)
        memfd = keep(os.memfd_create("plain"))
        os.ftruncate(memfd.fileno(), SIZE)
        pidfd = syscalls.pidfd_open(os.getpid())
        assert not isinstance(pidfd, Errno)
        others: dict[str, OwnedFd | int] = {
            str(DEVICE): kvm,
            "the VM": vm,
            "a vCPU": vcpu,
            "VM statistics": stack.enter_context(vm.stats_fd()),
            "a memfd of the same size": memfd,
            "an eventfd": keep(os.eventfd(0)),
            "a pidfd": keep(pidfd),
            "a directory": keep(os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
            "a file": keep(os.open("/proc/self/exe", os.O_RDONLY)),
            "a device": keep(os.open("/dev/null", os.O_RDWR)),
            "a pipe": reader,
            "the pipe's other end": writer,
            "a socket": one.fileno(),
        }
        for name, other in others.items():
            assert vm.raw.set_region(request.but(gmem=other)) == Errno.EINVAL, name
        path = keep(os.open(link_of(gmem), os.O_PATH))
        closed = os.dup(gmem.fileno())
        os.close(closed)
        for name, number in {"O_PATH": path.fileno(), "closed": closed, "-1": -1, "2^31": 1 << 31}.items():
            assert vm.raw.set_region(request.but(gmem=number)) == Errno.EBADF, name
    assert vm.raw.set_region(request) == OK


def _memfd_secret() -> int:
    answer = syscall(NUMBER["memfd_secret"], os.O_CLOEXEC)
    if isinstance(answer, Errno):
        pytest.skip(f"memfd_secret answers {answer.name} (CONFIG_SECRETMEM, secretmem.enable)")
    os.ftruncate(answer, SIZE)
    return answer


def _hugetlb() -> int:
    try:
        number = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no hugetlb memfd: {errno.errorcode.get(error.errno or 0)} (CONFIG_HUGETLBFS)")
    os.ftruncate(number, SIZE)
    return number


def _dma_buf() -> int:
    """A buffer from the memfd-backed exporter (include/uapi/linux/udmabuf.h)."""
    device = try_open("/dev/udmabuf", os.O_RDWR)
    if isinstance(device, Errno):
        pytest.skip(f"/dev/udmabuf does not open: {device.name} (CONFIG_UDMABUF)")
    with OwnedFd(device), OwnedFd(os.memfd_create("backing", os.MFD_ALLOW_SEALING)) as memfd:
        os.ftruncate(memfd.fileno(), SIZE)
        fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        fields = memfd.fileno() | 1 << 32, 0, SIZE  # struct udmabuf_create: memfd, flags (CLOEXEC), offset, size
        answer = entry.ioctl_struct(device, 0x40187542, ffi.new("uint64_t[3]", fields))
    assert not isinstance(answer, Errno), answer
    return answer


@contract("C33")
@vm_types("default")
@gmem_kinds("g0")
@pytest.mark.parametrize("make", [_memfd_secret, _hugetlb, _dma_buf], ids=["memfd_secret", "hugetlb", "dma-buf"])
def test_other_kinds_of_memory_are_no_gmem(vm: Vm, gmem: GuestMemfd, make: Callable[[], int]) -> None:
    """Other files of memory that are kept from the host, huge, or shared with devices cannot be bound as gmem either."""
    request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
    with OwnedFd(make()) as other:
        assert vm.raw.set_region(request.but(gmem=other)) == Errno.EINVAL
        assert vm.raw.set_region(request) == OK
