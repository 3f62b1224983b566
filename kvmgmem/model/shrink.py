"""The shortest sequence that still shows a finding: steps are left out, then what is left is made plainer."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from kvmgmem.model import steps as do
from kvmgmem.model.generate import GPA
from kvmgmem.model.steps import ARENA, ARENA_END, MAIN, WINDOW, P, Step, changed

Shows = Callable[[Sequence[Step]], bool]
"""Plays a sequence and says whether the finding is still there."""

PLAINER: dict[str, tuple[int, ...]] = {
    "gpa": (GPA, GPA + P, 0),
    "size": (P, 2 * P, 0),
    "pages": (1, 2),
    "page": (0, 1),
    "hva": (0,),
    "slot": (0, 1),
    "flags": (0, 1, 4),
    "offset": (0, P),
    "length": (P,),
    "version": (2,),
    "value": (1,),
    "type": (0,),
}
"""What to try in place of a field's value, plainest first."""


class Shrinker:
    """Shrinks one sequence, within a number of plays and a time; `about` names objects that the finding is about."""

    def __init__(self, shows: Shows, plays: int = 400, seconds: float = 60.0, about: str = "") -> None:
        self._shows = shows
        self._about = set(re.findall(r"\w+", about))
        self._plays = plays
        self._deadline = time.monotonic() + seconds
        self.played = 0

    def shrink(self, steps: Sequence[Step]) -> list[Step]:
        """The plainest sequence found; the given one if it does not show the finding again."""
        best = list(steps)
        if not self._still(best):
            return best
        best = next((fewer for fewer in related(best, self._about) if len(fewer) < len(best) and self._still(fewer)), best)
        while True:
            shorter = self._plainer(self._moved(self._shorter(best)))
            if shorter == best or self._spent:
                return shorter
            best = shorter

    @property
    def _spent(self) -> bool:
        return self.played >= self._plays or time.monotonic() > self._deadline

    def _still(self, steps: Sequence[Step]) -> bool:
        if self._spent:
            return False
        self.played += 1
        return self._shows(steps)

    def _shorter(self, steps: list[Step]) -> list[Step]:
        """Leave out pieces, halves first and single steps last, from the end: what comes later depends on less."""
        size = max(1, len(steps) // 2)
        while True:
            end = len(steps)
            while end > 0:
                start = max(0, end - size)
                without = steps[:start] + steps[end:]
                if without and self._still(without):
                    steps = without
                end = start
            if size == 1:
                return steps
            size //= 2

    def _moved(self, steps: list[Step]) -> list[Step]:
        """The same with all guest addresses moved down together."""
        near = range(GPA + 1, 1 << 32)
        found = [int(getattr(step, "gpa", 0)) for step in steps]
        by = min((gpa for gpa in found if gpa in near), default=GPA) - GPA
        moved = [changed(step, gpa=gpa - by) if gpa in near else step for step, gpa in zip(steps, found, strict=True)]
        return moved if by and self._still(moved) else steps

    def _plainer(self, steps: list[Step]) -> list[Step]:
        for at in range(len(steps)):
            for plainer in _variants(steps[at]):
                candidate = [*steps[:at], plainer, *steps[at + 1 :]]
                if self._still(candidate):
                    steps = candidate
        return steps


def related(steps: Sequence[Step], about: AbstractSet[str] = frozenset()) -> Iterator[list[Step]]:
    """Short cuts: what makes the objects of the last step, and those it is `about`, then what is done with them, too.

    And last, what is done with them by all vCPUs of the VMs among them.
    """
    needed = _objects(steps[-1]) | {name for step in steps for name in _made(step) & about}
    made = [steps[-1]]
    for step in reversed(steps[:-1]):
        if _made(step) & needed:
            needed |= _objects(step)
            made.append(step)
    yield made[::-1]
    yield [step for step in steps if _objects(step) and _objects(step) <= needed]
    needed |= {step.name for step in steps if isinstance(step, do.CreateCpu) and step.vm in needed}
    yield [step for step in steps if _objects(step) and _objects(step) <= needed]


def _made(step: Step) -> set[str]:
    if isinstance(step, do.MapFile | do.MapMemory):
        return {f"window {step.window}"}
    return (
        {step.name} if isinstance(step, do.CreateVm | do.CreateGmem | do.CreateCpu | do.Dup | do.Send | do.Fork) else set()
    )


def _objects(step: Step) -> set[str]:
    """The names in a step, windows of memory among them."""
    values = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    found = {value for value in values.values() if isinstance(value, str) and value != MAIN}
    if "window" in values:
        found.add(f"window {values['window']}")
    if ARENA <= values.get("hva", 0) < ARENA_END:
        found.add(f"window {(values['hva'] - ARENA) // WINDOW}")
    return found


def renamed(steps: Sequence[Step]) -> list[Step]:
    """The same with objects called v0, f0, f1, c0, ... in the order in which they are made."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for step in steps:
        name = getattr(step, "name", "")
        if name and name not in names:
            letter = name[0]
            names[name] = f"{letter}{counts.get(letter, 0)}"
            counts[letter] = counts.get(letter, 0) + 1
    return [changed(step, **_new_names(step, names)) for step in steps]


def _new_names(step: Step, names: dict[str, str]) -> dict[str, str]:
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    return {key: names[value] for key, value in fields.items() if isinstance(value, str) and value in names}


def _variants(step: Step) -> Iterator[Step]:
    """The step with one field plainer, only ever in the direction of the plainest."""
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if field.name == "by" and value != MAIN:
            yield changed(step, by=MAIN)
        wanted = PLAINER.get(field.name, ())
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        for candidate in wanted[: wanted.index(value)] if value in wanted else wanted:
            yield changed(step, **{field.name: candidate})
