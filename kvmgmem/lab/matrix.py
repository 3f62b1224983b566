"""`kvmgmem matrix`: kernels times machine variants, guests in parallel, one table at the end.

Every column is one `kvmgmem vm` in a process of its own, which writes its records into the output directory. A column whose
records are complete, and were made by the same command on the same image, is kept; so a matrix that was interrupted goes on
where it stopped. One that the harness spoilt is done again, too. When no column waits for a core any more, the one with the
most left to do gets a second guest.
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvmgmem.errors import ERROR_PREFIX, HarnessError
from kvmgmem.exit_codes import GRAVITY, ExitCode, gravest
from kvmgmem.lab.guest.capacity import guests_that_fit
from kvmgmem.lab.guest.variants import PLAIN, VARIANTS, Variant, is_variant, lookup
from kvmgmem.lab.kernel.kernels import Kernel, resolve
from kvmgmem.lab.termination import terminable
from kvmgmem.lab.vm_cli import FLAVOUR_SLOWNESS
from kvmgmem.results.compare import compare, write_comparison
from kvmgmem.results.html import write_html_comparison
from kvmgmem.results.outputs import WRITERS, write_file
from kvmgmem.results.run import Run, exit_code, read_run

GUEST_MEMORY_MIB = 1536
WORTH_A_GUEST = 2.0
"""What a column must have left for a second guest, as a factor on the time that its first one took to its first test."""
CLEAR_LINE = "\r\033[K"
SUFFIXES = {"ktap": ".ktap", "junit": ".junit.xml", "markdown": ".md"}


@dataclass
class Tally:
    """Tests done and tests planned, counted from records as they come: five times a second for each column."""

    done: int = 0
    planned: int = 0
    counted: int = 0
    """Bytes of the file that have been looked at: whole lines only."""
    first_test: float = 0.0
    """When the first test was seen to have begun, by time.monotonic(); 0 until then."""

    def count(self, records: Path) -> None:
        """Look at what has been added to a file of records; one that is not there adds nothing."""
        with contextlib.suppress(OSError), records.open("rb") as file:
            file.seek(self.counted)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self.counted += len(line)
                if line.startswith(b'{"record":"plan"'):
                    self.planned = max(self.planned, len(json.loads(line)["tests"]))
                if not self.first_test and line.startswith(b'{"record":"test-start"'):
                    self.first_test = time.monotonic()
                self.done += line.startswith(b'{"record":"test-end"')


@dataclass
class Column:
    """One kernel on one machine, and the process that tries it."""

    kernel: Kernel
    variant: Variant
    directory: Path
    command: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None
    status: int | None = None
    kept: bool = field(default=False)
    started: float = 0.0
    helped: bool = False
    """Whether it was given a second guest."""
    tally: Tally = field(default_factory=Tally)

    @property
    def name(self) -> str:
        """What its files are called."""
        kernel = re.sub(r"[^A-Za-z0-9.+~-]+", "_", self.kernel.name).strip("_")
        return kernel if self.variant is PLAIN else f"{kernel}+{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', self.variant.name)}"

    @property
    def results(self) -> Path:
        """Its records."""
        return self.directory / f"{self.name}.jsonl"

    @property
    def memory_mib(self) -> int:
        """The guest's memory."""
        return self.variant.memory or GUEST_MEMORY_MIB

    def key(self) -> dict[str, object]:
        """What its records depend on: the command, and the image that was booted."""
        image = self.kernel.image.stat()
        return {"command": list(self.command[1:]), "image": [image.st_size, image.st_mtime_ns]}


def add_matrix_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("matrix", help="kernels times machine variants, and one table")
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="as for `vm --kernel`; KERNEL+VARIANT for one variant")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME",
        help="try every kernel on this machine too: "
        + ", ".join(name for name in VARIANTS if name != PLAIN.name)
        + ", a parameter such as kvm_amd.avic=1, qemu=PROGRAM",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("matrix"), metavar="DIR", help="records and reports (default: matrix)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="guests at once (default: as memory and cores allow)")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="how QEMU executes the guests")


def run_matrix(args: argparse.Namespace) -> int:
    """Run what is not done yet, write the reports, print the table; the gravest exit code. Raises `HarnessError`."""
    if args.jobs is not None and args.jobs < 1:
        raise HarnessError(f"--jobs {args.jobs} is too small", "give at least 1", ExitCode.USAGE)
    columns = plan(args.kernels, args.variant, args.out)
    _make_directory(args.out)
    for column in columns:
        column.command = _command(column, args)
        column.kept = _is_done(column)
    jobs = args.jobs or guests_that_fit(max(column.memory_mib for column in columns))
    try:
        with terminable():
            _run(sorted((column for column in columns if not column.kept), key=_work, reverse=True), jobs)
    finally:
        _stop(columns)
    return _report(columns, args.out)


def plan(kernels: Sequence[str], variants: Sequence[str], directory: Path) -> list[Column]:
    """The columns asked for, each once, in order; raises `HarnessError` for a kernel or variant that is none."""
    found: dict[str, Column] = {}
    for spec in kernels:
        kernel, single = _kernel_and_variant(spec)
        wanted = [single] if single else [PLAIN, *map(lookup, variants)]
        for machine in wanted:
            column = Column(kernel, machine, directory)
            found.setdefault(column.name, column)
    return list(found.values())


def _kernel_and_variant(spec: str) -> tuple[Kernel, Variant | None]:
    """What KERNEL or KERNEL+VARIANT means. A release may hold a plus sign too; only a variant behind one counts."""
    name, plus, variant = spec.rpartition("+")
    if plus and is_variant(variant):
        return resolve(name), lookup(variant)
    try:
        return resolve(spec), None
    except HarnessError:
        if plus and _is_kernel(name):
            lookup(variant)  # raises, and says which there are
        raise


