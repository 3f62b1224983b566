"""A campaign of mutants, with a make and a guest that are stand-ins: rounds, resuming, trees, reports."""

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kvmgmem.catalogue.contract import area_of
from kvmgmem.cli import main
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate import campaign as campaign_module
from kvmgmem.mutate import report, tree
from kvmgmem.mutate.apply import without_comments
from kvmgmem.mutate.build import Built
from kvmgmem.mutate.campaign import Campaign, Plan
from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.guest import Guest, Trial
from kvmgmem.mutate.idle import Answers, Duties, IdleTests, Relation
from kvmgmem.mutate.judge import Fate
from kvmgmem.mutate.modules import Kernel
from kvmgmem.mutate.scheduler import load_distributed
from kvmgmem.mutate.state import Circumstances, Result, State, mutant_digest
from kvmgmem.results.records import TestEnd, Verdict

SOURCE = """\
int f(int a)
{
	return a == 1;
}

int g(int b)
{
	return b == 2;
}
"""
FIRST, SECOND, OTHER = (
    "selftests/test_cre.py::test_first",
    "selftests/test_cre.py::test_second",
    "selftests/test_z.py::test_z",
)
TESTS = {"test_first": [FIRST], "test_second": [SECOND], "test_z": [OTHER]}


def mutant(name: str, find: str = "a == 1", put: str = "a == 7", function: str = "f", **more: str) -> Mutant:
    return Mutant(name, "virt/x.c", function, "dropped check", find, put, ("GM-CRE-001",), ("test_first",), **more)


def compiled(source: str) -> str:
    """As a compiler does, it makes nothing of comments and white space."""
    return "".join(without_comments(source).split())


@dataclass
class Lab:
    """A source tree, and a make and a guest that look at the private tree and say what they saw."""

    plan: Plan
    state: State
    notices: dict[str, str] = field(default_factory=dict)
    """Text in the source to the test that notices it."""
    runs: list[tuple[str, ...]] = field(default_factory=list)
    unbuildable: str = "#error"
    config: str = "CONFIG_A=y\n"
    goals: list[tuple[str, ...]] = field(default_factory=list)
    kernels: list[tuple[Kernel, str]] = field(default_factory=list)
    """What was booted, and the text in it."""
    guests: list[Guest] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def base(self, private: Path, log: Path, jobs: int, progress: Progress) -> Path:
        return self._image(private)

    def make(
        self,
        private: Path,
        log: Path,
        jobs: int,
        stop: threading.Event | None = None,
        goals: Sequence[str] = ("bzImage",),
    ) -> Built:
        self.goals.append(tuple(goals))
        if self.unbuildable in (private / "virt/x.c").read_text():
            return Built("x.c:1: error: #error", 1.0)
        if "bzImage" in goals:
            self._image(private)
        for module in (goal for goal in goals if goal.endswith(".ko")):
            built = private / tree.OBJECTS / module
            built.parent.mkdir(parents=True, exist_ok=True)
            built.write_text(compiled((private / "virt/x.c").read_text()))
        return Built("", 1.0)

    def _image(self, private: Path) -> Path:
        objects = private / tree.OBJECTS
        for name in ("arch/x86/boot", "include/config"):
            (objects / name).mkdir(parents=True, exist_ok=True)
        (objects / ".config").write_text(self.config)
        (objects / "include/config/kernel.release").write_text("7.3.4-kvmgmem-mutate\n")
        image = objects / "arch/x86/boot/bzImage"
        image.write_text((private / "virt/x.c").read_text())
        return image

    def guest(self, guest: Guest, kernel: Kernel, tests: Sequence[str], records: Path, *, stop_at_failure: bool) -> Trial:
        text = (kernel.modules[0] if kernel.modules else kernel.image).read_text()
        with self.lock:
            self.runs.append(tuple(tests))
            self.kernels.append((kernel, text))
            self.guests.append(guest)
        selections = [test for test in tests if not test.startswith("--")] or list({FIRST, SECOND, OTHER})
        planned = tuple(
            test
            for test in (FIRST, SECOND, OTHER)
            if any(test == chosen or test.startswith(f"{chosen}::") for chosen in selections)
        )
        failing = {test for token, test in self.notices.items() if token in text}
        ends = tuple(
            TestEnd(
                test,
                0.0,
                Verdict.FAILED if test in failing else Verdict.PASSED,
                reason="answered 7" if test in failing else "",
            )
            for test in planned
        )
        failed = [number for number, end in enumerate(ends, start=1) if end.verdict is Verdict.FAILED]
        ends = ends[: failed[0]] if failed and stop_at_failure else ends
        return Trial(planned, ends, complete=len(ends) == len(planned))

    def campaign(self, **changes: object) -> Campaign:
        campaign = Campaign(replace(self.plan, **changes), self.state, Progress("mutants", io.StringIO()))  # type: ignore[arg-type]
        campaign.prepare()
        return campaign

    def fate(self, name: str) -> tuple[Fate, str, str]:
        result = self.state.results[name]
        return result.fate, result.test, result.stage


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    source = tmp_path / "linux"
    (source / "virt").mkdir(parents=True)
    (source / "kernel").mkdir()
    (source / "Makefile").write_text("VERSION = 7\nPATCHLEVEL = 3\n")
    (source / "Kconfig").write_text("")
    (source / "virt/x.c").write_text(SOURCE)
    (source / "virt/y.c").write_text("int y;\n")
    selftests = tmp_path / "selftests"
    selftests.mkdir()
    for name in ("test_cre.py", "test_z.py"):
        (selftests / name).write_text("")
    guest = Guest(tmp_path / "image", "tcg", 5.0, "qemu", snapshots=tmp_path / "snapshots")
    plan = Plan(source, tmp_path / "work", guest, selftests, TESTS, "digest", ("virt/x.c",))
    plan.work.mkdir()
    lab = Lab(plan, State(tmp_path / "out" / "mutants.jsonl"))
    monkeypatch.setattr(campaign_module, "build_base", lab.base)
    monkeypatch.setattr(campaign_module, "build_again", lab.make)
    monkeypatch.setattr(campaign_module, "run_tests", lab.guest)
    return lab


