"""Judging a mutant: what its kernel answered, against what the unmutated kernel answered to the same tests."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.mutate.guest import Trial
from kvmgmem.results.records import TestEnd, Verdict


class Fate(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    UNDECIDED = "undecided"
    """The tests that were to look first let it live, and the others were not asked."""
    EQUIVALENT = "equivalent"
    DOES_NOT_BUILD = "does not build"
    DOES_NOT_APPLY = "does not apply"
    ERROR = "error"
    """The harness or its guest failed; nothing is known about the mutant."""


class How(StrEnum):
    """By what a mutant was noticed."""

    WRONG_ANSWER = "wrong answer"
    LEAK = "leak"
    SPLAT = "splat"
    PANIC = "panic"
    HANG = "hang"
    CRASH = "crash"
    """The test's own process died of it."""
    KNOWN_BUG = "known bug"
    """The test recognised a recorded defect that the unmutated kernel does not have."""
    GONE = "test gone"
    """The kernel no longer offers what the test needs, so that it was skipped or does not exist."""
    NO_BOOT = "no boot"


@dataclass(frozen=True)
class Notice:
    """The first sign that something is wrong: which test, how, and in one line what."""

    how: How
    test: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What a test came to on the unmutated kernel."""

    verdict: Verdict
    bugs: tuple[str, ...] = ()
    seconds: float = 0.0
    planned: bool = True
    """False for what no runner plans: parts of a test, what happens between tests."""


@dataclass
class Baseline:
    """The unmutated kernel's answers, and for which selections of tests they are complete."""

    answers: dict[str, Answer] = field(default_factory=dict)
    covered: set[str] = field(default_factory=set)
    """Node ids as they were asked for; ALL for a run of everything."""

    def lacks(self, tests: Iterable[str]) -> list[str]:
        """Which of these selections have not been tried yet."""
        return [] if ALL in self.covered else [test for test in tests if test not in self.covered]

    def add(self, selections: Iterable[str], trial: Trial) -> None:
        """Take in a run of the unmutated kernel. Raises HarnessError where that came to nothing."""
        if trial.trouble or not trial.complete:
            raise HarnessError(
                f"the unmutated kernel does not run the selftests: {trial.trouble or 'the run did not end'}",
                f"its console is in {trial.console}",
            )
        planned = set(trial.planned)
        for end in trial.ends:
            bugs = tuple(sorted(end.bugs_shown))
            self.answers[end.test] = Answer(end.verdict, bugs, end.duration, end.test in planned)
        self.covered |= set(selections)

    @property
    def failing(self) -> list[str]:
        """The tests that fail without any mutant: they prove nothing, and are left out."""
        return sorted(test for test, answer in self.answers.items() if answer.verdict in FAILURES)


ALL: Final = "*"

FAILURES: Final = frozenset(
    {Verdict.FAILED, Verdict.TIMEOUT, Verdict.CRASHED, Verdict.SPLAT, Verdict.PANICKED, Verdict.ERROR}
)


def first_notice(trial: Trial, baseline: Baseline, selections: Sequence[str]) -> Notice | None:
    """The first test that answers a mutant otherwise than the original; None if all that ran do not.

    Raises HarnessError where the harness failed, for that says nothing about the mutant.
    """
    if trial.trouble and not trial.ends:
        return Notice(How.NO_BOOT if trial.kernel_died else How.GONE, "", trial.trouble)
    if notice := next(all_notices(trial, baseline), None):
        return notice
    if not trial.complete and set(trial.planned) <= {end.test for end in trial.ends}:
        return Notice(How.HANG, "", "all tests ended, but the runner in the guest did not")
    return _missing(trial, baseline, selections)


def all_notices(trial: Trial, baseline: Baseline) -> Iterator[Notice]:
    """Every test that answered otherwise than on the original kernel, in the order of their ends.

    Raises HarnessError where the harness failed, for that says nothing about the mutant.
    """
    for end in trial.ends:
        answer = baseline.answers.get(end.test)
        if answer is not None and answer.verdict in FAILURES:
            continue
        if notice := _notice(end, answer):
            yield notice


def _notice(end: TestEnd, answer: Answer | None) -> Notice | None:
    if end.verdict is Verdict.ERROR:
        raise HarnessError(f"{end.test}: {end.reason}", "run the mutant again: --again error")
    if end.verdict in FAILURES:
        return Notice(how(end), end.test, end.reason)
    if answer is None:
        return None
    if end.verdict is Verdict.SKIPPED and answer.verdict in (Verdict.PASSED, Verdict.KNOWN_BUG):
        return Notice(How.GONE, end.test, f"skipped: {end.reason}")
    if fresh := set(end.bugs_shown) - set(answer.bugs):
        return Notice(How.KNOWN_BUG, end.test, f"shows {', '.join(sorted(fresh))}: {end.reason}")
    return None


def how(end: TestEnd) -> How:
    """By what a failed test noticed."""
    match end.verdict:
        case Verdict.SPLAT:
            return How.SPLAT
        case Verdict.PANICKED:
            return How.HANG if end.reason.startswith("hang") else How.PANIC
        case Verdict.TIMEOUT:
            return How.HANG
        case Verdict.CRASHED:
            return How.CRASH
    return How.LEAK if end.reason.startswith("leak") else How.WRONG_ANSWER


def _missing(trial: Trial, baseline: Baseline, selections: Sequence[str]) -> Notice | None:
    """A test that the mutant's kernel does not even have, because it does not offer what the test is made for."""
    for test, answer in baseline.answers.items():
        if answer.planned and test not in trial.planned and any(selected(test, selection) for selection in selections):
            return Notice(How.GONE, test, "the mutant's kernel has no such test")
    return None


def selected(test: str, selection: str) -> bool:
    """Whether a node id is among those that an argument of pytest selects."""
    return selection in (ALL, test) or test.startswith((f"{selection}[", f"{selection}::"))


def save_baseline(baseline: Baseline, path: Path, key: str) -> None:
    """Write the answers down; `key` says of which kernel and selftests they are."""
    answers = {
        test: [answer.verdict.value, list(answer.bugs), answer.seconds, answer.planned]
        for test, answer in baseline.answers.items()
    }
    content = {"key": key, "covered": sorted(baseline.covered), "answers": answers}
    cache.write_file(path, json.dumps(content, indent=0).encode())


def load_baseline(path: Path, key: str) -> Baseline:
    """The answers that were written down for this kernel and these selftests; none, where there are none."""
    try:
        content: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return Baseline()
        answers = content["answers"]
        covered = content["covered"]
        assert isinstance(answers, dict)
        assert isinstance(covered, list)
        read = {test: Answer(Verdict(verdict), tuple(bugs), *rest) for test, (verdict, bugs, *rest) in answers.items()}
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return Baseline()
    return Baseline(read, set(covered))
