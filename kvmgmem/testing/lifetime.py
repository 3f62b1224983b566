"""When a VM really dies: KVM's own uevents, read by a process of its own, and debugfs where it is mounted.

KVM announces every VM with `EVENT=create` and its death with `EVENT=destroy`, `PID=` of its creator and `COUNT=` of those
that live (virt/kvm/kvm_main.c, kvm_uevent_notify_change). The watcher is a process and not a thread, because the runner
forks for every test, and because importing pyroute2 takes a second under emulation that nobody then waits for.
"""

import contextlib
import errno
import json
import os
import select
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvmgmem.host import DEBUGFS
from kvmgmem.testing.waiting import TIME_SCALE

READY_LIMIT = 20.0
GONE_LIMIT = 3.0


class WatchError(Exception):
    """The watch on VM lifetimes does not work; the message says why."""


@dataclass
class _Census:
    """The living VMs of this run, by creator's PID: those that its process `runner` or a descendant made; 0 counts all."""

    runner: int = 0
    alive: dict[str, int] = field(default_factory=dict)
    count: int = 0
    lost: bool = False
    """Whether an event did not reach us: for want of room, or of memory, which a test may have made short."""

    def note(self, event: dict[str, str]) -> None:
        self.count = int(event.get("COUNT", 0))
        pid = event.get("PID", "")
        change = {"create": 1, "destroy": -1}.get(event.get("EVENT", ""), 0)
        if change > 0 and self.runner and not descends(int(pid or 0), self.runner):
            return
        self.alive[pid] = self.alive.get(pid, 0) + change
        if self.alive[pid] <= 0:
            del self.alive[pid]


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process is `ancestor` or comes from it; also true of one that is gone, about which nobody can tell."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            return True
    return False


class LifetimeWatch:
    """The runner's side: ask the watcher which VMs of which processes live."""

    def __init__(self) -> None:
        self._older = set(vm_directories())
        to_watcher, self._ask = os.pipe()
        self._hear, from_watcher = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self._hear)
            _serve(to_watcher, from_watcher)
        os.close(to_watcher)
        os.close(from_watcher)
        self._buffer = b""
        self._ready = False
        self._closed = False

    def wait_ready(self) -> None:
        """Wait until the watcher listens; raises `WatchError` with its reason if it cannot."""
        if not self._ready:
            answer = self._line(READY_LIMIT * TIME_SCALE)
            if answer.get("error"):
                raise WatchError(str(answer["error"]))
            self._ready = True

    def alive(self) -> dict[int, int]:
        """The living VMs made since the watch began, by creator's PID; every event sent so far is in it.

        Once an event was lost, debugfs tells them. Raises `WatchError` if neither can.
        """
        self.wait_ready()
        with contextlib.suppress(BrokenPipeError):  # a watcher that died has left word why
            os.write(self._ask, b"?")
        answer = self._line(10 * TIME_SCALE)
        if answer.get("error"):
            raise WatchError(str(answer["error"]))
        if answer["lost"]:
            return self._alive_in_debugfs()
        return {int(pid): count for pid, count in answer["alive"].items()}

    def _alive_in_debugfs(self) -> dict[int, int]:
        if not (DEBUGFS / "kvm").is_dir():
            raise WatchError("an event of KVM's was lost, and debugfs cannot be read")
        creators = [int(name.partition("-")[0]) for name in vm_directories() if name not in self._older]
        return {pid: creators.count(pid) for pid in creators}

    def _line(self, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._hear], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._hear, 65536) if ready else b""
            if not data:
                raise WatchError("the process that reads KVM's uevents " + ("died" if ready else "does not answer"))
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the watcher; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        os.close(self._ask)
        os.close(self._hear)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(questions: int, answers: int) -> None:
    """The watcher's side; never returns."""
    try:
        _watch(questions, answers)
    except BaseException as error:
        message = json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n"
        with contextlib.suppress(OSError):
            os.write(answers, message.encode())
    os._exit(0)


def _watch(questions: int, answers: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's business; it ends us by closing the pipe
    from pyroute2.netlink.uevent import UeventSocket

    # Other VMs may come and go on a host, and outlive their processes as ours must not. A guest has none but ours.
    census = _Census(0 if os.environ.get("KVMGMEM_WHERE") == "guest" else os.getppid())
    uevents = UeventSocket()
    uevents.bind(groups=1)  # the kernel's own events, not udev's copies
    fd = uevents.fileno()
    _enlarge(fd)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(questions, select.POLLIN)
    os.write(answers, b'{"ready": true}\n')
    while True:
        ready = {found for found, _ in poller.poll()}
        # Events first, until there are none: a question is answered with everything that happened before it. The datagrams
        # are read here and only parsed by pyroute2, whose get() keeps further ones in a queue that no poll can see (0.9).
        while select.select([fd], [], [], 0)[0]:
            for event in uevents.marshal.parse(_datagram(fd, census)):
                if event.get("DEVPATH") == "/devices/virtual/misc/kvm" and "EVENT" in event:
                    census.note(event)
        if questions in ready:
            if not os.read(questions, 1):
                os._exit(0)
            os.write(answers, json.dumps(asdict(census)).encode() + b"\n")


def _datagram(fd: int, census: _Census) -> bytes:
    """The next event's datagram; empty, and noted, where the kernel says that one was lost.

    That is ENOBUFS, once (netlink_overrun): the socket was full, or the kernel had no memory for our copy of the event.
    """
    try:
        return os.read(fd, 65536)
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        census.lost = True
        return b""


def _enlarge(fd: int) -> None:
    """Make room for the events of a test that creates thousands of VMs."""
    import socket

    with socket.socket(fileno=os.dup(fd)) as uevents:
        for option in (33, socket.SO_RCVBUF):  # SO_RCVBUFFORCE needs CAP_NET_ADMIN, the other is bounded by a sysctl
            with contextlib.suppress(PermissionError):
                uevents.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
                break


def debugfs_vms(pids: set[int]) -> list[str]:
    """The VMs of these processes that debugfs lists, as `pid-fd`; none where debugfs cannot be read."""
    return [name for name in vm_directories() if int(name.partition("-")[0]) in pids]


def vm_directories() -> list[str]:
    """All VMs that debugfs lists, as `pid-fd` of their creators; none where debugfs cannot be read."""
    try:
        names = os.listdir(DEBUGFS / "kvm")
    except OSError:
        return []
    return [name for name in names if "-" in name and name.partition("-")[0].isdigit()]
