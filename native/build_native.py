"""Describe the cffi extension `kvmgmem._native` (API mode) to setuptools.

The C headers beside this file are the single source of names: the compiler sees them whole, cffi sees their structures
and the names of their constants, whose values the compiler then supplies.
"""

import platform
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
CONSTANT = re.compile(r"^#define ([A-Z][A-Z0-9_]+) ", re.MULTILINE)
STRUCTURE = re.compile(r"^struct \w+ \{.*?^\};", re.MULTILINE | re.DOTALL)
PROTOTYPE = re.compile(r"^(?:long|void|int|uint64_t|size_t) kvmgmem_\w+\([^;]*\);", re.MULTILINE | re.DOTALL)
SOURCES = ("entry.c", "guard.c", "vcpu_run.c", "fail_nth.c", "guest_x86_64.c")


def declarations() -> str:
    """What cffi may know of the headers: constants by name, structures and prototypes in full."""
    machine = ARCHITECTURES.get(platform.machine())
    if machine is None:
        raise SystemExit(f"kvmgmem knows x86-64 and arm64, this machine is {platform.machine()}")
    parts: list[str] = []
    for name in (f"kvm_abi_{machine}.h", "kvm_abi.h", "kvmgmem_native.h"):
        text = COMMENT.sub("", (HERE / name).read_text())
        parts += [f"#define {constant} ..." for constant in CONSTANT.findall(text)]
        parts += STRUCTURE.findall(text)
        parts += PROTOTYPE.findall(text)
    return "\n".join(parts)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "kvmgmem._native",
    '#include "kvmgmem_native.h"',
    # Relative, because setuptools wants sources below the project's root.
    sources=[f"native/{name}" for name in SOURCES],
    depends=[f"native/{path.name}" for path in sorted(HERE.glob("*.h"))],
    include_dirs=["native"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"],
    libraries=["rt"],
)
