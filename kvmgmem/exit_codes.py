"""Exit codes: one meaning each, the same for every verb."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process's exit status says, for shells, CI and `git bisect`."""

    OK = 0
    TEST_FAILED = 1
    USAGE = 2
    NOTHING_RAN = 3
    HARNESS = 4
    KERNEL = 5
    BISECT_SKIP = 125
    """For `git bisect run` alone: this kernel does not build or boot, so it says nothing (`kvmgmem vm --source`)."""
