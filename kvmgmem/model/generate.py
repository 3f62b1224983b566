"""Sequences of steps: mostly sensible ones that get in each other's way, with a wrong or extreme field here and there.

A sequence is made on the model alone, before any of it is played: the same choices give the same sequence on every kernel
with the same traits. Worlds are kept small (few slots, few pages), because bugs live where things meet.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from kvmgmem.abi import Attribute, GmemFlag, MemFlag
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Plain
from kvmgmem.model.rules import KEEP_SIZE, MAX_PAGES, PUNCH_HOLE, S64, SLOT_IDS, SUPPORT_SLOT, U64, Model, new_name
from kvmgmem.model.state import Cpu, File, Slot, Vm
from kvmgmem.model.steps import ARENA, MAIN, WINDOW, WINDOWS, P, Step, changed
from kvmgmem.model.traits import KernelTraits

GPA = 1 << 30
"""Around here the guest memory lies."""
PLAYGROUND = 24
"""Pages of guest addresses that slots are put on."""
FIRST_NUMBER = 64
"""The first descriptor number that the generator pretends to see."""
LARGE = 64 * P
"""What must not be allocated, or walked page by page, by a single step."""
SHARED = int(GmemFlag.MMAP | GmemFlag.INIT_SHARED)
KINDS = (SHARED, SHARED, int(GmemFlag.MMAP), 0, int(GmemFlag.INIT_SHARED))
VMS, FILES, CPUS, CHILDREN = 3, 4, 3, 2
"""How many of each live at once at most."""

T = TypeVar("T")


class Choices(Protocol):
    """Where the choices come from: a seeded random generator, or a search that also shrinks."""

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1; smaller is simpler."""

    def more(self) -> bool:
        """Whether the sequence goes on."""


