"""Building the kernels of mutants: one whole build, then for each mutant only what its change reaches."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.flavours import BASE, Flavour, load_flavour, overlay, parse_fragment
from kvmgmem.lab.kbuild import IMAGE, BuildRequest, build, build_environment, first_error
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate.tree import OBJECTS

FLAVOUR: Final = "mutate"

INCREMENTAL_TIMEOUT: Final = 900.0
"""Seconds for what one changed file sets off: ten on two idle cores, minutes where the file is a header."""

BUILD_BYTES: Final = 1_500_000_000
"""What a built private tree takes, rounded up."""


@dataclass(frozen=True)
class Built:
    """The outcome of an incremental build: why it failed ("" if it did not), and how long it took in seconds."""

    error: str
    seconds: float


def mutate_flavour() -> Flavour:
    """The configuration of kernels for mutants: base, and the cheap means to make a fault show."""
    fragment = resources.files("kvmgmem.mutate").joinpath("mutate.config").read_text(encoding="utf-8")
    return Flavour(FLAVOUR, overlay(load_flavour(BASE).options, parse_fragment(fragment, FLAVOUR)))


def build_base(tree: Path, log: Path, jobs: int, progress: Progress) -> Path:
    """Configure and build the unmutated kernel of a private tree; its image. Raises HarnessError."""
    cache.require_room(tree, BUILD_BYTES)
    return build(BuildRequest(tree, tree / OBJECTS, mutate_flavour(), log, jobs), progress).image


def build_again(tree: Path, log: Path, jobs: int, stop: threading.Event | None = None) -> Built:
    """Build what has changed since, without configuring anew; the whole output goes to `log`.

    Another thread may end it by `stop`. Raises HarnessError when the disk is full: that is not the mutant's fault.
    """
    started = time.monotonic()
    command = ["make", "-C", str(tree), f"O={tree / OBJECTS}", f"-j{jobs}", "bzImage"]
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
            status = _wait(process, stop or threading.Event())
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    if status == 0:
        return Built("", seconds)
    if status is None:
        return Built(f"make was not done after {seconds / 60:.0f} min", seconds)
    text = log.read_text(encoding="utf-8", errors="replace")
    if cache.looks_full(tree, text):
        raise cache.no_room(tree)
    return Built("; ".join(first_error(text)[:2]) or f"make ended with status {status}", seconds)


def image_of(tree: Path) -> Path:
    """The bootable image of a built private tree; raises HarnessError where there is none."""
    image = tree / OBJECTS / IMAGE
    if not image.is_file():
        raise HarnessError(f"{tree} holds no built kernel", "begin anew: remove the folder given by --work")
    return image


def _wait(process: "subprocess.Popen[bytes]", stop: threading.Event) -> int | None:
    """The exit status; None if time is up or another thread says stop."""
    deadline = time.monotonic() + INCREMENTAL_TIMEOUT
    while not stop.is_set() and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.5)
    return None


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