def _is_kernel(spec: str) -> bool:
    try:
        resolve(spec)
    except HarnessError:
        return False
    return True


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(
            f"cannot make {directory}: {error.strerror}", "name another with --out", ExitCode.USAGE
        ) from error


def _command(column: Column, args: argparse.Namespace) -> tuple[str, ...]:
    words = [
        sys.executable,
        "-m",
        "kvmgmem.cli",
        "vm",
        f"--kernel={column.kernel.name}",
        f"--accel={args.accel}",
        "--jobs=1",
        "--second-guest-on-demand",
    ]
    words += [] if column.variant is PLAIN else [f"--variant={column.variant.name}"]
    return (*words, f"--results={column.results}", "--", *args.pytest_args)


def _is_done(column: Column) -> bool:
    key = column.results.with_suffix(".key")
    try:
        same = json.loads(key.read_text()) == json.loads(json.dumps(column.key()))
        run = read_run([column.results])
        return same and run.complete and exit_code(run) is not ExitCode.HARNESS
    except (OSError, ValueError, HarnessError):
        return False


def _work(column: Column) -> tuple[float, tuple[int, ...]]:
    """How much there is to do, roughly: what takes longest begins first, so that at the end nobody waits for it alone.

    An older kernel skips more: 6.12 takes half of the time that 7.3 takes.
    """
    release = tuple(int(number) for number in re.findall(r"\d+", column.kernel.version))
    return FLAVOUR_SLOWNESS.get(column.kernel.flavour or "", 1.0), release


def _run(columns: list[Column], jobs: int) -> None:
    waiting, running = list(columns), list[Column]()
    started, said = time.monotonic(), ""
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0)))
        if len(running) + sum(column.helped for column in running) < jobs:
            _help(running)
        time.sleep(0.2)
        for column in running:
            assert column.process is not None
            column.status = column.process.poll()
        running = [column for column in running if column.status is None]
        line = "; ".join(f"{column.name} {_progress(column)}" for column in running)
        if line != said and sys.stdout.isatty():
            print(f"{CLEAR_LINE}{time.monotonic() - started:4.0f} s  {line}"[: 8 + _width()], end="", flush=True)
        said = line
        for column in columns:
            if column.status is not None and column.process is not None:
                print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}{column.name}: {_progress(column)} done", flush=True)
                _close_stdin(column.process)
                column.process = None


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns - 8


def _start(column: Column) -> Column:
    column.results.unlink(missing_ok=True)
    column.results.with_suffix(".key").write_text(json.dumps(column.key()))
    with column.results.with_suffix(".log").open("wb") as log:
        column.process = subprocess.Popen(column.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
    column.started = time.monotonic()
    return column


def _progress(column: Column) -> str:
    """Tests done of tests planned."""
    column.tally.count(column.results)
    return f"{column.tally.done}/{column.tally.planned}" if column.tally.planned else "booting"


def _help(running: Sequence[Column]) -> None:
    """Have the column that has most left to do start a second guest, if that is worth it."""
    alone = [column for column in running if not column.helped]
    if not alone:
        return
    column = max(alone, key=_seconds_left)
    if _seconds_left(column) < WORTH_A_GUEST * _seconds_to_a_test(column):
        return
    column.helped = True
    assert column.process is not None
    assert column.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended
        column.process.stdin.write(b"2")
        column.process.stdin.flush()


def _seconds_left(column: Column) -> float:
    """How long the tests that it has not done will take one guest, if they are like those that it has done."""
    tally = column.tally
    tally.count(column.results)
    return (time.monotonic() - column.started) / tally.done * (tally.planned - tally.done) if tally.done else 0.0


def _seconds_to_a_test(column: Column) -> float:
    """How long its first guest took to its first test; infinite if there was none yet."""
    return column.tally.first_test - column.started if column.tally.first_test else math.inf


def _stop(columns: Sequence[Column]) -> None:
    """End what is still running, gently first: `kvmgmem vm` ends its own guest and keeps its records."""
    alive = [column.process for column in columns if column.process is not None and column.process.poll() is None]
    for process in alive:
        process.terminate()  # SIGINT is ignored in a shell's background job
    for process in alive:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for process in alive:
        _close_stdin(process)


def _close_stdin(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _report(columns: Sequence[Column], directory: Path) -> int:
    runs: list[Run] = []
    lost: list[Column] = []
    for column in columns:
        run = read_run([column.results]) if column.results.exists() else Run()
        if run.circumstances is None:
            lost.append(column)
            continue
        runs.append(run)
        for name, suffix in SUFFIXES.items():
            write_file(column.results.with_name(column.name + suffix), partial(WRITERS[name], run))
    codes = [int(exit_code(run)) for run in runs]
    if runs:
        comparison = compare(runs)
        write_file(directory / "matrix.html", partial(write_html_comparison, comparison))
        write_comparison(comparison, sys.stdout)
        print(f"page: {directory / 'matrix.html'}")
    for column in lost:
        log = column.results.with_suffix(".log")
        print(f"{column.name}: did not come to a first record: {_error_in(log)}; see {log}")
        codes.append(column.status if column.status in GRAVITY[1:] else ExitCode.HARNESS)
    return gravest(codes)


def _error_in(log: Path) -> str:
    """What a column's command said that it died of."""
    with contextlib.suppress(OSError):
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(ERROR_PREFIX)]
        if said:
            return said[-1].removeprefix(ERROR_PREFIX)
    return "it said nothing"
