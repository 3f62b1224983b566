"""One test, one process: a stuck ioctl, a signal or an out-of-memory kill costs that test and nothing else."""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from _pytest.runner import runtestprotocol

from kvmgmem.testing.emulated_cpus import CONFINEMENT
from kvmgmem.testing.known_bugs import LEDGER
from kvmgmem.testing.leaks import Snapshot, left_behind
from kvmgmem.testing.proc_files import read_whole

PR_SET_CHILD_SUBREAPER = 36
KILL_GRACE = 5.0


@dataclass
class ChildOutcome:
    """How the process of a test ended, and what it had to say."""

    reports: list[pytest.TestReport] = field(default_factory=list)
    bugs_shown: tuple[str, ...] = ()
    bugs_absent: tuple[str, ...] = ()
    leaks: list[str] = field(default_factory=list)
    signal: int = 0
    exit_status: int = 0
    timed_out: bool = False
    unkillable: bool = False
    where: str = ""
    strays: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    complete: bool = False
    inner_seconds: float = 0.0


def adopt_orphans() -> None:
    """Become the parent of processes that a test leaves behind, so that they can be found and ended (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True)
class _Fork:
    """A process that waits to be told its test: where it is told, where it reports, where it dumps its stacks."""

    pid: int
    orders: int
    reports: int
    dump: int

    def close(self) -> None:
        for fd in (self.orders, self.reports, self.dump):
            os.close(fd)


class Isolation:
    """Runs each test in a process of its own.

    The next one is forked while the last one ends, if `ahead`: each takes as long as a small test, for there are the page
    tables of forty megabytes to be copied and to be taken down. Not earlier: a test that watches the kernel's memory would
    see it. A test that can use them may run on all of `cpus`, if they are given: where the runner may not.
    """

    def __init__(self, items: Sequence[pytest.Item], ahead: bool = True, cpus: Set[int] = frozenset()) -> None:
        self._ahead = ahead
        self._cpus = cpus
        self._items = list(items)
        self._numbers = {item: number for number, item in enumerate(self._items)}
        self._waiting: _Fork | None = None

    def run(self, item: pytest.Item, limit: float) -> ChildOutcome:
        """Run setup, call and teardown of one test in a forked process, for at most `limit` seconds."""
        child = self._begin(self._numbers[item])
        outcome = ChildOutcome(pids={child.pid})
        try:
            try:
                text = _read_until_closed(child.reports, limit, outcome)
                if outcome.timed_out:
                    outcome.where = _where_it_hangs(child.pid, child.dump)
                elif self._ahead and self._numbers[item] + 1 < len(self._items):
                    with contextlib.suppress(OSError):  # no memory just now; the next test will ask again
                        self._waiting = self._fork(child)
            except KeyboardInterrupt:
                outcome.timed_out = True
                _reap(child.pid, outcome)
                _end_strays(outcome)
                raise
            _reap(child.pid, outcome)
        finally:
            child.close()
        _end_strays(outcome)
        _parse(item, text, outcome)
        return outcome

    def close(self) -> None:
        """Send away the process that waits for a further test."""
        child, self._waiting = self._waiting, None
        if child is not None:
            child.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
            release(child.pid)

    def _begin(self, number: int) -> _Fork:
        """Tell a waiting process which test is its own; or a new one, if there is none or it has not lived so long."""
        order = number.to_bytes(8, "little")
        if self._waiting is not None:
            child, self._waiting = self._waiting, None
            release(child.pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(child.orders, order)
                return child
            child.close()
            os.waitpid(child.pid, 0)
        child = self._fork()
        release(child.pid)
        os.write(child.orders, order)
        return child

    def _fork(self, current: _Fork | None = None) -> _Fork:
        """A process that waits for its order, without what belongs to the `current` one."""
        sys.stdout.flush()
        sys.stderr.flush()
        ordered, orders = os.pipe()
        reports, reported = os.pipe()
        dump = os.memfd_create("kvmgmem-stacks")
        try:
            pid = os.fork()
        except OSError:
            for fd in (ordered, orders, reports, reported, dump):
                os.close(fd)
            raise
        if pid == 0:
            os.close(orders)
            os.close(reports)
            if current is not None:
                current.close()
            _child(self._items, self._cpus, ordered, reported, dump)
        os.close(ordered)
        os.close(reported)
        keep(pid)
        return _Fork(pid, orders, reports, dump)


def _child(items: Sequence[pytest.Item], cpus: Set[int], ordered: int, reported: int, dump: int) -> None:
    """The test's own process; never returns."""
    try:
        if cpus:
            CONFINEMENT.begin(cpus)
        os.setsid()
        faulthandler.register(signal.SIGUSR2, file=dump, all_threads=True, chain=False)
        LEDGER.clear()
        # A collection in the middle of a test would write to all that the runner holds, and so copy it: megabytes, which
        # a test of memory charges sees as its own (7.3.4 base, a whole run: 3.7 MB).
        gc.freeze()
        before = Snapshot.of_a_fork(without=ordered)
        order = os.read(ordered, 8)
        os.close(ordered)
        if order:
            _run(items[int.from_bytes(order, "little")], before, reported)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(70)
    os._exit(0)


