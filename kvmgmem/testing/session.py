"""One run of selftests: the records it writes, the watches it keeps, and the verdict on each test."""

import contextlib
import gc
import math
import os
import platform
import shlex
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import pytest

import kvmgmem
from kvmgmem import host as host_facts
from kvmgmem import splats
from kvmgmem.errors import ERROR_PREFIX
from kvmgmem.results.records import (
    Circumstances,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Verdict,
)
from kvmgmem.results.stream import ResultStream
from kvmgmem.testing import debugfs, requirements
from kvmgmem.testing.emulated_cpus import emulated, keep_to_first_cpu
from kvmgmem.testing.isolation import ChildOutcome, Isolation, adopt_orphans, keep
from kvmgmem.testing.kernel_log import KernelLog
from kvmgmem.testing.lifetime import GONE_LIMIT, LifetimeWatch, WatchError, debugfs_vms
from kvmgmem.testing.requirements import REQUIREMENTS, Requirement
from kvmgmem.testing.waiting import TIME_SCALE
from kvmgmem.trace.offer import offer

DEFAULT_TIMEOUT = 30.0

if TYPE_CHECKING:
    from kvmgmem.catalogue.known_bugs import KnownBug

Longrepr = str | tuple[str, int, str]


@dataclass(frozen=True)
class Settings:
    """What the command line said."""

    results: Path
    required: frozenset[str] = frozenset()
    disruptive: bool = False
    timeout: float = DEFAULT_TIMEOUT
    isolate: bool = True
    seed: int | None = None
    """What the order of the tests was shuffled by."""


@dataclass
class Judged:
    """A test's verdict in the making."""

    verdict: Verdict
    reason: str = ""
    detail: str = ""
    bugs_shown: tuple[str, ...] = ()
    bugs_absent: tuple[str, ...] = ()
    kernel_log: list[str] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    outlived: list[str] = field(default_factory=list)
    """VMs that were there when none of the test's processes was, as debugfs calls them."""


