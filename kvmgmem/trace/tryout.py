"""Running a C program of ours: here, or in a QEMU guest, where it is the one selftest."""

import base64
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from kvmgmem.exit_codes import ExitCode

LIMIT = 90.0
BEHAVES, SHOWS, SKIPS = 0, 1, 4

_TEST = '''"""A C program that checks a kernel; the program itself is in it, so that it reaches the guest whole."""

import base64
import subprocess
import zlib
from pathlib import Path

import pytest

PROGRAM = "{packed}"


def test_program(kvm, tmp_path: Path) -> None:
    """The kernel behaves: the program exits 0."""
    path = tmp_path / "program"
    path.write_bytes(zlib.decompress(base64.b64decode(PROGRAM)))
    path.chmod(0o755)
    done = subprocess.run([path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout={limit})
    if done.returncode == {skips}:
        pytest.skip(f"the program cannot tell: {{done.stdout.strip()}}")
    if done.returncode:
        raise AssertionError(f"exit status {{done.returncode}}: {{done.stdout.strip()}}")
'''


def run_here(program: Path) -> int:
    """Run the program; the exit code of the verb: 0 the kernel behaves, 1 it shows the bug, 3 it cannot be told."""
    done = subprocess.run([program.resolve()], check=False, timeout=LIMIT)
    return exit_code(done.returncode)


def exit_code(status: int) -> int:
    """The verb's exit code for a program's exit status."""
    if status == SKIPS:
        return ExitCode.NOTHING_RAN
    return ExitCode.OK if status == BEHAVES else ExitCode.TEST_FAILED


def run_in_guest(program: Path, machine: Sequence[str], repeat: str) -> int:
    """Boot a guest for the program alone; its summary and its exit code are the guest's.

    `machine` is what `kvmgmem vm` is told of it, `repeat` the command that is said to do all this again.
    """
    from kvmgmem.cli import build_parser
    from kvmgmem.lab.vm_cli import run_vm

    packed = base64.b64encode(zlib.compress(program.read_bytes(), 9)).decode()
    with tempfile.TemporaryDirectory(prefix="kvmgmem-program-") as directory:
        tests = Path(directory) / "selftests"
        tests.mkdir()
        (tests / "test_program.py").write_text(_TEST.format(packed=packed, limit=LIMIT, skips=SKIPS))
        args = build_parser().parse_args(["vm", *machine, f"--selftests={tests}", "--jobs=1"])
        args.pytest_args, args.repeat = [], repeat
        return run_vm(args)
