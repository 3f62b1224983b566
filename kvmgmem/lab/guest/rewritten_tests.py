"""What pytest makes of a test file before it runs it, made on the host, so that a guest need not parse and rewrite.

The rewriting of assertions is pytest's own (private) function, and takes a tenth of a second for each file; what it gave is
kept by content, so that an edit costs one file and not all.
"""

import ast
import hashlib
import importlib.util
import marshal
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kvmgmem.lab.cache import write_file

KEPT_SECONDS = 7 * 86400.0
"""How long code is kept that nobody asks for."""


def rewritten_test(target: str, source: Path, kept: Path | None = None) -> tuple[str, bytes] | None:
    """The path and the content of the file that pytest caches for a test file which lies at `target`; None if it cannot be.

    `kept` is a folder for code that was made before. Pytest's own reader says which of the formats that it has had it
    accepts; where that or the rewriting has moved, the guest does the work, only slower.
    """
    try:
        from _pytest.assertion.rewrite import PYC_TAIL, _read_pyc

        text = source.read_bytes()
        code = _kept_code(text, target, kept) if kept is not None else _code(text, target)
    except (ImportError, SyntaxError, TypeError):
        return None
    path = PurePosixPath(target)
    for header in _headers(source, text):
        with tempfile.NamedTemporaryFile(suffix=".pyc") as file:
            file.write(header + code)
            file.flush()
            if _read_pyc(source, Path(file.name)) is not None:
                return str(path.parent / "__pycache__" / (path.stem + PYC_TAIL)), header + code
    return None


def _code(text: bytes, target: str) -> bytes:
    from _pytest.assertion.rewrite import rewrite_asserts

    tree = ast.parse(text, filename=target)
    rewrite_asserts(tree, text, target, None)
    return marshal.dumps(compile(tree, target, "exec", dont_inherit=True))


def _kept_code(text: bytes, target: str, kept: Path) -> bytes:
    import pytest

    maker = f"{sys.version} {pytest.__version__} {target}\n".encode()
    path = kept / hashlib.sha256(maker + text).hexdigest()[:24]
    try:
        code = path.read_bytes()
        os.utime(path)
    except OSError:
        code = _code(text, target)
        kept.mkdir(parents=True, exist_ok=True)
        write_file(path, code)
    return code


def remove_unused(kept: Path, age: float = KEPT_SECONDS) -> None:
    """Remove the code that nobody asked for in the last `age` seconds."""
    oldest = time.time() - age
    for path in kept.glob("*"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except OSError:  # another process was quicker
            continue


def _headers(source: Path, text: bytes) -> Iterator[bytes]:
    """By hash (flags 0b11, checked; PEP 552) as pytest 9.2 has it, by time and size as pytest 8 did.

    The latter needs CONFIG_INITRAMFS_PRESERVE_MTIME in the guest.
    """
    status = source.stat()
    yield importlib.util.MAGIC_NUMBER + struct.pack("<I", 0b11) + importlib.util.source_hash(text)
    yield importlib.util.MAGIC_NUMBER + struct.pack(
        "<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF
    )
