"""The supervisor: whatever the kernel under test does, every test gets a verdict, and the verdict names its cause.

It stands outside the guest, writes the guest's records to the host's file as they come, and when a guest dies charges that
to the open test, boots again, and has the remaining tests run. Several guests may share the tests of one run, from its
beginning, or a second one from the other end when there is room for it.
"""

import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, code_of_part, gravest
from kvmgmem.lab.guest.machine import Machine
from kvmgmem.lab.guest.qemu import Qemu
from kvmgmem.lab.supervision.boot import PSEUDO_PREFIX
from kvmgmem.lab.supervision.lane import Lane
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.termination import terminable
from kvmgmem.results.records import Heartbeat, Plan, Record, RunEnd, TestEnd, TestStart, Verdict
from kvmgmem.results.run import collect, exit_code
from kvmgmem.results.stream import ResultStream
from kvmgmem.trace.offer import offer


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
    """Where the counters of a coverage kernel are to go (kvmgmem.lab.supervision.counters); None where nobody wants them."""


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
        self._lanes: list[Lane] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._helper: Lane | None = None
        self._taken: dict[str, int] = {}
        """By which guest each test was begun."""
        self._gave_up = "no guest came to it"

    def run(self) -> ExitCode:
        """Boot, supervise, boot again; returns what the records amount to.

        Without a single record if there was nothing to run (--collect-only). Raises HarnessError if not one test could be
        started; its code is KERNEL if the kernel died of itself.
        """
        try:
            with terminable():
                self._drive([Lane(self, number) for number in range(self.request.guests)])
            return self._finish() if self.records else ExitCode.OK
        finally:
            self._stream.close()
            if self._console:
                self._console.close()

    def _drive(self, lanes: Sequence[Lane]) -> None:
        """One thread for each guest. Whatever ends the wait for them, Ctrl-C and SIGTERM too, ends the guests first."""
        for lane in lanes:
            self._start_lane(lane)
        try:
            for thread in self._threads:  # one more may come meanwhile
                thread.join()
        finally:
            with self._lock:
                self.stopping = True
            for lane in self._lanes:
                lane.stop()
            for thread in self._threads:
                thread.join()
        if self._helper is not None:
            for test in [test for test in self._plan if test not in self.done]:
                self.write(TestEnd(test, time.time(), Verdict.NOT_RUN, reason=self._gave_up))
        for error in self._errors:
            # With few tests, a guest may have none to run.
            if len(lanes) == 1 or not (is_nothing_to_run(error) and self.records):
                raise error

    def _start_lane(self, lane: Lane) -> None:
        def drive() -> None:
            try:
                lane.run()
            except BaseException as error:
                if lane is self._helper and isinstance(error, HarnessError):
                    self._without_help(error)
                else:
                    self._errors.append(error)

        thread = threading.Thread(target=drive, name=f"guest {lane.number}")
        with self._lock:
            self._lanes.append(lane)
            self._threads.append(thread)
            thread.start()

    # -- a second guest for what is left

    def add_guest(self) -> bool:
        """Have a second guest begin with the last test and come towards the first; they stop where they meet.

        False where that cannot be: there are several guests already, the one is done, or counters are wanted, which a
        guest that is stopped on its way does not hand over.
        """
        with self._lock:
            alone = self.request.guests == len(self._lanes) == 1 and self._threads[0].is_alive()
            if not alone or self.stopping or self.request.counters is not None:
                return False
            self._helper = Lane(self, 1, backwards=True)
            self._start_lane(self._helper)
            return True

    def _without_help(self, error: HarnessError) -> None:
        """The second guest came to nothing: what it has not done is the first one's."""
        with self._lock:
            self._release(1)
            if not is_nothing_to_run(error):
                self.say(f"there is no second guest: {error.message}")

    def takes(self, lane: Lane, test: str) -> bool:
        """Whether a test is for this guest to run: it is the first to begin it."""
        with self._lock:
            return self._taken.setdefault(test, lane.number) == lane.number

    def taken_from(self, lane: Lane) -> set[str]:
        """The tests that the other of two guests has begun or done that come towards each other."""
        with self._lock:
            if self._helper is None:
                return set()
            return {test for test, number in self._taken.items() if number != lane.number}

    def left_by(self, lane: Lane, remaining: Sequence[str], why: str) -> list[str]:
        """What nobody runs if this guest gives up with so much remaining; where two share it, the end will tell."""
        with self._lock:
            if self._helper is None:
                return list(remaining)
            self._release(lane.number)
            self._gave_up = why
            return []

    def _release(self, number: int) -> None:
        self._taken = {test: taker for test, taker in self._taken.items() if taker != number or test in self.done}

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


def is_nothing_to_run(error: BaseException) -> bool:
    """Whether a guest only says that there was no test for it."""
    return isinstance(error, HarnessError) and error.code is ExitCode.NOTHING_RAN
