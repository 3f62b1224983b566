"""The kernel's own selftests asked about mutants, with a guest that is a stand-in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel.source import Origin
from kvmgmem.lab.kselftest import Programs
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate import kernel_tests as module
from kvmgmem.mutate.guest import Guest, Trial
from kvmgmem.mutate.kernel_tests import KernelTests
from kvmgmem.mutate.modules import Kernel
from kvmgmem.results.records import TestEnd, Verdict

SECONDS = {"kselftest::a_test": 90.0, "kselftest::b_test": 1.0, "kselftest::c_test": 5.0}
UNTOLD = ["kselftest::a_test", "kselftest::b_test", "kselftest::c_test"]
QUICK_FIRST = ["kselftest::b_test", "kselftest::c_test", "kselftest::a_test"]


@dataclass
class Lab:
    """Programs, and what came of running them."""

    folder: Path
    failing: dict[Path, str] = field(default_factory=dict)
    """Kernel's image to the program that fails on it."""
    runs: list[tuple[Path, list[str], bool, Path | None]] = field(default_factory=list)
    """Image, programs, whether the first failure was to end it, and where a booted guest is kept."""

    def run_tests(
        self,
        guest: Guest,
        kernel: Kernel,
        tests: Sequence[str],
        records: Path,
        *,
        stop_at_failure: bool,
        test_seconds: float,
    ) -> Trial:
        assert tests[-1] == "kselftest"  # the directory: pytest takes no node ids behind one
        order = next(test for test in tests if test.startswith("--kselftest-first="))
        programs = [f"kselftest::{name}" for name in order.partition("=")[2].split(",")]
        self.runs.append((kernel.image, programs, stop_at_failure, guest.snapshots))
        failing = self.failing.get(kernel.image)
        ends = tuple(
            TestEnd(test, 0.0, Verdict.FAILED if test == failing else Verdict.PASSED, duration=SECONDS[test], reason="no")
            for test in programs
        )
        return Trial(tuple(programs), ends, complete=True)

    def tests(self, key: str = "7.3.4 abc") -> KernelTests:
        guest = Guest(self.folder / "image", "tcg", 5.0, "qemu", snapshots=self.folder / "snapshots")
        origin = Origin("linux@1", "tree-linux-1", tree=self.folder)
        return KernelTests(origin, self.folder, guest, Kernel(self.folder / "base"), key, Progress("mutants"))

    def ask(self, tests: KernelTests, image: str) -> str:
        return tests.answer(Kernel(self.folder / image), self.folder / "records.jsonl")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab(tmp_path)
    (tmp_path / "initramfs-1.cpio").write_bytes(b"")
    files = {test.partition("::")[2]: tmp_path / test for test in SECONDS}
    monkeypatch.setattr(module, "build_tests", lambda *_: Programs("linux@1", files))
    monkeypatch.setattr(module, "build_image", lambda *_: SimpleNamespace(path=tmp_path / "initramfs-1.cpio"))
    monkeypatch.setattr(module, "run_tests", lab.run_tests)
    return lab


def test_the_unmutated_kernel_is_asked_once_and_the_quick_programs_first(lab: Lab) -> None:
    """Also in the next campaign, as long as kernel and programs are the same."""
    base, snapshots = lab.folder / "base", lab.folder / "snapshots"
    lab.failing[lab.folder / "mutant"] = "kselftest::c_test"
    tests = lab.tests()
    assert lab.ask(tests, "mutant") == "wrong answer in kselftest::c_test"
    assert lab.ask(tests, "other") == "survived"
    assert lab.ask(lab.tests(), "other") == "survived"
    assert lab.runs == [
        (base, UNTOLD, False, snapshots),
        (lab.folder / "mutant", QUICK_FIRST, True, None),  # its own image, which nobody boots twice
        (lab.folder / "other", QUICK_FIRST, True, None),
        (lab.folder / "other", QUICK_FIRST, True, None),
    ]
    lab.ask(lab.tests("7.4.0 abc"), "base")
    assert lab.runs[-2:] == [(base, UNTOLD, False, snapshots), (base, QUICK_FIRST, True, snapshots)]


def test_what_fails_on_the_unmutated_kernel_notices_nothing(lab: Lab) -> None:
    lab.failing = {lab.folder / "base": "kselftest::c_test", lab.folder / "mutant": "kselftest::c_test"}
    assert lab.ask(lab.tests(), "mutant") == "survived"


def test_a_failure_of_the_harness_says_nothing_about_the_mutant(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = lab.tests()
    lab.ask(tests, "base")

    def broken(*_: object, **__: object) -> Trial:
        raise HarnessError("no QEMU", "install it")

    monkeypatch.setattr(module, "run_tests", broken)
    assert lab.ask(tests, "mutant") == "error: no QEMU"
