"""What a test left behind in its own process: descriptors, threads, mappings of KVM objects, gmem pages behind them."""

import contextlib
import gc
import os
import time
from dataclasses import dataclass, replace

from kvmgmem import syscalls
from kvmgmem.errors import KvmError
from kvmgmem.testing.waiting import TIME_SCALE

FD_DIRECTORY = "/proc/self/fd"
THREAD_LIMIT = 0.5
KVM_MAPPINGS = ("kvm-vcpu", "kvm-vm", "kvm-gmem")


@dataclass(frozen=True)
class Snapshot:
    """A process's descriptors (number to /proc link text), number of threads, and mappings of KVM objects."""

    fds: dict[int, str]
    threads: int
    mappings: tuple[str, ...]

    @classmethod
    def take(cls) -> "Snapshot":
        """What this process holds now."""
        return cls(_fds(), len(os.listdir("/proc/self/task")), _kvm_mappings("self"))

    @classmethod
    def of_a_fork(cls) -> "Snapshot":
        """What this process holds, which has just been forked: one thread, and mappings that its parent has as well.

        The latter are left out: reading a hundred libraries' mappings takes a twentieth of the time of a test that does
        nothing, and whoever finds no mapping of KVM's at the test's end need not know which there were (`left_behind`).
        """
        return cls(_fds(), 1, ())


def _fds() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir(FD_DIRECTORY):
        try:
            found[int(name)] = os.readlink(f"{FD_DIRECTORY}/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def _kvm_mappings(process: str) -> tuple[str, ...]:
    maps = _read_whole(f"/proc/{process}/maps")
    # Hundreds of lines that are of no interest; they are only taken apart where one is. (Our own library's path has "kvm".)
    if not any(name.encode() in maps for name in KVM_MAPPINGS):
        return ()
    lines = maps.decode(errors="replace").splitlines()
    return tuple(line.split(maxsplit=5)[5] for line in lines if any(name in line for name in KVM_MAPPINGS))


def _read_whole(path: str) -> bytes:
    """Read a file of /proc without the layers of `open`: this is done after every test."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = [os.read(fd, 1 << 16)]
        while chunks[-1]:
            chunks.append(os.read(fd, 1 << 16))
    finally:
        os.close(fd)
    return b"".join(chunks)


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
            before = replace(before, mappings=_kvm_mappings(str(os.getppid())))
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
