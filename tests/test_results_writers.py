"""The writers, each on a run that has every verdict and the ugliest text that tests and kernels print."""

import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmgmem.results.junit import write_junit
from kvmgmem.results.ktap import write_ktap
from kvmgmem.results.markdown import write_markdown
from kvmgmem.results.records import (
    Circumstances,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Verdict,
)
from kvmgmem.results.run import NO_RUN_END, Run, collect
from kvmgmem.results.summary import write_summary
from kvmgmem.results.text import excerpt, lines_of, one_line, printable, wants_colour

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
    seed=7,
    extra={"numa_nodes": 1},
)
START = RunStart("ab", 1000.0, CIRCUMSTANCES)
END = RunEnd(1031.5, 0)
UGLY = "a\nb\r\tc #d # SKIP e ]]> <b> & \x1b[31mred\x00 \udcff\u202e\u2028 | `x` ```` \ufffe \\"
UGLY_LOG = ("Kernel panic - not syncing: VFS: Unable to mount", "reboot: System halted", "WARNING: \x1b[1mCPU\x07")
UGLY_DETAIL = "\n".join([
    UGLY,
    "Subtest: no such",
    "# Subtest: no such",
    "ok 1 no such",
    "not ok 2 no such",
    "1..99",
    "KTAP version 1",
    "TAP version 14",
    "List of all partitions:",
])  # fmt: skip


def case(number: int, verdict: Verdict, area: str | None, name: str = "", **end: Any) -> tuple[TestStart, TestEnd]:
    test = f"selftests/test_x.py::test_{number}{name}"
    start = TestStart(test, 1001.0, area, (f"{area}-001",) if area else (), f"Rule {number}\nover two lines.")
    return start, replace(TestEnd(test, 1002.0, verdict, duration=0.5), **end)


def a_run(*cases: tuple[TestStart, TestEnd], end: RunEnd | None = END) -> Run:
    records: list[Record] = [START, Plan(tuple(start.test for start, _ in cases))]
    for pair in cases:
        records += pair
    return collect([*records, *([end] if end else [])])


def every_verdict() -> Run:
    ugly: dict[str, Any] = {
        "reason": UGLY,
        "detail": UGLY_DETAIL,
        "kernel_log": UGLY_LOG,
        "repeat": "kvmgmem run -- -k 'x y'",
    }
    cases = [
        case(1, Verdict.PASSED, "GM-VM", bugs_absent=("B1", "B14")),
        case(2, Verdict.KNOWN_BUG, "GM-BIND", bugs_shown=("B14",)),
        case(3, Verdict.SKIPPED, "GM-BIND", reason="needs # SKIP two NUMA nodes"),
        case(4, Verdict.SKIPPED, "GM-BIND", reason="needs # SKIP two NUMA nodes"),
        case(5, Verdict.SKIPPED, None, reason="another\nreason"),
        case(6, Verdict.FAILED, "GM-FD", f"[{UGLY}]", **ugly),
        case(7, Verdict.CRASHED, "GM-FD", **ugly),
        case(8, Verdict.TIMEOUT, "GM-FD", **ugly),
        case(9, Verdict.SPLAT, "GM-LIFE", **ugly),
        case(10, Verdict.PANICKED, "GM-LIFE", **ugly),
        case(11, Verdict.ERROR, "GM-#O|D ", **ugly),
    ]
    records: list[Record] = [START, Note(1000.0, f"kernel log not watched: {UGLY}")]
    for pair in cases:
        records += pair
    records += [Plan(("selftests/test_x.py::test_12",)), RunEnd(1031.5, 5, left_out=("NUMA rows",))]
    return collect(records)


ALL_WELL = (
    case(1, Verdict.PASSED, "GM-VM"),
    case(2, Verdict.PASSED, "GM-BIND"),
    case(3, Verdict.SKIPPED, "GM-BIND", reason="needs two NUMA nodes"),
)

