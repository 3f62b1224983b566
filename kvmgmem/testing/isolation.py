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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from _pytest.runner import runtestprotocol

from kvmgmem.testing.known_bugs import LEDGER
from kvmgmem.testing.leaks import Snapshot, left_behind

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


def run_isolated(item: pytest.Item, limit: float) -> ChildOutcome:
    """Run setup, call and teardown of one test in a forked process, for at most `limit` seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    dump = os.memfd_create("kvmgmem-stacks")
    try:
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(item, writer, dump)
        os.close(writer)
        outcome = ChildOutcome(pids={pid})
        try:
            text = _read_until_closed(reader, limit, outcome)
            if outcome.timed_out:
                outcome.where = _where_it_hangs(pid, dump)
        except KeyboardInterrupt:
            outcome.timed_out = True
            _reap(pid, outcome)
            _end_strays(outcome)
            raise
        finally:
            os.close(reader)
        _reap(pid, outcome)
    finally:
        os.close(dump)
    _end_strays(outcome)
    _parse(item, text, outcome)
    return outcome


def _child(item: pytest.Item, writer: int, dump: int) -> None:
    """The test's own process; never returns."""
    try:
        os.setsid()
        faulthandler.register(signal.SIGUSR2, file=dump, all_threads=True, chain=False)
        LEDGER.clear()
        # A collection in the middle of a test would write to all that the runner holds, and so copy it: megabytes, which
        # a test of memory charges sees as its own (7.3.4 base, a whole run: 3.7 MB).
        gc.freeze()
        before = Snapshot.of_a_fork()
        start = time.perf_counter()
        reports = runtestprotocol(item, log=False, nextitem=None)
        seconds = time.perf_counter() - start
        _send(
            writer,
            {
                "reports": [item.config.hook.pytest_report_to_serializable(config=item.config, report=r) for r in reports],
                "bugs_shown": sorted(LEDGER.shown),
                "bugs_absent": sorted(LEDGER.absent - LEDGER.shown),
                # After a failure the traceback still holds the test's objects.
                "leaks": [] if any(report.failed for report in reports) else left_behind(before),
                "seconds": seconds,
            },
        )
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(70)
    os._exit(0)


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
    quick = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        pids = [int(word) for word in quick.read_text().split()]
    except OSError:
        return psutil.Process().children()
    return [psutil.Process(pid) for pid in pids if pid not in _KEEP and psutil.pid_exists(pid)]


_KEEP: set[int] = set()


def keep(pid: int) -> None:
    """Name a child of the runner that is no stray: the runner's own helper."""
    _KEEP.add(pid)


def _parse(item: pytest.Item, text: bytes, outcome: ChildOutcome) -> None:
    try:
        message = json.loads(text)
    except ValueError:
        return
    hook = item.config.hook
    outcome.reports = [hook.pytest_report_from_serializable(config=item.config, data=data) for data in message["reports"]]
    outcome.bugs_shown = tuple(message["bugs_shown"])
    outcome.bugs_absent = tuple(message["bugs_absent"])
    outcome.leaks = message["leaks"]
    outcome.inner_seconds = message["seconds"]
    outcome.complete = True
