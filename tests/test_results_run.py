"""A run put together from results files as they really are: cut, garbled, continued after a panic, or never ended."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.results.records import (
    Circumstances,
    Heartbeat,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Verdict,
    to_line,
)
from kvmgmem.results.run import NEVER_ENDED, NO_AREA, Run, by_area, collect, exit_code, read_run, run_fault
from kvmgmem.results.stream import ResultStream

CIRCUMSTANCES = Circumstances(
    release="7.3.4",
    backend="kvm_amd",
    paging="tdp",
    accelerator="tcg",
    cpu_model="a CPU",
    vm_types=("default", "sw-protected"),
    where="guest",
    kvmgmem="0.1.0",
    python="3.11.2",
    pytest="8.0",
)
START = RunStart("ab", 1.0, CIRCUMSTANCES)
END = RunEnd(9.0, 0)


def ended(test: str, verdict: Verdict = Verdict.PASSED, reason: str = "") -> TestEnd:
    return TestEnd(test, 3.0, verdict, reason=reason)


def write(path: Path, *records: Record) -> Path:
    path.write_text("".join(to_line(record) + "\n" for record in records), encoding="ascii")
    return path


def verdicts(run: Run) -> dict[str, Verdict]:
    return {outcome.test: outcome.verdict for outcome in run.tests}


def test_a_whole_run(tmp_path: Path) -> None:
    """Every record finds its place, and tests come in the order in which they started."""
    run = read_run(
        [
            write(
                tmp_path / "r",
                START,
                Plan(("b", "a")),
                Note(1.5, "not root"),
                TestStart("b", 2.0, "GM-FD", ("GM-FD-001",), "must hold"),
                ended("b"),
                Heartbeat(3.0),
                TestStart("a", 4.0, None, ("C4p",)),
                ended("a", Verdict.SKIPPED, "no debugfs"),
                RunEnd(9.0, 0, {"passed": 1}, ("NUMA",)),
            )
        ]
    )
    assert verdicts(run) == {"b": Verdict.PASSED, "a": Verdict.SKIPPED}
    assert [outcome.area for outcome in run.tests] == ["GM-FD", "GM-OWN"]
    assert run.tests[0].rule == "must hold"
    assert run.circumstances == CIRCUMSTANCES
    assert (run.plan, run.notes, run.left_out) == (("b", "a"), ("not root",), ("NUMA",))
    assert (run.complete, run.segments, run.duration, run.damaged, run.open_tests) == (True, 1, 8.0, (), ())
    assert run.counts[Verdict.PASSED] == 1
    assert exit_code(run) is ExitCode.OK


def test_a_missing_run_end_is_never_success(tmp_path: Path) -> None:
    """All tests passed, yet the run did not say that it ended: the harness failed."""
    complete: list[Record] = [START, TestStart("t", 2.0), ended("t"), END]
    assert exit_code(read_run([write(tmp_path / "whole", *complete)])) is ExitCode.OK
    run = read_run([write(tmp_path / "cut", *complete[:-1])])
    assert not run.complete
    assert exit_code(run) is ExitCode.HARNESS
    assert "did not come to its end" in run_fault(run)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\0\0\0", b"Kernel panic - not syncing\n"])
def test_a_file_without_records_is_never_success(tmp_path: Path, content: bytes) -> None:
    """An empty file, or one with no record in it, is a run that did not end."""
    path = tmp_path / "r"
    path.write_bytes(content)
    run = read_run([path])
    assert exit_code(run) is ExitCode.HARNESS
    assert len(run.damaged) == bool(content.strip(b"\n"))


def test_no_file_is_never_success() -> None:
    """A run of no files at all did not end either."""
    assert exit_code(read_run([])) is ExitCode.HARNESS


def test_an_open_test_is_charged(tmp_path: Path) -> None:
    """A start without an end is an error of that test, even if the run goes on and ends."""
    run = read_run([write(tmp_path / "r", START, TestStart("t", 2.0, "GM-FD"), END)])
    assert run.open_tests == ("t",)
    assert run.tests[0].end.reason == NEVER_ENDED
    assert verdicts(run) == {"t": Verdict.ERROR}
    assert exit_code(run) is ExitCode.HARNESS


def test_planned_without_a_record_is_not_run(tmp_path: Path) -> None:
    """What was planned and never came is named, after the tests that ran, and fails the run."""
    run = read_run([write(tmp_path / "r", START, Plan(("a", "b", "c")), TestStart("b", 2.0), ended("b"), END)])
    assert [*verdicts(run).items()] == [("b", Verdict.PASSED), ("a", Verdict.NOT_RUN), ("c", Verdict.NOT_RUN)]
    assert exit_code(run) is ExitCode.TEST_FAILED


def test_a_line_cut_in_the_middle_is_reported(tmp_path: Path) -> None:
    """The last line of a writer that died is named with file and number, and all before it counts."""
    path = write(tmp_path / "r", START, TestStart("t", 2.0), ended("t"))
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run([path])
    (damage,) = run.damaged
    assert (damage.file, damage.number) == (str(path), 3)
    assert damage.reason.startswith("cut short: not JSON")
    assert run.open_tests == ("t",)


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    """A record that is whole is a record, newline or not."""
    path = write(tmp_path / "r", START, TestStart("t", 2.0), ended("t"), END)
    path.write_bytes(path.read_bytes()[:-1])
    run = read_run([path])
    assert (run.damaged, exit_code(run)) == ((), ExitCode.OK)


def test_garbage_between_lines_is_passed_over(tmp_path: Path) -> None:
    """Kernel messages, NULs, bytes that are not UTF-8 and unknown records are counted; the rest is read."""
    path = tmp_path / "r"
    lines = [to_line(record).encode() for record in (START, TestStart("t", 2.0), ended("t"), END)]
    garbage = [
        b"[    1.0] BUG: unable to handle page fault",
        b"\0" * 8,
        b"\xff\xfe",
        b'{"record":"hello","protocol":1}',
    ]
    path.write_bytes(b"\n".join(line for pair in zip(lines, garbage, strict=True) for line in pair) + b"\n")
    run = read_run([path])
    assert [damage.number for damage in run.damaged] == [2, 4, 6, 8]
    assert "not UTF-8 at byte 0" in str(run.damaged[2])
    assert "'hello' is not a kind of record" in str(run.damaged[3])
    assert verdicts(run) == {"t": Verdict.PASSED}
    assert exit_code(run) is ExitCode.OK


def test_a_lost_start_does_not_lose_the_end(tmp_path: Path) -> None:
    """An end without a start is a result, of no known area."""
    run = read_run([write(tmp_path / "r", START, ended("t", Verdict.FAILED), END)])
    assert [(outcome.test, outcome.area) for outcome in run.tests] == [("t", NO_AREA)]
    assert exit_code(run) is ExitCode.TEST_FAILED


def test_a_run_goes_on_after_a_panic(tmp_path: Path) -> None:
    """A second segment in the same file continues the run: one plan, one list of tests, and its run-end ends both."""
    path = write(
        tmp_path / "r",
        START,
        Plan(("a", "b", "c")),
        TestStart("a", 2.0),
        ended("a"),
        TestStart("b", 2.0),
        ended("b", Verdict.PANICKED),
        RunStart("cd", 5.0, CIRCUMSTANCES),
        Plan(("c",)),
        TestStart("c", 6.0),
        ended("c"),
        END,
    )
    run = read_run([path])
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PANICKED, "c": Verdict.PASSED}
    assert (run.segments, run.complete, run.plan) == (2, True, ("a", "b", "c"))
    assert exit_code(run) is ExitCode.KERNEL


def test_only_another_machine_makes_a_run_mixed(tmp_path: Path) -> None:
    """Which boot of a guest it was is no circumstance of the kernel; its release is."""
    boots = [replace(CIRCUMSTANCES, extra={"boot": boot, "resumed": boot > 1}) for boot in (1, 2)]
    same = write(tmp_path / "same", *(RunStart("ab", 1.0, facts) for facts in boots), END)
    other = write(tmp_path / "other", START, RunStart("cd", 1.0, replace(CIRCUMSTANCES, release="6.12.1")), END)
    assert not read_run([same]).mixed
    assert read_run([other]).mixed


def test_a_segment_that_did_not_end_makes_the_run_incomplete(tmp_path: Path) -> None:
    """The run-end of an earlier segment does not end a later one, nor that of one file another file."""
    whole = write(tmp_path / "whole", START, ended("a"), END)
    cut = write(tmp_path / "cut", START, ended("b"), END, RunStart("cd", 5.0, CIRCUMSTANCES))
    assert read_run([whole]).complete
    assert not read_run([cut]).complete
    assert not read_run([cut, whole]).complete


def test_the_latest_end_counts(tmp_path: Path) -> None:
    """A test that ran twice has the later verdict, and no trace of the earlier run-end's exit code."""
    path = write(
        tmp_path / "r", START, ended("t", Verdict.FAILED), RunEnd(4.0, 1), START, TestStart("t", 5.0), ended("t"), END
    )
    run = read_run([path])
    assert verdicts(run) == {"t": Verdict.PASSED}
    assert exit_code(run) is ExitCode.OK