Writer = Callable[[Run, TextIO], None]
WRITERS: list[Writer] = [write_summary, write_ktap, write_junit, write_markdown]


def written(writer: Writer, run: Run) -> str:
    out = io.StringIO()
    writer(run, out)
    return out.getvalue()


@pytest.mark.parametrize("writer", WRITERS)
def test_no_control_character_or_surrogate_gets_out(writer: Writer) -> None:
    """Whatever tests and kernels print, no escape sequence reaches a terminal, and every file can be encoded."""
    text = written(writer, every_verdict())
    assert not set(text) & {chr(code) for code in (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))}
    assert not re.search("[\ud800-\udfff\u2028\u202e\ufffe]", text)
    assert "\\x1b[31mred\\x00 \\udcff\\u202e" in text.replace("\\\\", "\\").replace("\\[", "[")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("run", [a_run(), a_run(end=None), collect([])])
def test_a_run_without_tests_can_be_written(writer: Writer, run: Run) -> None:
    """An empty run, ended or not, is reported as what it is and crashes no writer."""
    text = written(writer, run)
    assert ("run-end" in text) is not run.complete


@pytest.mark.parametrize("writer", WRITERS)
def test_a_missing_run_end_is_told_by_every_format(writer: Writer) -> None:
    """All tests passed, but the run did not end: no format shows that as a success."""
    assert NO_RUN_END not in written(writer, a_run(*ALL_WELL))
    assert NO_RUN_END in written(writer, a_run(*ALL_WELL, end=None))


# --- summary ---


def test_summary_of_success_is_calm() -> None:
    """Success is the table, the skips by reason, and one line; no test is listed."""
    assert written(write_summary, a_run(*ALL_WELL)) == (
        "area        passed     failed  known bug    skipped      other\n"
        "GM-VM            1          .          .          .          .\n"
        "GM-BIND          1          .          .          1          .\n"
        "total            2          .          .          1          .\n"
        "\n"
        "Skipped (1):\n"
        "     1  needs two NUMA nodes\n"
        "\n"
        "OK: 2 passed, 1 skipped on 6.18.44, kvm_pvm, shadow paging, host in 31.5 s (exit 0)\n"
    )


def test_summary_of_a_failure_is_exact() -> None:
    """A failure comes with its rule, reason, rows, kernel log, detail and the command that repeats it."""
    failure = case(
        2,
        Verdict.FAILED,
        "GM-BIND",
        reason="assert 0 == EINVAL",
        detail="the request\n\n  E  0 == EINVAL\n",
        kernel_log=("[ 1.0] WARNING",),
        repeat="kvmgmem run -- x::test_2",
    )
    text = written(write_summary, a_run(ALL_WELL[0], failure))
    assert (
        "\nFAILED selftests/test_x.py::test_2\n"
        "  rule:   Rule 2 over two lines.\n"
        "  reason: assert 0 == EINVAL\n"
        "  rows:   GM-BIND-001\n"
        "  kernel log:\n"
        "    [ 1.0] WARNING\n"
        "  detail:\n"
        "    the request\n"
        "\n"
        "      E  0 == EINVAL\n"
        "  repeat: kvmgmem run -- x::test_2\n"
        "\n"
    ) in text
    assert text.splitlines()[-1].startswith("FAILED: 1 passed, 1 failed on 6.18.44")
    assert text.splitlines()[-1].endswith("(exit 1)")


