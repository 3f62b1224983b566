"""KVM's words for numbers: names of calls, of structure fields and of flags, and back again.

A flag word reads as C would write it (`KVM_MEM_GUEST_MEMFD|0x10`), so that one text serves people, replay and C programs.
"""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

from kvmgmem._native import ffi, lib
from kvmgmem.abi import ExitReason
from kvmgmem.advice import Advice
from kvmgmem.errors import Errno
from kvmgmem.syscalls import NUMBER

U64 = 0xFFFF_FFFF_FFFF_FFFF
SHORT = 64
"""Data up to so many bytes are written in hexadecimal, longer ones packed."""

_PROT = {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4}
_MAP = {
    "MAP_SHARED": 0x01, "MAP_PRIVATE": 0x02, "MAP_FIXED": 0x10, "MAP_ANONYMOUS": 0x20, "MAP_GROWSDOWN": 0x100,
    "MAP_LOCKED": 0x2000, "MAP_NORESERVE": 0x4000, "MAP_POPULATE": 0x8000, "MAP_NONBLOCK": 0x10000, "MAP_STACK": 0x20000,
    "MAP_HUGETLB": 0x40000, "MAP_SYNC": 0x80000, "MAP_FIXED_NOREPLACE": 0x100000,
}  # fmt: skip
_FALLOC = {
    "FALLOC_FL_KEEP_SIZE": 0x01, "FALLOC_FL_PUNCH_HOLE": 0x02, "FALLOC_FL_NO_HIDE_STALE": 0x04,
    "FALLOC_FL_COLLAPSE_RANGE": 0x08, "FALLOC_FL_ZERO_RANGE": 0x10, "FALLOC_FL_INSERT_RANGE": 0x20,
    "FALLOC_FL_UNSHARE_RANGE": 0x40,
}  # fmt: skip
# Constants of the C library's headers; what is not here comes from the binding.
C_LIBRARY: Final[Mapping[str, int]] = {**_PROT, **_MAP, **_FALLOC}

_MEM_FLAGS = ("KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "KVM_MEM_GUEST_MEMFD")
_GMEM_FLAGS = ("GUEST_MEMFD_FLAG_MMAP", "GUEST_MEMFD_FLAG_INIT_SHARED")
_FLAG_FIELDS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("kvm_userspace_memory_region", "flags"): _MEM_FLAGS,
    ("kvm_userspace_memory_region2", "flags"): _MEM_FLAGS,
    ("kvm_create_guest_memfd", "flags"): _GMEM_FLAGS,
    ("kvm_memory_attributes", "attributes"): ("KVM_MEMORY_ATTRIBUTE_PRIVATE",),
}


@cache
def request_names() -> dict[int, str]:
    """Names of KVM's ioctls by their numbers."""
    found: dict[int, str] = {}
    for name in dir(lib):
        value = getattr(lib, name)
        if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == 0xAE:
            found[value] = name
    return found


def request_name(request: int) -> str:
    """The name of an ioctl, or its number in hexadecimal."""
    return request_names().get(request, f"ioctl {request:#x}")


@cache
def syscall_names() -> dict[int, str]:
    """Names of system calls by their numbers on this machine."""
    return {number: name for name, number in NUMBER.items()}


@cache
def _named(prefix: str) -> dict[int, str]:
    return {getattr(lib, name): name for name in dir(lib) if name.startswith(prefix)}


def vm_type(value: int) -> int | str:
    """The argument of KVM_CREATE_VM by name, where it has one."""
    names = {getattr(lib, name): name for name in dir(lib) if name.startswith("KVM_X86_") and name.endswith("_VM")}
    return names.get(value, value)


def capability(value: int) -> int | str:
    """A capability's name, or its number."""
    return _named("KVM_CAP_").get(value, value)


def advice(value: int) -> int | str:
    """The last argument of madvise(2) by name."""
    return f"MADV_{Advice(value).name}" if value in Advice.__members__.values() else value


def flags(value: int, names: Mapping[str, int]) -> int | str:
    """A flag word as C writes it; 0 stays 0."""
    parts = [name for name, bit in names.items() if bit & value]
    rest = value & ~sum(names.values())
    if not parts:
        return value
    return "|".join([*parts, *([hex(rest)] if rest else [])])


