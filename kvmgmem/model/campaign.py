"""A search that goes on: sequence after sequence until its time is over, each finding told once, and told shrunk."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmgmem.model.journal import MARK
from kvmgmem.model.play import Finding, Journal, Played, play
from kvmgmem.model.search import same, sequences, shrink
from kvmgmem.model.steps import Step, from_json, to_json
from kvmgmem.model.traits import KernelTraits
from kvmgmem.testing.waiting import TIME_SCALE

SHAPES = 3
"""How many shapes of one sort of finding are shrunk and told; what comes after them is taken for the same."""
SHRINK_SECONDS = 60.0 * TIME_SCALE
AGAIN_SECONDS = 15.0 * TIME_SCALE
"""What shrinking a finding may take: the first of its sort, and one more of it, or a known bug, whose name says it all."""
LAST_SECONDS = 30.0 * TIME_SCALE
"""What it may take even if the search's time is over."""
PROGRESS_EVERY = 10

Begin = Callable[[Sequence[Step]], Journal | None]


@dataclass(frozen=True)
class Found:
    """A finding as it is kept: what disagreed, and the shortest sequence that shows it.

    `again` says whether it showed once more when it was played for the last time.
    """

    fingerprint: str
    sort: str
    text: str
    steps: tuple[Step, ...]
    lines: tuple[str, ...]
    seed: int = -1
    bug: str = ""
    again: bool = True
    seconds: float = 0.0
    """From the search's start to the sequence that showed it first."""
    kernel: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(replace(self, steps=())), "steps": [to_json(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Found":
        """From a JSON object; raises ValueError."""
        try:
            steps = tuple(from_json(step) for step in data["steps"])
            return cls(**{**data, "steps": steps, "lines": tuple(data["lines"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no finding: {error}") from error

    def write(self, directory: Path) -> Path:
        """Write it to its own file: a head, and a line for each step."""
        path = directory / f"{self.fingerprint}.steps"
        head = {key: value for key, value in self.to_json().items() if key not in ("steps", "lines")}
        head["readable"] = list(self.lines)
        lines = [json.dumps({"finding": head}), *(json.dumps(to_json(step)) for step in self.steps)]
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        return path

    @classmethod
    def read(cls, path: Path) -> "Found":
        """Read such a file; one with steps alone is a finding of nothing yet. Raises ValueError that says what is wrong.

        Of a guest's console it takes the sequence that was begun last.
        """
        steps, head = list[Step](), dict[str, Any]()
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            _, mark, logged = line.partition(MARK)
            if not line.strip() or (MARK in text and not mark):
                continue
            try:
                data = json.loads(logged if mark else line)
                if "sequence" in data:
                    steps.clear()
                elif "finding" in data:
                    head = data["finding"]
                else:
                    steps.append(from_json(data))
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number}: {error}") from error
        if not steps:
            raise ValueError("there are no steps in it")
        lines = tuple(head.pop("readable", ()))
        return cls(**{"fingerprint": path.stem, "sort": "", "text": "", **head, "steps": tuple(steps), "lines": lines})


def fingerprint(finding: Finding, steps: Sequence[Step]) -> str:
    """What tells findings apart: a known bug's number, or the sort of the disagreement and the shape of what leads there."""
    if finding.bug:
        return finding.bug
    shape = " ".join(type(step).__name__ for step in steps)
    return hashlib.sha256(f"{finding.sort}\n{shape}".encode()).hexdigest()[:12]


@dataclass
class Campaign:
    """The state of a search: what has been told already, so that nothing is told twice."""

    traits: KernelTraits
    told: set[str] = field(default_factory=set)
    sorts: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def run(self, first_seed: int, count: int, deadline: float, begin: Begin | None = None) -> Iterator[Found | int]:
        """Play `count` seeds, or until `deadline` (time.monotonic): gives findings, and the number of each seed done."""
        for seed, steps in sequences(first_seed, self.traits):
            if seed >= first_seed + count or time.monotonic() > deadline:
                return
            played = play(steps, self.traits, journal=begin(steps) if begin else None)
            self.sequences += 1
            self.steps += len(played.answers)
            after = time.monotonic() - self.started
            for finding in [*_firsts(played.known), *filter(None, [played.finding])]:
                found = self._tell(seed, played, finding, deadline)
                if found:
                    yield replace(found, seconds=round(after, 1))
            yield seed

    def _tell(self, seed: int, played: Played, finding: Finding, deadline: float) -> Found | None:
        key = finding.bug or finding.sort
        if finding.bug in self.told or self.sorts.get(key, 0) >= SHAPES:
            return None
        self.sorts[key] = self.sorts.get(key, 0) + 1
        most = AGAIN_SECONDS if finding.bug or self.sorts[key] > 1 else SHRINK_SECONDS
        seconds = max(LAST_SECONDS, min(most, deadline - time.monotonic()))
        found = self.found(shrink(played, finding, self.traits, seconds=seconds), finding, seed)
        if found.fingerprint in self.told:
            return None
        self.told.add(found.fingerprint)
        return found

    @staticmethod
    def found(played: Played, wanted: Finding, seed: int) -> Found:
        """What is kept of a shrunk sequence."""
        again = same(played, wanted)
        finding = again or wanted
        steps = tuple(played.steps)
        mark = fingerprint(finding, steps)
        return Found(
            mark, finding.sort, str(finding), steps, tuple(played.lines(finding)), seed, finding.bug, again is not None
        )


def _firsts(findings: Sequence[Finding]) -> list[Finding]:
    """Of each known bug the first finding."""
    firsts: dict[str, Finding] = {}
    for finding in findings:
        firsts.setdefault(finding.bug, finding)
    return list(firsts.values())