def test_a_mutant_is_killed_by_the_test_that_looks_first(lab: Lab) -> None:
    """One boot with only that test; the tests that everybody else needs are not asked."""
    lab.notices["a == 7"] = FIRST
    lab.campaign().run([mutant("m")])
    assert lab.fate("m") == (Fate.KILLED, FIRST, "first")
    assert lab.runs == [(FIRST,), (FIRST,)]  # the unmutated kernel, then the mutant


def test_the_rounds_widen_until_a_test_notices(lab: Lab) -> None:
    """Named tests, then their files and those of the broken rule's area, then everything."""
    lab.notices["a == 7"] = SECOND
    lab.notices["b == 7"] = OTHER
    lab.campaign().run([mutant("near"), mutant("far", "b == 2", "b == 7", "g"), mutant("never", "a == 1", "1 == a")])
    assert lab.fate("near") == (Fate.KILLED, SECOND, "file")
    assert lab.fate("far") == (Fate.KILLED, OTHER, "rest")
    assert lab.fate("never") == (Fate.SURVIVED, "", "rest")


def test_a_campaign_of_less_depth_leaves_mutants_undecided_and_a_deeper_one_takes_them_up(lab: Lab) -> None:
    lab.notices["a == 7"] = OTHER
    lab.campaign(depth="first").run([mutant("m")])
    assert lab.fate("m") == (Fate.UNDECIDED, "", "first")
    digests = {"m": lab.state.results["m"].digest}
    assert lab.state.left([mutant("m")], digests, "first") == []
    assert lab.state.left([mutant("m")], digests, "rest") == [mutant("m")]
    lab.campaign().run([mutant("m")])
    assert lab.fate("m") == (Fate.KILLED, OTHER, "rest")
    assert [run for run in lab.runs if run == (FIRST,)] == [(FIRST,)] * 2  # the unmutated kernel's, and the mutant's once


