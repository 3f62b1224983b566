"""The kernel's own selftests: what is built of a tree, what a program's end and words come to, what a guest is told."""

import argparse
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmgmem.cli import build_parser
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import kselftest, kselftest_cli
from kvmgmem.lab.kernel.apt import Package
from kvmgmem.lab.kernel.kbuild import BuildError
from kvmgmem.lab.kernel.kernels import Kernel
from kvmgmem.lab.kernel.source import tree_origin
from kvmgmem.lab.progress import Progress
from kvmgmem.results.compare import label_of
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import read_run
from kvmgmem.testing.kselftest_ktap import assertion_of, failure_reason, parse_ktap, skip_reason
from kvmgmem.trace.offer import offer

# --- what programs print ----------------------------------------------------------------------------------------------

# As tools/testing/selftests/kselftest_harness.h prints it, with a stack trace that could not be resolved in a guest.
HARNESS_OUTPUT = """TAP version 13
1..4
# Starting 4 tests from 1 test cases.
#  RUN           sync_regs_test.read_invalid ...
#            OK  sync_regs_test.read_invalid
ok 1 sync_regs_test.read_invalid
#  RUN           sync_regs_test.race_cr4 ...
==== Test Assertion Failure ====
  x86/sync_regs_test.c:42: run->s.regs.regs.rbx == 0xBAD1DEA + 1
  pid=41 tid=41 errno=4 - Interrupted system call
     1\t0x0000000000401d6b: ?? ??:0
  rbx sync regs value incorrect 0x17.
# race_cr4: Test failed
#          FAIL  sync_regs_test.race_cr4
not ok 2 sync_regs_test.race_cr4
#      SKIP      no such feature here
ok 3 sync_regs_test.race_exc # SKIP no such feature here
ok 4 # XFAIL sync_regs_test.known
# FAILED: 3 / 4 tests passed.
"""


def test_ktap_results_become_subtests() -> None:
    """Each result line is a subtest with its own verdict, and a failure's reason is the assertion before it."""
    ktap = parse_ktap(HARNESS_OUTPUT)
    assert [(subtest.name, subtest.verdict) for subtest in ktap.subtests] == [
        ("sync_regs_test.read_invalid", Verdict.PASSED),
        ("sync_regs_test.race_cr4", Verdict.FAILED),
        ("sync_regs_test.race_exc", Verdict.SKIPPED),
        ("sync_regs_test.known", Verdict.SKIPPED),
    ]
    _, failed, skipped, expected = ktap.subtests
    assert failed.reason == (
        "x86/sync_regs_test.c:42: run->s.regs.regs.rbx == 0xBAD1DEA + 1: rbx sync regs value incorrect 0x17."
    )
    assert skipped.reason == "no such feature here"
    assert expected.reason == "an expected failure: sync_regs_test.known"
    assert ktap.planned == 4


def test_results_of_one_name_are_told_apart() -> None:
    """Two records must not share a node id; and the forms with a dash or a remark behind the name are read, too."""
    names = [subtest.name for subtest in parse_ktap("ok 1 - a\nok 2 a #  remark (x)\nnot ok 3 a\nok 4\n").subtests]
    assert names == ["a", "a #2", "a #3", "unnamed"]


