"""`kvmgmem fuzz`: look for sequences of operations that go another way than the model says, for as long as you like.

A search is a directory. Its state file says which seeds are done and what has been found, so that a search that was ended
goes on where it stopped, and tells nothing twice; each finding is a file of steps that `--replay` plays again.
"""

import argparse
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.progress import Progress

if TYPE_CHECKING:
    from kvmgmem.lab.supervision.supervisor import Request
    from kvmgmem.model.campaign import Found

BLOCK = 50
"""Seeds that one process of a search on this host plays."""
SEEDS_A_ROUND = 1 << 20
"""Room for seeds that one boot of a guest may come to."""
ROUND_SECONDS = 600.0
SEQUENCE_SECONDS = 30.0
"""What one sequence may take on this host before it counts as hung; shrinking has its own time."""
DEATH_PLAYS = 24
"""Boots that shrinking a sequence which kills the kernel may take."""


def add_fuzz_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "fuzz",
        help="look for sequences of operations that break the contract",
        description="Play sequences that nobody wrote down, and hold every answer and every byte against the contract as a "
        "model: in guests, or with --host on this machine. A finding is told once, shrunk to a handful of steps, and kept "
        "as a file that --replay plays again. Known bugs are findings too, and called by their names.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="how long to look (default 10)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="where to begin (default 1)")
    parser.add_argument("--first", action="store_true", help="end at the first finding that is no known bug")
    parser.add_argument("--host", action="store_true", help="on this machine's KVM, which a finding may take down")
    parser.add_argument("--kernel", metavar="IMAGE|NAME", help="what to boot (default: the base kernel last built)")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), metavar="DIR", help="state and findings (default: fuzz)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="play a finding again, and say whether it still shows")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="guests, or processes, at once (default 1)")
    parser.add_argument(
        "--variant", default="plain", metavar="NAME", help="a machine by name (see `matrix`): npt0, smp1, ..."
    )
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="how QEMU executes the guest")
    parser.add_argument("--memory", type=int, default=1536, metavar="MiB", help="the guest's memory (default 1536)")
    parser.add_argument("--smp", type=int, default=2, metavar="N", help="its CPUs (default 2)")
    parser.add_argument("--append", default="", metavar="OPTIONS", help="more of the kernel's command line")


def run_fuzz(args: argparse.Namespace) -> int:
    """Search, or play again; returns the exit code. Raises `HarnessError`."""
    _check(args)
    if args.replay:
        return _replay(args)
    state = State.open(args.out, _place(args), args.seed)
    before = set(state.found)
    with Progress(f"kvmgmem: looking for {args.minutes:g} min, {_place(args)}") as progress:
        search = Search(args, state, progress)
        (search.on_host if args.host else search.in_guests)(time.monotonic() + 60 * args.minutes)
    return _conclude(args, state, before)


def _check(args: argparse.Namespace) -> None:
    if args.minutes <= 0:
        raise HarnessError(f"--minutes {args.minutes:g} leaves no time", "give more than 0", ExitCode.USAGE)
    for name, least in (("jobs", 1), ("memory", 256), ("smp", 1)):
        if getattr(args, name) < least:
            raise HarnessError(f"--{name} {getattr(args, name)} is too small", f"give at least {least}", ExitCode.USAGE)
    if args.host and args.kernel:
        raise HarnessError("--host and --kernel contradict each other", "leave one out", ExitCode.USAGE)


def _place(args: argparse.Namespace) -> str:
    """Which kernel a search is about, in words: findings of two kernels do not belong into one directory."""
    if args.host:
        return f"host {os.uname().release}"
    words = [args.kernel or "the base kernel last built", *([args.variant] if args.variant != "plain" else [])]
    return " ".join(["guests,", *words, *([args.append] if args.append else [])])


def again(args: argparse.Namespace, path: Path) -> tuple[str, str]:
    """The commands that play a finding once more where it was found, and that make a C program of it."""
    replay, repro = ["kvmgmem", "fuzz", "--replay", str(path)], ["kvmgmem", "repro", str(path), "-o", "bug.c"]
    if args.host:
        return shlex.join([*replay, "--host"]), shlex.join(repro)
    from kvmgmem.lab.kernel.kernels import resolve

    kernel = args.kernel or resolve(None).name
    machine = ["--variant", args.variant] if args.variant != "plain" else []
    machine += [f"--append={args.append}"] if args.append else []
    return shlex.join([*replay, "--kernel", kernel, *machine]), shlex.join([*repro, "--record-on", kernel, *machine])


