"""The catalogue of mutants: what each changes, which rule that breaks, and which selftests are to look first.

The entries live in mutants.toml, whose head explains the fields.
"""

import ast
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode

CATALOGUE_FILE: Final = Path(__file__).with_name("mutants.toml")

OPERATORS: Final = (
    "dropped check",
    "inverted check",
    "off-by-one bound",
    "wrong errno",
    "missing reference",
    "unlock-free path",
    "skipped zap",
    "skipped clear",
    "wrong filter",
    "wrong offset arithmetic",
    "dropped rollback",
    "stale pointer",
    "changed flag mask",
    "changed capability value",
)
"""Every kind of fault, in the order of reports."""

_REQUIRED: Final = ("id", "file", "function", "operator", "find", "put", "breaks")
_OPTIONAL: Final = ("first", "equivalent", "survives")


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, what it replaces by what, and what it should set off."""

    id: str
    file: str
    """Below the kernel's source tree."""
    function: str
    """The function or initialised object whose text holds `find` exactly once."""
    operator: str
    find: str
    put: str
    breaks: tuple[str, ...]
    """Rows of the contract."""
    first: tuple[str, ...] = ()
    """Selftests by function name, or as FILE::NAME where two files have one of that name."""
    equivalent: str = ""
    """Why nobody can tell it from the original; "" for a mutant that counts."""
    survives: str = ""
    """Why it is known to survive, and what would kill it."""


def load_mutants(path: Path = CATALOGUE_FILE) -> tuple[Mutant, ...]:
    """All mutants, in the catalogue's order. Raises HarnessError for an entry that is not one."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise HarnessError(f"cannot read the catalogue of mutants {path}: {error}", "repair it") from error
    mutants = tuple(_mutant(entry, number) for number, entry in enumerate(entries, start=1))
    seen: set[str] = set()
    for mutant in mutants:
        if mutant.id in seen:
            raise HarnessError(f"two mutants are called {mutant.id}", "rename one of them")
        seen.add(mutant.id)
    return mutants


def _mutant(entry: Mapping[str, object], number: int) -> Mutant:
    name = str(entry.get("id", f"number {number}"))
    missing = [field for field in _REQUIRED if field not in entry]
    unknown = [field for field in entry if field not in _REQUIRED + _OPTIONAL]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown fields: {', '.join(unknown)}"
        raise HarnessError(f"mutant {name} {what}", "see the head of mutants.toml")
    if entry["operator"] not in OPERATORS:
        raise HarnessError(f"mutant {name}: {entry['operator']!r} is no operator", f"one of: {', '.join(OPERATORS)}")
    texts = {field: str(entry[field]) for field in (*_REQUIRED[:-1], "equivalent", "survives") if field in entry}
    lists = {field: _names(entry, field, name) for field in ("breaks", "first")}
    if not texts.get("equivalent") and not lists["first"]:
        raise HarnessError(f"mutant {name} names no selftest that is likely to notice", "give `first`")
    return Mutant(**texts, **lists)  # type: ignore[arg-type]


def _names(entry: Mapping[str, object], field: str, name: str) -> tuple[str, ...]:
    value = entry.get(field, [])
    if not isinstance(value, list) or not all(isinstance(element, str) for element in value):
        raise HarnessError(f"mutant {name}: {field} is not a list of names", "write it in brackets")
    return tuple(value)


def choose(mutants: Sequence[Mutant], only: Iterable[str] = (), function: str | None = None) -> list[Mutant]:
    """Those of these ids (all, where none is given) in that function; raises HarnessError (USAGE) if there are none."""
    wanted = list(dict.fromkeys(only))
    known = {mutant.id for mutant in mutants}
    if unknown := [name for name in wanted if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see: kvmgmem mutate --list"
        raise HarnessError(f"no mutant is called {', '.join(unknown)}", hint, ExitCode.USAGE)
    chosen = [mutant for mutant in mutants if not wanted or mutant.id in wanted]
    chosen = [mutant for mutant in chosen if function in (None, mutant.function)]
    if not chosen:
        functions = ", ".join(sorted({mutant.function for mutant in mutants}))
        raise HarnessError(f"no mutant of the catalogue is in {function}", f"there are some in: {functions}", ExitCode.USAGE)
    return chosen


def selftests_by_name(selftests: Path) -> dict[str, list[str]]:
    """Name of a selftest's function to the node ids it has ("selftests/test_x.py::test_y"), read from the source."""
    found: dict[str, list[str]] = {}
    for path in sorted(selftests.glob("test_*.py")):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(f"{selftests.resolve().name}/{path.name}::{node.name}")
    return found


def node_ids(mutant: Mutant, tests: Mapping[str, Sequence[str]]) -> list[str]:
    """Where the tests lie that are to look first; a name that no file has any more is left out."""
    found: dict[str, None] = {}
    for name in mutant.first:
        file, _, function = name.rpartition("::")
        ids = [node for node in tests.get(function, ()) if not file or re.search(rf"(^|/){re.escape(file)}::", node)]
        found.update(dict.fromkeys(ids))
    return list(found)
