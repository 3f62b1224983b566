"""The catalogues: complete, consistent with each other, and firm against ids that do not exist."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest

from kvmgmem import bug_coverage
from kvmgmem.catalogue import contract, known_bugs
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.run import selftests_directory
from kvmgmem.splats import find_splats

ROWS_PER_AREA = {
    "GM-VM": 15,
    "GM-CAP": 20,
    "GM-CRE": 17,
    "GM-FD": 34,
    "GM-MAP": 43,
    "GM-NUMA": 10,
    "GM-FAL": 24,
    "GM-SLOT": 33,
    "GM-BIND": 36,
    "GM-LIFE": 24,
    "GM-RUN": 49,
    "GM-ATTR": 20,
    "GM-PF": 20,
    "GM-DIRTY": 7,
    "GM-ENC": 23,
    "GM-RES": 18,
    "GM-HWP": 10,
    "GM-RACE": 20,
    "GM-OWN": 34,  # C1 to C33, and C4p
}


def test_every_area_has_its_rows() -> None:
    """No row was lost: a row may be added, with its count here, and none goes away unnoticed."""
    assert Counter(row.area for row in contract.load().values()) == ROWS_PER_AREA


def test_areas_are_listed_in_the_order_of_the_rows() -> None:
    """`AREAS` has each area of the rows once, in their order, and each has a title."""
    assert [area.id for area in contract.AREAS] == list(dict.fromkeys(row.area for row in contract.load().values()))
    assert all(area.title for area in contract.AREAS)


def test_numbers_of_an_area_have_no_gap() -> None:
    """Rows of an area are numbered from 001 on without a gap, so a missing one shows."""
    for area, count in ROWS_PER_AREA.items():
        if area != "GM-OWN":
            ids = [row.id for row in contract.load().values() if row.area == area]
            assert ids == [f"{area}-{number:03}" for number in range(1, count + 1)]


def test_ownership_statements_are_complete() -> None:
    """C1 to C33 are there, and C4p behind C4, each with a design and an oracle."""
    rows = [row for row in contract.load().values() if row.area == "GM-OWN"]
    wanted = [f"C{number}" for number in range(1, 34)]
    wanted.insert(4, "C4p")
    assert [row.id for row in rows] == wanted
    assert all(row.design and row.oracle for row in rows)


def test_every_row_says_something_and_how_it_was_checked() -> None:
    """A row has a statement, and outside GM-OWN the evidence: how it was verified."""
    for row in contract.load().values():
        assert row.statement
        assert row.area == "GM-OWN" or re.match(r"[Rr]\b", row.verified), row


def test_area_of_agrees_with_the_rows() -> None:
    """The area that the form of an id tells is the one in the row."""
    assert all(contract.area_of(row.id) == row.area for row in contract.load().values())


def test_known_row() -> None:
    """A row comes back with its fields, and an absent field is empty."""
    row = contract.row("GM-BIND-014")
    assert row.statement == "File range already bound (front, back, inside, identical)"
    assert row.call == "7.3 → EEXIST; 6.18 → EINVAL"
    assert (row.precondition, row.design) == ("", "")
    with pytest.raises(FrozenInstanceError):
        row.call = ""  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wanted", "suggested"),
    [
        ("GM-BIND-07", "GM-BIND-007"),
        ("gm-fd-001", "GM-FD-001"),
        ("GM-MAP-999", "GM-MAP-009"),
        ("C34", "C3"),
        ("nonsense", ""),
    ],
)
def test_unknown_row_is_refused_with_a_suggestion(wanted: str, suggested: str) -> None:
    """An id without a row is refused as a mistake of its writer, and the nearest id is named."""
    with pytest.raises(HarnessError, match=f"^'{wanted}' is not the id of a contract row$") as caught:
        contract.row(wanted)
    assert (f"did you mean '{suggested}'?" in caught.value.hint) is bool(suggested)
    assert ("did you mean" in caught.value.hint) is bool(suggested)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize("wanted", ["", "GM-BIND", "GM-BIND-", "GM-OWN-001", "GM-NONE-001", "C", "Cp", "B1", "x\ny"])
def test_area_of_what_is_no_id_is_refused(wanted: str) -> None:
    """Text that has the form of no row's id has no area."""
    with pytest.raises(HarnessError, match="is not the id of a contract row"):
        contract.area_of(wanted)


def test_legend_explains_the_short_names_in_use() -> None:
    """Every upstream test that a row names, and every file that a row abbreviates, is explained."""
    legend = contract.legend()
    for row in contract.load().values():
        for name in re.findall(r"\b[A-Z][A-Z0-9]{2}\b", re.sub(r"\(.*?\)", "", row.upstream)):
            assert name in legend["upstream"], row
        for name in re.findall(r"(?:^|[;,→] ?)(\w+):", row.source):
            assert name in legend["source"], row


