"""`kvmgmem vm --source` under `git bisect run`: a commit is blamed for what its kernel did, and for nothing else."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmgmem.cli import build_parser
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import vm_cli
from kvmgmem.lab.bisection import in_terms_of_bisect
from kvmgmem.lab.kernel.kbuild import BuildError
from kvmgmem.lab.kernel.kernels import BuildOptions, Kernel
from kvmgmem.lab.supervision.ending import Cause, Ending, no_test_started


@pytest.mark.parametrize(
    ("ours", "gits"),
    [
        (ExitCode.OK, 0),
        (ExitCode.TEST_FAILED, 1),
        (ExitCode.KERNEL, 5),
        (ExitCode.NOTHING_RAN, 125),
        (ExitCode.BISECT_SKIP, 125),
        (ExitCode.USAGE, 255),
        (ExitCode.HARNESS, 255),
    ],
)
def test_only_verdicts_on_the_kernel_are_verdicts_on_the_commit(ours: ExitCode, gits: int) -> None:
    """What was skipped in full says nothing; what is not the kernel's fault stops the bisection."""
    assert in_terms_of_bisect(lambda: ours) == gits


def never_began(cause: Cause, runner_exit: int | None = None, output: str = "") -> HarnessError:
    """The error of a run whose last boot ended so."""
    return no_test_started(Ending(cause, "it ended", runner_output=output, runner_exit=runner_exit), None)


@pytest.mark.parametrize(
    ("error", "gits"),
    [
        (BuildError("does not build"), 125),
        (HarnessError("the disk is full"), 255),
        (HarnessError("QEMU is not installed"), 255),
        *((never_began(cause), 125) for cause in Cause if cause not in (Cause.FINISHED, Cause.QEMU_DIED)),
        (never_began(Cause.QEMU_DIED), 255),
        (never_began(Cause.RUNNER_DIED, 5), 125),
        (never_began(Cause.RUNNER_DIED, 4, "ERROR: file or directory not found: selftests/none.py"), 255),
    ],
)
def test_a_commit_is_skipped_for_its_own_faults_alone(error: HarnessError, gits: int) -> None:
    """One that does not build, boot or have such a test is skipped; anything else must be put right first."""

    def run() -> int:
        raise error

    with pytest.raises(HarnessError) as caught:
        in_terms_of_bisect(run)
    assert (caught.value.message, caught.value.hint, caught.value.code) == (error.message, error.hint, gits)


@pytest.fixture
def no_guest(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """The arguments of a run that is over before a guest is started: the tree's kernel does not build."""

    def build(*, source: Path, options: BuildOptions | None = None) -> Kernel:
        raise BuildError(f"{source} does not build")

    monkeypatch.setattr(vm_cli, "build", build)
    monkeypatch.setattr(vm_cli, "_kernel", lambda spec: build(source=Path(spec)))
    monkeypatch.setattr(vm_cli, "require_qemu", lambda name: name)

    def arguments(*words: str) -> argparse.Namespace:
        return argparse.Namespace(**vars(build_parser().parse_args(["vm", "--accel=tcg", *words])), pytest_args=[])

    return arguments


def test_gits_codes_are_for_trees_alone(no_guest: Callable[..., argparse.Namespace]) -> None:
    """With --source the codes are git's, with --kernel ours."""
    for words, code in ((["--source", "tree"], ExitCode.BISECT_SKIP), (["--kernel", "tree"], ExitCode.HARNESS)):
        with pytest.raises(HarnessError, match="tree does not build") as caught:
            vm_cli.run_vm(no_guest(*words))
        assert caught.value.code == code
