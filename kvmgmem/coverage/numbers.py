"""What was reached of what is measured: lines and branches by function, and what is known of the rest."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kvmgmem.coverage.catalogue import EVERY_LINE, Catalogue, Measured, Reason
from kvmgmem.coverage.counts import Count, Counts
from kvmgmem.coverage.source import Source
from kvmgmem.errors import HarnessError


@dataclass(frozen=True)
class Line:
    """A line that the compiler made code of."""

    file: str
    number: int
    function: str
    text: str
    after: str
    count: Count
    reason: str = ""
    """Why it is not reached; "" where it is, or where nobody knows."""
    branch_reason: str = ""
    """Why some of its branches are not taken."""

    @property
    def reached(self) -> bool:
        """Whether it ever ran."""
        return self.count.ran > 0

    @property
    def untaken(self) -> int:
        """How many of the branches that leave it were never taken."""
        return sum(taken == 0 for taken in self.count.branches)

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}:{self.number} {self.function or '(no function)'}: {self.text}"


@dataclass(frozen=True)
class Share:
    """So many of so many, and how many of the rest cannot be reached."""

    reached: int
    total: int
    excused: int = 0

    @property
    def percent(self) -> float:
        """Of all; 100 where there is nothing to reach."""
        return 100 * self.reached / self.total if self.total else 100.0

    @property
    def percent_of_reachable(self) -> float:
        """Of what can be reached."""
        return Share(self.reached, self.total - self.excused).percent

    def __str__(self) -> str:
        text = f"{self.reached} of {self.total} ({self.percent:.1f} %)"
        if self.excused:
            text += f", {self.percent_of_reachable:.1f} % of the {self.total - self.excused} that can be reached"
        return text


@dataclass(frozen=True)
class Region:
    """Lines that are counted together: a function, a group of functions, or all that is measured of a file."""

    name: str
    lines: tuple[Line, ...]

    @property
    def line_share(self) -> Share:
        """Lines."""
        excused = sum(not line.reached and bool(line.reason) for line in self.lines)
        return Share(sum(line.reached for line in self.lines), len(self.lines), excused)

    @property
    def branch_share(self) -> Share:
        """Branches: each way out of a line that has several."""
        total = sum(len(line.count.branches) for line in self.lines)
        excused = sum(line.untaken for line in self.lines if line.branch_reason or (line.reason and not line.reached))
        return Share(total - sum(line.untaken for line in self.lines), total, excused)


@dataclass(frozen=True)
class FileResult:
    """All that is measured of one file."""

    measured: Measured
    whole: Region
    functions: tuple[Region, ...]
    absent: tuple[str, ...]
    """Functions that are measured, and that this kernel does not have, or made no code of."""

    def group(self, name: str) -> Region:
        """The functions of one group together."""
        names = (self.measured.groups or {}).get(name, ())
        return Region(name, tuple(line for line in self.whole.lines if line.function in names))


@dataclass(frozen=True)
class Stale:
    """A reason that applies no more, and why not."""

    reason: Reason
    why: str


@dataclass(frozen=True)
class Numbers:
    """The result for every file, and the reasons that are out of date."""

    files: tuple[FileResult, ...]
    stale: tuple[Stale, ...]

    @property
    def lines(self) -> Iterator[Line]:
        """Every measured line."""
        for file in self.files:
            yield from file.whole.lines

    @property
    def to_reach(self) -> list[Line]:
        """The lines that a test is to be written for: unreached, and nobody says why."""
        return [line for line in self.lines if not line.reached and not line.reason]

    @property
    def explained(self) -> list[Line]:
        """The lines that are not reached, and why."""
        return [line for line in self.lines if not line.reached and line.reason]

    @property
    def branches_to_take(self) -> list[Line]:
        """Reached lines of files with an aim for branches, some of whose branches nobody took, or explains."""
        return [
            line
            for file in self.files
            if file.measured.aim_branches
            for line in file.whole.lines
            if line.reached and line.untaken and not line.branch_reason
        ]


def measure(catalogue: Catalogue, sources: Mapping[str, Source], counts: Mapping[str, Counts]) -> Numbers:
    """Put counts, sources and reasons together. Raises HarnessError where a file has no counts at all."""
    files = tuple(
        _measure_file(measured, catalogue, sources[measured.path], counts[measured.path]) for measured in catalogue.files
    )
    return Numbers(files, tuple(_stale(catalogue.reasons, files, sources)))


def _measure_file(measured: Measured, catalogue: Catalogue, source: Source, counts: Counts) -> FileResult:
    if not counts:
        raise HarnessError(f"no line of {measured.path} is in the counters", "was the kernel built with KVM and gcov?")
    wanted = measured.functions
    lines = [
        _line(measured.path, number, found, source)
        for number, found in sorted(counts.items())
        if wanted is None or source.function_of(number) in wanted
    ]
    explained = tuple(_explained(line, catalogue.reasons) for line in lines)
    names = wanted if wanted is not None else tuple(dict.fromkeys(line.function for line in explained))
    regions = tuple(Region(name, tuple(line for line in explained if line.function == name)) for name in names)
    return FileResult(
        measured,
        Region(measured.path, explained),
        tuple(region for region in regions if region.lines),
        tuple(region.name for region in regions if not region.lines),
    )


def _line(file: str, number: int, found: Count, source: Source) -> Line:
    return Line(file, number, source.function_of(number), source.text(number), source.text_before(number), found)


def _explained(line: Line, reasons: Sequence[Reason]) -> Line:
    for reason in reasons:
        if _fits(reason, line):
            line = replace(line, branch_reason=reason.reason) if reason.of_branches else replace(line, reason=reason.reason)
    return line


def _fits(reason: Reason, line: Line) -> bool:
    if (reason.file, reason.function) != (line.file, line.function):
        return False
    return reason.line == EVERY_LINE or (reason.line == line.text and reason.after in ("", line.after))


def _stale(reasons: Iterable[Reason], files: Sequence[FileResult], sources: Mapping[str, Source]) -> Iterator[Stale]:
    lines = [line for file in files for line in file.whole.lines]
    for reason in reasons:
        found = [line for line in lines if _fits(reason, line)]
        if reason.file not in sources:
            yield Stale(reason, f"nothing of {reason.file} is measured")
        elif reason.function and all(function.name != reason.function for function in sources[reason.file].functions):
            yield Stale(reason, f"there is no {reason.function}")
        elif not found:
            yield Stale(reason, f"{reason.function or reason.file} has no such line, or no code was made of it")
        elif len(found) > 1 and reason.line != EVERY_LINE and not reason.after:
            yield Stale(reason, f"the function has {len(found)} such lines: say `after` which line it stands")
        elif reason.of_branches and not any(line.untaken for line in found):
            yield Stale(reason, "all of its branches are taken")
        elif not reason.of_branches and any(line.reached for line in found):
            yield Stale(reason, "it is reached")
