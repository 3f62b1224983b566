"""Recording selftests: one trace a test, and with it what the test wanted where it says so."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import entry
from kvmgmem.errors import KvmError
from kvmgmem.memory import MemoryAccessError
from kvmgmem.results.records import Circumstances, Trace
from kvmgmem.results.stream import ResultStream
from kvmgmem.testing.vm_directory import tell_denied
from kvmgmem.trace.expectation import ONE_OF
from kvmgmem.trace.file import TraceFile, append, name_for
from kvmgmem.trace.recorder import Sink, recording

THROUGH_RESULTS = "-"
"""In place of a directory: the trace leaves through the results, as it must in a guest whose kernel may die."""


class TracePlugin:
    """Records every selftest that runs in this process, or in one that the runner forks for it."""

    def __init__(self, directory: str, is_ours: Callable[[pytest.Item], bool]) -> None:
        self.directory = directory
        self.is_ours = is_ours
        self.stream: ResultStream | None = None
        self.circumstances: Circumstances | None = None
        self._open = ExitStack()

    def path_of(self, test: str) -> Path | None:
        """The trace file of a test; None where the trace goes through the results."""
        return None if self.directory == THROUGH_RESULTS else Path(self.directory) / name_for(test)

    def _sink(self, test: str) -> Sink:
        path = self.path_of(test)
        if path is None:
            stream = self.stream
            assert stream is not None, "a trace goes through the results, and there are none"
            return lambda line: stream.write(Trace(test, line))
        file = TraceFile(path)
        self._open.callback(file.close)
        return file

    def outlived(self, test: str, directories: Sequence[str]) -> None:
        """VMs were still there when the test and its processes were not: the last line of its trace."""
        line = {"trace": "outlived", "directories": list(directories)}
        path = self.path_of(test)
        if path is not None:
            append(path, line)
        elif self.stream is not None:
            self.stream.write(Trace(test, line))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Begin."""
        if self.is_ours(item):
            rows = [row for mark in item.iter_markers("contract") for row in mark.args]
            rule = getattr(getattr(item, "function", None), "__doc__", None) or ""
            header = {"test": item.nodeid, "contract": rows, "rule": " ".join(rule.partition("\n\n")[0].split())}
            known = asdict(self.circumstances) if self.circumstances else {}
            known.pop("extra", None)
            self._open.enter_context(recording(self._sink(item.nodeid), known, **header))
        yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        """End: what the fixtures close is still in it."""
        try:
            yield
        finally:
            self._open.close()

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """A comparison that failed: what was seen stands on the left, as in `assert answer == Errno.EINVAL`."""
        if entry.watcher is None:
            return
        if op in ("==", "is"):
            entry.watcher.expect(left, right)
        elif op == "in" and isinstance(right, tuple | list):
            entry.watcher.expect(left, {ONE_OF: list(right)})

    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """A call that was to succeed and did not."""
        error: Any = call.excinfo.value if call.excinfo else None
        if entry.watcher is None or call.when == "teardown":
            return
        if isinstance(error, KvmError):
            entry.watcher.expect(error.answer, 0)
        elif isinstance(error, MemoryAccessError):
            entry.watcher.expect(error.fault, 0)
        elif isinstance(error, AssertionError):
            tell_denied(error)
        elif hasattr(error, "result"):  # GuestError, whose module only x86 has
            entry.watcher.expect(error.result, {"answer": 0, "exit": {"is": "IoExit"}})