def test_summary_has_every_verdict_in_its_place() -> None:
    """The gravest faults come first; what is neither passed, failed, known nor skipped is counted as other."""
    text = written(write_summary, every_verdict())
    headings = re.findall(r"^(PANICKED|SPLAT|ERROR|CRASHED|TIMEOUT|FAILED|NOT RUN)\b", text, re.MULTILINE)
    assert headings == ["PANICKED", "SPLAT", "ERROR", "CRASHED", "TIMEOUT", "FAILED", "NOT RUN"]
    assert re.search(r"^GM-FD +\. +1 +\. +\. +2$", text, re.MULTILINE)
    assert re.search(r"^total +1 +1 +1 +3 +6$", text, re.MULTILINE)
    assert re.search(r"^   +2  needs # SKIP two NUMA nodes\n +1  another\\nreason$", text, re.MULTILINE)
    assert "left out: NUMA rows" in text
    assert "\n\n\n" not in text
    assert text.splitlines()[-1] == (
        "KERNEL FAILED: 1 passed, 1 panicked, 1 splat, 1 error, 1 crashed, 1 timed out, 1 failed, 1 not run, "
        "1 known bug, 3 skipped on 6.18.44, kvm_pvm, shadow paging, host in 31.5 s (exit 5)"
    )


def test_summary_names_known_bugs_with_their_fix() -> None:
    """A bug that shows is named with fix and tests; one that was looked for in vain is named as gone."""
    text = written(write_summary, every_verdict())
    assert (
        "Known bugs that this kernel shows (1):\n"
        "  B14: Binding a range of the file that is already bound gives EINVAL (fixed by 7ea987a90585 in 7.2)\n"
        "      selftests/test_x.py::test_2\n"
        "      not shown in 1 test that looked for it:\n"
        "        selftests/test_x.py::test_1\n"
    ) in text
    assert (
        "Known bugs that do not show here (1):\n"
        "  B1: Binding adds guest_memfd_offset and size as signed numbers (fixed by eba85fee7fc6 in 7.2)\n"
    ) in text


def test_summary_bounds_what_it_lists() -> None:
    """A bug that many tests show and a detail of many lines are cut, and the rest is counted."""
    cases = [case(number, Verdict.KNOWN_BUG, "GM-BIND", bugs_shown=("B14", "B99")) for number in range(8)] + [
        case(9, Verdict.FAILED, "GM-FD", detail="\n".join(f"line {number}." for number in range(100)))
    ]
    text = written(write_summary, a_run(*cases))
    assert text.count("      and 3 tests more\n") == 2
    assert text.count("      selftests/test_x.py::test_5\n") == 0
    assert text.count("      selftests/test_x.py::test_4\n") == 2
    assert "\n  B99\n" in text  # a bug of a newer catalogue
    assert "    line 7.\n    ... 68 lines left out ...\n    line 76.\n" in text


def test_summary_colours_only_when_asked() -> None:
    """Escape sequences appear with colour and only then, and change nothing else."""
    plain, painted = io.StringIO(), io.StringIO()
    write_summary(every_verdict(), plain)
    write_summary(every_verdict(), painted, colour=True)
    assert "\033" not in plain.getvalue()
    assert "\033[31mFAILED selftests" in painted.getvalue()
    assert re.sub(r"\033\[\d+m", "", painted.getvalue()) == plain.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "environment", "wanted"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_when_to_colour(out: TextIO, environment: dict[str, str], wanted: bool) -> None:
    """Colour goes to a terminal, and not where NO_COLOR is set to anything."""
    assert wants_colour(out, environment) is wanted


def test_text_is_made_printable() -> None:
    """Ordinary text stays; newlines end lines or become escapes; other control characters become escapes."""
    assert printable("größer → ok") == "größer → ok"
    assert printable("a\n\tb\x1b\udc80") == "a\n\tb\\x1b\\udc80"
    assert one_line("a\n\tb") == "a\\n\\tb"
    assert lines_of("a\r\nb\x0cc\n\n") == ["a", "b\\x0cc"]
    assert lines_of("") == []
    assert excerpt(list("ab")) == ["a", "b"]


# --- KTAP ---


