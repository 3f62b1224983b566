"""A running QEMU: its process, the four channels to the guest, and what the host can see of it from outside."""

import contextlib
import ctypes
import json
import os
import select
import selectors
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.lab.guest.machine import CHANNELS, CONSOLE, CONTROL, QMP, RESULTS, Machine, command_line

PR_SET_PDEATHSIG = 1
MAX_LINE = 4 << 20
"""Bytes after which a line without an end is handed out in pieces; the longest honest record is far below that."""

_READ_SIZE = 1 << 16
_UNTHROTTLED = 1 << 40
"""Bytes a second: the default limit is meant for a network."""
_MIGRATION_ENDS = ("completed", "failed", "cancelled")
_CANCEL_SECONDS = 10.0
_STDERR = "stderr"
_ORDER = (CONSOLE, RESULTS, CONTROL, QMP, _STDERR)


@dataclass(frozen=True)
class Line:
    """One line from a channel, without its end; `cut` if the channel ended, or a limit was reached, in the middle."""

    channel: str
    data: bytes
    cut: bool = False

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


class LineCutter:
    """Cuts what a channel delivers into lines."""

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._rest = b""

    def feed(self, data: bytes) -> list[Line]:
        """Take in what has arrived, and hand out the lines that it completes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [Line(self._channel, line.rstrip(b"\r")) for line in whole]
        if len(self._rest) > MAX_LINE:
            lines += self.finish()
        return lines

    def finish(self) -> list[Line]:
        """Hand out what has no end yet."""
        rest, self._rest = self._rest, b""
        return [Line(self._channel, rest, cut=True)] if rest.strip(b"\r\0") else []


class Qemu:
    """Starts QEMU, and hands out what comes from it; a context manager that leaves no process behind.

    QEMU gets a process group of its own, so that Ctrl-C reaches the supervisor alone, and dies with the supervisor
    however that one ends (PR_SET_PDEATHSIG).
    """

    def __init__(self, machine: Machine) -> None:
        """Start it. Raises HarnessError if there is no such program."""
        self.cpus = machine.all_cpus
        pairs = {name: socket.socketpair() for name in CHANNELS}
        stderr_reader, stderr_writer = os.pipe()
        arguments = command_line(machine, {name: theirs.fileno() for name, (_, theirs) in pairs.items()})
        try:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=stderr_writer,
                stderr=stderr_writer,
                pass_fds=[theirs.fileno() for _, theirs in pairs.values()],
                process_group=0,
                preexec_fn=_dying_with_parent(),  # noqa: PLW1509 - one prctl(2), which takes no lock
            )
        except OSError as error:
            os.close(stderr_reader)
            for ours, _ in pairs.values():
                ours.close()
            raise HarnessError(
                f"cannot start {machine.qemu}: {error.strerror}", hint="install it: apt install qemu-system-x86"
            ) from error
        finally:
            os.close(stderr_writer)
            for _, theirs in pairs.values():
                theirs.close()
        self._sockets = {name: ours for name, (ours, _) in pairs.items()}
        self._files: dict[str, int] = {name: ours.fileno() for name, ours in self._sockets.items()}
        self._files[_STDERR] = stderr_reader
        self._stderr_reader = stderr_reader
        self._cutters = {name: LineCutter(name) for name in self._files}
        self._selector = selectors.DefaultSelector()
        for name, file in self._files.items():
            os.set_blocking(file, False)
            self._selector.register(file, selectors.EVENT_READ, name)
        self.complaints: list[str] = []
        self._kept: list[Line] = []
        self.qmp("qmp_capabilities")

    def __enter__(self) -> "Qemu":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill QEMU if it still runs, wait for it, and close the channels. Calling it twice does no harm."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._selector.close()
        for channel in self._sockets.values():
            channel.close()
        if self._stderr_reader >= 0:
            os.close(self._stderr_reader)
            self._stderr_reader = -1

    @property
    def ended(self) -> bool:
        """Whether every channel has reached its end: QEMU is gone, and what it left has been read."""
        return not self._selector.get_map()

    def wait(self, timeout: float) -> list[Line]:
        """Wait until something comes, for at most `timeout` seconds; lines in channel order, the console's first.

        Console first, because what the kernel said before a record was sent explains that record.
        """
        # Never for ever at a time: a limit may be infinite, which no system call takes.
        ready = {key.data for key, _ in self._selector.select(min(max(0.0, timeout), 60.0))}
        lines, self._kept = self._kept, []
        for name in _ORDER:
            if name in ready or (ready and name == CONSOLE):
                lines += self._read(name)
        self.complaints += [line.text for line in lines if line.channel == _STDERR]
        return [line for line in lines if line.channel != _STDERR]

    def wait_for_console(self, timeout: float) -> list[Line]:
        """Wait for more of the console alone; everything else stays where it is."""
        if CONSOLE not in self._files:
            return []
        select.select([self._files[CONSOLE]], [], [], timeout)
        return self._read(CONSOLE)

    def _read(self, name: str) -> list[Line]:
        if name not in self._files:
            return []
        try:
            data = os.read(self._files[name], _READ_SIZE)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if data:
            return self._cutters[name].feed(data)
        self._selector.unregister(self._files.pop(name))
        return self._cutters[name].finish()

    def send(self, channel: str, message: dict[str, Any]) -> None:
        """Send one JSON line to the guest or to QEMU's monitor; one that is gone is noticed elsewhere."""
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._sockets[channel].setblocking(True)
            self._sockets[channel].settimeout(10.0)
            self._sockets[channel].sendall(data)
            self._sockets[channel].setblocking(False)

    def qmp(self, command: str, **arguments: object) -> None:
        """Give QEMU's monitor a command; its answer comes as a line of the channel `qmp`."""
        self.send(QMP, {"execute": command, **({"arguments": arguments} if arguments else {})})

    def save_state(self, path: Path, limit: float = 60.0) -> bool:
        """Write the state of the running machine to `path`; whether that was done within `limit` seconds.

        Not stopped first: a state that was saved running goes on by itself when it has been read back.
        """
        self.qmp("migrate-set-parameters", **{"max-bandwidth": _UNTHROTTLED})
        # QEMU 8.2 has file: as well; exec: is as old as migration.
        self.qmp("migrate", uri=f"exec:cat > {shlex.quote(str(path))}")
        status = self._migration_end(limit)
        if not status:
            # One that comes to its end later would stop the machine when nobody looks any more.
            self.qmp("migrate_cancel")
            status = self._migration_end(_CANCEL_SECONDS)
        self.qmp("cont")
        return status == "completed"

    def _migration_end(self, limit: float) -> str:
        """How the writing of the state ended: completed, failed or cancelled; "" if it did not within `limit` seconds."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and not self.ended:
            self.qmp("query-migrate")
            select.select([self._files[QMP]], [], [], 0.5)
            lines = self._read(QMP)
            self._kept += lines
            if status := next((found for found in map(_migration_status, lines) if found in _MIGRATION_ENDS), ""):
                return status
            time.sleep(0.01)
        return ""

    def cpu_seconds(self) -> float:
        """CPU time that QEMU has used, all threads together."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def starved_seconds(self) -> float:
        """Time that QEMU's threads have spent runnable but waiting for a CPU of the host (schedstat's second field)."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += int(task.read_text().split()[1])
        return total / 1e9

    def exit_text(self) -> str:
        """How QEMU ended, in words, with the last thing it complained about."""
        code = self.process.poll()
        if code is None:
            how = "still runs"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        complaint = next((line for line in reversed(self.complaints) if line.strip()), "")
        return f"QEMU {how}" + (f": {complaint}" if complaint else "")


def _migration_status(line: Line) -> str:
    """What an answer to `query-migrate` says; "" for any other line of the monitor."""
    try:
        answer = json.loads(line.data)["return"]
    except (ValueError, KeyError, TypeError):
        return ""
    # "status" alone would be the answer to query-status; a migration that has begun tells its set-up time, too.
    return str(answer.get("status", "")) if isinstance(answer, dict) and "setup-time" in answer else ""


def _dying_with_parent() -> Callable[[], None]:
    """What QEMU's process does before it becomes QEMU; the library is loaded here, because after a fork it is late."""
    libc = ctypes.CDLL(None)

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return set_death_signal


__all__ = ["CONSOLE", "CONTROL", "MAX_LINE", "QMP", "RESULTS", "Line", "LineCutter", "Qemu"]
