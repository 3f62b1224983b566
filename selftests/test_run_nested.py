"""GM-RUN: a guest that is a host itself, and keeps what KVM maps for it in gmem."""

import struct
from collections.abc import Iterator

import pytest

from kvmgmem.abi import PAGE_SIZE
from kvmgmem.arch.x86_64 import GuestCpu, Mode
from kvmgmem.exits import SHUTDOWN, Exit, InternalErrorExit
from kvmgmem.memory import Mapping
from kvmgmem.testing import contract, gmem_kinds, requires
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.nested_svm import EXIT_CODE_AT, VMEXIT_VMMCALL, NestedHost, guest_vmcb

NOWHERE = GPA + 4 * SIZE
EMULATION_FAILED = 1


@pytest.fixture
def hosts(running: Running) -> Iterator[Iterator[NestedHost]]:
    """As many vCPUs that can start a guest of their own as a test asks for: one that was shut down is of no more use."""
    made: list[GuestCpu] = []

    def more() -> Iterator[NestedHost]:
        while True:
            made.append(running.machine.cpu(len(made) + 1, Mode.KERNEL))
            yield NestedHost(made[-1])

    yield more()
    for cpu in made:
        cpu.close()


def is_failure(ended: Exit) -> bool:
    """Whether KVM could not map what VMRUN names: it gives up on the guest (7.3) or injects #GP (before): a shutdown."""
    return ended == SHUTDOWN or (isinstance(ended, InternalErrorExit) and ended.suberror == EMULATION_FAILED)


@contract("GM-RUN-043")
@requires("nested-svm")
@gmem_kinds("gM", "gMS")
def test_a_vmcb_in_gmem_alone_cannot_be_used(running: Running, hosts: Iterator[NestedHost]) -> None:
    """KVM maps a VMCB through the slot's host address: in a gmem slot without one it is not to be found, as in no slot.

    The guest itself reaches that memory, and wrote there what works elsewhere.
    """
    vmcb = guest_vmcb(running.machine)
    for at, (word,) in enumerate(struct.iter_unpack("<Q", vmcb)):
        if word:
            running.cpu.store(GPA + 8 * at, word)
    assert running.gmem.allocated_pages() == 1
    host = next(hosts)
    for _ in range(2):
        assert host.exit_code(host.plain_vmcb) == VMEXIT_VMMCALL  # the control
    missing = next(hosts).vmrun(NOWHERE)
    in_gmem = next(hosts).vmrun(GPA)
    assert is_failure(missing.exit), missing
    assert (in_gmem.answer, type(in_gmem.exit)) == (missing.answer, type(missing.exit)), in_gmem
    assert is_failure(in_gmem.exit), in_gmem
    assert running.cpu.load(GPA + EXIT_CODE_AT) == 0


@contract("GM-RUN-043")
@requires("nested-svm")
@gmem_kinds("gM", "gMS")
def test_a_vmcb_is_taken_from_the_host_address(running: Running, hosts: Iterator[NestedHost]) -> None:
    """Where a gmem slot has a host address, the VMCB that KVM maps is the one there, whatever the guest sees in the gmem.

    Only if the address is the gmem's own mapping are both the same.
    """
    vm, gmem, host = running.vm, running.gmem, next(hosts)
    vmcb = guest_vmcb(running.machine)
    vm.delete_region(0)
    with Mapping.anonymous(SIZE) as memory:
        memory.write(0, vmcb)
        vm.set_region(running.region.but(hva=memory.address))
        assert host.exit_code(GPA) == 0  # what the guest reads there after its own guest's exit
        assert memory.load(EXIT_CODE_AT) == VMEXIT_VMMCALL
        assert running.cpu.first_not(0, GPA, PAGE_SIZE // 8, 8) is None
        vm.delete_region(0)
    if "S" in gmem.kind:
        with gmem.map() as mapping:
            mapping.write(0, vmcb)
            vm.set_region(running.region.but(hva=mapping.address))
            assert host.exit_code(GPA) == VMEXIT_VMMCALL
            assert mapping.load(EXIT_CODE_AT) == VMEXIT_VMMCALL
            vm.delete_region(0)
