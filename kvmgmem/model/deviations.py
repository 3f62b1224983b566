"""Known bugs, recognised by what the kernel did where the model says otherwise, and what it takes to go on after one.

A recognised deviation is reported under its bug's number and the sequence goes on, with the model put right where the kernel
went wrong. Only where nobody can say any more what the kernel's state is does the sequence end.
"""

from dataclasses import dataclass

from kvmgmem.abi import MemFlag
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Answer, MemoryFault, Mmio, Plain, Value
from kvmgmem.model.rules import S64, FilePage, Model
from kvmgmem.model.state import Cpu, Slot, Vm
from kvmgmem.model.steps import P, Step


@dataclass(frozen=True)
class Known:
    """A deviation with a name: the bug's id in the catalogue, and how to go on."""

    bug: str
    delete_slot: bool = False
    """The kernel made a slot that it should have refused: take it away."""
    undo: bool = False
    """The access did not reach the gmem: the model's pages are what they were before the step."""
    store_at_hva: bool = False
    """The guest's store went to userspace_addr instead."""
    end: bool = False
    """Nobody knows what the kernel's state is now."""


def recognise(model: Model, step: Step, expected: Answer, got: Answer, *, prefetches: bool) -> Known | None:
    """The known bug that explains why a step answered `got`; None if none does.

    `prefetches`: whether this kernel's MMU maps the neighbours of a faulting page by itself (shadow paging, or no TDP MMU).
    """
    if isinstance(step, do.SetRegion) and got is Plain.OK:
        return _wrongly_accepted(model, step)
    if isinstance(step, do.GuestLoad | do.GuestStore):
        held = model.state.find(step.cpu)
        if isinstance(held, Cpu):
            return wrong_access(model, held.vm, step.gpa, expected, got, prefetches=prefetches)
    return None


def _wrongly_accepted(model: Model, step: do.SetRegion) -> Known | None:
    vm = model.state.find(step.vm)
    if not isinstance(vm, Vm) or step.size == 0:
        return None
    old = vm.slots.get((step.slot >> 16, step.slot & 0xFFFF))
    if old is None and step.flags & MemFlag.GUEST_MEMFD and step.offset < S64 <= step.offset + step.size:
        return Known("B1", delete_slot=True)
    if old is not None and old.flags & MemFlag.GUEST_MEMFD:
        return Known("B3" if step.gpa == old.gpa else "B9", end=True)
    return None


def wrong_access(model: Model, vm: Vm, gpa: int, expected: Answer, got: Answer, *, prefetches: bool) -> Known | None:
    """The known bug behind a guest's access that did not end as it must."""
    slot = model.slot_at(vm, gpa)
    reached = isinstance(expected, Value) or expected is Plain.DONE
    if (
        gpa // P in vm.mmio
        and gpa // P in vm.private
        and got in (Mmio(gpa, False), Mmio(gpa, True), MemoryFault(gpa, False))
    ):
        return Known("B25", undo=reached)
    if reached and isinstance(got, Mmio) and gpa // P in vm.mmio:
        return Known("B19", undo=True)
    if prefetches and slot and slot.gmem_only and isinstance(got, Value) and got == _at_hva(model, slot, gpa):
        return Known("B24", undo=True)
    return None


def went_to_hva(model: Model, step: do.GuestStore, word_there: int | None) -> Known | None:
    """Whether a guest's store to gmem is to be found at the slot's userspace_addr instead (B24)."""
    held = model.state.find(step.cpu)
    slot = model.slot_at(held.vm, step.gpa) if isinstance(held, Cpu) else None
    if slot and slot.gmem_only and word_there == step.value and _at_hva(model, slot, step.gpa) != Value(step.value):
        return Known("B24", undo=True, store_at_hva=True)
    return None


def _at_hva(model: Model, slot: Slot, gpa: int) -> Value | None:
    """What the host has at the userspace_addr of a guest's page, if it has something there already."""
    place = model.behind_hva(slot, gpa, write=False)
    if place is None or (isinstance(place, FilePage) and place.index not in place.file.pages):
        return None
    return place.load()
