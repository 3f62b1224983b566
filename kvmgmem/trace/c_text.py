"""Pieces of C text: numbers, flags, initialisers, arrays, definitions of structures, and long lines broken."""

import re
import signal
import textwrap
from collections.abc import Mapping
from typing import Any

from kvmgmem.arch.x86_64 import programs
from kvmgmem.errors import Errno
from kvmgmem.trace import c_parts
from kvmgmem.trace.expectation import ONE_OF, PREFAULT
from kvmgmem.trace.steps import Step, is_errno

WIDTH = 100
_BREAK = "\x01"  # where a long compound literal may be broken
_EXITS = {
    "IoExit": "KVM_EXIT_IO", "MmioExit": "KVM_EXIT_MMIO", "MemoryFaultExit": "KVM_EXIT_MEMORY_FAULT",
    "HypercallExit": "KVM_EXIT_HYPERCALL", "InternalErrorExit": "KVM_EXIT_INTERNAL_ERROR",
    "FailEntryExit": "KVM_EXIT_FAIL_ENTRY", "SystemEventExit": "KVM_EXIT_SYSTEM_EVENT",
}  # fmt: skip


def includes(text: str) -> str:
    names = ["errno.h", "fcntl.h", "stdint.h", "stdio.h", "stdlib.h", "string.h", "sys/ioctl.h", "unistd.h", "signal.h"]
    for needle, header in (
        ("mmap(", "sys/mman.h"), ("MAP_", "sys/mman.h"), ("madvise(", "sys/mman.h"), ("sigsetjmp", "setjmp.h"),
        ("pthread_", "pthread.h"), ("waitpid", "sys/wait.h"), ("prctl(", "sys/prctl.h"), ("CMSG_", "sys/socket.h"),
        ("socketpair", "sys/socket.h"), ("syscall(", "sys/syscall.h"), ("time(NULL)", "time.h"),
        ("FALLOC_", "linux/falloc.h"),
    ):  # fmt: skip
        if needle in text:
            names.append(header)
    return "#define _GNU_SOURCE\n" + "\n".join(f"#include <{name}>" for name in sorted(set(names)))


def c_number(value: Any) -> str:
    """A number as C writes it: small ones decimal, the rest in hexadecimal."""
    if isinstance(value, str):
        return c_flags(value)
    if isinstance(value, bool) or 0 <= value < 10:
        return str(int(value))
    return str(value) if value < 0 else f"{value:#x}"


def operand(text: str) -> str:
    return text if text.isidentifier() else f"({text})"


def c_flags(value: Any) -> str:
    return " | ".join(value.split("|")) if isinstance(value, str) else c_number(value)


def constant(value: int) -> str:
    return f"{value:#x}" if value >= 0x1000 else str(value)


def constant_order(item: tuple[int, str]) -> tuple[str, int]:
    value, name = item
    group = "0" if value >= 0x1000 else name[:8]
    return group, value & 0xFFFF


def c_answer(value: Any) -> str:
    """An answer as C writes it: `-EEXIST`."""
    if is_errno(value):
        return f"-{Errno[value].name}"
    return c_number(int(value))


def c_wanted(value: Any, got: str = "answer") -> str:
    """What `got` should be: of several right answers any that it is."""
    if isinstance(value, Mapping) and ONE_OF in value:
        right = [c_answer(each) for each in value[ONE_OF]]
        return f"{' || '.join(f'{got} == {each}' for each in right)} ? {got} : {right[0]}"
    return c_answer(0 if value is None else value)


def shown(value: Any) -> str:
    """A value as a sentence holds it; an exit with its fields, as in `EFAULT, KVM_EXIT_MEMORY_FAULT (gpa 0x1000)`."""
    if isinstance(value, list) and len(value) == 2:
        return ", ".join(shown(part) for part in value if part is not None)
    if isinstance(value, Mapping):
        if ONE_OF in value:
            return " or ".join(shown(each) for each in value[ONE_OF])
        if value.get("is") == PREFAULT:
            return f"{shown(value['answer'])} with gpa {value['gpa']:#x}, size {value['size']:#x} left"
        if "answer" in value or "exit" in value:
            return shown([value.get("answer"), value.get("exit")])
        fields = [f"{name} {shown(item)}" for name, item in value.items() if name not in ("is", "reason", "data")]
        name = exit_reason(value) or str(value.get("is", ""))
        return f"{name} ({', '.join(fields)})" if fields else name
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return c_number(value)


