"""Where a trace goes: a file, line by line, each line with the kernel before the call it announces is made."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.results.records import Record, Trace

_HIGH = 900  # out of the way of tests that count on the lowest free descriptor


class TraceFile:
    """An append-only file of JSON lines; every line is one write(2), so lines of several processes never mix."""

    def __init__(self, path: Path) -> None:
        """Make the file; raises `HarnessError` if that fails."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            text = f"cannot write the trace {path}: {error.strerror}"
            raise HarnessError(text, "name a directory you may write") from error
        try:
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
            os.close(fd)
        except OSError:
            self._fd = fd

    def __call__(self, line: dict[str, Any]) -> None:
        """Append one line."""
        os.write(self._fd, to_line(line))

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a trace that is complete but for it."""
    with path.open("ab") as file:
        file.write(to_line(line))


def to_line(line: dict[str, Any]) -> bytes:
    """One line of a trace, ASCII, with its newline."""
    return json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def write_traces(records: Iterable[Record], directory: Path) -> list[Path]:
    """Take the traces that came among a guest's records apart into a file each; returns their paths."""
    files: dict[str, TraceFile] = {}
    for record in records:
        if isinstance(record, Trace):
            if record.test not in files:
                files[record.test] = TraceFile(directory / name_for(record.test))
            files[record.test](dict(record.line))
    for file in files.values():
        file.close()
    return [file.path for file in files.values()]


def name_for(test: str) -> str:
    """A file name for a test's trace: its node id, with what a file name should not hold replaced."""
    kept = "".join(character if character.isalnum() or character in "-_.[]" else "-" for character in test)
    return f"{kept.removeprefix('selftests-')[:180]}.trace"
