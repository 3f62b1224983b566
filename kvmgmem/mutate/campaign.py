"""A campaign: every chosen mutant built, booted and judged, on several private trees at once, resumable at any point."""

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel.flavours import config_hash, parse_config
from kvmgmem.lab.kernel.kbuild import BuildError
from kvmgmem.lab.progress import Progress, duration_text
from kvmgmem.mutate import tree as private_tree
from kvmgmem.mutate.apply import Applied, DoesNotApply, apply_mutant, read_source
from kvmgmem.mutate.build import build_again, build_base, built_config, image_of
from kvmgmem.mutate.catalogue import Mutant, node_ids
from kvmgmem.mutate.guest import Guest, Trial, run_tests
from kvmgmem.mutate.judge import ALL, Baseline, Fate, Notice, first_notice, load_baseline, save_baseline
from kvmgmem.mutate.modules import Kernel, are_the_same, goals_for, keep, module_goals
from kvmgmem.mutate.seed import seed_objects
from kvmgmem.mutate.state import DEPTHS, Circumstances, Result, State, mutant_digest


@dataclass(frozen=True)
class Plan:
    """What a campaign works on and with. `depth` is how far a mutant is followed: first, file or rest."""

    source: Path
    work: Path
    """Private trees, kernels, records: everything that can be made again."""
    guest: Guest
    selftests: Path
    tests: Mapping[str, Sequence[str]]
    """Selftest's name to its node ids."""
    tests_digest: str
    files: tuple[str, ...]
    """The files that any mutant of the catalogue changes: the same trees serve every selection."""
    objects: Path | None = None
    """A finished build of the source to start from; its configuration is then the mutants'."""
    jobs: int = 1
    make_jobs: int = 2
    depth: str = "rest"


BUILT_AHEAD = 1
"""Kernels that may wait for a guest: while one runs, the next is built."""

POLL_SECONDS = 0.2
STOP_SECONDS = 12.0
"""What make may take to end when it is told to."""

Question = Callable[[Mutant, Result, Kernel, Path], Result]
"""What is asked besides the selftests' own rounds: given a mutant with what these made of it, its kernel, and a file for the
records, the result as it is then known."""

SAME_CODE = "the compiler makes the same machine code of it"


@dataclass
class Site:
    """One private tree, and the file that a mutant has changed in it."""

    tree: Path
    number: int
    changed: str = ""


@dataclass(frozen=True)
class Ready:
    """A mutant whose kernel is built."""

    mutant: Mutant
    result: Result
    kernel: Kernel


