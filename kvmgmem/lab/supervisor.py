"""The supervisor: whatever the kernel under test does, every test gets a verdict, and the verdict names its cause.

It stands outside the guest, writes the guest's records to the host's file as they come, and when a guest dies charges that
to the open test, boots again, and has the remaining tests run. Several guests may share the tests of one run.
"""

import base64
import shlex
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, code_of_part, gravest
from kvmgmem.lab.boot import PSEUDO_PREFIX, Boot, Keeps
from kvmgmem.lab.counters import CounterFiles
from kvmgmem.lab.ending import Cause, Ending, no_test_started, worth_another_boot
from kvmgmem.lab.limits import Limits
from kvmgmem.lab.machine import Machine
from kvmgmem.lab.qemu import Qemu
from kvmgmem.lab.snapshot import Snapshot, States, states_of
from kvmgmem.lab.tcg_faults import TcgFault, fault_behind
from kvmgmem.results.records import Heartbeat, Note, Plan, Record, RunEnd, RunStart, TestEnd, TestStart, Verdict
from kvmgmem.results.run import collect, exit_code
from kvmgmem.results.stream import ResultStream
from kvmgmem.trace.offer import offer

FRUITLESS_BOOTS = 2
"""Boots in a row without a single test started, after which there is no point in another."""


@dataclass(frozen=True)
class Request:
    """One supervised run: what to boot, what pytest is to do there, and where its records go."""

    machine: Machine
    results: Path
    pytest_args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flavour: str | None = None
    time_scale: float = 1.0
    limits: Limits = field(default_factory=Limits)
    boots: int = 25
    """How often a guest is started at most."""
    guests: int = 1
    """How many guests share the tests; each runs every n-th one."""
    repeat: str = "kvmgmem vm -- {test}"
    """The command that repeats one test; `{test}` stands for its quoted node id."""
    console: Path | None = None
    """Where the consoles of all boots are kept."""
    snapshots: Path | None = None
    """The folder of booted guests to go on from; None to boot every time."""
    modules: tuple[Path, ...] = ()
    """Kernel modules that come with the job: a guest that is kept has booted without them. Named NUMBER-NAME.ko."""
    keep_collected: bool = False
    """Keep the guest with its tests collected when it is booted for the first time, too."""
    counters: Path | None = None
    """Where the counters of a coverage kernel are to go (kvmgmem.lab.counters); None where nobody wants them."""


class Listener(Protocol):
    """Whoever shows progress: `kvmgmem.lab.progress.Progress` fits."""

    def update(self, detail: str, fraction: float | None = None) -> None: ...
    def note(self, text: str) -> None: ...