def prot(value: int) -> int | str:
    """The prot argument of mmap(2)."""
    return flags(value, _PROT) if value else "PROT_NONE"


def map_flags(value: int) -> int | str:
    """The flags argument of mmap(2)."""
    return flags(value, _MAP)


def falloc_mode(value: int) -> int | str:
    """The mode argument of fallocate(2)."""
    return flags(value, _FALLOC)


def number(value: int | str) -> int:
    """The number behind what `flags` and its like made; raises ValueError for a name that nobody knows."""
    if isinstance(value, int):
        return value
    return sum(_constant(part) for part in value.split("|"))


def _constant(name: str) -> int:
    if name == "PROT_NONE":
        return 0
    if name.startswith("0x"):
        return int(name, 16)
    if name in C_LIBRARY:
        return C_LIBRARY[name]
    if name.startswith("MADV_") and name[5:] in Advice.__members__:
        return int(Advice[name[5:]])
    value = getattr(lib, name, None)
    if not isinstance(value, int):
        raise ValueError(f"{name} is no constant that this version of kvmgmem knows")
    return value


def structure_name(pointer: Any) -> str:
    """The C name of what a cffi pointer points to, without `struct`; "" for arrays of plain numbers."""
    kind = ffi.typeof(pointer)
    return str(kind.item.cname).removeprefix("struct ") if kind.kind == "pointer" and kind.item.kind == "struct" else ""


def structure_fields(pointer: Any) -> dict[str, Any]:
    """The fields of a structure by name, flags by theirs; fields that are zero are left out."""
    return _fields(structure_name(pointer), pointer[0])


def _fields(structure: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in ffi.typeof(value).fields:
        part = _value(field.type, getattr(value, name), structure)
        if part:
            known = _FLAG_FIELDS.get((structure, name))
            if known:
                part = flags(part, {flag: getattr(lib, flag) for flag in known})
            elif (structure, name) == ("kvm_enable_cap", "cap"):
                part = capability(part)
            found[name] = part
    return found


def _value(kind: Any, value: Any, structure: str) -> Any:
    if kind.kind == "primitive":
        return int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    if kind.kind == "struct":
        return _fields(structure, value)
    if kind.kind == "array" and kind.item.kind == "primitive":
        items = [int(value[i]) for i in range(len(value))] if kind.length is not None else []
        return items if any(items) else 0
    return 0  # unions and flexible arrays: those that matter have decoders of their own


def assign(target: Any, values: Mapping[str, Any]) -> None:
    """Put fields as `structure_fields` made them, with plain numbers in them, into a cffi structure."""
    for name, value in values.items():
        if isinstance(value, dict):
            assign(getattr(target, name), value)
        elif isinstance(value, list):
            array = getattr(target, name)
            for index, item in enumerate(value):
                array[index] = item
        else:
            setattr(target, name, number(value))


def pack(data: bytes) -> str:
    """Bytes as text: `hex:...`, or `zlib:...` where that is shorter."""
    if len(data) <= SHORT:
        return f"hex:{data.hex()}"
    return f"zlib:{base64.b64encode(zlib.compress(data, 9)).decode()}"


def unpack(text: str) -> bytes:
    """The bytes that `pack` made text of; raises ValueError if it is none of its making."""
    kind, _, body = text.partition(":")
    if kind == "hex":
        return bytes.fromhex(body)
    if kind == "zlib":
        try:
            return zlib.decompress(base64.b64decode(body, validate=True))
        except zlib.error as error:
            raise ValueError(f"packed data are damaged: {error}") from None
    raise ValueError(f"{kind!r} is no way to write data")


def answer(value: int) -> int | str:
    """A kernel's answer: a count, or the errno's name."""
    return value if value >= 0 else Errno(value).name if value in Errno.__members__.values() else value


def plain(value: object) -> Any:
    """What a test compares, as JSON: errnos by name, dataclasses as objects, anything unknown as its repr."""
    if isinstance(value, Errno):
        return value.name
    if isinstance(value, ExitReason):
        return f"KVM_EXIT_{value.name}"
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return pack(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__, **{field.name: plain(getattr(value, field.name)) for field in fields(value)}}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    return repr(value)
