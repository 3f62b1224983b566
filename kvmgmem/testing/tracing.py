"""Trace events of the kernel under test, in a buffer of their own that goes when the test does."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Errno, HarnessError
from kvmgmem.syscalls import NUMBER

TRACEFS = Path("/sys/kernel/tracing")
_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000


def _mount_privately() -> None:
    """Mount tracefs where only this process sees it; raises `HarnessError`."""
    none, root, kind, place = (ffi.new("char[]", text) for text in (b"none", b"/", b"tracefs", bytes(TRACEFS)))
    for answer in (
        syscall(NUMBER["unshare"], _CLONE_NEWNS),
        syscall(NUMBER["mount"], address_of(none), address_of(root), 0, _MS_REC_PRIVATE, 0),
        syscall(NUMBER["mount"], address_of(none), address_of(place), address_of(kind), 0, 0),
    ):
        if isinstance(answer, Errno):
            raise HarnessError(f"tracefs cannot be mounted: {answer.name}", "run as root, outside of a confined container")


@contextlib.contextmanager
def traced(event: str, condition: str) -> Iterator[Path]:
    """Record one trace event (`kmem/kmalloc`) of the calling thread; yields the file that holds the text so far.

    `condition` is the event's filter. The buffer is an instance of its own (tracefs `instances/`): the machine's own
    trace is not touched, and nothing stays behind. Raises `HarnessError`, and OSError for an event the kernel lacks.
    """
    if not (TRACEFS / "instances").is_dir():
        _mount_privately()
    instance = TRACEFS / "instances" / f"kvmgmem-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "set_event_pid").write_text(str(threading.get_native_id()))
        (instance / "events" / event / "filter").write_text(condition)
        (instance / "events" / event / "enable").write_text("1")
        yield instance / "trace"
    finally:
        (instance / "events" / event / "enable").write_text("0")
        instance.rmdir()
