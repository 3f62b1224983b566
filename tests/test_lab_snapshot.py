"""Which kept guests stay, and which go."""

import os
import time
from pathlib import Path

from kvmgmem.lab.guest.snapshot import KEPT, UNUSED_SECONDS, Snapshot

HOUR = 3600.0


def kept(folder: Path, name: str) -> Snapshot:
    """A state that was kept just now."""
    snapshot = Snapshot(folder / name)
    draft = snapshot.draft()
    assert draft is not None
    draft.write_bytes(b"state")
    snapshot.keep([])
    return snapshot


def unused_for(snapshot: Snapshot, seconds: float) -> None:
    """Have it look as if its last use was that long ago."""
    os.utime(snapshot.folder, (time.time() - seconds,) * 2)


def names(folder: Path) -> set[str]:
    """The states that are there."""
    return {entry.name for entry in folder.iterdir()}


def test_the_least_recently_used_state_goes_first(tmp_path: Path) -> None:
    """One more than is kept costs the one that nobody has used for longest, however early it was made."""
    states = [kept(tmp_path, f"{number:02}") for number in range(KEPT)]
    for number, state in enumerate(states):
        unused_for(state, (KEPT - number) * HOUR)
    states[0].use()
    kept(tmp_path, "new")
    assert names(tmp_path) == {"new", "00", *(f"{number:02}" for number in range(2, KEPT))}


def test_a_state_that_nobody_used_for_long_goes(tmp_path: Path) -> None:
    """However few there are, the disk is not held for what no run has asked for in two weeks."""
    for name, seconds in (("older", UNUSED_SECONDS + HOUR), ("younger", UNUSED_SECONDS - HOUR)):
        unused_for(kept(tmp_path, name), seconds)
    kept(tmp_path, "new")
    assert names(tmp_path) == {"younger", "new"}
