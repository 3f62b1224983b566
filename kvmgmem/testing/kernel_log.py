"""The kernel's log around a test, read from /dev/kmsg."""

import os
from pathlib import Path

KMSG = Path("/dev/kmsg")
_RECORD_SIZE = 8192


class KernelLog:
    """A reader that stands at the end of the log and hands out what has come since.

    `error` says why the log cannot be read, if so; then `new_lines` gives nothing.
    """

    def __init__(self, path: Path = KMSG) -> None:
        self.error = ""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
            self.new_lines()
        except OSError as error:
            self.error = f"the kernel log cannot be read: {path}: {os.strerror(error.errno or 0)}"

    def new_lines(self) -> list[str]:
        """The lines since the last call, without their prefixes."""
        lines: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD_SIZE)
            except BlockingIOError:
                break
            except BrokenPipeError:
                lines.append("(lines of the kernel log were overwritten before they could be read)")
                continue
            except OSError as error:
                self.error = f"the kernel log cannot be read any more: {os.strerror(error.errno or 0)}"
                break
            if not record:
                break
            # "6,339,5140900,-;text\n KEY=value": the continuation lines are a dictionary for machines.
            lines.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])
        return lines

    def close(self) -> None:
        """Close the log."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
