"""Known kernel bugs as tests meet them: recognised by what the kernel does, noted, and never allowed to hide the rest."""

from dataclasses import dataclass, field

from kvmgmem import entry
from kvmgmem.catalogue import known_bugs as catalogue


@dataclass
class Ledger:
    """The bugs that the running test has shown, and those it looked for and did not find."""

    shown: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Forget everything: a new test begins."""
        self.shown.clear()
        self.absent.clear()


LEDGER = Ledger()


class KnownBugCheck:
    """One known bug, to be asked about in a test."""

    def __init__(self, bug: catalogue.KnownBug) -> None:
        self.bug = bug

    def shows_if(self, condition: bool) -> bool:
        """Note whether the bug shows here, and hand the condition back. The test goes on and checks everything else."""
        (LEDGER.shown if condition else LEDGER.absent).add(self.bug.id)
        return condition

    def expect(self, actual: object, wanted: object, *, shows: object) -> None:
        """Want `wanted`; `shows` is the bug; anything else raises AssertionError."""
        if entry.watcher is not None:
            entry.watcher.expect(actual, wanted, shows=shows, bug=self.bug.id)
        if self.shows_if(actual == shows):
            return
        if actual != wanted:
            raise AssertionError(f"{actual!r}, wanted {wanted!r} (and {self.bug.id}, {self.bug.title}, shows as {shows!r})")


def known_bug(bug_id: str) -> KnownBugCheck:
    """A known bug by id (`B14`) or short name; raises `HarnessError` for one the catalogue does not have."""
    return KnownBugCheck(catalogue.get(bug_id))
