"""Append records to a results file or to a guest's port, each on disk or on the wire before the next thing happens."""

import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmgmem.errors import HarnessError
from kvmgmem.results.records import Record, to_line


class ResultStream:
    """An append-only stream of records. Owns its file descriptor; closing twice does no harm.

    Every line leaves in one write(2) where the kernel takes it whole, so that a process that dies can cut at most the
    line it was writing. A virtio port takes at most 32 KiB at a time (port_fops_write in drivers/char/virtio_console.c
    of Linux 7.3), hence the loop, and the lock against a second thread's line in between.
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending, and make it if it is not there. Raises HarnessError if that fails."""
        self.path = str(path)
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY
        try:
            self._fd = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise HarnessError(
                f"cannot open the results file {self.path}: {error.strerror}",
                hint="name a file in a directory that exists and can be written",
            ) from error
        self._end_cut_line()

    def _end_cut_line(self) -> None:
        """Keep a line that an earlier writer left unfinished from swallowing the first one of this writer."""
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return
        with Path(self.path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            last = file.read(1)
        if last not in (b"", b"\n"):
            self._write_all(b"\n")

    def write(self, record: Record) -> None:
        """Append one record. Raises HarnessError if the file does not take it whole."""
        line = to_line(record).encode("ascii") + b"\n"
        with self._lock:
            self._write_all(line)

    def _write_all(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise HarnessError(
                f"cannot write to the results file {self.path}: {error.strerror}",
                hint="the records before this one are kept; make room, or name a file elsewhere",
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
