"""The record schema: what is written comes back, and what is no record is refused with the exact reason."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmgmem.results.records import (
    Circumstances,
    Heartbeat,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Verdict,
    parse_line,
    to_line,
)

CIRCUMSTANCES = Circumstances(
    release="6.18.44",
    backend="kvm_pvm",
    paging="shadow",
    accelerator="host",
    cpu_model="a CPU",
    vm_types=("default",),
    where="host",
    kvmgmem="0.1.0",
    python="3.11.2",
    pytest="8.0",
)

# Text may hold what Python makes of bytes that are not UTF-8 (surrogateescape), which are low surrogates only.
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
)
lists = st.lists(texts, max_size=4).map(tuple)
times = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
unknown_keys = texts.filter(lambda key: key not in Circumstances.__dataclass_fields__ or key == "extra")
circumstances = st.builds(
    Circumstances,
    release=texts,
    backend=texts,
    paging=texts,
    accelerator=texts,
    cpu_model=texts,
    vm_types=lists,
    where=texts,
    kvmgmem=texts,
    python=texts,
    pytest=texts,
    config_hash=st.none() | texts,
    flavour=st.none() | texts,
    seed=st.none() | st.integers(),
    extra=st.dictionaries(unknown_keys, json_values, max_size=3),
)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(RunStart, run=texts, time=times, circumstances=circumstances),
    st.builds(Plan, tests=lists),
    st.builds(TestStart, test=texts, time=times, area=st.none() | texts, contract=lists, rule=texts),
    st.builds(
        TestEnd,
        test=texts,
        time=times,
        verdict=st.sampled_from(Verdict),
        duration=times,
        reason=texts,
        detail=texts,
        bugs_shown=lists,
        bugs_absent=lists,
        kernel_log=lists,
        repeat=st.none() | texts,
        overhead=st.none() | times,
    ),
    st.builds(Note, time=times, text=texts),
    st.builds(Heartbeat, time=times),
    st.builds(RunEnd, time=times, exit=st.integers(0, 255), counts=st.dictionaries(texts, st.integers()), left_out=lists),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    """Any record survives the way through a line, and the line is one line of ASCII."""
    line = to_line(record)
    assert line.isascii()
    assert "\n" not in line
    assert parse_line(line) == record


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")) | json_values.map(json.dumps))
def test_anything_else_is_refused_by_value_error_only(line: str) -> None:
    """Whatever a line holds, the parser answers with a record or with ValueError."""
    try:
        record = parse_line(line)
    except ValueError:
        return
    assert parse_line(to_line(record)) == record


@given(records, st.data())
def test_a_cut_line_is_refused(record: Record, data: st.DataObject) -> None:
    """No beginning of a line passes for a whole one."""
    line = to_line(record)
    with pytest.raises(ValueError, match="not JSON"):
        parse_line(line[: data.draw(st.integers(0, len(line) - 1))])


def test_the_line_is_the_agreed_schema() -> None:
    """The keys are those that other programs read, in an order that a person can follow."""
    start = json.loads(to_line(RunStart("ab", 1.5, replace(CIRCUMSTANCES, extra={"numa_nodes": 2}))))
    assert list(start) == ["record", "schema", "run", "time", "circumstances"]
    assert (start["record"], start["schema"], start["circumstances"]["numa_nodes"]) == ("run-start", 1, 2)
    assert start["circumstances"]["vm_types"] == ["default"]
    assert start["circumstances"]["config_hash"] is None
    assert "extra" not in start["circumstances"]
    end = json.loads(to_line(TestEnd("t", 2.0, Verdict.KNOWN_BUG, bugs_shown=("B14",))))
    assert end == {
        "record": "test-end",
        "test": "t",
        "time": 2.0,
        "verdict": "known-bug",
        "duration": 0.0,
        "reason": "",
        "detail": "",
        "bugs_shown": ["B14"],
        "bugs_absent": [],
        "kernel_log": [],
        "repeat": None,
        "overhead": None,
        "properties": {},
    }
    assert json.loads(to_line(RunEnd(3.0, 0, {"passed": 1}, ("x",)))) == {
        "record": "run-end",
        "time": 3.0,
        "exit": 0,
        "counts": {"passed": 1},
        "left_out": ["x"],
    }


def test_unknown_circumstances_survive_and_known_ones_win() -> None:
    """A key of a newer version is kept; one that claims a known name does not replace the known value."""
    record = RunStart("ab", 1.0, replace(CIRCUMSTANCES, extra={"huge": [1, {"a": None}], "release": "another"}))
    back = parse_line(to_line(record))
    assert isinstance(back, RunStart)
    assert back.circumstances.extra == {"huge": [1, {"a": None}]}
    assert back.circumstances.release == "6.18.44"


def test_unknown_keys_of_a_record_are_dropped() -> None:
    """A record of a newer version with one more key is still read."""
    assert parse_line('{"record":"heartbeat","time":1,"load":0.5}') == Heartbeat(1.0)


def _line(**changes: Any) -> str:
    fields: dict[str, Any] = {"record": "test-end", "test": "t", "time": 1.0, "verdict": "passed"}
    return json.dumps({**fields, **changes})


def test_the_control_of_the_refusals_is_accepted() -> None:
    """The line that each refusal below changes in one place is a record."""
    assert parse_line(_line()) == TestEnd("t", 1.0, Verdict.PASSED)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "not JSON: Expecting value at character 0"),
        ("[1]", "not a JSON object but a list"),
        ("null", "not a JSON object but null"),
        ("true", "not a JSON object but a boolean"),
        ("{}", "a record: 'record' is missing"),
        (_line(record=1), "a record: 'record' must be text, not a whole number"),
        (_line(record="hello"), "'hello' is not a kind of record"),
        (_line(verdict="fine"), "test-end: 'fine' is not a verdict"),
        (_line(verdict=None), "test-end: 'verdict' must be text, not null"),
        (_line(time="now"), "test-end: 'time' must be a number, not text"),
        (_line(time=True), "test-end: 'time' must be a number, not a boolean"),
        (_line(time=None), "test-end: 'time' must be a number, not null"),
        (_line(time=10**400), "test-end: 'time' is too large a number"),
        (_line(duration=math.inf), "Infinity is not a number that a record may hold"),
        (_line(duration=math.nan), "NaN is not a number that a record may hold"),
        (_line(test=["t"]), "test-end: 'test' must be text, not a list"),
        (_line(bugs_shown="B1"), "test-end: 'bugs_shown' must be a list of texts"),
        (_line(kernel_log=["a", 1]), "test-end: 'kernel_log' must be a list of texts"),
        (_line(repeat={}), "test-end: 'repeat' must be text, not an object"),
        (_line(overhead="1"), "test-end: 'overhead' must be a number, not text"),
        ('{"record":"plan"}', "plan: 'tests' is missing"),
        ('{"record":"run-end","time":1}', "run-end: 'exit' is missing"),
        ('{"record":"run-end","time":1,"exit":1.0}', "run-end: 'exit' must be a whole number, not a number"),
        ('{"record":"run-end","time":1,"exit":0,"counts":[]}', "run-end: 'counts' must be an object, not a list"),
        (
            '{"record":"run-end","time":1,"exit":0,"counts":{"passed":"1"}}',
            "run-end: counts: 'passed' must be a whole number, not text",
        ),
        ('{"record":"run-start","schema":2}', "run-start: written in schema 2, and only schema 1 can be read"),
        (
            '{"record":"run-start","schema":1,"run":"a","time":1,"circumstances":{}}',
            "run-start: circumstances: 'release' is missing",
        ),
    ],
)
def test_what_is_no_record_is_refused_with_the_reason(line: str, reason: str) -> None:
    """Each refusal names the field and what is wrong with it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        parse_line(line)
    assert str(caught.value) == reason


