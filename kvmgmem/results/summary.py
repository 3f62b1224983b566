"""The summary for a terminal: calm when all is well, exact when it is not."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TextIO

from kvmgmem.exit_codes import ExitCode
from kvmgmem.results.known_bug_text import bug_line, sightings
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, TestOutcome, by_area, exit_code, run_fault
from kvmgmem.results.text import excerpt, lines_of, one_line

FAULTS: Final = (
    Verdict.PANICKED,
    Verdict.SPLAT,
    Verdict.ERROR,
    Verdict.CRASHED,
    Verdict.TIMEOUT,
    Verdict.FAILED,
    Verdict.NOT_RUN,
)
"""The verdicts that make a run fail, gravest first."""

TESTS_PER_BUG: Final = 5
"""How many tests are named under a known bug before the rest is only counted."""

COLUMNS: Final = ("passed", "failed", "known bug", "skipped", "other")
_COLUMN_OF: Final = {
    Verdict.PASSED: "passed",
    Verdict.FAILED: "failed",
    Verdict.KNOWN_BUG: "known bug",
    Verdict.SKIPPED: "skipped",
}

_RED: Final = "31"
_GREEN: Final = "32"
_YELLOW: Final = "33"

Paint = Callable[[str, str], str]


def plural(count: int, what: str) -> str:
    """Return "1 test", "2 tests"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def area_counts(tests: Sequence[TestOutcome]) -> dict[str, int]:
    """Return how many of the tests fall into each of `COLUMNS`."""
    counts = dict.fromkeys(COLUMNS, 0)
    for outcome in tests:
        counts[_COLUMN_OF.get(outcome.verdict, "other")] += 1
    return counts


def faults(run: Run) -> list[TestOutcome]:
    """Return the tests that make the run fail, the gravest verdicts first."""
    return sorted(
        (outcome for outcome in run.tests if outcome.verdict in FAULTS),
        key=lambda outcome: FAULTS.index(outcome.verdict),
    )


def skips(run: Run) -> list[tuple[str, int]]:
    """Return every skip reason with the number of tests it skipped, the most frequent first."""
    reasons: dict[str, int] = {}
    for outcome in run.tests:
        if outcome.verdict is Verdict.SKIPPED:
            reason = one_line(outcome.end.reason) or "no reason given"
            reasons[reason] = reasons.get(reason, 0) + 1
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def where_it_ran(run: Run) -> str:
    """Return the run's circumstances in a few words."""
    here = run.circumstances
    if here is None:
        return "an unknown kernel"
    flavour = [f"flavour {here.flavour}"] if here.flavour else []
    return one_line(", ".join([here.release, here.backend, f"{here.paging} paging", here.accelerator, *flavour]))


def verdict_line(run: Run) -> str:
    """Return the run in one line: what it came to, the counts, where, and the exit code."""
    return f"{outcome_text(run)} on {where_it_ran(run)} in {run.duration:.1f} s (exit {exit_code(run):d})"


def outcome_text(run: Run) -> str:
    """Return what the run came to, and the counts."""
    code = exit_code(run)
    words = {
        ExitCode.OK: "OK",
        ExitCode.TEST_FAILED: "FAILED",
        ExitCode.USAGE: "USAGE",
        ExitCode.NOTHING_RAN: "NOTHING RAN",
        ExitCode.HARNESS: "HARNESS FAILED",
        ExitCode.KERNEL: "KERNEL FAILED",
    }
    names = {Verdict.KNOWN_BUG: "known bug", Verdict.NOT_RUN: "not run", Verdict.TIMEOUT: "timed out"}
    order = (Verdict.PASSED, *FAULTS, Verdict.KNOWN_BUG, Verdict.SKIPPED)
    counts = [f"{run.counts[verdict]} {names.get(verdict, verdict)}" for verdict in order if run.counts[verdict]]
    return f"{words[code]}: {', '.join(counts) or 'no test'}"


def _plain(_colour: str, text: str) -> str:
    return text


def _painted(colour: str, text: str) -> str:
    return f"\033[{colour}m{text}\033[0m"


def write_summary(run: Run, out: TextIO, colour: bool = False) -> None:
    """Write the summary of the run to `out`; escape sequences only with `colour` (see `text.wants_colour`)."""
    paint = _painted if colour else _plain
    sections = (_areas, _faults, _bugs_shown, _bugs_absent, _skips, _notes)
    for section in sections:
        lines = list(section(run, paint))
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            out.write("\n".join([*lines, "", ""]))
    tone = {ExitCode.OK: _GREEN, ExitCode.NOTHING_RAN: _YELLOW}.get(exit_code(run), _RED)
    out.write(paint(tone, verdict_line(run)) + "\n")


