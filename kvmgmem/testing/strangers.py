"""Other VMs than the one a gmem belongs to: how they are refused, and that a refusal costs them nothing."""

import threading

from kvmgmem.abi import OK, PAGE_SIZE, Cap, VmType
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing.fixtures import GPA, PLAIN_TYPES
from kvmgmem.vm import Vm

ELSEWHERE = 0x2_0000_0000  # guest memory that no other slot of these tests uses


def binds(vm: Vm, gmem: GuestMemfd) -> list[MemoryRegion]:
    """Good binds of one page, at the edges of what a VM offers: slot ids, file offsets, address spaces."""
    first = MemoryRegion(slot=0, gpa=GPA, size=PAGE_SIZE, gmem=gmem)
    last_slot = vm.check_extension(Cap.NR_MEMSLOTS) - 1
    found = [first, first.but(slot=last_slot), first.but(gmem_offset=gmem.size - PAGE_SIZE)]
    if vm.check_extension(Cap.MULTI_ADDRESS_SPACE) > 1:
        found.append(first.but(as_id=1))
    return found


def complaints_about(other: Vm, gmem: GuestMemfd, name: str) -> list[str]:
    """What a foreign VM may do with a gmem and must not, or must be able to do with its own and cannot."""
    wrong: list[str] = []
    with other.create_guest_memfd(gmem.size) as own:
        for request in binds(other, gmem):
            answer = other.raw.set_region(request)
            if answer != Errno.EINVAL:
                wrong.append(f"{name}: {request} -> {answer!r}")
            control = other.raw.set_region(request.but(gmem=own))
            if control != OK:
                wrong.append(f"{name}: its own gmem: {request} -> {control!r}")
            other.raw.delete_region(request.slot, request.as_id)
    return wrong


def complaints(kvm: Kvm, older: Vm, gmem: GuestMemfd) -> list[str]:
    """`complaints_about` for VMs of this process: one older than the gmem, and younger ones of every type with gmems."""
    wrong = complaints_about(older, gmem, "an older VM")
    for vm_type in (offered for offered in kvm.vm_types() if offered in PLAIN_TYPES):
        with kvm.create_vm(vm_type) as younger:
            if not younger.check_extension(Cap.GUEST_MEMFD):
                continue
            wrong += complaints_about(younger, gmem, f"a younger {vm_type.label} VM")
    return wrong


def crowd(vm: Vm) -> None:
    """Give a VM more slots than the others have, out of their way."""
    for slot in range(1, 9):
        vm.set_region(MemoryRegion(slot, ELSEWHERE + slot * PAGE_SIZE, PAGE_SIZE))


class Stranger:
    """Somebody else with VMs of their own, in this thread, another thread, or another process that is sent the gmem."""

    def __init__(self, kvm: Kvm, where: str, vm_type: VmType) -> None:
        self._kvm = kvm
        self._where = where
        self._older: Vm | None = None
        self._child: ChildProcess | None = None
        if where == "other-process":
            self._child = ChildProcess(lambda channel: _stranger(channel, vm_type))
        else:
            self._older = kvm.create_vm(vm_type)
            crowd(self._older)

    def complaints(self, gmem: GuestMemfd) -> list[str]:
        """What is wrong about how the gmem is refused there."""
        if self._child is not None:
            self._child.send((gmem.size, int(gmem.flags)), fds=[gmem.fileno()])
            answer: list[str] = self._child.receive()
            return answer
        assert self._older is not None
        if self._where == "same-thread":
            return complaints(self._kvm, self._older, gmem)
        found: list[str] = ["the thread died"]

        def in_thread() -> None:
            assert self._older is not None
            found[:] = complaints(self._kvm, self._older, gmem)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        return found

    def close(self) -> None:
        """Be gone."""
        if self._child is not None:
            with self._child:
                pass
        if self._older is not None:
            self._older.close()


def _stranger(channel: Channel, vm_type: VmType) -> None:
    with Kvm.open() as kvm, kvm.create_vm(vm_type) as older:
        crowd(older)
        while True:
            (size, flags), (number,) = channel.receive_with_fds()
            with GuestMemfd(number, size, flags) as received:
                channel.send(complaints(kvm, older, received))