@pytest.mark.parametrize("verdict", [Verdict.SPLAT, Verdict.PANICKED])
def test_a_later_pass_does_not_undo_what_the_kernel_did(tmp_path: Path, verdict: Verdict) -> None:
    """A kernel that died or splatted once at a test has a defect, however the second go ends."""
    path = write(tmp_path / "r", START, ended("t", verdict), START, TestStart("t", 5.0), ended("t"), END)
    assert exit_code(read_run([path])) is ExitCode.KERNEL


def test_a_start_after_a_start_leaves_a_note() -> None:
    """A first go that was lost without an end is told, although the second one has a verdict."""
    run = collect([START, TestStart("t", 2.0), START, TestStart("t", 3.0), ended("t"), END])
    assert run.notes == ("t was started again although its first start has no end",)
    assert verdicts(run) == {"t": Verdict.PASSED}


def test_an_unknown_row_leaves_the_test_without_area() -> None:
    """A results file of a version with more rows can still be reported."""
    assert collect([START, TestStart("t", 2.0, None, ("GM-NEW-001",)), ended("t"), END]).tests[0].area == NO_AREA


def test_areas_come_in_the_order_of_the_contract() -> None:
    """Reports list the catalogue's areas first, in its order; then unknown ones; then tests of no area."""
    areas = [None, "GM-NEW", "GM-LIFE", "GM-VM"]
    run = collect([START, *(r for a in areas for r in (TestStart(str(a), 2.0, a), ended(str(a)))), END])
    assert list(by_area(run)) == ["GM-VM", "GM-LIFE", "GM-NEW", NO_AREA]


