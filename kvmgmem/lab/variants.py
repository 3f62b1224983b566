"""Variants of the machine that a kernel is tried on, as data: what differs from the plain guest, and why one wants it."""

from dataclasses import dataclass

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode


@dataclass(frozen=True)
class Variant:
    """A machine: kernel parameters to add, and numbers that replace the plain guest's (None: as it is)."""

    name: str
    why: str
    append: str = ""
    numa: int | None = None
    smp: int | None = None
    memory: int | None = None


PLAIN = Variant("plain", "two CPUs, one NUMA node, two-dimensional paging where the CPU has it")

VARIANTS = {
    variant.name: variant
    for variant in (
        PLAIN,
        Variant("npt0", "shadow paging on AMD: no software-protected VMs, prefetch into slots", "kvm_amd.npt=0"),
        Variant("ept0", "shadow paging on Intel", "kvm_intel.ept=0"),
        Variant("tdp_mmu0", "two-dimensional paging by the shadow MMU's code", "kvm.tdp_mmu=0"),
        Variant("numa2", "two NUMA nodes, for policies that have a choice", numa=2),
        Variant("smp1", "one CPU: races by preemption alone", smp=1),
        Variant("small", "512 MiB: what allocation does when memory is short", memory=512),
    )
}


def lookup(name: str) -> Variant:
    """The variant of this name; raises `HarnessError` (USAGE) that lists them if there is none."""
    if name not in VARIANTS:
        known = "; ".join(f"{variant.name} ({variant.why})" for variant in VARIANTS.values())
        raise HarnessError(f"{name!r} is not a variant", f"one of: {known}", ExitCode.USAGE)
    return VARIANTS[name]
