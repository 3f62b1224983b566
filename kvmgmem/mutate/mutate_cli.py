"""`kvmgmem mutate`: one deliberate fault of the kernel at a time, and which of them the selftests notice."""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import cache
from kvmgmem.lab.guest.initramfs import ImageRequest, build_image
from kvmgmem.lab.guest.machine import choose_accelerator, require_qemu
from kvmgmem.lab.kernel.source import Origin, source_tree
from kvmgmem.lab.kselftest import find_source
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate import report
from kvmgmem.mutate.apply import Applied, DoesNotApply, check, read_source
from kvmgmem.mutate.campaign import Campaign, Plan
from kvmgmem.mutate.catalogue import CATALOGUE_FILE, Mutant, choose, load_mutants, selftests_by_name
from kvmgmem.mutate.guest import Guest
from kvmgmem.mutate.idle import RELATIONS, Answers, Duties, IdleTests, markdown
from kvmgmem.mutate.judge import Fate
from kvmgmem.mutate.state import DEPTHS, Result, State, folder_digest, mutant_digest
from kvmgmem.run import selftests_directory

STATE = "mutants.jsonl"
IDLE = "idle-tests.jsonl"


def add_mutate_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("mutate", help="how many deliberate faults of a kernel the selftests notice")
    parser.add_argument("--source", metavar="DIR|RELEASE", help="the kernel tree, which is only read, or a release: 7.3")
    parser.add_argument("--objects", type=Path, metavar="DIR", help="a finished build of it (make O=DIR) to start from")
    parser.add_argument("--list", action="store_true", help="list the mutants, and with --source which of them apply")
    parser.add_argument("--only", action="append", default=[], metavar="IDS", help="these mutants, separated by commas")
    parser.add_argument("--function", metavar="NAME", help="the mutants in this function of the kernel")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE_FILE, metavar="FILE", help="other mutants")
    parser.add_argument("--depth", choices=DEPTHS, default="rest", help="how many rounds of tests a mutant is put through")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at once, each with a tree of its own")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="how QEMU executes the guests")
    parser.add_argument("--with-kselftest", action="store_true", help="ask the kernel's own KVM selftests as well")
    parser.add_argument(
        "--idle-tests", action="store_true", help="then ask the tests that have noticed no mutant so far by themselves"
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="spread the mutants over the workers of a dask scheduler")
    parser.add_argument(
        "--again", action="append", default=[], metavar="FATE", help="try once more: survived, undecided, ..."
    )
    parser.add_argument("--fresh", action="store_true", help="forget what is known from earlier runs")
    parser.add_argument("--report", action="store_true", help="only report what is known from earlier runs")
    parser.add_argument("--out", type=Path, default=Path("mutation"), metavar="DIR", help="results and reports (mutation)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="private trees and kernels (default: in the cache)")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="put the report into this Markdown file")


def run_mutate(args: argparse.Namespace) -> int:
    """Try what has not been tried yet, and report; 0 if every mutant that counts was killed, else 1. Raises HarnessError."""
    mutants = choose(load_mutants(args.catalogue), _split(args.only), args.function)
    if args.list:
        return _list(args, mutants)
    state = State(args.out / STATE)
    if not args.report:
        _check_arguments(args)
        if args.fresh:
            state.path.unlink(missing_ok=True)
            (args.out / IDLE).unlink(missing_ok=True)
            state = State(state.path)
        _run(args, mutants, state)
    return _report(args, mutants, state)


def _split(words: Sequence[str]) -> list[str]:
    return [name for word in words for name in word.split(",") if name]


def _check_arguments(args: argparse.Namespace) -> None:
    if args.source is None:
        raise HarnessError("no kernel tree is named", "give one: kvmgmem mutate --source DIR|RELEASE", ExitCode.USAGE)
    if args.jobs < 1:
        raise HarnessError(f"--jobs {args.jobs} is too small", "give at least 1", ExitCode.USAGE)
    alone = [name for name in ("scheduler", "with_kselftest", "idle_tests") if getattr(args, name)]
    if len(alone) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in alone[:2])
        raise HarnessError(f"{first} and {second} exclude each other", "give one of them", ExitCode.USAGE)
    fates = [fate.value for fate in Fate]
    if unknown := [fate for fate in _split(args.again) if fate not in fates]:
        raise HarnessError(f"--again {unknown[0]}: no mutant has that fate", f"one of: {', '.join(fates)}", ExitCode.USAGE)


def _list(args: argparse.Namespace, mutants: Sequence[Mutant]) -> int:
    applied: Mapping[str, Applied | DoesNotApply] = {}
    if args.source:
        with Progress("kvmgmem: mutants") as progress, source_tree(find_source(args.source, progress), progress) as tree:
            applied = check(tree, mutants)
    for mutant in mutants:
        note = "equivalent" if mutant.equivalent else ""
        if isinstance(found := applied.get(mutant.id), DoesNotApply):
            note = f"does not apply: {found.reason}"
        print(f"{mutant.id:45} {report.place(mutant):50} {mutant.operator:25} {' '.join(mutant.breaks)}  {note}".rstrip())
    count = sum(isinstance(found, DoesNotApply) for found in applied.values())
    print(f"{len(mutants)} mutants" + (f", {count} of which do not apply to {args.source}" if args.source else ""))
    return ExitCode.OK


