"""What reports say about known bugs: one line for each, and which tests showed it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmgmem.catalogue import known_bugs
from kvmgmem.results.run import Run


@dataclass(frozen=True)
class BugSightings:
    """Where a known bug was looked for, by the names of the tests."""

    shown: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def sightings(run: Run) -> Mapping[str, BugSightings]:
    """Return for each bug that a test looked for, by id in the catalogue's order, who saw it and who did not."""
    shown: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for outcome in run.tests:
        for bug in outcome.end.bugs_shown:
            shown.setdefault(bug, []).append(outcome.test)
        for bug in outcome.end.bugs_absent:
            absent.setdefault(bug, []).append(outcome.test)
    order = {bug: place for place, bug in enumerate(known_bugs.load())}
    looked_for = sorted(shown.keys() | absent.keys(), key=lambda bug: (order.get(bug, len(order)), bug))
    return {bug: BugSightings(tuple(shown.get(bug, ())), tuple(absent.get(bug, ()))) for bug in looked_for}


def bugs_by_column(runs: Sequence[Run]) -> Mapping[str, list[bool | None]]:
    """Each bug that one of the runs shows, by id: whether it shows in each of them, None where nobody looked for it."""
    columns = [sightings(run) for run in runs]
    order = list(known_bugs.load())
    seen = {bug for column in columns for bug, sighting in column.items() if sighting.shown}
    ids = sorted(seen, key=lambda bug: (order.index(bug) if bug in order else len(order), bug))
    return {bug: [bool(column[bug].shown) if bug in column else None for column in columns] for bug in ids}


def bug_line(bug_id: str) -> str:
    """Return the bug's id, title and fix on one line; the bare id if the catalogue of this version lacks it."""
    bug = known_bugs.load().get(bug_id)
    return f"{bug.id}: {bug.title} ({bug.fix})" if bug else bug_id


def bugs_line(bug_ids: tuple[str, ...]) -> str:
    """Return the lines of several bugs joined by "; ", and a plain word for none."""
    return "; ".join(map(bug_line, bug_ids)) or "unnamed"
