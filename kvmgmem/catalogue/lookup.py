"""One way to refuse an id that a catalogue does not have: name it, and suggest what was probably meant."""

from collections.abc import Iterable
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode

LEAST_SIMILARITY: Final = 0.5
"""Below this a suggestion would only puzzle (difflib's measure: 1 is equal, 0 has nothing in common)."""


def unknown_id(kind: str, wanted: str, known: Iterable[str], where: str) -> HarnessError:
    """Build the refusal of `wanted`: what it was taken for, the nearest id there is, and where ids are listed.

    The exit code is `ExitCode.USAGE`: whoever wrote the id can correct it.
    """
    nearest = _nearest(wanted, known)
    suggestion = f"did you mean {nearest!r}? " if nearest else ""
    return HarnessError(
        f"{wanted!r} is not the id of a {kind}",
        hint=f"{suggestion}Every id is in {where}",
        code=ExitCode.USAGE,
    )


def _nearest(wanted: str, known: Iterable[str]) -> str:
    """Return the most similar name; of equally similar ones that with the longer common beginning, then the first."""
    from difflib import SequenceMatcher  # only on the way out, so that a guest never loads it

    wanted = wanted.casefold()
    matcher = SequenceMatcher(b=wanted)
    best, best_rank = "", (LEAST_SIMILARITY, 0)
    for name in known:
        folded = name.casefold()
        matcher.set_seq1(folded)
        rank = (matcher.ratio(), _common_beginning(folded, wanted))
        if rank > best_rank:
            best, best_rank = name, rank
    return best


def _common_beginning(one: str, other: str) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
