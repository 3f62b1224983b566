"""The operations that a sequence is made of: plain data, readable, and one JSON object a line in a file.

Objects are called by the names that the steps which make them give: v0 is a VM's descriptor, f0 one of a gmem, c0 a vCPU,
p0 another process. A step whose object is not there any more, because the step that made it was taken out, is left out too.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvmgmem.abi import PAGE_SIZE, GmemFlag, MemFlag, VmType

P = PAGE_SIZE
MAIN = "main"

ARENA = 1 << 44
"""Where host memory of a sequence lies, in every process: far from what the C library and the loader choose."""
WINDOW = 16 * P
WINDOWS = 12
ARENA_END = ARENA + WINDOWS * WINDOW


@dataclass(frozen=True)
class Step:
    """One operation."""


S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class CreateVm(Step):
    """KVM_CREATE_VM; the new descriptor is called `name`."""

    name: str
    type: int = 0

    def __str__(self) -> str:
        known = self.type in VmType.__members__.values()
        return f"{self.name} = create VM, type {VmType(self.type).label if known else hex(self.type)}"


@dataclass(frozen=True)
class CreateGmem(Step):
    """KVM_CREATE_GUEST_MEMFD on a VM, by process `by`."""

    name: str
    vm: str
    size: int
    flags: int
    by: str = MAIN

    def __str__(self) -> str:
        flags = _flags(GmemFlag, self.flags)
        return f"{self.name} = {self.vm}.create gmem, size {number(self.size)}, flags {flags}{_by(self.by)}"


@dataclass(frozen=True)
class SetRegion(Step):
    """KVM_SET_USER_MEMORY_REGION2 (or without the 2): `slot` is the whole word, `fd` a descriptor's name or a number."""

    vm: str
    slot: int
    gpa: int
    size: int
    flags: int = 0
    hva: int = 0
    fd: str | int = 0
    offset: int = 0
    version: int = 2
    by: str = MAIN

    def __str__(self) -> str:
        at = f"{self.slot >> 16}:{self.slot & 0xFFFF}"
        call = "set region" if self.version == 2 else "set region (V1)"
        text = f"{self.vm}.{call} slot {at}, gpa {self.gpa:#x}, size {number(self.size)}"
        text += f", flags {_flags(MemFlag, self.flags)}, hva {address(self.hva)}"
        if self.flags & MemFlag.GUEST_MEMFD:
            text += f", gmem {self.fd} offset {number(self.offset)}"
        return text + _by(self.by)


@dataclass(frozen=True)
class Fallocate(Step):
    """fallocate(2) on a gmem."""

    fd: str
    mode: int
    offset: int
    length: int
    by: str = MAIN

    def __str__(self) -> str:
        known = {1: "allocate", 3: "punch"}.get(self.mode, f"fallocate mode {self.mode:#x}")
        return f"{self.fd}.{known} offset {number(self.offset)}, length {number(self.length)}{_by(self.by)}"


@dataclass(frozen=True)
class MapFile(Step):
    """mmap(2) of a gmem at a window of the arena; `pages` and `offset` (bytes) say what of it."""

    fd: str
    window: int
    pages: int
    offset: int = 0
    writable: bool = True
    shared: bool = True
    executable: bool = False
    by: str = MAIN

    def __str__(self) -> str:
        how = ("rw" if self.writable else "r") + ("x" if self.executable else "") + ("" if self.shared else ", MAP_PRIVATE")
        return f"window {self.window} = map {self.fd}, {self.pages}P from {number(self.offset)}, {how}{_by(self.by)}"


@dataclass(frozen=True)
class MapMemory(Step):
    """Private anonymous memory at a window of the arena; page n holds the stamp of `seed` + n."""

    window: int
    pages: int
    seed: int

    def __str__(self) -> str:
        return f"window {self.window} = anonymous memory, {self.pages}P filled with {self.seed:#x}..."


@dataclass(frozen=True)
class Unmap(Step):
    """munmap(2) of a window."""

    window: int
    by: str = MAIN

    def __str__(self) -> str:
        return f"unmap window {self.window}{_by(self.by)}"


@dataclass(frozen=True)
class Remove(Step):
    """madvise(MADV_REMOVE) on part of a window."""

    window: int
    page: int
    pages: int
    by: str = MAIN

    def __str__(self) -> str:
        return f"MADV_REMOVE window {self.window} page {self.page}, {self.pages}P{_by(self.by)}"


@dataclass(frozen=True)
class HostLoad(Step):
    """Read the first word of a page of a window."""

    window: int
    page: int
    by: str = MAIN

    def __str__(self) -> str:
        return f"host load window {self.window} page {self.page}{_by(self.by)}"


@dataclass(frozen=True)
class HostStore(Step):
    """Write the first word of a page of a window."""

    window: int
    page: int
    value: int
    by: str = MAIN

    def __str__(self) -> str:
        return f"host store {self.value:#x} at window {self.window} page {self.page}{_by(self.by)}"


@dataclass(frozen=True)
class CreateCpu(Step):
    """KVM_CREATE_VCPU and everything it takes to run: the VM's first vCPU brings the support slot along."""

    name: str
    vm: str

    def __str__(self) -> str:
        return f"{self.name} = {self.vm}.create vCPU"


@dataclass(frozen=True)
class GuestLoad(Step):
    """The guest reads the word at a page."""

    cpu: str
    gpa: int

    def __str__(self) -> str:
        return f"{self.cpu}.load {self.gpa:#x}"


