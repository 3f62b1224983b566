"""KTAP version 1, as the kernel's own tools/testing/kunit/kunit.py parse reads it.

One nested subtest for each contract area, one result line for each test. What decided the form, in
tools/testing/kunit/kunit_parser.py of Linux 7.3:

- SKIP is the only directive that changes a status. "ok ... # XFAIL" would count as passed and "not ok ... # XFAIL" as
  failed, so a known bug is written as a skip whose reason begins with "known bug": neither a silent pass nor a failure.
- A name ends at the first "#", and a subtest's name must come back unchanged on its result line.
- There is no directive for a crash: such tests are "not ok", and the diagnostic lines before them say what happened.
- "# Subtest: " opens a subtest wherever it stands, and certain kernel messages end the parse in the middle of any line;
  diagnostic lines are written so that neither happens by what a test or a kernel printed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final, TextIO

from kvmgmem.results.known_bug_text import bugs_line
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, TestOutcome, by_area, run_fault
from kvmgmem.results.summary import fault_lines, verdict_line, where_it_ran
from kvmgmem.results.text import one_line

RUN_NAME: Final = "the run itself"
"""The name of the failed entry for a run that is at fault as a whole."""

# KTAP_END of kunit_parser.py; a second space keeps the words and breaks the match.
_END_OF_PARSE: Final = re.compile("(List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted)")


def write_ktap(run: Run, out: TextIO) -> None:
    """Write the run as KTAP: areas as subtests, and one more failed entry if the run as a whole is at fault."""
    groups = by_area(run)
    fault = run_fault(run)
    out.write("KTAP version 1\n")
    out.write(f"1..{len(groups) + bool(fault)}\n")
    out.write(_diagnostic(where_it_ran(run)))
    for number, (area, tests) in enumerate(groups.items(), start=1):
        for line in _subtest(number, _name(area), tests):
            out.write(line)
    if fault:
        out.write(_diagnostic(fault))
        out.write(f"not ok {len(groups) + 1} {RUN_NAME}\n")
    out.write(_diagnostic(verdict_line(run)))


def _subtest(number: int, name: str, tests: Sequence[TestOutcome]) -> Iterator[str]:
    yield "    KTAP version 1\n"
    yield f"    # Subtest: {name}\n"
    yield f"    1..{len(tests)}\n"
    for place, outcome in enumerate(tests, start=1):
        for line in _result(place, outcome):
            yield f"    {line}"
    if not all(map(_ok, tests)):
        yield f"not ok {number} {name}\n"
    elif any(outcome.verdict is Verdict.PASSED for outcome in tests):
        yield f"ok {number} {name}\n"
    else:
        yield f"ok {number} {name} # SKIP no test passed or failed\n"


def _ok(outcome: TestOutcome) -> bool:
    return outcome.verdict in (Verdict.PASSED, Verdict.SKIPPED, Verdict.KNOWN_BUG)


def _result(number: int, outcome: TestOutcome) -> Iterator[str]:
    name = _name(outcome.test)
    match outcome.verdict:
        case Verdict.PASSED:
            yield f"ok {number} {name}\n"
        case Verdict.SKIPPED:
            yield f"ok {number} {name} # SKIP {_directive_text(outcome.end.reason or 'no reason given')}\n"
        case Verdict.KNOWN_BUG:
            yield f"ok {number} {name} # SKIP known bug {_directive_text(bugs_line(outcome.end.bugs_shown))}\n"
        case _:
            yield _diagnostic(f"{outcome.verdict}: {outcome.test}")
            yield from map(_diagnostic, fault_lines(outcome))
            yield f"not ok {number} {name}\n"


def _name(text: str) -> str:
    """A name that the parser gives back whole: one line, no "#", nothing that it strips from either end."""
    name = _unhashed(text).strip()
    return re.sub(r"^(:?- )+", "", name) or "unnamed"


def _directive_text(text: str) -> str:
    return _unending(_unhashed(text).strip())


def _unhashed(text: str) -> str:
    """One line in which no second "# SKIP" can hide."""
    return one_line(text).replace("#", "\\x23")


def _diagnostic(text: str) -> str:
    # Two spaces at least: "# Subtest: " and "# SKIP" have one.
    return f"#  {_unending(one_line(text))}".rstrip() + "\n"


def _unending(text: str) -> str:
    return _END_OF_PARSE.sub(lambda match: match[0].replace(" ", "  ", 1), text)