class Supervisor:
    """Runs the tests of one request to their end, over as many guests and boots as that takes, and keeps the account."""

    def __init__(self, request: Request, listener: Listener, start_qemu: Callable[[Machine], Qemu] = Qemu) -> None:
        self.request = request
        self.start_qemu = start_qemu
        self.stopping = False
        self.records: list[Record] = []
        self.done: dict[str, Verdict] = {}
        self.left_out: dict[str, None] = {}
        self.boots = 0
        self.first_test_after: float | None = None
        """Seconds from QEMU's start to the first test's start record."""
        self.runner_output = ""
        """What the runner of the last boot printed; pytest's list of tests, if that was asked for."""
        self._listener = listener
        self._stream = ResultStream(request.results)
        self._console = request.console.open("ab") if request.console else None
        self._plan: dict[str, None] = {}
        self._guest_ends: list[RunEnd] = []
        self._lock = threading.RLock()

    def run(self) -> ExitCode:
        """Boot, supervise, boot again; returns what the records amount to.

        Without a single record if there was nothing to run (--collect-only). Raises HarnessError if not one test could be
        started; its code is KERNEL if the kernel died of itself.
        """
        lanes = [Lane(self, number) for number in range(self.request.guests)]
        try:
            if len(lanes) == 1:
                lanes[0].run()
            else:
                self._run_side_by_side(lanes)
            return self._finish() if self.records else ExitCode.OK
        finally:
            self._stream.close()
            if self._console:
                self._console.close()

    def _run_side_by_side(self, lanes: Sequence["Lane"]) -> None:
        """One thread for each guest. Whatever ends the wait for them, Ctrl-C too, ends the guests first."""
        errors: list[BaseException] = []

        def drive(lane: Lane) -> None:
            try:
                lane.run()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=drive, args=(lane,), name=f"guest {lane.number}") for lane in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self.stopping = True
            for lane in lanes:
                lane.stop()
            for thread in threads:
                thread.join()
        for error in errors:
            # With few tests, a guest may have none to run.
            if not (isinstance(error, HarnessError) and error.code is ExitCode.NOTHING_RAN and self.records):
                raise error

    # -- the account: called by every guest's thread

    def begin_boot(self) -> int:
        """Count a boot; returns its number, from 1."""
        with self._lock:
            self.boots += 1
            return self.boots

    def write(self, record: Record) -> None:
        """Add a record to the host's file, and keep account of it."""
        with self._lock:
            if isinstance(record, TestEnd):
                record = self._with_repeat(record)
                self.done[record.test] = record.verdict
            if isinstance(record, Plan):
                self._plan.update(dict.fromkeys(record.tests))
            self._stream.write(record)
            if not isinstance(record, Heartbeat):
                self.records.append(record)
            self._show(record)

    def _with_repeat(self, end: TestEnd) -> TestEnd:
        if end.verdict in (Verdict.PASSED, Verdict.SKIPPED) or end.test.startswith(PSEUDO_PREFIX):
            return end
        end = replace(end, repeat=self.request.repeat.replace("{test}", shlex.quote(end.test)))
        if end.verdict is Verdict.PANICKED:
            end = replace(end, detail=offer(end.detail, self.request.repeat, end.test))
        return end

    def _show(self, record: Record) -> None:
        if isinstance(record, TestStart):
            fraction = len(self.done) / len(self._plan) if self._plan else None
            self._listener.update(record.test, fraction)
        elif isinstance(record, TestEnd) and record.verdict.severity >= Verdict.FAILED.severity:
            self._listener.note(f"{record.verdict}: {record.test}: {record.reason}")

    def say(self, text: str) -> None:
        """A line for whoever looks on."""
        with self._lock:
            self._listener.note(text)

    def keep_console(self, heading: str, lines: Iterable[str]) -> None:
        """Append a boot's console to the file it is kept in."""
        with self._lock:
            if self._console:
                self._console.write("\n".join([heading, *lines, ""]).encode(errors="replace"))
                self._console.flush()

    def note_first_test(self, seconds: float) -> None:
        """Keep how long the first test's start took."""
        with self._lock:
            if self.first_test_after is None:
                self.first_test_after = seconds

    def note_guest_end(self, end: RunEnd) -> None:
        """Keep what the runner of one boot ended with."""
        with self._lock:
            self._guest_ends.append(end)
            self.left_out.update(dict.fromkeys(end.left_out))

    def pseudo_test(self) -> str:
        """A new node id for what happened while no test was open."""
        with self._lock:
            return f"{PSEUDO_PREFIX}between-tests#{1 + sum(name.startswith(PSEUDO_PREFIX) for name in self.done)}"

    def _finish(self) -> ExitCode:
        """Write the one end of the whole run: the guest's own ends speak for one boot only."""
        now = time.time()
        code = exit_code(collect([*self.records, RunEnd(now, ExitCode.OK)]))
        counts: dict[str, int] = {}
        for verdict in self.done.values():
            counts[verdict.value] = counts.get(verdict.value, 0) + 1
        if code in (ExitCode.OK, ExitCode.NOTHING_RAN, ExitCode.TEST_FAILED):
            # What the runner says beyond its tests, whose verdicts are known: an internal error of pytest, an interruption.
            parts = [code_of_part(end.exit) for end in self._guest_ends]
            code = gravest([code, *(part for part in parts if part is not ExitCode.TEST_FAILED)])
        self.write(RunEnd(now, int(code), counts, tuple(self.left_out)))
        return code


def packed(module: Path) -> str:
    """A module as a job brings it along: zlib's stream in base64."""
    return base64.b64encode(zlib.compress(module.read_bytes(), 1)).decode()


