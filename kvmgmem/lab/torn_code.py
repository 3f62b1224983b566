"""A death that TCG causes and the kernel suffers: code that changes while another CPU's copy of it is being translated.

A kernel that switches a static key writes an int3 over the place, the rest of the new instruction behind it, and then its
first byte, with all CPUs in step after each. QEMU before 8.1 may keep a translation made in between (fixed by its commit
deba78709ae8; a narrower window was reported for 9.2): a CPU takes the int3 long after the kernel has forgotten why it was
there, and the kernel oopses. With Debian's 7.3.4 and QEMU 7.2 that happened eight times in 1,200 tests, twice of them in the
one that makes hundreds of VMs.
"""

import re

from kvmgmem.lab.machine import Machine

SECOND_CHANCES = 5
"""How often a test is begun again for it; a kernel that does it to the same test once more did it by itself."""

_INT3 = re.compile(r"kernel oops: Oops: int3\b")


def looks_torn(reason: str, machine: Machine) -> bool:
    """Whether a death of this machine's kernel with this reason is the emulator's work, as far as one can tell."""
    return machine.accelerator == "tcg" and machine.cpus > 1 and _INT3.search(reason) is not None