class Session:
    """The runner beside the kernel under test."""

    def __init__(self, settings: Settings, watch: LifetimeWatch) -> None:
        self.settings = settings
        self.stream = ResultStream(settings.results)
        self.left_out: list[str] = []
        self.counts: dict[str, int] = {}
        self._skips: dict[str, int] = {}
        self.where = os.environ.get("KVMGMEM_WHERE", "host")
        adopt_orphans()
        self._no_debugfs = debugfs.mount_privately()
        self.log = KernelLog()
        self.watch = watch
        keep(watch.pid)
        self._still_alive: set[int] = set()
        self._isolation = Isolation(())
        self.trace_of: Callable[[str], Path | None] = lambda test: None
        """Where a test is recorded, if it is."""
        self.tell_outlived: Callable[[str, Sequence[str]], None] = lambda test, directories: None
        """What wants to know which VMs outlived a test: its recording."""

    def write(self, record: Record) -> None:
        """Append a record to the results."""
        self.stream.write(record)

    def begin(self, items: list[pytest.Item]) -> None:
        """Write the circumstances and the plan, and say what cannot be watched."""
        self.write(RunStart(uuid.uuid4().hex, time.time(), self.circumstances()))
        self.write(Plan(tuple(item.nodeid for item in items)))
        if emulated() and self.settings.isolate:
            # Not ahead where two CPUs of a guest get one core between them, two guests on two cores: the parent's page
            # faults fall into the time between two tests, 36 ms instead of 22 (QEMU 7.2), and nothing is won.
            self._isolation = Isolation(items, ahead=False, cpus=keep_to_first_cpu(self.watch.pid))
        else:
            self._isolation = Isolation(items)
        _warm_up()
        # Every test is forked from here: what the collector never looks at again is never copied by a child's collection.
        gc.collect()
        gc.freeze()
        if self._no_debugfs:
            self._leave_out(self._no_debugfs)
        if self.log.error:
            # A watch that cannot run is an error where it could: only an ordinary user may lack this one.
            if os.geteuid() == 0:
                pytest.exit(f"{ERROR_PREFIX}{self.log.error}", returncode=4)
            self._leave_out(f"{self.log.error} (needs root)")

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        self.write(Note(time.time(), f"left out: {what}"))

    def circumstances(self) -> Circumstances:
        """What the run runs on."""
        host = host_facts.probe()
        return Circumstances(
            release=host.release,
            backend=host.backend,
            paging=host.paging,
            accelerator=os.environ.get("KVMGMEM_ACCELERATOR", "host"),
            cpu_model=host.cpu_model,
            vm_types=host.vm_types,
            where=self.where,
            kvmgmem=kvmgmem.__version__,
            python=platform.python_version(),
            pytest=pytest.__version__,
            config_hash=host.config_hash,
            flavour=os.environ.get("KVMGMEM_FLAVOUR"),
            seed=self.settings.seed,
            extra={**_variant(), "caps": host.caps, "nodes": host.nodes, "parameters": host.parameters, "root": host.root},
        )

    def run(self, item: pytest.Item, limit: float) -> tuple[list[pytest.TestReport], Judged]:
        """Run one test in a process of its own, write its records, and return pytest's reports and the verdict."""
        self._write_start(item, limit)
        self._await_watch()
        start = time.perf_counter()
        outcome = ChildOutcome(complete=True)
        try:
            outcome = self._isolation.run(item, limit)
            judged = self._judge(outcome, limit, reported_bugs_of(item))
        except Exception as error:  # ours, not the kernel's: it costs this test, and not those after it
            why = f"the runner failed: {type(error).__name__}: {error}"
            judged = Judged(Verdict.ERROR, why.splitlines()[0], traceback.format_exc())
        duration = time.perf_counter() - start
        self._write_end(item, judged, duration, duration - outcome.inner_seconds)
        return _reports_for(item, outcome, judged, duration), judged

    def _await_watch(self) -> None:
        """See that no VM is born unseen; a watch that does not work is charged to the test by `_judge_lifetimes`."""
        with contextlib.suppress(WatchError):
            self.watch.wait_ready()

    def skip(
        self, item: pytest.Item, reason: str, requirement: Requirement | None
    ) -> tuple[list[pytest.TestReport], Judged]:
        """Record a test that this kernel or this command line leaves out; a failure if --require asks for it."""
        self._write_start(item)
        if requirement is not None and requirement.name in self.settings.required:
            judged = Judged(Verdict.FAILED, f"--require {requirement.name}: {requirement.missing}")
        else:
            judged = Judged(Verdict.SKIPPED, reason)
        self._write_end(item, judged, 0.0, 0.0)
        return _reports_for(item, ChildOutcome(complete=True), judged, 0.0), judged

    def _write_start(self, item: pytest.Item, limit: float = 0.0) -> None:
        rows = rows_of(item)
        told = limit if math.isfinite(limit) else 0.0
        self.write(TestStart(item.nodeid, time.time(), area_of(item), rows, rule_of(item), told))

    def _write_end(self, item: pytest.Item, judged: Judged, duration: float, overhead: float) -> None:
        self.counts[judged.verdict] = self.counts.get(judged.verdict, 0) + 1
        if judged.verdict is Verdict.SKIPPED:
            self._skips[judged.reason] = self._skips.get(judged.reason, 0) + 1
        faulty = judged.verdict.severity >= Verdict.FAILED.severity and judged.verdict is not Verdict.ERROR
        if judged.outlived:
            self.tell_outlived(item.nodeid, judged.outlived)
        # What is no Python makes its calls where nothing of ours can record them.
        if faulty and isinstance(item, pytest.Function):
            judged.detail = offer(judged.detail, _repeat_template(), item.nodeid, self.trace_of(item.nodeid))
        self.write(
            TestEnd(
                item.nodeid,
                time.time(),
                judged.verdict,
                duration=round(duration, 6),
                reason=judged.reason,
                detail=judged.detail,
                bugs_shown=judged.bugs_shown,
                bugs_absent=judged.bugs_absent,
                kernel_log=tuple(judged.kernel_log),
                repeat=_repeat(item.nodeid),
                overhead=round(overhead, 6),
                properties=judged.properties,
            )
        )

    def _judge(self, outcome: ChildOutcome, limit: float, bugs: "list[KnownBug]") -> Judged:
        judged = judge_process(outcome, limit, self.settings.required)
        judged.bugs_shown, judged.bugs_absent = outcome.bugs_shown, outcome.bugs_absent
        judged.properties = {name: str(value) for report in outcome.reports for name, value in report.user_properties}
        self._judge_lifetimes(outcome, judged)
        self._judge_log(judged, bugs)
        if judged.verdict is Verdict.PASSED and judged.bugs_shown:
            judged.verdict = Verdict.KNOWN_BUG
        return judged

    def _judge_lifetimes(self, outcome: ChildOutcome, judged: Judged) -> None:
        try:
            alive = self._outliving(outcome.pids)
        except WatchError as error:
            _fail(judged, Verdict.ERROR, f"VM lifetimes cannot be watched: {error}")
            return
        if alive:
            judged.outlived = debugfs_vms(alive)
            names = ", ".join(judged.outlived or [f"made by process {pid}" for pid in sorted(alive)])
            self._still_alive |= alive
            _fail(judged, Verdict.FAILED, f"leak: VMs outlive the test: {names}")

    def _outliving(self, pids: set[int]) -> set[int]:
        """Creators of VMs that are still there although their processes are not, after some patience."""
        deadline = time.monotonic() + GONE_LIMIT * TIME_SCALE
        while True:
            alive = {pid for pid in self.watch.alive() if pid in pids or not psutil.pid_exists(pid)}
            alive -= self._still_alive
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.01)

    def _judge_log(self, judged: Judged, bugs: "list[KnownBug]") -> None:
        """Charge the test with what the kernel said, but for the reports of bugs that the test says it would show."""
        judged.kernel_log = self.log.new_lines()
        found = splats.find_splats(judged.kernel_log)
        known = {bug.id for bug in bugs for splat in found if bug.is_reported_by(splat.title)}
        judged.bugs_shown = tuple(sorted({*judged.bugs_shown, *known}))
        found = [splat for splat in found if not any(bug.is_reported_by(splat.title) for bug in bugs)]
        if found:
            _fail(judged, Verdict.SPLAT, found[0].reason)
        elif judged.verdict is Verdict.PASSED:
            telling = {bug.id for bug in bugs if not bug.report_by_chance}
            judged.bugs_absent = tuple(sorted({*judged.bugs_absent, *telling} - known))
        if judged.verdict in (Verdict.PASSED, Verdict.SKIPPED) and not known:
            judged.kernel_log = []
        if self.log.error and os.geteuid() == 0:
            _fail(judged, Verdict.ERROR, self.log.error)

    def end(self, exit_status: int) -> None:
        """Write the positive end of the run and stop the watches."""
        if os.geteuid() != 0:
            only_root = [requirement.missing for requirement in REQUIREMENTS.values() if requirement.for_root]
            self.left_out += [f"tests ({self._skips[why]}): {why}" for why in only_root if why in self._skips]
        self.write(RunEnd(time.time(), exit_status, dict(self.counts), tuple(self.left_out)))
        self.close()

    def close(self) -> None:
        """Stop the watches, send away what waits for a further test, and close the results."""
        self._isolation.close()
        self.watch.close()
        self.log.close()
        self.stream.close()


