"""Opening a descriptor's file once more, through its link in /proc."""

import os

from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd


def link_of(file: OwnedFd) -> str:
    """The link in /proc that stands for an open file of this process."""
    return f"/proc/self/fd/{file.fileno()}"


def try_open(path: str, flags: int) -> Answer:
    """open(2), close-on-exec: the descriptor, or what the kernel answers."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        return Errno(-(error.errno or 0))
