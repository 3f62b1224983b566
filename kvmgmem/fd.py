"""An owned file descriptor: closed once, by the first of `close`, the `with` block and the garbage collector."""

import fcntl
import os
from types import TracebackType
from typing import Self

from kvmgmem import entry


class OwnedFd:
    """Base of every object that stands for a kernel object behind a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor's number; ValueError once it is closed, so that a reused number is never hit by mistake."""
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether this object has given its descriptor up."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if entry.watcher is not None:
                entry.watcher.closing(fd)
            os.close(fd)

    def release(self) -> int:
        """Give the descriptor away unclosed: from here on the caller owns the number."""
        fd, self._fd = self.fileno(), -1
        return fd

    def dup(self, *, cloexec: bool = True) -> "OwnedFd":
        """A second descriptor for the same open file (F_DUPFD or F_DUPFD_CLOEXEC)."""
        command = fcntl.F_DUPFD_CLOEXEC if cloexec else fcntl.F_DUPFD
        copy = fcntl.fcntl(self.fileno(), command, 0)
        if entry.watcher is not None:
            entry.watcher.duplicated(self.fileno(), copy)
        return OwnedFd(copy)

    @property
    def cloexec(self) -> bool:
        """Whether FD_CLOEXEC is set."""
        return bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC)

    def set_cloexec(self, value: bool) -> None:
        """Set or clear FD_CLOEXEC."""
        fcntl.fcntl(self.fileno(), fcntl.F_SETFD, fcntl.FD_CLOEXEC if value else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # At interpreter exit `os` may be gone already; then the kernel closes for us.
        if getattr(self, "_fd", -1) >= 0 and os is not None and entry is not None:
            self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(fd={self._fd if self._fd >= 0 else 'closed'})"
