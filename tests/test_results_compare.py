"""Several runs side by side: what differs comes first, and is explained; the page holds all of it."""

import io
import json
import re

import pytest

from kvmgmem.results.compare import compare, write_comparison
from kvmgmem.results.html import write_html, write_html_comparison
from kvmgmem.results.known_bug_text import bug_line
from kvmgmem.results.records import Circumstances, Record, RunEnd, RunStart, TestEnd, TestStart, Verdict
from kvmgmem.results.run import Run, collect


def a_run(release: str, verdicts: dict[str, Verdict], *, variant: str = "", reason: str = "", detail: str = "") -> Run:
    """A run on a kernel in which tests had these verdicts."""
    facts = Circumstances(
        release,
        "kvm_amd",
        "tdp",
        "tcg",
        "cpu",
        ("default",),
        "guest",
        "0",
        "3",
        "9",
        extra={"variant": variant} if variant else {},
    )
    records: list[Record] = [RunStart("0" * 32, 1.0, facts)]
    for name, verdict in verdicts.items():
        bugs = ("B14",) if verdict is Verdict.KNOWN_BUG else ()
        absent = ("B14", "B3") if verdict is Verdict.PASSED and name.endswith("looks") else ()
        why = reason if verdict is not Verdict.PASSED else ""
        records.append(TestStart(name, 2.0, "GM-BIND", ("GM-BIND-014",), "A rule."))
        records.append(TestEnd(name, 3.0, verdict, reason=why, detail=detail, bugs_shown=bugs, bugs_absent=absent))
    records.append(RunEnd(4.0, 0))
    return collect(records)


def text_of(*runs: Run) -> str:
    out = io.StringIO()
    write_comparison(compare(runs), out)
    return out.getvalue()


def test_what_differs_is_named_with_its_reason_and_what_agrees_is_counted() -> None:
    """A test on which columns disagree is a line with a letter per column, and the reason of each that did not pass."""
    old = a_run("6.18.44", {"t::same": Verdict.PASSED, "t::other": Verdict.KNOWN_BUG})
    new = a_run("7.3.4", {"t::same": Verdict.PASSED, "t::other": Verdict.PASSED})
    text = text_of(old, new)
    assert re.search(r"^  b \.  t::other\n +A: B14: ", text, re.MULTILINE), text
    assert "t::same" not in text
    assert "1 of 2 tests agree in all 2 columns" in text
    assert "Every difference is a known bug, or something that the column says it lacks." in text


def test_faults_come_before_harmless_differences_and_are_all_named() -> None:
    """Failures are listed first and in full; many skips for one reason are counted."""
    skipped = {f"t::s{n}": Verdict.SKIPPED for n in range(10)}
    failed = {f"t::f{n}": Verdict.FAILED for n in range(10)}
    good = a_run("7.3.4", dict.fromkeys([*skipped, *failed], Verdict.PASSED))
    bad = a_run("7.2", {**skipped, **failed}, reason="no such thing")
    text = text_of(good, bad)
    assert text.index("t::f9") < text.index("t::s0")
    assert all(name in text for name in failed)
    assert "... and 7 more" in text
    assert "10 of the differences are not explained by" in text
    assert "t::s9" not in text


def test_a_bug_shows_does_not_or_was_not_looked_for_in_each_column() -> None:
    """One line a bug says where it is and where it is fixed; a bug that none of the columns has is no news."""
    bad = a_run("7.1", {"t::looks": Verdict.KNOWN_BUG})
    good = a_run("7.3.4", {"t::looks": Verdict.PASSED})
    blind = a_run("6.12", {"t::looks": Verdict.SKIPPED})
    text = text_of(bad, good, blind)
    assert "Known bugs (1):   b shows  . does not  (blank) not looked for\n  A B C\n  b .    B14: " in text
    assert "B3:" not in text
    assert "Known bugs (" not in text_of(good, blind)
    out = io.StringIO()
    write_html_comparison(compare([bad, good, blind]), out)
    assert data_of(out.getvalue())["bugs"] == [
        {"id": "B14", "line": bug_line("B14").removeprefix("B14: "), "shows": [True, False, None]}
    ]


def test_known_bugs_come_before_what_a_column_lacks() -> None:
    """A skip is harmless, and there are many."""
    names = ("t::a", "t::z")
    old = a_run("7.1", dict(zip(names, (Verdict.SKIPPED, Verdict.KNOWN_BUG), strict=True)), reason="no such thing")
    text = text_of(old, a_run("7.3", dict.fromkeys(names, Verdict.PASSED)))
    assert text.index("t::z") < text.index("t::a")


