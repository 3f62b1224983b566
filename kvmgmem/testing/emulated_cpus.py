"""Where CPUs are emulated, all but the tests keeps to the first one.

Under TCG two CPUs of a guest are two threads of QEMU, and on a busy host one of them often has to wait for a core. Whoever
wakes a task on the other CPU holds a lock meanwhile (swake_up_one() that of RCU's wait queue), and what is woken there spins
on it until the waker has got its core again. Two guests on two cores spent a third of their time on that (7.3.4 base,
QEMU 7.2.22: 106 s of processor time for what takes 64 s one guest after the other).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

RCU_THREADS = "rcu_"
"""How the names of the threads begin that RCU has for grace periods (kernel/rcu/tree.c), such as rcu_preempt."""


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


def rcu_threads(proc: Path = Path("/proc")) -> Iterator[int]:
    """The pids of RCU's threads."""
    for name in proc.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().startswith(RCU_THREADS):
                yield int(name.parent.name)
