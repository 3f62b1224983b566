"""The uAPI header of ours against the kernel's own, where one new enough can be had."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.lab.kernel.headers import cached_headers

NATIVE = Path(__file__).parent.parent / "native"
CONSTANT = re.compile(r"^#define ((?:KVM|GUEST)_[A-Z0-9_]+) ", re.MULTILINE)
STRUCTURE = re.compile(r"^struct (kvm_\w+) \{", re.MULTILINE)
# Ours under another name: the kernel's union of sync registers is called `s`.
RENAMED = {("kvm_run", "sync_regs"): "s"}


def _headers() -> Path | None:
    """A directory with linux/kvm.h of at least 6.18: named by the environment, fetched before, or the system's."""
    places = [Path(text) for text in (os.environ.get("KVMGMEM_KERNEL_HEADERS", ""),) if text]
    places += [place for place in (cached_headers(), Path("/usr/include")) if place]
    for place in places:
        header = place / "linux/kvm.h"
        if header.exists() and "KVM_CAP_GUEST_MEMFD_FLAGS" in header.read_text():
            return place
    return None


def _constants() -> Iterator[str]:
    for name in ("kvm_abi.h", f"kvm_abi_{os.uname().machine}.h"):
        yield from CONSTANT.findall((NATIVE / name).read_text())


def _structures() -> Iterator[str]:
    for name in ("kvm_abi.h", f"kvm_abi_{os.uname().machine}.h"):
        yield from STRUCTURE.findall((NATIVE / name).read_text())


def _assertions() -> Iterator[str]:
    for name in _constants():
        yield f'_Static_assert((unsigned long long)({name}) == {getattr(lib, name):#x}ULL, "{name}");'
    for name in _structures():
        kind = ffi.typeof(f"struct {name}")
        yield f'_Static_assert(sizeof(struct {name}) == {ffi.sizeof(kind)}, "sizeof {name}");'
        for field, details in kind.fields:
            if field:
                theirs = RENAMED.get((name, field), field)
                yield f'_Static_assert(offsetof(struct {name}, {theirs}) == {details.offset}, "{name}.{field}");'


def _compile(directory: Path, headers: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    source = directory / "abi.c"
    source.write_text("#include <stddef.h>\n#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n" + "\n".join(lines) + "\n")
    command = ["cc", "-fsyntax-only", "-idirafter", "/usr/include", "-isystem", str(headers), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def headers() -> Path:
    found = _headers()
    if found is None:
        pytest.skip("no <linux/kvm.h> of 6.18 or newer: kvmgmem kernel headers, or set KVMGMEM_KERNEL_HEADERS")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    return found


def test_every_number_and_every_field_is_the_kernels(headers: Path, tmp_path: Path) -> None:
    """What our header says, the kernel's header says."""
    lines = list(_assertions())
    assert len(lines) > 250
    done = _compile(tmp_path, headers, lines)
    assert done.returncode == 0, done.stderr


def test_a_wrong_number_would_be_noticed(headers: Path, tmp_path: Path) -> None:
    """The comparison above can fail: one number off is one error."""
    done = _compile(tmp_path, headers, ['_Static_assert(KVM_CAP_GUEST_MEMFD == 235, "KVM_CAP_GUEST_MEMFD");'])
    assert done.returncode != 0
    assert "KVM_CAP_GUEST_MEMFD" in done.stderr


def test_ioctl_numbers_carry_their_structures_size() -> None:
    """Bits 16..29 of an ioctl number are the size of its argument."""
    pairs = {
        "KVM_SET_USER_MEMORY_REGION2": "kvm_userspace_memory_region2",
        "KVM_CREATE_GUEST_MEMFD": "kvm_create_guest_memfd",
        "KVM_SET_MEMORY_ATTRIBUTES": "kvm_memory_attributes",
        "KVM_PRE_FAULT_MEMORY": "kvm_pre_fault_memory",
        "KVM_ENABLE_CAP": "kvm_enable_cap",
    }
    for number, name in pairs.items():
        assert getattr(lib, number) >> 16 & 0x3FFF == ffi.sizeof(f"struct {name}")
