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

# QEMU leaves a guest with a nested page fault, and a second time with the host's first fetch behind VMRUN, which it still
# looks up in the nested page tables; no processor can do that. The VMCB, and with it KVM's registers of the vCPU, then hold
# what the host had: in rip the address behind VMRUN, which is the kernel's and no selftest's. QEMU 7.2.22's log (-d in_asm)
# has two "vmexit" for one "vmrun" in such a test, once in 600,000 exits.
SECOND_EXIT = TcgFault(
    "QEMU's TCG left the guest twice for one VMRUN, and the vCPU's registers are the host's",
    re.compile(r"\brip=0xffffffff[89a-f][0-9a-f]{7}\b"),
    frozenset({Verdict.FAILED}),
)

# What comes of it as often (three times in six): KVM injects a page fault into a guest that has the host's state, and whose
# descriptors are as little to be read; the vCPU shuts down, and KVM resets it. A broken kernel can bring that about as well,
# so that such a test is begun again once only.
RESET_AFTER_SECOND_EXIT = TcgFault(
    "QEMU's TCG leaves a guest twice for one VMRUN now and then, which ends in such a shutdown",
    re.compile(r"ExitReason\.SHUTDOWN\b.*\brip=0xfff0\b"),
    frozenset({Verdict.FAILED}),
    chances=1,
)

FAULTS = (TORN_CODE, SECOND_EXIT, RESET_AFTER_SECOND_EXIT)


def fault_behind(verdict: Verdict, reason: str, machine: Machine) -> TcgFault | None:
    """The emulator's fault that a test of this machine came to its verdict by, as far as one can tell; else None."""
    if machine.accelerator != "tcg" or machine.cpus < 2:
        return None
    return next((fault for fault in FAULTS if verdict in fault.verdicts and fault.pattern.search(reason)), None)
