"""Sequences of operations nobody wrote down, held against the contract as a model.

The other selftests ask one question each. Here a seed asks thousands, in any order: VMs, gmems, slots, mappings, guests,
processes and descriptors that come and go, with every field of every request at its ends now and then. What the kernel
must answer, and what guest and host must then see, is worked out by `kvmgmem.model`.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kvmgmem.model.generate import generate
from kvmgmem.model.journal import FileJournal, LogJournal
from kvmgmem.model.play import Journal, Played, play
from kvmgmem.model.search import Tally, sequences, shrink
from kvmgmem.model.steps import Step
from kvmgmem.model.traits import KernelTraits, probe
from kvmgmem.testing import contract, known_bug, need, test_timeout
from kvmgmem.testing.plugin import SESSION
from kvmgmem.testing.session import rows_of
from kvmgmem.testing.waiting import TIME_SCALE

FIRST = 261
SEED = int(os.environ.get("KVMGMEM_MODEL_SEED", FIRST))
SEQUENCES = 36 if TIME_SCALE <= 1 else 16
"""How many are played with an effort of 1: one second's worth on a host, five under emulation."""
DRAWN = 6
"""How many more are drawn by hypothesis for each effort from 2 on, which looks elsewhere, where it is installed: no guest
has it. To load it, and have it read all our modules for constants, takes longer than the sequences above."""
LENGTH = 40

ALWAYS_SOUGHT = ("B1", "B3", "B9")
"""Known bugs that any search of this size asks about; the others depend on what the kernel offers."""

Begin = Callable[[Sequence[Step]], Journal | None]


@contextmanager
def journal(request: pytest.FixtureRequest) -> Iterator[Begin]:
    """Where sequences are written before they are played."""
    session = request.config.stash.get(SESSION, None)
    if session is not None and session.where == "guest":
        with LogJournal() as log:
            yield log.begin
        return
    with tempfile.TemporaryDirectory(prefix="kvmgmem-") as directory, FileJournal(Path(directory) / "journal") as file:
        yield file.begin


def one_after_another(traits: KernelTraits, begin: Begin, count: int, tally: Tally) -> None:
    """Play the sequences of consecutive seeds; raises AssertionError with the plainest form of what disagrees."""
    for _, steps in islice(sequences(SEED, traits), count):
        played = play(steps, traits, journal=begin(steps))
        tally.add(played)
        if played.finding:
            raise AssertionError(report(shrink(played, played.finding, traits)))


def by_hypothesis(traits: KernelTraits, begin: Begin, count: int, tally: Tally) -> None:
    """Let hypothesis choose the sequences; raises AssertionError with the plainest one that disagrees."""
    with tempfile.TemporaryDirectory(prefix="kvmgmem-") as home:  # it keeps notes even without a database
        _by_hypothesis(traits, begin, count, tally, home)


def _by_hypothesis(traits: KernelTraits, begin: Begin, count: int, tally: Tally, home: str) -> None:
    import hypothesis
    from hypothesis import HealthCheck, Phase, strategies
    from hypothesis.configuration import set_hypothesis_home_dir

    set_hypothesis_home_dir(home)

    class Drawn:
        """Choices that hypothesis makes."""

        def __init__(self, draw: Callable[[Any], Any]) -> None:
            self._draw = draw
            self._left = draw(strategies.integers(LENGTH // 3, LENGTH))

        def below(self, limit: int) -> int:
            return int(self._draw(strategies.integers(0, limit - 1)))

        def more(self) -> bool:
            self._left -= 1
            return bool(self._left >= 0)

    @strategies.composite
    def any_sequence(draw: Callable[[Any], Any]) -> list[Step]:
        return generate(Drawn(draw), traits)

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # what disagrees is shrunk by `shrink`, which knows what steps mean
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(any_sequence())
    def goes_as_the_model_says(steps: list[Step]) -> None:
        played = play(steps, traits, journal=begin(steps))
        tally.add(played)
        if played.finding:
            raise Disagreed(played)

    try:
        goes_as_the_model_says()
    except Disagreed as end:
        finding = end.played.finding
        assert finding is not None
        raise AssertionError(report(shrink(end.played, finding, traits))) from None


class Disagreed(Exception):  # noqa: N818 - it is what the search is for
    """A sequence in which kernel and model disagree."""

    def __init__(self, played: Played) -> None:
        super().__init__(played.finding.sort if played.finding else "")
        self.played = played


def report(played: Played) -> str:
    """What a failure says: what disagreed, then the steps that show it."""
    return "\n".join([f"{played.finding}", "the shortest sequence found:", *played.lines()])


# What the first 16 sequences come to on any kernel whose gmems can be mapped; the test sees to it that they did.
@contract(
    "GM-BIND-001", "GM-BIND-002", "GM-BIND-003", "GM-BIND-012", "GM-BIND-014", "GM-BIND-020", "GM-BIND-022",
    "GM-BIND-023", "GM-BIND-032", "GM-CRE-001", "GM-CRE-004", "GM-CRE-005", "GM-FAL-002", "GM-FAL-003", "GM-FAL-004",
    "GM-FAL-005", "GM-FAL-007", "GM-FAL-008", "GM-FAL-019", "GM-LIFE-001", "GM-LIFE-002", "GM-LIFE-006",
    "GM-LIFE-007", "GM-LIFE-008", "GM-MAP-004", "GM-MAP-010", "GM-MAP-012", "GM-MAP-015", "GM-MAP-018", "GM-MAP-020",
    "GM-PF-001", "GM-RUN-001", "GM-RUN-002", "GM-RUN-003", "GM-RUN-017", "GM-RUN-019", "GM-SLOT-001", "GM-SLOT-002",
    "GM-SLOT-006", "GM-SLOT-010", "GM-SLOT-011", "GM-SLOT-012", "GM-SLOT-020", "GM-SLOT-021", "GM-SLOT-024",
    "GM-VM-001", "GM-VM-002", "GM-VM-004", "GM-VM-009",
)  # fmt: skip
@test_timeout(120)
def test_any_sequence_of_operations_goes_as_the_model_says(request: pytest.FixtureRequest, effort: float) -> None:
    """Whatever is done with VMs, gmems, slots, mappings, guests, processes and descriptors, in whatever order: every
    answer, every byte that guest and host see, every allocated page and every lifetime is what the contract says."""
    traits = probe()
    if not traits.vm_types:
        need("default-vm")
    tally = Tally()
    with journal(request) as begin:
        one_after_another(traits, begin, max(1, round(SEQUENCES * effort)), tally)
        if effort >= 2 and importlib.util.find_spec("hypothesis"):
            by_hypothesis(traits, begin, max(1, round(DRAWN * effort)), tally)
    missed = set(rows_of(request.node)) - tally.rows
    all_kinds = any(traits.gmem_flags.values())
    assert SEED != FIRST or effort < 1 or not all_kinds or not missed, "the sequences never came to these rows"
    known_bug("B14").shows_if(traits.overlap == "EINVAL")
    for bug in (*ALWAYS_SOUGHT, *sorted(set(tally.known) - set(ALWAYS_SOUGHT))):
        known_bug(bug).shows_if(bug in tally.known)
