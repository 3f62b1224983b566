"""What the model remembers. Everything lives as long as some process refers to it, as in the contract."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmgmem.model.steps import ARENA, ARENA_END, MAIN, WINDOW, P


@dataclass(eq=False)
class Vm:
    """A struct kvm."""

    name: str
    type: int
    slots: dict[tuple[int, int], "Slot"] = field(default_factory=dict)
    """By address space and id."""
    private: set[int] = field(default_factory=set)
    """The frames with the PRIVATE attribute."""
    mmio: set[int] = field(default_factory=set)
    """The frames that a guest has met as MMIO: nothing of the contract, but known bugs need it."""
    cpus: int = 0
    """vCPUs made so far; the next one's id."""


@dataclass(eq=False)
class File:
    """A gmem: the file and its inode, which are one until some release makes them two."""

    name: str
    vm: Vm
    size: int
    flags: int
    pages: dict[int, int] = field(default_factory=dict)
    """The allocated pages and the word that each holds."""


@dataclass(eq=False)
class Cpu:
    """A vCPU."""

    name: str
    vm: Vm
    id: int


@dataclass(eq=False)
class Slot:
    """A memory slot; `flags` as given. `gmem` is None for a plain slot, and once the gmem's last reference is gone."""

    gpa: int
    size: int
    hva: int
    flags: int
    gmem: File | None = None
    first: int = 0
    """The first page of the file."""
    gmem_only: bool = False
    """Whether even shared accesses go to the gmem (it was mappable)."""

    @property
    def end(self) -> int:
        return self.gpa + self.size


@dataclass(eq=False)
class Area:
    """A mapping at a window of the arena: of a gmem from page `first`, or anonymous memory with its own words."""

    pages: int
    file: File | None = None
    first: int = 0
    writable: bool = True
    words: dict[int, int] = field(default_factory=dict)


Held = Vm | File | Cpu


@dataclass(eq=False)
class Process:
    """A process: the descriptors it has, by name and by number, and its mappings. `run_pages`: kvm_run of these vCPUs."""

    name: str
    fds: dict[str, Held] = field(default_factory=dict)
    numbers: dict[int, str] = field(default_factory=dict)
    areas: dict[int, Area] = field(default_factory=dict)

    def held(self) -> Iterator[Held]:
        """Whatever it refers to."""
        yield from self.fds.values()
        yield from (area.file for area in self.areas.values() if area.file)


@dataclass
class State:
    """The whole of it."""

    processes: dict[str, Process] = field(default_factory=lambda: {MAIN: Process(MAIN)})
    last_number: dict[str, int] = field(default_factory=dict)
    """The number that each descriptor of the main process has, or had."""
    foreign: set[int] = field(default_factory=set)
    """Numbers that the player itself uses for files that are no gmem."""

    @property
    def main(self) -> Process:
        return self.processes[MAIN]

    def process(self, name: str) -> Process | None:
        """A process that lives."""
        return self.processes.get(name)

    def find(self, name: str, by: str = MAIN) -> Held | None:
        """What a process's descriptor refers to; None if it is not open there."""
        process = self.processes.get(by)
        return process.fds.get(name) if process else None

    def held(self) -> list[Held]:
        """Whatever any process refers to, each once."""
        found = dict.fromkeys(thing for process in self.processes.values() for thing in process.held())
        return list(found)

    def files(self) -> list[File]:
        """The gmems that live."""
        return [thing for thing in self.held() if isinstance(thing, File)]

    def vms(self) -> list[Vm]:
        """The VMs that live: a descriptor, a vCPU or a gmem keeps one."""
        return list(dict.fromkeys(thing if isinstance(thing, Vm) else thing.vm for thing in self.held()))

    def drop_dead_gmems(self, vm: Vm) -> bool:
        """Take the files that nothing refers to any more out of their slots (GM-LIFE-002); whether there were any."""
        alive = self.files()
        dead = [slot for slot in vm.slots.values() if slot.gmem is not None and slot.gmem not in alive]
        for slot in dead:
            slot.gmem = None
        return bool(dead)

    def area_at(self, hva: int) -> tuple[Area, int] | None:
        """The mapping of the main process at an address, and the page of it."""
        if not ARENA <= hva < ARENA_END:
            return None
        window, rest = divmod(hva - ARENA, WINDOW)
        area = self.main.areas.get(window)
        return (area, rest // P) if area and rest // P < area.pages else None