P, S, K, N = Verdict.PASSED, Verdict.SKIPPED, Verdict.KNOWN_BUG, Verdict.NOT_RUN
F, T, C, E = Verdict.FAILED, Verdict.TIMEOUT, Verdict.CRASHED, Verdict.ERROR


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        ([P], ExitCode.OK),
        ([K], ExitCode.OK),
        ([P, S, K], ExitCode.OK),
        ([], ExitCode.NOTHING_RAN),
        ([S, S], ExitCode.NOTHING_RAN),
        ([P, F], ExitCode.TEST_FAILED),
        ([P, C], ExitCode.TEST_FAILED),
        ([P, T], ExitCode.TEST_FAILED),
        ([P, N], ExitCode.TEST_FAILED),
        ([S, F], ExitCode.TEST_FAILED),
        ([P, E], ExitCode.HARNESS),
        ([F, E, C], ExitCode.HARNESS),
        ([P, Verdict.SPLAT], ExitCode.KERNEL),
        ([P, Verdict.PANICKED], ExitCode.KERNEL),
        ([F, E, Verdict.SPLAT], ExitCode.KERNEL),
    ],
)
def test_exit_code_of_verdicts(seen: list[Verdict], code: ExitCode) -> None:
    """The gravest verdict decides: the kernel's before the harness's before a test's before nothing at all."""
    run = collect([START, *(ended(str(number), verdict) for number, verdict in enumerate(seen)), END])
    assert exit_code(run) is code
    assert run_fault(run) == ""


@pytest.mark.parametrize("verdict", [Verdict.SPLAT, Verdict.PANICKED])
def test_the_kernel_outranks_a_missing_run_end(verdict: Verdict) -> None:
    """A panic explains why the run did not end."""
    assert exit_code(collect([START, ended("t", verdict)])) is ExitCode.KERNEL


