"""Other processes: forked ones that run a function and talk, and exec'd ones that only inherit.

A forked process has a copy of every descriptor and shares no memory descriptor with its parent, which is what the contract
is about; it leaves through os._exit, so nothing of the test's own clean-up happens twice.
"""

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from kvmgmem import entry

TIME_SCALE = float(os.environ.get("KVMGMEM_TIME_SCALE", "1"))
LIMIT = 20.0 * TIME_SCALE
_MESSAGE_SIZE = 1 << 18
_MAX_FDS = 16

T = TypeVar("T")


class ChildError(Exception):
    """The child's function raised, or the child ended without a word; the message holds its traceback or status."""


class Channel:
    """One end of a conversation between two processes: objects that pickle, and descriptors (SCM_RIGHTS)."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Any = None, fds: Sequence[int] = ()) -> None:
        """Send an object and any descriptors."""
        entry.tell("send", fds=fds)
        socket.send_fds(self._socket, [pickle.dumps(message)], list(fds))

    def receive(self, limit: float = LIMIT) -> Any:
        """Wait for an object; raises `ChildError` if the other side is gone or silent for `limit` seconds."""
        return self.receive_with_fds(limit)[0]

    def receive_with_fds(self, limit: float = LIMIT) -> tuple[Any, list[int]]:
        """Wait for an object and the descriptors that came with it; the caller owns those."""
        if not select.select([self._socket], [], [], limit)[0]:
            raise ChildError(f"no message within {limit:g} s")
        data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_SIZE, _MAX_FDS)
        if not data:
            raise ChildError("the other process is gone")
        entry.tell("receive", fds=fds)
        return pickle.loads(data), fds

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


class ChildProcess:
    """A forked process that runs `function(channel)`; killed and reaped at the end of the `with` block.

    `close_fds` names descriptors that the child closes before anything else, so that it holds only what it should.
    """

    def __init__(self, function: Callable[[Channel], Any], *, close_fds: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status: int | None = None
        self.pid = _fork()
        if self.pid == 0:
            ours.close()
            for fd in close_fds:
                if entry.watcher is not None:
                    entry.watcher.closing(fd)
                os.close(fd)
            _run(function, Channel(theirs))
        theirs.close()
        self.channel = Channel(ours)

    def send(self, message: Any = None, fds: Sequence[int] = ()) -> None:
        """Send to the child."""
        self.channel.send(message, fds)

    def receive(self, limit: float = LIMIT) -> Any:
        """The child's next message; raises `ChildError` with the child's traceback if its function raised."""
        message = self.channel.receive(limit)
        if isinstance(message, _Raised):
            raise ChildError(message.text)
        return message

    def result(self, limit: float = LIMIT) -> Any:
        """What the child's function returned."""
        message = self.receive(limit)
        if not isinstance(message, _Returned):
            raise ChildError(f"the child sent {message!r} where its result was due")
        return message.value

    def kill(self) -> None:
        """SIGKILL the child and reap it."""
        if self._status is None:
            entry.tell("kill", peer=self.pid)
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self, limit: float = LIMIT) -> int:
        """Wait for the child to end; its wait status. Raises `ChildError` after `limit` seconds."""
        deadline = time.monotonic() + limit
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
                entry.tell("wait", peer=pid)
            elif time.monotonic() > deadline:
                raise ChildError(f"process {self.pid} did not end within {limit:g} s")
            else:
                time.sleep(0.001)
        return self._status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self.channel.close()


def _fork() -> int:
    # Python warns since 3.12 when a process with threads forks. Ours run inside KVM_RUN and hold no lock of Python's, and a
    # child of a process with running vCPUs is what several rows are about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class _Returned:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _run(function: Callable[[Channel], Any], channel: Channel) -> None:
    """The child's side; never returns."""
    try:
        message: _Returned | _Raised = _Returned(function(channel))
    except BaseException:
        message = _Raised(traceback.format_exc())
    try:
        channel.send(message)
    finally:
        entry.tell("exit")
        os._exit(0)


def in_child(function: Callable[[], T], limit: float = LIMIT) -> T:
    """Run a function in a forked process and return what it returned; raises `ChildError` if it raised."""
    with ChildProcess(lambda _: function()) as child:
        value: T = child.result(limit)
        child.wait()
        return value


def spawn_python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start a fresh interpreter on `code` (sys.argv[1:] are `arguments`) that inherits every descriptor not close-on-exec.

    Only the standard library is there: this is how an exec'd program without our binding behaves.
    """
    entry.tell("exec")
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", code, *arguments],
        close_fds=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
