"""Several runs side by side: a column per kernel, a row per test, those that differ first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from kvmgmem.results.features import features_by_column
from kvmgmem.results.known_bug_text import bug_line, bugs_by_column
from kvmgmem.results.records import Circumstances, Verdict
from kvmgmem.results.run import Run, TestOutcome, run_fault
from kvmgmem.results.summary import verdict_line
from kvmgmem.results.text import one_line

SYMBOLS: Mapping[Verdict | None, str] = {
    Verdict.PASSED: ".",
    Verdict.SKIPPED: "s",
    Verdict.KNOWN_BUG: "b",
    Verdict.NOT_RUN: "-",
    Verdict.FAILED: "F",
    Verdict.TIMEOUT: "T",
    Verdict.CRASHED: "C",
    Verdict.ERROR: "E",
    Verdict.SPLAT: "W",
    Verdict.PANICKED: "P",
    None: " ",
}
"""One letter a verdict; a blank where the column has no such test."""


HARMLESS_SHOWN = 3
"""How many tests that differ for one harmless reason are named."""


@dataclass(frozen=True)
class Column:
    """One run and the label it goes by."""

    label: str
    run: Run


@dataclass(frozen=True)
class Row:
    """One test over all columns; None where a column has no record of it."""

    test: str
    area: str
    contract: tuple[str, ...]
    rule: str
    outcomes: tuple[TestOutcome | None, ...]
    comparable: tuple[bool, ...]
    """Which columns have tests of this one's suite: another suite's run says nothing by not having it."""

    @property
    def differs(self) -> bool:
        """Whether columns disagree about the test; one that ought to have it and has not disagrees, too."""
        cells = zip(self.outcomes, self.comparable, strict=True)
        return len({outcome.verdict if outcome else None for outcome, counts in cells if counts}) > 1


@dataclass(frozen=True)
class Comparison:
    """All columns and rows, in the order of the first column that has a test."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def differing(self) -> tuple[Row, ...]:
        """The rows about which columns disagree."""
        return tuple(row for row in self.rows if row.differs)


def label_of(facts: Circumstances | None) -> str:
    """What a run is called: release, flavour, variant, suite; `host` where it was no guest."""
    if facts is None:
        return "unknown kernel"
    differences = (str(facts.extra.get(key) or "") for key in ("variant", "suite"))
    # A kernel that we built has its flavour in its release.
    flavour = "" if facts.release.endswith(f"-kvmgmem-{facts.flavour}") else facts.flavour
    parts = [facts.release, *filter(None, (flavour, *differences))]
    return one_line(" ".join([*parts, *(["host"] if facts.where == "host" else [])]))


def compare(runs: Sequence[Run], labels: Sequence[str] | None = None) -> Comparison:
    """Put runs side by side; equal labels are told apart by a number."""
    names = list(labels or (label_of(run.circumstances) for run in runs))
    unique = [name if names.count(name) == 1 else f"{name} #{names[: at + 1].count(name)}" for at, name in enumerate(names)]
    by_test = [{outcome.test: outcome for outcome in run.tests} for run in runs]
    tests = dict.fromkeys(test for column in by_test for test in column)
    suites = [set(map(suite_of, column)) for column in by_test]
    rows = tuple(_row(test, [column.get(test) for column in by_test], _comparable(test, suites)) for test in tests)
    return Comparison(tuple(map(Column, unique, runs)), rows)


def suite_of(test: str) -> str:
    """Whose test it is: `kselftest` for the kernel's own, `kernel` for what belongs to no test, else "" (kvmgmem's)."""
    root = test.partition("::")[0]
    return root if root in ("kselftest", "kernel") else ""


def _comparable(test: str, suites: Sequence[set[str]]) -> list[bool]:
    # What happens between tests can happen to every run, and a run without any test was of every suite.
    suite = suite_of(test)
    return [suite == "kernel" or suite in found or found <= {"kernel"} for found in suites]


def _row(test: str, outcomes: Sequence[TestOutcome | None], comparable: Sequence[bool]) -> Row:
    # A test that never started names no row; another column may know more.
    known = max((outcome for outcome in outcomes if outcome), key=lambda outcome: len(outcome.contract))
    return Row(test, known.area, known.contract, known.rule, tuple(outcomes), tuple(comparable))


def write_comparison(comparison: Comparison, out: TextIO) -> None:
    """Write the columns with their totals, the tests that differ with the reasons, and how many agree."""
    out.write("\n".join(_lines(comparison)) + "\n")


