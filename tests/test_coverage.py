"""`kvmgmem coverage`: counters from the guest to the host, gcov's answer to numbers, numbers and reasons to a report.

What gcov says comes from a C program that the host's gcc builds here, laid out like the kernel's tree.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmgmem.coverage import coverage_cli, report
from kvmgmem.coverage.catalogue import EVERY_LINE, Catalogue, Measured, Reason, load_catalogue
from kvmgmem.coverage.counts import Count, add, count, parse
from kvmgmem.coverage.coverage_cli import STATE, VARIANTS, add_coverage_parser, run_coverage
from kvmgmem.coverage.notes import (
    Gcov,
    Notes,
    compiler_version,
    find_gcov,
    find_notes,
    lets_allocations_fail,
    probe,
    require_counting,
)
from kvmgmem.coverage.numbers import Numbers, Share, measure
from kvmgmem.coverage.page import find_gcovr, write_page
from kvmgmem.coverage.report import Circumstances, Machine
from kvmgmem.coverage.source import Source
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.guest.gcov import COUNTERS, END, messages
from kvmgmem.lab.guest.machine import CONTROL, RESULTS
from kvmgmem.lab.guest.machine import Machine as QemuMachine
from kvmgmem.lab.guest.qemu import Line, Qemu
from kvmgmem.lab.kernel.kbuild import COUNTED_FOLDERS
from kvmgmem.lab.kernel.kernels import Kernel, keep_coverage_notes
from kvmgmem.lab.supervision.boot import Boot
from kvmgmem.lab.supervision.counters import CounterFiles
from kvmgmem.lab.supervision.lane import Lane
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.supervisor import Request, Supervisor

FILE = "virt/kvm/guest_memfd.c"
SOURCE = """\
int puts(const char *);

/* A comment (with a call) above. */
static int __bind(int size, int slots)
{
	if (size <= 0)
		return -22;
	if (slots > 2) {
		puts("many");
		return -17;
	}
	return 0;
}

int release(void)
{
	return puts("never run");
}

int main(int argc, char **argv)
{
	return __bind(argc - 1, argc) == -22;
}
"""
MANY, EEXIST, EINVAL, NEVER = 9, 10, 7, 17


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a program in it, built with gcov: source and notes side by side, and the program above."""
    if shutil.which("gcc") is None or shutil.which("gcov") is None:
        pytest.skip("needs gcc and gcov")
    tree = tmp_path_factory.mktemp("tree")
    return build(tree, SOURCE)


def build(tree: Path, source: str) -> Path:
    """Compile it where the kernel has its file of that name; without optimisation a line is a line."""
    place = tree / FILE
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(source)
    flags = ["-O0", "--coverage"]
    subprocess.run(["gcc", *flags, "-c", FILE, "-o", str(place.with_suffix(".o"))], cwd=tree, check=True)
    subprocess.run(["gcc", *flags, str(place.with_suffix(".o")), "-o", "program"], cwd=tree, check=True)
    return tree


def ran(built: Path, folder: Path, arguments: int) -> Path:
    """A boot's folder: what the program counts when it is called with so many arguments."""
    counters = (built / FILE).with_suffix(".gcda")
    counters.unlink(missing_ok=True)
    subprocess.run([str(built / "program"), *("x" * arguments)], stdout=subprocess.DEVNULL, check=False)
    target = folder / "some/where/objects" / FILE
    target.parent.mkdir(parents=True)
    counters.rename(target.with_suffix(".gcda"))
    return folder


def gcov() -> Gcov:
    """The host's."""
    found = probe("gcov")
    assert found is not None
    return found


# --- from the guest to the host ---------------------------------------------------------------------------------------


def debugfs(folder: Path) -> Path:
    """What gcov has in debugfs: counters, and links to what lies on the machine that built the kernel."""
    place = folder / "root/objects/virt/kvm"
    place.mkdir(parents=True)
    (place / "guest_memfd.gcda").write_bytes(b"adcg" * 1000)
    (place / "kvm_main.gcda").write_bytes(os.urandom(3000))
    (place / "kvm_main.gcno").symlink_to("/nowhere/kvm_main.gcno")
    (folder / "reset").write_text("")
    return folder


