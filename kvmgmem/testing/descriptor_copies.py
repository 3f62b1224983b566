"""Ways to copy a descriptor: all of them give another number for the same open file."""

import fcntl
import os
import socket
from collections.abc import Callable

from kvmgmem import syscalls
from kvmgmem.errors import Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.processes import ChildProcess


def _by_pidfd(gmem: GuestMemfd) -> int:
    pidfd = syscalls.pidfd_open(os.getpid())
    assert not isinstance(pidfd, Errno), pidfd
    with OwnedFd(pidfd):
        copy = syscalls.pidfd_getfd(pidfd, gmem.fileno())
    assert not isinstance(copy, Errno), copy
    return copy


def _by_socket(gmem: GuestMemfd) -> int:
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [gmem.fileno()])
        _, fds, _, _ = socket.recv_fds(receiver, 1, 1)
    return fds[0]


def _by_child(gmem: GuestMemfd) -> int:
    """A forked child sends its inherited descriptor back."""
    with ChildProcess(lambda channel: channel.send(fds=[gmem.fileno()])) as child:
        _, fds = child.channel.receive_with_fds()
    return int(fds[0])


def _onto_a_number(gmem: GuestMemfd) -> int:
    number = os.open("/dev/null", os.O_RDONLY)
    return os.dup2(gmem.fileno(), number, inheritable=False)  # dup3(2) with O_CLOEXEC


COPIES: dict[str, Callable[[GuestMemfd], int]] = {
    "dup": lambda gmem: os.dup(gmem.fileno()),
    "dup2": lambda gmem: os.dup2(gmem.fileno(), os.open("/dev/null", os.O_RDONLY)),
    "dup3": _onto_a_number,
    "F_DUPFD": lambda gmem: fcntl.fcntl(gmem.fileno(), fcntl.F_DUPFD, 100),
    "F_DUPFD_CLOEXEC": lambda gmem: fcntl.fcntl(gmem.fileno(), fcntl.F_DUPFD_CLOEXEC, 100),
    "pidfd_getfd": _by_pidfd,
    "SCM_RIGHTS": _by_socket,
    "fork": _by_child,
}