def ktap_shape(text: str) -> list[tuple[str, list[str]]]:
    """Check the structure of the KTAP line by line; return each top-level result line with its subtest's."""
    lines = text.splitlines()
    assert lines[0] == "KTAP version 1"
    plan = re.fullmatch(r"1\.\.(\d+)", lines[1])
    assert plan
    results: list[tuple[str, list[str]]] = []
    nested: list[str] = []
    subtest: str | None = None
    place = 2
    while place < len(lines):
        line = lines[place]
        place += 1
        if line == "    KTAP version 1":
            assert not nested
            header = re.fullmatch(r"    # Subtest: (.*)", lines[place])
            assert header
            subtest = header[1]
            count = re.fullmatch(r"    1\.\.(\d+)", lines[place + 1])
            assert count
            place += 2
        elif re.match(r"    (not )?ok ", line):
            nested.append(line[4:])
            assert line[4:].removeprefix("not ").startswith(f"ok {len(nested)} ")
        elif re.match(r"(not )?ok ", line):
            results.append((line, nested))
            assert line.removeprefix("not ").startswith(f"ok {len(results)} ")
            if subtest is not None:
                assert re.sub(" # .*", "", line).endswith(f" {subtest}")
                assert len(nested) == int(count[1])  # type: ignore[index]
            nested, subtest = [], None
        else:
            assert re.match(r" {0,4}#  |#$| {4}#$", line), line
    assert not nested
    assert len(results) == int(plan[1])
    return results


def test_ktap_of_every_verdict() -> None:
    """Plans match what follows, areas nest, and each verdict has its form; a known bug is a skip that says so."""
    results = dict(ktap_shape(written(write_ktap, every_verdict())))
    assert list(results) == [
        "ok 1 GM-VM",
        "not ok 2 GM-FD",
        "ok 3 GM-BIND # SKIP no test passed or failed",
        "not ok 4 GM-LIFE",
        "not ok 5 GM-\\x23O|D",
        "not ok 6 (none)",
    ]
    by_name = {re.sub(r"^(not )?ok \d+ ", "", line): tests for line, tests in results.items()}
    bind = by_name["GM-BIND # SKIP no test passed or failed"]
    assert bind[0] == (
        "ok 1 selftests/test_x.py::test_2 # SKIP known bug "
        "B14: Binding a range of the file that is already bound gives EINVAL (fixed by 7ea987a90585 in 7.2)"
    )
    assert bind[1] == "ok 2 selftests/test_x.py::test_3 # SKIP needs \\x23 SKIP two NUMA nodes"
    assert [line[:9] for line in by_name["GM-FD"]] == ["not ok 1 ", "not ok 2 ", "not ok 3 "]
    assert "a\\nb\\r\\tc \\x23d" in by_name["GM-FD"][0]
    assert by_name["(none)"] == [
        "ok 1 selftests/test_x.py::test_5 # SKIP another\\nreason",
        "not ok 2 selftests/test_x.py::test_12",
    ]


def test_ktap_diagnostics_precede_their_result() -> None:
    """The reader of a failure finds rule, reason and kernel log above its line."""
    text = written(write_ktap, every_verdict())
    before = text[: text.index("not ok 2 selftests/test_x.py::test_7")]
    last = before[before.rindex("\n    not ok 1 ") :]
    assert "    #  crashed: selftests/test_x.py::test_7\n" in last
    assert "    #    rule:   Rule 7 over two lines.\n" in last


def test_ktap_defuses_the_words_that_end_a_parse() -> None:
    """A kernel's last words in a diagnostic line must not end the parse of the tests after it."""
    text = written(write_ktap, every_verdict())
    assert not re.search("List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted", text)
    assert "Kernel  panic - not syncing: VFS: Unable to mount" in text


def test_ktap_of_a_run_that_did_not_end() -> None:
    """An entry of its own fails, so that a parser that reads result lines alone sees it."""
    results = ktap_shape(written(write_ktap, a_run(*ALL_WELL, end=None)))
    assert [line for line, _ in results] == ["ok 1 GM-VM", "ok 2 GM-BIND", "not ok 3 the run itself"]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.text(), st.text(), st.sampled_from(Verdict)), max_size=5))
