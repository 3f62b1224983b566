"""Where steps are written before they are made, so that a kernel that dies of one leaves its sequence behind.

On a host that is a file. From a guest nothing comes but the results and the console: a selftest writes each step into the
kernel's log, whose last lines are what the supervisor shows of a kernel that died; a search, whose results are its own, puts
each sequence there as one note before its first step. It is known whole by then, because sequences are made on the model
alone.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from kvmgmem.model.play import Journal, journal_line
from kvmgmem.model.steps import Step, from_json, to_json
from kvmgmem.results.records import Note, Record

NOTE = "model sequence: "
MARK = "kvmgmem model: "
"""What a line of the kernel's log or of a console has before a step."""
KMSG = Path("/dev/kmsg")
UNLIMITED = Path("/proc/sys/kernel/printk_devkmsg")
"""The kernel takes few lines a second from a process unless this is "on" (kernel/printk/printk.c, devkmsg_write)."""


class FileJournal:
    """A file that holds the sequence being played: what is to be played first, then each step as it is made. A context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def begin(self, steps: Sequence[Step]) -> Journal:
        """Start over with a new sequence."""
        os.ftruncate(self._fd, 0)
        self._write(json.dumps({"plan": [to_json(step) for step in steps]}) + "\n")
        return lambda at, step: self._write(journal_line(at, step))

    def _write(self, line: str) -> None:
        os.write(self._fd, line.encode("ascii"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self) -> tuple[list[Step], int]:
        """The sequence that was last begun, and the number of the step that was last written; -1 if none was."""
        lines = [line for line in self.path.read_text(encoding="ascii").splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            return [], -1
        steps = [from_json(data) for data in json.loads(lines[0])["plan"]]
        return steps, max((int(json.loads(line)["at"]) for line in lines[1:]), default=-1)


class LogJournal:
    """The kernel's log, for guests: root may write there, and what was written is on the console at once. A context."""

    def __init__(self, path: Path = KMSG) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._count = 0
        with contextlib.suppress(OSError):
            UNLIMITED.write_text("on")

    def begin(self, steps: Sequence[Step]) -> Journal:
        """Say that a new sequence begins."""
        self._count += 1
        self._write({"sequence": self._count, "steps": len(steps)})
        return lambda _, step: self._write(to_json(step))

    def _write(self, data: object) -> None:
        os.write(self._fd, f"<6>{MARK}{json.dumps(data)}\n".encode("ascii"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class NoteJournal:
    """Notes in the stream of results, one a sequence."""

    def __init__(self, write: Callable[[Record], None]) -> None:
        self._write = write

    def begin(self, steps: Sequence[Step]) -> None:
        """Write a sequence down."""
        self._write(Note(time.time(), NOTE + json.dumps([to_json(step) for step in steps])))


def noted(text: str) -> list[Step] | None:
    """The sequence that a note holds; None if it is another note."""
    if not text.startswith(NOTE):
        return None
    return [from_json(data) for data in json.loads(text.removeprefix(NOTE))]