def test_counters_arrive_as_they_were_sent(tmp_path: Path) -> None:
    """Every file, with its content, at its place; and the boot's folder is there only when all of them are."""
    root = debugfs(tmp_path / "debugfs")
    files = CounterFiles(tmp_path / "host")
    sent = [{"record": kind, **fields} for kind, fields in messages(root)]
    assert [message["record"] for message in sent] == [COUNTERS, COUNTERS, END]
    for message in sent[:-1]:
        files.take(3, message)
        assert files.boots() == []
    files.take(3, sent[-1])
    (boot,) = files.boots()
    assert boot.name == "boot-3"
    place = Path("root/objects/virt/kvm")
    for name in ("guest_memfd.gcda", "kvm_main.gcda"):
        assert (boot / place / name).read_bytes() == (root / place / name).read_bytes()
    files.lose(3, "it is whole, and stays")
    assert (files.boots(), list(files.lost())) == ([boot], [])
    with pytest.raises(HarnessError, match="holds counters already"):
        files.require_none()


def test_a_boot_without_an_end_is_lost_and_says_why(tmp_path: Path) -> None:
    """What it had sent is no whole, and its reason is kept."""
    files = CounterFiles(tmp_path / "host")
    kind, fields = next(messages(debugfs(tmp_path / "debugfs")))
    files.take(1, {"record": kind, **fields})
    files.lose(1, "kernel panic")
    assert files.boots() == []
    assert [(lost.boot, lost.reason) for lost in files.lost()] == [(1, "kernel panic")]


def test_a_kernel_that_counts_nothing_is_lost_too(tmp_path: Path) -> None:
    """No debugfs, no gcov: that is said, and nothing is there to be counted."""
    files = CounterFiles(tmp_path)
    for kind, fields in messages(tmp_path / "missing"):
        files.take(1, {"record": kind, **fields})
    (lost,) = files.lost()
    assert "no counters" in lost.reason


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"name": "../../etc/passwd.gcda", "data": ""}, "no file of gcov's"),
        ({"name": "/a/b.gcda", "data": ""}, "no file of gcov's"),
        ({"name": "a/b.c", "data": ""}, "no file of gcov's"),
        ({"name": "a/b.gcda", "data": "AAAA"}, "cannot be unpacked"),
        ({"name": "a/b.gcda", "data": "eJw="}, "without an end"),
        ({"name": "a/b.gcda", "data": "%"}, "base64|Incorrect padding|non-base64"),
        ({"record": END, "files": 5}, "0 files of counters, and the guest has sent 5"),
    ],
)
def test_what_a_broken_guest_sends_is_refused(tmp_path: Path, message: dict[str, object], complaint: str) -> None:
    """No name leads out of the boot's folder, and what is no counters is no counters."""
    with pytest.raises(ValueError, match=complaint):
        CounterFiles(tmp_path / "host").take(1, {"record": COUNTERS, **message})
    assert not list(tmp_path.rglob("*.gcda"))


class SilentQemu(Qemu):
    """A guest that says what a script has, and ends."""

    def __init__(self, *script: Mapping[str, object], records: Sequence[Mapping[str, object]] = ()) -> None:
        self._lines = [Line(RESULTS, json.dumps({**record, "time": 1.0}).encode()) for record in records]
        self._lines += [Line(CONTROL, json.dumps(message).encode()) for message in script]
        self.started = 0.0
        self.complaints: list[str] = []
        self.process: Any = SimpleNamespace(poll=lambda: 0)

    def wait(self, timeout: float) -> list[Line]:
        """All of it at once."""
        lines, self._lines = self._lines, []
        return lines

    @property
    def ended(self) -> bool:
        return not self._lines

    def close(self) -> None:
        """Nothing was started."""

    def wait_for_console(self, timeout: float) -> list[Line]:
        """Nothing."""
        return []

    def send(self, channel: str, message: dict[str, Any]) -> None:
        """Nobody listens."""

    def cpu_seconds(self) -> float:
        """None."""
        return 0.0

    def starved_seconds(self) -> float:
        """None."""
        return 0.0


class Silent:
    """Nobody who looks on."""

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def lane(tmp_path: Path, counters: Path | None) -> Lane:
    """A lane of a supervisor that was asked for counters, or was not."""
    machine = QemuMachine(kernel=Path("/k"), initrd=Path("/i"), accelerator="tcg")
    return Lane(Supervisor(Request(machine, tmp_path / "records.jsonl", counters=counters), Silent()), 0)


