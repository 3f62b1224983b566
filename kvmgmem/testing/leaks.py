"""What a test left behind in its own process: descriptors, threads, mappings of KVM objects, gmem pages behind them."""

import contextlib
import gc
import os
import time
from dataclasses import dataclass, replace

from kvmgmem import syscalls
from kvmgmem.errors import KvmError
from kvmgmem.testing.kvm_mappings import kvm_mappings
from kvmgmem.testing.waiting import TIME_SCALE

FD_DIRECTORY = "/proc/self/fd"
THREAD_LIMIT = 0.5


@dataclass(frozen=True)
class Snapshot:
    """A process's descriptors (number to /proc link text), number of threads, and mappings of KVM objects."""

    fds: dict[int, str]
    threads: int
    mappings: tuple[str, ...]

    @classmethod
    def take(cls) -> "Snapshot":
        """What this process holds now."""
        return cls(_fds(), len(os.listdir("/proc/self/task")), kvm_mappings("self"))

    @classmethod
    def of_a_fork(cls, without: int) -> "Snapshot":
        """What this process holds, which has just been forked: one thread, and mappings that its parent has as well.

        The descriptor `without` is about to be closed.

        The latter are left out: reading a hundred libraries' mappings takes a twentieth of the time of a test that does
        nothing, and whoever finds no mapping of KVM's at the test's end need not know which there were (`left_behind`).
        """
        fds = _fds()
        fds.pop(without, None)
        return cls(fds, 1, ())


def _fds() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir(FD_DIRECTORY):
        try:
            found[int(name)] = os.readlink(f"{FD_DIRECTORY}/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def left_behind(before: Snapshot) -> list[str]:
    """What is there now and was not `before`, a line each; objects that only wait for the garbage collector do not count.

    `before` is that of a fork (`of_a_fork`), whose parent has stayed as it was.
    """
    after = Snapshot.take()
    if after == before:
        return []
    gc.collect()
    after = Snapshot.take()
    # Thread.join returns a moment before the kernel's task is gone (Python 3.11 releases its lock first).
    deadline = time.monotonic() + THREAD_LIMIT * TIME_SCALE
    while after.threads > before.threads and time.monotonic() < deadline:
        time.sleep(0.001)
        after = Snapshot.take()
    if after.mappings:
        with contextlib.suppress(OSError):  # of a test that has given up its right to look: all of them are new then
            before = replace(before, mappings=kvm_mappings(str(os.getppid())))
    return [*_new_fds(before, after), *_new_threads(before, after), *_new_mappings(before, after)]


def _new_fds(before: Snapshot, after: Snapshot) -> list[str]:
    new = {number: text for number, text in after.fds.items() if before.fds.get(number) != text}
    return [f"descriptor {number}: {text}{_pages_of(number, text)}" for number, text in sorted(new.items())]


def _pages_of(number: int, text: str) -> str:
    if "kvm-gmem" not in text:
        return ""
    try:
        return f" with {syscalls.cachestat(number, 0, 0)} allocated pages"
    except KvmError:
        return ""


def _new_threads(before: Snapshot, after: Snapshot) -> list[str]:
    extra = after.threads - before.threads
    return [f"{extra} thread{'s' if extra > 1 else ''}"] if extra > 0 else []


def _new_mappings(before: Snapshot, after: Snapshot) -> list[str]:
    left = list(after.mappings)
    for name in before.mappings:
        if name in left:
            left.remove(name)
    return [f"mapping of {name}" for name in left]