def _areas(run: Run, paint: Paint) -> Iterator[str]:
    groups = by_area(run)
    if not groups:
        return
    width = max(5, *(len(one_line(area)) for area in groups))
    yield f"{'area':<{width}}" + "".join(f"{column:>11}" for column in COLUMNS)
    for area, tests in groups.items():
        yield f"{one_line(area):<{width}}" + _cells(area_counts(tests), paint)
    if len(groups) > 1:
        yield f"{'total':<{width}}" + _cells(area_counts(run.tests), paint)


def _cells(counts: dict[str, int], paint: Paint) -> str:
    tones = {"failed": _RED, "other": _RED, "known bug": _YELLOW}
    cells = []
    for column, count in counts.items():
        cell = f"{count or '.':>11}"
        cells.append(paint(tones[column], cell) if count and column in tones else cell)
    return "".join(cells)


def _faults(run: Run, paint: Paint) -> Iterator[str]:
    failed = [outcome for outcome in faults(run) if outcome.verdict is not Verdict.NOT_RUN]
    for outcome in failed:
        yield paint(_RED, f"{outcome.verdict.upper()} {one_line(outcome.test)}")
        yield from fault_lines(outcome)
        yield ""
    not_run = [outcome for outcome in run.tests if outcome.verdict is Verdict.NOT_RUN]
    if not_run:
        yield paint(_RED, f"NOT RUN ({len(not_run)})")
        yield from (f"  {one_line(outcome.test)}" for outcome in not_run)
        yield ""
    fault = run_fault(run)
    if fault:
        yield paint(_RED, "THE RUN ITSELF")
        yield f"  {fault}"


def fault_lines(outcome: TestOutcome) -> Iterator[str]:
    """Yield what there is to say about a failed test: rule, reason, rows, kernel log, detail, command; indented."""
    end = outcome.end
    if outcome.rule:
        yield f"  rule:   {' '.join(one_line(line).strip() for line in outcome.rule.splitlines())}"
    yield f"  reason: {one_line(end.reason) or 'none given'}"
    if outcome.contract:
        yield f"  rows:   {one_line(' '.join(outcome.contract))}"
    if end.kernel_log:
        yield "  kernel log:"
        yield from (f"    {line}" for line in excerpt([one_line(line) for line in end.kernel_log]))
    if end.detail.strip():
        yield "  detail:"
        yield from (f"    {line}".rstrip() for line in excerpt(lines_of(end.detail)))
    if end.repeat:
        yield f"  repeat: {one_line(end.repeat)}"


def _bugs_shown(run: Run, paint: Paint) -> Iterator[str]:
    shown = {bug: seen for bug, seen in sightings(run).items() if seen.shown}
    if not shown:
        return
    yield f"Known bugs that this kernel shows ({len(shown)}):"
    for bug, seen in shown.items():
        yield f"  {paint(_YELLOW, one_line(bug_line(bug)))}"
        yield from (f"      {one_line(test)}" for test in seen.shown[:TESTS_PER_BUG])
        if len(seen.shown) > TESTS_PER_BUG:
            yield f"      and {plural(len(seen.shown) - TESTS_PER_BUG, 'test')} more"
        if seen.absent:
            yield f"      not shown in {plural(len(seen.absent), 'test')} that looked for it:"
            yield from (f"        {one_line(test)}" for test in seen.absent[:TESTS_PER_BUG])


def _bugs_absent(run: Run, _paint: Paint) -> Iterator[str]:
    absent = [bug for bug, seen in sightings(run).items() if not seen.shown]
    if not absent:
        return
    yield f"Known bugs that do not show here ({len(absent)}):"
    yield from (f"  {one_line(bug_line(bug))}" for bug in absent)


def _skips(run: Run, _paint: Paint) -> Iterator[str]:
    reasons = skips(run)
    if not reasons:
        return
    yield f"Skipped ({sum(count for _, count in reasons)}):"
    yield from (f"  {count:>4}  {reason}" for reason, count in reasons)


def _notes(run: Run, _paint: Paint) -> Iterator[str]:
    yield from (f"note: {one_line(note)}" for note in run.notes)
    yield from (f"left out: {one_line(what)}" for what in run.left_out)
    yield from (f"damaged: {one_line(str(line))}" for line in run.damaged)
    if run.mixed:
        yield f"note: the run has {run.segments} segments of different circumstances; those told are the last one's"