def test_a_test_that_a_column_lacks_is_a_blank() -> None:
    """No record is not a verdict: the column shows nothing, and the row counts as differing."""
    text = text_of(a_run("7.3", {"t::a": Verdict.PASSED}), a_run("7.2", {"t::a": Verdict.PASSED, "t::b": Verdict.PASSED}))
    assert re.search(r"^    \.  t::b$", text, re.MULTILINE), text
    assert "1 of the differences are not explained by" in text


def test_another_suites_run_says_nothing_by_not_having_a_test() -> None:
    """The selftests beside the kernel's own: no row differs, unless two columns of one suite disagree about it."""
    ours = a_run("7.3", {"selftests/test_a.py::test_a": Verdict.PASSED})
    theirs = a_run("7.3", {"kselftest::a": Verdict.PASSED, "kselftest::b": Verdict.PASSED})
    assert not compare([ours, theirs]).differing
    assert "3 of 3 tests agree in all columns of their suite." in text_of(ours, theirs)
    fewer = a_run("7.2", {"kselftest::a": Verdict.FAILED})
    assert [row.test for row in compare([ours, theirs, fewer]).differing] == ["kselftest::a", "kselftest::b"]
    # What belongs to no test, and a run that came to none, count everywhere.
    shaken = a_run("7.3", {"kselftest::a": Verdict.PASSED, "kernel::between-tests#1": Verdict.SPLAT})
    assert [row.test for row in compare([ours, shaken]).differing] == ["kernel::between-tests#1"]
    assert len(compare([ours, a_run("7.3", {})]).differing) == 1
    out = io.StringIO()
    write_html_comparison(compare([ours, theirs, fewer]), out)
    tests = data_of(out.getvalue())["tests"]
    assert isinstance(tests, list)
    assert [test["differs"] for test in tests] == [False, True, True]


def test_equal_labels_are_told_apart_and_variants_are_part_of_them() -> None:
    """Two runs of one kernel are #1 and #2; a variant's name is in the label."""
    runs = [a_run("7.3", {}), a_run("7.3", {}), a_run("7.3", {}, variant="npt0")]
    assert [column.label for column in compare(runs).columns] == ["7.3 #1", "7.3 #2", "7.3 npt0"]


def test_an_unfinished_run_says_so_in_its_column() -> None:
    """A column whose run did not end is not mistaken for a good one."""
    facts = Circumstances("7.3", "kvm_amd", "tdp", "tcg", "cpu", (), "guest", "0", "3", "9")
    cut = collect([RunStart("0" * 32, 1.0, facts), TestStart("t::a", 2.0)])
    assert "no run-end record" in text_of(cut, a_run("7.2", {"t::a": Verdict.PASSED}))


def data_of(page: str) -> dict[str, object]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    data: dict[str, object] = json.loads(match.group(1))
    return data


@pytest.mark.parametrize("ugly", ["</script><b>", "<!--", "\x1b[31m\0", "\udc80", "@DATA@"])
def test_the_page_survives_ugly_texts(ugly: str) -> None:
    """Whatever a kernel or a test prints, the page stays one page with the same data."""
    out = io.StringIO()
    write_html(a_run("7.3", {"t::a": Verdict.FAILED}, reason=ugly, detail=ugly), out)
    page = out.getvalue()
    assert page.count("</script>") == 2
    assert page.isascii()
    tests = data_of(page)["tests"]
    assert isinstance(tests, list)
    assert tests[0]["cells"][0]["verdict"] == "failed"


def test_the_page_is_self_contained_and_has_every_column() -> None:
    """The page loads nothing from elsewhere, and holds each column and its verdicts in order."""
    out = io.StringIO()
    runs = [a_run("7.2", {"t::a": Verdict.KNOWN_BUG}), a_run("7.3", {"t::a": Verdict.PASSED})]
    write_html_comparison(compare(runs), out)
    page = out.getvalue()
    assert not re.search(r"""(src|href)=|@import|url\(""", page)
    data = data_of(page)
    columns, tests = data["columns"], data["tests"]
    assert isinstance(columns, list)
    assert isinstance(tests, list)
    assert [column["label"] for column in columns] == ["7.2", "7.3"]
    assert [cell["verdict"] for cell in tests[0]["cells"]] == ["known-bug", "passed"]
    rows = data["rows"]
    assert isinstance(rows, dict)
    assert "already bound" in rows["GM-BIND-014"]["statement"]