def test_nesting_without_end_is_refused() -> None:
    """A line made to exhaust the stack is damage like any other."""
    with pytest.raises(ValueError, match=r"nested too deeply|not JSON"):
        parse_line("[" * 100_000)


def test_a_number_that_json_lacks_cannot_be_written() -> None:
    """The writer refuses what its reader would refuse."""
    with pytest.raises(ValueError, match="JSON"):
        to_line(Heartbeat(math.nan))


def test_severity_is_ordered_as_the_exit_codes_rank_verdicts() -> None:
    """Harmless verdicts come before those that fail a test, these before the harness's, and the kernel's come last."""
    assert [verdict.value for verdict in sorted(Verdict, key=lambda verdict: verdict.severity)] == [
        "passed",
        "skipped",
        "known-bug",
        "not-run",
        "failed",
        "timeout",
        "crashed",
        "error",
        "splat",
        "panicked",
    ]


def test_import_is_light() -> None:
    """In a guest under emulation every module costs milliseconds."""
    program = (
        "import sys, kvmgmem.results.records, kvmgmem.results.stream\n"
        "heavy = {'xml', 'hypothesis', 'pytest', 'asyncio', 'subprocess', 'difflib', 'datetime'} & set(sys.modules)\n"
        "sys.exit(f'heavy: {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
