"""`kvmgmem contract`: what a row's cell says of a kernel."""

import pytest

from kvmgmem.catalogue import contract, known_bugs
from kvmgmem.contract_report import RowReport, Told
from kvmgmem.results.records import Verdict

ROW = "GM-BIND-012"
PASSED = Told(Verdict.PASSED, "", ())
SKIPPED = Told(Verdict.SKIPPED, "no such thing here", ())
OWN, OTHER = "B1", "B14"


def shows(*bugs: str) -> Told:
    return Told(Verdict.KNOWN_BUG, "", bugs)


@pytest.mark.parametrize(
    ("told", "cell"),
    [
        ([], "-"),
        ([SKIPPED], "skipped: no such thing here"),
        ([SKIPPED, PASSED], "passed"),
        ([PASSED, shows(OWN)], "known-bug B1"),
        ([shows(OWN, OTHER), shows(OWN)], "known-bug B1"),
        ([shows(OTHER), PASSED], "passed"),
        ([shows(OTHER), SKIPPED], "hidden by B14"),
        ([shows(OWN), Told(Verdict.FAILED, "", ())], "failed"),
        ([shows("B999"), PASSED], "passed"),
    ],
)
def test_a_cell_says_what_concerns_its_row(told: list[Told], cell: str) -> None:
    """A test of many rows that shows the bug of one leaves the others to their own tests."""
    assert ROW in known_bugs.get(OWN).rows
    assert ROW not in known_bugs.get(OTHER).rows
    assert RowReport(contract.row(ROW), answers={"a kernel": told}).cell("a kernel") == cell