@pytest.mark.parametrize(
    ("verdict", "written", "code", "fault"),
    [
        (P, 0, ExitCode.OK, False),
        (P, 1, ExitCode.TEST_FAILED, True),
        (P, 2, ExitCode.USAGE, True),
        (P, 3, ExitCode.OK, False),  # the last segment had only skips left
        (P, 4, ExitCode.HARNESS, True),
        (P, 5, ExitCode.KERNEL, True),
        (P, 77, ExitCode.HARNESS, True),
        (F, 0, ExitCode.TEST_FAILED, False),
        (F, 1, ExitCode.TEST_FAILED, False),
        (F, 4, ExitCode.HARNESS, True),
        (E, 1, ExitCode.HARNESS, False),
        (E, 5, ExitCode.KERNEL, True),
        (S, 4, ExitCode.HARNESS, True),
        (Verdict.SPLAT, 4, ExitCode.KERNEL, False),
    ],
)
def test_the_exit_code_in_the_run_end_makes_it_graver_only(
    verdict: Verdict, written: int, code: ExitCode, fault: bool
) -> None:
    """What the runner itself ended with is heeded where the tests do not explain it, and never excuses a test."""
    run = collect([START, ended("t", verdict), RunEnd(9.0, written)])
    assert exit_code(run) is code
    assert bool(run_fault(run)) is fault


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    """A missing results file is the caller's mistake, said in one line."""
    with pytest.raises(HarnessError, match=r"cannot read the results file .*: No such file or directory"):
        read_run([tmp_path / "none"])


def test_the_stream_writes_each_record_at_once(tmp_path: Path) -> None:
    """A record can be read by another process before the next is written, and a second stream appends."""
    path = tmp_path / "r"
    with ResultStream(path) as stream:
        stream.write(START)
        assert path.read_bytes() == to_line(START).encode() + b"\n"
        stream.write(ended("t"))
        assert len(path.read_bytes().splitlines()) == 2
    with ResultStream(path) as stream:
        stream.write(END)
    stream.close()  # the second close does no harm
    assert exit_code(read_run([path])) is ExitCode.OK


def test_the_stream_does_not_append_to_a_cut_line(tmp_path: Path) -> None:
    """What a dead writer left unfinished costs its own line, not the first one of the next writer."""
    path = tmp_path / "r"
    path.write_bytes(to_line(START).encode() + b'\n{"record":"no')
    with ResultStream(path) as stream:
        stream.write(ended("t"))
        stream.write(END)
    run = read_run([path])
    assert [damage.number for damage in run.damaged] == [2]
    assert verdicts(run) == {"t": Verdict.PASSED}
    assert run.complete


def test_the_stream_does_not_outlive_an_exec(tmp_path: Path) -> None:
    """A program that a test starts does not inherit the results file."""
    with ResultStream(tmp_path / "r"):
        (fd,) = (file.fd for file in psutil.Process().open_files() if file.path == str(tmp_path / "r"))
        assert not os.get_inheritable(fd)


def test_lines_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    """A pipe takes a long line in pieces, as a virtio port does; another thread's line still comes after it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received: list[bytes] = []

    def read() -> None:
        received.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    with ResultStream(path) as stream:
        long_line = TestEnd("t", 1.0, Verdict.FAILED, detail="x" * 300_000)

        def repeat(record: Record) -> None:
            for _ in range(5):
                stream.write(record)

        writers = [threading.Thread(target=repeat, args=(record,)) for record in (long_line, Heartbeat(1.0), long_line)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(timeout=60)
    reader.join(timeout=60)
    lines = received[0].decode("ascii").splitlines()
    assert sorted(lines) == sorted([to_line(long_line)] * 10 + [to_line(Heartbeat(1.0))] * 5)


def test_a_full_disk_is_one_clear_error() -> None:
    """/dev/full stands for a disk without room: the error names the file and what to do."""
    with ResultStream("/dev/full") as stream, pytest.raises(HarnessError) as caught:
        stream.write(START)
    assert caught.value.message == f"cannot write to the results file /dev/full: {os.strerror(errno.ENOSPC)}"
    assert "make room" in caught.value.hint


def test_a_results_file_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    """A directory that does not exist is named before any test runs."""
    with pytest.raises(HarnessError, match=r"cannot open the results file .*/none/r: No such file or directory"):
        ResultStream(tmp_path / "none" / "r")