@dataclass
class Campaign:
    """The work on one selection of mutants."""

    plan: Plan
    state: State
    progress: Progress
    besides: Question | None = None
    baseline: Baseline = field(default_factory=Baseline)
    done: int = 0
    total: int = 0
    ready: "queue.Queue[Ready]" = field(default_factory=lambda: queue.Queue(BUILT_AHEAD))
    _all_built: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _errors: list[BaseException] = field(default_factory=list)
    _baseline_lock: threading.Lock = field(default_factory=threading.Lock)
    base: Kernel = field(default_factory=lambda: Kernel(Path()))
    """The unmutated kernel, once it has been prepared."""
    kernel_key: str = ""
    """Its release and its configuration."""
    _modules: tuple[str, ...] = ()
    _baseline_key: str = ""

    def prepare(self) -> None:
        """Build the unmutated kernel and the trees of all jobs. Raises HarnessError."""
        plan = self.plan
        first = self._tree(1)
        shutil.rmtree(plan.work / "kernels", ignore_errors=True)  # of a run that was interrupted
        private_tree.make_tree(plan.source, first, plan.files)
        self._build_base(first)
        config = built_config(first)
        release = (first / private_tree.OBJECTS / "include/config/kernel.release").read_text(encoding="utf-8").strip()
        machine = f"{plan.guest.cpus} CPUs, {plan.guest.numa_nodes} nodes, {plan.guest.memory_mib} MiB"
        self.state.begin(Circumstances(release, config_hash(config), plan.guest.accelerator, machine, str(plan.source)))
        for number in range(2, plan.jobs + 1):
            if not (self._tree(number) / private_tree.OBJECTS / "vmlinux").is_file():
                self.progress.update(f"private tree {number}")
                private_tree.copy_tree(first, self._tree(number))
            else:
                private_tree.make_tree(plan.source, self._tree(number), plan.files)
        # Which machine the answers are of is in the state's head; which kernel and selftests, here.
        self.kernel_key = f"{release} {config_hash(config)}"
        self._baseline_key = f"{self.kernel_key} {plan.tests_digest}"
        self.baseline = load_baseline(self._baseline_path, self._baseline_key)

    def _build_base(self, tree: Path) -> None:
        """Build the unmutated kernel and its modules, and keep a copy of them."""
        plan, log, objects = self.plan, self.plan.work / "base.log", tree / private_tree.OBJECTS
        if plan.objects is None:
            build_base(tree, log, plan.make_jobs, self.progress)
        elif not (objects / "vmlinux").is_file():
            self.progress.update(f"taking over {plan.objects}")
            seed_objects(plan.source, plan.objects, tree)
        self._modules = module_goals(parse_config(built_config(tree)), plan.guest.accelerator)
        goals = (*(() if plan.objects is None else ("bzImage",)), *self._modules)
        self.progress.update("building KVM's modules" if self._modules else "building")
        if goals and (built := build_again(tree, plan.work / "modules.log", plan.make_jobs, goals=goals)).error:
            log = plan.work / "modules.log"
            raise BuildError(f"the unmutated kernel does not build: {built.error}", f"log: {log}")
        self.base = keep(objects, self._modules, image_of(tree), plan.work / "base")

    @property
    def _baseline_path(self) -> Path:
        return self.plan.work / "baseline.json"

    def _tree(self, number: int) -> Path:
        return self.plan.work / f"tree-{number}"

    def run(self, mutants: Sequence[Mutant]) -> None:
        """Try these mutants: on each tree one is being built while the one before it runs.

        Raises the first error that is not a mutant's own.
        """
        if not mutants:
            return
        self.total = len(mutants)
        waiting: queue.Queue[Mutant] = queue.Queue()
        # Neighbours in one file leave the others' objects as they are.
        for mutant in sorted(mutants, key=lambda mutant: mutant.file):
            waiting.put(mutant)
        sites = [Site(self._tree(number), number) for number in range(1, self.plan.jobs + 1)]
        builders = [self._thread(self._build_all, site, waiting) for site in sites]
        runners = [self._thread(self._judge_all, mutants) for _ in sites]
        for thread in (*builders, *runners):
            thread.start()
        try:
            for thread in builders:
                thread.join()
            self._all_built.set()
            for thread in runners:
                thread.join()
        finally:
            # After Ctrl-C a guest may take minutes to its end. It dies with its thread, and that with this process.
            self._stop.set()
            for thread in (*builders, *runners):
                thread.join(STOP_SECONDS)
        if self._errors:
            raise self._errors[0]

    def _thread(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        return threading.Thread(target=self._guard, args=(work, *arguments), daemon=True)

    def _guard(self, work: Callable[..., None], *arguments: object) -> None:
        """Run a thread's work; what it dies of ends the others too."""
        try:
            work(*arguments)
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _build_all(self, site: Site, waiting: "queue.Queue[Mutant]") -> None:
        while not self._stop.is_set():
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            result, kernel = self._built(site, mutant)
            if self._stop.is_set():
                return  # a build that was stopped says nothing about the mutant
            if kernel is None:
                self._keep(result)
            else:
                self._hand_over(Ready(mutant, result, kernel))

    def _hand_over(self, ready: Ready) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(ready, timeout=POLL_SECONDS)
                return

    def _judge_all(self, mutants: Sequence[Mutant]) -> None:
        self.prepare_baseline(mutants)
        while not self._stop.is_set():
            last = self._all_built.is_set()  # before looking: what is built until then is in the queue
            try:
                ready = self.ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if last:
                    return
                continue
            self.progress.update(ready.mutant.id, self.done / max(1, self.total))
            self._keep(self._judged(ready.mutant, ready.result, ready.kernel))

    def _keep(self, result: Result) -> None:
        self.state.add(result)
        self.done += 1
        self.progress.note(result_line(result, self.done, self.total))

    def try_mutant(self, site: Site, mutant: Mutant) -> Result:
        """Build one mutant, have the tests look at it, and say what became of it."""
        result, kernel = self._built(site, mutant)
        return result if kernel is None else self._judged(mutant, result, kernel)

    def _built(self, site: Site, mutant: Mutant) -> tuple[Result, Kernel | None]:
        """A mutant's result as far as it is known without a guest, and its kernel if it needs one."""
        source = read_source(self.plan.source / mutant.file)
        result = Result(
            mutant.id,
            Fate.EQUIVALENT,
            reason=mutant.equivalent,
            digest=mutant_digest(mutant, source),
            tests=self.plan.tests_digest,
            time=time.time(),
        )
        applied = DoesNotApply(f"there is no {mutant.file}") if source is None else apply_mutant(source, mutant)
        if isinstance(applied, DoesNotApply):
            return replace(result, fate=Fate.DOES_NOT_APPLY, reason=applied.reason), None
        if mutant.equivalent:
            return result, None
        self._put(site, mutant, applied)
        log = self.plan.work / f"build-{site.number}.log"
        goals = goals_for(mutant.file, self._modules)
        built = build_again(site.tree, log, self.plan.make_jobs, self._stop, goals)
        result = replace(result, build_seconds=round(built.seconds, 1), cpu_seconds=round(built.cpu_seconds, 1))
        if built.error:
            return replace(result, fate=Fate.DOES_NOT_BUILD, reason=built.error), None
        image = image_of(site.tree) if "bzImage" in goals else self.base.image
        kernel = keep(site.tree / private_tree.OBJECTS, self._modules, image, self._kernel_folder(mutant))
        if are_the_same(kernel, self.base):
            shutil.rmtree(self._kernel_folder(mutant), ignore_errors=True)
            return replace(result, fate=Fate.EQUIVALENT, reason=SAME_CODE), None
        return result, kernel

    def _kernel_folder(self, mutant: Mutant) -> Path:
        return self.plan.work / "kernels" / mutant.id

    def _put(self, site: Site, mutant: Mutant, applied: Applied) -> None:
        if site.changed and site.changed != mutant.file:
            private_tree.restore(self.plan.source, site.tree, site.changed)
        private_tree.write(site.tree, mutant.file, applied.text.encode(errors="surrogateescape"))
        site.changed = mutant.file

    def _judged(self, mutant: Mutant, result: Result, kernel: Kernel) -> Result:
        records = self.plan.work / "records" / f"{mutant.id}.jsonl"
        records.parent.mkdir(parents=True, exist_ok=True)
        before = known = self.state.results.get(mutant.id)
        try:
            if self.besides is None or known is None or not self._is_decided(known, result):
                known = self._asked(mutant, result, kernel, records)
                if before is not None and before.digest == known.digest:
                    known = replace(known, kselftest=before.kselftest)
            if self.besides is not None and known.fate is not Fate.ERROR:
                known = self.besides(mutant, known, kernel, records)
        finally:
            shutil.rmtree(self._kernel_folder(mutant), ignore_errors=True)
        return known

    def _is_decided(self, known: Result, result: Result) -> bool:
        """Whether an earlier run has already said what the selftests make of this mutant, as deep as this one would go."""
        if known.digest != result.digest:
            return False
        # As in State.left: what earlier selftests noticed stands until it is asked for --again.
        if known.fate is Fate.KILLED:
            return True
        if known.tests != result.tests:
            return False
        asked = known.fate is Fate.UNDECIDED and DEPTHS.index(known.stage) >= DEPTHS.index(self.plan.depth)
        return asked or known.fate is Fate.SURVIVED

    def _lived_through(self, result: Result) -> Result | None:
        """What an earlier run with the same tests found, if it stopped before it had asked all."""
        known = self.state.results.get(result.mutant)
        same = known is not None and (known.digest, known.tests) == (result.digest, result.tests)
        return known if known is not None and same and known.fate is Fate.UNDECIDED else None

    def _asked(self, mutant: Mutant, result: Result, kernel: Kernel, records: Path) -> Result:
        """What the selftests make of a mutant, round by round; those that let it live in an earlier run are not repeated."""
        before = self._lived_through(result)
        spent, cpu = (before.guest_seconds, before.cpu_seconds) if before else (0.0, 0.0)
        notice: Notice | None = None
        stage = before.stage if before else ""
        try:
            for name, selections in self._rounds(mutant, after=stage):
                stage = name
                self.need_baseline(selections)
                trial = self.trial(kernel, records, selections)
                spent += trial.seconds
                cpu += trial.cpu_seconds
                if notice := first_notice(trial, self.baseline, selections):
                    break
        except HarnessError as error:
            return replace(result, fate=Fate.ERROR, reason=error.message, stage=stage, guest_seconds=round(spent, 1))
        cpu = round(cpu + result.cpu_seconds, 1)
        result = replace(result, stage=stage, guest_seconds=round(spent, 1), cpu_seconds=cpu)
        if notice is not None:
            return replace(result, fate=Fate.KILLED, how=notice.how.value, test=notice.test, reason=notice.reason)
        return replace(result, fate=Fate.SURVIVED if stage == DEPTHS[-1] else Fate.UNDECIDED, reason=mutant.survives)

    def trial(self, kernel: Kernel, records: Path, selections: Sequence[str]) -> Trial:
        """Put a kernel through these tests, or through all of them; without those that fail on the unmutated kernel."""
        tests = [] if ALL in selections else list(selections)
        left_out = [f"--deselect={test}" for test in self.baseline.failing]
        # Nobody boots a mutant's own image twice.
        guest = self.plan.guest if kernel.image == self.base.image else replace(self.plan.guest, snapshots=None)
        return run_tests(guest, kernel, [*tests, *left_out], records, stop_at_failure=True)

    def _rounds(self, mutant: Mutant, after: str = "") -> list[tuple[str, list[str]]]:
        """The rounds of tests behind that one, up to the depth that was asked for."""
        first = node_ids(mutant, self.plan.tests)
        files = list(dict.fromkeys([*(test.partition("::")[0] for test in first), *self._files_of_areas(mutant)]))
        rounds = [("first", first), ("file", files), ("rest", [ALL])]
        begin = DEPTHS.index(after) + 1 if after else 0
        return [entry for entry in rounds[begin : DEPTHS.index(self.plan.depth) + 1] if entry[1]]

    def _files_of_areas(self, mutant: Mutant) -> list[str]:
        """The files named after the areas of the rules that the mutant breaks: GM-BIND's is test_bind*.py."""
        stems = {row.split("-")[1].lower() if row.startswith("GM-") else "own" for row in mutant.breaks}
        paths = sorted(path for stem in stems for path in self.plan.selftests.glob(f"test_{stem}*.py"))
        return [f"{self.plan.selftests.resolve().name}/{path.name}" for path in paths]

    def need_baseline(self, selections: Sequence[str]) -> None:
        """Ask the unmutated kernel what it answers to these tests, unless that is known."""
        with self._baseline_lock:
            if not (lacking := self.baseline.lacks(selections)):
                return
            self.progress.note(f"first on the unmutated kernel: {len(lacking)} selections of tests")
            tests = [] if ALL in lacking else lacking
            records = self.plan.work / "baseline.jsonl"
            self.baseline.add(lacking, run_tests(self.plan.guest, self.base, tests, records, stop_at_failure=False))
            save_baseline(self.baseline, self._baseline_path, self._baseline_key)
            for test in self.baseline.failing:
                self.progress.note(f"left out, because it fails without any mutant: {test}")

    def prepare_baseline(self, mutants: Sequence[Mutant]) -> None:
        """Ask the unmutated kernel for all first rounds at once, rather than boot it once for each mutant."""
        counted = [mutant for mutant in mutants if not mutant.equivalent]
        tests = list(dict.fromkeys(test for mutant in counted for test in node_ids(mutant, self.plan.tests)))
        if tests:
            self.need_baseline(tests)


def result_line(result: Result, done: int, total: int) -> str:
    """One line for people on one mutant."""
    words = f"{result.how} in {result.test}" if result.test else result.how
    told = words if result.fate is Fate.KILLED else result.reason if result.fate is not Fate.SURVIVED else ""
    took = f" ({duration_text(result.seconds)})" if result.seconds else ""
    return f"[{done}/{total}] {result.mutant}: {result.fate.value}{f', {told}' if told else ''}{took}"
