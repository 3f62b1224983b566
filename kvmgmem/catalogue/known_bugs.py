"""Known kernel bugs around guest_memfd: how a test recognises each by behaviour, and what fixed it.

The bugs live in known_bugs.json, one to a line. Releases in it explain a result; they never decide one.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from kvmgmem.catalogue.lookup import unknown_id

CATALOGUE_FILE: Final = Path(__file__).with_name("known_bugs.json")


@dataclass(frozen=True, slots=True)
class KnownBug:
    """A defect that some released kernel has."""

    id: str
    slug: str
    """A short name that may stand for the id."""
    rows: tuple[str, ...]
    """The contract rows that the bug breaks."""
    title: str
    commits: tuple[str, ...]
    """The fixing commits of the mainline tree, abbreviated; empty when there is none or it is not known."""
    fixed_in: str
    """The releases with the fix, as text; "" when none has it."""
    symptom: str
    """One sentence: how a test recognises the bug by what the kernel does."""
    cve: str = ""
    report: str = ""
    """What the kernel's complaint begins with, as a regular expression, if it shows by one whose cause is certain."""
    report_needs: tuple[str, ...] = ()
    """The requirements without which no kernel complains like that, and its silence says nothing."""
    report_by_chance: bool = False
    """Whether the kernel complains only when a race is lost, so that silence says nothing at all."""
    not_tested_because: str = ""
    """One sentence: why no test here can show it. "" if one can, and the test names the bug."""

    @property
    def fix(self) -> str:
        """The fix in a few words, for a report."""
        if self.commits and self.fixed_in:
            return f"fixed by {', '.join(self.commits)} in {self.fixed_in}"
        if self.fixed_in:
            return f"fixed in {self.fixed_in}"
        return "no fix known"

    def is_reported_by(self, title: str) -> bool:
        """Whether a complaint of the kernel that begins with this line is this bug's."""
        return bool(self.report) and re.match(self.report, title) is not None


def _bug(fields: dict[str, Any]) -> KnownBug:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return KnownBug(**{**fields, **lists})


@cache
def load() -> Mapping[str, KnownBug]:
    """Return all known bugs by id, in the order of their numbers; read once, and read-only."""
    document: list[dict[str, Any]] = json.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))
    return MappingProxyType({fields["id"]: _bug(fields) for fields in document})


def get(bug_id: str) -> KnownBug:
    """Return the bug with this id ("B14") or short name; raises HarnessError (USAGE) that suggests the nearest one."""
    known = load()
    if bug_id in known:
        return known[bug_id]
    by_slug = {bug.slug: bug for bug in known.values()}
    if bug_id in by_slug:
        return by_slug[bug_id]
    raise unknown_id("known bug", bug_id, (*known, *by_slug), f"kvmgmem/catalogue/{CATALOGUE_FILE.name}")