def judge_process(outcome: ChildOutcome, limit: float, required: frozenset[str]) -> Judged:
    """The verdict that a test's process alone earns: how it ended, what it reported, what it left behind."""
    if outcome.timed_out:
        stuck = " and cannot be killed" if outcome.unkillable else ""
        return Judged(Verdict.TIMEOUT, f"did not end within {limit:g} s{stuck}", outcome.where)
    if not outcome.complete:
        how = f"signal {signal.Signals(outcome.signal).name}" if outcome.signal else f"exit status {outcome.exit_status}"
        return Judged(Verdict.CRASHED, f"the test's process died: {how}")
    failed = next((report for report in outcome.reports if report.failed), None)
    if failed is not None:
        verdict = Verdict(getattr(failed, "verdict", Verdict.FAILED))
        return Judged(verdict, _first_line(failed), failed.longreprtext + _captured(failed))
    skipped = next((report for report in outcome.reports if report.skipped), None)
    if skipped is not None:
        return _judge_skip(skipped, required)
    left = outcome.leaks + outcome.strays
    if left:
        return Judged(
            Verdict.FAILED,
            f"leak: {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else ""),
            "\n".join(left),
        )
    return Judged(Verdict.PASSED)


def _judge_skip(report: pytest.TestReport, required: frozenset[str]) -> Judged:
    reason = getattr(report, "skip_reason", "") or report.longreprtext
    name = getattr(report, "requirement", "")
    if name in required:
        return Judged(Verdict.FAILED, f"--require {name}: {reason}")
    return Judged(Verdict.SKIPPED, reason)


