"""JUnit XML for CI systems: one test suite for each contract area.

A failed test is a <failure>; whatever kept a test from giving an answer (its process or the kernel died, a splat, a
timeout, the harness, a turn that never came) is an <error>. A known bug is a <skipped type="known-bug">, as an expected
failure is <skipped type="pytest.xfail"> to pytest's own writer: CI shows it apart from the passes without turning red,
and the message names the bug. A run that is at fault as a whole has a suite of its own with one <error>.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, TextIO

from kvmgmem.results.known_bug_text import bugs_line
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, TestOutcome, by_area, run_fault
from kvmgmem.results.summary import fault_lines
from kvmgmem.results.text import one_line

RUN_SUITE: Final = "run"

_ELEMENT_OF: Final = {
    Verdict.PASSED: "",
    Verdict.SKIPPED: "skipped",
    Verdict.KNOWN_BUG: "skipped",
    Verdict.FAILED: "failure",
}


def write_junit(run: Run, out: TextIO) -> None:
    """Write the run as JUnit XML. Characters that XML forbids are written as escapes, so that it is well formed."""
    root = ET.Element("testsuites", name="kvmgmem")
    for area, tests in by_area(run).items():
        _suite(root, run, area, tests)
    fault = run_fault(run)
    if fault:
        suite = ET.SubElement(root, "testsuite", name=RUN_SUITE, tests="1", failures="0", errors="1", skipped="0")
        _properties(suite, _circumstances(run))
        case = ET.SubElement(suite, "testcase", classname="kvmgmem", name="the run itself", time="0.000")
        ET.SubElement(case, "error", type="run", message=_attribute(fault))
    _totals(root)
    ET.indent(root)
    out.write('<?xml version="1.0" encoding="utf-8"?>\n')
    out.write(ET.tostring(root, encoding="unicode"))
    out.write("\n")


def _element_of(outcome: TestOutcome) -> str:
    return _ELEMENT_OF.get(outcome.verdict, "error")


def _suite(root: ET.Element, run: Run, area: str, tests: Sequence[TestOutcome]) -> None:
    elements = [_element_of(outcome) for outcome in tests]
    suite = ET.SubElement(
        root,
        "testsuite",
        name=_attribute(area),
        tests=str(len(tests)),
        failures=str(elements.count("failure")),
        errors=str(elements.count("error")),
        skipped=str(elements.count("skipped")),
        time=_seconds(sum(outcome.end.duration for outcome in tests)),
    )
    if run.start is not None:
        suite.set("timestamp", _timestamp(run.start))
    _properties(suite, _circumstances(run))
    for outcome in tests:
        _case(suite, outcome)


def _timestamp(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # a guest's clock may say anything
        return "1970-01-01T00:00:00+00:00"


def _seconds(duration: float) -> str:
    return f"{duration:.3f}"


def _case(suite: ET.Element, outcome: TestOutcome) -> None:
    file, _, name = outcome.test.partition("::")
    case = ET.SubElement(
        suite,
        "testcase",
        classname=_attribute(file.removesuffix(".py").replace("/", ".")),
        name=_attribute(name or file),
        time=_seconds(outcome.end.duration),
    )
    properties = [("contract", row) for row in outcome.contract]
    properties += [("rule", " ".join(outcome.rule.split()))] if outcome.rule else []
    properties += [("known-bug", bug) for bug in outcome.end.bugs_shown]
    properties += [("known-bug-absent", bug) for bug in outcome.end.bugs_absent]
    _properties(case, properties)
    tag = _element_of(outcome)
    if not tag:
        return
    if outcome.verdict is Verdict.KNOWN_BUG:
        message = f"known bug {bugs_line(outcome.end.bugs_shown)}"
    else:
        message = outcome.end.reason or "no reason given"
    element = ET.SubElement(case, tag, type=str(outcome.verdict), message=_attribute(message))
    if tag != "skipped":
        element.text = "\n".join(fault_lines(outcome))


def _circumstances(run: Run) -> list[tuple[str, str]]:
    if run.circumstances is None:
        return []
    fields = {**vars(run.circumstances), **run.circumstances.extra}
    del fields["extra"]
    return [(name, _value(value)) for name, value in fields.items() if value is not None]


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _properties(parent: ET.Element, properties: Sequence[tuple[str, str]]) -> None:
    if not properties:
        return
    group = ET.SubElement(parent, "properties")
    for name, value in properties:
        ET.SubElement(group, "property", name=_attribute(name), value=_attribute(value))


def _attribute(text: str) -> str:
    return one_line(text)


def _totals(root: ET.Element) -> None:
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
