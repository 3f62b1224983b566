"""Both ends of a search in a guest: the test that searches there, and the lab's round that boots it and reads its notes.

What the test has to say goes into the results as notes, as it happens. Each sequence is noted before it is played, so that
of a guest that dies the last one is known.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmgmem.model.campaign import Campaign, Found
from kvmgmem.model.journal import NoteJournal, noted
from kvmgmem.model.play import play
from kvmgmem.model.steps import Step, from_json, to_json
from kvmgmem.model.traits import KernelTraits, probe
from kvmgmem.results.records import Note, Record, TestEnd, Verdict

if TYPE_CHECKING:
    from kvmgmem.lab.supervision.supervisor import Request

JOB = "KVMGMEM_FUZZ"
FOUND, SEED, TRAITS, PLAYED = "fuzz found: ", "fuzz seed: ", "fuzz traits: ", "fuzz played: "
DEADLY = (Verdict.PANICKED, Verdict.SPLAT, Verdict.CRASHED, Verdict.TIMEOUT)
TEST_FILE = "test_fuzz.py"
TEST = '''"""A search for sequences that go another way than the model says."""

import pytest

from kvmgmem.kvm import Kvm
from kvmgmem.lab.fuzz_guest import in_guest


def test_fuzz(kvm: Kvm, request: pytest.FixtureRequest) -> None:
    """Every sequence goes as the model says; what does not is told in notes."""
    in_guest(request.config)
'''


@dataclass(frozen=True)
class Job:
    """What the guest is to do: search from a seed on for some seconds, or play one sequence."""

    first_seed: int = 0
    seconds: float = 0.0
    told: tuple[str, ...] = ()
    sorts: dict[str, int] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    first: bool = False
    """Whether the first finding that is no known bug ends the search."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**self.__dict__, "steps": [to_json(step) for step in self.steps]}


def in_guest(config: Any) -> None:
    """The guest's end, called by the test with pytest's configuration."""
    from kvmgmem.testing.plugin import SESSION

    write: Callable[[Record], None] = config.stash[SESSION].write
    job = json.loads(os.environ[JOB])
    traits, journal = probe(), NoteJournal(write)
    _note(write, TRAITS, traits.to_json())
    if job["steps"]:
        steps = [from_json(step) for step in job["steps"]]
        journal.begin(steps)
        played = play(steps, traits)
        findings = [*played.known, *filter(None, [played.finding])]
        lines = played.lines(findings[0] if findings else None)
        _note(write, PLAYED, {"lines": lines, "findings": [[f.sort, f.bug, str(f)] for f in findings]})
        return
    campaign = Campaign(traits, set(job["told"]), dict(job["sorts"]))
    deadline = time.monotonic() + job["seconds"]
    for event in campaign.run(job["first_seed"], 1 << 62, deadline, journal.begin):
        if isinstance(event, Found):
            _note(write, FOUND, event.to_json())
            if job["first"] and not event.bug:
                return
        else:
            _note(write, SEED, [event, campaign.sequences, campaign.steps])


def _note(write: Callable[[Record], None], kind: str, data: object) -> None:
    write(Note(time.time(), kind + json.dumps(data)))


@dataclass
class Round:
    """What one boot of a guest came to."""

    found: list[Found] = field(default_factory=list)
    last_seed: int = -1
    sequences: int = 0
    steps: int = 0
    traits: KernelTraits | None = None
    played: dict[str, Any] | None = None
    last_sequence: list[Step] = field(default_factory=list)
    """The sequence that was noted last: under a guest that died, the one that it died of."""
    end: TestEnd | None = None

    @property
    def died(self) -> bool:
        """Whether the kernel complained, hung or died, or ended the process that searched."""
        return self.end is not None and self.end.verdict in DEADLY

    @property
    def failed(self) -> str:
        """Why the search itself could not go on; "" if it could."""
        if self.end is None:
            return "it did not begin"
        if self.end.verdict in DEADLY or self.end.verdict in (Verdict.PASSED, Verdict.KNOWN_BUG):
            return ""
        return f"{self.end.verdict}: {self.end.reason}"

    def take(self, record: Record) -> None:
        """Read one record."""
        if isinstance(record, TestEnd):
            self.end = record
        if not isinstance(record, Note):
            return
        text = record.text
        if text.startswith(FOUND):
            self.found.append(Found.from_json(json.loads(text.removeprefix(FOUND))))
        elif text.startswith(SEED):
            self.last_seed, self.sequences, self.steps = json.loads(text.removeprefix(SEED))
        elif text.startswith(TRAITS):
            self.traits = KernelTraits.from_json(json.loads(text.removeprefix(TRAITS)))
        elif text.startswith(PLAYED):
            self.played = json.loads(text.removeprefix(PLAYED))
        elif (steps := noted(text)) is not None:
            self.last_sequence = steps


class RoundOverError(Exception):
    """Raised by whoever follows a round, when there is no point in its going on; `round` is what it had come to."""

    def __init__(self, so_far: Round) -> None:
        super().__init__("the search is over")
        self.round = so_far


def run_round(make_request: Callable[[Path], "Request"], job: Job, on_record: Callable[[Round], None]) -> Round:
    """Boot a guest for one job and follow its notes; raises `HarnessError` if it does not come to a test.

    `make_request` makes the supervisor's request for a directory of tests; the job is added to its environment here. What
    `on_record` raises ends the guest.
    """
    from kvmgmem.lab.supervision.supervisor import Supervisor

    result = Round()

    class Following(Supervisor):
        """A supervisor that has its records read as they come."""

        def write(self, record: Record) -> None:
            super().write(record)
            result.take(record)
            on_record(result)

    with tempfile.TemporaryDirectory(prefix="kvmgmem-fuzz-") as directory:
        tests = Path(directory) / "fuzz"
        tests.mkdir()
        (tests / TEST_FILE).write_text(TEST)
        request = make_request(tests)
        request = replace(request, environment={**request.environment, JOB: json.dumps(job.to_json())})
        Following(request, Quiet()).run()
    return result


class Quiet:
    """Shows no progress: the search has its own."""

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def dead_kernel(result: Round, steps: Sequence[Step], seed: int) -> Found:
    """The finding that a guest's death is: its complaint, and the sequence that it died of."""
    from kvmgmem.model.play import step_lines

    assert result.end is not None
    reason = result.end.reason
    mark = reason.rpartition("[")[2].rstrip("]") if reason.endswith("]") else reason
    safe = "".join(letter if letter.isalnum() else "-" for letter in mark)[:60]
    lines = (*step_lines(steps).splitlines(), f"     {reason}", *result.end.kernel_log[:40])
    return Found(f"kernel-{safe}", f"kernel: {mark}", reason, tuple(steps), lines, seed)
