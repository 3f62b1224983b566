"""A run put together from its records: a file that a panic cut short is read, and silence is never success."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kvmgmem.catalogue.contract import AREAS, area_of
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, code_of_part, gravest
from kvmgmem.results.records import (
    Circumstances,
    Heartbeat,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Trace,
    Verdict,
    parse_line,
)

NO_AREA: Final = "(none)"
"""Where reports put a test that names no contract row."""

NEVER_ENDED: Final = "the test started and never ended: what ran it was lost"
NEVER_CAME: Final = "planned, and its turn never came"
NO_RUN_END: Final = "the run did not come to its end: there is no run-end record after the last run-start"


@dataclass(frozen=True)
class TestOutcome:
    """One test of a run, with the end record that counts."""

    __test__ = False

    test: str
    end: TestEnd
    area: str = NO_AREA
    contract: tuple[str, ...] = ()
    rule: str = ""
    open: bool = False
    """It started and has no end record; `end` then says so, with the verdict error."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of the end record that counts."""
        return self.end.verdict


@dataclass(frozen=True)
class DamagedLine:
    """A line of a results file that holds no record."""

    file: str
    number: int
    """Counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}: {self.reason}"


@dataclass(frozen=True)
class Run:
    """All that the records say about a run, over every segment of it."""

    circumstances: Circumstances | None = None
    """Those of the last run-start; None without one."""
    start: float | None = None
    """When the first segment began; seconds since the epoch."""
    finish: float | None = None
    """The time of the last record that has one."""
    segments: int = 0
    """Run-start records seen: more than one where a guest was booted again, or a run was appended to an older one."""
    mixed: bool = False
    """The segments were made on different kernels or machines, so that `circumstances` speak for the last alone."""
    plan: tuple[str, ...] = ()
    tests: tuple[TestOutcome, ...] = ()
    """In the order of their starts, then those that were planned and have no record (verdict not-run)."""
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    complete: bool = False
    """Every file's last segment has its run-end record."""
    run_ends: tuple[RunEnd, ...] = ()
    """That of each file's last segment, where it has one."""
    damaged: tuple[DamagedLine, ...] = ()

    @property
    def open_tests(self) -> tuple[str, ...]:
        """The tests that started and never ended."""
        return tuple(outcome.test for outcome in self.tests if outcome.open)

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many tests had each verdict; every verdict is a key."""
        seen = Counter(outcome.verdict for outcome in self.tests)
        return {verdict: seen[verdict] for verdict in Verdict}

    @property
    def duration(self) -> float:
        """Seconds from the first record to the last."""
        return max(0.0, self.finish - self.start) if self.start is not None and self.finish is not None else 0.0


@dataclass
class _Collector:
    """What the records said so far."""

    circumstances: Circumstances | None = None
    times: list[float] = field(default_factory=list)
    first_start: float | None = None
    segments: int = 0
    mixed: bool = False
    plan: dict[str, None] = field(default_factory=dict)  # an ordered set, as the other two
    starts: dict[str, TestStart | None] = field(default_factory=dict)
    ends: dict[str, TestEnd] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)
    run_end: RunEnd | None = None
    """That of the last segment; None while it lasts."""

    def add(self, record: Record) -> None:
        if not isinstance(record, Plan | Trace):
            self.times.append(record.time)
        match record:
            case RunStart():
                self.mixed = self.mixed or not _same_circumstances(self.circumstances, record.circumstances)
                self.circumstances = record.circumstances
                self.first_start = record.time if self.first_start is None else self.first_start
                self.segments += 1
                self.run_end = None
            case Plan():
                self.plan.update(dict.fromkeys(record.tests))
            case TestStart():
                if record.test in self.open:
                    self.notes[f"{record.test} was started again although its first start has no end"] = None
                self.starts[record.test] = record
                self.open.add(record.test)
            case TestEnd():
                self.starts.setdefault(record.test, None)
                self.ends[record.test] = _end_that_counts(self.ends.get(record.test), record)
                self.open.discard(record.test)
            case Note():
                self.notes[record.text] = None
            case RunEnd():
                self.left_out.update(dict.fromkeys(record.left_out))
                self.run_end = record
            case Heartbeat() | Trace():
                pass

    def run(self, run_ends: Sequence[RunEnd | None], damaged: Sequence[DamagedLine]) -> Run:
        seen = [self._outcome(test, start) for test, start in self.starts.items()]
        missing = [
            _outcome(TestEnd(test, 0.0, Verdict.NOT_RUN, reason=NEVER_CAME), None)
            for test in self.plan
            if test not in self.starts
        ]
        return Run(
            circumstances=self.circumstances,
            start=self.first_start,
            finish=self.times[-1] if self.times else None,
            segments=self.segments,
            mixed=self.mixed,
            plan=tuple(self.plan),
            tests=(*seen, *missing),
            notes=tuple(self.notes),
            left_out=tuple(self.left_out),
            complete=bool(run_ends) and None not in run_ends,
            run_ends=tuple(end for end in run_ends if end),
            damaged=tuple(damaged),
        )

    def _outcome(self, test: str, start: TestStart | None) -> TestOutcome:
        if test not in self.open:
            return _outcome(self.ends[test], start)
        lost = TestEnd(test, start.time if start else 0.0, Verdict.ERROR, reason=NEVER_ENDED)
        return _outcome(_end_that_counts(self.ends.get(test), lost), start, still_open=True)


_OF_ONE_BOOT: Final = ("boot", "resumed")


def _same_circumstances(earlier: Circumstances | None, later: Circumstances) -> bool:
    """Whether two segments differ in nothing but which boot of the guest they are."""
    if earlier is None:
        return True
    return replace(earlier, extra=_lasting(earlier.extra)) == replace(later, extra=_lasting(later.extra))


def _lasting(extra: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in extra.items() if name not in _OF_ONE_BOOT}


def _end_that_counts(earlier: TestEnd | None, later: TestEnd) -> TestEnd:
    """The later end, unless the kernel splatted or died at an earlier go: a second go that passes undoes neither."""
    if earlier and earlier.verdict in (Verdict.SPLAT, Verdict.PANICKED):
        return max(later, earlier, key=lambda end: end.verdict.severity)
    return later


def _outcome(end: TestEnd, start: TestStart | None, still_open: bool = False) -> TestOutcome:
    if start is None:
        return TestOutcome(end.test, end, open=still_open)
    return TestOutcome(end.test, end, _area(start), start.contract, start.rule, still_open)


def _area(start: TestStart) -> str:
    if start.area:
        return start.area
    try:
        return area_of(start.contract[0]) if start.contract else NO_AREA
    except HarnessError:  # written by a version whose catalogue has more areas
        return NO_AREA


def collect(records: Iterable[Record]) -> Run:
    """Return the run that these records make."""
    collector = _Collector()
    for record in records:
        collector.add(record)
    return collector.run([collector.run_end], ())


def read_run(paths: Iterable[str | Path]) -> Run:
    """Return the run whose records are in these files, taken in this order.

    A file may hold several segments. A line that holds no record, such as one that a panic cut, is listed in
    `Run.damaged` and otherwise passed over. Raises HarnessError for a file that cannot be read.
    """
    collector = _Collector()
    damaged: list[DamagedLine] = []
    run_ends: list[RunEnd | None] = []
    for path in paths:
        collector.run_end = None
        _read_file(Path(path), collector, damaged)
        run_ends.append(collector.run_end)
    return collector.run(run_ends, damaged)


def _read_file(path: Path, collector: _Collector, damaged: list[DamagedLine]) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HarnessError(
            f"cannot read the results file {path}: {error.strerror}", hint="name a file that a run wrote"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            collector.add(parse_line(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            damaged.append(DamagedLine(str(path), number, f"not UTF-8 at byte {error.start}"))
        except ValueError as error:
            # What follows the last newline is a line whose writer was stopped.
            cut = "cut short: " if number == len(lines) else ""
            damaged.append(DamagedLine(str(path), number, f"{cut}{error}"))


_RAN: Final = (Verdict.PASSED, Verdict.KNOWN_BUG)
_TEST_FAULTS: Final = (Verdict.FAILED, Verdict.CRASHED, Verdict.TIMEOUT, Verdict.NOT_RUN)


def _code_of_verdicts(run: Run) -> ExitCode:
    seen = {outcome.verdict for outcome in run.tests}
    if seen & {Verdict.PANICKED, Verdict.SPLAT}:
        return ExitCode.KERNEL
    if Verdict.ERROR in seen:
        return ExitCode.HARNESS
    if seen.intersection(_TEST_FAULTS):
        return ExitCode.TEST_FAILED
    return ExitCode.OK if seen.intersection(_RAN) else ExitCode.NOTHING_RAN


def run_fault(run: Run) -> str:
    """Return why the run as a whole is at fault beyond what its tests show, in one line; "" if it is not."""
    if not run.complete:
        return NO_RUN_END
    by_tests = _code_of_verdicts(run)
    for end in run.run_ends:
        if gravest((by_tests, code_of_part(end.exit))) is not by_tests:
            return f"the run ended with exit code {end.exit}, which no test explains"
    return ""


def exit_code(run: Run) -> ExitCode:
    """Return what a process that reports this run must exit with.

    A splat or a panic is KERNEL; else an error or a missing run-end is HARNESS; else a failed, crashed, timed-out or
    planned but not run test is TEST_FAILED; else NOTHING_RAN if no test passed or showed a known bug; else OK. What the
    runner wrote into its run-end makes the code graver, never milder.
    """
    codes = [_code_of_verdicts(run), *(code_of_part(end.exit) for end in run.run_ends)]
    if not run.complete:
        codes.append(ExitCode.HARNESS)
    return gravest(codes)


def by_area(run: Run) -> Mapping[str, Sequence[TestOutcome]]:
    """Return the tests by contract area: the catalogue's areas in its order, then others, those of no area last."""
    groups: dict[str, list[TestOutcome]] = {area.id: [] for area in AREAS}
    for outcome in run.tests:
        groups.setdefault(outcome.area, []).append(outcome)
    groups[NO_AREA] = groups.pop(NO_AREA, [])
    return {area: tests for area, tests in groups.items() if tests}
