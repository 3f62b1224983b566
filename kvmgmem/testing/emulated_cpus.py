"""Where CPUs are emulated, all keeps to the first one it may use but a test that wants more.

Under TCG two CPUs of a guest are two threads of QEMU, and on a busy host one of them often has to wait for a core. Whoever
wakes a task on the other CPU holds a lock meanwhile (swake_up_one() that of RCU's wait queue), and what is woken there spins
on it until the waker has got its core again. Two guests on two cores spent a third of their time on that (7.3.4 base,
QEMU 7.2.22: 106 s of processor time for what takes 64 s one guest after the other). The same goes for a test that waits: the
scheduler has it go on where there is room, which is the other CPU, while the work that it waits for is on the first one.
So a test has the first CPU alone until it can use another one: until it starts a thread or a process, or asks for its CPUs.
In a guest of ours none of these is QEMU's first one, which is spared (kvmgmem.lab.guest.machine).
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

RCU_THREADS = "rcu_"
"""How the names of the threads begin that RCU has for grace periods (kernel/rcu/tree.c), such as rcu_preempt."""

PROCESS_BEGINS = frozenset({"os.fork", "os.posix_spawn", "subprocess.Popen"})
"""Audit events of Python's, raised before there is a further process."""


def emulated() -> bool:
    """Whether this is a guest whose CPUs are emulated."""
    return os.environ.get("KVMGMEM_ACCELERATOR") == "tcg"


def keep_to_first_cpu(*helpers: int) -> set[int]:
    """Have this process, its `helpers` (pids) and, in a guest of ours, RCU's threads run on the first CPU alone.

    Returns the CPUs that this process was allowed to run on, for what is forked from it and is to run on all of them.
    """
    allowed = os.sched_getaffinity(0)
    in_guest = os.environ.get("KVMGMEM_WHERE") == "guest"
    for pid in (0, *helpers, *(rcu_threads() if in_guest else ())):
        with contextlib.suppress(OSError):  # per-CPU threads stay where they are (EINVAL), and one may be gone
            os.sched_setaffinity(pid, {min(allowed)})
    return allowed


class Confinement:
    """Keeps a test's process to the first CPU until it begins something that can run beside it, or asks."""

    def __init__(self) -> None:
        self._cpus: Set[int] = frozenset()

    def begin(self, cpus: Set[int]) -> None:
        """Keep the calling process, which has one thread and ends with its test, to the first of `cpus`."""
        self._cpus = cpus
        os.sched_setaffinity(0, {min(cpus)})
        sys.addaudithook(self._hear)
        # Python 3.11 raises no audit event for a thread.
        start = threading.Thread.start

        def start_beside(thread: threading.Thread) -> None:
            self.end()
            start(thread)

        threading.Thread.start = start_beside  # type: ignore[method-assign, assignment]

    def end(self) -> None:
        """Let the calling thread run on all CPUs that were given, if it is still kept to the first."""
        cpus, self._cpus = self._cpus, frozenset()
        if cpus:
            os.sched_setaffinity(0, cpus)

    def _hear(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if event in PROCESS_BEGINS:
            self.end()


CONFINEMENT = Confinement()
"""Of this process."""


def cpus_to_run_on() -> set[int]:
    """The CPUs on which the caller may run; a test asks here before it chooses some, and may run on all from then on."""
    CONFINEMENT.end()
    return os.sched_getaffinity(0)


def rcu_threads(proc: Path = Path("/proc")) -> Iterator[int]:
    """The pids of RCU's threads."""
    for name in proc.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().startswith(RCU_THREADS):
                yield int(name.parent.name)
