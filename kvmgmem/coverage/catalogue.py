"""What is measured, and why some of it cannot be reached: the entries of coverage.toml, whose head explains the fields."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvmgmem.errors import HarnessError

CATALOGUE_FILE: Final = Path(__file__).with_name("coverage.toml")

EVERY_LINE: Final = "*"

_FILE_FIELDS: Final = ("path", "lines", "branches", "functions")
_REASON_FIELDS: Final = ("file", "function", "lines", "after", "branches", "reason")


@dataclass(frozen=True)
class Measured:
    """A source file of which something is measured: all of it, or the named functions, in groups."""

    path: str
    aim_lines: float
    """Per cent of what can be reached; 0 where nothing is aimed at."""
    aim_branches: float = 0.0
    groups: Mapping[str, tuple[str, ...]] | None = None

    @property
    def functions(self) -> tuple[str, ...] | None:
        """All named functions; None for the whole file."""
        return None if self.groups is None else tuple(name for names in self.groups.values() for name in names)


@dataclass(frozen=True)
class Reason:
    """Why a line is not reached, or why a branch that leaves it is not taken."""

    file: str
    function: str
    line: str
    """The line's text, with single spaces in it; EVERY_LINE for a function that is not run at all."""
    reason: str
    after: str = ""
    """The code line above it, where the function has several of this text."""
    of_branches: bool = False
    """The line is reached, and the reason is that of its branches."""

    def __str__(self) -> str:
        what = "branches of " if self.of_branches else ""
        return f"{what}{self.function}: {self.line}"


@dataclass(frozen=True)
class Catalogue:
    """Everything in coverage.toml."""

    files: tuple[Measured, ...]
    reasons: tuple[Reason, ...]


def load_catalogue(path: Path = CATALOGUE_FILE) -> Catalogue:
    """Read it. Raises HarnessError for an entry that is not one."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise HarnessError(f"cannot read {path}: {error}", "repair it") from error
    files = tuple(_file(entry, number) for number, entry in enumerate(content.get("file", []), start=1))
    reasons = [
        reason for number, entry in enumerate(content.get("unreached", []), start=1) for reason in _reasons(entry, number)
    ]
    seen: set[tuple[object, ...]] = set()
    for reason in reasons:
        key = (reason.file, reason.function, reason.line, reason.after, reason.of_branches)
        if key in seen:
            raise HarnessError(
                f"coverage.toml gives two reasons for {reason}", "keep one of them, or say `after` which line"
            )
        seen.add(key)
    return Catalogue(files, tuple(reasons))


def _file(entry: Mapping[str, Any], number: int) -> Measured:
    _check(entry, f"file {number}", ("path", "lines"), _FILE_FIELDS)
    groups = entry.get("functions")
    return Measured(
        str(entry["path"]),
        float(entry["lines"]),
        float(entry.get("branches", 0)),
        None if groups is None else {str(group): tuple(map(str, names)) for group, names in groups.items()},
    )


def _reasons(entry: Mapping[str, Any], number: int) -> list[Reason]:
    _check(entry, f"unreached {number}", ("file", "function", "lines", "reason"), _REASON_FIELDS)
    if not isinstance(entry["lines"], list) or (entry.get("after") and len(entry["lines"]) != 1):
        raise HarnessError(
            f"coverage.toml, unreached {number}: `lines` is no list, or has not one line although `after` is given",
            "see the head of coverage.toml",
        )
    return [
        Reason(
            str(entry["file"]),
            str(entry["function"]),
            " ".join(str(line).split()),
            " ".join(str(entry["reason"]).split()),
            " ".join(str(entry.get("after", "")).split()),
            bool(entry.get("branches", False)),
        )
        for line in entry["lines"]
    ]


def _check(entry: Mapping[str, Any], name: str, required: tuple[str, ...], known: tuple[str, ...]) -> None:
    missing = [field for field in required if field not in entry]
    unknown = [field for field in entry if field not in known]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown fields: {', '.join(unknown)}"
        raise HarnessError(f"coverage.toml, {name} {what}", "see the head of coverage.toml")
