"""The guest of one mutant: that it ends at the first failure, and in time, whatever its runner does."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmgmem.lab.guest.machine import Machine
from kvmgmem.lab.supervision.supervisor import Request
from kvmgmem.mutate.guest import MeteredQemu, OneShot
from kvmgmem.results.records import TestEnd, Verdict


@pytest.fixture
def qemu() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that stands in for QEMU, and would go on for a minute."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def supervisor(folder: Path, process: "subprocess.Popen[bytes]", seconds: float, *, stop: bool) -> OneShot:
    machine = Machine(kernel=folder / "bzImage", initrd=folder / "image", accelerator="tcg")
    made = OneShot(Request(machine=machine, results=folder / "records.jsonl"), stop, seconds)
    made._qemu = SimpleNamespace(process=process)  # type: ignore[assignment]
    return made


def test_the_first_failure_ends_the_guest(tmp_path: Path, qemu: "subprocess.Popen[bytes]") -> None:
    """A runner may be held for ever by the process that the mutant got stuck."""
    watched = supervisor(tmp_path, qemu, 60, stop=True)
    for verdict in (Verdict.PASSED, Verdict.SKIPPED, Verdict.KNOWN_BUG):
        watched.write(TestEnd(f"test_{verdict}", 0.0, verdict))
    assert qemu.poll() is None
    watched.write(TestEnd("test_b", 0.0, Verdict.TIMEOUT))
    assert qemu.wait(10) == -9
    assert watched.stopping
    assert not watched.out_of_time


def test_a_failure_of_the_unmutated_kernel_does_not(tmp_path: Path, qemu: "subprocess.Popen[bytes]") -> None:
    """Its run is to tell of all tests."""
    watched = supervisor(tmp_path, qemu, 60, stop=False)
    watched.write(TestEnd("test_a", 0.0, Verdict.FAILED))
    assert not watched.stopping
    assert qemu.poll() is None


def test_a_guest_that_does_not_end_is_ended(
    tmp_path: Path, qemu: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life without an end are no reason to wait for ever."""
    watched = supervisor(tmp_path, qemu, 0.05, stop=True)
    monkeypatch.setattr(watched, "run", lambda: qemu.wait(10))
    watched.run_bounded()
    assert watched.out_of_time
    assert qemu.returncode == -9


def test_what_qemu_used_is_told_once(tmp_path: Path) -> None:
    """Also of one that ended by itself, as a guest that powers off does, while nobody looked."""
    busy = tmp_path / "qemu"
    busy.write_text(f"#!{sys.executable} -S\nimport time\nwhile time.process_time() < 0.3: pass\n")
    busy.chmod(0o755)
    told: list[float] = []
    machine = Machine(kernel=tmp_path / "bzImage", initrd=tmp_path / "image", accelerator="tcg", qemu=str(busy))
    with MeteredQemu(machine, told.append) as qemu:
        while not qemu.ended:
            qemu.wait(1.0)
        qemu.process.wait()  # from here on, the kernel knows nothing of it
    qemu.close()
    assert len(told) == 1
    assert told[0] >= 0.29
