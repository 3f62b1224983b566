"""How often each line of a source file ran and each branch was taken: gcov's answer for every boot, added up."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmgmem.coverage.notes import GCOV_SECONDS, Gcov, Notes
from kvmgmem.errors import HarnessError


@dataclass(frozen=True)
class Count:
    """One line that the compiler made code of: how often it ran, and how often each branch that leaves it was taken."""

    ran: int
    branches: tuple[int, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        """Both together. The same object file has the same branches everywhere."""
        longer, shorter = sorted((self.branches, other.branches), key=len, reverse=True)
        padded = (*shorter, *(0 for _ in longer[len(shorter) :]))
        return Count(self.ran + other.ran, tuple(a + b for a, b in zip(longer, padded, strict=True)))


Counts = Mapping[int, Count]
"""By line number, from 1."""


def count(boots: Sequence[Path], file: str, notes: Notes, gcov: Gcov) -> Counts:
    """What all boots together say of one source file, by its place in the kernel's tree.

    Raises HarnessError where a boot has no counters of it, and where gcov cannot read them with these notes.
    """
    return add(_of_boot(boot, file, notes, gcov) for boot in boots)


def add(parts: Iterable[Counts]) -> Counts:
    """Add up counts of one file."""
    total: dict[int, Count] = {}
    for part in parts:
        for number, found in part.items():
            total[number] = total[number] + found if number in total else found
    return total


def find_counters(boot: Path, file: str) -> Path:
    """A boot's counters of a source file: the paths are those of the objects on whatever machine built the kernel."""
    wanted = Path(file).with_suffix(".gcda")
    for found in boot.rglob(wanted.name):
        if found.parts[-len(wanted.parts) :] == wanted.parts:
            return found
    raise HarnessError(
        f"{boot} holds no counters of {file}", "the kernel must be built with gcov: kvmgmem kernel build --flavour coverage"
    )


def link_together(boot: Path, file: str, notes: Notes, folder: Path) -> Path:
    """Put counters and notes of one source file side by side, where gcov looks for both; the counters' path."""
    target = folder / Path(file).with_suffix(".gcda")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_counters(boot, file), target)
    shutil.copyfile((notes.folder / file).with_suffix(".gcno"), target.with_suffix(".gcno"))
    return target


def _of_boot(boot: Path, file: str, notes: Notes, gcov: Gcov) -> Counts:
    with tempfile.TemporaryDirectory(prefix="kvmgmem-gcov-") as temporary:
        counters = link_together(boot, file, notes, Path(temporary))
        command = [gcov.path, "--json-format", "--stdout", "--branch-probabilities", counters.name]
        done = subprocess.run(
            command, cwd=counters.parent, capture_output=True, text=True, check=False, timeout=GCOV_SECONDS
        )
    # gcov goes on, and says 0 everywhere, when notes and counters are of two builds.
    if done.returncode != 0 or "mismatch" in done.stderr or "prefer" in done.stderr or not done.stdout.strip():
        complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise HarnessError(
            f"gcov {gcov.version} cannot read the counters of {file} in {boot}: {complaint}",
            "counters and kernel must be of one build: run `kvmgmem coverage` without --report",
        )
    return parse(json.loads(done.stdout), file)


def parse(answer: Mapping[str, Any], file: str) -> Counts:
    """gcov's JSON (gcov(1), --json-format) as counts of the one file.

    A line has an entry for each function that it is a part of, as an inlined one is.
    """
    total: dict[int, Count] = {}
    for entry in answer["files"]:
        # As the compiler was told the name: relative to some folder, with a way around in it, or absolute.
        if not _same(entry["file"], file):
            continue
        for line in entry["lines"]:
            found = Count(line["count"], tuple(branch["count"] for branch in line["branches"]))
            before = total.get(line["line_number"])
            total[line["line_number"]] = _joined(before, found) if before else found
    return total


def _joined(one: Count, other: Count) -> Count:
    """Two entries of one line: both ran, and each has branches of its own."""
    return Count(one.ran + other.ran, (*one.branches, *other.branches))


def _same(name: str, file: str) -> bool:
    import posixpath

    return f"/{posixpath.normpath(name)}".endswith(f"/{file}")
