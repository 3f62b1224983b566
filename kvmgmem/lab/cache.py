"""The cache folder: where it is, one lock per entry, and entries that appear whole or not at all."""

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmgmem.errors import HarnessError

MiB = 1 << 20

# What the kernel answers when a write does not fit: no blocks left, the user's quota, the process's RLIMIT_FSIZE.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

# A build on a slow machine can take the better part of an hour; whoever waits for longer than this waits for a ghost.
LOCK_TIMEOUT = 2 * 3600.0


def cache_root() -> Path:
    """The folder below which everything that can be made again is kept; not created here.

    $KVMGMEM_CACHE, else $XDG_CACHE_HOME/kvmgmem, else ~/.cache/kvmgmem.
    """
    if own := os.environ.get("KVMGMEM_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG base directory specification has relative paths ignored.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared.startswith("/") else Path("~/.cache").expanduser()) / "kvmgmem"


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full or read-only disk below `place` into a HarnessError that says where, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_room(place) from error
        if error.errno in _REFUSED:
            raise HarnessError(
                f"cannot write to {error.filename or place}: {error.strerror}",
                "set KVMGMEM_CACHE to a folder that you may write to",
            ) from error
        raise


def no_room(place: Path, needed: int | None = None) -> HarnessError:
    """The error for a full disk at `place`; `needed` is the bytes that the work takes in all, where that is known."""
    wanted = f", and this needs about {size_text(needed)}" if needed else ""
    return HarnessError(
        f"no room left at {place}: {size_text(free_bytes(place))} free{wanted}",
        "free some (`kvmgmem kernel rm` removes what it built), or set KVMGMEM_CACHE to a folder on a larger disk",
    )


def looks_full(place: Path, output: str) -> bool:
    """Whether a command that failed at `place`, and said `output`, failed for want of room.

    Not every tool repeats the kernel's words: GNU tar 1.34 says "Wrote only 1024 of 10240 bytes".
    """
    return "No space left on device" in output or "Disk quota exceeded" in output or free_bytes(place) < MiB


def require_room(place: Path, needed: int) -> None:
    """Raise HarnessError unless the disk that holds `place` has `needed` bytes free for this user."""
    if free_bytes(place) < needed:
        raise no_room(place, needed)


def free_bytes(place: Path) -> int:
    """Bytes that this user can still write at `place`, which need not exist yet."""
    existing = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def tree_bytes(place: Path) -> int:
    """Bytes on disk of a file, or of everything below a folder (as `du` counts, links not followed)."""
    total = place.lstat().st_blocks * 512 if place.exists() else 0
    for folder, _, files in os.walk(place):
        for name in files:
            total += Path(folder, name).lstat().st_blocks * 512
    return total


def size_text(size: int) -> str:
    """A number of bytes for people: "1.4 GB", "73 MB", "0 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextmanager
def locked(
    entry: Path,
    waiting: Callable[[str], None] = lambda _: None,
    *,
    shared: bool = False,
    timeout: float = LOCK_TIMEOUT,
) -> Iterator[None]:
    """Hold the lock of one cache entry, against other processes and other threads of this one.

    Shared holders (who read the entry) exclude only one who is not. `waiting` is called once with a line of text if
    somebody else holds it. The lock file stays: removing it would let two holders in. The kernel drops the lock when its
    holder dies, however it dies.
    Raises HarnessError when the lock is not free within `timeout` seconds.
    """
    with disk_errors(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(entry.parent / f".{entry.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _wait_for_lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, entry, waiting, timeout)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, kind: int, entry: Path, waiting: Callable[[str], None], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    told = False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise HarnessError(
                    f"{entry} is in use by another process (waited {timeout:.0f} s)",
                    f"wait for it, or see who it is: fuser {entry.parent}/.{entry.name}.lock",
                ) from None
            if not told:
                waiting(f"another kvmgmem is at work on {entry.name}, waiting for it")
                told = True
            time.sleep(0.1)
        else:
            return


@contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """A temporary folder beside `entry` that takes its place when the block ends well, and vanishes when it does not.

    Hold the entry's lock: what an earlier holder that was killed left behind is removed first.
    """
    with disk_errors(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        for stale in entry.parent.glob(f".{entry.name}.new-*"):
            shutil.rmtree(stale, ignore_errors=True)
        fresh = entry.parent / f".{entry.name}.new-{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
    try:
        with disk_errors(entry.parent):
            yield fresh
            _replace_folder(fresh, entry)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace_folder(fresh: Path, entry: Path) -> None:
    """Move a folder to where another may be: rename(2) replaces only an empty one."""
    old = fresh.with_name(f"{fresh.name}-old")
    if entry.exists():
        entry.rename(old)
    fresh.rename(entry)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file so that readers see the old content or the new, never a part.

    Raises HarnessError when the disk is full or refuses; then nothing new is left behind.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.parent / f".{path.name}.new-{uuid.uuid4().hex[:8]}"
        try:
            # No fsync: after a power cut the cache is made again.
            fresh.write_bytes(data)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def remove(entry: Path) -> int:
    """Remove a cache entry, file or folder, and say how many bytes that freed."""
    freed = tree_bytes(entry)
    with disk_errors(entry.parent):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    return freed