@dataclass(frozen=True)
class GuestStore(Step):
    """The guest writes a word at a page."""

    cpu: str
    gpa: int
    value: int

    def __str__(self) -> str:
        return f"{self.cpu}.store {self.value:#x} at {self.gpa:#x}"


@dataclass(frozen=True)
class SetAttributes(Step):
    """KVM_SET_MEMORY_ATTRIBUTES."""

    vm: str
    gpa: int
    size: int
    attributes: int
    flags: int = 0
    by: str = MAIN

    def __str__(self) -> str:
        what = {0: "shared", 8: "private"}.get(self.attributes, f"attributes {self.attributes:#x}")
        flags = f", flags {self.flags:#x}" if self.flags else ""
        return f"{self.vm}.set {what} gpa {self.gpa:#x}, size {number(self.size)}{flags}{_by(self.by)}"


@dataclass(frozen=True)
class Prefault(Step):
    """KVM_PRE_FAULT_MEMORY."""

    cpu: str
    gpa: int
    size: int
    flags: int = 0

    def __str__(self) -> str:
        flags = f", flags {self.flags:#x}" if self.flags else ""
        return f"{self.cpu}.prefault gpa {self.gpa:#x}, size {number(self.size)}{flags}"


@dataclass(frozen=True)
class Dup(Step):
    """A second descriptor of a file, in the same process."""

    name: str
    fd: str
    by: str = MAIN

    def __str__(self) -> str:
        return f"{self.name} = dup {self.fd}{_by(self.by)}"


@dataclass(frozen=True)
class Send(Step):
    """Send a descriptor from the main process to another one (SCM_RIGHTS)."""

    name: str
    fd: str
    to: str

    def __str__(self) -> str:
        return f"{self.name} = send {self.fd} to {self.to}"


@dataclass(frozen=True)
class Fork(Step):
    """Fork the main process; the child inherits every descriptor and mapping."""

    name: str

    def __str__(self) -> str:
        return f"{self.name} = fork"


@dataclass(frozen=True)
class Kill(Step):
    """Kill a child, which lets go of all it held."""

    process: str

    def __str__(self) -> str:
        return f"kill {self.process}"


@dataclass(frozen=True)
class Close(Step):
    """Close a descriptor."""

    fd: str
    by: str = MAIN

    def __str__(self) -> str:
        return f"close {self.fd}{_by(self.by)}"


@dataclass(frozen=True)
class CloseCpu(Step):
    """Close a vCPU and unmap its kvm_run."""

    cpu: str

    def __str__(self) -> str:
        return f"close {self.cpu}"


@dataclass(frozen=True)
class Look(Step):
    """Read everything: each page of every slot by each vCPU, and each page of every window."""

    def __str__(self) -> str:
        return "look at everything"


KINDS: dict[str, type[Step]] = {
    kind.__name__: kind
    for kind in (
        CreateVm,
        CreateGmem,
        SetRegion,
        Fallocate,
        MapFile,
        MapMemory,
        Unmap,
        Remove,
        HostLoad,
        HostStore,
        CreateCpu,
        GuestLoad,
        GuestStore,
        SetAttributes,
        Prefault,
        Dup,
        Send,
        Fork,
        Kill,
        Close,
        CloseCpu,
        Look,
    )
}


def changed(step: S, **fields: Any) -> S:
    """The step with other values in some fields."""
    return dataclasses.replace(step, **fields)


def to_json(step: Step) -> dict[str, Any]:
    """The step as a JSON object: its kind under "do", and its fields that differ from their defaults."""
    fields = dataclasses.fields(step)
    return {"do": type(step).__name__} | {
        field.name: getattr(step, field.name) for field in fields if getattr(step, field.name) != field.default
    }


def from_json(data: dict[str, Any]) -> Step:
    """The step of a JSON object; raises ValueError that says what is wrong with it."""
    fields = dict(data)
    kind = KINDS.get(str(fields.pop("do", "")))
    if kind is None:
        raise ValueError(f"{data.get('do')!r} is not a step; one of {', '.join(KINDS)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{data['do']}: {str(error).partition('() ')[2] or error}") from error


def to_lines(steps: Iterable[Step]) -> str:
    """Steps as JSON lines."""
    return "".join(json.dumps(to_json(step)) + "\n" for step in steps)


def number(value: int) -> str:
    """A number of bytes as people say it: pages, and distances from the ends of the 63- and 64-bit ranges."""
    for power in (64, 63):
        distance = (1 << power) - value
        if 0 < distance <= 64 * P:
            return f"2^{power}-{number(distance)}"
        if power == 63 and 0 <= -distance <= 64 * P:
            return f"2^63+{number(-distance)}" if distance else "2^63"
    if value and value % P == 0 and value // P < 1 << 20:
        return f"{value // P}P"
    return str(value) if -9 <= value <= 9 else f"{value:#x}"


def address(value: int) -> str:
    """A host address: a page of a window of the arena, or the bare number."""
    if ARENA <= value < ARENA_END:
        window, rest = divmod(value - ARENA, WINDOW)
        return f"window {window}" + (f"+{number(rest)}" if rest else "")
    return number(value)


def _flags(kind: type[GmemFlag] | type[MemFlag], value: int) -> str:
    known = kind(value & sum(kind))
    rest = value & ~sum(kind)
    return "|".join(filter(None, [known.name or "", f"{rest:#x}" if rest else ""])) or "0"


def _by(process: str) -> str:
    return "" if process == MAIN else f" (by {process})"
