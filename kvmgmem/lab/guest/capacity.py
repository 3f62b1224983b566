"""How many guests this machine can run side by side."""

import os
from pathlib import Path

QEMU_MEMORY_MIB = 512
"""What QEMU itself takes beside the guest's memory: mostly translated code under TCG."""


def guests_that_fit(memory_mib: int, meminfo: Path = Path("/proc/meminfo")) -> int:
    """How many guests with this much memory fit: one per core, and half of the memory that is available now; at least 1."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            room = int(line.split()[1]) // 1024 // 2
            return max(1, min(len(os.sched_getaffinity(0)), room // (memory_mib + QEMU_MEMORY_MIB)))
    return 1
