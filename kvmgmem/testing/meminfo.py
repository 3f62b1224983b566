"""How much memory the kernel holds, by /proc/meminfo: what is left when no descriptor can be asked any more."""

from pathlib import Path

from kvmgmem.abi import KiB


def meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes. It counts the whole machine: compare only amounts that dwarf the noise."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KiB
    raise KeyError(f"/proc/meminfo has no {field}")


def unevictable() -> int:
    """Bytes on the unevictable list: gmem pages are there from allocation to release (mapping_set_unevictable)."""
    return meminfo("Unevictable")
