"""What each selftest adds: the mutants that it notices, and the rules that no other asserts.

A mutant is over with the first test that notices it, so that most tests are never asked. Those of which nothing is known
after a campaign, the *idle* ones, are asked by themselves (`kvmgmem mutate --idle-tests`); each until a mutant made it fail.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvmgmem.bug_coverage import naming_tests
from kvmgmem.catalogue import contract as catalogue
from kvmgmem.contract_report import asserting_tests
from kvmgmem.errors import HarnessError
from kvmgmem.mutate.campaign import Campaign
from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.guest import Trial
from kvmgmem.mutate.judge import Fate, How, Notice, all_notices
from kvmgmem.mutate.modules import Kernel
from kvmgmem.mutate.state import Result, append_line, first_noticers, function_of
from kvmgmem.results.records import Verdict

BY_AN_ASSERTION: Final = frozenset({How.WRONG_ANSWER, How.LEAK, How.KNOWN_BUG})
"""How a test notices what it looks for. What panics, hangs or is reported by the kernel is noticed by any test that comes
near, and what makes a test skip by none."""


Relation = Callable[[str], str]
"""What a test and a mutant have to have in common, as a function of a row's id."""

RELATIONS: Final[tuple[Relation, ...]] = (str, catalogue.area_of)
"""First a test is asked about the mutants that break one of its very rows, for they are most likely to make it fail; only if
none did, about those that break a row of its areas."""


@dataclass(frozen=True)
class Duties:
    """What the selftests are there for, by test function ("selftests/test_x.py::test_y"), read from their source."""

    rows: Mapping[str, tuple[str, ...]]
    alone: Mapping[str, tuple[str, ...]]
    """The rows that no other test asserts, of the tests that have such."""
    bugs: Mapping[str, tuple[str, ...]]
    """The known bugs that it recognises: each was seen on a kernel that has it."""

    @classmethod
    def of(cls, selftests: Path) -> "Duties":
        """Read them. Raises HarnessError for rows and bugs that the catalogues do not have."""
        tests_of = asserting_tests(selftests)
        sole = {row: tests for row, tests in tests_of.items() if len(set(tests)) == 1}
        return cls(_by_test(tests_of), _by_test(sole), _by_test(naming_tests(selftests)))


