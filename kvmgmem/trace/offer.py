"""The line under a failure that says how to get a C program of it."""

import shlex
from pathlib import Path


def offer(detail: str, repeat: str, test: str, trace: Path | None = None) -> str:
    """The detail of a failure with that line at its end; `repeat` is the command that runs `test` alone, as `{test}`.

    With a `trace` at hand the program is one command away, else the test has to be run again to be recorded.
    """
    # A command without arguments for pytest runs no Python that could be recorded: the kernel's own selftests.
    if "kvmgmem repro" in detail or " -- " not in repeat:
        return detail
    if trace is not None:
        command = f"kvmgmem repro {shlex.quote(str(trace))} -o bug.c"
    else:
        options, _, rest = repeat.replace("{test}", shlex.quote(test)).partition(" -- ")
        command = f"{options} --trace bug-trace -- {rest}; kvmgmem repro bug-trace -o bug.c"
    return f"{detail}\nas a C program: {command}".lstrip("\n")