def _run(item: pytest.Item, before: Snapshot, reported: int) -> None:
    start = time.perf_counter()
    reports = runtestprotocol(item, log=False, nextitem=None)
    seconds = time.perf_counter() - start
    _send(
        reported,
        {
            "reports": [_packed(item, report) for report in reports],
            "bugs_shown": sorted(LEDGER.shown),
            "bugs_absent": sorted(LEDGER.absent - LEDGER.shown),
            # After a failure the traceback still holds the test's objects.
            "leaks": [] if any(report.failed for report in reports) else left_behind(before),
            "seconds": seconds,
        },
    )


PLAIN = frozenset(vars(pytest.TestReport("", ("", None, ""), {}, "passed", None, "call")))
"""What a report holds that nobody has added anything to."""


def _packed(item: pytest.Item, report: pytest.TestReport) -> dict[str, Any]:
    """A report on its way to the runner: of a phase that passed without a word, only what the runner does not know."""
    if report.passed and not report.sections and vars(report).keys() == PLAIN:
        return {name: getattr(report, name) for name in ("when", "duration", "start", "stop", "user_properties")}
    return {"whole": item.config.hook.pytest_report_to_serializable(config=item.config, report=report)}


def _unpacked(item: pytest.Item, data: dict[str, Any]) -> pytest.TestReport:
    if "whole" in data:
        report: pytest.TestReport = item.config.hook.pytest_report_from_serializable(config=item.config, data=data["whole"])
        return report
    data["user_properties"] = [tuple(pair) for pair in data["user_properties"]]
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "passed", None, **data)


def _send(writer: int, message: dict[str, Any]) -> None:
    data = json.dumps(message, default=str).encode()
    while data:
        data = data[os.write(writer, data) :]


def _read_until_closed(reader: int, limit: float, outcome: ChildOutcome) -> bytes:
    deadline = time.monotonic() + limit
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            outcome.timed_out = True
            break
        chunk = os.read(reader, 1 << 20)
        # A helper process that the test forked may hold the pipe; a whole message ends the wait as well.
        if not chunk or _is_whole(chunks, chunk):
            break
    return b"".join(chunks)


def _is_whole(chunks: list[bytes], chunk: bytes) -> bool:
    chunks.append(chunk)
    if not chunk.endswith(b"}"):
        return False
    try:
        json.loads(b"".join(chunks))
    except ValueError:
        return False
    return True


def _where_it_hangs(pid: int, dump: int) -> str:
    """What the process was doing: Python's stacks, and the kernel's where it may be read."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.2)
    size = os.lseek(dump, 0, os.SEEK_END)
    parts = [os.pread(dump, size, 0).decode(errors="replace")] if size else []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        try:
            parts.append(f"kernel stack of thread {task.name}:\n{(task / 'stack').read_text()}")
        except OSError:
            continue
    return "\n".join(parts)


def _reap(pid: int, outcome: ChildOutcome) -> None:
    """Wait for the process, killing it first if its time is up. One that cannot be killed is left and said so."""
    if outcome.timed_out:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_GRACE
    flags = os.WNOHANG if outcome.timed_out else 0
    while True:
        found, status = os.waitpid(pid, flags)
        if found:
            outcome.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            outcome.exit_status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
            return
        if time.monotonic() > deadline:
            outcome.unkillable = True
            return
        time.sleep(0.01)


def _end_strays(outcome: ChildOutcome) -> None:
    """Kill and reap what the test's process left behind; those are ours, because we adopted them."""
    for child in _children():
        if child.pid in _KEEP:
            continue
        outcome.pids.add(child.pid)
        with contextlib.suppress(psutil.Error):
            outcome.strays.append(f"process {child.pid} ({' '.join(child.cmdline())[:80] or child.name()})")
            child.kill()
            child.wait(KILL_GRACE)


def _children() -> list[psutil.Process]:
    try:
        pids = [int(word) for word in read_whole(f"/proc/self/task/{os.getpid()}/children").split()]
    except OSError:
        return psutil.Process().children()
    return [psutil.Process(pid) for pid in pids if pid not in _KEEP and psutil.pid_exists(pid)]


_KEEP: set[int] = set()


def keep(pid: int) -> None:
    """Name a child of the runner that is no stray: the runner's own helper."""
    _KEEP.add(pid)


def release(pid: int) -> None:
    """A child that was kept is one like others again."""
    _KEEP.discard(pid)


def _parse(item: pytest.Item, text: bytes, outcome: ChildOutcome) -> None:
    try:
        message = json.loads(text)
    except ValueError:
        return
    outcome.reports = [_unpacked(item, data) for data in message["reports"]]
    outcome.bugs_shown = tuple(message["bugs_shown"])
    outcome.bugs_absent = tuple(message["bugs_absent"])
    outcome.leaks = message["leaks"]
    outcome.inner_seconds = message["seconds"]
    outcome.complete = True
