"""The host's side of coverage: what each boot of a coverage kernel has counted, a folder of gcov's files for each.

A boot's folder is there when all of its files are. A boot that ended without handing them over leaves a file that says why:
what its tests reached is in nobody's numbers.
"""

import base64
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.cache import disk_errors
from kvmgmem.lab.guest.gcov import COUNTERS, END

MAX_BYTES = 16 << 20
"""No file of counters comes near that; a guest that says otherwise is broken."""

_NAME = re.compile(r"[\w.+~@-]+(/[\w.+~@-]+)*\.gcda", re.ASCII)


@dataclass(frozen=True)
class Lost:
    """A boot whose counters are lost, and why."""

    boot: int
    reason: str


class CounterFiles:
    """What comes from the boots of one run, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def require_none(self) -> None:
        """Raise HarnessError (USAGE) if the folder has counters of an earlier run: boots are told apart by their number."""
        if any(self.folder.glob("boot-*")):
            raise HarnessError(
                f"{self.folder} holds counters already", "those of several runs do not belong together", ExitCode.USAGE
            )

    def take(self, boot: int, message: Mapping[str, object]) -> None:
        """Keep what a boot's guest sent. Raises ValueError for what is no such message, HarnessError if there is no room."""
        with disk_errors(self.folder):
            if message.get("record") == COUNTERS:
                self._keep(boot, str(message.get("name")), str(message.get("data")))
            elif message.get("record") == END:
                self._finish(boot, message.get("files"))

    def lose(self, boot: int, reason: str) -> None:
        """Say that nothing came of a boot, unless it did."""
        if not self._whole(boot).is_dir():
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._draft(boot), ignore_errors=True)
                (self.folder / f"boot-{boot}.lost").write_text(reason)

    def boots(self) -> list[Path]:
        """The folders of the boots whose counters are whole."""
        return sorted(path for path in self.folder.glob("boot-*") if path.is_dir() and path.suffix != ".draft")

    def lost(self) -> Iterator[Lost]:
        """The boots that are not."""
        for path in sorted(self.folder.glob("boot-*.lost")):
            yield Lost(int(path.stem.partition("-")[2]), path.read_text())

    def _keep(self, boot: int, name: str, data: str) -> None:
        if not _NAME.fullmatch(name) or ".." in PurePosixPath(name).parts:
            raise ValueError(f"counters of {name[:60]!r}, which is no file of gcov's")
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(base64.b64decode(data, validate=True), MAX_BYTES)
        except zlib.error as error:
            raise ValueError(f"counters of {name} that cannot be unpacked ({error})") from error
        if not unpacker.eof:
            raise ValueError(f"counters of {name} without an end")
        target = self._draft(boot) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _finish(self, boot: int, files: object) -> None:
        draft = self._draft(boot)
        found = sum(1 for _ in draft.rglob("*.gcda"))
        if found != files:
            raise ValueError(f"{found} files of counters, and the guest has sent {files}")
        if files == 0:
            self.lose(boot, "the guest's kernel has no counters (no debugfs, or nothing that is built with gcov)")
            return
        draft.rename(self._whole(boot))

    def _draft(self, boot: int) -> Path:
        return self.folder / f"boot-{boot}.draft"

    def _whole(self, boot: int) -> Path:
        return self.folder / f"boot-{boot}"
