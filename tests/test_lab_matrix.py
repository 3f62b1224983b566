"""The matrix: which columns there are, how they run side by side, what is kept and what is done again."""

import argparse
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import matrix
from kvmgmem.lab.guest.variants import VARIANTS, lookup
from kvmgmem.lab.kernel.kernels import Kernel
from kvmgmem.lab.matrix import Column, Tally, plan, run_matrix
from kvmgmem.results.records import Circumstances, Record, RunEnd, RunStart, TestEnd, TestStart, Verdict, to_line


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Any name but `none` is a kernel whose image is a file here."""

    def resolve(spec: str) -> Kernel:
        if spec == "none" or spec.endswith("+npt1"):
            raise HarnessError(f"no kernel in the cache is called {spec}", "make it")
        image = tmp_path / f"{spec}.image"
        if not image.exists():
            image.write_text(spec)
        return Kernel(spec, image, spec, flavour="debug" if spec.endswith("debug") else "base")

    monkeypatch.setattr(matrix, "resolve", resolve)
    return tmp_path


def names(columns: list[Column]) -> list[str]:
    return [column.name for column in columns]


def test_every_kernel_is_tried_plain_and_on_each_variant(kernels: Path) -> None:
    """--variant adds a column to every kernel; KERNEL+VARIANT is one column alone; nothing is there twice."""
    assert names(plan(["7.2", "7.3"], ["npt0"], kernels)) == ["7.2", "7.2+npt0", "7.3", "7.3+npt0"]
    assert names(plan(["7.3", "7.3+numa2", "7.3"], [], kernels)) == ["7.3", "7.3+numa2"]
    assert names(plan(["7.3.4+deb13-amd64"], [], kernels)) == ["7.3.4+deb13-amd64"]


def test_an_unknown_variant_or_kernel_is_refused(kernels: Path) -> None:
    """A name that is none is an error before anything is booted, and lists what there is."""
    with pytest.raises(HarnessError) as caught:
        plan(["7.3"], ["npt1"], kernels)
    assert "npt0" in caught.value.hint
    assert caught.value.code == ExitCode.USAGE
    for unknown in ("none", "none+npt1"):
        with pytest.raises(HarnessError, match="called none"):
            plan([unknown], [], kernels)
    with pytest.raises(HarnessError, match="'npt1' is not a variant"):
        plan(["7.3+npt1"], [], kernels)


def test_no_guests_at_once_is_usage(kernels: Path) -> None:
    """It would wait for a free core for ever."""
    for jobs in (0, -1):
        with pytest.raises(HarnessError, match=f"--jobs {jobs} is too small") as caught:
            run_matrix(arguments(kernels / "out", "7.3", jobs=jobs))
        assert caught.value.code == ExitCode.USAGE
    assert not (kernels / "out").exists()


def test_a_parameter_or_another_qemu_is_a_variant_too(kernels: Path) -> None:
    """What has an equals sign goes to the kernel's command line, but for `qemu=`; file names tell such columns apart."""
    columns = plan(["7.3+kvm_amd.avic=1"], ["qemu=/opt/qemu/bin/qemu kvm.x=1"], kernels)
    assert names(columns) == ["7.3+kvm_amd.avic=1"]
    assert (columns[0].variant.append, columns[0].variant.qemu) == ("kvm_amd.avic=1", None)
    columns = plan(["7.3"], ["qemu=/opt/qemu/bin/qemu kvm.x=1"], kernels)
    assert names(columns) == ["7.3", "7.3+qemu=_opt_qemu_bin_qemu_kvm.x=1"]
    assert (columns[1].variant.append, columns[1].variant.qemu) == ("kvm.x=1", "/opt/qemu/bin/qemu")
    for wrong in ("qemu=", "qemu=a qemu=b"):
        with pytest.raises(HarnessError, match="does not name one QEMU"):
            lookup(wrong)
    with pytest.raises(HarnessError, match="is not a variant"):
        lookup("npt0 kvm.x=1")


def test_variants_are_found_by_name() -> None:
    """Every variant answers to its name and says why one wants it."""
    for name, variant in VARIANTS.items():
        assert lookup(name) is variant
        assert variant.why


