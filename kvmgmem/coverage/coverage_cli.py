"""`kvmgmem coverage`: the selftests on a kernel that counts which of its lines run, and what they did not reach."""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvmgmem.coverage import report
from kvmgmem.coverage.catalogue import CATALOGUE_FILE, Catalogue, load_catalogue
from kvmgmem.coverage.counts import count
from kvmgmem.coverage.notes import Gcov, Notes, find_gcov, find_notes, lets_allocations_fail
from kvmgmem.coverage.numbers import Numbers, measure
from kvmgmem.coverage.page import find_gcovr, write_page
from kvmgmem.coverage.report import Circumstances, Machine
from kvmgmem.coverage.source import Source
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, gravest
from kvmgmem.lab import cache
from kvmgmem.lab.guest.machine import choose_accelerator, require_qemu
from kvmgmem.lab.guest.variants import lookup
from kvmgmem.lab.kernel.kernels import BuildOptions, Kernel, build, resolve
from kvmgmem.lab.kernel.source import slug
from kvmgmem.lab.kselftest_cli import run_kselftest
from kvmgmem.lab.progress import Progress
from kvmgmem.lab.supervision.counters import CounterFiles
from kvmgmem.lab.vm_cli import run_vm
from kvmgmem.results.run import read_run

FLAVOUR = "coverage"
VARIANTS = ("plain", "npt0", "numa2")
"""What is counted together by default: both kinds of paging, and memory policies that have a choice. Failing allocations
are a part of the flavour, so that every variant has them."""

KSELFTEST = "kselftest"
"""The folder of what the kernel's own selftests reached."""

STATE = "coverage-run.json"


def add_coverage_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("coverage", help="which lines of the kernel's guest_memfd code the selftests reach")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", metavar="DIR|RELEASE", help="build a coverage kernel of this tree or release, and use it")
    which.add_argument("--kernel", metavar="IMAGE|NAME", help="what to boot (default: the coverage kernel last built)")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME", help=f"machines (default: {', '.join(VARIANTS)})"
    )
    parser.add_argument("--out", type=Path, default=Path("coverage"), metavar="DIR", help="counters and reports (coverage)")
    parser.add_argument("--add", action="store_true", help="keep the machines of the last run in --out, and add to them")
    parser.add_argument("--report", action="store_true", help="run nothing, report what the last run has left in --out")
    parser.add_argument(
        "--with-kselftest", action="store_true", help="count what the kernel's own selftests reach, too, apart"
    )
    parser.add_argument("--no-page", action="store_true", help="go without the HTML page, and so without gcovr")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="write the report as Markdown there as well")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE_FILE, metavar="FILE", help="other functions and reasons")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="how QEMU executes the guests")
    parser.add_argument("--jobs", type=int, metavar="N", help="guests that share a variant's tests (default: as fit)")
    parser.add_argument("--boots", type=int, default=25, metavar="N", help="how often a dying guest is started at most")


def run_coverage(args: argparse.Namespace) -> int:
    """Run, bring the counters home, report; returns the exit code. Raises HarnessError.

    The code is that of the runs; if all is as expected, but a line is reached by no test and nobody says why, or a reason
    applies no more, 1 (not where the command line chose the tests).
    """
    catalogue = load_catalogue(args.catalogue)
    variants = [lookup(name).name for name in args.variant or VARIANTS]
    # Whatever is missing is better said now than after an hour of tests.
    gcovr = None if args.no_page else find_gcovr()
    if args.report:
        circumstances = _load(args.out)
        kernel = resolve(circumstances.kernel)
        notes, gcov = find_notes(kernel), find_gcov(kernel)
    else:
        require_qemu()
        accelerator = choose_accelerator(args.accel)
        kernel = _kernel(args)
        notes, gcov = find_notes(kernel), find_gcov(kernel)
        circumstances = Circumstances(
            kernel.name,
            kernel.release,
            kernel.config_hash,
            accelerator.name,
            tuple(args.pytest_args),
            (),
            lets_allocations_fail(kernel),
        )
        if args.add:
            circumstances = _kept(_load(args.out), circumstances)
        circumstances = _run_variants(args, circumstances, list(dict.fromkeys(variants)))
        if args.with_kselftest:
            circumstances = replace(circumstances, kselftest=_run_kselftest(args, kernel))
            _save(args.out, circumstances)
    with Progress("kvmgmem: reading the counters"):
        numbers = _numbers(catalogue, _boots(args.out, circumstances), notes, gcov)
        page = write_page(gcovr, args.out / "page", numbers, notes) if gcovr else None
        boots = CounterFiles(_folder(args.out, KSELFTEST)).boots() if circumstances.kselftest else []
        theirs = _numbers(catalogue, boots, notes, gcov) if boots else None
    _write(args, numbers, theirs, circumstances, page)
    return _exit_code(numbers, circumstances)