def _conclude(args: argparse.Namespace, state: "State", before: set[str]) -> int:
    new = [name for name in state.found if name not in before]
    print(f"{state.sequences} sequences of {state.steps} steps played in all, {len(state.found)} findings, {len(new)} new")
    for name in new:
        print(f"\n{state.directory / name}.steps: {state.found[name]}")
        found = state.read(name)
        if found:
            print("\n".join(found.lines))
            replay, repro = again(args, state.directory / f"{name}.steps")
            print(f"  found after {found.seconds:g} s; play it again: {replay}")
            print(f"  as a C program: {repro}")
    if any(name.startswith("kernel-") for name in new):
        return ExitCode.KERNEL
    return ExitCode.TEST_FAILED if new else ExitCode.OK


# --- what is kept -----------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What a search's directory holds: where it stands, and what it found (fingerprint to text)."""

    directory: Path
    place: str
    next_seed: int
    unfinished: list[list[int]] = field(default_factory=list)
    """Ranges of seeds (the first, and the one after the last) that were begun and not ended."""
    found: dict[str, str] = field(default_factory=dict)
    sorts: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    steps: int = 0
    playing: dict[int, int] = field(default_factory=dict)
    """Ranges that are being played: where each stands, and its end. Kept as unfinished, should this process be killed."""

    @classmethod
    def open(cls, directory: Path, place: str, seed: int) -> "State":
        """The state of a directory, or a new one; raises `HarnessError` if it is another kernel's."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            data = json.loads((directory / "state.json").read_text())
        except FileNotFoundError:
            return cls(directory, place, seed)
        except OSError as error:
            raise HarnessError(
                f"cannot use {directory}: {error.strerror}", "name another with --out", ExitCode.USAGE
            ) from error
        except ValueError as error:
            raise HarnessError(
                f"{directory / 'state.json'} is broken: {error}", "remove it, or name another --out"
            ) from error
        if data.get("place") != place:
            raise HarnessError(
                f"{directory} holds a search of another kernel: {data.get('place')}",
                f"name another directory with --out for {place}",
                ExitCode.USAGE,
            )
        return cls(directory, **data)

    def save(self) -> None:
        """Write it, whole or not at all."""
        data = {key: value for key, value in self.__dict__.items() if key not in ("directory", "playing")}
        data["unfinished"] = [*self.unfinished, *([first, end] for first, end in self.playing.items())]
        path = self.directory / "state.json"
        path.with_suffix(".new").write_text(json.dumps(data, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def take_block(self, size: int) -> tuple[int, int]:
        """A range of seeds that nobody has played: the first, and the one after the last."""
        if self.unfinished:
            first, end = self.unfinished.pop(0)
        else:
            first, end = self.next_seed, self.next_seed + size
            self.next_seed = end
        self.playing[first] = end
        return first, end

    def put_back(self, first: int, reached: int) -> None:
        """A range is not played any more; what is left of it is still to be played."""
        end = self.playing.pop(first)
        if reached < end:
            self.unfinished.append([reached, end])

    def add(self, found: "Found") -> bool:
        """Keep a finding; whether it is new."""
        if found.fingerprint in self.found:
            return False
        self.found[found.fingerprint] = f"{found.bug}: {found.text}" if found.bug else found.text
        key = found.bug or found.sort
        self.sorts[key] = self.sorts.get(key, 0) + 1
        found.write(self.directory)
        self.save()
        return True

    def read(self, name: str) -> "Found | None":
        """A finding that was kept."""
        from kvmgmem.model.campaign import Found

        try:
            return Found.read(self.directory / f"{name}.steps")
        except (OSError, ValueError):
            return None


# --- searching --------------------------------------------------------------------------------------------------------


class Search:
    """One call of `kvmgmem fuzz`."""

    def __init__(self, args: argparse.Namespace, state: State, progress: Progress) -> None:
        self._args = args
        self._state = state
        self._progress = progress
        self._lock = threading.Lock()
        self._reached: dict[int, int] = {}
        """How far the ranges have come that are being played."""
        self._over = False
        """Whether the search is at its end before its time: a finding was enough (--first), or it was interrupted."""
        self._under_way: dict[int, tuple[int, int]] = {}
        """Sequences and steps of the guests that are still searching, by their first seeds."""

    def _found(self, found: "Found") -> None:
        with self._lock:
            if self._state.add(found):
                name = f"known bug {found.bug}" if found.bug else found.fingerprint
                self._progress.note(f"found ({name}), {len(found.steps)} steps: {found.text}")
                self._over = self._over or (self._args.first and not found.bug)

    def _show(self) -> None:
        with self._lock:
            sequences = self._state.sequences + sum(played for played, _ in self._under_way.values())
            self._progress.update(f"{sequences} sequences, {len(self._state.found)} findings")

    def _rounds(self, deadline: float, size: int, work: Callable[[int, int], int]) -> None:
        """Have `work(first seed, end)` done by as many threads as there are jobs until the time is over.

        It gives the first seed that it did not come to.
        """
        jobs = self._args.jobs
        if jobs == 1:  # in this thread, so that Ctrl-C is heard where the work is done
            while time.monotonic() < deadline and not self._over:
                self._round(work, *self._state.take_block(size))
                self._show()
            return
        from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

        with ThreadPoolExecutor(jobs) as pool:
            running: set[Future[None]] = set()
            try:
                while running or (time.monotonic() < deadline and not self._over):
                    while len(running) < jobs and time.monotonic() < deadline and not self._over:
                        running.add(pool.submit(self._round, work, *self._state.take_block(size)))
                    done, running = wait(running, 0.5, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    self._show()
            except BaseException:
                self._over = True  # the others end at their next word, and the pool waits for them
                raise

    def _round(self, work: Callable[[int, int], int], first: int, end: int) -> None:
        self._reached[first] = first
        try:
            self._reached[first] = work(first, end)
        finally:
            with self._lock:
                self._state.put_back(first, self._reached.pop(first))
                self._state.save()

    # -- on this host

    def on_host(self, deadline: float) -> None:
        """Play blocks of seeds in processes of their own."""
        from kvmgmem.host import probe
        from kvmgmem.testing import debugfs

        probe()
        if why := debugfs.mount_privately():
            self._progress.note(f"lifetimes of VMs are not watched: {why}")
        self._rounds(deadline, BLOCK, lambda first, end: self._host_block(first, end, deadline))

    def _host_block(self, first: int, end: int, deadline: float) -> int:
        from kvmgmem.fuzz_worker import Worker

        with Worker(self._state.directory / f"journal-{first}") as worker:
            told, sorts = list(self._state.found), dict(self._state.sorts)
            for found in worker.play(first, end, deadline, told, sorts, SEQUENCE_SECONDS):
                self._found(found)
                if self._over:
                    break
            with self._lock:
                self._state.sequences += worker.sequences
                self._state.steps += worker.steps
            return worker.next_seed

    # -- in guests

    def in_guests(self, deadline: float) -> None:
        """Boot guests that search, for a while each."""
        self._rounds(deadline, SEEDS_A_ROUND, lambda first, _: self._guest_round(first, deadline))

    def _guest_round(self, first: int, deadline: float) -> int:
        from kvmgmem.lab.fuzz_guest import Job, Round, RoundOverError, dead_kernel, run_round

        seconds = min(ROUND_SECONDS, deadline - time.monotonic())
        told = 0

        def follow(result: Round) -> None:
            nonlocal told
            for found in result.found[told:]:
                self._found(found)
            told = len(result.found)
            self._reached[first] = max(first, result.last_seed + 1)
            self._under_way[first] = result.sequences, result.steps
            self._show()
            if self._over:
                raise RoundOverError(result)

        job = Job(first, max(5.0, seconds), tuple(self._state.found), dict(self._state.sorts), first=self._args.first)
        try:
            result = run_round(self._request(job.seconds), job, follow)
        except RoundOverError as over:
            result = over.round
        finally:
            with self._lock:
                sequences, steps = self._under_way.pop(first, (0, 0))
                self._state.sequences += sequences
                self._state.steps += steps
        if self._over and result.end is None:
            return max(first, result.last_seed + 1)
        if result.failed:
            raise HarnessError(f"the search in the guest failed: {result.failed}", f"see {self._state.directory}")
        if result.died:
            found = dead_kernel(result, result.last_sequence, result.last_seed + 1)
            if found.fingerprint not in self._state.found:
                self._found(self._shrink_death(found, deadline))
            return max(first, result.last_seed + 1) + 1  # beyond the deadly one
        return max(first, result.last_seed + 1)

    def _request(self, seconds: float) -> "Callable[[Path], Request]":
        return lambda directory: guest_request(self._args, directory, seconds)

    def _shrink_death(self, found: "Found", deadline: float) -> "Found":
        """Leave out of a deadly sequence what the kernel dies without, a boot for each try."""
        from kvmgmem.lab.fuzz_guest import Job, dead_kernel, run_round
        from kvmgmem.model.shrink import Shrinker

        def shows(steps: "Sequence[Any]") -> bool:
            self._progress.update("shrinking a sequence that the kernel dies of")
            result = run_round(self._request(60.0), Job(steps=tuple(steps)), lambda _: None)
            return result.died and dead_kernel(result, steps, found.seed).fingerprint == found.fingerprint

        left = max(60.0, deadline - time.monotonic())
        steps = tuple(Shrinker(shows, DEATH_PLAYS, left).shrink(found.steps))
        return replace(found, steps=steps, lines=tuple(str(step) for step in steps) + found.lines[len(found.steps) :])


def guest_request(args: argparse.Namespace, directory: Path, seconds: float) -> "Request":
    """The supervised run of one round; raises `HarnessError` for want of a kernel or of QEMU."""
    from kvmgmem.lab.cache import cache_root
    from kvmgmem.lab.guest.initramfs import ImageRequest, build_image
    from kvmgmem.lab.guest.machine import QEMU, Machine, choose_accelerator, require_kernel_image, require_qemu
    from kvmgmem.lab.guest.variants import lookup
    from kvmgmem.lab.kernel.kernels import build, list_kernels, resolve
    from kvmgmem.lab.supervision.limits import Limits
    from kvmgmem.lab.supervision.supervisor import Request
    from kvmgmem.lab.vm_cli import FLAVOUR_SLOWNESS, QUIET

    variant = lookup(args.variant)
    kernel = resolve(args.kernel) if args.kernel or list_kernels() else build()
    accelerator = choose_accelerator(args.accel)
    image = build_image(ImageRequest(directory, modules=tuple(kernel.modules)), cache_root() / "images", lambda _: None)
    machine = Machine(
        kernel=require_kernel_image(kernel.image),
        initrd=image.path,
        accelerator=accelerator.name,
        memory_mib=variant.memory or args.memory,
        cpus=variant.smp or args.smp,
        numa_nodes=variant.numa or 1,
        append=f"{variant.append} {args.append}".strip(),
        qemu=require_qemu(variant.qemu or QEMU),
    )
    scale = accelerator.time_scale * FLAVOUR_SLOWNESS.get(kernel.flavour or "", 1.0)
    # The round's own time is real time, whatever the accelerator; on top comes what a last shrinking may take.
    limit = seconds + 60 * scale
    return Request(
        machine=machine,
        results=_fresh(args.out, "guest", ".jsonl"),
        pytest_args=(*QUIET, f"--test-timeout={limit / scale:g}"),
        flavour=kernel.flavour,
        time_scale=scale,
        limits=replace(Limits().scaled(scale), test=2 * limit),
        boots=3,
        console=_fresh(args.out, "guest", ".console"),
    )


_counter = iter(range(1 << 30))


def _fresh(directory: Path, name: str, suffix: str) -> Path:
    """A file of a search's directory that is not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{next(_counter)}{suffix}"


