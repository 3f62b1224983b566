"""A memory cgroup for one test: made empty, joined by the test's own processes, and gone afterwards."""

import contextlib
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmgmem.errors import HarnessError
from kvmgmem.testing.waiting import wait_until

_VERSION1 = {"file": "cache", "file_mapped": "mapped_file", "file_dirty": "dirty"}


class MemoryCgroup:
    """A cgroup with the memory controller, of either version (admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).

    A context manager. Processes join it themselves; whoever is in it at the end is moved back to where the test came from.
    """

    def __init__(self) -> None:
        root = memory_root()
        if root is None:
            raise HarnessError("no memory cgroup can be made", "mount cgroup2, or cgroup v1 with the memory controller")
        self._parent = root
        self._controlled: Path | None = None
        self.path = root / f"kvmgmem-{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def _version2(self) -> bool:
        return (self._parent / "cgroup.controllers").exists()

    def __enter__(self) -> Self:
        if self._version2:
            control = self._parent / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
                self._controlled = control
        self.path.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (self._parent / "cgroup.procs").write_text(pid)
        wait_until(self._removed, f"the cgroup {self.path.name} is empty and goes")
        if self._controlled:
            self._controlled.write_text("-memory")

    def _removed(self) -> bool:
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True

    def join(self) -> None:
        """Move the calling process in; what it allocates from here on is charged to the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def usage(self) -> int:
        """Bytes charged to the group, of all kinds."""
        return int((self.path / ("memory.current" if self._version2 else "memory.usage_in_bytes")).read_text())

    def kernel_bytes(self) -> int:
        """Bytes of kernel memory charged to the group."""
        if not self._version2:
            return int((self.path / "memory.kmem.usage_in_bytes").read_text())
        lines = (self.path / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("kernel "))

    def stat(self, name: str) -> int:
        """A field of memory.stat by its name in version 2 (`file`, `shmem`, `unevictable`, ...), in bytes.

        The kernel may be behind by 64 pages a CPU for each of its flushes (mm/memcontrol.c: memcg_vmstats_needs_flush).
        """
        wanted = name if self._version2 else _VERSION1.get(name, name)
        lines = (self.path / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == wanted)

    def limit(self, size: int) -> None:
        """Let the group hold no more than `size` bytes."""
        (self.path / ("memory.max" if self._version2 else "memory.limit_in_bytes")).write_text(str(size))


def memory_root() -> Path | None:
    """Where memory cgroups can be made: the mounted hierarchy with the memory controller, if it is writable."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        place, filesystem, options = Path(fields.split()[4]), rest.split()[0], rest.split()[-1]
        version2 = filesystem == "cgroup2" and "memory" in _text(place / "cgroup.controllers").split()
        version1 = filesystem == "cgroup" and "memory" in options.split(",")
        if (version1 or version2) and os.access(place, os.W_OK):
            return place
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