def _fail(judged: Judged, verdict: Verdict, reason: str) -> None:
    """Raise a verdict to a graver one; what was known before stays in the detail."""
    if verdict.severity > judged.verdict.severity:
        if judged.reason:
            judged.detail = f"{judged.verdict}: {judged.reason}\n{judged.detail}"
        judged.verdict, judged.reason = verdict, reason
    else:
        judged.detail += f"\nalso: {reason}"


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if lines else f"{report.when} failed"


def _captured(report: pytest.TestReport) -> str:
    return "".join(f"\n--- {name}\n{text}" for name, text in report.sections if text.strip())


def _reports_for(item: pytest.Item, outcome: ChildOutcome, judged: Judged, duration: float) -> list[pytest.TestReport]:
    """Pytest's own reports, put right where the verdict says more than they do."""
    reports = outcome.reports
    failing = judged.verdict.severity >= Verdict.NOT_RUN.severity
    if failing and not any(report.failed for report in reports):
        return [_report(item, "failed", f"{judged.verdict}: {judged.reason}\n{judged.detail}".rstrip(), duration)]
    if judged.verdict is Verdict.SKIPPED and not reports:
        path, line, _ = item.location
        return [_report(item, "skipped", (path, (line or 0) + 1, f"Skipped: {judged.reason}"), duration)]
    return reports


def _report(
    item: pytest.Item, outcome: Literal["failed", "skipped"], longrepr: Longrepr, duration: float
) -> pytest.TestReport:
    when: Literal["setup", "call"] = "setup" if outcome == "skipped" else "call"
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, longrepr, when, duration=duration
    )


def _warm_up() -> None:
    if platform.machine() == "x86_64":
        from kvmgmem.arch import x86_64

        x86_64.warm_up()


def _variant() -> dict[str, str]:
    """What sets this run apart from others of the same kernel: the machine's variant, a suite that is not kvmgmem's."""
    wanted = {"variant": "KVMGMEM_VARIANT", "suite": "KVMGMEM_SUITE"}
    return {key: os.environ[name] for key, name in wanted.items() if os.environ.get(name)}


def rows_of(item: pytest.Item) -> tuple[str, ...]:
    """The contract rows on a test, those on its class or module too."""
    return tuple(dict.fromkeys(row for mark in item.iter_markers("contract") for row in mark.args))


def reported_bugs_of(item: pytest.Item) -> "list[KnownBug]":
    """The known bugs that the test would show by a complaint of the kernel that only they cause (`would_show`)."""
    from kvmgmem.catalogue import known_bugs

    named = [known_bugs.get(bug_id) for mark in item.iter_markers("would_show") for bug_id in mark.args]
    return [bug for bug in named if bug.report and requirements.first_missing(bug.report_needs) is None]


def area_of(item: pytest.Item) -> str | None:
    """The contract area of a test's first row; of a test that is no Python function, what it says itself."""
    from kvmgmem.catalogue import contract as catalogue

    rows = rows_of(item)
    return catalogue.area_of(rows[0]) if rows else getattr(item, "area", None)


def rule_of(item: pytest.Item) -> str:
    """What the test says must hold: the first paragraph of its docstring."""
    text = getattr(getattr(item, "function", None), "__doc__", None) or getattr(item, "rule", None) or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def _repeat(nodeid: str) -> str:
    """The command that runs just this test on just this kernel."""
    return _repeat_template().replace("{test}", shlex.quote(nodeid))


def _repeat_template() -> str:
    return os.environ.get("KVMGMEM_REPEAT", "kvmgmem run -- {test}")
