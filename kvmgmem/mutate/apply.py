"""Putting a mutant into a source file: find its function, find its text there, replace that, or say what is wrong."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.mutate.catalogue import Mutant


@dataclass(frozen=True)
class Applied:
    """A source file with a mutant in it; `line` is where the change begins, counted from 1."""

    text: str
    line: int


@dataclass(frozen=True)
class DoesNotApply:
    """Why a mutant has no place in a source tree."""

    reason: str


def apply_mutant(source: str, mutant: Mutant) -> Applied | DoesNotApply:
    """Replace the one place in the mutant's function; white space of any length matches white space of any length.

    Comments and what surrounds the function stay as they are. The text may not occur twice: which of them was meant
    would be a guess.
    """
    bodies = list(definitions(source, mutant.function))
    if not bodies:
        return DoesNotApply(f"there is no {mutant.function}")
    pattern = _pattern(mutant.find)
    places = [
        (start + match.start(), start + match.end())
        for start, end in bodies
        for match in pattern.finditer(without_comments(source[start:end]))
    ]
    if not places:
        return DoesNotApply(f"{mutant.function} has changed: what the mutant replaces is not there")
    if len(places) > 1:
        return DoesNotApply(f"{mutant.function} has changed: what the mutant replaces is there {len(places)} times")
    start, end = places[0]
    return Applied(source[:start] + mutant.put + source[end:], source.count("\n", 0, start) + 1)


def definitions(source: str, name: str) -> Iterator[tuple[int, int]]:
    """Begin and end of every definition of a function or initialised object: kernel style, at the margin, to `}`."""
    named = rf"\b{re.escape(name)}\b(?:\[[^\]]*\])?\s*[(=]"
    starts = re.compile(rf"^(?!typedef|#|/\*)[A-Za-z_][^;{{}}=]*?{named}[^;{{}}]*\{{", re.MULTILINE)
    for match in starts.finditer(source):
        end = re.compile(r"^\}", re.MULTILINE).search(source, match.end() - 1)
        if end is not None:
            yield match.start(), end.end()


def without_comments(source: str) -> str:
    """The text with every comment blanked out, so that places in it stay where they are."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", lambda match: re.sub(r"[^\n]", " ", match[0]), source, flags=re.DOTALL)


def _pattern(find: str) -> re.Pattern[str]:
    return re.compile(r"\s+".join(re.escape(word) for word in find.split()))


def check(tree: Path, mutants: Sequence[Mutant]) -> dict[str, Applied | DoesNotApply]:
    """What becomes of each mutant in a source tree, by id."""
    sources: dict[str, str | None] = {}
    found: dict[str, Applied | DoesNotApply] = {}
    for mutant in mutants:
        if mutant.file not in sources:
            sources[mutant.file] = read_source(tree / mutant.file)
        source = sources[mutant.file]
        found[mutant.id] = DoesNotApply(f"there is no {mutant.file}") if source is None else apply_mutant(source, mutant)
    return found


def read_source(path: Path) -> str | None:
    """A source file's text; None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
