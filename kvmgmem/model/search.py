"""Playing sequence after sequence, and what a disagreement comes down to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvmgmem.model.generate import seeded
from kvmgmem.model.play import Finding, Journal, Played, play
from kvmgmem.model.shrink import Shrinker, renamed
from kvmgmem.model.steps import Step
from kvmgmem.model.traits import KernelTraits

Begin = Callable[[Sequence[Step]], Journal | None]
"""Called with each sequence before it is played; what it returns is called with each step."""


@dataclass
class Tally:
    """What a search has played, and the known bugs it met."""

    sequences: int = 0
    steps: int = 0
    known: dict[str, Finding] = field(default_factory=dict)
    rows: set[str] = field(default_factory=set)
    """The rows of the contract that decided an answer."""

    def add(self, played: Played) -> None:
        """Count a sequence."""
        self.sequences += 1
        self.steps += len(played.answers)
        self.rows |= played.rows
        for finding in played.known:
            self.known.setdefault(finding.bug, finding)


HASTE = 0.1
"""Of the time that a VM may take to be gone, what it has while a finding about that is shrunk."""


def sequences(first_seed: int, traits: KernelTraits) -> Iterator[tuple[int, list[Step]]]:
    """Seeds and their sequences, without end."""
    seed = first_seed
    while True:
        yield seed, seeded(seed, traits)
        seed += 1


def same(played: Played, wanted: Finding) -> Finding | None:
    """The finding in a played sequence that is the wanted one again: the same known bug, or the same sort."""
    if wanted.bug:
        return next((finding for finding in played.known if finding.bug == wanted.bug), None)
    return played.finding if played.finding and played.finding.sort == wanted.sort else None


def shrink(played: Played, wanted: Finding, traits: KernelTraits, *, plays: int = 400, seconds: float = 60.0) -> Played:
    """The plainest sequence with the same finding, played once more; the given one if it does not come again."""

    # A VM that never goes would be waited for in every play that shows it: hardly one of them would fit into the time.
    patience = HASTE if wanted.what.startswith("lifetime of") else 1.0

    def shows(steps: Sequence[Step]) -> bool:
        return same(play(steps, traits, patience=patience), wanted) is not None

    steps = Shrinker(shows, plays, seconds, wanted.what).shrink(played.steps[: wanted.at + 1])
    again = play(steps, traits)
    found = same(again, wanted)
    if found is None:
        return played
    # Nothing after the finding, and none of what was left out because what it was about was not there.
    needed = [step for at, step in enumerate(steps) if at <= found.at and at in again.answers]
    last = play(renamed(needed), traits)
    return last if same(last, wanted) else again
