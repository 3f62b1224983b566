"""`kvmgmem.bug_coverage`: which tests name a known bug, read from their source, and how `kvmgmem contract` tells it."""

from pathlib import Path

import pytest

from kvmgmem import bug_coverage
from kvmgmem.catalogue import known_bugs
from kvmgmem.errors import HarnessError

SOURCE = '''
def refused(answer):
    known_bug("B14").expect(answer, 1, shows=2)

@would_show("B2", "clear-gmem-flag")
def test_dies(vm):
    """Not B7, which only a comment names."""  # would_show("B7")

class Helper:
    text = "known_bug('B9')"

def test_both(vm):
    if known_bug("B14").shows_if(True) or known_bug("B14").shows_if(False):
        other("B11")
'''


def selftests(directory: Path, source: str) -> Path:
    """A directory of selftests with one file."""
    made = directory / "selftests"
    made.mkdir()
    (made / "test_it.py").write_text(source)
    return made


def test_bugs_are_found_by_the_calls_that_name_them(tmp_path: Path) -> None:
    """A bug is named by `known_bug` or `would_show`, by id or short name, in a test or a helper, and counts once there."""
    found = bug_coverage.naming_tests(selftests(tmp_path, SOURCE))
    assert list(found) == list(known_bugs.load())
    assert {bug: tests for bug, tests in found.items() if tests} == {
        "B2": ["selftests/test_it.py::test_dies"],
        "B3": ["selftests/test_it.py::test_dies"],
        "B14": ["selftests/test_it.py::refused", "selftests/test_it.py::test_both"],
    }


def test_a_bug_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """A test that names a bug nobody wrote down is a mistake, and said with the nearest one."""
    with pytest.raises(HarnessError, match="'B140' is not the id of a known bug"):
        bug_coverage.naming_tests(selftests(tmp_path, SOURCE.replace("B14", "B140")))


def test_every_bug_is_told_with_its_tests_or_the_reason(tmp_path: Path) -> None:
    """The terminal and docs/contract.md list every bug: with its tests, or why there are none."""
    found = bug_coverage.naming_tests(selftests(tmp_path, SOURCE))
    lines = list(bug_coverage.text(found))
    at = lines.index(f"B2  {known_bugs.get('B2').title} ({known_bugs.get('B2').fix})")
    assert lines[at + 1] == "    selftests/test_it.py::test_dies"
    assert f"    {known_bugs.get('B16').not_tested_because}" in lines
    assert lines.count("    named by no test") == len(found) - 3 - 3  # B16, B22 and B34 say why
    rows = [line for line in bug_coverage.markdown(found) if line.startswith("| B")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {bug}" for bug in found]
    assert any(row.endswith("| `refused`<br>`test_both` |") for row in rows)
    assert all(row.count(" | ") == 5 for row in rows)
