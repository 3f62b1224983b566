"""One sequence, played on the model and on the kernel at once; after every step all that can be seen must agree."""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmgmem import entry
from kvmgmem.abi import GmemFlag
from kvmgmem.kvm import Kvm
from kvmgmem.model import deviations
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Answer, Plain, Value, sort_of
from kvmgmem.model.deviations import Known
from kvmgmem.model.rules import SUPPORT_SLOT, Model, new_name
from kvmgmem.model.state import Area, Cpu, File, Vm
from kvmgmem.model.steps import MAIN, P, Step
from kvmgmem.model.traits import KernelTraits
from kvmgmem.model.world import World, is_open
from kvmgmem.testing.waiting import TIME_SCALE
from kvmgmem.trace.finding import told

Journal = Callable[[int, Step], None]
"""Called with each step and its number before the step is made."""

GONE_LIMIT = 2.0
"""Seconds that a VM may take to be gone, scaled under emulation."""
WARM_PAGES = 4
"""Pages that a guest has touched, which it reads again after each step that could change them."""

CHANGING = (
    do.SetRegion,
    do.Fallocate,
    do.Remove,
    do.Unmap,
    do.Close,
    do.Kill,
    do.SetAttributes,
    do.HostStore,
    do.GuestStore,
)


@dataclass(frozen=True)
class Finding:
    """Where the kernel and the model disagree. `what` was compared: the step's answer, or something seen after it."""

    at: int
    step: Step
    what: str
    expected: str
    got: str
    sort: str
    """What findings of one bug have in common: what was compared after which step, and the sorts of both answers."""
    bug: str = ""
    """The known bug that explains it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.got}, wanted {self.expected}" + (f" ({self.bug})" if self.bug else "")


@dataclass
class Played:
    """How a sequence went: each step's number with its answer, known bugs met on the way, and what ended it if anything."""

    steps: Sequence[Step]
    answers: dict[int, Answer] = field(default_factory=dict)
    known: list[Finding] = field(default_factory=list)
    finding: Finding | None = None
    rows: set[str] = field(default_factory=set)
    """The rows of the contract that decided an answer."""

    def lines(self, finding: Finding | None = None) -> list[str]:
        """The sequence as people read it, up to the finding."""
        finding = finding or self.finding
        last = finding.at if finding else len(self.steps)
        shown = [(at, step) for at, step in enumerate(self.steps) if at <= last and at in self.answers]
        lines = [f"{count:3}. {step}  -> {self.answers[at]}" for count, (at, step) in enumerate(shown, 1)]
        return [*lines, f"     {finding}"] if finding else lines


