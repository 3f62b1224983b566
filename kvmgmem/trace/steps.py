"""A trace, read: each call with its answer as one step, in the order in which the calls were made."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace.recorder import SCHEMA

Value = Any
"""What JSON holds."""
OUTLIVED = "end."
"""How the ids of looks begin that were taken when all processes of a test had ended."""


@dataclass(frozen=True)
class Step:
    """One entry into the kernel, or one touch of memory that the kernel answers for."""

    id: str
    process: str
    """p0 is the test's own process, p1 its first child, p1.1 that one's first."""
    thread: str
    call: str
    on: str
    """The handle it was made on; "" for calls without one."""
    arguments: Mapping[str, Value]
    start: int
    """Its line in the trace, from 0: the order of all calls of all processes."""
    at: int
    """When, in nanoseconds of CLOCK_MONOTONIC."""
    answer: int | str | None = None
    """A count, an errno's name, the handle that was made, or a signal; None if the kernel never answered."""
    out: Mapping[str, Value] = field(default_factory=dict)
    """What the kernel wrote back."""
    end: int = -1
    """The line of the answer; -1 without one."""
    pid: int = 0
    tid: int = 0
    fail_nth: int = 0
    """Which of the allocations that the call makes was to fail (kvmgmem.fail_nth); 0 for none."""
    shortage: str = ""
    """How long memory stays short from that allocation on: a `kvmgmem.fail_nth.Shortage`."""

    @property
    def injected(self) -> bool:
        """Whether the call came to the allocation that was to fail."""
        return bool(self.out.get("injected"))

    @property
    def failed(self) -> bool:
        """Whether the answer is an errno or a signal."""
        return is_errno(self.answer) or (isinstance(self.answer, str) and self.answer.startswith("SIG"))

    @property
    def overlapped(self) -> bool:
        """Whether something else happened before the answer came."""
        return self.end != self.start + 1


@dataclass(frozen=True)
class Expectation:
    """A comparison that the test made, and where in the trace it stands."""

    process: str
    """Whose answer it is about, which may be a child's."""
    line: int
    seen: Value
    wanted: Value
    shows: Value = None
    bug: str = ""
    of: tuple[str, ...] = ()
    """The ids of the steps whose answers were compared, where they are known."""


@dataclass(frozen=True)
class Trace:
    """A whole trace. `complete` says that its end was written: the kernel and the process lived to see it."""

    header: Mapping[str, Value]
    steps: tuple[Step, ...]
    expectations: tuple[Expectation, ...]
    complete: bool
    lines: tuple[Mapping[str, Value], ...] = ()
    """The trace as it was written."""

    def step(self, step_id: str) -> Step | None:
        """The step that goes by an id."""
        return next((step for step in self.steps if step.id == step_id), None)


def is_errno(value: object) -> bool:
    """Whether an answer is an errno's name."""
    return isinstance(value, str) and value[:1] == "E" and value.isalnum() and value.isupper()


def load(path: Path, test: str = "") -> Trace:
    """Read a trace, out of a file, of a directory with one in it, or of the results of a run in a guest.

    Raises `HarnessError` (USAGE) that says what is wrong with the file; a cut last line is what a panic leaves.
    """
    return build(list(_lines(_one_file(path), test)), str(path))


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.trace"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise HarnessError(f"{path} holds {len(found)} traces: {names}", "name one of them", ExitCode.USAGE)
    return found[0]


def _lines(path: Path, test: str) -> Iterator[dict[str, Value]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HarnessError(
            f"cannot read the trace {path}: {error.strerror}", "see `kvmgmem run --trace`", ExitCode.USAGE
        ) from error
    lines = text.splitlines()
    tests: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise HarnessError(f"{path}, line {number} is no JSON", "give a trace", ExitCode.USAGE) from None
        if isinstance(found, dict) and found.get("record") == "trace":
            if test and found["test"] != test:
                continue
            tests.add(found["test"])
            if len(tests) > 1:
                raise HarnessError(f"{path} holds traces of several tests", "name one with --test", ExitCode.USAGE)
            found = found["line"]
        elif isinstance(found, dict) and "record" in found:
            continue
        if not isinstance(found, dict) or "trace" not in found:
            raise HarnessError(f"{path}, line {number} is no line of a trace", "give a trace", ExitCode.USAGE)
        yield found


def build(lines: list[dict[str, Value]], what: str = "the trace") -> Trace:
    """Put calls and answers together; raises `HarnessError` (USAGE) for another schema."""
    if not lines or lines[0].get("trace") != "begin":
        raise HarnessError(f"{what} has no beginning", "give a trace that `kvmgmem run --trace` wrote", ExitCode.USAGE)
    if lines[0].get("schema") != SCHEMA:
        raise HarnessError(
            f"{what} is written in schema {lines[0].get('schema')}, and only schema {SCHEMA} can be read",
            "record it again with this version",
            ExitCode.USAGE,
        )
    answers = {line["id"]: (number, line) for number, line in enumerate(lines) if line["trace"] == "answer"}
    processes = {line["pid"]: line["process"] for line in lines if line["trace"] == "call"}
    steps = [
        _step(number, line, answers.get(line["id"]), processes)
        for number, line in enumerate(lines)
        if line["trace"] == "call"
    ]
    steps = [replace(step, on=_vm_of(step, steps)) if step.call == "lives" else step for step in steps]
    wanted = [_expectation(number, line, processes) for number, line in enumerate(lines) if line["trace"] == "expected"]
    for number, line in enumerate(lines):
        for directory in line["directories"] if line["trace"] == "outlived" else ():
            look = _last_look(number, directory, steps)
            steps.append(look)
            wanted.append(Expectation(look.process, number, look.answer, 0, of=(look.id,)))
    complete = any(line["trace"] == "end" for line in lines)
    return Trace(lines[0], tuple(steps), tuple(wanted), complete, tuple(lines))


def _vm_of(look: Step, steps: list[Step]) -> str:
    """The VM whose directory a look was at: of those that had the name, the last."""
    named = [step for step in steps if step.start < look.start and step.out.get("debugfs") == look.arguments["directory"]]
    return str(named[-1].answer) if named else ""


def _last_look(line: int, directory: str, steps: list[Step]) -> Step:
    """What the runner saw when all processes of the test had ended, as a step of the test's."""
    look = Step(f"{OUTLIVED}{directory}", "p0", "t0", "lives", "", {"directory": directory}, line, 0, answer=1, end=line)
    return replace(look, on=_vm_of(look, steps))


def _step(
    number: int, line: dict[str, Value], answer: tuple[int, dict[str, Value]] | None, processes: Mapping[int, str]
) -> Step:
    arguments = dict(line["arguments"])
    if "pid" in arguments:
        arguments = {**arguments, "of": processes.get(arguments["pid"], "")}
    nothing: dict[str, Value] = {"answer": None}
    end, after = answer if answer else (-1, nothing)
    return Step(
        id=line["id"],
        process=line["process"],
        thread=line["thread"],
        call=line["call"],
        on=line.get("on", ""),
        arguments=arguments,
        start=number,
        at=line["at"],
        answer=after["answer"],
        out=after.get("out", {}),
        end=end,
        pid=line["pid"],
        tid=line["tid"],
        fail_nth=line.get("fail_nth", 0),
        shortage=line.get("shortage", ""),
    )


def _expectation(number: int, line: dict[str, Value], processes: Mapping[int, str]) -> Expectation:
    told = (line["seen"], line["wanted"], line.get("shows"), line.get("bug", ""))
    process = processes.get(line.get("pid", 0), line["process"])
    return Expectation(process, number, *told, tuple(line.get("of", ())))