def test_loading_waits_for_the_first_question() -> None:
    """Importing the catalogue reads no file, and loads nothing heavy into a guest."""
    program = (
        "import sys, pathlib\n"
        "pathlib.Path.read_text = lambda *_, **__: sys.exit('read on import')\n"
        "import kvmgmem.catalogue.contract, kvmgmem.catalogue.known_bugs\n"
        "heavy = {'difflib', 'xml', 'hypothesis', 'importlib.resources', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(f'heavy: {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_catalogues_are_one_row_to_a_line() -> None:
    """The files diff well: each row is a line of its own."""
    lines = contract.CATALOGUE_FILE.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('{"id": ') for line in lines) == len(contract.load())
    lines = known_bugs.CATALOGUE_FILE.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('{"id": ') for line in lines) == len(known_bugs.load())


def test_no_id_stands_twice() -> None:
    """A second row with the id of another would hide it."""
    for file, rows in (
        (contract.CATALOGUE_FILE, json.loads(contract.CATALOGUE_FILE.read_text(encoding="utf-8"))["rows"]),
        (known_bugs.CATALOGUE_FILE, json.loads(known_bugs.CATALOGUE_FILE.read_text(encoding="utf-8"))),
    ):
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids)), file


def test_known_bugs_are_complete_and_name_rows_that_exist() -> None:
    """B1 to B34, each with its rows in the contract, a title, one sentence of symptom, and a short name of its own."""
    bugs = known_bugs.load()
    assert list(bugs) == [f"B{number}" for number in range(1, 35)]
    for bug in bugs.values():
        assert bug.rows
        assert all(contract.row(row_id) for row_id in bug.rows)
        assert bug.title
        assert not bug.title.endswith(".")
        assert bug.symptom.endswith(".")
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", bug.slug)
        assert all(re.fullmatch(r"[0-9a-f]{12}", commit) for commit in bug.commits)
        assert re.fullmatch(r"(CVE-\d{4}-\d+)?", bug.cve)
    assert len({bug.slug for bug in bugs.values()}) == len(bugs)


def test_each_known_bug_has_a_regression_test_or_a_sentence_why_not() -> None:
    """A bug that selftests name needs no excuse; any other says in one sentence why no test can show it."""
    for bug_id, tests in bug_coverage.naming_tests(selftests_directory()).items():
        reason = known_bugs.get(bug_id).not_tested_because
        assert bool(tests) != bool(reason), f"{bug_id}: {tests}, {reason!r}"
        assert not reason or reason.endswith(".")


def test_reports_of_known_bugs_are_complaints() -> None:
    """The line by which a bug is recognised in the kernel's log is one that would be a splat otherwise."""
    bug = known_bugs.get("B27")
    title = "WARNING: arch/x86/kvm/../../../virt/kvm/kvm_main.c:4418 at kvm_vcpu_ioctl+0x8ea/0x9a0, CPU#1: init/50"
    assert bug.is_reported_by(title)
    before_7_0 = "WARNING: CPU: 1 PID: 50 at arch/x86/kvm/../../../virt/kvm/kvm_main.c:4305 kvm_vcpu_ioctl+0x5f1/0x6a0 [kvm]"
    assert bug.is_reported_by(before_7_0)
    assert not bug.is_reported_by(title.replace("kvm_main.c", "guest_memfd.c"))
    assert find_splats([title])
    unbalanced = "WARNING: arch/x86/kvm/../../../virt/kvm/kvm_main.c:1293 at kvm_destroy_vm+0x27a/0x2a0, CPU#1: init/43"
    assert known_bugs.get("B7").is_reported_by(unbalanced)
    assert not bug.is_reported_by(unbalanced)
    assert not known_bugs.get("B1").is_reported_by("")


@pytest.mark.parametrize("bug_id", ["B1", "B2", "B3", "B6", "B7", "B8"])
def test_no_cve_where_none_is_confirmed(bug_id: str) -> None:
    """No public archive confirms a CVE for these, so none is printed."""
    assert "CVE" not in repr(known_bugs.get(bug_id))


def test_bug_by_id_and_by_short_name() -> None:
    """A bug answers to its id and to its short name, and says how it was fixed."""
    bug = known_bugs.get("overlap-is-einval")
    assert bug is known_bugs.get("B14")
    assert bug.fix == "fixed by 7ea987a90585 in 7.2"
    assert known_bugs.get("B18").fix == "fixed in 6.18"
    assert known_bugs.get("B24").fix == "no fix known"


@pytest.mark.parametrize(("wanted", "suggested"), [("B141", "B14"), ("b14", "B14"), ("overlap-einval", "overlap-is-einval")])
def test_unknown_bug_is_refused_with_a_suggestion(wanted: str, suggested: str) -> None:
    """An id or short name without a bug is refused, and the nearest one is named."""
    with pytest.raises(HarnessError, match=f"^'{wanted}' is not the id of a known bug$") as caught:
        known_bugs.get(wanted)
    assert f"did you mean '{suggested}'?" in caught.value.hint