def _kernel(args: argparse.Namespace) -> Kernel:
    if args.source is not None:
        options = BuildOptions(flavour=FLAVOUR)
        tree = Path(args.source)
        return build(source=tree, options=options) if tree.is_dir() else build(args.source, options=options)
    if args.kernel is not None:
        return resolve(args.kernel)
    with contextlib.suppress(HarnessError):
        return resolve(FLAVOUR)
    return build(options=BuildOptions(flavour=FLAVOUR))


def _kept(earlier: Circumstances, now: Circumstances) -> Circumstances:
    """The machines of an earlier run, whose counters are those of the same kernel. Raises HarnessError (USAGE) else."""
    if (earlier.kernel, earlier.config_hash) != (now.kernel, now.config_hash):
        raise HarnessError(
            f"the last run was one of {earlier.kernel}, to which {now.kernel} cannot be added",
            "leave out --add, or name another --out",
            ExitCode.USAGE,
        )
    return replace(now, machines=earlier.machines, kselftest=earlier.kselftest)


def _run_variants(args: argparse.Namespace, circumstances: Circumstances, variants: Sequence[str]) -> Circumstances:
    for name in variants:
        others = tuple(machine for machine in circumstances.machines if machine.name != name)
        machine = _run_variant(args, circumstances.kernel, name)
        circumstances = replace(circumstances, machines=(*others, machine))
        _save(args.out, circumstances)
    return circumstances


def _save(out: Path, circumstances: Circumstances) -> None:
    cache.write_file(out / STATE, (json.dumps(asdict(circumstances), indent=1) + "\n").encode())


def _run_variant(args: argparse.Namespace, kernel: str, name: str) -> Machine:
    """The tests on one machine, as `kvmgmem vm` runs them."""
    words = ["vm", f"--kernel={kernel}", f"--variant={name}", *([f"--jobs={args.jobs}"] if args.jobs else [])]
    return _run_machine(args, name, words, run_vm, args.pytest_args)


def _run_kselftest(args: argparse.Namespace, kernel: Kernel) -> Machine:
    """The kernel's own selftests, as `kvmgmem kselftest` runs them."""
    source = args.source or ".".join(kernel.version.split(".")[:2])
    return _run_machine(args, KSELFTEST, ["kselftest", f"--source={source}", f"--kernel={kernel.name}"], run_kselftest, [])


def _run_machine(
    args: argparse.Namespace,
    name: str,
    words: Sequence[str],
    run_verb: Callable[[argparse.Namespace], int],
    pytest_args: Sequence[str],
) -> Machine:
    """Another verb of the command line, with the options of this one; its summary goes into a file."""
    from kvmgmem.cli import build_parser

    folder = _folder(args.out, name)
    with cache.disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    records = folder / "records.jsonl"
    common = [f"--accel={args.accel}", f"--boots={args.boots}", f"--results={records}", f"--counters={folder}"]
    verb_args = build_parser().parse_args([*words, *common])
    verb_args.pytest_args = pytest_args
    summary = folder / "summary.txt"
    with summary.open("w", encoding="utf-8", errors="backslashreplace") as out, contextlib.redirect_stdout(out):
        status = run_verb(verb_args)
    run = read_run([records])
    lost = tuple(f"boot {boot.boot}: {boot.reason}" for boot in CounterFiles(folder).lost())
    print(f"{name}: {len(run.tests)} tests, exit code {status} ({summary})", flush=True)
    return Machine(name, len(run.tests), int(status), run.segments, lost)


