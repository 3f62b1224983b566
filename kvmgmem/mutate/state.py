"""What is known of each mutant so far: one JSON object a line, written when a mutant is done, so that a run can go on."""

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab.cache import disk_errors
from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.judge import Fate

DEPTHS: Final = ("first", "file", "rest")
"""The rounds of tests a mutant goes through until one notices: those named in the catalogue; the files these are in, and
those about the areas of the rules it breaks; everything."""


@dataclass(frozen=True)
class Result:
    """One mutant's fate, what decided it, and what it took."""

    mutant: str
    fate: Fate
    how: str = ""
    """For a killed mutant, a value of `How`."""
    test: str = ""
    reason: str = ""
    stage: str = ""
    """first, file or rest: after how many rounds of tests it was decided."""
    build_seconds: float = 0.0
    guest_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """What make and QEMU used of the processors for this: independent of what else the machine did."""
    kselftest: str | None = None
    """What the kernel's own selftests made of it: "survived", or which of them noticed; None where they were not asked."""
    digest: str = ""
    """Of the mutant's entry and of the file it changes; another one makes this result void."""
    tests: str = ""
    """Of the selftests that were asked."""
    time: float = 0.0

    @property
    def seconds(self) -> float:
        """Build and guests together."""
        return self.build_seconds + self.guest_seconds


@dataclass(frozen=True)
class Circumstances:
    """What a campaign is about; results of another one are not mixed with it."""

    release: str
    config_hash: str
    accelerator: str
    machine: str
    source: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


class State:
    """The results of a campaign, on disk and in memory. Several threads may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.circumstances: Circumstances | None = None
        self.results: dict[str, Result] = {}
        self._lock = threading.Lock()
        if path.exists():
            self._read()

    def _read(self) -> None:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                # The last line may have been cut by whatever ended the run; it is done again.
                if number > 1:
                    continue
                raise HarnessError(
                    f"{self.path} is not the state of a mutation run: {error}", "name another folder with --out"
                ) from error

    def _take(self, entry: dict[str, Any]) -> None:
        if "circumstances" in entry:
            self.circumstances = Circumstances(**entry["circumstances"])
        else:
            result = Result(**entry | {"fate": Fate(entry["fate"])})
            self.results[result.mutant] = result

    def begin(self, circumstances: Circumstances) -> None:
        """Note what the campaign is about. Raises HarnessError where the file is about something else."""
        if self.circumstances is None:
            self.circumstances = circumstances
            append_line(self.path, {"circumstances": asdict(circumstances)})
        elif self.circumstances != circumstances:
            raise HarnessError(
                f"{self.path} holds the results of another campaign ({self.circumstances.release}, "
                f"configuration {self.circumstances.config_hash}, {self.circumstances.machine})",
                "name another folder with --out, or begin anew with --fresh",
            )

    def add(self, result: Result) -> None:
        """Keep a result, at once on disk."""
        with self._lock:
            self.results[result.mutant] = result
            append_line(self.path, asdict(result))

    def left(
        self,
        mutants: Sequence[Mutant],
        digests: Mapping[str, str],
        depth: str,
        again: Iterable[str] = (),
        kselftest: bool = False,
    ) -> list[Mutant]:
        """The mutants that no result of this depth is known of, whose entry was edited, or whose fate is to be tried again.

        With `kselftest` also those that the kernel's own selftests were not asked about. An error of the harness is no
        result.
        """
        redo = {*again, Fate.ERROR.value}

        def is_done(mutant: Mutant) -> bool:
            result = self.results.get(mutant.id)
            if result is None or result.digest != digests[mutant.id] or result.fate.value in redo:
                return False
            if kselftest and result.kselftest is None and result.fate in (Fate.KILLED, Fate.SURVIVED, Fate.UNDECIDED):
                return False
            return result.fate is not Fate.UNDECIDED or DEPTHS.index(result.stage) >= DEPTHS.index(depth)

        return [mutant for mutant in mutants if not is_done(mutant)]


def function_of(test: str) -> str:
    """The test function of a node id: "selftests/test_x.py::test_y[default]" without its parameters."""
    return test.partition("[")[0]


def first_noticers(results: Iterable[Result]) -> dict[str, list[str]]:
    """Test function to the mutants that were over with it."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.fate is Fate.KILLED and result.test:
            found.setdefault(function_of(result.test), []).append(result.mutant)
    return found


def append_line(path: Path, entry: Mapping[str, object]) -> None:
    """Add one JSON object to a file of such lines, whose last one may have been cut by whatever ended the run before."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes()[-1:] if path.exists() else b""
        with path.open("ab") as file:
            file.write((b"" if before in (b"", b"\n") else b"\n") + json.dumps(entry).encode() + b"\n")


def mutant_digest(mutant: Mutant, source: str | None) -> str:
    """Twelve hex digits that change with what a mutant does, and with the file that it does it to."""
    text = "\0".join((mutant.file, mutant.function, mutant.find, mutant.put, mutant.equivalent, source or ""))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def folder_digest(folder: Path) -> str:
    """Twelve hex digits that change with any selftest."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