def test_ktap_keeps_its_structure_whatever_the_text(texts: list[tuple[str, str, Verdict]]) -> None:
    """No name, reason or detail can add or take away a line that means something."""
    run = a_run(*(case(n, v, "GM-FD", a, reason=b, detail=b, kernel_log=(a,)) for n, (a, b, v) in enumerate(texts)))
    assert sum(len(nested) for _, nested in ktap_shape(written(write_ktap, run))) == len(texts)


def parser_of_the_kernel() -> Path:
    tree = os.environ.get("KVMGMEM_KERNEL_SOURCE")
    if not tree:
        pytest.skip("KVMGMEM_KERNEL_SOURCE names no kernel source tree, whose kunit.py would judge the KTAP")
    path = Path(tree) / "tools/testing/kunit/kunit.py"
    assert path.exists(), f"KVMGMEM_KERNEL_SOURCE={tree} has no tools/testing/kunit/kunit.py"
    return path


def kunit_parse(run: Run, tmp_path: Path) -> tuple[int, str]:
    """Let the kernel's own parser read the KTAP; return its exit status and what it printed."""
    parser = parser_of_the_kernel()
    file = tmp_path / "results.ktap"
    file.write_text(written(write_ktap, run), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-B", str(parser), "parse", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout


def test_the_kernels_parser_accepts_success(tmp_path: Path) -> None:
    """kunit.py parse agrees that all is well, without a complaint about the form."""
    status, text = kunit_parse(a_run(*ALL_WELL), tmp_path)
    assert status == 0
    assert "Ran 3 tests: passed: 2, skipped: 1" in text
    assert "[ERROR]" not in text


def test_the_kernels_parser_counts_every_verdict(tmp_path: Path) -> None:
    """kunit.py parse finds every test, a known bug among the skips, and no error of form in the ugliest text."""
    status, text = kunit_parse(every_verdict(), tmp_path)
    assert status != 0
    assert "Ran 12 tests: passed: 1, failed: 7, skipped: 4" in text
    assert "[ERROR]" not in text
    assert "[SKIPPED] selftests/test_x.py::test_2 (known bug B14: " in text
    assert "[FAILED] selftests/test_x.py::test_10" in text


def test_the_kernels_parser_sees_a_run_that_did_not_end(tmp_path: Path) -> None:
    """kunit.py parse fails a run whose tests all passed but which did not end."""
    status, text = kunit_parse(a_run(*ALL_WELL, end=None), tmp_path)
    assert status != 0
    assert "[FAILED] the run itself" in text


# --- JUnit ---


def test_junit_of_every_verdict() -> None:
    """The XML is well formed, its counts are those of its elements, and each verdict has its element."""
    root = ET.fromstring(written(write_junit, every_verdict()))
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "12",
        "failures": "1",
        "errors": "6",
        "skipped": "4",
    }
    for suite in root:
        assert suite.get("tests") == str(len(suite.findall("testcase")))
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(key) == str(len(suite.findall(f"testcase/{tag}")))
    kinds = {
        str(item.get("name")): [(x.tag, x.get("type")) for x in item if x.tag != "properties"]
        for item in root.iter("testcase")
    }
    ugly = next(name for name in kinds if name.startswith("test_6["))
    assert kinds.pop(ugly) == [("failure", "failed")]
    assert kinds == {
        "test_1": [],
        "test_2": [("skipped", "known-bug")],
        "test_3": [("skipped", "skipped")],
        "test_4": [("skipped", "skipped")],
        "test_5": [("skipped", "skipped")],
        "test_7": [("error", "crashed")],
        "test_8": [("error", "timeout")],
        "test_9": [("error", "splat")],
        "test_10": [("error", "panicked")],
        "test_11": [("error", "error")],
        "test_12": [("error", "not-run")],
    }