# --- once more --------------------------------------------------------------------------------------------------------


def _replay(args: argparse.Namespace) -> int:
    from kvmgmem.model.campaign import Found

    try:
        found = Found.read(args.replay)
    except OSError as error:
        raise HarnessError(
            f"cannot read {args.replay}: {error.strerror}", "name a finding's file", ExitCode.USAGE
        ) from error
    except ValueError as error:
        raise HarnessError(f"{args.replay} is no finding: {error}", "it wants a step a line", ExitCode.USAGE) from error
    lines, findings, died = _play_here(found) if args.host else _play_in_guest(args, found)
    print("\n".join(lines))
    shows = died or any(sort == found.sort or (bug and bug == found.bug) for sort, bug, _ in findings)
    if found.sort and shows:
        print(f"it still shows: {found.text}")
    elif findings or died:
        print("the kernel and the model disagree" + (", though not as the file says" if found.sort else ""))
    else:
        print("it does not show: all goes as the model says")
    if died:
        return ExitCode.KERNEL
    return ExitCode.TEST_FAILED if findings else ExitCode.OK


Findings = Sequence[Sequence[str]]
"""Of each finding: its sort, its bug, its text."""


def _play_here(found: "Found") -> tuple[Sequence[str], Findings, bool]:
    from kvmgmem.model.play import play
    from kvmgmem.model.traits import probe
    from kvmgmem.testing import debugfs

    debugfs.mount_privately()
    played = play(found.steps, probe())
    findings = [*played.known, *filter(None, [played.finding])]
    last = findings[0] if findings else None
    return played.lines(last), [(each.sort, each.bug, str(each)) for each in findings], False


def _play_in_guest(args: argparse.Namespace, found: "Found") -> tuple[Sequence[str], Findings, bool]:
    import tempfile

    from kvmgmem.lab.fuzz_guest import Job, run_round

    with tempfile.TemporaryDirectory(prefix="kvmgmem-replay-") as directory:
        args.out = Path(directory)
        with Progress(f"kvmgmem: playing {args.replay}, {_place(args)}"):
            result = run_round(lambda tests: guest_request(args, tests, 60.0), Job(steps=found.steps), lambda _: None)
    if result.played is not None:
        return result.played["lines"], result.played["findings"], result.died
    reason = result.end.reason if result.end else "the guest did not come to it"
    return [reason], [], result.died
