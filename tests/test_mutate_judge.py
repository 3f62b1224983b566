"""Judging mutants: what counts as having noticed, against what the unmutated kernel answered."""

from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.mutate.guest import Trial
from kvmgmem.mutate.judge import ALL, Answer, Baseline, How, Notice, first_notice, load_baseline, save_baseline, selected
from kvmgmem.results.records import TestEnd, Verdict

A, B, C = "selftests/test_x.py::test_a[default]", "selftests/test_x.py::test_b", "selftests/test_y.py::test_c"

BASELINE = Baseline(
    {A: Answer(Verdict.PASSED), B: Answer(Verdict.KNOWN_BUG, ("B24",)), C: Answer(Verdict.FAILED)},
    {ALL},
)


def end(test: str, verdict: Verdict, reason: str = "", bugs: tuple[str, ...] = ()) -> TestEnd:
    return TestEnd(test, 0.0, verdict, reason=reason, bugs_shown=bugs)


def notice_of(*ends: TestEnd, planned: tuple[str, ...] = (A, B, C)) -> Notice | None:
    return first_notice(Trial(planned, ends, True), BASELINE, [ALL])


def test_the_same_answers_are_no_notice() -> None:
    """Passed again, the same known bug again, and a test that fails without any mutant."""
    assert notice_of(end(A, Verdict.PASSED), end(B, Verdict.KNOWN_BUG, bugs=("B24",)), end(C, Verdict.FAILED)) is None


@pytest.mark.parametrize(
    ("verdict", "reason", "how"),
    [
        (Verdict.FAILED, "assert 0 == 1", How.WRONG_ANSWER),
        (Verdict.FAILED, "leak: VMs outlive the test: 77-5", How.LEAK),
        (Verdict.SPLAT, "WARNING in kvm_gmem_release", How.SPLAT),
        (Verdict.PANICKED, "BUG: unable to handle page fault", How.PANIC),
        (Verdict.PANICKED, "hang: no sign of life for 50 s", How.HANG),
        (Verdict.TIMEOUT, "did not end within 50 s", How.HANG),
        (Verdict.CRASHED, "the test's process died: signal SIGBUS", How.CRASH),
    ],
)
def test_how_a_mutant_was_noticed(verdict: Verdict, reason: str, how: How) -> None:
    assert notice_of(end(A, verdict, reason)) == Notice(how, A, reason)


def test_the_first_failure_counts() -> None:
    """And one that the unmutated kernel has as well is passed over."""
    seen = notice_of(end(C, Verdict.FAILED, "old"), end(A, Verdict.FAILED, "new"), end(B, Verdict.PANICKED, "later"))
    assert seen == Notice(How.WRONG_ANSWER, A, "new")


def test_a_defect_that_the_original_does_not_have_is_noticed() -> None:
    """The harness calls it a known bug, which a person sees; the original's own known bugs are no news."""
    seen = notice_of(end(A, Verdict.KNOWN_BUG, "EINVAL", bugs=("B14",)))
    assert seen is not None
    assert (seen.how, seen.test) == (How.KNOWN_BUG, A)


def test_a_test_that_is_skipped_now_is_noticed() -> None:
    """With --require, which is what a person who means it gives, that is a failure."""
    seen = notice_of(end(A, Verdict.SKIPPED, "KVM_CAP_X is 0"))
    assert seen == Notice(How.GONE, A, "skipped: KVM_CAP_X is 0")


def test_a_test_that_does_not_exist_any_more_is_noticed() -> None:
    """A VM type that the kernel no longer offers takes its tests along, but only those that were asked for."""
    trial = Trial((B,), (end(B, Verdict.PASSED),), True)
    seen = first_notice(trial, BASELINE, ["selftests/test_x.py::test_a", B])
    assert seen is not None
    assert (seen.how, seen.test) == (How.GONE, A)
    assert first_notice(trial, BASELINE, [B]) is None


def test_what_no_runner_plans_is_not_missed() -> None:
    """Parts of a program of the kernel's own selftests have records, but are in no plan."""
    baseline = Baseline()
    parts = (end(A, Verdict.PASSED), end(f"{A}::part", Verdict.PASSED))
    baseline.add([ALL], Trial((A,), parts, complete=True))
    assert first_notice(Trial((A,), parts[:1], complete=True), baseline, [ALL]) is None
    assert first_notice(Trial((), (), complete=True), baseline, [ALL]) is not None


def test_a_kernel_that_starts_no_test_is_noticed() -> None:
    dead = first_notice(Trial(trouble="Kernel panic - not syncing", kernel_died=True), BASELINE, [ALL])
    none = first_notice(Trial(trouble="the KVM of this kernel has no guest_memfd"), BASELINE, [ALL])
    assert dead == Notice(How.NO_BOOT, "", "Kernel panic - not syncing")
    assert none is not None
    assert none.how is How.GONE


def test_a_guest_that_does_not_end_is_noticed() -> None:
    """All its tests passed, and still something keeps the runner from ending."""
    seen = first_notice(Trial((A,), (end(A, Verdict.PASSED),), complete=False), BASELINE, [A])
    assert seen is not None
    assert seen.how is How.HANG


def test_a_failure_of_the_harness_says_nothing() -> None:
    """A mutant is not killed by a QEMU that died of something else."""
    with pytest.raises(HarnessError, match="test_a"):
        notice_of(end(A, Verdict.ERROR, "QEMU was killed"))


def test_a_baseline_that_did_not_end_is_none() -> None:
    with pytest.raises(HarnessError, match="the unmutated kernel does not run the selftests"):
        Baseline().add([ALL], Trial((A,), (end(A, Verdict.PASSED),), complete=False))


def test_a_baseline_knows_what_it_covers_and_what_fails() -> None:
    baseline = Baseline()
    baseline.add(["selftests/test_x.py"], Trial((A, C), (end(A, Verdict.PASSED), end(C, Verdict.FAILED)), complete=True))
    assert baseline.lacks(["selftests/test_x.py", "selftests/test_y.py"]) == ["selftests/test_y.py"]
    assert baseline.failing == [C]
    baseline.add([ALL], Trial((B,), (end(B, Verdict.PASSED),), complete=True))
    assert baseline.lacks(["selftests/test_y.py"]) == []


def test_a_baseline_is_kept_for_the_same_kernel_only(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(BASELINE, path, "kernel 1")
    assert load_baseline(path, "kernel 1") == BASELINE
    assert load_baseline(path, "kernel 2") == Baseline()
    path.write_text("{")
    assert load_baseline(path, "kernel 1") == Baseline()


def test_what_an_argument_selects() -> None:
    """A file, a function with all its parameters, one of them; never another function whose name begins alike."""
    for selection in (ALL, "selftests/test_x.py", "selftests/test_x.py::test_a", A):
        assert selected(A, selection)
    assert not selected("selftests/test_x.py::test_ab", "selftests/test_x.py::test_a")
    assert not selected(A, "selftests/test_xy.py")