def _folder(out: Path, machine: str) -> Path:
    """Where a machine's records and counters are; a variant may be words with spaces and slashes."""
    return out / slug(machine)


def _load(out: Path) -> Circumstances:
    try:
        content = json.loads((out / STATE).read_text(encoding="utf-8"))
        machines = tuple(_machine(entry) for entry in content["machines"])
        own = _machine(content["kselftest"]) if content.get("kselftest") else None
        known = {**content, "machines": machines, "pytest_args": tuple(content["pytest_args"]), "kselftest": own}
        return Circumstances(**known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(
            f"{out} holds no finished run of `kvmgmem coverage`",
            "run it without --report, or name another --out",
            ExitCode.USAGE,
        ) from error


def _machine(entry: dict[str, Any]) -> Machine:
    return Machine(**{**entry, "lost": tuple(entry["lost"])})


def _boots(out: Path, circumstances: Circumstances) -> list[Path]:
    boots = [boot for machine in circumstances.machines for boot in CounterFiles(_folder(out, machine.name)).boots()]
    if not boots:
        reasons = "; ".join(circumstances.lost) or "no guest ran a test"
        codes = [machine.exit for machine in circumstances.machines]
        code = ExitCode.KERNEL if ExitCode.KERNEL in codes else ExitCode.HARNESS
        raise HarnessError(f"no guest handed its counters over: {reasons}", f"see the records and consoles in {out}", code)
    return boots


def _paths(catalogue: Catalogue) -> list[str]:
    return [measured.path for measured in catalogue.files]


def _numbers(catalogue: Catalogue, boots: Sequence[Path], notes: Notes, gcov: Gcov) -> Numbers:
    sources = {}
    for path in _paths(catalogue):
        try:
            sources[path] = Source(notes.source_of(path).read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise HarnessError(
                f"the source of {path} is not where the kernel was built from: {notes.source}", "build the kernel again"
            ) from error
    counts = {path: count(boots, path, notes, gcov) for path in sources}
    return measure(catalogue, sources, counts)


def _write(
    args: argparse.Namespace, numbers: Numbers, theirs: Numbers | None, circumstances: Circumstances, page: Path | None
) -> None:
    text = "\n".join(report.summary(numbers, circumstances, theirs)) + "\n"
    document = ("\n".join(report.markdown(numbers, circumstances, _command(args, circumstances), theirs)) + "\n").encode()
    cache.write_file(args.out / "coverage.txt", text.encode())
    cache.write_file(args.out / "coverage.md", document)
    cache.write_file(args.out / "coverage.json", report.as_json(numbers, circumstances, theirs).encode())
    if args.evidence:
        cache.write_file(args.evidence, document)
    sys.stdout.write(text)
    pages = f", page: {page}" if page else ""
    print(f"\nreports: {args.out}/coverage.txt, .md and .json{pages}")


def _command(args: argparse.Namespace, circumstances: Circumstances) -> str:
    """What makes these numbers again on a machine that has nothing yet."""
    release = ".".join(circumstances.release.split("-")[0].split(".")[:2])
    names = tuple(machine.name for machine in circumstances.machines)
    words = ["kvmgmem", "coverage", "--source", args.source or release]
    words += [] if set(names) == set(VARIANTS) else [f"--variant={name}" for name in names]
    words += ["--with-kselftest"] if circumstances.kselftest else []
    words += ["--", *circumstances.pytest_args] if circumstances.pytest_args else []
    return shlex.join(words)


def _exit_code(numbers: Numbers, circumstances: Circumstances) -> int:
    codes = [machine.exit for machine in circumstances.machines]
    if not circumstances.pytest_args and (numbers.to_reach or numbers.stale):
        codes.append(ExitCode.TEST_FAILED)
    return gravest(codes)