class Seeded:
    """Choices by seed."""

    def __init__(self, seed: int, length: int) -> None:
        self._random = random.Random(seed)
        self._left = self._random.randint(max(1, length // 3), length)

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        return self._random.randrange(limit)

    def more(self) -> bool:
        """Whether the sequence goes on."""
        self._left -= 1
        return self._left >= 0


def generate(choices: Choices, traits: KernelTraits) -> list[Step]:
    """One sequence."""
    return Generator(choices, traits).run()


def seeded(seed: int, traits: KernelTraits, length: int = 50) -> list[Step]:
    """The sequence of a seed, with at most `length` steps after its first few."""
    return generate(Seeded(seed, length), traits)


class Generator:
    """Makes one sequence."""

    def __init__(self, choices: Choices, traits: KernelTraits) -> None:
        self._choices = choices
        self._traits = traits
        self._model = Model(traits)
        self._steps: list[Step] = []
        self._names = 0
        self._stamp = 0x1000
        self._recent: list[int] = []
        self._makers: list[tuple[int, Callable[[], Step | None]]] = [
            (14, self._load),
            (10, self._store),
            (16, self._region),
            (4, self._change_region),
            (3, self._delete),
            (9, self._punch_or_allocate),
            (3, self._odd_fallocate),
            (5, self._host_store),
            (4, self._host_load),
            (4, self._map),
            (3, self._map_memory),
            (2, self._unmap),
            (3, self._remove),
            (4, self._create_gmem),
            (2, self._create_vm),
            (2, self._create_cpu),
            (3, self._close),
            (2, self._dup),
            (2, self._fork),
            (3, self._send),
            (2, self._kill),
            (1, self._close_cpu),
            (8, self._attributes),
            (4, self._prefault),
            (3, self._look),
        ]
        self._deck = [maker for weight, maker in self._makers for _ in range(weight)]

    def run(self) -> list[Step]:
        """The whole sequence."""
        for maker in (self._create_vm, self._create_gmem, self._create_cpu, self._map_memory, self._good_bind):
            self._take(maker())
        if self._one_in(3):
            self._take(self._create_vm())
            self._take(self._create_gmem())
        while self._choices.more():
            self._take(self._pick(self._deck)())
        return self._steps

    def _take(self, step: Step | None) -> None:
        if step is None:
            return
        if isinstance(step, do.Look):
            self._steps.append(step)
            return
        self._note_ends(step)
        answer = self._model.perform(step)
        if answer is Plain.SKIPPED:
            return
        if (answer is Plain.NEW or isinstance(step, do.CreateCpu)) and (name := new_name(step)):
            numbers = self._model.state.main.numbers
            self._model.numbered(name, next(n for n in range(FIRST_NUMBER, 1 << 20) if n not in numbers))
        self._steps.append(step)

    def _note_ends(self, step: Step) -> None:
        """Where a range begins and ends it goes wrong most easily: guests will touch its first and last page."""
        ends: list[int] = []
        if isinstance(step, do.SetAttributes):
            ends = [step.gpa, step.gpa + step.size - P]
        held = self._model.state.find(step.fd, step.by) if isinstance(step, do.Fallocate) else None
        if isinstance(step, do.Fallocate) and isinstance(held, File):
            pages = (step.offset // P, (step.offset + step.length) // P - 1)
            slots = [slot for at, slot in held.vm.slots.items() if slot.gmem is held and at[0] == 0]
            ends = [
                slot.gpa + (page - slot.first) * P
                for slot in slots
                for page in pages
                if slot.first <= page < slot.first + slot.size // P
            ]
        self._recent = [*(gpa for gpa in ends if gpa % P == 0 and gpa < 1 << 32), *self._recent][:6]

    # -- choosing

    def _below(self, limit: int) -> int:
        return self._choices.below(limit)

    def _pick(self, things: Sequence[T]) -> T:
        return things[self._below(len(things))]

    def _one_in(self, number: int) -> bool:
        return self._below(number) == number - 1

    def _name(self, letter: str) -> str:
        self._names += 1
        return f"{letter}{self._names}"

    def _word(self) -> int:
        self._stamp += 0x100
        return self._stamp

    def _fds(self, kind: type[T], by: str = MAIN) -> list[tuple[str, T]]:
        process = self._model.state.process(by)
        return [(name, held) for name, held in process.fds.items() if isinstance(held, kind)] if process else []

    def _someone(self) -> str:
        """Mostly the main process, now and then a child."""
        others = [name for name in self._model.state.processes if name != MAIN]
        return self._pick(others) if others and self._one_in(3) else MAIN

    # -- VMs, files, vCPUs

    def _create_vm(self) -> Step | None:
        if len(self._model.state.vms()) >= VMS:
            return None
        vm_type = self._pick([*self._traits.vm_types, 6, 1 << 32]) if self._one_in(8) else self._pick(self._traits.vm_types)
        return do.CreateVm(self._name("v"), vm_type)

    def _create_gmem(self) -> Step | None:
        by = self._someone() if self._one_in(3) else MAIN
        vms = self._fds(Vm, by)
        if not vms or len(self._model.state.files()) >= FILES:
            return None
        name, vm = self._pick(vms)
        offered = self._traits.gmem_flags[vm.type]
        flags = self._pick([flags for flags in KINDS if not flags & ~offered])
        size = self._pick((8, 4, 16, 2, 1)) * P
        if self._one_in(8):
            size = self._pick((S64 - P, 0, 1, P - 1, P + 1, S64, S64 + P, U64 - P))
        if self._one_in(12):
            flags = self._pick((4, 2, 3, 1 << 31, 1 << 32, 1 << 63))
        return do.CreateGmem(self._name("f"), name, size, flags, by)

    def _create_cpu(self) -> Step | None:
        vms, cpus = self._fds(Vm), self._fds(Cpu)
        return do.CreateCpu(self._name("c"), self._pick(vms)[0]) if vms and len(cpus) < CPUS else None

    # -- slots

    def _region(self) -> Step | None:
        """A new slot: a good request, of which one field in three requests is something else."""
        by = self._someone() if self._one_in(3) else MAIN
        vms = self._fds(Vm, by)
        if not vms:
            return None
        name, vm = self._pick(vms)
        foreign = self._one_in(8)
        files = [(fd, file) for fd, file in self._fds(File) if (file.vm is vm) is not foreign]
        if not files or self._one_in(4):
            step = self._plain(name, vm)
        else:
            fd, file = self._pick(files)
            step = self._bind(name, vm, fd, file)
        step = changed(step, by=by)
        while self._one_in(3):
            step = self._spoil(step, vm)
        return step

    def _good_bind(self) -> Step | None:
        """What most sequences begin with."""
        vms, found = self._fds(Vm), self._file(MAIN)
        return self._bind(*vms[0], *found) if vms and found else None

    def _plain(self, name: str, vm: Vm) -> do.SetRegion:
        flags = self._pick((0, 0, 0, int(MemFlag.LOG_DIRTY), int(MemFlag.READONLY)))
        size = (1 + self._below(4)) * P
        version = 1 + self._below(2)
        return do.SetRegion(name, self._slot(vm), self._room(vm, size), size, flags, self._hva(), version=version)

    def _bind(self, name: str, vm: Vm, fd: str, file: File) -> do.SetRegion:
        pages = min(file.size // P, 16)
        first = self._below(pages) if self._one_in(2) else 0
        size = (pages - first if self._one_in(2) else 1 + self._below(pages - first)) * P
        flags = int(MemFlag.GUEST_MEMFD)
        return do.SetRegion(name, self._slot(vm), self._room(vm, size), size, flags, self._hva(), fd, first * P)

    def _slot(self, vm: Vm) -> int:
        """A slot's id and address space; mostly one that is free."""
        space = 1 if self._one_in(8) else 0
        free = [number for number in range(6) if (space, number) not in vm.slots]
        return space << 16 | (self._below(4) if self._one_in(4) else free[0] if free else 5)

    def _gpa(self) -> int:
        """A page of the playground; every second time one that is aligned, as slots of a VMM are."""
        return GPA + (self._below(PLAYGROUND // 8) * 8 if self._one_in(2) else self._below(PLAYGROUND)) * P

    def _room(self, vm: Vm, size: int) -> int:
        """Guest addresses for a new slot; mostly such that no slot lies there."""
        gpa = self._gpa()
        taken = [slot for at, slot in vm.slots.items() if at[1] != SUPPORT_SLOT]
        for _ in range(0 if self._one_in(4) else 3):
            if any(slot.gpa < gpa + size and gpa < slot.end for slot in taken):
                gpa = self._gpa()
        return gpa

    def _hva(self) -> int:
        areas = self._model.state.main.areas
        if not areas or not self._one_in(2):
            return 0
        window = self._pick(sorted(areas))
        return ARENA + window * WINDOW + (self._below(4) * P if self._one_in(3) else 0)

    def _spoil(self, step: do.SetRegion, vm: Vm) -> do.SetRegion:
        """The request with one field at a boundary, one past it, at an end of the range, or of the wrong kind."""
        gmem = bool(step.flags & MemFlag.GUEST_MEMFD)
        of_gmem = ("offset", "offset", "fd", "fd") if gmem else ()
        field = self._pick((*of_gmem, "gpa", "size", "hva", "slot", "flags", "version"))
        return changed(step, **{field: self._pick(self._odd_values(field, step, vm))})

    def _odd_values(self, field: str, step: do.SetRegion, vm: Vm) -> Sequence[int | str]:
        size, gmem = step.size, self._model.state.find(str(step.fd))
        length = gmem.size if isinstance(gmem, File) else 8 * P
        low, high = self._traits.gpa_limit, self._traits.hva_limit
        if field == "offset":
            past = (length - size, length - size + P, length, length + P)
            far = (S64 - P, S64 - size, S64, S64 - 2 * P, U64 - P, U64 - size, U64 - size - P)
            return [value % U64 for value in (0, P, *past, *far, 1, P - 1, P + 1)]
        if field == "fd":
            state = self._model.state
            closed = [name for name in state.last_number if name not in state.main.fds]
            return [-1, *closed, *(fd for fd, _ in self._fds(File)), *(fd for fd, _ in self._fds(Vm)), (1 << 31) - 1]
        if field == "gpa":
            ends = (low - size, low - size + P, low - P, low, S64, U64 - P, U64 - size, U64 - size - P)
            return [value % U64 for value in (0, *ends, step.gpa + 1, step.gpa + P - 1)]
        if field == "size":
            return (0, size + P, length + P, 1, P - 1, P + 1, (MAX_PAGES + 1) * P, S64, U64 - P)
        if field == "hva":
            return [value % U64 for value in (high - size, high - size + P, high - P, high, 1, P - 1, S64, U64 - P)]
        if field == "slot":
            return (SLOT_IDS - 1, SLOT_IDS, 0xFFFF, 0x10000, 0x20000, 0x7FFF_0000, 0xFFFF_FFFF)
        if field == "flags":
            return (*(1 << bit for bit in range(32)), 5, 6, 7)
        return (1, 2)

    def _slots(self, vm: Vm) -> list[tuple[tuple[int, int], Slot]]:
        return [(at, slot) for at, slot in vm.slots.items() if at[1] != SUPPORT_SLOT]

    def _change_region(self) -> Step | None:
        """A slot that exists, set again: as it is, moved, with other flags, and with any other field changed."""
        found = [(name, at, slot) for name, vm in self._fds(Vm) for at, slot in self._slots(vm)]
        if not found:
            return None
        name, (space, number), slot = self._pick(found)
        files = [fd for fd, file in self._fds(File) if file is slot.gmem]
        fd: str | int = self._pick(files) if files else -1
        step = do.SetRegion(name, space << 16 | number, slot.gpa, slot.size, slot.flags, slot.hva, fd, slot.first * P, 2)
        change = self._below(6)
        if change == 0:
            return changed(step, gpa=self._gpa())
        if change == 1:
            return changed(step, flags=slot.flags ^ self._pick((1, 4, 2)))
        if change == 2:
            return changed(step, version=1)
        if change == 3:
            return step
        vm = self._model.state.find(name)
        return self._spoil(step, vm) if isinstance(vm, Vm) else step

    def _delete(self) -> Step | None:
        found = [(name, at) for name, vm in self._fds(Vm) for at, _ in self._slots(vm)]
        if not found:
            return None
        name, (space, number) = self._pick(found)
        step = do.SetRegion(name, space << 16 | number, 0, 0, version=1 + self._below(2))
        if self._one_in(6):
            step = changed(step, slot=self._below(4), gpa=self._pick((0, U64 - P, 1)), hva=self._pick((0, 1)))
        return step

    # -- pages

    def _guest_page(self, vm: Vm) -> int:
        """A page for a guest to touch: of a slot, one that was touched before, or any nearby."""
        if self._recent and self._one_in(2):
            return self._pick(self._recent)
        pages = [
            gpa
            for (space, number), slot in vm.slots.items()
            if space == 0 and number != SUPPORT_SLOT and slot.end <= 1 << 32
            for gpa in range(slot.gpa, min(slot.end, slot.gpa + 16 * P), P)
        ]
        return self._gpa() if not pages or self._one_in(10) else self._pick(pages)

    def _touch(self) -> tuple[str, int] | None:
        cpus = self._fds(Cpu)
        if not cpus:
            return None
        name, cpu = self._pick(cpus)
        gpa = self._guest_page(cpu.vm)
        self._recent = [gpa, *self._recent][:6]
        return name, gpa

    def _load(self) -> Step | None:
        found = self._touch()
        return do.GuestLoad(*found) if found else None

    def _store(self) -> Step | None:
        found = self._touch()
        return do.GuestStore(*found, self._word()) if found else None

    def _file(self, by: str) -> tuple[str, File] | None:
        """A gmem of a process; mostly one that is bound, if there is one."""
        files = self._fds(File, by)
        bound = [(fd, file) for fd, file in files if any(slot.gmem is file for slot in file.vm.slots.values())]
        found = bound if bound and not self._one_in(4) else files
        return self._pick(found) if found else None

    def _punch_or_allocate(self) -> Step | None:
        by = self._someone()
        found = self._file(by)
        if not found:
            return None
        fd, file = found
        pages = min(file.size // P, 16)
        first = self._below(pages)
        length = 1 + self._below(pages - first)
        if self._one_in(4):
            first, length = 0, pages
        mode = KEEP_SIZE if self._one_in(3) else KEEP_SIZE | PUNCH_HOLE
        return do.Fallocate(fd, mode, first * P, length * P, by)

    def _odd_fallocate(self) -> Step | None:
        by = self._someone()
        found = self._file(by)
        if not found:
            return None
        fd, file = found
        mode = self._pick((3, 1, 3, 1, 0, 2, 0x10, 0x40, 8, 4, 1 << 30))
        offset = self._pick((0, P, file.size - P, file.size, file.size + P, 1, P - 1, S64 - P, S64, U64 - P))
        length = self._pick((P, 2 * P, file.size, file.size + P, 0, 1, P - 1, S64 - P, S64 - 1, S64, U64 - P))
        allocates = mode == KEEP_SIZE and offset + length <= file.size
        return do.Fallocate(fd, mode, offset, P if allocates and length > LARGE else length, by)

    def _free_window(self, by: str) -> int | None:
        process = self._model.state.process(by)
        free = [window for window in range(WINDOWS) if process and window not in process.areas]
        return free[0] if free else None

    def _map(self) -> Step | None:
        by = self._someone()
        found, window = self._file(by), self._free_window(by)
        if not found or window is None:
            return None
        fd, file = found
        step = do.MapFile(fd, window, min(file.size // P, 16), by=by)
        if self._one_in(4):
            offset = self._pick((P, file.size - P, file.size, S64 - P, S64 - 16 * P, U64 - P, 1))
            step = changed(step, offset=offset, pages=self._pick((1, 16, 4)))
        if self._one_in(8):
            step = changed(step, shared=self._one_in(2), executable=self._one_in(2))
        if self._one_in(6):
            step = changed(step, writable=False)
        return step

    def _map_memory(self) -> Step | None:
        window = self._free_window(MAIN)
        return None if window is None else do.MapMemory(window, self._pick((8, 16, 2)), 0xA000 + 0x100 * window)

    def _window(self, by: str, *, of_file: bool = False) -> tuple[int, int] | None:
        process = self._model.state.process(by)
        windows = [window for window, area in process.areas.items() if area.file or not of_file] if process else []
        if not process or not windows:
            return None
        window = self._pick(sorted(windows))
        return window, process.areas[window].pages

    def _unmap(self) -> Step | None:
        by = self._someone()
        found = self._window(by)
        return do.Unmap(found[0], by) if found else None

    def _remove(self) -> Step | None:
        by = self._someone()
        found = self._window(by, of_file=True)
        if not found:
            return None
        page = self._below(found[1])
        return do.Remove(found[0], page, 1 + self._below(found[1] - page), by)

    def _host_load(self) -> Step | None:
        by = self._someone()
        found = self._window(by)
        return do.HostLoad(found[0], self._below(found[1]), by) if found else None

    def _host_store(self) -> Step | None:
        by = self._someone()
        found = self._window(by)
        return do.HostStore(found[0], self._below(found[1]), self._word(), by) if found else None

    # -- attributes, prefault

    def _attributes(self) -> Step | None:
        by = self._someone() if self._one_in(8) else MAIN
        vms = self._fds(Vm, by)
        # One VM in four without attributes: there is little to see.
        vms = [(name, vm) for name, vm in vms if self._traits.attributes[vm.type] or self._one_in(4)]
        if not vms:
            return None
        name, vm = self._pick(vms)
        private = self._pick((int(Attribute.PRIVATE), 0))
        slots = [slot for at, slot in self._slots(vm) if slot.end <= 1 << 32]
        if slots and self._one_in(2):
            slot = self._pick(slots)
            gpa, size = slot.gpa, min(slot.size, 16 * P)
        else:
            gpa, size = self._guest_page(vm), (1 + self._below(8)) * P
        step = do.SetAttributes(name, gpa, size, private, by=by)
        if not self._one_in(5):
            return step
        odd = {
            "gpa": (0, 1, P - 1, U64 - 2 * P, U64 - P, S64),
            "size": (0, 1, P + 1, U64 - P, S64),
            "attributes": (1, 2, 4, 16, 1 << 63, 9),
            "flags": (1, 1 << 63),
        }
        field = self._pick(tuple(odd))
        step = changed(step, **{field: self._pick(odd[field])})
        walks = step.size > LARGE and step.gpa + step.size < U64
        return changed(step, size=P) if walks else step

    def _prefault(self) -> Step | None:
        if not self._traits.prefault and not self._one_in(6):
            return None
        cpus = self._fds(Cpu)
        if not cpus:
            return None
        name, cpu = self._pick(cpus)
        step = do.Prefault(name, self._guest_page(cpu.vm), (1 + self._below(8)) * P)
        if self._one_in(6):
            odd = {"gpa": (1, U64 - P, 0), "size": (0, 1, U64 - P), "flags": (1, 1 << 63)}
            field = self._pick(tuple(odd))
            step = changed(step, **{field: self._pick(odd[field])})
        return step

    # -- descriptors and processes

    def _close(self) -> Step | None:
        by = self._someone()
        fds = [*self._fds(File, by), *self._fds(File, by), *self._fds(Vm, by)]
        return do.Close(self._pick(fds)[0], by) if fds else None

    def _close_cpu(self) -> Step | None:
        cpus = self._fds(Cpu)
        return do.CloseCpu(self._pick(cpus)[0]) if cpus else None

    def _dup(self) -> Step | None:
        by = self._someone()
        fds = [*self._fds(File, by), *self._fds(Vm, by)]
        return do.Dup(self._name("d"), self._pick(fds)[0], by) if fds else None

    def _fork(self) -> Step | None:
        children = len(self._model.state.processes) - 1
        return do.Fork(self._name("p")) if children < CHILDREN else None

    def _send(self) -> Step | None:
        children = [name for name in self._model.state.processes if name != MAIN]
        fds = [*self._fds(File), *self._fds(Vm)]
        return do.Send(self._name("d"), self._pick(fds)[0], self._pick(children)) if fds and children else None

    def _kill(self) -> Step | None:
        children = [name for name in self._model.state.processes if name != MAIN]
        return do.Kill(self._pick(children)) if children else None

    def _look(self) -> Step | None:
        return do.Look()