def test_the_kernels_own_tests_are_asked_about_what_is_known(lab: Lab) -> None:
    """Without ours a second time; and not about what no guest can tell."""
    lab.notices["a == 7"] = FIRST
    mutants = [mutant("m"), mutant("same", put="1 == a", equivalent="it is the same")]
    lab.campaign(depth="first").run(mutants)
    asked: list[str] = []

    def theirs(about: Mutant, result: Result, kernel: Kernel, records: Path) -> Result:
        asked.append(kernel.image.read_text())
        return replace(result, kselftest="survived")

    runs = len(lab.runs)
    again = lab.campaign(depth="first")
    again.besides = theirs
    digests = {name: result.digest for name, result in lab.state.results.items()}
    left = lab.state.left(mutants, digests, "first", kselftest=True)
    assert left == mutants[:1]
    again.run(left)
    assert asked == [SOURCE.replace("a == 1", "a == 7")]
    assert lab.fate("m") == (Fate.KILLED, FIRST, "first")
    assert lab.state.results["m"].kselftest == "survived"
    assert len(lab.runs) == runs
    lab.campaign(depth="first").run(mutants)  # ours alone, once more
    assert len(lab.runs) == runs + 1
    assert lab.state.results["m"].kselftest == "survived"


def test_idle_tests_are_asked_by_themselves(lab: Lab) -> None:
    """Those of the rows, then the areas, that the mutant breaks, until one made them fail; also behind one that failed."""
    (lab.plan.selftests / "test_cre.py").write_text(
        "".join(f'@contract("GM-CRE-001")\ndef {test.rpartition("::")[2]}(): ...\n' for test in (FIRST, SECOND))
        + '@contract("GM-CRE-003")\ndef test_alone(): ...\n'
    )
    # Another row of the same area, which two tests assert; the second is one that this kernel has nothing for.
    (lab.plan.selftests / "test_z.py").write_text(
        "".join(f'@contract("GM-CRE-002")\ndef {name}(): ...\n' for name in ("test_z", "test_without_its_like_here"))
    )
    lab.notices.update({"a == 7": FIRST, "a == 8": FIRST})
    mutants = [mutant("m"), mutant("n", put="a == 8")]
    lab.campaign(depth="first").run(mutants)
    lab.runs.clear()

    def ask(notices: dict[str, str], relation: Relation = str) -> list[str]:
        lab.notices = notices
        campaign = lab.campaign(depth="first")
        campaign.besides = idle = IdleTests(campaign, Duties.of(lab.plan.selftests), Answers.read(path), relation)
        left = idle.prepare(mutants)
        campaign.run(left)
        return [mutant.id for mutant in left]

    path = lab.state.path.with_name("idle-tests.jsonl")
    absent = "selftests/test_z.py::test_without_its_like_here"
    assert ask({"a == 8": SECOND}) == ["m", "n"]
    # The unmutated kernel, then both mutants. FIRST has noticed some, and test_alone has a row of its own.
    assert lab.runs == [(SECOND, absent, OTHER), (SECOND,), (SECOND,)]
    assert Answers.read(path).skipped == {absent}
    assert Answers.read(path).noticed == {SECOND: {"n": "answered 7"}}
    assert ask({}) == []
    lab.runs.clear()
    assert ask({}, area_of) == ["m", "n"]
    assert lab.runs == [(OTHER,)] * 2
    assert ask({}, area_of) == []
    assert lab.fate("n") == (Fate.KILLED, FIRST, "first")


def test_an_idle_test_behind_one_that_fails_has_its_turn(lab: Lab) -> None:
    """A failure ends the guest; those behind it are asked in another one, those before it are not asked again."""
    for test in (FIRST, SECOND, OTHER):
        file, _, name = test.partition("::")
        with (lab.plan.selftests / Path(file).name).open("a") as source:
            source.write(f'@contract("GM-CRE-001")\ndef {name}(): ...\n')
    lab.state.add(Result("m", Fate.KILLED, "wrong answer", digest=mutant_digest(mutant("m"), SOURCE)))
    lab.notices["a == 7"] = SECOND
    campaign = lab.campaign()
    answers = Answers(lab.state.path.with_name("idle-tests.jsonl"))
    campaign.besides = idle = IdleTests(campaign, Duties.of(lab.plan.selftests), answers, str)
    campaign.run(idle.prepare([mutant("m")]))
    assert lab.runs == [(FIRST, SECOND, OTHER), (FIRST, SECOND, OTHER), (OTHER,)]
    assert answers.asked == {"m": {FIRST, SECOND, OTHER}}
    assert answers.noticed == {SECOND: {"m": "answered 7"}}


