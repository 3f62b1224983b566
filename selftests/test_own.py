"""GM-OWN: one struct kvm owns each guest_memfd file, and no other VM can bind it (C1 to C4).

The ids C1 to C33 are the statements that the guest_memfd design discussion settled; Documentation/virt/kvm/api.rst 4.142
words the outcome as ABI: the inode is the memory of the virtual machine, a file is one struct kvm's view of it.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmgmem._native import lib
from kvmgmem.abi import OK, GmemFlag, VmType
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    makes_gmem,
    requires,
    vm_types,
    wait_until,
)
from kvmgmem.testing.emulated_cpus import cpus_to_run_on
from kvmgmem.testing.fixtures import GPA, PLAIN_TYPES, SIZE
from kvmgmem.testing.meminfo import meminfo
from kvmgmem.testing.strangers import Stranger, binds, complaints, complaints_about
from kvmgmem.testing.tracing import traced
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm, region2


@contract("C1")
@gmem_kinds("g0")
@pytest.mark.parametrize("where", ["same-thread", "other-thread", "other-process"])
def test_only_the_creating_vm_can_bind(kvm: Kvm, vm_type: VmType, gmem_kind: GmemFlag, where: str) -> None:
    """Only the VM that created a gmem can bind it: never any other VM, whatever its type, age, process, slots or state.

    A refusal changes nothing: the other VM binds its own gmem in the same place, and the creator its own as before.
    """
    with (
        contextlib.closing(Stranger(kvm, where, vm_type)) as stranger,
        kvm.create_vm(vm_type) as vm,
        vm.create_guest_memfd(SIZE, gmem_kind) as gmem,
    ):
        assert stranger.complaints(gmem) == []  # never bound
        vm.bind(gmem, gpa=GPA)
        assert stranger.complaints(gmem) == []  # bound
        vm.delete_region(0)
        assert stranger.complaints(gmem) == []  # bound and deleted
        for request in binds(vm, gmem):
            assert vm.raw.set_region(request) == OK
            vm.delete_region(request.slot, request.as_id)


@contract("C2", "C31")
@requires("debugfs")
@gmem_kinds("g0")
def test_refusal_lasts_as_long_as_the_gmem(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """No other VM can bind a gmem at any point of its creator's life, not even one that took over its descriptor number.

    After the creator's process is gone: GM-LIFE-018. After the creator is marked dead: C27.
    """
    directory, number, vcpu = VmDirectory.of(vm), vm.fileno(), vm.create_vcpu()
    with kvm.create_vm(vm.type) as older, kvm.create_vm(vm.type) as spare:
        vm.close()
        assert complaints(kvm, older, gmem) == []  # only a vCPU and the gmem are left
        vcpu.close()
        assert directory.exists
        assert complaints(kvm, older, gmem) == []  # only the gmem is left
        os.dup2(spare.fileno(), number)
        with Vm(number, vm.type, vm.vcpu_mmap_size) as heir:
            assert complaints_about(heir, gmem, "a VM behind the creator's number") == []


@contract("C3")
@requires("debugfs", "no-quarantine")
@makes_gmem()
def test_refusals_leak_nothing(kvm: Kvm, vm: Vm, effort: float) -> None:
    """Refused binds leave nothing behind: neither kernel memory nor references to the gmem file or to either VM."""
    rounds = max(1000, int(10_000 * effort))
    with kvm.create_vm(vm.type) as other, vm.create_guest_memfd(SIZE) as gmem:
        directories = VmDirectory.of(vm), VmDirectory.of(other)
        request = region2(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem))
        assert vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) == OK
        before = meminfo("SUnreclaim")
        answers = {other.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) for _ in range(rounds)}
        assert answers == {Errno.EINVAL}
        # Each refusal has a struct kvm_memory_slot of some 200 bytes in hand; half of that would be seen here.
        wait_until(lambda: meminfo("SUnreclaim") < before + rounds * 100, "kernel memory is back where it was")
    vm.close()
    for directory in directories:
        directory.wait_gone()


@contextlib.contextmanager
def taken(number: int) -> Iterator[None]:
    """A descriptor number is taken: a new VM with the number of one that is still pinned would share its debugfs name."""
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if null != number:
            os.dup2(null, number)
        yield
    finally:
        os.close(null)
        if null != number:
            os.close(number)


def _walk_the_allocator(kvm: Kvm, request: Any, rounds: int, cpu: int, answers: list[Answer]) -> None:
    """Make VMs and let each try the bind, with 0 to 3 older ones alive, all on one CPU."""
    # The allocator hands back the object that this CPU freed last, so creator and closer stay on one.
    os.sched_setaffinity(0, {cpu})
    types = [vm_type for vm_type in kvm.vm_types() if vm_type in PLAIN_TYPES]
    held: list[Vm] = []
    for index in range(rounds):
        other = kvm.create_vm(types[index % len(types)])
        answers.append(other.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request))
        held.append(other)
        while len(held) > index % 4:
            held.pop(0).close()
    for other in held:
        other.close()


@contract("C4", "C30")
@makes_gmem()
@pytest.mark.parametrize("threads", [1, 4])
def test_address_of_the_owner_is_never_reused(kvm: Kvm, vm: Vm, threads: int, effort: float) -> None:
    """A gmem pins the struct kvm that created it, so that no later VM can come to lie at its address and pass for it.

    Whether addresses would come back if it did not is what the power check C4p measures.
    """
    rounds = max(2, int(24 * effort / threads))
    cpus = sorted(cpus_to_run_on())
    with vm.create_guest_memfd(SIZE) as gmem:
        request = region2(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem))
        assert vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request) == OK
        vm.delete_region(0)
        number = vm.fileno()
        vm.close()
        answers: list[Answer] = []
        workers = [
            threading.Thread(target=_walk_the_allocator, args=(kvm, request, rounds, cpus[i % len(cpus)], answers))
            for i in range(threads)
        ]
        with taken(number):
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert len(answers) == rounds * threads > 0
        assert set(answers) == {Errno.EINVAL}


# struct kvm is the first charged allocation by the code of KVM_CREATE_VM, into which kvm_create_vm and kvm_arch_alloc_vm are
# inlined or not (7.3.4: 7360 bytes for kvm_amd; seen so on 6.18 too).
STRUCT_KVM = re.compile(
    r"kmalloc: call_site=(?:kvm_dev_ioctl|kvm_create_vm|kvm_arch_alloc_vm)\S*(?: \[kvm\])? ptr=(\w+) .*accounted=true"
)


ENOUGH = 8
"""VMs that came to lie where a dead one had lain."""


def again(addresses: list[str]) -> int:
    """How many of these had occurred before."""
    return len(addresses) - len(set(addresses))


@contract("C4p")
@requires("trace-events", "text-patching")
@vm_types("default")
def test_addresses_of_dead_vms_come_back(kvm: Kvm, effort: float, record_property: Callable[[str, object], None]) -> None:
    """The power of C4: once a VM is really gone, another one often lies at its address.

    Not always the next one: where many slabs of that size have a place free, these have their turn first.
    The event shows addresses hashed, which is enough to tell whether two are the same. Where struct kvm is not from the
    slab allocator (6.12 takes it from __vmalloc) nothing is seen, and nothing is known about the power of C4.
    """
    os.sched_setaffinity(0, {min(cpus_to_run_on())})
    most = max(64, int(256 * effort))
    addresses: list[str] = []
    with traced("kmem/kmalloc", "bytes_req > 2048") as trace:
        while len(addresses) < most and again(addresses) < ENOUGH:
            trace.write_text("")
            vm = kvm.create_vm()
            found = STRUCT_KVM.search(trace.read_text())
            vm.close()
            if found is None:
                break
            addresses.append(found[1])
    if not addresses:
        pytest.skip("struct kvm is not allocated by kmalloc on this kernel, so its address cannot be seen in kmem/kmalloc")
    assert found is not None, f"the address of VM {len(addresses)} was not seen"
    record_property("struct kvm addresses reused", f"{again(addresses)} of {len(addresses)}")
    assert again(addresses) >= ENOUGH, (
        f"only {again(addresses)} of {len(addresses)} VMs came to lie where another one had lain"
    )