def _lines(comparison: Comparison) -> Iterator[str]:
    letters = [chr(ord("A") + at) if at < 26 else str(at) for at in range(len(comparison.columns))]
    for letter, column in zip(letters, comparison.columns, strict=True):
        yield f"{letter}  {column.label}: {verdict_line(column.run)}"
        fault = run_fault(column.run)
        if fault:
            yield f"   {one_line(fault)}"
    differing = comparison.differing
    if differing:
        yield ""
        yield f"Tests that differ ({len(differing)}):   " + "  ".join(
            f"{symbol} {verdict}" for verdict, symbol in SYMBOLS.items() if verdict
        )
        yield "  " + " ".join(letters)
        for group in _alike(differing):
            yield from _group_lines(group, letters)
    yield ""
    where = (
        f"all {len(letters)} columns"
        if all(all(row.comparable) for row in comparison.rows)
        else "all columns of their suite"
    )
    yield f"{len(comparison.rows) - len(differing)} of {len(comparison.rows)} tests agree in {where}."
    if differing:
        count = sum(not _is_explained(row) for row in differing)
        what = "a known bug, or something that the column says it lacks"
        yield f"{count} of the differences are not explained by {what}." if count else f"Every difference is {what}."
    yield from _bugs(comparison, letters)
    yield from _features(comparison, letters)


def _bugs(comparison: Comparison, letters: Sequence[str]) -> Iterator[str]:
    """Which known bug shows in which column: where one came, and where it was fixed."""
    bugs = bugs_by_column([column.run for column in comparison.columns])
    if not bugs:
        return
    yield ""
    shows, does_not = SYMBOLS[Verdict.KNOWN_BUG], SYMBOLS[Verdict.PASSED]
    yield f"Known bugs ({len(bugs)}):   {shows} shows  {does_not} does not  (blank) not looked for"
    yield "  " + " ".join(letters)
    symbols = {True: shows, False: does_not, None: " "}
    for bug, states in bugs.items():
        yield f"  {' '.join(symbols[state] for state in states)}  {one_line(bug_line(bug))}"
    yield ""


def _features(comparison: Comparison, letters: Sequence[str]) -> Iterator[str]:
    """The features to come that some column has, or answers oddly about."""
    states = features_by_column([column.run for column in comparison.columns])
    if not states:
        return
    known = {"absent", "not asked", "-"}
    worth_a_line = {name: columns for name, columns in states.items() if not known.issuperset(columns)}
    yield "Features to come:" if worth_a_line else f"Features to come: none of {len(states)} is present in any column."
    for name, columns in worth_a_line.items():
        yield f"  {name}: " + ", ".join(f"{letter} {state}" for letter, state in zip(letters, columns, strict=True))


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with the same verdicts for the same reasons together, those with a fault first, then those with a known bug."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = tuple((outcome.verdict, reason_of(outcome)) if outcome else None for outcome in row.outcomes)
        groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda group: (not _has_fault(group[0]), not _has_bug(group[0])))


def _has_fault(row: Row) -> bool:
    return any(outcome is not None and outcome.verdict.severity >= Verdict.NOT_RUN.severity for outcome in row.outcomes)


def _has_bug(row: Row) -> bool:
    return any(outcome is not None and outcome.verdict is Verdict.KNOWN_BUG for outcome in row.outcomes)


def _is_explained(row: Row) -> bool:
    """Whether each column passed, showed a known bug, or named what it lacks."""
    there = [outcome is not None for outcome, due in zip(row.outcomes, row.comparable, strict=True) if due]
    return all(there) and not _has_fault(row)


def _group_lines(group: Sequence[Row], letters: Sequence[str]) -> Iterator[str]:
    pattern = " ".join(SYMBOLS[outcome.verdict if outcome else None] for outcome in group[0].outcomes)
    shown = len(group) if _has_fault(group[0]) or len(group) <= HARMLESS_SHOWN + 1 else HARMLESS_SHOWN
    for row in group[:shown]:
        yield f"  {pattern}  {row.test}"
    if shown < len(group):
        yield f"  {pattern}  ... and {len(group) - shown} more"
    yield from _reasons(group[0], letters)


def _reasons(row: Row, letters: Sequence[str]) -> Iterator[str]:
    """Why columns do not simply pass, columns with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for letter, outcome in zip(letters, row.outcomes, strict=True):
        if outcome is not None and outcome.verdict is not Verdict.PASSED:
            by_reason.setdefault(reason_of(outcome), []).append(letter)
    indent = "  " + "  " * len(letters)
    for reason, columns in by_reason.items():
        yield f"{indent}  {','.join(columns)}: {reason}"


def reason_of(outcome: TestOutcome) -> str:
    """A verdict's reason in a line; a known bug's title."""
    bugs = "; ".join(bug_line(bug) for bug in outcome.end.bugs_shown)
    return one_line(bugs if outcome.verdict is Verdict.KNOWN_BUG and bugs else outcome.end.reason or str(outcome.verdict))