FAKE = """
import sys, time
from pathlib import Path
results, text = Path(sys.argv[1]), sys.argv[2]
Path(str(results) + ".began").write_text(repr(time.time()))
peers = [Path(word) for word in sys.argv[3:]]
deadline = time.time() + 20
while peers and not all(peer.exists() for peer in peers) and time.time() < deadline:
    time.sleep(0.01)
results.write_text(text if all(peer.exists() for peer in peers) else "")
"""


def a_run(release: str, verdict: Verdict, whole: bool = True) -> str:
    """Records of a run of one test."""
    facts = Circumstances(release, "kvm_amd", "tdp", "tcg", "cpu", (), "guest", "0", "3", "9")
    records: list[Record] = [RunStart("0" * 32, 1.0, facts), TestStart("t::a", 2.0), TestEnd("t::a", 3.0, verdict)]
    end: list[Record] = [RunEnd(4.0, 0 if verdict is Verdict.PASSED else 1)] if whole else []
    return "".join(to_line(record) + "\n" for record in [*records, *end])


def arguments(out: Path, *kernel_names: str, jobs: int = 2) -> argparse.Namespace:
    return argparse.Namespace(kernels=list(kernel_names), variant=[], out=out, jobs=jobs, accel="auto", pytest_args=[])


def fake_guests(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], together: bool = False) -> None:
    """Columns run a script that leaves these records; `together`: only once all of them have begun."""

    def command(column: Column, args: argparse.Namespace) -> tuple[str, ...]:
        others = [str(column.directory / f"{name}.jsonl.began") for name in texts] if together else []
        return (sys.executable, "-c", FAKE, str(column.results), texts[column.kernel.name], *others)

    monkeypatch.setattr(matrix, "_command", command)


