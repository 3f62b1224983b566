"""One of the guests that share a run's tests: booted, and booted again, until its share of them is done."""

import base64
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmgmem.lab.guest.machine import Machine
from kvmgmem.lab.guest.qemu import Qemu
from kvmgmem.lab.guest.snapshot import Snapshot, States, states_of
from kvmgmem.lab.supervision.boot import PSEUDO_PREFIX, Boot, Keeps
from kvmgmem.lab.supervision.counters import CounterFiles
from kvmgmem.lab.supervision.ending import Cause, Ending, no_test_started, worth_another_boot
from kvmgmem.lab.supervision.tcg_faults import TcgFault, fault_behind
from kvmgmem.results.records import Note, Plan, Record, RunEnd, RunStart, TestEnd, TestStart, Verdict

if TYPE_CHECKING:
    from kvmgmem.lab.supervision.supervisor import Supervisor

FRUITLESS_BOOTS = 2
"""Boots in a row without a single test started, after which there is no point in another."""


def packed(module: Path) -> str:
    """A module as a job brings it along: zlib's stream in base64."""
    return base64.b64encode(zlib.compress(module.read_bytes(), 1)).decode()


class Lane:
    """One of a run's guests, started again until its share of the tests is done; the account of one boot's `Boot`."""

    def __init__(self, supervisor: "Supervisor", number: int, backwards: bool = False) -> None:
        """`backwards` for one that begins with the last test, and comes towards the guest that began with the first."""
        self.number = number
        self._backwards = backwards
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
            if self._supervisor.stopping or ending.cause is Cause.FINISHED:
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
            self._supervisor.say(f"the guest is started again after: {ending.reason}")

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
        elsewhere = self._supervisor.taken_from(self)
        return [test for test in self._plan if test not in self._done and test not in elsewhere]

    def _give_up(self, reason: str) -> None:
        self._supervisor.say(f"giving up: {reason}")
        self.write(Note(time.time(), reason))
        for test in self._supervisor.left_by(self, self._remaining(), reason):
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
        """What it is told when it knows its tests: its share of them, those that are done, and the end to begin with."""
        share = [0, 1] if self._backwards else [self.number, self._request.guests]
        done = self._done | self._supervisor.taken_from(self)
        return {"share": share, "done": sorted(done), "backwards": self._backwards}

    def takes(self, test: str) -> bool:
        """Whether a test that the guest begins is its own."""
        return self._supervisor.takes(self, test)

    def write(self, record: Record) -> None:
        """Keep a record, and mind what of the share is done."""
        if isinstance(record, TestEnd):
            fault = self._chance_for(record)
            if fault is not None:
                record = self._second_chance(record, fault)
            else:
                self._done.add(record.test)
        if isinstance(record, Plan) and not self._plan:
            self._plan = record.tests
        self._supervisor.write(record)

    def _chance_for(self, end: TestEnd) -> TcgFault | None:
        """The emulator's fault for which a test is to be begun again; None where there is none, or not once more."""
        fault = fault_behind(end.verdict, end.reason, self._request.machine)
        return fault if fault is not None and self._second_chances.count(end.test) < fault.chances else None

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

    def charge_to_nobody(self, verdict: Verdict, reason: str, excerpt: tuple[str, ...]) -> None:
        """Keep what happened while no test was open, as a test of its own; nothing of one that the emulator spoilt."""
        end = TestEnd(self._supervisor.pseudo_test(), time.time(), verdict, reason=reason, kernel_log=excerpt)
        if self._chance_for(end) is None:
            self._supervisor.write(TestStart(end.test, end.time, rule="The kernel is well between the tests, too."))
        self.write(end)