def _run(args: argparse.Namespace, mutants: Sequence[Mutant], state: State) -> None:
    with Progress("kvmgmem: mutants") as progress:
        origin = find_source(args.source, progress)
        with source_tree(origin, progress) as tree:
            _run_on(origin, tree, args, mutants, state, progress)


def _run_on(
    origin: Origin, tree: Path, args: argparse.Namespace, mutants: Sequence[Mutant], state: State, progress: Progress
) -> None:
    plan = _plan(origin, tree, args, progress)
    digests = {mutant.id: mutant_digest(mutant, read_source(plan.source / mutant.file)) for mutant in mutants}
    left = state.left(mutants, digests, args.depth, _split(args.again), args.with_kselftest)
    if known := len(mutants) - len(left):
        progress.note(f"{known} of {len(mutants)} mutants are known from earlier runs ({state.path})")
    with cache.locked(plan.work, progress.note):
        if left:
            _try(left, origin, args, plan, state, progress)
        if args.idle_tests:
            _ask_idle_tests(args, mutants, plan, state, progress)


def _try(
    left: Sequence[Mutant], origin: Origin, args: argparse.Namespace, plan: Plan, state: State, progress: Progress
) -> None:
    if args.scheduler:
        from kvmgmem.mutate.scheduler import run_spread

        run_spread(args.scheduler, plan, left, state, progress)
        return
    campaign = Campaign(plan, state, progress)
    campaign.prepare()
    if args.with_kselftest:
        from kvmgmem.mutate.kernel_tests import KernelTests

        campaign.besides = KernelTests(origin, plan.work, plan.guest, campaign.base, campaign.kernel_key, progress)
    campaign.run(left)


def _ask_idle_tests(
    args: argparse.Namespace, mutants: Sequence[Mutant], plan: Plan, state: State, progress: Progress
) -> None:
    duties, answers = Duties.of(plan.selftests), Answers.read(args.out / IDLE)
    for relation in RELATIONS:
        campaign = Campaign(plan, state, progress)
        campaign.prepare()
        campaign.besides = idle = IdleTests(campaign, duties, answers, relation)
        campaign.run(idle.prepare(mutants))


def _plan(origin: Origin, tree: Path, args: argparse.Namespace, progress: Progress) -> Plan:
    work = (args.work or cache.cache_root() / "mutants" / origin.key).resolve()
    work.mkdir(parents=True, exist_ok=True)
    selftests = selftests_directory()
    accelerator = choose_accelerator(args.accel)
    image = build_image(ImageRequest(selftests), cache.cache_root() / "images", progress.note)
    # The cache forgets images that nobody asked for in an hour; a campaign may take longer.
    for old in work.glob("initramfs*.cpio"):
        old.unlink()
    # Its name says what is in it, and kept guests are told apart by that.
    kept = Path(shutil.copy2(image.path, work))
    return Plan(
        source=tree.resolve(),
        work=work,
        guest=Guest(kept, accelerator.name, accelerator.time_scale, require_qemu(), snapshots=work / "snapshots"),
        selftests=selftests,
        tests=selftests_by_name(selftests),
        tests_digest=folder_digest(selftests),
        files=tuple(sorted({mutant.file for mutant in load_mutants(args.catalogue)})),
        objects=args.objects.resolve() if args.objects else None,
        jobs=args.jobs,
        make_jobs=max(1, (os.cpu_count() or 1) // args.jobs),
        depth=args.depth,
    )


def _report(args: argparse.Namespace, mutants: Sequence[Mutant], state: State) -> int:
    known = {mutant.id: mutant for mutant in mutants}
    results: list[Result] = [state.results[name] for name in known if name in state.results]
    if not results:
        raise HarnessError(f"{state.path} holds no results of these mutants", "run them first", ExitCode.NOTHING_RAN)
    tests = markdown(Duties.of(selftests_directory()), results, known, Answers.read(args.out / IDLE))
    lines = report.markdown(results, known, state.circumstances, tests)
    cache.write_file(args.out / "mutants.md", ("\n".join(["# Mutations", "", *lines]) + "\n").encode())
    cache.write_file(args.out / "mutants.json", report.as_json(results, known, state.circumstances).encode())
    if args.evidence:
        report.insert_section(args.evidence, lines)
    sys.stdout.write("\n".join(report.summary(results, known)) + "\n")
    print(f"reports: {args.out / 'mutants.md'}, {args.out / 'mutants.json'}")
    fates = {result.fate for result in results}
    if Fate.ERROR in fates:
        return ExitCode.HARNESS
    if fates & {Fate.SURVIVED, Fate.UNDECIDED}:
        return ExitCode.TEST_FAILED
    return ExitCode.OK if Fate.KILLED in fates else ExitCode.NOTHING_RAN