def test_the_supervisor_asks_for_counters_and_keeps_them(tmp_path: Path) -> None:
    """The job says that they are wanted, and what a boot sends lies in its folder; garbage among it is no counters."""
    root = debugfs(tmp_path / "debugfs")
    asked = lane(tmp_path, tmp_path / "host")
    assert asked.job()["counters"] is True
    garbage = {"record": COUNTERS, "name": "../x.gcda", "data": ""}
    qemu = SilentQemu(garbage, *({"record": kind, **fields} for kind, fields in messages(root)))
    Boot(asked, qemu, Limits()).run()
    (boot,) = CounterFiles(tmp_path / "host").boots()
    assert len(list(boot.rglob("*.gcda"))) == 2


WORDS = ("release", "backend", "paging", "accelerator", "cpu_model", "where", "kvmgmem", "python", "pytest")
CIRCUMSTANCES = {**dict.fromkeys(WORDS, "x"), "vm_types": ["default"]}


def test_a_guest_that_dies_takes_its_counters_along_and_that_is_kept(tmp_path: Path) -> None:
    """Whatever it had reached: the report can say that it is in no number. The next boot's counters are whole."""
    machine = QemuMachine(kernel=Path("/k"), initrd=Path("/i"), accelerator="tcg")
    begin = [{"record": "run-start", "schema": 1, "run": "0" * 32, "circumstances": CIRCUMSTANCES}]
    begin += [{"record": "plan", "tests": ["a", "b"]}, {"record": "test-start", "test": "a"}]
    end: list[dict[str, object]] = [*begin[:1], {"record": "plan", "tests": ["b"]}, {"record": "test-start", "test": "b"}]
    end += [{"record": "test-end", "test": "b", "verdict": "passed"}, {"record": "run-end", "exit": 0, "counts": {}}]
    goodbye = {"record": "goodbye", "exit": 0, "signal": None, "output": ""}
    sent = [{"record": kind, **fields} for kind, fields in messages(debugfs(tmp_path / "debugfs"))]
    boots = [SilentQemu(records=begin), SilentQemu(*sent, goodbye, records=end)]
    request = Request(machine, tmp_path / "records.jsonl", counters=tmp_path / "host")
    Supervisor(request, Silent(), lambda machine: boots.pop(0)).run()
    files = CounterFiles(tmp_path / "host")
    assert [boot.name for boot in files.boots()] == ["boot-2"]
    assert [(lost.boot, lost.reason) for lost in files.lost()] == [(1, "QEMU ended with status 0")]


def test_a_supervisor_that_wants_no_counters_keeps_none(tmp_path: Path) -> None:
    """Neither does it ask for them."""
    unasked = lane(tmp_path, None)
    assert unasked.job()["counters"] is False
    Boot(unasked, SilentQemu({"record": END, "files": 0}), Limits()).run()
    assert not list(tmp_path.rglob("boot-*"))