class DisagreementError(Exception):
    """Ends a sequence: what came next would only be a consequence."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def play(
    steps: Sequence[Step],
    traits: KernelTraits,
    *,
    journal: Journal | None = None,
    prefetches: bool | None = None,
    patience: float = 1.0,
) -> Played:
    """Play a sequence from nothing to the end, when everything is closed. Raises `HarnessError` if it cannot.

    `patience` is how much of GONE_LIMIT a VM has.
    """
    with Kvm.open() as kvm, World(kvm) as world:
        player = Player(steps, Model(traits), world, journal, _prefetches() if prefetches is None else prefetches)
        player.gone_limit = patience * GONE_LIMIT * TIME_SCALE
        return player.run()


class Player:
    """Plays one sequence."""

    def __init__(self, steps: Sequence[Step], model: Model, world: World, journal: Journal | None, prefetches: bool) -> None:
        self.model = model
        self.world = world
        self.played = Played(steps)
        self.gone_limit = GONE_LIMIT * TIME_SCALE
        self._journal = journal
        self._prefetches = prefetches
        self._warm: dict[str, list[int]] = {}
        self._at = 0
        self._step: Step = do.Look()
        self._before: list[tuple[dict[int, int], dict[int, int]]] = []

    def run(self) -> Played:
        """Play it to its end, or to the first disagreement that no known bug explains."""
        try:
            for at, step in enumerate(self.played.steps):
                self._at, self._step = at, step
                self._play(step)
            self._at, self._step = len(self.played.steps), do.Look()
            self._look()
            self._let_go()
        except DisagreementError as end:
            self.played.finding = None if end.finding.bug else end.finding
        self.played.rows = self.model.rows
        return self.played

    def _play(self, step: Step) -> None:
        if isinstance(step, do.Look):
            self.played.answers[self._at] = Plain.DONE
            self._look()
            return
        number = self._number_for(step)
        self._remember_pages(step)
        expected = self.model.perform(step)
        if expected is Plain.SKIPPED:
            return
        if self._journal:
            self._journal(self._at, step)
        got = self.world.perform(step, number)
        self.played.answers[self._at] = got
        if expected is Plain.NEW and (name := new_name(step)) and got is expected:
            self.model.numbered(name, self.world.number_of(name))
        if isinstance(step, do.CreateCpu) and got is Plain.DONE:
            self.model.numbered(step.name, self.world.number_of(step.name))
        if got != expected:
            known = deviations.recognise(self.model, step, expected, got, prefetches=self._prefetches)
            self._disagree("answer", expected, got, known)
        elif isinstance(step, do.GuestStore) and got is Plain.DONE and (known := self._stray_store(step)):
            self._disagree("where the store went", "the gmem", "userspace_addr", known)
        self._check()
        if isinstance(step, do.GuestLoad | do.GuestStore) and (isinstance(got, Value) or got is Plain.DONE):
            warm = self._warm.setdefault(step.cpu, [])
            self._warm[step.cpu] = [step.gpa, *(gpa for gpa in warm if gpa != step.gpa)][:WARM_PAGES]

    def _number_for(self, step: Step) -> int:
        """The number that a request's descriptor field is to hold; the model is told of files that are the player's own."""
        if not isinstance(step, do.SetRegion):
            return 0
        number = self.model.number_of(step.fd)
        state = self.model.state
        state.foreign = {number} if number not in state.main.numbers and number >= 0 and is_open(number) else set()
        return number

    def _remember_pages(self, step: Step) -> None:
        if isinstance(step, do.GuestLoad | do.GuestStore):
            self._before = [(file.pages, dict(file.pages)) for file in self.model.state.files()]

    # -- disagreements

    def _disagree(self, what: str, expected: object, got: object, known: Known | None) -> None:
        """Note a deviation that is known, and put the model right; raises `DisagreementError` if not, or if it ends it."""
        if not isinstance(expected, str):  # words stand for what other calls than the step's own have told
            by = getattr(self._step, "by", MAIN) if what == "answer" else MAIN
            self._tell(got, expected, known.bug if known else "", by)
        sort = f"{type(self._step).__name__}: {_plain(what)}"
        if not isinstance(expected, str):
            sort += f": {sort_of(expected)}, not {sort_of(got)}"
        finding = Finding(self._at, self._step, what, str(expected), str(got), sort, known.bug if known else "")
        if known is None:
            raise DisagreementError(finding)
        self.played.known.append(finding)
        if known.end:
            raise DisagreementError(finding)
        self._repair(known)

    def _tell(self, got: object, expected: object, bug: str = "", by: str = MAIN) -> None:
        """Have a recording say what was wanted of the kernel where it answered `got`, to a process of the sequence."""
        if entry.watcher is not None:
            entry.watcher.expect(told(got), told(expected), bug=bug, peer=self.world.pid_of(by))

    def _repair(self, known: Known) -> None:
        step = self._step
        if known.delete_slot and isinstance(step, do.SetRegion):
            answer = self.world.delete_region(step.vm, step.slot)
            if answer is not Plain.OK:
                self._disagree("deleting the slot that was let in", Plain.OK, answer, None)
        if known.undo:
            for pages, before in self._before:
                pages.clear()
                pages.update(before)
        if known.store_at_hva and isinstance(step, do.GuestStore):
            held = self.model.state.find(step.cpu)
            slot = self.model.slot_at(held.vm, step.gpa) if isinstance(held, Cpu) else None
            place = self.model.behind_hva(slot, step.gpa, write=True) if slot else None
            if place:
                place.store(step.value)

    def _stray_store(self, step: do.GuestStore) -> Known | None:
        """Whether what a guest stored into a gmem is to be found at its slot's userspace_addr."""
        if not self._prefetches:
            return None
        held = self.model.state.find(step.cpu)
        slot = self.model.slot_at(held.vm, step.gpa) if isinstance(held, Cpu) else None
        found = self.model.state.area_at(slot.hva + step.gpa - slot.gpa) if slot and slot.gmem_only else None
        return deviations.went_to_hva(self.model, step, self._word_of(*found)) if found else None

    def _word_of(self, area: Area, page: int) -> int | None:
        """What the host sees on a page, if looking at it changes nothing."""
        window = next(window for window, other in self.model.state.main.areas.items() if other is area)
        if area.file and (not area.file.flags & GmemFlag.INIT_SHARED or area.first + page not in area.file.pages):
            return None
        word = self.world.host_word(window, page)
        return word if isinstance(word, int) else None

    # -- what can be seen without changing anything

    def _check(self) -> None:
        self._check_allocated()
        self._check_lifetimes()
        if isinstance(self._step, CHANGING):
            self._check_host()
            self._check_guests()

    def _check_allocated(self) -> None:
        seen: set[File] = set()
        for name, held in self.model.state.main.fds.items():
            if not isinstance(held, File) or held in seen:
                continue
            seen.add(held)
            found = self.world.allocated(name)
            if found not in (len(held.pages), -1):
                self._tell(found, len(held.pages))
                self._disagree(f"allocated pages of {name}", *self._which_pages(name, held, found), None)

    def _which_pages(self, name: str, file: File, found: int) -> tuple[str, str]:
        first, last = 0, min(file.size // P, 64)
        there = [page for page in range(first, last) if self.world.allocated(name, page, 1)]
        return f"{sorted(file.pages)}", f"{there}" + (f" of {found}" if found != len(there) else "")

    def _check_lifetimes(self) -> None:
        alive = {vm.name for vm in self.model.state.vms()}
        for vm in list(self.world.directories):
            if vm in alive and not self.world.lives(vm):
                self._tell_life(vm, alive=False)
                self._disagree(f"lifetime of {vm}", "alive", "gone", None)
            elif vm not in alive:
                self._await_end(vm)

    def _await_end(self, vm: str) -> None:
        deadline = time.monotonic() + self.gone_limit
        while self.world.lives(vm):
            if time.monotonic() > deadline:
                self._tell_life(vm, alive=True)
                self._disagree(f"lifetime of {vm}", "gone", "alive", None)
            time.sleep(0.001)
        self.world.forget(vm)

    def _tell_life(self, vm: str, alive: bool) -> None:
        """Have a recording say what was seen of a VM that should have ended, or that should not have."""
        if entry.watcher is not None:
            entry.watcher.lives(self.world.directories[vm], alive)
            entry.watcher.should_live(self.world.directories[vm], not alive)

    def _check_host(self) -> None:
        for window, area in self.model.state.main.areas.items():
            words = area.words if area.file is None else self._visible(area)
            for page, word in words.items():
                found = self.world.host_word(window, page)
                if found != word:
                    self._disagree(f"host's window {window} page {page}", Value(word), _seen(found), None)

    @staticmethod
    def _visible(area: Area) -> dict[int, int]:
        file = area.file
        if file is None or not file.flags & GmemFlag.INIT_SHARED:
            return {}
        pages = range(area.first, area.first + area.pages)
        return {page - area.first: file.pages[page] for page in pages if page in file.pages}

    def _check_guests(self) -> None:
        """Have the vCPUs read again what they have touched: a mapping that should be gone shows at once."""
        for cpu, pages in self._warm.items():
            held = self.model.state.find(cpu)
            if isinstance(held, Cpu):
                for gpa in pages:
                    self._read_as_step(do.GuestLoad(cpu, gpa), cpu, held.vm, gpa)

    # -- a look at everything

    def _look(self) -> None:
        for cpu, held in list(self.model.state.main.fds.items()):
            if isinstance(held, Cpu):
                for gpa in guest_pages(held.vm):
                    self._read_as_step(do.GuestLoad(cpu, gpa), cpu, held.vm, gpa)
        for window, area in list(self.model.state.main.areas.items()):
            for page in range(area.pages):
                step = do.HostLoad(window, page)
                expected, got = self.model.perform(step), self.world.perform(step)
                if got != expected:
                    self._disagree(f"host's window {window} page {page}", expected, got, None)
        self._check_allocated()
        self._check_host()

    def _read_as_step(self, step: do.GuestLoad, cpu: str, vm: Vm, gpa: int) -> None:
        self._remember_pages(step)
        expected, got = self.model.perform(step), self.world.perform(step)
        if got != expected:
            known = deviations.wrong_access(self.model, vm, gpa, expected, got, prefetches=self._prefetches)
            self._disagree(f"what {cpu} reads at {gpa:#x}", expected, got, known)

    def _let_go(self) -> None:
        """Close everything in the order it was made; every VM must then be gone."""
        state = self.model.state
        closing: list[Step] = [do.Kill(name) for name in state.processes if name != MAIN]
        closing += [do.CloseCpu(n) if isinstance(held, Cpu) else do.Close(n) for n, held in state.main.fds.items()]
        closing += [do.Unmap(window) for window in state.main.areas]
        for step in closing:
            self._step = step
            self.model.perform(step)
            self.world.perform(step)
            self._check_lifetimes()


def guest_pages(vm: Vm) -> list[int]:
    """The pages of a VM's slots that a look takes in: those a guest reaches, a few of each slot."""
    found: list[int] = []
    for (space, number), slot in vm.slots.items():
        if space == 0 and number != SUPPORT_SLOT and slot.end <= 1 << 32:
            found += range(slot.gpa, min(slot.end, slot.gpa + 16 * P), P)
    return found


def _plain(what: str) -> str:
    """What was compared, without names and numbers."""
    return re.sub(r" ?\b(0x[0-9a-f]+|[a-z]?\d+)\b", "", what)


def _seen(found: Any) -> object:
    return Value(found) if isinstance(found, int) else found


def _prefetches() -> bool:
    """Whether this kernel's MMU maps neighbours of a faulting page by itself."""
    from kvmgmem import host as host_facts

    host = host_facts.probe()
    return not host.tdp_mmu


def step_lines(steps: Iterable[Step]) -> str:
    """Steps for people, a line each."""
    return "\n".join(f"{number:3}. {step}" for number, step in enumerate(steps, 1))


def journal_line(at: int, step: Step) -> str:
    """A step as a journal holds it."""
    return json.dumps({"at": at, **do.to_json(step)}) + "\n"
