"""What a run on a tree's kernel says to `git bisect run`, to which exit codes mean something else than to us.

Git takes 0 for a good commit, 125 for one that cannot be judged, everything else up to 127 for a bad one, and stops at what
lies above, so that it can be taken up again (git-bisect(1), "Bisect run"). With our own codes a misspelt test, a full disk
or a guest in which every test was skipped would each put the blame on a commit.
"""

from collections.abc import Callable

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.kernel.kbuild import BuildError
from kvmgmem.lab.supervision.ending import Cause, NoTestStartedError

_OF_A_RUN = {
    ExitCode.NOTHING_RAN: ExitCode.BISECT_SKIP,
    ExitCode.USAGE: ExitCode.BISECT_STOP,
    ExitCode.HARNESS: ExitCode.BISECT_STOP,
}
"""What becomes of an exit code that is no verdict on the kernel."""


def in_terms_of_bisect(run: Callable[[], int]) -> int:
    """Run it; its exit code, or its error, in git's terms. Raises HarnessError as `run` does, with another code."""
    try:
        code = ExitCode(run())
    except HarnessError as error:
        raise HarnessError(error.message, error.hint, _code_of(error)) from error
    return _OF_A_RUN.get(code, code)


def _code_of(error: HarnessError) -> ExitCode:
    """Whether a commit, or what is around it, is to blame for a run that did not come to its first test."""
    if isinstance(error, BuildError):
        return ExitCode.BISECT_SKIP
    if isinstance(error, NoTestStartedError) and error.cause is not Cause.QEMU_DIED and error.code is not ExitCode.USAGE:
        return ExitCode.BISECT_SKIP
    return ExitCode.BISECT_STOP
