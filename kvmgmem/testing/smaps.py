"""What /proc/self/smaps says of one mapping (Documentation/filesystems/proc.rst)."""

from pathlib import Path

from kvmgmem.abi import KiB
from kvmgmem.memory import Mapping


class Smaps:
    """The entry of the mapping that starts at a given address."""

    def __init__(self, mapping: Mapping) -> None:
        """Read it; raises KeyError if no mapping starts there."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = f"{mapping.address:x}-"
        at = next((number for number, line in enumerate(lines) if line.startswith(start)), None)
        if at is None:
            raise KeyError(f"/proc/self/smaps has no mapping at {mapping.address:#x}")
        self.header = lines[at]
        self._fields: dict[str, str] = {}
        for line in lines[at + 1 :]:
            name, colon, value = line.partition(":")
            if not colon or "-" in name:
                break
            self._fields[name] = value.strip()

    def size(self, field: str) -> int:
        """A field in bytes."""
        return int(self._fields[field].removesuffix(" kB")) * KiB

    def number(self, field: str) -> int:
        """A field without a unit."""
        return int(self._fields[field])

    @property
    def flags(self) -> frozenset[str]:
        """VmFlags: two letters each."""
        return frozenset(self._fields["VmFlags"].split())
