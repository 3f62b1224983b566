"""Variants of the machine that a kernel is tried on, as data: what differs from the plain guest, and why one wants it.

Beside those with a name, words with an equals sign are variants of their own: `qemu=PROGRAM` is another QEMU, anything else
goes to the kernel's command line, such as a module parameter (`kvm_amd.avic=1`).
"""

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
    qemu: str | None = None


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


def is_variant(name: str) -> bool:
    """Whether this is a variant: one with a name, or words with equals signs."""
    return name in VARIANTS or (bool(name.split()) and all("=" in word for word in name.split()))


def lookup(name: str) -> Variant:
    """The variant of this name, or of these words; raises `HarnessError` (USAGE) if it is neither."""
    if name in VARIANTS:
        return VARIANTS[name]
    if is_variant(name):
        return _of_words(name)
    known = "; ".join(f"{variant.name} ({variant.why})" for variant in VARIANTS.values())
    raise HarnessError(
        f"{name!r} is not a variant",
        f"one of: {known}; a parameter such as kvm_amd.avic=1; or qemu=PROGRAM",
        ExitCode.USAGE,
    )


def _of_words(name: str) -> Variant:
    words = name.split()
    programs = [word.removeprefix("qemu=") for word in words if word.startswith("qemu=")]
    if len(programs) > 1 or "" in programs:
        raise HarnessError(f"{name!r} does not name one QEMU", "give one program: qemu=PROGRAM", ExitCode.USAGE)
    append = " ".join(word for word in words if not word.startswith("qemu="))
    return Variant(" ".join(words), "asked for", append=append, qemu=programs[0] if programs else None)
