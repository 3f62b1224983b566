"""The guest's side of coverage: what the kernel has counted since it booted, one message for each file that gcov keeps.

The counters are in debugfs, below gcov/, at the places of the object files on the machine that built the kernel
(kernel/gcov/fs.c, Linux 7.3). They live in memory: with the kernel they are gone.
"""

import base64
import zlib
from collections.abc import Iterator
from pathlib import Path

GCOV = Path("/sys/kernel/debug/gcov")
COUNTERS, END = "counters", "counters-end"
"""Records on the control port: the counters of one object file, and how many of these there were."""


def messages(root: Path = GCOV) -> Iterator[tuple[str, dict[str, object]]]:
    """Every message there is to send, by its record and its fields; the last one says how many there were before it."""
    number = 0
    for path in sorted(root.rglob("*.gcda")) if root.is_dir() else ():
        data = base64.b64encode(zlib.compress(path.read_bytes(), 6)).decode()
        yield COUNTERS, {"name": str(path.relative_to(root)), "data": data}
        number += 1
    yield END, {"files": number}
