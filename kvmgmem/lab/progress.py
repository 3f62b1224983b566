"""Progress of long work: one line that rewrites itself on a terminal, a calm line now and then elsewhere."""

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

# Often enough to show life in a CI log, rare enough to leave it readable.
PLAIN_INTERVAL = 20.0
TTY_INTERVAL = 0.1


class Progress:
    """A context manager around one piece of work; `update` as often as you like, output is rationed here."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._started = time.monotonic()
        self._next = 0.0 if self._tty else self._started + PLAIN_INTERVAL
        self._dirty = False

    def __enter__(self) -> "Progress":
        if not self._tty:
            self._line(self._title)
        else:
            self.update("")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()
        if kind is None:
            self._line(f"{self._title}: done in {duration_text(time.monotonic() - self._started)}")

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Say how far the work is: `fraction` from 0 to 1 where known, and a few words."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (TTY_INTERVAL if self._tty else PLAIN_INTERVAL)
        share = "" if fraction is None else f" {min(fraction, 1.0) * 100:3.0f}%"
        words = f" {detail}" if detail else ""
        text = f"{self._title}:{share}{words} ({duration_text(now - self._started)})"
        if self._tty:
            self._stream.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            self._stream.flush()
            self._dirty = True
        else:
            self._line(text)

    def note(self, text: str) -> None:
        """A line that stays, whatever the progress line does."""
        self._clear()
        self._line(text)

    def _clear(self) -> None:
        if self._dirty:
            self._stream.write("\r\x1b[K")
            self._dirty = False

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


def duration_text(seconds: float) -> str:
    """A duration for people: "4.2 s", "47 s", "4 min 36 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
