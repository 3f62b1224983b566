"""What QEMU's TCG does wrong and the kernel or its guest suffers: as data, how it is recognised and what was seen of it.

A test that meets such a fault is begun again, a few times at most: a kernel that does it every time does it by itself.
"""

import re
from dataclasses import dataclass

from kvmgmem.lab.guest.machine import Machine
from kvmgmem.results.records import Verdict


@dataclass(frozen=True)
class TcgFault:
    """One fault of the emulator: what it does, for a note, and the reasons and the verdicts of tests that it shows in."""

    what: str
    pattern: re.Pattern[str]
    verdicts: frozenset[Verdict]
    chances: int = 5
    """How often a test is begun again for it."""


# A kernel that switches a static key writes an int3 over the place, the rest of the new instruction behind it, and then its
# first byte, with all CPUs in step after each. QEMU before 8.1 may keep a translation made in between (fixed by its commit
# deba78709ae8; a narrower window was reported for 9.2): a CPU takes the int3 long after the kernel has forgotten why it was
# there, and the kernel oopses. With Debian's 7.3.4 and QEMU 7.2 that happened eight times in 1,200 tests, twice of them in
# the one that makes hundreds of VMs.
TORN_CODE = TcgFault(
    "QEMU's TCG does that to kernels that patch their code",
    re.compile(r"kernel oops: Oops: int3\b"),
    frozenset({Verdict.PANICKED, Verdict.SPLAT}),
)

FAULTS = (TORN_CODE,)


def fault_behind(verdict: Verdict, reason: str, machine: Machine) -> TcgFault | None:
    """The emulator's fault that a test of this machine came to its verdict by, as far as one can tell; else None."""
    if machine.accelerator != "tcg" or machine.cpus < 2:
        return None
    return next((fault for fault in FAULTS if verdict in fault.verdicts and fault.pattern.search(reason)), None)
