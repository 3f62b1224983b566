"""A closer look at a guest: `kvmgmem vm --shell` and `--gdb`, with a real one."""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.guest.initramfs import find_busybox
from kvmgmem.lab.guest.machine import require_kernel_image, require_qemu
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.vm_cli import GDB_PORT

PATIENCE = 120.0


@pytest.fixture(scope="module")
def kernel() -> str:
    """A kernel to boot, as --kernel takes it; skips with what is missing."""
    try:
        require_qemu()
        found = kernels.resolve(os.environ.get("KVMGMEM_TEST_KERNEL") or "base")
        require_kernel_image(found.image)
    except HarnessError as error:
        pytest.skip(f"no guest can be booted: {error.message} ({error.hint})")
    return found.name


@contextmanager
def command(*words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`kvmgmem` with pipes in place of a terminal, ended with all that it started."""
    with subprocess.Popen(
        [sys.executable, "-m", "kvmgmem.cli", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def read_until(process: "subprocess.Popen[bytes]", pattern: str) -> str:
    """What it prints until that matches."""
    assert process.stdout is not None
    text, deadline = "", time.monotonic() + PATIENCE
    while not re.search(pattern, text):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{pattern} did not come: {text[-2000:]}"
        part = os.read(process.stdout.fileno(), 65536)
        assert part, f"it ended before {pattern} came: {text[-2000:]}"
        text += part.decode(errors="replace")
    return text


def say(process: "subprocess.Popen[bytes]", text: str) -> None:
    """Type a line."""
    assert process.stdin is not None
    process.stdin.write(text.encode() + b"\n")
    process.stdin.flush()


@pytest.mark.skipif(find_busybox() is None, reason="no busybox on this machine (apt install busybox-static)")
def test_a_shell_is_in_the_guest_that_tests_run_in(kernel: str) -> None:
    """It has the selftests, a /dev/kvm, and what their runner would be told: where it is, and how slow that is."""
    with command("vm", "--kernel", kernel, "--accel=tcg", "--shell") as process:
        assert "a shell in the guest; its end powers it off" in read_until(process, r"guest:/kvmgmem# ")
        say(process, "env | grep KVMGMEM_; ls -d selftests/test_cre.py /dev/kvm; grep Cpus_allowed_list /proc/self/status")
        say(process, "echo en''d")
        told = read_until(process, r"\bend\b")
        for words in (
            "Cpus_allowed_list:\t1-2\n",  # not the first one, which QEMU's TCG spoils
            "ACCELERATOR=tcg",
            "WHERE=guest",
            "TIME_SCALE=5",
            "FLAVOUR=base",
            "\n/dev/kvm",
            "selftests/test_cre.py",
        ):
            assert words in told.replace("\r", ""), told
        say(process, "exit")
        assert process.wait(PATIENCE) == 0


def test_without_a_shell_it_is_python_and_says_so(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is in the first line."""
    for name in ("qemu-system-x86_64", "gcc", "ldd", "sh", "cat"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    with command("vm", "--kernel", kernel, "--accel=tcg", "--shell") as process:
        assert "Python, for want of a shell (apt install busybox-static), in the guest" in read_until(process, r">>> ")
        say(process, "import os; print(os.environ['KVMGMEM_ACCELERATOR'] * 2)")
        read_until(process, r"tcgtcg")
        say(process, "exit()")
        assert process.wait(PATIENCE) == 0


def test_a_debugger_finds_the_guest_before_its_first_instruction(kernel: str) -> None:
    """It waits there for as long as one likes, and the line says with which symbols to come."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", GDB_PORT)) == 0:
            pytest.skip(f"something listens on port {GDB_PORT} already")
    with command("vm", "--kernel", kernel, "--accel=tcg", "--gdb", "--", "-k", "test_zero_size") as process:
        told = read_until(process, r"waiting for a debugger: .*-ex continue")
        assert re.search(rf"gdb \S*/vmlinux -ex 'target remote :{GDB_PORT}'", told)
        assert ask(b"?").startswith(b"T05"), "stopped by a trap"
        # The instruction pointer is the first 8 bytes behind 16 registers: the reset vector's.
        assert ask(b"g")[16 * 16 : 17 * 16] == b"f0ff000000000000"


def ask(packet: bytes) -> bytes:
    """The answer to a packet of gdb's remote protocol (gdb's manual, "Remote Protocol")."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", GDB_PORT), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline, "nobody listens"
            time.sleep(0.1)
    with connection:
        connection.sendall(b"$" + packet + b"#%02x" % (sum(packet) % 256))
        answer = b""
        while not re.search(rb"\$[^#]*#..", answer):
            answer += connection.recv(65536)
    return answer.partition(b"$")[2].partition(b"#")[0]