@pytest.mark.parametrize(
    ("folder", "counted"),
    [("arch/x86/kvm", "y"), ("virt/kvm", "y"), ("mm", "n"), ("arch/x86/kernel", "n"), ("drivers/virt", "n")],
)
def test_gcov_counts_in_kvms_folders_alone(tmp_path: Path, folder: str, counted: str) -> None:
    """Even where a folder's own Makefile says otherwise, and in a make below that make, as kbuild's are."""
    makefile = tmp_path / "Makefile"
    makefile.write_text("all:\n\t@$(MAKE) --no-print-directory -f $(CURDIR)/Makefile.build\n")
    (tmp_path / "Makefile.build").write_text("GCOV_PROFILE := n\nall:\n\t@echo $(GCOV_PROFILE)\n")
    command = ["make", "-s", "-C", str(tmp_path), f"obj={folder}", COUNTED_FOLDERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == counted


def test_the_notes_and_their_source_are_kept_with_the_kernel(tmp_path: Path) -> None:
    """Of a build elsewhere and of one in the tree; what was generated has no source, and is kept without."""
    for name, tree in (("elsewhere", tmp_path / "tree"), ("in place", tmp_path / "in place")):
        objects = tmp_path / name
        for folder in {objects, tree}:
            (folder / "virt/kvm").mkdir(parents=True)
        if tree != objects:
            (objects / "source").symlink_to(tree)
        (tree / "virt/kvm/kvm_main.c").write_text("int main;")
        for note in ("kvm_main", "generated"):
            (objects / f"virt/kvm/{note}.gcno").write_text("oncg")
        keep_coverage_notes(objects, tmp_path / "kept" / name)
        kept = sorted(path.name for path in (tmp_path / "kept" / name / "virt/kvm").iterdir())
        assert kept == ["generated.gcno", "kvm_main.c", "kvm_main.gcno"]


# --- from gcov to numbers ---------------------------------------------------------------------------------------------


def catalogue(*reasons: Reason, groups: Mapping[str, tuple[str, ...]] | None = None) -> Catalogue:
    """One file, and what is known of it."""
    return Catalogue((Measured(FILE, 97.0, 90.0, groups),), reasons)


def because(function: str, line: str, **more: Any) -> Reason:
    """A reason for a line."""
    return Reason(FILE, function, line, "an invariant", **more)


def numbers_of(built: Path, known: Catalogue, *boots: Path) -> Numbers:
    """What `kvmgmem coverage` makes of these boots."""
    counts = count(boots, FILE, Notes(built, built), gcov())
    return measure(known, {FILE: Source((built / FILE).read_text())}, {FILE: counts})


def test_what_any_guest_reached_is_reached(built: Path, tmp_path: Path) -> None:
    """Counts of several boots add up: lines and branches that one alone did not reach are reached together."""
    few, many, none = (ran(built, tmp_path / f"{number}", number) for number in (1, 2, 0))
    alone = numbers_of(built, catalogue(), few)
    assert [line.number for line in alone.to_reach] == [EINVAL, MANY, EEXIST, NEVER - 2, NEVER]
    together = numbers_of(built, catalogue(), few, many, none)
    assert [line.number for line in together.to_reach] == [NEVER - 2, NEVER]
    (whole,) = (file.whole for file in together.files)
    assert (alone.files[0].whole.branch_share.reached, whole.branch_share) == (2, Share(4, 4))
    assert [(line.number, line.untaken) for line in alone.branches_to_take] == [(6, 1), (8, 1)]
    assert [region.name for region in together.files[0].functions] == ["__bind", "release", "main"]


def test_only_the_named_functions_count(built: Path, tmp_path: Path) -> None:
    """What else the file holds is in no number, and a function that the kernel does not have is said to be absent."""
    known = catalogue(groups={"slots": ("release", "gone"), "binding": ("main",)})
    (file,) = numbers_of(built, known, ran(built, tmp_path, 1)).files
    assert {line.function for line in file.whole.lines} == {"release", "main"}
    assert file.absent == ("gone",)
    assert file.group("binding").line_share.percent == 100.0
    assert file.group("slots").line_share == Share(0, 2)


def test_a_reason_excuses_its_line_alone(built: Path, tmp_path: Path) -> None:
    """It is found by the function and the line's text, so that it survives when lines are put in above."""
    reasons = (
        because("__bind", 'puts("many");'),
        because("__bind", "return -17;"),
        because("release", EVERY_LINE),
    )
    boot = ran(built, tmp_path / "boot", 1)
    numbers = numbers_of(built, catalogue(*reasons), boot)
    assert [line.number for line in numbers.to_reach] == [EINVAL]
    assert [line.number for line in numbers.explained] == [MANY, EEXIST, NEVER - 2, NEVER]
    assert numbers.stale == ()
    share = numbers.files[0].whole.line_share
    assert share.excused == 4
    assert share.percent < share.percent_of_reachable < 100
    shifted = build(tmp_path / "shifted", "/* one */\n\n" + SOURCE)
    moved = numbers_of(shifted, catalogue(*reasons), ran(shifted, tmp_path / "shifted-boot", 1))
    assert [line.number for line in moved.to_reach] == [EINVAL + 2]
    assert moved.stale == ()


def test_a_reason_that_applies_no_more_says_so(built: Path, tmp_path: Path) -> None:
    """Of another file, function or line, of a line that is reached, and of several lines at once."""
    known = catalogue(
        because("__bind", "return 0;"),
        because("__bind", "return 1;"),
        because("gone", "return 0;"),
        replace(because("__bind", "return 0;"), file="virt/kvm/other.c"),
        because("__bind", "if (size <= 0)", of_branches=True),
    )
    numbers = numbers_of(built, known, *(ran(built, tmp_path / f"{number}", number) for number in (0, 1)))
    assert [stale.why.split(":")[0] for stale in numbers.stale] == [
        "it is reached",
        "__bind has no such line, or no code was made of it",
        "there is no gone",
        "nothing of virt/kvm/other.c is measured",
        "all of its branches are taken",
    ]


def test_a_reason_for_branches_is_none_for_the_line(built: Path, tmp_path: Path) -> None:
    """It excuses what leaves a line that is reached."""
    known = catalogue(because("__bind", "if (slots > 2) {", of_branches=True))
    numbers = numbers_of(built, known, ran(built, tmp_path, 1))
    assert [line.number for line in numbers.branches_to_take] == [6]
    assert numbers.files[0].whole.branch_share == Share(2, 4, 1)
    assert EEXIST in [line.number for line in numbers.to_reach]


def test_lines_with_one_text_are_told_apart_by_the_line_above() -> None:
    """And without that, a reason that fits both is out of date."""
    source = Source("int f(int a)\n{\n\tif (a)\n\t\treturn 1;\n\tif (!a)\n\t\treturn 1;\n}\n")
    counts = {FILE: {3: Count(1, (1, 0)), 4: Count(0), 5: Count(1, (1, 0)), 6: Count(0)}}
    loose = measure(catalogue(because("f", "return 1;")), {FILE: source}, counts)
    assert [stale.why for stale in loose.stale] == ["the function has 2 such lines: say `after` which line it stands"]
    exact = measure(catalogue(because("f", "return 1;", after="if (!a)")), {FILE: source}, counts)
    assert (exact.stale, [line.number for line in exact.to_reach]) == ((), [4])


def test_an_inlined_function_has_branches_in_each_place() -> None:
    """gcov has an entry for each function that a line is a part of, under whatever name the compiler was given."""
    line = {"line_number": 5, "count": 2, "branches": [{"count": 0}, {"count": 2}]}
    other = {"line_number": 5, "count": 0, "branches": [{"count": 0}, {"count": 0}]}
    answer = {
        "files": [
            {"file": f"/src/arch/x86/kvm/../../../{FILE}", "lines": [line, other]},
            {"file": "include/linux/fs.h", "lines": [line]},
        ]
    }
    counts = parse(answer, FILE)
    assert counts == {5: Count(2, (0, 2, 0, 0))}
    assert add([counts, {5: Count(1, (1, 0, 0, 0)), 6: Count(0)}]) == {5: Count(3, (1, 2, 0, 0)), 6: Count(0)}


def test_functions_are_found_as_the_kernel_writes_them() -> None:
    """Over several lines, below comments and macros, with attributes; and what stands between them is nobody's."""
    source = Source(
        "#define X \\\n\tdo { } while (0)\n\nstatic int __must_check first(struct kvm *kvm,\n\t\t int a)\n{\n\tcall(a);\n}\n"
        "static const struct ops ops = {\n\t.f = first,\n};\n/* is (not) */\nlong second(void)\n{\n}\nEXPORT(second);\n"
    )
    assert [(function.name, function.first, function.last) for function in source.functions] == [
        ("first", 4, 8),
        ("second", 13, 15),
    ]
    assert (source.function_of(7), source.function_of(10), source.function_of(16)) == ("first", "", "")
    assert source.text_before(13) == "};"


# --- what may be wrong ------------------------------------------------------------------------------------------------


def kernel(folder: Path, *options: str) -> Kernel:
    """A kernel in the cache, with this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config").write_text("".join(f"{option}\n" for option in options))
    return Kernel("7.3/coverage", folder / "bzImage", "7.3.4-kvmgmem-coverage", config=folder / "config")


def test_counters_of_another_build_are_refused(built: Path, tmp_path: Path) -> None:
    """gcov itself would go on and say that nothing ran."""
    boot = ran(built, tmp_path / "boot", 1)
    other = build(tmp_path / "other", SOURCE.replace("slots > 2", "slots > 2 && size < 7"))
    with pytest.raises(HarnessError, match=r"cannot read the counters of virt/kvm/guest_memfd\.c.*mismatch"):
        count([boot], FILE, Notes(other, other), gcov())


def test_a_boot_without_counters_of_the_file_says_so(built: Path, tmp_path: Path) -> None:
    """As a kernel whose KVM was built without gcov has none."""
    with pytest.raises(HarnessError, match=r"holds no counters of virt/kvm/guest_memfd\.c"):
        count([tmp_path], FILE, Notes(built, built), gcov())


def test_a_kernel_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    """Each with its own words: no gcov in it, built by clang, its notes gone."""
    with pytest.raises(HarnessError, match=r"counts no lines.*CONFIG_GCOV_KERNEL") as without:
        require_counting(kernel(tmp_path, "# CONFIG_GCOV_KERNEL is not set"))
    assert without.value.code == ExitCode.USAGE
    with pytest.raises(HarnessError, match="built by clang"):
        require_counting(kernel(tmp_path, "CONFIG_GCOV_KERNEL=y", "CONFIG_CC_IS_CLANG=y"))
    with pytest.raises(HarnessError, match=r"notes of 7\.3/coverage are not there"):
        find_notes(kernel(tmp_path / "a/b/c/d/entry", "CONFIG_GCOV_KERNEL=y"))


def test_notes_lie_beside_the_kernel_or_in_its_build_tree(tmp_path: Path) -> None:
    """In the cache both notes and source are kept; a build elsewhere has a link to the source."""
    cached = kernel(tmp_path / "cache/entry", "CONFIG_GCOV_KERNEL=y")
    folder = cached.image.parent / "gcno"
    (folder / "virt/kvm").mkdir(parents=True)
    (folder / "virt/kvm/kvm_main.gcno").touch()
    assert find_notes(cached) == Notes(folder, folder)
    objects = tmp_path / "objects"
    (objects / "virt/kvm").mkdir(parents=True)
    (objects / "virt/kvm/kvm_main.gcno").touch()
    (tmp_path / "tree").mkdir()
    (objects / "source").symlink_to(tmp_path / "tree")
    image = objects / "arch/x86/boot/bzImage"
    image.parent.mkdir(parents=True)
    assert find_notes(Kernel("x", image, "7.3.4")) == Notes(objects, objects / "source")


def test_gcov_must_be_that_of_the_kernels_compiler(tmp_path: Path) -> None:
    """Else the message names both, and the package that is needed."""
    own = gcov().version
    major, minor = own.split(".")
    fits = kernel(tmp_path, f"CONFIG_GCC_VERSION={int(major) * 10000 + int(minor) * 100}")
    assert find_gcov(fits).version == own
    assert not lets_allocations_fail(fits)
    assert lets_allocations_fail(kernel(tmp_path / "failing", "CONFIG_FAILSLAB=y"))
    assert compiler_version({"CONFIG_GCC_VERSION": "120200"}) == "12.2"
    with pytest.raises(HarnessError, match=rf"built by gcc 99\.1, and this machine's gcov is of gcc {own}") as wrong:
        find_gcov(kernel(tmp_path, "CONFIG_GCC_VERSION=990100"))
    assert "gcc-99" in wrong.value.hint


def test_without_gcov_or_gcovr_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any guest is started."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HarnessError, match="there is no gcov on this machine"):
        find_gcov(kernel(tmp_path))
    monkeypatch.setitem(sys.modules, "gcovr", None)
    with pytest.raises(HarnessError, match="gcovr, which is not installed") as missing:
        find_gcovr()
    assert "--no-page" in missing.value.hint


def test_the_catalogue_is_sound_and_a_bad_entry_is_named(tmp_path: Path) -> None:
    """The package's own one can be read; what is wrong with another one is said."""
    own = load_catalogue()
    assert [(file.path, file.aim_lines, file.aim_branches) for file in own.files] == [
        (FILE, 97.0, 90.0),
        ("virt/kvm/kvm_main.c", 95.0, 0.0),
    ]
    assert all(len(reason.reason) > 20 for reason in own.reasons)
    functions = own.files[1].functions
    assert functions is not None
    assert len(set(functions)) == len(functions) > 29
    bad = tmp_path / "coverage.toml"
    entry = '[[unreached]]\nfile = "f"\nfunction = "g"\nlines = ["x"]\nreason = "r"\n'
    for text, complaint in (
        ("[[file]]\n", "file 1 lacks path, lines"),
        (entry + "why = 1\n", "unreached 1 has unknown fields: why"),
        (entry + entry, "two reasons for g: x"),
        (entry.replace('["x"]', '["x", "y"]') + 'after = "z"\n', "has not one line although"),
        ("[[", "cannot read"),
    ):
        bad.write_text(text)
        with pytest.raises(HarnessError, match=complaint):
            load_catalogue(bad)


# --- the reports ------------------------------------------------------------------------------------------------------


def circumstances(*machines: Machine) -> Circumstances:
    """A run of these machines."""
    return Circumstances("7.3/coverage", "7.3.4-kvmgmem-coverage", "abc", "tcg", (), machines)


def test_the_report_names_every_line_and_what_was_lost(built: Path, tmp_path: Path) -> None:
    """To be tested, not to be reached, out of date, lost with its guest: each is in the text and in the document."""
    known = catalogue(because("release", EVERY_LINE), because("__bind", "return 1;"))
    numbers = numbers_of(built, known, ran(built, tmp_path, 1))
    about = circumstances(Machine("plain", 12, 0, 1), Machine("npt0", 3, 5, 2, ("boot 1: kernel panic",)))
    text = "\n".join(report.summary(numbers, about))
    assert "Lines to write a test for (3):" in text
    assert "guest_memfd.c:10 __bind: return -17;" in text
    assert "an invariant" in text
    assert "npt0, boot 1: kernel panic" in text
    assert "__bind: return 1; (__bind has no such line" in text
    assert "plain (12 tests), npt0 (3 tests)" in text
    document = "\n".join(report.markdown(numbers, about, "kvmgmem coverage --source 7.3"))
    assert "    kvmgmem coverage --source 7.3\n" in document
    assert "- npt0, boot 1: kernel panic" in document
    assert "and with allocations that fail on demand" in document
    without = replace(about, failing_allocations=False)
    assert "but without allocations that fail" in "\n".join(report.markdown(numbers, without, "kvmgmem coverage"))
    assert "| `release` | 0/2 | 0/0 |" in document
    assert "- `guest_memfd.c:release`: an invariant\n" in document
    content = json.loads(report.as_json(numbers, about))
    assert [line["line"] for line in content["files"][0]["unreached"] if not line["reason"]] == [EINVAL, MANY, EEXIST]


def test_the_kernels_own_tests_are_counted_apart(built: Path, tmp_path: Path) -> None:
    """Their numbers stand beside ours, and the lines that only they reach are named."""
    ours = numbers_of(built, catalogue(), ran(built, tmp_path / "ours", 1))
    theirs = numbers_of(built, catalogue(), ran(built, tmp_path / "theirs", 2))
    about = replace(circumstances(Machine("plain", 12, 0, 1)), kselftest=Machine("kselftest", 7, 0, 1, ("boot 2: hung",)))
    text = "\n".join(report.summary(ours, about, theirs))
    assert f"{FILE}: lines {theirs.files[0].whole.line_share}; branches 2 of 4" in text
    assert "Lines that they alone reach (2):" in text
    assert "kselftest, boot 2: hung" in text
    document = "\n".join(report.markdown(ours, about, "kvmgmem coverage", theirs))
    share = theirs.files[0].whole.line_share
    only_ours = sum(line.reached for line in ours.lines) - sum(line.reached for line in theirs.lines) + 2
    cells = f"{share.reached} of {share.total}, {share.percent:.1f} % | 2 of 4, 50.0 % | {only_ours} | 2 |"
    assert f"| `{FILE}` | {cells}" in document
    assert json.loads(report.as_json(ours, about, theirs))["kselftest"][0]["lines"]["reached"] == share.reached


def test_the_page_shows_every_line(built: Path, tmp_path: Path) -> None:
    """gcovr's page has the source, although it was built elsewhere, and functions that begin with underscores."""
    try:
        gcovr = find_gcovr()
    except HarnessError:
        pytest.skip("needs gcovr")
    boots = [ran(built, tmp_path / "boots/1", 1), ran(built, tmp_path / "boots/2", 2)]
    page = write_page(gcovr, tmp_path / "page", numbers_of(built, catalogue(), *boots), Notes(built, built))
    (source,) = (path for path in page.parent.glob("*guest_memfd*.html") if "functions" not in path.name)
    text = source.read_text()
    assert "never run" in text
    assert "__bind" in text


def arguments(*words: str) -> argparse.Namespace:
    """The verb's own, as the command line gives them."""
    parser = argparse.ArgumentParser()
    add_coverage_parser(parser.add_subparsers(dest="verb"))
    return argparse.Namespace(**vars(parser.parse_args(["coverage", *words])), pytest_args=[])


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    """And nothing else is asked for before that is said; a variant that is none is said first."""
    with pytest.raises(HarnessError, match="holds no finished run") as error:
        run_coverage(arguments("--report", "--no-page", "--out", str(tmp_path)))
    assert error.value.code == ExitCode.USAGE
    with pytest.raises(HarnessError, match="'npt7' is not a variant"):
        run_coverage(arguments("--no-page", "--variant", "npt7"))
    assert VARIANTS == ("plain", "npt0", "numa2")


def test_variants_can_be_added_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was run again takes the place of its first run, the others stay; another kernel's do not go together."""
    ran_before: list[str] = []

    def run_variant(args: object, kernel: str, name: str) -> Machine:
        ran_before.append(name)
        return Machine(name, len(ran_before), 0, 1)

    about = circumstances()
    monkeypatch.setattr(coverage_cli, "_run_variant", run_variant)
    args = argparse.Namespace(out=tmp_path)
    first = coverage_cli._run_variants(args, about, ["plain", "npt0"])
    assert coverage_cli._load(tmp_path) == first
    again = coverage_cli._run_variants(args, coverage_cli._kept(coverage_cli._load(tmp_path), about), ["npt0", "numa2"])
    assert [(machine.name, machine.tests) for machine in again.machines] == [("plain", 1), ("npt0", 3), ("numa2", 4)]
    with pytest.raises(HarnessError, match=r"to which 7\.2/coverage cannot be added"):
        coverage_cli._kept(again, replace(about, kernel="7.2/coverage"))


def test_a_finished_run_can_be_reported_again(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From counters, kernel and catalogue alone; 1 while a line is reached by nobody and explained by nobody."""
    out, cached = tmp_path / "out", kernel(tmp_path / "entry", "CONFIG_GCOV_KERNEL=y")
    notes = cached.image.parent / "gcno"
    shutil.copytree(built / "virt", notes / "virt")
    shutil.copy(notes / FILE.replace(".c", ".gcno"), notes / "virt/kvm/kvm_main.gcno")
    monkeypatch.setattr("kvmgmem.coverage.coverage_cli.resolve", lambda name: cached)
    known = tmp_path / "known.toml"
    known.write_text(f'[[file]]\npath = "{FILE}"\nlines = 97\n')
    ran(built, out / "plain/boot-1", 1)
    run = circumstances(Machine("plain", 1, 0, 1))
    (out / STATE).write_text(json.dumps({**vars(run), "machines": [vars(machine) for machine in run.machines]}))
    words = ("--report", "--no-page", "--out", str(out), "--catalogue", str(known))
    evidence = tmp_path / "coverage.md"
    assert run_coverage(arguments(*words, "--evidence", str(evidence))) == ExitCode.TEST_FAILED
    assert "Lines to write a test for (5):" in capsys.readouterr().out
    assert evidence.read_text() == (out / "coverage.md").read_text()
    for function in ("release", "__bind"):
        lines = '["*"]' if function == "release" else '["return -22;", \'puts("many");\', "return -17;"]'
        with known.open("a") as file:
            file.write(
                f'[[unreached]]\nfile = "{FILE}"\nfunction = "{function}"\nlines = {lines}\nreason = "it cannot be"\n'
            )
    assert run_coverage(arguments(*words)) == ExitCode.OK
    shutil.rmtree(out / "plain")
    with pytest.raises(HarnessError, match="no guest handed its counters over"):
        run_coverage(arguments(*words))
