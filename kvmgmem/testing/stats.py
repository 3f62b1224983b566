"""KVM's statistics of a VM or a vCPU by name, from their binary form (KVM_GET_STATS_FD, api.rst 4.133)."""

import os
import struct
from types import TracebackType
from typing import Protocol, Self

from kvmgmem import entry
from kvmgmem.fd import OwnedFd

_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = struct.Struct("<IhHII")  # flags, exponent, size, offset, bucket_size; the name follows


class HasStats(Protocol):
    """A VM or a vCPU."""

    def fileno(self) -> int:
        """Its own descriptor."""

    def stats_fd(self) -> OwnedFd:
        """The descriptor of its statistics."""


class Stats:
    """The single-valued statistics (`pages_4k`, `pf_taken`, ...); histograms are left out.

    They can be read while the vCPU runs; only making this object waits for a KVM_RUN to end.
    """

    def __init__(self, of: HasStats) -> None:
        self._of, self._fd = of.fileno(), of.stats_fd()
        _, name_size, count, _, at, self._data = _HEADER.unpack(self._read(0, _HEADER.size))
        stride = _DESCRIPTOR.size + name_size
        described = self._read(at, count * stride)
        self._offsets: dict[str, int] = {}
        for start in range(0, len(described), stride):
            _, _, size, offset, _ = _DESCRIPTOR.unpack_from(described, start)
            if size == 1:
                name = described[start + _DESCRIPTOR.size : start + stride].partition(b"\0")[0].decode()
                self._offsets[name] = offset

    def _read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd.fileno(), length, offset)

    def __getitem__(self, name: str) -> int:
        value = self._value(name)
        return value if entry.watcher is None else entry.watcher.statistic(self._of, name, value)

    def _value(self, name: str) -> int:
        return int.from_bytes(self._read(self._data + self._offsets[name], 8), "little")

    def all(self) -> dict[str, int]:
        """Every one as it stands; a recording has none of them."""
        return {name: self._value(name) for name in self._offsets}

    def close(self) -> None:
        """Close the descriptor."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_stats(of: HasStats) -> dict[str, int]:
    """The statistics of a VM, or of a vCPU that is not running, as they stand; a recording has none of them."""
    with Stats(of) as stats:
        return stats.all()


def read_stat(of: HasStats, name: str) -> int:
    """A statistic of a VM, or of a vCPU that is not running, as it stands; raises KeyError if there is none of the name."""
    with Stats(of) as stats:
        return stats[name]
