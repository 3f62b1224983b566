"""A guest kept on disk: the next run resumes it instead of booting the same kernel again.

QEMU writes the machine's state at two points: where the guest has booted, has imported what every runner imports, and knows
nothing yet of the tests to come; and where it has collected the tests of one job, and begins the first. Under TCG booting is
four fifths of the time to a first test, and collecting most of the rest. A state is worth what it was made of: its name is a
digest of the kernel, the image, QEMU, the machine, the environment and, of the second kind, the job, so that any change
makes it nobody's.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvmgmem.lab.cache import MiB, free_bytes
from kvmgmem.lab.guest.init import PROTOCOL
from kvmgmem.lab.guest.machine import Machine, command_line

KEPT = 24
"""How many states are kept, the least recently used going first; each takes 150 to 230 MiB.

A column of a matrix uses two. With fewer than a matrix needs, each of them would be gone when its turn comes again.
"""
UNUSED_SECONDS = 14 * 86400.0
"""After this time without use a state goes: kernel, tests or QEMU are others by now, and no run asks for it."""
ROOM = 1024 * MiB
"""Bytes that must be free for another one."""
DRAFT_SECONDS = 3600.0


@dataclass(frozen=True)
class Snapshot:
    """The place of one machine's state; whether it is there is another matter."""

    folder: Path

    @property
    def state(self) -> Path:
        """What QEMU wrote."""
        return self.folder / "state"

    @property
    def exists(self) -> bool:
        """Whether it has been taken."""
        return self.state.is_file()

    def console(self) -> list[str]:
        """What the kernel had said on the way there; nothing if another run has just removed the state."""
        try:
            return (self.folder / "console").read_text(errors="replace").splitlines()
        except OSError:
            return []

    def use(self) -> Path:
        """The state's path, which now counts as used last."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)
        return self.state

    def draft(self) -> Path | None:
        """Where QEMU may write a state that `keep` then puts in place; None without room for it."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if free_bytes(self.folder.parent) < ROOM:
                return None
            draft = self._draft
            draft.mkdir(exist_ok=True)
        except OSError:
            return None
        return draft / "state"

    def keep(self, console: Sequence[str]) -> None:
        """Put the draft in place, with what the console said; remove states that nobody used for long."""
        try:
            (self._draft / "console").write_text("\n".join(console))
            self._draft.rename(self.folder)
        except OSError:  # another run was quicker, or the disk is full: this run goes on either way
            self.drop_draft()
        states = sorted(self.folder.parent.glob("[!.]*"), key=_last_use)
        unused = [state for state in states if _last_use(state) < time.time() - UNUSED_SECONDS]
        for old in {*states[:-KEPT], *unused}:
            shutil.rmtree(old, ignore_errors=True)
        for left in self.folder.parent.glob(".*"):  # of a run that was killed, for nobody takes an hour to write one
            if _last_use(left) < time.time() - DRAFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)

    def drop_draft(self) -> None:
        """Remove a draft that came to nothing."""
        shutil.rmtree(self._draft, ignore_errors=True)

    def remove(self) -> None:
        """Remove a state that turned out to be of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _draft(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}-{os.getpid()}")


def _last_use(entry: Path) -> float:
    """When an entry was used last; one that another run has removed meanwhile counts as the oldest."""
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


@dataclass(frozen=True)
class States:
    """The places of one guest's states: booted, and with the tests of one job collected."""

    booted: Snapshot
    collected: Snapshot

    @property
    def latest(self) -> Snapshot | None:
        """The one to go on from; None if neither has been taken."""
        return next((state for state in (self.collected, self.booted) if state.exists), None)


def states_of(machine: Machine, preparation: Mapping[str, object], job: Mapping[str, object], folder: Path) -> States:
    """The places below `folder` of this machine's states, after this preparation, and with this job.

    Raises OSError if its files are gone.
    """
    qemu = Path(shutil.which(machine.qemu) or machine.qemu).resolve()
    facts: dict[str, object] = {
        "protocol": PROTOCOL,
        # The image's name, which is in here, says what is in it.
        "command": command_line(replace(machine, incoming=None), {}),
        "kernel": hashlib.sha256(machine.kernel.read_bytes()).hexdigest(),
        "qemu": [str(qemu), qemu.stat().st_size, qemu.stat().st_mtime_ns],
        "preparation": preparation,
    }
    return States(_place(folder, facts), _place(folder, {**facts, "job": job}))


def _place(folder: Path, facts: Mapping[str, object]) -> Snapshot:
    return Snapshot(folder / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20])
