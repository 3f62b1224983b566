"""Kernel image files: is this one, and which release does it say it is."""

import re
from pathlib import Path

from kvmgmem.errors import HarnessError

_HINT = "give the path of a bzImage or vmlinux"
_BANNER = re.compile(rb"Linux version (\S+) ")
_CHUNK = 1 << 20


def is_elf(path: Path) -> bool:
    """Whether a file starts as an ELF file does: a vmlinux, as far as kernels go."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def image_release(path: Path) -> str:
    """The release that a kernel image says it is, "unknown" where a bare vmlinux does not say.

    A bzImage has the magic "HdrS" at 0x202, and at 0x20e the offset of its version string less 0x200
    (Documentation/arch/x86/boot.rst). Raises HarnessError for anything that is neither that nor an x86-64 ELF file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x210)
            if head[0x202:0x206] == b"HdrS":
                file.seek(int.from_bytes(head[0x20E:0x210], "little") + 0x200)
                return file.read(256).split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")
    except OSError as error:
        raise HarnessError(f"cannot read the kernel image {path}: {error.strerror}", _HINT) from error
    if not head.startswith(b"\x7fELF"):
        raise HarnessError(f"{path} is not a kernel image: no boot header, and not an ELF file", _HINT)
    # e_type 2 is an executable (a module is 1), e_machine 62 is x86-64 (System V ABI).
    if int.from_bytes(head[16:18], "little") != 2 or int.from_bytes(head[18:20], "little") != 62:
        raise HarnessError(f"{path} is an ELF file, but not an x86-64 kernel", _HINT)
    return _banner_release(path)


def _banner_release(path: Path) -> str:
    """The release in a vmlinux's banner, read in chunks: with debug information the file can be gigabytes."""
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if banner := _BANNER.search(tail + chunk):
                return banner[1].decode("ascii", "replace")
            tail = chunk[-256:]
    return "unknown"
