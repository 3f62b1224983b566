"""The command line: bad input and bad luck give one clear line, a remedy, and their own exit code."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvmgmem.cli import main, split_at_dashes
from kvmgmem.contract_report import asserting_tests, report
from kvmgmem.exit_codes import GRAVITY, ExitCode
from kvmgmem.results.run import read_run

has_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")
as_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare(1)")
COMMAND = [sys.executable, "-m", "kvmgmem.cli"]


def kvmgmem(*words: str, cwd: Path | None = None, before: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line tool, maybe behind another command."""
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [*(before or []), *COMMAND, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environment)


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, after checking that there is a hint and no traceback."""
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("kvmgmem: error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert [line.startswith("  hint: ") for line in lines[1:]] == [True], done.stderr
    return lines[0]


def in_other_dev(*setup: str) -> list[str]:
    """A command prefix that runs what follows in a mount namespace where /dev has been changed."""
    return ["unshare", "-m", "--propagation", "private", "sh", "-ec", "\n".join([*setup, 'exec "$@"']), "sh"]


@as_root
@has_kvm
def test_no_device(tmp_path: Path) -> None:
    """Without /dev/kvm the error names it and points to the guest."""
    dev = tmp_path / "dev"
    setup = [f"mkdir {dev}"]
    for name in ("null", "urandom", "zero", "full"):
        setup += [f"touch {dev}/{name}", f"mount --bind /dev/{name} {dev}/{name}"]
    setup += [f"mount --rbind {dev} /dev"]
    for verb in ("run", "caps"):
        done = kvmgmem(verb, before=in_other_dev(*setup, f"rm -rf {dev}/x"))
        shutil.rmtree(dev, ignore_errors=True)
        assert "there is no /dev/kvm" in one_error(done)
        assert "kvmgmem vm" in done.stderr
        assert done.returncode == ExitCode.HARNESS


@as_root
@has_kvm
def test_a_device_that_is_no_kvm() -> None:
    """A /dev/kvm that answers no KVM ioctl is refused by what it answered."""
    done = kvmgmem("run", before=in_other_dev("mount --bind /dev/null /dev/kvm"))
    assert "API version ENOTTY" in one_error(done)
    assert done.returncode == ExitCode.HARNESS


@as_root
@has_kvm
def test_an_ordinary_user_without_permission_and_with() -> None:
    """A user without access is told so; one with access runs, and the run says what it left out."""
    if not os.access(sys.executable, os.X_OK) or not _readable_by_others(Path(sys.executable)):
        pytest.skip("this interpreter is not readable by an ordinary user")
    # Not below pytest's own directory, which is closed to other users.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        _run_as_an_ordinary_user(Path(directory))


def _run_as_an_ordinary_user(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    setup = [f"mknod {node} c 10 232", f"mount --bind {node} /dev/kvm"]
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    done = kvmgmem("run", before=[*in_other_dev(*setup, f"chmod 600 {node}"), *drop])
    assert "no permission to open /dev/kvm" in one_error(done)
    node.unlink()
    test = tmp_path / "test_user.py"
    test.write_text("def test_it(vm): pass\n")
    results = tmp_path / "results.jsonl"
    done = kvmgmem(
        "run", f"--results={results}", "--", str(test), before=[*in_other_dev(*setup, f"chmod 666 {node}"), *drop]
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    left_out = " ".join(read_run([results]).left_out)
    assert "debugfs" in left_out


def _readable_by_others(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def test_results_are_never_mixed(tmp_path: Path) -> None:
    """A results file that holds records already is refused, and kept."""
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm on this machine")
    done = kvmgmem("run", f"--results={results}")
    assert "exists already" in one_error(done)
    assert done.returncode == ExitCode.USAGE
    assert results.read_text() == "{}\n"


@has_kvm
def test_a_full_disk_loses_nothing_written(tmp_path: Path) -> None:
    """Records that cannot be written end the run with the harness's exit code, not with success."""
    test = tmp_path / "test_it.py"
    test.write_text("def test_it(kvm): pass\n")
    done = kvmgmem("run", "--results=/dev/full", "--", str(test))
    assert done.returncode == ExitCode.HARNESS
    assert "No space left on device" in done.stdout + done.stderr


@has_kvm
def test_nothing_collected_is_nothing_ran(tmp_path: Path) -> None:
    """A selection that selects nothing is exit code 3, with a line that says so."""
    test = tmp_path / "test_it.py"
    test.write_text("def test_it(kvm): pass\n")
    done = kvmgmem("run", "--", str(test), "-k", "no_such_test")
    assert done.returncode == ExitCode.NOTHING_RAN
    assert "no selftest was started" in one_error(done)


