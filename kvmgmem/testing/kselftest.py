"""A pytest plugin that runs the kernel's own selftests: a directory of programs, each of them one test.

Not loaded by itself: `pytest -p kvmgmem.testing.kselftest DIRECTORY/kselftest`, which is what a guest of
`kvmgmem kselftest` runs. Isolation, leak and kernel log watch, and the records are those of every other test.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmgmem.results.records import TestEnd, TestStart, Verdict
from kvmgmem.testing.kselftest_ktap import Subtest, failure_reason, parse_ktap, skip_reason
from kvmgmem.testing.plugin import SESSION
from kvmgmem.testing.waiting import TIME_SCALE

AREA = "kselftest"
DIRECTORY = "kselftest"
"""The name of a directory whose programs are taken for tests, and what their node ids begin with."""

KSFT_SKIP = 4
"""The exit status of a test that does not apply (tools/testing/selftests/kselftest.h)."""

GRACE = 15.0
"""What the process around a program gets beyond the program's own time, to kill it and say where it was."""

OUTPUT_SHOWN = 32 * 1024
"""Bytes of a failed program's output that are kept, from its end."""


class ProgramError(Exception):
    """A program did not end well; `str()` is the reason in a line, and behind it what it printed."""

    def __init__(self, verdict: Verdict, reason: str, output: str) -> None:
        super().__init__(f"{reason}\n\n{output}".rstrip())
        self.verdict = verdict


class Programs(pytest.Directory):
    """The directory: every executable file in it is a test, by its name; in that order, but for those told to be first."""

    def collect(self) -> Iterator[pytest.Item]:
        # Node ids behind the directory would tell, but pytest takes none there.
        first = self.config.getoption("--kselftest-first").split(",")
        place = {name: number for number, name in enumerate(first)}
        for path in sorted(self.path.iterdir(), key=lambda path: (place.get(path.name, len(place)), path.name)):
            if path.is_file() and os.access(path, os.X_OK):
                yield Program.from_parent(self, name=path.name)


class Program(pytest.Item):
    """One program: passed if it ends with 0, skipped with 4, failed otherwise; its KTAP results become subtests."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.area = AREA
        self.rule = f"{self.name} of {self.config.getoption('--kselftest-of')} ends well"
        # Such a program may do anything to the kernel: it is for guests, or for a host that is asked.
        self.add_marker(pytest.mark.disruptive)
        self.subtests: tuple[Subtest, ...] = ()
        self.limit = self.config.getoption("--test-timeout") * TIME_SCALE
        self.add_marker(pytest.mark.test_timeout(self.limit / TIME_SCALE + GRACE))

    def runtest(self) -> None:
        """Run the program and judge how it ended; raises `ProgramError`, or pytest's exception for a skip."""
        with tempfile.TemporaryFile() as file:
            # A file, not a pipe: a process that the program leaves behind would keep a pipe open.
            status, stacks = self._run(file.fileno())
            file.seek(0)
            output = file.read().decode(errors="replace")
        ktap = parse_ktap(output)
        # A program that skips as a whole says so in the form of a result, too.
        self.subtests = () if status == KSFT_SKIP else ktap.subtests
        shown = output[-OUTPUT_SHOWN:] + stacks
        if status is None:
            raise ProgramError(Verdict.TIMEOUT, f"did not end within {self.limit:g} s", shown)
        if status < 0:
            raise ProgramError(Verdict.CRASHED, f"killed by signal {signal_name(-status)}", shown)
        if status == KSFT_SKIP:
            pytest.skip(skip_reason(output))
        if status:
            raise ProgramError(Verdict.FAILED, failure_reason(output) or f"exit status {status}, without a word", shown)
        if ktap.contradiction:
            raise ProgramError(Verdict.FAILED, ktap.contradiction, shown)

    def _run(self, output: int) -> tuple[int | None, str]:
        """The exit status as `subprocess` has it, None if time was up; and then, where its threads were."""
        program = subprocess.Popen(
            [self.path / self.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=tempfile.gettempdir(),
        )
        try:
            return program.wait(self.limit), ""
        except subprocess.TimeoutExpired:
            stacks = kernel_stacks(program.pid)
            program.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(GRACE / 3)
            return None, stacks

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where pytest says that a failure was; a program has no lines."""
        return self.path, None, self.name

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason and the output; a traceback of this module would tell nobody anything."""
        if isinstance(excinfo.value, ProgramError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


def signal_name(number: int) -> str:
    """SIGSEGV for 11; a real-time signal by its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def kernel_stacks(pid: int) -> str:
    """Where a process's threads are in the kernel, as far as this may be read."""
    parts = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            parts.append(
                f"\nkernel stack of {(task / 'comm').read_text().strip()} {task.name}:\n{(task / 'stack').read_text()}"
            )
    return "".join(parts)


class Subtests:
    """Writes the records of a program's subtests, right behind the program's own."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A start and an end for each; when they began and ended is not known, so they take no time."""
        session = self._config.stash.get(SESSION, None)
        if session is None or report.when != "call":
            return
        for name, verdict, reason in getattr(report, "subtests", ()):
            test, now = f"{report.nodeid}::{name}", time.time()
            session.write(TestStart(test, now, AREA))
            session.write(TestEnd(test, now, Verdict(verdict), reason=reason))
            session.counts[verdict] = session.counts.get(verdict, 0) + 1


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the programs come from, for the records, and their order."""
    parser.addoption("--kselftest-of", metavar="SOURCE", default="an unnamed kernel", help="which kernel tree they are of")
    parser.addoption("--kselftest-first", metavar="NAMES", default="", help="which ones come first, separated by commas")


def pytest_configure(config: pytest.Config) -> None:
    """Name the run, so that beside a run of the selftests it goes by a label of its own."""
    os.environ["KVMGMEM_SUITE"] = f"kselftest of {config.getoption('--kselftest-of')}"
    config.pluginmanager.register(Subtests(config))


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the directory of programs; every other one is none of this plugin's business."""
    return Programs.from_parent(parent, path=path) if path.name == DIRECTORY else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the subtests on a program's report, and the verdict of one that did not simply fail."""
    report = yield
    # Attributes of ours: they survive pytest's serialisation between processes.
    if isinstance(item, Program) and report.when == "call":
        report.__dict__["subtests"] = [[subtest.name, str(subtest.verdict), subtest.reason] for subtest in item.subtests]
    if call.excinfo is not None and isinstance(call.excinfo.value, ProgramError):
        report.__dict__["verdict"] = str(call.excinfo.value.verdict)
    return report
