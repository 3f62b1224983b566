"""What each selftest adds: which tests are idle, and what is kept of their answers."""

from pathlib import Path

import pytest

from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.guest import Trial
from kvmgmem.mutate.idle import Answers, Duties, answered, idle_tests, markdown
from kvmgmem.mutate.judge import Fate, How, Notice
from kvmgmem.mutate.state import Result
from kvmgmem.results.records import TestEnd, Verdict

SELFTESTS = """\
@contract("GM-CRE-001")
def test_killer(): ...

@contract("GM-CRE-001", "GM-CRE-002")
def test_alone(): ...

@contract("GM-CRE-001")
def test_of_a_bug():
    known_bug("B1")

@contract("GM-CRE-001")
def test_woken(): ...

@contract("GM-CRE-001")
def test_idle(): ...
"""
KILLED = (Result("m", Fate.KILLED, "wrong answer", "selftests/test_cre.py::test_killer[default]"),)


MUTANTS = {"m": Mutant("m", "virt/x.c", "f", "dropped check", "a", "b", ("GM-CRE-009",), ("test_killer",))}


def duties(folder: Path) -> Duties:
    selftests = folder / "selftests"
    selftests.mkdir()
    (selftests / "test_cre.py").write_text(SELFTESTS)
    return Duties.of(selftests)


def named(name: str) -> str:
    return f"selftests/test_cre.py::test_{name}"


def test_a_test_is_idle_that_nothing_speaks_for(tmp_path: Path) -> None:
    """Neither a mutant, nor a row of its own, nor a known bug; and one that fails when it is asked is idle no longer."""
    answers = Answers(tmp_path / "out" / "idle-tests.jsonl")
    known = duties(tmp_path)
    assert idle_tests(known, KILLED, answers) == [named("idle"), named("woken")]
    assert idle_tests(known, (), answers) == [named("idle"), named("killer"), named("woken")]
    answers.add({"mutant": "m", "asked": [named("idle"), named("woken")], "noticed": {named("woken"): "assert 1 == 0"}})
    assert idle_tests(known, KILLED, answers) == [named("idle")]
    answers.add({"skipped": [named("idle")]})
    assert idle_tests(known, KILLED, answers) == []


def test_answers_are_on_disk_at_once(tmp_path: Path) -> None:
    """And a line that was cut is as if it had not been written."""
    path = tmp_path / "idle-tests.jsonl"
    answers = Answers(path)
    answers.add({"mutant": "m", "asked": ["a", "b"], "noticed": {"a": "no"}})
    answers.add({"skipped": ["c"]})
    path.write_text(path.read_text() + '{"mutant": "n", "ask')
    again = Answers.read(path)
    assert (again.asked, again.noticed, again.skipped) == ({"m": {"a", "b"}}, {"a": {"m": "no"}}, {"c"})
    again.add({"mutant": "n", "asked": ["a"], "noticed": {}})
    assert Answers.read(path).asked == {"m": {"a", "b"}, "n": {"a"}}


@pytest.mark.parametrize(
    ("ended", "noticed", "done"),
    [
        pytest.param([], "", [], id="nothing"),
        pytest.param(["a[1]"], "", [], id="time ran out in the first"),
        pytest.param(["a[1]", "a[2]", "b[1]"], "", ["a"], id="time ran out in the last"),
        pytest.param(["a[1]", "a[2]", "b[1]"], "b[1]", ["a", "b"], id="a failure ended the guest"),
        pytest.param(["a[1]", "a[2]", "b[1]", "b[2]"], "", ["a", "b"], id="all"),
        pytest.param(["b[1]", "b[2]"], "", ["a", "b"], id="one that this kernel has no variant of"),
    ],
)
def test_a_test_has_answered_with_its_last_variant(ended: list[str], noticed: str, done: list[str]) -> None:
    """Or with the failure that ended its guest; not where the guest's time ran out before."""
    ends = tuple(TestEnd(name, 0.0, Verdict.PASSED) for name in ended)
    trial = Trial(("a[1]", "a[2]", "b[1]", "b[2]"), ends)
    notices = [Notice(How.WRONG_ANSWER, noticed, "1 == 0")] if noticed else []
    assert answered(["a", "b"], trial, notices) == done


def test_the_report_counts_each_test_once(tmp_path: Path) -> None:
    """By the strongest of what speaks for it; and names those that nothing does."""
    answers = Answers(tmp_path / "out" / "idle-tests.jsonl")
    known = duties(tmp_path)
    unasked = "\n".join(markdown(known, KILLED, MUTANTS, answers))
    assert "- 1 were the first" in unasked
    assert "- 1 others assert a row that no other test does" in unasked
    assert "- 1 others recognise a known bug" in unasked
    assert "- 2 are none of these, and were not asked" in unasked
    answers.add({"mutant": "m", "asked": [named("idle"), named("woken")], "noticed": {named("woken"): "assert 1 == 0"}})
    asked = "\n".join(markdown(known, KILLED, MUTANTS, answers))
    assert "- 1 others failed on a mutant" in asked
    assert "- 0 others need" in asked
    assert "- 1 noticed none" in asked
    assert f"- `{named('idle')}` (GM-CRE-001)" in asked
    assert named("woken") not in asked
    assert "yet" not in asked
    partly = Answers(tmp_path / "partly.jsonl", {"m": {named("woken")}})
    assert "Of 1 mutants not all of them have been asked **yet**" in "\n".join(markdown(known, KILLED, MUTANTS, partly))