@has_kvm
def test_ctrl_c_keeps_the_records_and_ends_what_was_started(tmp_path: Path) -> None:
    """An interrupted run says so, keeps its records, kills the test that was running, and exits 4."""
    test = tmp_path / "test_it.py"
    pid_file = tmp_path / "pid"
    test.write_text(
        "import os, time\nfrom pathlib import Path\n"
        "def test_first(kvm): pass\n"
        f"def test_slow(kvm):\n    Path({str(pid_file)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n"
    )
    results = tmp_path / "results.jsonl"
    # A shell's background job ignores Ctrl-C, and so would what these tests start in one.
    command = ["env", "--default-signal=INT", *COMMAND, "run", f"--results={results}", "--", str(test)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline, "the slow test never started"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.HARNESS, stdout + stderr
    run = read_run([results])
    assert {outcome.test.partition("::")[2]: str(outcome.verdict) for outcome in run.tests} == {
        "test_first": "passed",
        "test_slow": "error",
    }
    assert "interrupted" in stdout + stderr
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


@has_kvm
def test_a_list_of_tests_is_no_run_that_failed(tmp_path: Path) -> None:
    """`--collect-only`, which a hint recommends, lists the tests, and leaves no records."""
    records = tmp_path / "records"
    done = kvmgmem("run", f"--results={records}", "--", "--collect-only", "-q", "selftests/test_cap.py")
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    assert "selftests/test_cap.py" in done.stdout
    assert not records.exists()


@has_kvm
def test_compiled_tests_are_kept_where_they_are_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python is told to leave no bytecode beside its sources, `run` keeps it in the cache: tests are compiled once."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setenv("KVMGMEM_CACHE", str(tmp_path / "cache"))
    tests = tmp_path / "mine"
    tests.mkdir()
    (tests / "test_it.py").write_text("def test_it(kvm): pass\n")
    assert kvmgmem("run", f"--results={tmp_path / 'results'}", "--", str(tests / "test_it.py")).returncode == ExitCode.OK
    assert [path.name for path in tests.iterdir()] == ["test_it.py"]
    assert list((tmp_path / "cache" / "bytecode").rglob("test_it.*-pytest-*.pyc"))


def test_unknown_verbs_and_options_are_usage() -> None:
    """What the parser does not know is exit code 2."""
    assert kvmgmem("rnu").returncode == ExitCode.USAGE
    assert kvmgmem("run", "--bogus").returncode == ExitCode.USAGE
    assert kvmgmem().returncode == ExitCode.USAGE


@pytest.mark.parametrize("source", [["--source", "tree"], ["--source=tree"]])
def test_a_misspelt_option_stops_a_bisection(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """To git our 2 would be a bad commit."""
    for words, code in ((["vm", *source], ExitCode.BISECT_STOP), (["kernel", "build", *source], ExitCode.USAGE)):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--no-such-option"])
        assert caught.value.code == code
    assert "--no-such-option" in capsys.readouterr().err


def test_a_file_of_something_else_is_no_run(tmp_path: Path) -> None:
    """One line, not one for each of its own; a run's file that was cut is still a run."""
    other, run = tmp_path / "other", tmp_path / "run.jsonl"
    other.write_text("root:x:0:0\n" * 1000)
    done = kvmgmem("report", str(other))
    assert "holds no records: " in one_error(done)
    assert done.returncode == ExitCode.USAGE
    run.write_text('{"record":"heartbeat","time":1.0}\n{"record":"test-st')
    done = kvmgmem("report", str(run))
    assert "damaged: " in done.stdout
    assert done.returncode == ExitCode.HARNESS


def test_everything_after_the_dashes_is_pytests() -> None:
    """The first -- splits; a second one is pytest's."""
    assert split_at_dashes(["run", "--", "-k", "x", "--", "y"]) == (["run"], ["-k", "x", "--", "y"])
    assert split_at_dashes(["run"]) == (["run"], [])


def test_the_gravest_exit_code_counts() -> None:
    """Every exit code of a run has its place, and the kernel's is the gravest."""
    assert set(GRAVITY) == set(ExitCode) - {ExitCode.BISECT_SKIP, ExitCode.BISECT_STOP, ExitCode.CANNOT_EXPRESS}
    assert GRAVITY[-1] is ExitCode.KERNEL


def test_rows_are_found_in_the_source(tmp_path: Path) -> None:
    """A row counts as asserted if a test's decorators name it, those of its parameters too; others are listed without."""
    selftests = tmp_path / "selftests"
    selftests.mkdir()
    (selftests / "test_x.py").write_text(
        '@contract("GM-VM-001")\n@pytest.mark.parametrize("x", [pytest.param(1, marks=contract("C1"))])\n'
        "def test_a(kvm, x): pass\ndef test_b(kvm): pass\n"
        'BOTH = pytest.mark.parametrize("y", [pytest.param(1, marks=contract("C2"))])\n@BOTH\ndef test_c(kvm, y): pass\n'
    )
    tests = asserting_tests(selftests)
    assert tests == {
        "GM-VM-001": ["selftests/test_x.py::test_a"],
        "C1": ["selftests/test_x.py::test_a"],
        "C2": ["selftests/test_x.py::test_c"],
    }
    unasserted = [entry.row.id for entry in report(tests, []) if not entry.tests]
    assert "GM-VM-002" in unasserted
    assert "GM-VM-001" not in unasserted