def test_what_fails_without_a_mutant_is_left_out(lab: Lab) -> None:
    """It is deselected, and kills nothing."""
    lab.notices["return"] = FIRST
    lab.campaign().run([mutant("m")])
    assert lab.fate("m")[0] is Fate.SURVIVED
    assert all(f"--deselect={FIRST}" in run for run in lab.runs if run != (FIRST,) and run[:1] == (FIRST,))
    assert f"--deselect={FIRST}" in lab.runs[-1]


def test_mutants_without_a_verdict_say_why(lab: Lab) -> None:
    """Those that do not build, no longer apply, or are equivalent; none of them is booted."""
    broken = mutant("broken", put="\n#error\n")
    lab.campaign().run([broken, mutant("lost", "a == 3"), mutant("same", put="1 == a", equivalent="it is the same")])
    assert lab.fate("broken")[0] is Fate.DOES_NOT_BUILD
    assert lab.fate("lost")[0] is Fate.DOES_NOT_APPLY
    assert lab.fate("same")[0] is Fate.EQUIVALENT
    assert lab.state.results["lost"].reason == "f has changed: what the mutant replaces is not there"
    assert lab.runs == [(FIRST,)]  # the unmutated kernel alone
    assert report.score(lab.state.results.values()).counted == 0


def test_one_mutant_at_a_time_and_never_in_the_source(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each starts from the original text, and somebody's tree stays as it is."""
    seen: list[str] = []

    def watch(private: Path, log: Path, jobs: int, *_: object) -> Built:
        seen.append((private / "virt/x.c").read_text())
        return lab.make(private, log, jobs)

    monkeypatch.setattr(campaign_module, "build_again", watch)
    before = {path: path.read_bytes() for path in lab.plan.source.rglob("*") if path.is_file()}
    lab.campaign(depth="first").run([mutant("a"), mutant("b", "b == 2", "b == 7", "g")])
    assert seen == [SOURCE.replace("a == 1", "a == 7"), SOURCE.replace("b == 2", "b == 7")]
    assert {path: path.read_bytes() for path in lab.plan.source.rglob("*") if path.is_file()} == before


def test_a_mutant_of_another_file_finds_the_first_file_restored(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults at once would tell of neither."""
    (lab.plan.source / "virt/y.c").write_text(SOURCE)
    plan = replace(lab.plan, files=("virt/x.c", "virt/y.c"))
    seen: list[tuple[str, str]] = []

    def watch(private: Path, log: Path, jobs: int, *_: object) -> Built:
        seen.append(((private / "virt/x.c").read_text(), (private / "virt/y.c").read_text()))
        return lab.make(private, log, jobs)

    monkeypatch.setattr(campaign_module, "build_again", watch)
    other = replace(mutant("b"), file="virt/y.c")
    lab.campaign(files=plan.files, depth="first").run([mutant("a"), other])
    assert seen == [(SOURCE.replace("a == 1", "a == 7"), SOURCE), (SOURCE, SOURCE.replace("a == 1", "a == 7"))]


MODULAR = "CONFIG_IRQ_BYPASS_MANAGER=m\nCONFIG_KVM=m\nCONFIG_KVM_AMD=m\nCONFIG_KVM_INTEL=m\n"
KVM_GOALS = ("virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko")


def modular(lab: Lab) -> Plan:
    """Have the lab's kernel hold KVM in modules, and its one source file be KVM's."""
    lab.config = MODULAR
    (lab.plan.source / "virt/kvm").mkdir()
    (lab.plan.source / "virt/kvm/guest_memfd.c").write_text(SOURCE)
    return replace(lab.plan, files=("virt/kvm/guest_memfd.c", "virt/x.c"))


def test_a_mutant_of_kvm_is_modules_on_the_unmutated_kernel(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only they are made anew, they are gone when it is judged, and the next one's are its own."""
    lab.plan = modular(lab)
    inner = lab.make

    def make(private: Path, *arguments: object, **named: object) -> Built:
        (private / "virt/x.c").write_text((private / "virt/kvm/guest_memfd.c").read_text())
        return inner(private, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(campaign_module, "build_again", make)
    lab.notices[compiled("a == 7")] = FIRST
    campaign = lab.campaign(depth="first")
    campaign.run(
        [
            replace(mutant("seen"), file="virt/kvm/guest_memfd.c"),
            replace(mutant("unseen", "b == 2", "b == 7", "g"), file="virt/kvm/guest_memfd.c"),
            replace(mutant("comment", put="a == 1 /* or not */"), file="virt/kvm/guest_memfd.c"),
        ]
    )
    assert lab.goals == [KVM_GOALS] * 4
    (base, original), (seen, mutated), (_, second) = lab.kernels
    sources = (SOURCE, SOURCE.replace("a == 1", "a == 7"), SOURCE.replace("b == 2", "b == 7"))
    assert (original, mutated, second) == tuple(compiled(source) for source in sources)
    assert base.image == seen.image == lab.plan.work / "base/bzImage"
    assert [path.name for path in seen.modules] == ["000-irqbypass.ko", "001-kvm.ko", "002-kvm-amd.ko"]
    assert all(guest.snapshots == lab.plan.guest.snapshots for guest in lab.guests)
    assert lab.fate("seen") == (Fate.KILLED, FIRST, "first")
    assert lab.fate("unseen") == (Fate.UNDECIDED, "", "first")
    assert lab.fate("comment")[0] is Fate.EQUIVALENT
    assert lab.state.results["comment"].reason == campaign_module.SAME_CODE
    assert list((lab.plan.work / "kernels").iterdir()) == []


def test_a_mutant_outside_of_kvm_is_a_whole_kernel(lab: Lab) -> None:
    """Its own image, and modules that fit to it."""
    lab.plan = modular(lab)
    lab.campaign(depth="first").run([mutant("m")])
    assert lab.goals == [KVM_GOALS, ("bzImage", *KVM_GOALS)]
    kernel, _ = lab.kernels[-1]
    assert kernel.image == lab.plan.work / "kernels/m/bzImage"
    assert len(kernel.modules) == 3
    assert [guest.snapshots for guest in lab.guests] == [lab.plan.guest.snapshots, None]  # nobody boots it twice


def test_several_jobs_share_the_mutants(lab: Lab) -> None:
    lab.notices["a == 7"] = FIRST
    mutants = [mutant(f"m{number}") for number in range(8)]
    lab.campaign(jobs=3).run(mutants)
    assert {lab.fate(entry.id)[0] for entry in mutants} == {Fate.KILLED}
    assert all((lab.plan.work / f"tree-{number}" / "virt/x.c").is_file() for number in (1, 2, 3))


def test_a_run_goes_on_where_it_was_interrupted(lab: Lab) -> None:
    """What was written is kept, a line that was cut is done again, and so is a mutant whose entry was edited."""
    lab.campaign(depth="first").run([mutant("a"), mutant("b")])
    with lab.state.path.open("ab") as file:
        file.write(b'{"mutant": "c", "fate": "kil')
    again = State(lab.state.path)
    assert set(again.results) == {"a", "b"}
    edited = mutant("b", put="a == 8")
    digests = {entry.id: mutant_digest(entry, SOURCE) for entry in (mutant("a"), edited, mutant("c"))}
    assert [entry.id for entry in again.left([mutant("a"), edited, mutant("c")], digests, "first")] == ["b", "c"]
    again.add(Result("c", Fate.KILLED))
    assert set(State(lab.state.path).results) == {"a", "b", "c"}


def test_results_of_two_kernels_are_not_mixed(lab: Lab) -> None:
    lab.campaign()
    with pytest.raises(HarnessError, match="holds the results of another campaign"):
        State(lab.state.path).begin(Circumstances("7.4.0", "abc", "tcg", "2 CPUs"))


def test_a_private_tree_is_links_but_for_what_mutants_change(lab: Lab) -> None:
    private = lab.plan.work / "tree"
    tree.make_tree(lab.plan.source, private, ["virt/x.c", "virt/gone.c"])
    assert (private / "kernel").is_symlink()
    assert (private / "virt/y.c").is_symlink()
    assert not (private / "virt").is_symlink()
    assert not (private / "virt/x.c").is_symlink()
    tree.write(private, "virt/x.c", b"mutant")
    assert (lab.plan.source / "virt/x.c").read_text() == SOURCE
    tree.restore(lab.plan.source, private, "virt/x.c")
    stamp = (private / "virt/x.c").stat().st_mtime_ns
    tree.make_tree(lab.plan.source, private, ["virt/x.c"])
    assert (private / "virt/x.c").stat().st_mtime_ns == stamp  # or make would build it again
    tree.write(private, "virt/y.c", b"mutant")  # a link, whose target is somebody's file
    assert (lab.plan.source / "virt/y.c").read_text() == "int y;\n"
    tree.copy_tree(private, lab.plan.work / "tree-b")
    assert (lab.plan.work / "tree-b/kernel").is_symlink()
    assert (lab.plan.work / "tree-b/virt/x.c").stat().st_mtime_ns == stamp


def test_a_tree_that_was_configured_in_place_is_refused(lab: Lab) -> None:
    (lab.plan.source / ".config").write_text("")
    with pytest.raises(HarnessError, match="configured in place"):
        tree.make_tree(lab.plan.source, lab.plan.work / "tree", ["virt/x.c"])


def results() -> tuple[list[Result], dict[str, Mutant]]:
    mutants = [mutant("dead"), mutant("alive", survives="nobody looks"), mutant("same", equivalent="it is the same")]
    found = [
        Result("dead", Fate.KILLED, "splat", FIRST, "WARNING | in f", "first", 10.0, 20.0, 12.0, "survived"),
        Result("alive", Fate.SURVIVED, stage="rest", build_seconds=10.0, guest_seconds=80.0, kselftest="guest_memfd_test"),
        Result("same", Fate.EQUIVALENT, reason="it is the same"),
    ]
    return found, {entry.id: entry for entry in mutants}


def test_the_score_counts_what_was_decided() -> None:
    found, _ = results()
    assert str(report.score(found)) == "1 of 2 killed (50.0 %)"
    assert str(report.kselftest_score(found)) == "1 of 2 killed (50.0 %)"
    assert [result.mutant for result in report.only_ours(found)] == ["dead"]
    assert str(report.score([])) == "no mutant was decided"


def test_the_reports_tell_survivors_and_why() -> None:
    found, mutants = results()
    text = "\n".join(report.markdown(found, mutants, Circumstances("7.3.4", "abc", "tcg", "2 CPUs")))
    assert "**1 of 2 killed (50.0 %)**" in text
    assert "not been tried" not in text
    more = mutants | {"later": mutant("later")}
    assert "Of 4 mutants 1 have **not been tried** yet" in "\n".join(report.markdown(found, more, None))
    assert "- **alive** (survived; `x.c:f`, dropped check, GM-CRE-001): nobody looks" in text
    assert "- **same**: it is the same" in text
    row = f"| dead | `x.c:f` | dropped check | GM-CRE-001 | killed: splat | `{FIRST}` | 12 | survived |"
    assert row in text
    assert "| dropped check | 1 | 1 | 1 |" in text
    assert "\n    kvmgmem mutate --source 7.3 --with-kselftest\n    kvmgmem mutate --report --evidence" in text
    assert "One mutant took 12 s of processor time on average" in text
    assert "half took at most 30 s" in text
    lines = report.summary(found, mutants)
    assert "score: 1 of 2 killed (50.0 %)" in lines
    content = json.loads(report.as_json(found, mutants, None))
    assert content["score"] == {"killed": 1, "counted": 2, "percent": 50.0}
    assert content["mutants"][0]["seconds"] == 30.0


def test_the_section_of_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("# Evidence\n\nWords.\n")
    report.insert_section(page, ["one"])
    report.insert_section(page, ["two"])
    text = page.read_text()
    assert text.startswith("# Evidence\n\nWords.\n\n")
    assert (text.count("## Mutations"), "one" in text, "two" in text) == (1, False, True)
    page.write_text(text + "## Coverage\n")
    report.insert_section(page, ["three"])
    assert page.read_text().endswith(f"{report.END}\n## Coverage\n")
    page.write_text(report.BEGIN)
    with pytest.raises(HarnessError, match="without its end"):
        report.insert_section(page, ["four"])


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--only", "nothing-like-it"], ExitCode.USAGE, "no mutant is called nothing-like-it"),
        ([], ExitCode.USAGE, "no kernel tree is named"),
        (["--source", "/", "--jobs", "0"], ExitCode.USAGE, "--jobs 0 is too small"),
        (["--source", "/", "--scheduler", "tcp://a", "--with-kselftest"], ExitCode.USAGE, "exclude each other"),
        (["--source", "/", "--again", "eaten"], ExitCode.USAGE, "--again eaten: no mutant has that fate"),
        (["--source", "/"], ExitCode.HARNESS, "/ is not a kernel source tree"),
        (["--report"], ExitCode.NOTHING_RAN, "holds no results of these mutants"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: list[str], code: ExitCode, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mutate", *words, "--out", str(tmp_path / "out")]) == code
    assert told in capsys.readouterr().err


def test_the_list_says_what_does_not_apply(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutate", "--list", "--function", "kvm_gmem_setattr"]) == 0
    assert "2 mutants\n" in capsys.readouterr().out
    assert main(["mutate", "--list", "--function", "kvm_gmem_setattr", "--source", str(lab.plan.source)]) == 0
    assert "does not apply: there is no virt/kvm/guest_memfd.c" in capsys.readouterr().out


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr("kvmgmem.mutate.scheduler.importlib.import_module", missing)
    with pytest.raises(HarnessError, match=r"dask\.distributed, which is not installed") as caught:
        load_distributed()
    assert "kvmgmem[mutate-distributed]" in caught.value.hint
    assert caught.value.code is ExitCode.USAGE


@pytest.fixture
def finished(lab: Lab, tmp_path: Path) -> Path:
    """What `make O=DIR` leaves of a build from the lab's source, as far as it matters."""
    objects = tmp_path / "objects"
    (objects / "virt").mkdir(parents=True)
    (objects / "Makefile").write_text(f"# Automatically generated\ninclude {lab.plan.source}/Makefile\n")
    (objects / ".config").write_text("CONFIG_A=y\n")
    (objects / "vmlinux").write_text("")
    (objects / "virt/.x.o.cmd").write_text(
        f"savedcmd_virt/x.o := gcc -I{lab.plan.source}/include -c {lab.plan.source}/virt/x.c\n"
    )
    return objects


def test_objects_of_a_finished_build_are_made_to_fit(lab: Lab, finished: Path) -> None:
    """The commands name the sources as the private tree does, or make would build all again; the original stays."""
    before = (finished / "virt/.x.o.cmd").read_text()
    campaign = lab.campaign(objects=finished)
    seeded = lab.plan.work / "tree-1" / tree.OBJECTS
    assert (seeded / "virt/.x.o.cmd").read_text() == "savedcmd_virt/x.o := gcc -I../include -c ../virt/x.c\n"
    assert (seeded / "virt/.x.o.cmd").stat().st_mtime_ns == (finished / "virt/.x.o.cmd").stat().st_mtime_ns
    assert (finished / "virt/.x.o.cmd").read_text() == before
    original, copied = lab.plan.source / "virt/x.c", lab.plan.work / "tree-1/virt/x.c"
    assert copied.stat().st_mtime_ns == original.stat().st_mtime_ns
    assert campaign.plan.objects == finished


def test_objects_of_another_source_are_refused(lab: Lab, finished: Path, tmp_path: Path) -> None:
    (finished / "Makefile").write_text(f"include {tmp_path}/Makefile\n")
    with pytest.raises(HarnessError, match=r"was built from .*, not from"):
        lab.campaign(objects=finished)


@pytest.mark.parametrize("lost", ["Makefile", "vmlinux", ".config"])
def test_an_unfinished_build_is_refused(lab: Lab, finished: Path, lost: str) -> None:
    (finished / lost).unlink()
    with pytest.raises(HarnessError, match="holds no kernel that was built there"):
        lab.campaign(objects=finished)
