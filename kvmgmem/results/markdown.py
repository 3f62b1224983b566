"""A short Markdown summary, for the page that a CI system shows beside a job."""

import re
from collections.abc import Iterator
from typing import Final, TextIO

from kvmgmem.results.known_bug_text import bug_line, sightings
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, by_area, run_fault
from kvmgmem.results.summary import COLUMNS, area_counts, fault_lines, faults, skips, verdict_line
from kvmgmem.results.text import one_line

NOT_RUN_NAMED: Final = 10
"""How many tests that never came are named before the rest is only counted."""


def write_markdown(run: Run, out: TextIO) -> None:
    """Write the run as Markdown: one line, a table by contract area, then what failed, known bugs and skips."""
    out.write("\n".join(_lines(run)) + "\n")


def _lines(run: Run) -> Iterator[str]:
    yield f"**{_text(verdict_line(run))}**"
    yield ""
    groups = by_area(run)
    if groups:
        yield f"| area | {' | '.join(COLUMNS)} |"
        yield "|---|" + "---:|" * len(COLUMNS)
        for area, tests in groups.items():
            yield f"| {_text(area)} | " + " | ".join(str(count) for count in area_counts(tests).values()) + " |"
        yield ""
    yield from _fault_section(run)
    yield from _bug_section(run)
    reasons = skips(run)
    if reasons:
        yield from ("### Skipped", "")
        yield from (f"- {count}: {_text(reason)}" for reason, count in reasons)
        yield ""
    remarks = [*run.notes, *(f"left out: {what}" for what in run.left_out), *(f"damaged: {x}" for x in run.damaged)]
    if remarks:
        yield from ("### Notes", "")
        yield from (f"- {_text(remark)}" for remark in remarks)
        yield ""


def _fault_section(run: Run) -> Iterator[str]:
    fault = run_fault(run)
    failed = faults(run)
    if not fault and not failed:
        return
    yield from ("### Not as expected", "")
    if fault:
        yield from (f"The run itself: {_text(fault)}.", "")
    for outcome in failed:
        if outcome.verdict is Verdict.NOT_RUN:
            continue
        yield f"<details><summary>{_html(f'{outcome.verdict}: {outcome.test}: {outcome.end.reason}')}</summary>"
        yield ""
        yield from _fenced(list(fault_lines(outcome)))
        yield from ("", "</details>", "")
    not_run = [outcome.test for outcome in failed if outcome.verdict is Verdict.NOT_RUN]
    if not_run:
        yield f"Not run: {', '.join(map(_text, not_run[:NOT_RUN_NAMED]))}" + (
            f" and {len(not_run) - NOT_RUN_NAMED} more" if len(not_run) > NOT_RUN_NAMED else ""
        )
        yield ""


def _bug_section(run: Run) -> Iterator[str]:
    for title, wanted in (("Known bugs that this kernel shows", True), ("Known bugs that do not show here", False)):
        bugs = [bug for bug, seen in sightings(run).items() if bool(seen.shown) is wanted]
        if bugs:
            yield from (f"### {title}", "")
            yield from (f"- {_text(bug_line(bug))}" for bug in bugs)
            yield ""


def _fenced(lines: list[str]) -> Iterator[str]:
    longest = max((len(ticks) for line in lines for ticks in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}text", *lines, fence)


def _text(text: str) -> str:
    """One line in which nothing is markup: what Markdown or HTML would take for its own is escaped."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", _html(text))


def _html(text: str) -> str:
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
