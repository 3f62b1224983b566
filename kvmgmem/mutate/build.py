"""Building the kernels of mutants: one whole build, then for each mutant only what its change reaches."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.flavours import BASE, Flavour, load_flavour, overlay, parse_fragment
from kvmgmem.lab.kernel.kbuild import IMAGE, BuildRequest, build, build_environment, first_error
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate.tree import OBJECTS

FLAVOUR: Final = "mutate"

INCREMENTAL_TIMEOUT: Final = 900.0
"""Seconds for what one changed file sets off: a few for a module, minutes where all of KVM is to be compiled."""

POLL_SECONDS: Final = 0.1

FRAGMENT: Final = ".kvmgmem.config"
"""Where `kbuild.configure` leaves what it was asked for, below the folder of objects."""

BUILD_BYTES: Final = 1_500_000_000
"""What a built private tree takes, rounded up."""


@dataclass(frozen=True)
class Built:
    """The outcome of an incremental build: why it failed ("" if it did not), and how long it took in seconds.

    `cpu_seconds` is what make and all that it started used of the processors.
    """

    error: str
    seconds: float
    cpu_seconds: float = 0.0


def mutate_flavour() -> Flavour:
    """The configuration of kernels for mutants: base, and the cheap means to make a fault show."""
    fragment = resources.files("kvmgmem.mutate").joinpath("mutate.config").read_text(encoding="utf-8")
    return Flavour(FLAVOUR, overlay(load_flavour(BASE).options, parse_fragment(fragment, FLAVOUR)))


def build_base(tree: Path, log: Path, jobs: int, progress: Progress) -> Path:
    """Configure and build the unmutated kernel of a private tree; its image. Raises HarnessError.

    What an earlier campaign has configured alike is only brought up to date, unless make has a complaint about it.
    """
    flavour = mutate_flavour()
    if _is_built(tree, flavour) and not build_again(tree, log, jobs).error:
        return image_of(tree)
    cache.require_room(tree, BUILD_BYTES)
    return build(BuildRequest(tree, tree / OBJECTS, flavour, log, jobs), progress).image


def _is_built(tree: Path, flavour: Flavour) -> bool:
    fragment = tree / OBJECTS / FRAGMENT
    return fragment.is_file() and fragment.read_text() == flavour.fragment and (tree / OBJECTS / IMAGE).is_file()


def build_again(
    tree: Path, log: Path, jobs: int, stop: threading.Event | None = None, goals: Sequence[str] = ("bzImage",)
) -> Built:
    """Build what has changed since, without configuring anew; the whole output goes to `log`.

    `goals` are make's: files below the folder of objects, or names such as bzImage.
    Another thread may end it by `stop`. Raises HarnessError when the disk is full: that is not the mutant's fault.
    """
    started = time.monotonic()
    command = ["make", "-C", str(tree), f"O={tree / OBJECTS}", f"-j{jobs}", *goals]
    with cache.disk_errors(log), log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=build_environment(),
            start_new_session=True,
        )
        try:
            status, cpu_seconds = _wait(process, stop or threading.Event())
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    if status == 0:
        return Built("", seconds, cpu_seconds)
    if status is None:
        return Built(f"make was not done after {seconds / 60:.0f} min", seconds)
    text = log.read_text(encoding="utf-8", errors="replace")
    if cache.looks_full(tree, text):
        raise cache.no_room(tree)
    return Built("; ".join(first_error(text)[:2]) or f"make ended with status {status}", seconds, cpu_seconds)


def built_config(tree: Path) -> str:
    """The configuration that a private tree was built with."""
    return (tree / OBJECTS / ".config").read_text(encoding="utf-8")


def image_of(tree: Path) -> Path:
    """The bootable image of a built private tree; raises HarnessError where there is none."""
    image = tree / OBJECTS / IMAGE
    if not image.is_file():
        raise HarnessError(f"{tree} holds no built kernel", "begin anew: remove the folder given by --work")
    return image


def _wait(process: "subprocess.Popen[bytes]", stop: threading.Event) -> tuple[int | None, float]:
    """The exit status and the CPU seconds of a process and its children; None if time is up or another thread says stop."""
    deadline = time.monotonic() + INCREMENTAL_TIMEOUT
    while not stop.is_set() and time.monotonic() < deadline:
        # What `subprocess` would do, which keeps the usage to itself.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime
        stop.wait(POLL_SECONDS)
    return None, 0.0


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End make and whatever it started, if it is still there: also on Ctrl-C."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return
