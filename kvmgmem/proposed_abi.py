"""Interfaces that are published as proposals and not merged: the numbers and layouts of their last posting.

They may still change. Ask `kvmgmem.roadmap` whether this kernel has one before taking an answer for its word.
"""

from dataclasses import dataclass

from kvmgmem import entry
from kvmgmem._native import ffi
from kvmgmem.errors import Answer
from kvmgmem.fd import OwnedFd
from kvmgmem.vm import Vm

U64 = 0xFFFF_FFFF_FFFF_FFFF

SET_MEMORY_ATTRIBUTES2 = 0xC080_AED2
"""Posted as an ioctl of the gmem file: struct {offset, size, attributes, flags, error_offset, reserved[11]}, 128 bytes."""

LINK_GUEST_MEMFD = 0xC040_AED6
"""Posted as an ioctl of the VM that gets the new file: struct {fd, flags, reserved[6]}, all u64."""

MEM_USERFAULT = 1 << 3
"""Posted as a slot flag, with the address of a bitmap of pages in what is padding until now."""

ARM_REALM = 1 << 8
"""Posted as a bit of KVM_CREATE_VM's argument on arm64 (CCA)."""


@dataclass(frozen=True)
class Conversion:
    """A request of KVM_SET_MEMORY_ATTRIBUTES2: bytes of the file, and what they shall be."""

    offset: int = 0
    size: int = 0
    attributes: int = 0
    flags: int = 0
    reserved: int = 0


def convert(file: OwnedFd, request: Conversion) -> tuple[Answer, int]:
    """KVM_SET_MEMORY_ATTRIBUTES2: the answer, and `error_offset` as the kernel left it."""
    words = [request.offset, request.size, request.attributes, request.flags, 0, *[request.reserved] * 11]
    raw = ffi.new("uint64_t[16]", [word & U64 for word in words])
    answer = entry.ioctl_struct(file.fileno(), SET_MEMORY_ATTRIBUTES2, raw)
    return answer, int(raw[4])


def link(target: Vm, source: OwnedFd | int, flags: int = 0) -> Answer:
    """KVM_LINK_GUEST_MEMFD: a new file of the source's inode that belongs to the target VM; its descriptor or an `Errno`."""
    number = source if isinstance(source, int) else source.fileno()
    request = ffi.new("uint64_t[8]", [number & U64, flags & U64, *[0] * 6])
    return target.raw.ioctl_struct(LINK_GUEST_MEMFD, request)
