"""Exit codes: one meaning each, the same for every verb."""

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process's exit status says, for shells, CI and `git bisect`."""

    OK = 0
    TEST_FAILED = 1
    USAGE = 2
    NOTHING_RAN = 3
    HARNESS = 4
    KERNEL = 5
    CANNOT_EXPRESS = 6
    """`kvmgmem repro`: the trace holds something that no C program of its kind can do."""
    BISECT_SKIP = 125
    """For `git bisect run` alone (`kvmgmem vm --source`): this kernel does not build or boot, or has nothing to test."""
    BISECT_STOP = 255
    """For `git bisect run` alone: usage, or the harness failed, which must not be taken for a bad kernel."""


GRAVITY = (ExitCode.OK, ExitCode.NOTHING_RAN, ExitCode.TEST_FAILED, ExitCode.USAGE, ExitCode.HARNESS, ExitCode.KERNEL)
"""From the mildest to the gravest: what the kernel did is graver than any fault of the harness."""


def gravest(codes: Iterable[int]) -> ExitCode:
    """The exit code of several runs together."""
    return max((ExitCode(code) for code in codes), key=GRAVITY.index)


def code_of_part(value: int) -> ExitCode:
    """What a part of a run ended with: 3 is for all parts together to say, and an unknown code is the harness's fault."""
    try:
        code = ExitCode(value)
    except ValueError:
        return ExitCode.HARNESS
    return ExitCode.OK if code is ExitCode.NOTHING_RAN else code