def test_junit_keeps_circumstances_rows_and_bugs() -> None:
    """Properties say what the suite ran on, which rows a case asserts, and which bug it showed."""
    root = ET.fromstring(written(write_junit, every_verdict()))
    suite = next(suite for suite in root if suite.get("name") == "GM-BIND")
    found = {item.get("name"): item.get("value") for item in suite.findall("properties/property")}
    assert found["release"] == "6.18.44"
    assert found["vm_types"] == "default"
    assert (found["seed"], found["numa_nodes"]) == ("7", "1")
    assert "flavour" not in found
    assert suite.get("timestamp") == "1970-01-01T00:16:40+00:00"
    assert suite.get("time") == "1.500"
    first = suite.find("testcase")
    assert first is not None
    assert (first.get("classname"), first.get("time")) == ("selftests.test_x", "0.500")
    assert [(item.get("name"), item.get("value")) for item in first.findall("properties/property")] == [
        ("contract", "GM-BIND-001"),
        ("rule", "Rule 2 over two lines."),
        ("known-bug", "B14"),
    ]
    skipped = first.find("skipped")
    assert skipped is not None
    assert str(skipped.get("message")).startswith("known bug B14: Binding a range of the file")


def test_junit_of_a_run_that_did_not_end() -> None:
    """The run as a whole has a suite with an error, so that no CI shows it green."""
    root = ET.fromstring(written(write_junit, a_run(*ALL_WELL, end=None)))
    assert [suite.get("name") for suite in root] == ["GM-VM", "GM-BIND", "run"]
    error = root.find("testsuite[@name='run']/testcase/error")
    assert error is not None
    assert error.get("message") == NO_RUN_END
    assert root.get("errors") == "1"


@settings(max_examples=50)
@given(st.text(st.characters()), st.sampled_from(Verdict), st.floats(allow_nan=False, allow_infinity=False))
def test_junit_is_well_formed_whatever_the_text(text: str, verdict: Verdict, time: float) -> None:
    """No text of a test and no clock of a guest breaks the XML."""
    run = collect([
        replace(START, time=time, circumstances=replace(CIRCUMSTANCES, extra={text: text})),
        TestStart(text, time, text, (text,), text),
        TestEnd(text, time, verdict, reason=text, detail=text, kernel_log=(text,), bugs_shown=(text,)),
        RunEnd(time, 0),
    ])  # fmt: skip
    assert len(list(ET.fromstring(written(write_junit, run)).iter("testcase"))) == 1


# --- Markdown ---


def test_markdown_of_success_is_short() -> None:
    """Success is one line, the table and the skips."""
    assert written(write_markdown, a_run(*ALL_WELL)) == (
        "**OK: 2 passed, 1 skipped on 6.18.44, kvm\\_pvm, shadow paging, host in 31.5 s (exit 0)**\n"
        "\n"
        "| area | passed | failed | known bug | skipped | other |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| GM-VM | 1 | 0 | 0 | 0 | 0 |\n"
        "| GM-BIND | 1 | 0 | 0 | 1 | 0 |\n"
        "\n"
        "### Skipped\n"
        "\n"
        "- 1: needs two NUMA nodes\n"
        "\n"
    )


def test_markdown_of_every_verdict() -> None:
    """Each fault has a fold with its detail, and no text of a test becomes markup."""
    text = written(write_markdown, every_verdict())
    assert text.count("<details><summary>") == text.count("</details>") == 6
    assert "<b" not in re.sub(r"`{3,}text\n.*?\n`{3,}\n", "", text, flags=re.DOTALL)
    assert "Not run: selftests/test\\_x.py::test\\_12\n" in text
    assert "- B14: Binding a range" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}


def test_markdown_fence_is_longer_than_any_in_the_text() -> None:
    """Backticks in a detail cannot close the block that shows it."""
    text = written(write_markdown, a_run(case(1, Verdict.FAILED, "GM-FD", detail="`````\n# a heading")))
    assert "``````text\n" in text
    assert "\n``````\n" in text
