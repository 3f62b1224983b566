"""debugfs for the runner alone: mounted in a mount namespace of its own, so that the host stays as it was."""

import os
from pathlib import Path

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Errno
from kvmgmem.host import DEBUGFS

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000
_NUMBERS = {"x86_64": {"mount": 165, "unshare": 272}, "aarch64": {"mount": 40, "unshare": 97}}


def mount_privately() -> str:
    """Make debugfs readable at its usual place for this process and its children; "" or why it is not there."""
    if (DEBUGFS / "kvm").is_dir():
        return ""
    if os.geteuid() != 0:
        return "debugfs is not readable without root"
    if "debugfs" not in Path("/proc/filesystems").read_text():
        return "this kernel has no debugfs (CONFIG_DEBUG_FS)"
    numbers = _NUMBERS[os.uname().machine]
    root, none, kind, place = (ffi.new("char[]", text) for text in (b"/", b"none", b"debugfs", bytes(DEBUGFS)))
    steps = (
        syscall(numbers["unshare"], _CLONE_NEWNS),
        syscall(numbers["mount"], address_of(none), address_of(root), 0, _MS_REC_PRIVATE, 0),
        syscall(numbers["mount"], address_of(none), address_of(place), address_of(kind), 0, 0),
    )
    failed = next((answer for answer in steps if isinstance(answer, Errno)), None)
    return f"debugfs cannot be mounted: {failed.name}" if failed is not None else ""