@pytest.mark.parametrize(
    ("text", "contradiction"),
    [
        ("1..2\nok 1 a\nok 2 b\n", ""),
        ("no KTAP at all\n", ""),
        ("1..3\nok 1 a\nok 2 b\n", "announced 3 results, of which 2 came"),
        ("1..1\nnot ok 1 a\n", "reported a failure: a"),
        # Levels: whose results a plan announces is not clear then.
        ("1..1\n    1..2\n    ok 1 a\n    ok 2 b\nok 1 both\n", ""),
    ],
)
def test_a_status_of_0_is_held_against_the_results(text: str, contradiction: str) -> None:
    """A program that reports a failure or stops short has not passed, whatever its exit status says."""
    found = parse_ktap(text).contradiction
    assert contradiction in found
    assert bool(found) == bool(contradiction)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "1..0 # SKIP - Requirement not met: kvm_has_cap(KVM_CAP_GUEST_MEMFD)\n",
            "Requirement not met: kvm_has_cap(KVM_CAP_GUEST_MEMFD)",
        ),
        ("talk\nok 1 # SKIP nothing here\nTotals: pass:0\n", "nothing here"),
        ("Need root, skipping test\n", "Need root"),
        ("HUGETLB is not configured in host kernel\n", "HUGETLB is not configured in host kernel"),
        ("", "no reason given"),
    ],
)
def test_a_skip_has_its_reason(text: str, reason: str) -> None:
    """As print_skip, ksft_exit_skip and programs that only talk give it."""
    assert skip_reason(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("==== Test Assertion Failure ====\n  a.c:1: x\n  pid=1 tid=1 errno=0 - Success\n  why\n", "a.c:1: x: why"),
        ("==== Test Assertion Failure ====\n  a.c:1: x\n", "a.c:1: x"),
        ("ok 1 a\nBail out! no memory\n", "no memory"),
        ("not ok 1 the_name\n# Totals: fail:1\n", "not ok: the_name"),
        ("one\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_a_failure_has_its_most_telling_line(text: str, reason: str) -> None:
    """An assertion outranks a result, and a result the last word."""
    assert failure_reason(text) == reason


def test_an_assertion_that_was_cut_is_no_accident() -> None:
    """A program that was killed while it printed."""
    assert assertion_of(["==== Test Assertion Failure ===="]) == ""


# --- programs under pytest --------------------------------------------------------------------------------------------

PROGRAMS = {
    "passes": "print('talk')",
    "skips": "print('1..0 # SKIP - Requirement not met: a moon'); sys.exit(4)",
    "fails": "print('==== Test Assertion Failure ====\\n  a.c:7: it\\n  pid=1 \\n  how sad'); sys.exit(254)",
    "is_silent": "sys.exit(3)",
    "crashes": "print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "print('so far', flush=True); time.sleep(60)",
    "reports": "print('1..2\\nok 1 fine\\nnot ok 2 sour'); sys.exit(1)",
    "lies": "print('1..2\\nok 1 fine')",
    "leaks": "os.fork() or (os.setsid(), time.sleep(60))",
}
needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")


@pytest.fixture
def programs(pytester: pytest.Pytester) -> Path:
    """A directory of stand-ins for the kernel's programs, and files beside them that are no programs."""
    directory = pytester.mkdir("kselftest")
    for name, body in PROGRAMS.items():
        (directory / name).write_text(f"#!/usr/bin/python3 -IS\nimport os, signal, sys, time\n{body}\n")
        (directory / name).chmod(0o755)
    (directory / "settings").write_text("timeout=120\n")
    return directory


@needs_kvm
def test_every_end_of_a_program_has_its_verdict(pytester: pytest.Pytester, programs: Path) -> None:
    """Passed, skipped, failed, crashed, timed out, contradicting itself, leaving a process: each told apart."""
    results = pytester.path / "results.jsonl"
    words = ["-p", "no:cacheprovider", "-p", "kvmgmem.testing.kselftest", "--disruptive", "--kselftest-of=tree@1"]
    done = pytester.runpytest_subprocess(*words, "--test-timeout=1.5", f"--results={results}", programs, timeout=90)
    run = read_run([results])
    ends = {outcome.test: outcome.end for outcome in run.tests}
    verdicts = {test.removeprefix("kselftest::"): (end.verdict, end.reason) for test, end in ends.items()}
    assert verdicts == {
        "passes": (Verdict.PASSED, ""),
        "skips": (Verdict.SKIPPED, "Requirement not met: a moon"),
        "fails": (Verdict.FAILED, "a.c:7: it: how sad"),
        "is_silent": (Verdict.FAILED, "exit status 3, without a word"),
        "crashes": (Verdict.CRASHED, "killed by signal SIGSEGV"),
        "hangs": (Verdict.TIMEOUT, "did not end within 1.5 s"),
        "reports": (Verdict.FAILED, "not ok: sour"),
        "reports::fine": (Verdict.PASSED, ""),
        "reports::sour": (Verdict.FAILED, "not ok"),
        "lies": (Verdict.FAILED, "it ended with status 0 and announced 2 results, of which 1 came"),
        "lies::fine": (Verdict.PASSED, ""),
        "leaks": (Verdict.FAILED, verdicts["leaks"][1]),
    }, done.stdout.str()
    assert "process" in verdicts["leaks"][1]
    assert not any("C program" in end.detail for end in ends.values())
    assert all("so far" in ends[f"kselftest::{name}"].detail for name in ("crashes", "hangs"))
    assert 1.5 <= ends["kselftest::hangs"].duration < 10
    assert {outcome.area for outcome in run.tests} == {"kselftest"}
    assert {outcome.rule for outcome in run.tests if outcome.test == "kselftest::lies"} == {"lies of tree@1 ends well"}
    assert run.complete
    assert done.ret == ExitCode.TEST_FAILED
    assert label_of(run.circumstances).endswith("kselftest of tree@1 host")


@needs_kvm
def test_what_is_to_come_first_does(pytester: pytest.Pytester, programs: Path) -> None:
    """The programs are run by name, but for those that are named first."""
    words = ["-p", "no:cacheprovider", "-p", "kvmgmem.testing.kselftest", "--collect-only", "-q"]
    listed = {}
    for first in ("", "passes,crashes"):
        done = pytester.runpytest_subprocess(*words, f"--kselftest-first={first}", programs, timeout=90)
        listed[first] = [line.removeprefix("kselftest::") for line in done.outlines if line.startswith("kselftest::")]
    by_name = sorted(PROGRAMS)
    assert listed[""] == by_name
    assert listed["passes,crashes"] == [
        "passes",
        "crashes",
        *(name for name in by_name if name not in ("passes", "crashes")),
    ]


@needs_kvm
def test_a_host_runs_none_of_them_unasked(pytester: pytest.Pytester, programs: Path) -> None:
    """A program of the kernel's may do anything: without --disruptive it is skipped, on a host."""
    results = pytester.path / "results.jsonl"
    words = ["-p", "no:cacheprovider", "-p", "kvmgmem.testing.kselftest"]
    pytester.runpytest_subprocess(*words, f"--results={results}", programs, timeout=90)
    run = read_run([results])
    assert {outcome.verdict for outcome in run.tests} == {Verdict.SKIPPED}
    assert len(run.tests) == len(PROGRAMS)


# --- building ---------------------------------------------------------------------------------------------------------

KVM_MAKEFILE = """
TEST_GEN_PROGS := $(OUTPUT)/guest_memfd_test $(OUTPUT)/x86/private_mem_conversions_test $(OUTPUT)/x86/broken_test
$(OUTPUT)/%: %.c
\t@mkdir -p $(dir $@) $(TMPOUT)
\tgcc $(KHDR_INCLUDES) $(LDFLAGS) $(USERLDFLAGS) $< -o $@
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As much of a kernel tree as the build looks at, with selftests that compile in no time; and one that does not."""
    root = tmp_path / "linux"
    folder = root / "tools/testing/selftests/kvm"
    (folder / "x86").mkdir(parents=True)
    (root / "Kconfig").touch()
    (root / "Makefile").write_text(
        "VERSION = 7\nPATCHLEVEL = 3\nheaders:\n\t@mkdir -p $(O)/usr/include/linux\n"
        "\t@echo '#define ANSWER 42' > $(O)/usr/include/linux/answer.h\n"
    )
    (folder / "Makefile").write_text(KVM_MAKEFILE)
    program = "#include <linux/answer.h>\nint main(void) { return ANSWER; }\n"
    (folder / "guest_memfd_test.c").write_text(program)
    (folder / "x86/private_mem_conversions_test.c").write_text(program)
    (folder / "x86/broken_test.c").write_text("int main(void) { return GM_MISSING; }\n")
    return root


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's cache is looked at, or written."""
    monkeypatch.setenv("KVMGMEM_CACHE", str(tmp_path / "cache"))


def build(tree: Path, *names: str, every: bool = False) -> kselftest.Programs:
    """Build tests of a tree."""
    with Progress("building") as progress:
        return kselftest.build_tests(tree_origin(tree), names, progress, every)


def state(tree: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder of a tree, with what would give away that it was touched."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in [tree, *tree.rglob("*")]}


def test_a_build_leaves_the_tree_alone_and_is_done_once(tree: Path) -> None:
    """Static programs with the tree's own headers, in the cache; the second time, make finds nothing to do."""
    before = state(tree)
    programs = build(tree)
    assert state(tree) == before
    assert list(programs.files) == ["guest_memfd_test", "private_mem_conversions_test"]
    assert "vm_types_test" in programs.lacking
    for file in programs.files.values():
        assert subprocess.run([file], check=False).returncode == 42
        assert b"/ld-linux" not in file.read_bytes(), "it is not static"
    times = [file.stat().st_mtime_ns for file in programs.files.values()]
    assert [file.stat().st_mtime_ns for file in build(tree).files.values()] == times
    (tree / kselftest.FOLDER / "guest_memfd_test.c").write_text("int main(void) { return 7; }\n")
    changed = build(tree, "guest_memfd_test").files["guest_memfd_test"]
    assert subprocess.run([changed], check=False).returncode == 7


def test_a_test_that_does_not_compile_is_told_by_its_first_error(tree: Path) -> None:
    """The compiler's line is in the message, and the log's path in the hint."""
    with pytest.raises(BuildError, match=r"(?s)first error:.*broken_test\.c:1:\d+: error: .*GM_MISSING") as caught:
        build(tree, every=True)
    log = Path(caught.value.hint.removeprefix("log: "))
    assert "GM_MISSING" in log.read_text()


def test_names_are_found_in_every_form(tree: Path) -> None:
    """As listed, with the folder, as a node id, as a subtest's; each once."""
    names = ("guest_memfd_test", "x86/private_mem_conversions_test", "kselftest::guest_memfd_test::sub: name/x")
    with Progress("listing") as progress:
        tests = kselftest.list_tests(tree_origin(tree), progress)
    assert kselftest.choose(tests, names) == ["guest_memfd_test", "private_mem_conversions_test"]
    assert kselftest.choose(tests, (), every=True) == sorted(tests)
    assert len(tests) == 3
    with pytest.raises(HarnessError, match="none of the usual") as caught:
        kselftest.choose({"broken_test": "x86/broken_test"}, ())
    assert caught.value.code == ExitCode.USAGE


def no_tree(tree: Path) -> None:
    (tree / "Kconfig").unlink()


def no_selftests(tree: Path) -> None:
    shutil.rmtree(tree / kselftest.FOLDER)


def empty_makefile(tree: Path) -> None:
    (tree / kselftest.FOLDER / "Makefile").write_text("all:\n")


@pytest.mark.parametrize(
    ("spoil", "name", "what", "hint"),
    [
        (no_tree, "", "not a kernel source tree", "top Makefile"),
        (no_selftests, "", "has no KVM selftests", "whole kernel tree"),
        (empty_makefile, "", "names no tests", "make"),
        (None, "guest_memfd_tset", "no KVM selftest 'guest_memfd_tset'", "did you mean guest_memfd_test"),
        (None, "zzz", "no KVM selftest 'zzz'", "--list"),
    ],
)
def test_wrong_input_is_one_line(tree: Path, spoil: Callable[[Path], None] | None, name: str, what: str, hint: str) -> None:
    """What is wrong, and what to do about it."""
    if spoil:
        spoil(tree)
    with pytest.raises(HarnessError, match=what) as caught:
        build(tree, *filter(None, [name]))
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.code == (ExitCode.USAGE if name else ExitCode.HARNESS)


def test_what_a_build_needs_is_named_with_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A static library that only some trees' tests are linked with is asked for only there."""
    monkeypatch.setattr(kselftest, "_has_library", lambda name: name != "libuuid.a")
    kselftest.require_tools("LDLIBS += -ldl\n")
    with pytest.raises(HarnessError, match=r"libuuid\.a") as caught:
        kselftest.require_tools("include ../vfio/lib/libvfio.mk\n")
    assert "apt-get install uuid-dev" in caught.value.hint


def test_a_release_is_looked_up_in_the_archive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--source 7.3`: what was built of a package is found again without asking apt; another release is not."""
    package = Package("linux-source-7.3", "7.3.4-1", "stable")
    asked: list[str | None] = []

    def choose_source(_archive: object, release: str | None, _refresh: bool = False) -> Package:
        asked.append(release)
        return package

    monkeypatch.setattr(kselftest, "choose_source", choose_source)
    monkeypatch.setattr(kselftest, "AptArchive", lambda _progress: None)
    with Progress("finding") as progress:
        origin = kselftest.find_source("7.3", progress)
        record = tmp_path / "cache/objects" / kselftest._entry(origin).name / "tests.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"package": vars(package), "targets": {"guest_memfd_test": "guest_memfd_test"}}))
        assert kselftest.find_source("7.3", progress) == origin
        assert kselftest.list_tests(origin, progress) == {"guest_memfd_test": "guest_memfd_test"}
        kselftest.find_source("7.2", progress)
    assert asked == ["7.3", "7.2"]


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_a_guest_is_told_what_to_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs go into the image, pytest gets the plugin, and a test is repeated by this verb."""
    told: list[argparse.Namespace] = []
    kernel = Kernel("k/base", Path("/k/bzImage"), "7.3.4")

    def run_vm(args: argparse.Namespace) -> int:
        told.append(args)
        return 0

    monkeypatch.setattr(kselftest_cli, "run_vm", run_vm)
    monkeypatch.setattr(kselftest_cli, "require_qemu", lambda: "qemu")
    monkeypatch.setattr(kselftest_cli, "resolve", lambda _spec: kernel)
    words = ["kselftest", "--source", str(tree), "--smp=1", "--variant=npt0", "--ktap=-", "guest_memfd_test"]
    assert kselftest_cli.run_kselftest(build_parser().parse_args(words)) == 0
    (args,) = told
    ((target, file),) = args.extra
    assert target == "/kvmgmem/kselftest/guest_memfd_test"
    assert stat.S_IMODE(file.stat().st_mode) & 0o111
    assert args.pytest_args[:2] == ["-p", "kvmgmem.testing.kselftest"]
    assert Path(args.pytest_args[-1]) == Path(args.selftests)
    assert (args.kernel, args.smp, args.variant, args.ktap, args.source) == ("k/base", 1, "npt0", "-", None)
    assert args.timeout == 120
    repeat = f"kvmgmem kselftest --source {tree} --kernel k/base --variant npt0 --smp 1 {{test}}"
    assert args.repeat == repeat
    assert offer("why", args.repeat, "kselftest::x") == "why", "no C program can be had of what is one"
    again: Any = build_parser().parse_args(repeat.replace("{test}", "kselftest::x").split()[1:])
    assert again.tests == ["kselftest::x"]
