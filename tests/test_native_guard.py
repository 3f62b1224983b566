"""Guarded accesses: a signal is an answer, and a real crash stays a crash."""

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvmgmem.abi import PAGE_SIZE
from kvmgmem.errors import Errno
from kvmgmem.memory import Fault, Mapping, MemoryAccessError

SEGV_MAPERR, SEGV_ACCERR, BUS_ADRERR = 1, 2, 2


def test_load_and_store_of_every_width() -> None:
    """Widths of 1, 2, 4 and 8 bytes read and write exactly that much, little endian."""
    with Mapping.anonymous(PAGE_SIZE) as memory:
        for width in (1, 2, 4, 8):
            memory.fill(0xAA)
            memory.store(0x1122334455667788, 16, width)
            assert memory.load(16, width) == 0x1122334455667788 & (1 << 8 * width) - 1
            assert memory.read(16 + width, 1) == b"\xaa"


def test_unmapped_memory_is_segv_maperr() -> None:
    """A load from nowhere reports SIGSEGV, SEGV_MAPERR and the address."""
    memory = Mapping.anonymous(PAGE_SIZE)
    memory.unmap()
    fault = memory.try_load(8)
    assert fault == Fault(signal.SIGSEGV, SEGV_MAPERR, memory.address + 8)


def test_protected_memory_is_segv_accerr() -> None:
    """A store to read-only memory reports SIGSEGV, SEGV_ACCERR; a load there works."""
    with Mapping.anonymous(PAGE_SIZE, prot=mmap.PROT_READ) as memory:
        assert memory.load() == 0
        assert memory.try_store(1) == Fault(signal.SIGSEGV, SEGV_ACCERR, memory.address)


def test_beyond_the_end_of_a_file_is_sigbus(tmp_path: Path) -> None:
    """A mapping past the end of its file reports SIGBUS, BUS_ADRERR; the last page of the file does not."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE_SIZE)
    with path.open("r+b") as file, Mapping.of(file.fileno(), 2 * PAGE_SIZE) as memory:
        assert memory.load(0, 1) == ord("x")
        assert memory.try_load(PAGE_SIZE, 1) == Fault(signal.SIGBUS, BUS_ADRERR, memory.address + PAGE_SIZE)
        with pytest.raises(MemoryAccessError, match="SIGBUS"):
            memory.read(0, 2 * PAGE_SIZE)
        with pytest.raises(MemoryAccessError, match="SIGBUS"):
            memory.fill(0)


def test_is_filled_with_sees_one_wrong_byte_anywhere() -> None:
    """The first wrong byte is found wherever it is, the last one too."""
    with Mapping.anonymous(PAGE_SIZE) as memory:
        for at in (0, 7, 8, 1001, PAGE_SIZE - 1):
            memory.fill(3)
            assert memory.is_filled_with(3)
            memory.store(4, at, 1)
            assert not memory.is_filled_with(3)
            assert memory.is_filled_with(3, 0, at)


def test_an_unguarded_fault_still_kills() -> None:
    """Outside guarded accesses SIGSEGV does what it always did, and faulthandler still has its say."""
    code = """
import ctypes, faulthandler
from kvmgmem.memory import Mapping
memory = Mapping.anonymous(4096); memory.unmap()
assert not isinstance(memory.try_load(), int)
{extra}
assert not isinstance(memory.try_load(), int)
ctypes.string_at(0)
"""
    for extra in ("", "faulthandler.enable()"):
        done = subprocess.run([sys.executable, "-c", code.format(extra=extra)], capture_output=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGSEGV, done.stderr
        assert (b"Segmentation fault" in done.stderr) == bool(extra)


def test_unmapping_twice_does_not_unmap_another() -> None:
    """A second unmap does nothing, even if the address is in use again."""
    first = Mapping.anonymous(PAGE_SIZE)
    first.unmap()
    again = Mapping.try_map(
        PAGE_SIZE, address=first.address, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
    )  # MAP_FIXED_NOREPLACE
    assert not isinstance(again, Errno)
    first.unmap()
    assert again.load() == 0
    again.unmap()


def test_a_dropped_mapping_is_unmapped() -> None:
    """A mapping that nobody holds is given back."""
    memory = Mapping.anonymous(64 * PAGE_SIZE)
    address = f"{memory.address:x}-"
    assert address in Path("/proc/self/maps").read_text()
    del memory
    assert address not in Path("/proc/self/maps").read_text()


def test_errors_are_values(tmp_path: Path) -> None:
    """The kernel's refusals come back as their names."""
    assert Mapping.try_map(PAGE_SIZE, fd=-1) is Errno.EBADF
    assert Mapping.try_map(0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) is Errno.EINVAL
    reader, writer = os.pipe()
    try:
        assert Mapping.try_map(PAGE_SIZE, fd=reader, prot=mmap.PROT_READ) is Errno.ENODEV
    finally:
        os.close(reader)
        os.close(writer)