def label(step: Step) -> str:
    if step.arguments.get("structure", "").startswith("kvm_userspace_memory") and not step.arguments.get("memory_size"):
        return f"{step.call} (delete)"
    return step.call


def c_comment(text: str) -> list[str]:
    """A comment of one line, or of as many as it takes."""
    lines = textwrap.wrap(text, WIDTH - 14)
    if len(lines) == 1:
        return [f"/* {text} */"]
    return ["/*", *(f" * {line}" for line in lines), " */"]


def exit_reason(found: Mapping[str, Any]) -> str:
    kind = str(found.get("is", ""))
    if kind == "OtherExit":
        return str(found["reason"])
    return _EXITS.get(kind, "")


def run_wanted(wanted: Any) -> tuple[Any, Mapping[str, Any]]:
    """Answer and exit out of what a test wanted of a run, in whichever form it said so."""
    if isinstance(wanted, dict) and ("answer" in wanted or "exit" in wanted):
        return wanted.get("answer"), wanted.get("exit") or {}
    if isinstance(wanted, list) and len(wanted) == 2:
        return wanted[0], wanted[1] or {}
    return None, wanted if isinstance(wanted, dict) else {}


def signal_number(wanted: Mapping[str, Any]) -> str:
    return signal.Signals(int(wanted["signal"])).name


def initialiser(kind: Any, value: Any) -> str:
    """A compound literal of a structure, its fields in the structure's order; a plain number stays one."""
    if kind.kind != "struct":
        return "{ " + ", ".join(c_number(item) for item in value) + " }" if isinstance(value, list) else c_number(value)
    fields = value if isinstance(value, Mapping) else {}
    parts = [
        f".{name} = {initialiser(field_.type, fields[name])}" if not isinstance(fields[name], str)
        else f".{name} = {c_flags(fields[name])}"
        for name, field_ in kind.fields
        if name in fields
    ]  # fmt: skip
    if not parts:
        return f"({kind.cname}) {{ 0 }}"
    inside = f",{_BREAK}".join(parts)
    return f"({kind.cname}) {{{_BREAK}{inside}{_BREAK}}}"


def members(kind: Any, depth: int) -> str:
    lines = []
    tabs = "\t" * depth
    for name, field_ in kind.fields:
        inner, suffix = field_.type, ""
        if inner.kind == "array":
            suffix = f"[{inner.length if inner.length is not None else ''}]"
            inner = inner.item
        if inner.kind in ("struct", "union") and not re.fullmatch(r"struct kvm_\w+", inner.cname):
            lines.append(f"{tabs}{inner.kind} {{\n{members(inner, depth + 1)}{tabs}}} {name}{suffix};\n")
        else:
            lines.append(f"{tabs}{inner.cname} {name}{suffix};\n")
    return "".join(lines)


def c_array(name: str, data: bytes, *, writable: bool = False) -> str:
    known = c_parts.PROGRAMS.get(name) if programs().get(name) == data else None
    comment = f"/* {known.replace('REPORT', c_parts.REPORT)} */\n" if known else ""
    rows = [", ".join(f"{byte:#04x}" for byte in data[i : i + 16]) for i in range(0, len(data), 16)]
    constant = "" if writable else "const "
    return f"{comment}static {constant}unsigned char {name}[] = {{\n" + "".join(f"\t{row},\n" for row in rows) + "};"


def wrapped(line: str) -> list[str]:
    """A statement, in several lines if it is long; a compound literal then has its fields on lines of their own."""
    whole = line.replace(_BREAK, " ")
    if len(whole) + 8 <= WIDTH:
        return [whole]
    if _BREAK not in line:
        return packed(re.findall(r'(?:"[^"]*"|\S)+', line), " ", 4)
    head, *fields, tail = line.split(_BREAK)
    return [head, *(f"\t{part.lstrip()}" for part in packed(fields, " ", 16)), tail]


def packed(words: list[str], between: str, room: int) -> list[str]:
    """Words on as few lines as they fit, the later ones indented."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + room > WIDTH - 8:
            lines.append(f"\t{word}")
        else:
            lines[-1] += between + word
    return lines
