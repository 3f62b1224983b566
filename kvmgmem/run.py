"""`kvmgmem run`: the selftests against the KVM of this machine."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.cache import cache_root
from kvmgmem.results.outputs import add_output_options, report

QUIET = ["-q", "--no-header", "--no-summary", "--tb=no", "-p", "no:cacheprovider"]
# Where we are properly installed, pytest knows our modules for a plugin's, and wonders that we are here already.
QUIET += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


def add_run_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("run", help="run the selftests on this machine's KVM")
    parser.add_argument("--require", default="", metavar="NAMES", help="requirements whose lack is a failure, not a skip")
    parser.add_argument("--disruptive", action="store_true", help="also tests that could take this host down")
    parser.add_argument("--effort", type=float, default=1.0, metavar="X", help="scale the volume of long tests")
    parser.add_argument("--trace", metavar="DIR", help="record every call of each test in a file of its own there")
    add_output_options(parser)


def run_run(args: argparse.Namespace) -> int:
    """Run pytest, write the reports, return the exit code; raises `HarnessError`."""
    from kvmgmem.host import probe

    probe()  # says at once, and in one line, if there is no KVM here
    results = results_path(args.results)
    status = _pytest(args, results)
    if not results.exists():
        if status == ExitCode.OK:
            return ExitCode.OK  # pytest was to list tests, not to run any
        raise HarnessError(
            f"no selftest was started (pytest ended with status {status})",
            "see pytest's message above; `kvmgmem run -- --collect-only -q` lists what there is",
            ExitCode(status) if status in (ExitCode.NOTHING_RAN, ExitCode.USAGE) else ExitCode.HARNESS,
        )
    return report(results, args)


def results_path(wanted: str | None) -> Path:
    """Where the records go: the file asked for, which must not exist yet, or a fresh one below the temporary directory."""
    if wanted:
        path = Path(wanted)
        if _size(path):
            raise HarnessError(
                f"{path} exists already", "records of several runs do not belong into one file: name another", ExitCode.USAGE
            )
        return path
    directory = Path(tempfile.gettempdir()) / f"kvmgmem-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory / f"run-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise HarnessError(f"cannot look at {path}: {error.strerror}", "name a file that you may write") from error


def _pytest(args: argparse.Namespace, results: Path) -> int:
    import pytest

    words = [*QUIET, f"--results={results}", f"--require={args.require}", f"--effort={args.effort}"]
    words += ["--disruptive"] if args.disruptive else []
    words += [f"--trace-to={Path(args.trace).resolve()}"] if args.trace else []
    if not any("hypothesis" in word for word in args.pytest_args):
        # It would load all of hypothesis for its summary, for which no selftest asks: half a second.
        words += ["-p", "no:hypothesispytest"]
    _keep_bytecode()
    sys.stdout.flush()
    os.environ["KVMGMEM_NO_SUMMARY"] = "1"  # the report at the end writes it
    return int(pytest.main([*words, *args.pytest_args, *default_paths(args.pytest_args)]))


def _keep_bytecode() -> None:
    """Keep what pytest compiles with rewritten assertions even where Python was told not to ($PYTHONDONTWRITEBYTECODE).

    Not in the source tree, which is what that wish is about. 130 modules; compiling them is a sixth of a run's CPU time, and
    what the compiler leaves behind makes each fork of the runner dearer (38 MB to copy page tables of instead of 47).
    """
    if sys.dont_write_bytecode and sys.pycache_prefix is None:
        sys.pycache_prefix = str(cache_root() / "bytecode")
        sys.dont_write_bytecode = False


def default_paths(pytest_args: list[str]) -> list[str]:
    """The selftests' directory, unless the arguments name tests; raises `HarnessError` if it is not found."""
    if any(Path(word.partition("::")[0]).exists() for word in pytest_args if not word.startswith("-")):
        return []
    return [str(selftests_directory())]


def selftests_directory() -> Path:
    """`selftests/` below the working directory or beside the package; raises `HarnessError` if it is in neither place."""
    for place in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (place / "selftests").is_dir():
            return place / "selftests"
    raise HarnessError(
        "the selftests are not here", "run inside a checkout of kvmgmem, or name their directory after --", ExitCode.USAGE
    )
