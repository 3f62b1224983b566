"""Host memory: mappings whose accesses report signals as values, and the request that makes a memory slot."""

import mmap
import signal
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi
from kvmgmem.abi import PAGE_SIZE, MemFlag
from kvmgmem.errors import Answer, Errno, KvmError

MAP_NORESERVE = 0x4000  # in Python's mmap since 3.13 only


class HasFileno(Protocol):
    """Anything with a file descriptor."""

    def fileno(self) -> int:
        """The descriptor's number."""


@dataclass(frozen=True)
class Fault:
    """A signal that a memory access raised: its number, its si_code and the address it names."""

    signal: signal.Signals
    code: int
    address: int

    def __str__(self) -> str:
        return f"{self.signal.name} (si_code {self.code}) at {self.address:#x}"


class MemoryAccessError(Exception):
    """A host access that was expected to work raised a signal."""

    def __init__(self, what: str, fault: Fault) -> None:
        super().__init__(f"{what}: {fault}")
        self.fault = fault


def _fault_of(raw: Any) -> Fault | None:
    return Fault(signal.Signals(raw.signo), raw.code, raw.address) if raw.signo else None


class Mapping:
    """A range of this process's address space, unmapped once.

    `load`, `store`, `fill`, `read` and `write` raise `MemoryAccessError` when the access raises a signal; `try_load` and
    `try_store` give the `Fault` as a value. Offsets are bytes from the start and may lie outside on purpose.
    """

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self._mapped = True

    @classmethod
    def try_map(
        cls,
        length: int,
        *,
        fd: HasFileno | int = -1,
        offset: int = 0,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
        address: int = 0,
    ) -> "Mapping | Errno":
        """mmap(2), with the error as a value."""
        number = fd if isinstance(fd, int) else fd.fileno()
        answer = syscalls.mmap(address, length, prot, flags, number, offset)
        return answer if isinstance(answer, Errno) else cls(answer, length)

    @classmethod
    def of(cls, fd: HasFileno | int, length: int, offset: int = 0, *, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> Self:
        """A shared mapping of a file; raises `KvmError` if the kernel refuses it."""
        return cls._checked(cls.try_map(length, fd=fd, offset=offset, prot=prot), f"length={length:#x}, offset={offset:#x}")

    @classmethod
    def anonymous(cls, length: int, *, prot: int = mmap.PROT_READ | mmap.PROT_WRITE, populate: bool = False) -> Self:
        """Private anonymous memory, as a VMM gives to plain slots."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | (mmap.MAP_POPULATE if populate else 0)
        return cls._checked(cls.try_map(length, prot=prot, flags=flags), f"length={length:#x}, anonymous")

    @classmethod
    def _checked(cls, mapping: "Mapping | Errno", arguments: str) -> Self:
        if isinstance(mapping, Errno):
            raise KvmError("mmap", arguments, mapping)
        mapping._mapped = False  # ownership of the range passes to the new object
        return cls(mapping.address, mapping.length)

    def try_load(self, offset: int = 0, width: int = 8) -> int | Fault:
        """Read `width` bytes (1, 2, 4 or 8) at `offset`, little endian, or say which signal it raised."""
        raw = ffi.new("struct kvmgmem_fault *")
        value = entry.native.kvmgmem_load(self.address + offset, width, raw)
        return _fault_of(raw) or int(value)

    def try_store(self, value: int, offset: int = 0, width: int = 8) -> Fault | None:
        """Write `width` bytes at `offset`; None if it worked, else the signal it raised."""
        raw = ffi.new("struct kvmgmem_fault *")
        entry.native.kvmgmem_store(self.address + offset, width, value, raw)
        return _fault_of(raw)

    def load(self, offset: int = 0, width: int = 8) -> int:
        """Read `width` bytes at `offset`."""
        value = self.try_load(offset, width)
        if isinstance(value, Fault):
            raise MemoryAccessError(f"load of {width} bytes at offset {offset:#x}", value)
        return value

    def store(self, value: int, offset: int = 0, width: int = 8) -> None:
        """Write `width` bytes at `offset`."""
        fault = self.try_store(value, offset, width)
        if fault:
            raise MemoryAccessError(f"store of {width} bytes at offset {offset:#x}", fault)

    def fill(self, byte: int, offset: int = 0, length: int | None = None) -> None:
        """Set `length` bytes (default: all) to `byte`."""
        raw = ffi.new("struct kvmgmem_fault *")
        entry.native.kvmgmem_fill(self.address + offset, self.length - offset if length is None else length, byte, raw)
        fault = _fault_of(raw)
        if fault:
            raise MemoryAccessError(f"fill from offset {offset:#x}", fault)

    def is_filled_with(self, byte: int, offset: int = 0, length: int | None = None) -> bool:
        """Whether `length` bytes (default: all) from `offset` are `byte`."""
        raw = ffi.new("struct kvmgmem_fault *")
        span = self.length - offset if length is None else length
        first = entry.native.kvmgmem_first_other(self.address + offset, span, byte, raw)
        fault = _fault_of(raw)
        if fault:
            raise MemoryAccessError(f"read from offset {offset:#x}", fault)
        return bool(first == span)

    def read(self, offset: int, length: int) -> bytes:
        """Copy `length` bytes out of the mapping."""
        raw = ffi.new("struct kvmgmem_fault *")
        buffer = ffi.new("char[]", length)
        entry.native.kvmgmem_copy_in(buffer, self.address + offset, length, raw)
        fault = _fault_of(raw)
        if fault:
            raise MemoryAccessError(f"read of {length} bytes at offset {offset:#x}", fault)
        return bytes(ffi.buffer(buffer, length))

    def write(self, offset: int, data: bytes) -> None:
        """Copy `data` into the mapping."""
        raw = ffi.new("struct kvmgmem_fault *")
        entry.native.kvmgmem_copy_out(self.address + offset, data, len(data), raw)
        fault = _fault_of(raw)
        if fault:
            raise MemoryAccessError(f"write of {len(data)} bytes at offset {offset:#x}", fault)

    def protect(self, prot: int, offset: int = 0, length: int | None = None) -> Answer:
        """mprotect(2) on part of the mapping."""
        return syscalls.mprotect(self.address + offset, self.length - offset if length is None else length, prot)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> Answer:
        """madvise(2) on part of the mapping."""
        return syscalls.madvise(self.address + offset, self.length - offset if length is None else length, advice)

    def resize(self, length: int) -> Answer:
        """mremap(2): grow or shrink the mapping, which may move; its new address."""
        answer = syscalls.mremap(self.address, self.length, length)
        if not isinstance(answer, Errno):
            self.address, self.length = answer, length
        return answer

    def resident_pages(self) -> list[bool]:
        """mincore(2): for each page whether it is up to date in the page cache (allocated alone does not count)."""
        pages = (self.length + PAGE_SIZE - 1) // PAGE_SIZE
        vector = ffi.new("unsigned char[]", pages)
        answer = syscalls.mincore(self.address, self.length, vector)
        if isinstance(answer, Errno):
            raise KvmError("mincore", f"length={self.length:#x}", answer)
        return [bool(vector[page] & 1) for page in range(pages)]

    def unmap(self) -> None:
        """munmap(2); a second call does nothing."""
        if self._mapped:
            self._mapped = False
            syscalls.munmap(self.address, self.length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unmap()

    def __del__(self) -> None:
        if getattr(self, "_mapped", False) and syscalls is not None:
            self.unmap()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address:#x}, {self.length:#x})"


@dataclass(frozen=True)
class MemoryRegion:
    """A request to create, change or delete a memory slot (KVM_SET_USER_MEMORY_REGION2, api.rst 4.140).

    `gpa`, `size`, `hva` and `gmem_offset` are bytes; size 0 deletes. `flags` None means: KVM_MEM_GUEST_MEMFD if a `gmem`
    is given, nothing otherwise; a number is sent as it is. `gmem` may be any descriptor, right or wrong.
    """

    slot: int = 0
    gpa: int = 0
    size: int = 0
    hva: int = 0
    gmem: HasFileno | int | None = None
    gmem_offset: int = 0
    flags: int | None = None
    as_id: int = 0
    pad1: int = 0
    pad2: int = 0

    def but(self, **changes: Any) -> "MemoryRegion":
        """The same request with some fields changed: how a rejection differs from its control."""
        return replace(self, **changes)

    @property
    def slot_word(self) -> int:
        """The `slot` field: address space in the high half, id in the low half; a larger `slot` is sent as it is."""
        return (self.slot | self.as_id << 16) & 0xFFFF_FFFF

    @property
    def flag_word(self) -> int:
        """The `flags` field as sent."""
        if self.flags is not None:
            return self.flags
        return MemFlag.GUEST_MEMFD if self.gmem is not None else 0

    @property
    def gmem_number(self) -> int:
        """The `guest_memfd` field as sent: a descriptor number as u32."""
        if self.gmem is None:
            return 0
        return (self.gmem if isinstance(self.gmem, int) else self.gmem.fileno()) & 0xFFFF_FFFF

    def __str__(self) -> str:
        fields = [f"slot={self.slot}" if not self.as_id else f"slot={self.as_id}:{self.slot}"]
        fields += [f"gpa={self.gpa:#x}", f"size={self.size:#x}", f"hva={self.hva:#x}"]
        known = MemFlag(self.flag_word & sum(MemFlag))
        rest = self.flag_word & ~sum(MemFlag)
        fields.append("flags=" + ("|".join(filter(None, [known.name or "", f"{rest:#x}" if rest else ""])) or "0"))
        if self.gmem is not None:
            fields.append(f"gmem=fd {self.gmem_number} offset={self.gmem_offset:#x}")
        return ", ".join(fields)