class Lane:
    """One of a run's guests, started again until its share of the tests is done; the account of one boot's `Boot`."""

    def __init__(self, supervisor: Supervisor, number: int) -> None:
        self.number = number
        self._supervisor = supervisor
        self._request = supervisor.request
        self._plan: tuple[str, ...] = ()
        self._done: set[str] = set()
        self._second_chances: list[str] = []
        self._boot_number = 0
        self._qemu: Qemu | None = None
        self._resumed: Snapshot | None = None

    def run(self) -> None:
        """Boot until every test of the share has a verdict. Raises HarnessError if not one could be started."""
        fruitless = 0
        verbose = self._request.machine.verbose
        while True:
            self._boot_number = self._supervisor.begin_boot()
            before = len(self._done) + len(self._second_chances)
            ending = self._boot(replace(self._request.machine, verbose=verbose))
            self._supervisor.runner_output = ending.runner_output
            if self._supervisor.stopping or (ending.cause is Cause.FINISHED and not self._owed()):
                return
            if self._drop_bad_snapshot(ending):
                continue
            if not self._plan and ending.runner_exit == 0:
                return  # nothing was to be run: --collect-only, --version
            fruitless = fruitless + 1 if len(self._done) + len(self._second_chances) == before else 0
            verbose = verbose or fruitless > 0
            if not self._remaining() and self._plan:
                return
            if fruitless >= FRUITLESS_BOOTS or (fruitless and not self._is_worth_another(ending)):
                if not self._plan:
                    raise no_test_started(ending, self._request.console)
                self._give_up(f"{fruitless} boots in a row ended before a test began: {ending.reason}")
                return
            if self._supervisor.boots >= self._request.boots:
                self._give_up(f"the guest was started {self._supervisor.boots} times, which is the limit")
                return
            why = f"after: {ending.reason}" if ending.reason else "for what is to be begun again"
            self._supervisor.say(f"the guest is started again {why}")

    def stop(self) -> None:
        """End the guest at once, from another thread."""
        qemu = self._qemu
        if qemu is not None and qemu.process.poll() is None:
            qemu.process.kill()

    def _boot(self, machine: Machine) -> Ending:
        states = self._states(machine)
        self._resumed = states.latest if states is not None else None
        machine = replace(machine, incoming=self._resumed.use()) if self._resumed else machine
        keeps = self._keeps(states)
        with self._supervisor.start_qemu(machine) as qemu:
            self._qemu = qemu
            if self._supervisor.stopping:  # said before this guest could be told
                self.stop()
            boot = Boot(self, qemu, self._request.limits, states, self._resumed, keeps)
            try:
                ending = boot.run()
            finally:
                # Also on Ctrl-C: the console up to there may be what the user looks for.
                self._supervisor.keep_console(f"--- boot {self._boot_number} ---", boot.whole_console)
                self._qemu = None
        if not self._supervisor.stopping:
            boot.settle(ending)
        self._resumed = None if boot.run_started else self._resumed
        if self._request.counters is not None and boot.run_started:
            CounterFiles(self._request.counters).lose(self._boot_number, ending.reason)
        return ending

    def _states(self, machine: Machine) -> States | None:
        """Where this machine's states are or may be kept; None if they are not wanted."""
        if self._request.snapshots is None or machine.verbose or machine.gdb:
            return None
        try:
            return states_of(machine, self.preparation(), self.job(), self._request.snapshots)
        except OSError:
            return None  # QEMU will say what is not there

    def _keeps(self, states: States | None) -> Keeps:
        """What to keep on the way: the machine booted, and the tests collected if it is used more than once for tests.

        To write a state takes a second or two. Whoever runs a kernel once more may run it again with the same tests; and
        all tests of all files take longest to collect.
        """
        if states is None or self.number > 0:  # one guest of several keeps its states, for they are the same
            return Keeps.NOTHING
        if self._request.modules:  # whose very point is that they are others the next time
            return Keeps.NOTHING if self._resumed else Keeps.BOOTED
        if self._resumed is None:
            return Keeps.BOOTED | (Keeps.COLLECTED if self._request.keep_collected else Keeps.NOTHING)
        return Keeps.COLLECTED if self._resumed == states.booted else Keeps.NOTHING

    def _drop_bad_snapshot(self, ending: Ending) -> bool:
        """Whether a state was resumed that came to nothing, so that the next boot is from nothing."""
        if self._resumed is None or ending.cause not in (Cause.QEMU_DIED, Cause.NO_BOOT, Cause.RESET, Cause.HANG):
            return False
        self._supervisor.say(f"the kept guest could not be resumed, and is booted again: {ending.reason}")
        self._resumed.remove()
        return True

    def _is_worth_another(self, ending: Ending) -> bool:
        return worth_another_boot(ending) or fault_behind(Verdict.PANICKED, ending.reason, self._request.machine) is not None

    def _remaining(self) -> list[str]:
        return [test for test in self._plan if test not in self._done]

    def _owed(self) -> list[str]:
        """Tests that the emulator spoilt, and the guest went on to its end after."""
        return [test for test in self._remaining() if test in self._second_chances]

    def _give_up(self, reason: str) -> None:
        self._supervisor.say(f"giving up: {reason}")
        self.write(Note(time.time(), reason))
        for test in self._remaining():
            self.write(TestEnd(test, time.time(), Verdict.NOT_RUN, reason=reason))

    # -- what a boot reports

    def preparation(self) -> dict[str, Any]:
        """What the guest's runner is told before it loads anything: what modules read when they are imported."""
        return {
            "environment": {"KVMGMEM_TIME_SCALE": f"{self._request.time_scale:g}", **self._request.environment},
            "accelerator": self._request.machine.accelerator,
            "flavour": self._request.flavour,
        }

    def job(self) -> dict[str, Any]:
        """What the guest is told to do: all that says which tests there are, and nothing that differs between two runs."""
        return {
            "pytest_args": list(self._request.pytest_args),
            "environment": {"KVMGMEM_REPEAT": self._request.repeat, "KVMGMEM_NO_SUMMARY": "1"},
            "heartbeat": self._request.limits.heartbeat,
            "counters": self._request.counters is not None,
            "modules": {path.name: packed(path) for path in self._request.modules},
        }

    def word(self) -> dict[str, Any]:
        """What it is told when it knows its tests: its share of them, and those that are done."""
        return {"share": [self.number, self._request.guests], "done": sorted(self._done)}

    def write(self, record: Record) -> None:
        """Keep a record, and mind what of the share is done."""
        if isinstance(record, TestEnd):
            fault = fault_behind(record.verdict, record.reason, self._request.machine)
            if fault is not None and self._second_chances.count(record.test) < fault.chances:
                record = self._second_chance(record, fault)
            else:
                self._done.add(record.test)
        if isinstance(record, Plan) and not self._plan:
            self._plan = record.tests
        self._supervisor.write(record)

    def _second_chance(self, end: TestEnd, fault: TcgFault) -> Note:
        """A note in place of the verdict: the test is begun again with the next boot."""
        self._second_chances.append(end.test)
        what = "the guest" if end.test.startswith(PSEUDO_PREFIX) else end.test
        text = f"{what} is begun again: {end.reason}; {fault.what}"
        self._supervisor.say(text)
        return Note(time.time(), text)

    def note_run_start(self, start: RunStart) -> None:
        """Keep a runner's circumstances, with the number of its boot."""
        extra = {**start.circumstances.extra, "boot": self._boot_number, "resumed": self._resumed is not None}
        self.write(replace(start, circumstances=replace(start.circumstances, extra=extra)))

    def note_first_test(self, seconds: float) -> None:
        """Hand on how long the first test's start took."""
        self._supervisor.note_first_test(seconds)

    def note_guest_end(self, end: RunEnd) -> None:
        """Hand on what the runner of one boot ended with."""
        self._supervisor.note_guest_end(end)

    def keep_counters(self, message: dict[str, Any]) -> None:
        """Keep what the kernel of this boot counted. Raises ValueError for what is no such message."""
        if self._request.counters is not None:
            CounterFiles(self._request.counters).take(self._boot_number, message)

    def pseudo_test(self) -> str:
        """A new node id for what happened while no test was open."""
        return self._supervisor.pseudo_test()
