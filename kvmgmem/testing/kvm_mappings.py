"""Which objects of KVM a process has mapped: asked mapping by mapping where the kernel can tell them apart, else read.

A runner has some three hundred mappings, nearly all of them private ones of libraries. To have them all printed takes a
twentieth of the time of a test that does nothing; PROCMAP_QUERY (Linux 6.11) hands out the shared ones alone, of which
there are a handful.
"""

import errno
import fcntl
import os
import struct

from kvmgmem._native import ffi
from kvmgmem.testing.proc_files import read_whole

KVM_FILES = ("kvm-vcpu", "kvm-vm", "kvm-gmem")
"""What the names of KVM's files begin with."""

# include/uapi/linux/fs.h: _IOWR('f', 17, struct procmap_query), 104 bytes, and the flags of a query.
PROCMAP_QUERY = 0xC0686611
SHARED, COVERING_OR_NEXT, FILE_BACKED = 0x08, 0x10, 0x20
_QUERY = struct.Struct("=9Q4I2Q")
_NAME_SIZE = 4096


def kvm_mappings(process: str) -> tuple[str, ...]:
    """The names of the KVM objects that a process (a PID, or `self`) has mapped, one for each mapping.

    Private ones are left out where the kernel can be asked: nothing of KVM's is mapped so. Raises OSError.
    """
    fd = os.open(f"/proc/{process}/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        names = _shared_files(fd)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return _by_text(process)
    finally:
        os.close(fd)
    return tuple(name for name in names if any(word in name for word in KVM_FILES))


def _shared_files(fd: int) -> list[str]:
    found: list[str] = []
    name = ffi.new("char[]", _NAME_SIZE)
    address = 0
    while True:
        flags = SHARED | COVERING_OR_NEXT | FILE_BACKED
        buffer = int(ffi.cast("uintptr_t", name))
        query = bytearray(_QUERY.pack(_QUERY.size, flags, address, 0, 0, 0, 0, 0, 0, 0, 0, _NAME_SIZE, 0, buffer, 0))
        try:
            fcntl.ioctl(fd, PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno == errno.ENOENT:  # there is no further one
                return found
            raise
        address = _QUERY.unpack(query)[4]
        found.append(ffi.string(name).decode(errors="replace"))


def _by_text(process: str) -> tuple[str, ...]:
    maps = read_whole(f"/proc/{process}/maps")
    # Hundreds of lines that are of no interest; they are only taken apart where one is. (Our own library's path has "kvm".)
    if not any(name.encode() in maps for name in KVM_FILES):
        return ()
    lines = maps.decode(errors="replace").splitlines()
    return tuple(line.split(maxsplit=5)[5] for line in lines if any(name in line for name in KVM_FILES))