def _by_test(tests: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for name, named in tests.items():
        for test in named:
            found.setdefault(test, {})[name] = None
    return {test: tuple(names) for test, names in sorted(found.items())}


@dataclass
class Answers:
    """What the idle tests said, on disk and in memory: one JSON object a line, a mutant each. Threads may add to it."""

    path: Path
    asked: dict[str, set[str]] = field(default_factory=dict)
    """Mutant to the tests that it was shown to."""
    noticed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Test to the mutants that it noticed, and what it said of each."""
    skipped: set[str] = field(default_factory=set)
    """Tests that the unmutated kernel has not what they need for."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, path: Path) -> "Answers":
        """What earlier runs left; the last line may have been cut, and is asked again."""
        answers = cls(path)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                answers._take(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue
        return answers

    def _take(self, entry: Mapping[str, Any]) -> None:
        self.skipped |= set(entry.get("skipped", ()))
        if mutant := entry.get("mutant"):
            self.asked.setdefault(mutant, set()).update(entry["asked"])
            for test, reason in entry["noticed"].items():
                self.noticed.setdefault(test, {})[mutant] = reason

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep an answer, at once on disk."""
        with self._lock:
            self._take(entry)
            append_line(self.path, entry)


def idle_tests(duties: Duties, results: Iterable[Result], answers: Answers) -> list[str]:
    """The tests that have noticed no mutant, assert no rule alone, and were not skipped when they were asked."""
    busy = {*first_noticers(results), *duties.alone, *duties.bugs, *answers.noticed, *answers.skipped}
    return [test for test in duties.rows if test not in busy]


def unseen_by(
    idle: Iterable[str], mutant: Mutant, result: Result | None, duties: Duties, answers: Answers, relation: Relation
) -> list[str]:
    """Which of the idle tests concern this mutant and have not been shown it; none where an assertion is not what tells."""
    if result is None or result.fate is not Fate.KILLED or result.how not in BY_AN_ASSERTION:
        return []
    broken, asked = set(map(relation, mutant.breaks)), answers.asked.get(mutant.id, set())
    return [test for test in idle if test not in asked and broken & set(map(relation, duties.rows[test]))]


class IdleTests:
    """What a campaign asks besides: the idle tests that a mutant concerns."""

    def __init__(self, campaign: Campaign, duties: Duties, answers: Answers, relation: Relation) -> None:
        self._campaign = campaign
        self._duties = duties
        self._answers = answers
        self._relation = relation

    def prepare(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Ask the unmutated kernel once for all, and return the mutants that idle tests have not seen yet."""
        tests = self._idle()
        if tests:
            self._campaign.need_baseline(tests)
        ends = self._campaign.baseline.answers.items()
        ran = {function_of(name) for name, answer in ends if answer.verdict is not Verdict.SKIPPED}
        if skipped := [test for test in tests if test not in ran]:
            self._answers.add({"skipped": skipped})
        return [mutant for mutant in mutants if self._tests_for(mutant)]

    def _idle(self) -> list[str]:
        return idle_tests(self._duties, self._campaign.state.results.values(), self._answers)

    def _tests_for(self, mutant: Mutant) -> list[str]:
        result = self._campaign.state.results.get(mutant.id)
        return unseen_by(self._idle(), mutant, result, self._duties, self._answers, self._relation)

    def __call__(self, mutant: Mutant, result: Result, kernel: Kernel, records: Path) -> Result:
        """Show a mutant to them, and keep what they said; its own result stays as it is."""
        if tests := self._tests_for(mutant):
            try:
                self._ask(mutant, tests, kernel, records.with_suffix(".idle.jsonl"))
            except HarnessError as error:
                self._campaign.progress.note(f"{mutant.id}: not asked: {error.message}")
        return result

    def _ask(self, mutant: Mutant, tests: Sequence[str], kernel: Kernel, records: Path) -> None:
        noticed: dict[str, str] = {}
        asked: list[str] = []
        # Each failure ends the guest: a mutant that leaks or hangs makes every variant of a test wait for its limit.
        while left := tests[len(asked) :]:
            trial = self._campaign.trial(kernel, records, left)
            notices = list(all_notices(trial, self._campaign.baseline))
            for notice in notices:
                if notice.how in BY_AN_ASSERTION:
                    noticed.setdefault(function_of(notice.test), notice.reason)
            done = answered(left, trial, notices)
            if not done:
                break
            asked += done
        if asked:
            self._answers.add({"mutant": mutant.id, "asked": asked, "noticed": noticed})


def answered(tests: Sequence[str], trial: Trial, notices: Iterable[Notice]) -> Sequence[str]:
    """Those of the tests, which run in this order, that are done: the guest's time may have run out within the last."""
    ended = {end.test for end in trial.ends}
    begun = {function_of(test) for test in ended}.intersection(tests)
    if not begun:
        return []
    last = max(map(tests.index, begun))
    variants = {test for test in trial.planned if function_of(test) == tests[last]}
    is_done = variants <= ended or tests[last] in {function_of(notice.test) for notice in notices}
    return tests[: last + is_done]


def markdown(duties: Duties, results: Sequence[Result], mutants: Mapping[str, Mutant], answers: Answers) -> list[str]:
    """What the tests add, in numbers; and those that nothing speaks for, or what else does."""
    first = first_noticers(results)
    rest = [test for test in duties.rows if test not in first]
    alone = [test for test in rest if test in duties.alone]
    rest = [test for test in rest if test not in duties.alone]
    bugs = [test for test in rest if test in duties.bugs]
    rest = [test for test in rest if test not in duties.bugs]
    woken = [test for test in rest if test in answers.noticed]
    skipped = [test for test in rest if test in answers.skipped]
    idle = idle_tests(duties, results, answers)
    lines = ["### What each test adds", ""]
    lines += [
        f"Of the {len(duties.rows)} tests that assert rows of the contract,",
        "",
        f"- {sum(test in first for test in duties.rows)} were the first to notice a mutant, or more (see the table below);",
        f"- {len(alone)} others assert a row that no other test does;",
        f"- {len(bugs)} others recognise a known bug, and were seen to fail on a kernel that has it;",
    ]
    if not answers.asked:
        return [*lines, f"- {len(idle)} are none of these, and were not asked by themselves (`--idle-tests`)."]
    lines += [
        f"- {len(woken)} others failed on a mutant that another test had been the first to notice, when they were asked by"
        " themselves (`kvmgmem mutate --idle-tests`);",
        f"- {len(skipped)} others need what the mutants' kernel or machine has not;",
        f"- {len(idle)} noticed none of the mutants of their areas, and all their rows are asserted by others as well.",
    ]
    wider = RELATIONS[-1]
    if left := sum(bool(unseen_by(idle, mutants[each.mutant], each, duties, answers, wider)) for each in results):
        lines[-1] += f" Of {left} mutants not all of them have been asked **yet**."
    if idle:
        lines += ["", "The last are candidates to go, unless something else speaks for them:", ""]
        lines += [f"- `{test}` ({' '.join(duties.rows[test])})" for test in idle]
    return lines