def test_columns_run_at_the_same_time_and_end_in_one_table(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs run two guests at once; the table names what differs; a page and a report per column are written."""
    fake_guests(monkeypatch, {"7.2": a_run("7.2", Verdict.FAILED), "7.3": a_run("7.3", Verdict.PASSED)}, together=True)
    assert run_matrix(arguments(kernels / "out", "7.2", "7.3")) == ExitCode.TEST_FAILED
    text = capsys.readouterr().out
    assert "F .  t::a" in text
    assert {path.name for path in (kernels / "out").iterdir()} >= {"matrix.html", "7.2.ktap", "7.3.junit.xml", "7.3.md"}


def test_a_complete_column_is_kept_and_an_interrupted_one_done_again(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the matrix again redoes only what has no end, or whose kernel or command is another."""
    out = kernels / "out"
    fake_guests(monkeypatch, {"7.2": a_run("7.2", Verdict.PASSED, whole=False), "7.3": a_run("7.3", Verdict.PASSED)})
    assert run_matrix(arguments(out, "7.2", "7.3")) == ExitCode.HARNESS
    began = {name: (out / f"{name}.jsonl.began").read_text() for name in ("7.2", "7.3")}
    assert run_matrix(arguments(out, "7.2", "7.3")) == ExitCode.HARNESS
    assert (out / "7.3.jsonl.began").read_text() == began["7.3"]
    assert (out / "7.2.jsonl.began").read_text() != began["7.2"]
    (kernels / "7.3.image").write_text("another kernel")
    run_matrix(arguments(out, "7.3"))
    assert (out / "7.3.jsonl.began").read_text() != began["7.3"]


def test_a_column_that_the_harness_spoilt_is_done_again(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What QEMU's death or a lost record did says nothing of the kernel; a failure of the kernel's is kept."""
    out = kernels / "out"
    fake_guests(monkeypatch, {"7.2": a_run("7.2", Verdict.ERROR), "7.3": a_run("7.3", Verdict.PANICKED)})
    began: list[dict[str, str]] = []
    for _ in range(2):
        assert run_matrix(arguments(out, "7.2", "7.3")) == ExitCode.KERNEL
        began.append({name: (out / f"{name}.jsonl.began").read_text() for name in ("7.2", "7.3")})
    assert began[0]["7.3"] == began[1]["7.3"]
    assert began[0]["7.2"] != began[1]["7.2"]


def test_the_slowest_kernel_begins_first(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A debug kernel takes as long as eight others, so it is not left to the end; and an older one skips more."""
    fake_guests(monkeypatch, dict.fromkeys(("6.12", "7.2", "7.3", "7.3-debug"), a_run("7.3", Verdict.PASSED)))
    run_matrix(arguments(kernels / "out", "6.12", "7.2", "7.3", "7.3-debug", jobs=1))
    began = {path.name: float(path.read_text()) for path in (kernels / "out").glob("*.began")}
    assert sorted(began, key=began.__getitem__) == [f"{name}.jsonl.began" for name in ("7.3-debug", "7.3", "7.2", "6.12")]


@pytest.mark.parametrize("records", [None, "", '{"record":"heartbeat","time":1.0}\n'], ids=["no file", "empty", "heartbeat"])
def test_a_column_without_records_is_named(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], records: str | None
) -> None:
    """The table says what kept a guest from its first test, and where to look; the exit code is that of its command."""
    fake_guests(monkeypatch, {"7.2": a_run("7.2", Verdict.PASSED), "7.3": ""})
    lives = matrix._command

    def command(column: Column, args: argparse.Namespace) -> tuple[str, ...]:
        if column.kernel.name == "7.2":
            return lives(column, args)
        leaves = "" if records is None else f"open({str(column.results)!r}, 'w').write({records!r})"
        return (sys.executable, "-c", f"{leaves}\nprint('no luck\\nkvmgmem: error: it is dead\\n  hint: bury it')\nexit(5)")

    monkeypatch.setattr(matrix, "_command", command)
    assert run_matrix(arguments(kernels / "out", "7.2", "7.3")) == ExitCode.KERNEL
    log = kernels / "out" / "7.3.log"
    text = capsys.readouterr().out
    assert f"7.3: did not come to a first record: it is dead; see {log}\n" in text
    assert "unknown kernel" not in text
    assert "no luck" in log.read_text()
    assert json.loads((kernels / "out" / "7.3.key").read_text())["command"]


def test_a_column_that_ends_without_a_word_is_the_harness_fault(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its command's exit status is: a matrix of nothing is no success."""
    monkeypatch.setattr(matrix, "_command", lambda column, args: (sys.executable, "-c", ""))
    assert run_matrix(arguments(kernels / "out", "7.3")) == ExitCode.HARNESS
    assert "7.3: did not come to a first record: it said nothing; see " in capsys.readouterr().out


CANCELLED = """
import argparse, sys
from pathlib import Path
from kvmgmem.lab import matrix
from kvmgmem.lab.kernel.kernels import Kernel
out = Path(sys.argv[1])
column = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
matrix.resolve = lambda spec: Kernel(spec, Path(sys.executable), spec)
matrix._command = lambda column_of, args: (sys.executable, "-c", column, str(out.with_name(column_of.name)))
arguments = dict(kernels=["7.2", "7.3"], variant=[], out=out, jobs=2, accel="auto", pytest_args=[])
matrix.run_matrix(argparse.Namespace(**arguments))
"""


def test_a_cancelled_matrix_leaves_no_column_behind(tmp_path: Path) -> None:
    """SIGTERM to the matrix alone, and where Ctrl-C is ignored, as in a shell's background job, ends all columns."""
    command = ["env", "--ignore-signal=INT", sys.executable, "-c", CANCELLED, str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    files = [tmp_path / "7.2", tmp_path / "7.3"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(14) == 128 + signal.SIGTERM, "it waits 15 s for a column that does not end by itself"
    for file in files:
        assert not Path(f"/proc/{file.read_text()}").exists()


ASKED = """
import os, sys, time
from pathlib import Path
results, text = Path(sys.argv[1]), sys.argv[2]
results.write_text(text)
time.sleep(float(sys.argv[3]))
os.set_blocking(0, False)
try:
    told = os.read(0, 10).decode()
except BlockingIOError:
    told = ""
Path(str(results) + ".asked").write_text(told)
"""


def ask_columns(monkeypatch: pytest.MonkeyPatch, left: dict[str, float], lasts: dict[str, float]) -> None:
    """Columns that have so many seconds left, and take so many."""

    def command(column: Column, args: argparse.Namespace) -> tuple[str, ...]:
        text = a_run(column.kernel.name, Verdict.PASSED)
        return (sys.executable, "-c", ASKED, str(column.results), text, str(lasts[column.kernel.name]))

    monkeypatch.setattr(matrix, "_command", command)
    monkeypatch.setattr(matrix, "_seconds_left", lambda column: left[column.kernel.name])
    monkeypatch.setattr(matrix, "_seconds_to_a_test", lambda _column: 5.0)


@pytest.mark.parametrize(
    ("left", "jobs", "asked"),
    [
        ((20, 30), 3, ("", "2")),
        ((30, 20), 3, ("2", "")),
        ((20, 30), 4, ("2", "2")),
        ((20, 30), 2, ("", "")),
        ((9, 8), 4, ("", "")),
    ],
    ids=["the second", "the first", "both", "no room", "not worth it"],
)
def test_a_free_core_goes_to_who_has_most_left(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[float, float], jobs: int, asked: tuple[str, str]
) -> None:
    """When no column waits, a second guest is asked for on a column's standard input, once, where that is worth it."""
    names = ("7.2", "7.3")
    ask_columns(monkeypatch, dict(zip(names, left, strict=True)), dict.fromkeys(names, 1.5))
    run_matrix(arguments(kernels / "out", *names, jobs=jobs))
    assert tuple((kernels / "out" / f"{name}.jsonl.asked").read_text() for name in names) == asked


def test_no_second_guest_while_a_column_waits(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two guests at once and three columns, only the one that is alone at the end gets another."""
    lasts = {"7.3": 1.0, "7.2": 0.5, "6.12": 2.0}
    ask_columns(monkeypatch, dict.fromkeys(lasts, 100.0), lasts)
    run_matrix(arguments(kernels / "out", *lasts, jobs=2))
    asked = {name: (kernels / "out" / f"{name}.jsonl.asked").read_text() for name in lasts}
    assert asked == {"7.3": "", "7.2": "", "6.12": "2"}


def test_records_are_counted_while_they_are_written(tmp_path: Path) -> None:
    """Each line counts once and when it is whole, wherever the file was cut when looked at; no file counts nothing."""
    tally, records = Tally(), tmp_path / "records"
    tally.count(records)
    assert (tally.done, tally.planned, tally.first_test) == (0, 0, 0.0)
    text = '{"record":"plan","tests":["a","b","c"]}\n' + '{"record":"test-start"}\n{"record":"test-end"}\n' * 3
    whole = [text[: end + 1].count('"test-end"') for end, character in enumerate(text) if character == "\n"]
    seen: list[int] = []
    began = text.index('start"}') + 7
    with records.open("w") as file:
        for start in range(0, len(text), 5):
            file.write(text[start : start + 5])
            file.flush()
            tally.count(records)
            lines = text[: start + 5].count("\n")
            assert tally.done == (whole[lines - 1] if lines else 0)
            assert tally.planned == (3 if lines else 0)
            assert bool(tally.first_test) == (start + 5 > began)
            seen.append(tally.done)
    assert sorted(set(seen)) == [0, 1, 2, 3]


def test_what_is_left_is_told_from_what_is_done(kernels: Path) -> None:
    """Ten tests in 20 s leave 50 s for 25 more, worth a guest that takes 20 s to its first test, not 30."""
    (column,) = plan(["7.3"], [], kernels)
    assert matrix._seconds_left(column) == 0.0
    tests = json.dumps([f"t::{number}" for number in range(35)])
    column.results.write_text('{"record":"plan","tests":' + tests + "}\n" + '{"record":"test-end"}\n' * 10)
    column.started = time.monotonic() - 20
    assert 49 < matrix._seconds_left(column) < 55
    (slow,) = plan(["7.3-debug"], [], kernels)
    slow.results.write_text(column.results.read_text())
    slow.started = column.started
    slow.tally.first_test, column.tally.first_test = slow.started + 30, column.started + 20
    (booting,) = plan(["7.2"], [], kernels)
    for candidate, worth in ((booting, b""), (slow, b""), (column, b"2")):
        told = io.BytesIO()
        candidate.process = cast("subprocess.Popen[bytes]", SimpleNamespace(stdin=told))
        matrix._help([candidate])
        assert told.getvalue() == worth
        assert candidate.helped == bool(worth)
    matrix._help([column])
    assert told.getvalue() == b"2"
