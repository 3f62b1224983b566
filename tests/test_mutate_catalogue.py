"""The catalogue of mutants: that its entries are sound, and apply to the kernel that they were written against."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kvmgmem.catalogue.contract import load
from kvmgmem.errors import HarnessError
from kvmgmem.lab.cache import cache_root
from kvmgmem.mutate.apply import Applied, apply_mutant, check, read_source
from kvmgmem.mutate.build import mutate_flavour
from kvmgmem.mutate.catalogue import OPERATORS, choose, load_mutants, node_ids, selftests_by_name

SELFTESTS = Path(__file__).parent.parent / "selftests"
MUTANTS = load_mutants()

ENTRY = """
[[mutant]]
id = "a"
file = "f.c"
function = "f"
operator = "dropped check"
find = "x"
put = "y"
breaks = ["GM-CRE-001"]
first = ["test_x"]
"""


def trees() -> list[Path]:
    """Kernel trees that happen to be in the cache; they are only read."""
    return sorted(path for path in (cache_root() / "sources").glob("[!.]*") if (path / "virt/kvm/guest_memfd.c").is_file())


def test_there_are_enough_of_them_and_everywhere() -> None:
    """At least eighty that count, every operator, about half of them in guest_memfd.c."""
    counted = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert len(counted) >= 80
    assert {mutant.operator for mutant in MUTANTS} == set(OPERATORS)
    share = sum(mutant.file == "virt/kvm/guest_memfd.c" for mutant in counted) / len(counted)
    assert 0.35 < share < 0.65


def test_every_entry_changes_something_and_breaks_a_rule() -> None:
    """What is put in differs, and the rows of the contract exist."""
    for mutant in MUTANTS:
        assert re.fullmatch(r"[a-z0-9-]+", mutant.id)
        assert " ".join(mutant.find.split()) != " ".join(mutant.put.split()), mutant.id
        assert mutant.breaks, mutant.id
        assert set(mutant.breaks) <= set(load()), mutant.id


def test_the_tests_that_look_first_exist() -> None:
    """Each name means one selftest; one that was renamed would make the first round blind."""
    tests = selftests_by_name(SELFTESTS)
    for mutant in MUTANTS:
        for name in mutant.first:
            assert len(node_ids(replace(mutant, first=(name,)), tests)) == 1, f"{mutant.id}: {name}"


@pytest.mark.skipif(not trees(), reason="no kernel tree in the cache")
def test_all_apply_to_the_kernel_that_they_were_written_against() -> None:
    """In 7.3 each mutant finds its place; in another kernel those that do not say so."""
    for tree in trees():
        found = check(tree, MUTANTS)
        lost = {name: answer for name, answer in found.items() if not isinstance(answer, Applied)}
        if tree.name.startswith("7.3."):
            assert lost == {}
        assert all(getattr(answer, "reason", "") for answer in lost.values())


@pytest.mark.skipif(not trees(), reason="no kernel tree in the cache")
def test_no_two_mutants_are_the_same() -> None:
    """Two entries that make the same file would count one fault twice."""
    tree = trees()[-1]
    made: dict[str, str] = {}
    for mutant in MUTANTS:
        source = read_source(tree / mutant.file)
        answer = apply_mutant(source, mutant) if source is not None else None
        if isinstance(answer, Applied):
            text = " ".join(answer.text.split())
            assert made.setdefault(text, mutant.id) == mutant.id
            assert text != " ".join((source or "").split())


def test_the_flavour_is_base_with_failures_on_demand() -> None:
    options = {option.name: option.value for option in mutate_flavour().options}
    assert options["CONFIG_KVM_SW_PROTECTED_VM"] == options["CONFIG_FAILSLAB"] == "y"
    assert options["CONFIG_LOCALVERSION"] == '"-kvmgmem-mutate"'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ENTRY.replace('find = "x"\n', ""), "mutant a lacks find"),
        (ENTRY + 'finds = "x"\n', "mutant a has unknown fields: finds"),
        (ENTRY.replace("dropped check", "made worse"), "mutant a: 'made worse' is no operator"),
        (ENTRY.replace('first = ["test_x"]', ""), "mutant a names no selftest that is likely to notice"),
        (ENTRY.replace('["GM-CRE-001"]', '"GM-CRE-001"'), "mutant a: breaks is not a list of names"),
        (ENTRY + ENTRY, "two mutants are called a"),
        ("[[mutant]\n", "cannot read the catalogue"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    """One line says which entry is wrong, and what about it."""
    path = tmp_path / "mutants.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=re.escape(complaint)):
        load_mutants(path)


def test_mutants_are_chosen_by_id_and_function() -> None:
    first, second = MUTANTS[0], MUTANTS[1]
    assert choose(MUTANTS, [first.id, second.id, first.id]) == [first, second]
    assert choose(MUTANTS, function="kvm_gmem_setattr") == [m for m in MUTANTS if m.function == "kvm_gmem_setattr"]
    with pytest.raises(HarnessError, match="no mutant is called punch-everything") as caught:
        choose(MUTANTS, ["punch-everything"])
    assert "punch-" in caught.value.hint
    with pytest.raises(HarnessError, match="no mutant of the catalogue is in kvm_nothing"):
        choose(MUTANTS, function="kvm_nothing")


def test_tests_are_found_by_name_wherever_they_are(tmp_path: Path) -> None:
    """A selftest that moves to another file stays found; where two have one name, the file decides."""
    folder = tmp_path / "selftests"
    folder.mkdir()
    (folder / "test_a.py").write_text("def test_x(): pass\ndef helper(): pass\ndef test_both(): pass\n")
    (folder / "test_b.py").write_text("def test_both(): pass\n")
    tests = selftests_by_name(folder)
    assert tests == {
        "test_x": ["selftests/test_a.py::test_x"],
        "test_both": ["selftests/test_a.py::test_both", "selftests/test_b.py::test_both"],
    }
    names = ("test_x", "test_gone", "test_b.py::test_both")
    assert node_ids(replace(MUTANTS[0], first=names), tests) == [
        "selftests/test_a.py::test_x",
        "selftests/test_b.py::test_both",
    ]
