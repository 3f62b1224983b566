"""What stands above a C program's code: the comment that says what it is about, and the definitions that it uses."""

import re
import textwrap
from collections.abc import Sequence

from kvmgmem._native import ffi, lib
from kvmgmem.catalogue import known_bugs
from kvmgmem.trace import c_parts, decode
from kvmgmem.trace.c_text import WIDTH, constant, constant_order, members, shown
from kvmgmem.trace.expectation import Check
from kvmgmem.trace.steps import Trace

# In Linux 6.5 and later, and in no C library that is old enough to be everywhere.
_NEW_NUMBERS = {"SYS_cachestat": 451}


def head(trace: Trace, check: Check, what: str, needs: Sequence[str]) -> str:
    """The comment at the top: `what` is the question in a few words, `needs` what it takes to ask it, a sentence each."""
    bug = known_bugs.load().get(check.bug)
    notes = [bug.title if bug else f"{what}: {shown(check.seen)}, wanted {shown(check.wanted)}"]
    if trace.header.get("rule"):
        notes.append(f"What must hold: {trace.header['rule']}")
    if check.seen is not None:
        found = trace.header.get("circumstances", {})
        here = f"Linux {found.get('release', '?')} ({found.get('backend', '?')}, {found.get('paging', '?')} paging)"
        judged = ", as it should" if check.seen == check.wanted else f"; {shown(check.wanted)} is right"
        notes.append(f"{what}: {here} gives {shown(check.seen)}{judged}.")
    if bug:
        notes.append(f"{bug.fix[:1].upper()}{bug.fix[1:]}.")
    notes += needs
    last = [
        "Exit status: 0 the kernel behaves, 1 it shows the bug, 4 it cannot tell (skip).",
        "Build: cc -Wall -Wextra -Werror -static -o bug bug.c",
    ]
    if trace.header.get("test"):
        last.append(f"Recorded by kvmgmem from {trace.header['test']}.")
    lines = [line for note in notes for line in (*textwrap.wrap(note, WIDTH - 3), "")]
    lines += [line for note in last for line in textwrap.wrap(note, WIDTH - 3)]
    return "// SPDX-License-Identifier: GPL-2.0\n/*\n" + "\n".join(f" * {line}".rstrip() for line in lines) + "\n */"


def definitions(code: str) -> str:
    """The constants and structures that the code uses, and those that they are made of."""
    structures: dict[str, str] = {}
    for name in re.findall(r"struct (kvm_\w+)", code):
        _define(name, structures)
    words = set(re.findall(r"\b(?:KVM|GUEST)_[A-Z0-9_]+\b", code))
    constants = [(getattr(lib, name), name) for name in words if hasattr(lib, name)]
    width = max((len(name) for _, name in constants), default=0) + 1
    lines = [f"#define {name:{width}}{constant(value)}" for value, name in sorted(constants, key=constant_order)]
    lines += [f"#ifndef {name}\n#define {name} {value}\n#endif" for name, value in _newer(code)]
    heading = "/* What is used here of <linux/kvm.h>, which may be older than the kernel. */"
    return "\n\n".join([heading + "\n" + "\n".join(lines), *structures.values()])


def _newer(code: str) -> list[tuple[str, int]]:
    found = [(name, value) for name, value in _NEW_NUMBERS.items() if name in code]
    return found + [(name, decode.number(name)) for name in sorted(set(re.findall(r"\bMADV_[A-Z_]+\b", code)))]


def _define(name: str, into: dict[str, str]) -> None:
    if name in into:
        return
    if name == "kvm_run":
        into[name] = c_parts.KVM_RUN_PAGE
        return
    kind = ffi.typeof(f"struct {name}")
    for _, field in kind.fields:
        inner = field.type.item if field.type.kind == "array" else field.type
        if inner.kind == "struct" and re.fullmatch(r"struct kvm_\w+", inner.cname):
            _define(inner.cname.removeprefix("struct "), into)
    into[name] = f"struct {name} {{\n{members(kind, 1)}}};"
