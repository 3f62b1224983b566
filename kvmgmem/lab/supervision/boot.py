"""One boot of a guest, from QEMU's start to its end: what comes in, what is overdue, and which test pays for it."""

import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from enum import Flag, auto
from typing import Any, Protocol

from kvmgmem.errors import HarnessError
from kvmgmem.lab.guest import gcov as guest_gcov
from kvmgmem.lab.guest.init import PROTOCOL
from kvmgmem.lab.guest.machine import CONSOLE, CONTROL, QMP, RESULTS
from kvmgmem.lab.guest.qemu import Line, Qemu
from kvmgmem.lab.guest.snapshot import Snapshot, States
from kvmgmem.lab.supervision.cpu_states import CpuStates, questions
from kvmgmem.lab.supervision.ending import Cause, Ending, init_failure, internal_error, silence_text
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.result_channel import RECORD_BEGINS, split_garbage
from kvmgmem.results.records import Heartbeat, Note, Record, RunEnd, RunStart, TestEnd, TestStart, Verdict, parse_line
from kvmgmem.splats import Kind, Splat, block_is_complete, find_splats, kind_of, message_of

PSEUDO_PREFIX = "kernel::"
"""Node ids of what happens while no test is open."""

EXCERPT_LINES = 60
RUNNER_GRACE = 2.0
"""How much longer a test may take than the runner gives it: to end it is the runner's business."""

GARBAGE_LIMIT = 1 << 20
"""Bytes of garbage on the result channel after which the guest is given up."""

LAST_WORDS_SECONDS = 0.1
"""What the console may lag behind the result channel."""

BLOCK_SECONDS = 1.0
"""What the rest of a complaint may take to arrive from the serial console, once its first line has."""

_OUT_OF_MEMORY = re.compile(r"(?:Out of memory|oom-kill).*?: Killed process \d+ \(([^)]*)\)")
_RESTARTING = "reboot: Restarting system"


class Keeps(Flag):
    """Which states of a guest are to be kept on its way to the first test."""

    NOTHING = 0
    BOOTED = auto()
    COLLECTED = auto()


class Account(Protocol):
    """Whoever keeps the run's account over all boots."""

    def preparation(self) -> dict[str, Any]:
        """What the guest's runner needs to know before it knows its tests."""

    def job(self) -> dict[str, Any]:
        """What the guest is to do."""

    def word(self) -> dict[str, Any]:
        """What it needs to know before its first test."""

    def write(self, record: Record) -> None:
        """Keep a record."""

    def takes(self, test: str) -> bool:
        """Whether a test that this guest begins is its own; not where another guest has begun it before."""

    def note_run_start(self, start: RunStart) -> None:
        """Keep a runner's circumstances."""

    def note_first_test(self, seconds: float) -> None:
        """A test began, so long after QEMU's start."""

    def note_guest_end(self, end: RunEnd) -> None:
        """Keep what a runner ended with."""

    def keep_counters(self, message: dict[str, Any]) -> None:
        """Keep what the kernel counted. Raises ValueError for what is no such message."""

    def charge_to_nobody(self, verdict: Verdict, reason: str, excerpt: tuple[str, ...]) -> None:
        """Keep what happened while no test was open, as a test of its own."""


class Boot:
    """One guest from its start to its end; decides what that end was."""

    def __init__(
        self,
        account: Account,
        qemu: Qemu,
        limits: Limits,
        states: States | None = None,
        resumed: Snapshot | None = None,
        keeps: Keeps = Keeps.NOTHING,
    ) -> None:
        """`resumed` is the one of its `states` that the guest goes on from; `keeps` says which of them to write."""
        self._account = account
        self._states = states
        self._resumed = resumed
        self._keeps = keeps
        self._qemu = qemu
        self._limits = limits
        self.whole_console: deque[str] = deque(maxlen=20_000)
        self._window: list[str] = []
        """The console since the last start or end of a test."""
        self._open: TestStart | None = None
        self._open_since = 0.0
        self._last_record = qemu.started
        self._last_end: TestEnd | None = None
        self._hello = False
        self._job_sent = False
        self._word_sent = False
        self._run_started = False
        self._run_ended = False
        self._met = False
        """Whether this guest has come to what another one does: there is nothing left for it."""
        self._goodbye: dict[str, Any] | None = None
        self._shutdown_reason = ""
        self._garbage: list[str] = []
        self._garbage_bytes = 0
        self._fatal_since: float | None = None
        self._fatal: Kind | None = None
        self._sign = qemu.started
        self._sign_cpu = 0.0
        self._sign_starved = 0.0
        self._pardoned = 0.0
        self._boot_pardoned = 0.0
        self._nmi_since: float | None = None
        self._silence_text = ""
        self._cpus = CpuStates()
        if resumed is not None:
            for text in resumed.console():
                self._on_console(text)
            # It goes on by itself; should that be before QEMU's monitor tells of events, this answer says so.
            self._qemu.qmp("query-status")

    @property
    def run_started(self) -> bool:
        """Whether the runner came to its first record."""
        return self._run_started

    # -- the loop

    def run(self) -> Ending:
        """Read what comes until the boot has ended one way or another."""
        while True:
            lines = self._qemu.wait(self._next_deadline() - time.monotonic())
            for line in lines:
                self._take(line)
                if self._fatal is Kind.OOPS and self._run_started and self._open is None:
                    # The test has its verdict, and no further one may run on this kernel, nor be heard of.
                    return self._fatal_ending()
                if self._met:
                    return Ending(Cause.FINISHED, "another guest has the rest of the tests")
            if self._qemu.ended:
                return self._ending_of_qemu()
            if ending := self._overdue(time.monotonic()):
                return ending

    def _take(self, line: Line) -> None:
        match line.channel:
            case channel if channel == CONSOLE:
                self._on_console(line.text)
            case channel if channel == RESULTS:
                self._on_result(line)
            case channel if channel == CONTROL:
                self._on_control(line)
            case channel if channel == QMP:
                self._on_qmp(line.text)

    def _next_deadline(self) -> float:
        """When to look again even if nothing comes."""
        return min(self._deadlines())

    def _deadlines(self) -> list[float]:
        limits = self._limits
        if self._nmi_since is not None:
            return [self._nmi_since + limits.nmi]
        if self._goodbye is not None or self._shutdown_reason:
            return [self._sign + limits.shutdown]
        if self._fatal_since is not None:
            return [self._fatal_since + (limits.shutdown if self._fatal is Kind.PANIC else limits.oops)]
        if not self._run_started:
            return [max(self._qemu.started, self._boot_pardoned) + limits.boot]
        silence = max(self._sign, self._pardoned) + limits.silence
        # A test's limit counts while there are heartbeats; without them it is not known to be the runner's fault.
        if time.monotonic() - self._sign < 2.5 * limits.heartbeat:
            # Without an open test, too: a runner may be stuck in what it does between tests, and init goes on beating.
            return [silence, (self._last_record if self._open is None else self._open_since) + self._test_limit()]
        return [silence]

    def _test_limit(self) -> float:
        """What the open test may take: some have the runner's leave for longer than the rest."""
        return max(self._limits.test, RUNNER_GRACE * self._open.limit if self._open is not None else 0.0)

    def _alive(self) -> None:
        self._sign = time.monotonic()
        self._sign_cpu = self._qemu.cpu_seconds()
        self._sign_starved = self._qemu.starved_seconds()

    # -- what comes in

    def _on_console(self, text: str) -> None:
        self.whole_console.append(text)
        self._window.append(text)
        del self._window[:-2000]
        kind = kind_of(text)
        if kind is Kind.PANIC or (kind is Kind.OOPS and self._fatal is None):
            self._fatal = kind
            self._fatal_since = time.monotonic()

    def _on_control(self, line: Line) -> None:
        try:
            message = json.loads(line.data)
            record = message["record"]
        except (ValueError, TypeError, KeyError):
            self._on_garbage(line.data, "the control channel")
            return
        self._alive()
        if record == "hello":
            self._on_hello(message)
        elif record == "ready":
            if Keeps.BOOTED in self._keeps and self._states is not None:
                self._keep_state(self._states.booted)
            self._send_job()
        elif record == "collected":
            if Keeps.COLLECTED in self._keeps and self._states is not None:
                self._keep_state(self._states.collected)
            self._send_word()
        elif record == "heartbeat":
            self._account.write(Heartbeat(time.time()))
        elif record in (guest_gcov.COUNTERS, guest_gcov.END):
            try:
                self._account.keep_counters(message)
            except ValueError as error:
                self._on_garbage(line.data, "the control channel", str(error))
        elif record == "goodbye":
            self._goodbye = message

    def _on_hello(self, message: dict[str, Any]) -> None:
        if message.get("protocol") != PROTOCOL:
            raise HarnessError(
                f"the guest speaks protocol {message.get('protocol')}, and this kvmgmem {PROTOCOL}",
                hint="remove the cached images: kvmgmem kernel rm --help",
            )
        self._hello = True
        self._qemu.send(CONTROL, self._account.preparation())

    def _keep_state(self, snapshot: Snapshot) -> None:
        """Keep the machine as it is now, unless it complained, which the next one should do by itself."""
        if find_splats(self._window):
            return
        draft = snapshot.draft()
        if draft is None:
            return
        whole = False
        try:
            whole = self._qemu.save_state(draft)
        finally:
            if not whole:  # also on Ctrl-C
                snapshot.drop_draft()
        if whole:
            snapshot.keep(list(self.whole_console))

    def _send_job(self) -> None:
        if not self._job_sent:
            self._job_sent = True
            self._qemu.send(CONTROL, self._account.job() | _today())

    def _send_word(self) -> None:
        if not self._word_sent:
            self._word_sent = True
            self._qemu.send(CONTROL, self._account.word() | _today())

    def _go_on(self) -> None:
        """A kept guest runs again: tell it what it waited for."""
        self._hello = True
        if self._states is not None and self._resumed == self._states.collected:
            self._send_word()
        else:
            self._send_job()

    def _on_qmp(self, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            return
        if not isinstance(message, dict):
            return
        if self._resumed is not None and goes_on(message):
            self._go_on()
        if isinstance(answer := message.get("return"), str):
            self._cpus.take(answer)
        if message.get("event") == "SHUTDOWN":
            self._shutdown_reason = str(message.get("data", {}).get("reason", "unknown"))
            self._alive()

    def _on_result(self, line: Line) -> None:
        if not line.data.strip():
            return
        self._alive()
        garbage, data = split_garbage(line.data)
        if garbage:
            self._on_garbage(garbage, "the result channel")
        if not data:
            return
        try:
            record = parse_line(data.decode("utf-8"))
        except ValueError as error:
            self._on_garbage(data, "the result channel", f"a record that cannot be read ({error})")
            return
        self._on_record(record)

    def _on_garbage(self, data: bytes, where: str, what: str = "") -> None:
        self._garbage_bytes += len(data)
        if data.startswith(RECORD_BEGINS):
            what = what or "a record that was cut in the middle"
        self._garbage.append(f"{what or 'garbage'} on {where}: {data[:60]!r} ({len(data)} bytes)")

    def _on_record(self, record: Record) -> None:
        self._last_record = time.monotonic()
        match record:
            case RunStart():
                self._run_started = True
                self._account.note_run_start(record)
            case TestStart():
                self._close_lost_test()
                if not self._account.takes(record.test):
                    self._hear_out()
                self._between_tests()
                if self._met:
                    return
                self._open = record
                self._open_since = time.monotonic()
                self._account.note_first_test(self._open_since - self._qemu.started)
                self._account.write(record)
            case TestEnd():
                self._on_test_end(record)
            case RunEnd():
                self._run_ended = True
                self._account.note_guest_end(record)
            case _:
                self._account.write(record)

    def _on_test_end(self, end: TestEnd) -> None:
        end = self._with_console(end)
        if self._garbage and end.verdict.severity < Verdict.ERROR.severity:
            end = regrade(end, Verdict.ERROR, self._garbage[0])
            self._garbage.clear()
        self._account.write(end)
        self._last_end = end
        self._open = None
        self._window.clear()

    def _with_console(self, end: TestEnd) -> TestEnd:
        """Add what only the console says: a complaint that the runner did not see, a process killed for memory."""
        self._complete_block()
        # The console may be slower than the result channel: what the last test's record holds was not this one's doing.
        earlier = self._last_end
        # What its own record holds the runner has judged, maybe as the report of a known bug.
        told = [record for record in (earlier, end) if record is not None]
        splats = [splat for splat in find_splats(self._window) if not any(_told_by(splat, record) for record in told)]
        if splats and end.verdict.severity < Verdict.SPLAT.severity:
            gravest = max(splats, key=lambda splat: splat.fatal)
            return replace(regrade(end, Verdict.SPLAT, gravest.reason), kernel_log=gravest.lines)
        if end.verdict is Verdict.CRASHED and (victim := self._killed_for_memory()):
            return replace(end, reason=f"{end.reason}; the guest ran out of memory and the kernel killed {victim}")
        return end

    def _complete_block(self) -> None:
        """Wait for the rest of a complaint that is being printed: a fingerprint needs its stack."""
        deadline = time.monotonic() + BLOCK_SECONDS
        while time.monotonic() < deadline:
            splats = find_splats(self._window)
            if not splats or block_is_complete(splats[-1]):
                return
            for line in self._qemu.wait_for_console(0.05):
                self._on_console(line.text)

    def _hear_out(self) -> None:
        """This guest is about to be stopped on its way: what the console has still to say is heard first."""
        self._met = True
        for line in self._qemu.wait_for_console(LAST_WORDS_SECONDS):
            self._on_console(line.text)
        self._complete_block()

    def _close_lost_test(self, why: str = "") -> None:
        """A test whose end never came, because another one begins or the run is over; `why` is what the runner said."""
        if self._open is None:
            return
        why = why or (self._garbage[0] if self._garbage else "its end record never arrived")
        self._garbage.clear()
        self._charge(Verdict.ERROR, why, ())

    def _between_tests(self) -> None:
        """Judge what the console said while no test was open."""
        for splat in find_splats(self._window):
            if self._last_end is None:
                self._account.write(Note(time.time(), f"the kernel complained while booting: {splat.reason}"))
            elif not _told_by(splat, self._last_end):
                self._charge_to_nobody(Verdict.SPLAT, splat.reason, splat.lines)
        self._window.clear()

    # -- endings

    def _overdue(self, now: float) -> Ending | None:
        if self._garbage_bytes > GARBAGE_LIMIT:
            return Ending(Cause.FLOOD, f"the guest floods the supervisor: {self._garbage[0]}", self._excerpt())
        if now < self._next_deadline():
            return None
        if self._nmi_since is not None:
            return self._hang_ending()
        if self._goodbye is not None or self._shutdown_reason:
            return self._ending_of_qemu()
        if self._fatal_since is not None:
            return self._fatal_ending()
        if not self._run_started:
            return self._on_boot_limit(now)
        if now >= max(self._sign, self._pardoned) + self._limits.silence:
            return self._on_silence(now)
        what = "did not end this test" if self._open is not None else "did nothing between two tests"
        limit = f"{self._test_limit():.0f} s"
        return Ending(Cause.STUCK, f"the runner {what} within {limit}, although the guest is alive", self._excerpt())

    def _is_starved(self, seconds: float, starved: float) -> bool:
        """Whether the host gave QEMU no CPU for most of that time, which is not the guest's doing; noted if so."""
        if starved <= seconds:
            return False
        text = f"the host is busy: within {seconds:.0f} s, QEMU's threads waited {starved:.0f} s for a CPU"
        self._account.write(Note(time.time(), text))
        return True

    def _on_boot_limit(self, now: float) -> Ending | None:
        # Once, lest a busy host holds us for ever.
        if not self._boot_pardoned and self._is_starved(now - self._qemu.started, self._qemu.starved_seconds()):
            self._boot_pardoned = now
            return None
        return self._no_boot_ending(now - self._qemu.started)

    def _on_silence(self, now: float) -> Ending | None:
        silent = now - self._sign
        if not self._pardoned and self._is_starved(silent, self._qemu.starved_seconds() - self._sign_starved):
            self._pardoned = now
            return None
        used = self._qemu.cpu_seconds() - self._sign_cpu
        self._silence_text = silence_text(silent, used)
        for command in questions(self._qemu.cpus):
            self._qemu.qmp("human-monitor-command", **{"command-line": command})
        # unknown_nmi_panic is on the kernel's command line: a kernel that still takes an NMI says where it stands.
        self._qemu.qmp("inject-nmi")
        self._nmi_since = now
        return None

    def _hang_ending(self) -> Ending:
        splats, cpus = find_splats(self._window), self._cpus.lines()
        if splats:
            return Ending(Cause.HANG, f"{self._silence_text} [{splats[-1].fingerprint}]", (*splats[-1].lines, *cpus))
        return Ending(Cause.HANG, self._silence_text, (*self._excerpt(), *cpus))

    def _fatal_ending(self) -> Ending:
        splats = [splat for splat in find_splats(self._window) if splat.fatal]
        cause = Cause.PANIC if self._fatal is Kind.PANIC else Cause.OOPS
        if not splats:  # the window was cleared by the end of a test, which has been charged with it
            return Ending(cause, f"{self._fatal} under {self._last_end.test if self._last_end else 'no test'}")
        return Ending(cause, splats[-1].reason if len(splats) == 1 else splats[0].reason, splats[0].lines)

    def _no_boot_ending(self, waited: float) -> Ending:
        limit = f"{waited:.0f} s"
        if not self.whole_console:
            reason = f"the kernel said nothing on its serial console within {limit}"
        elif not self._hello:
            reason = f"the kernel did not get to the guest's init within {limit}"
        else:
            reason = f"the runner in the guest did not start within {limit}"
        return Ending(Cause.NO_BOOT, reason, self._excerpt())

    def _ending_of_qemu(self) -> Ending:
        """QEMU has ended, or was asked to: say why from what was seen, most telling first."""
        self._await_exit()
        if self._nmi_since is not None:
            return self._hang_ending()
        if self._fatal is not None:
            return self._fatal_ending()
        if self._goodbye is not None:
            return self._goodbye_ending(self._goodbye)
        excerpt = self._excerpt()
        if failure := init_failure(self.whole_console):
            return Ending(Cause.POWER_OFF, f"the guest's init failed: {failure}", excerpt)
        if self._shutdown_reason == "guest-shutdown":
            return Ending(Cause.POWER_OFF, "the guest was powered off", excerpt)
        if self._shutdown_reason == "guest-reset":
            if any(_RESTARTING in message_of(line) for line in self._window):
                return Ending(Cause.REBOOT, "the guest was rebooted", excerpt)
            return Ending(Cause.RESET, "the machine reset without a word of the kernel: a triple fault", excerpt)
        return Ending(Cause.QEMU_DIED, self._qemu.exit_text(), excerpt)

    def _await_exit(self) -> None:
        deadline = time.monotonic() + 5.0
        while not self._qemu.ended and time.monotonic() < deadline:
            for line in self._qemu.wait(0.1):
                self._take(line)
        while self._qemu.ended and self._qemu.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def _goodbye_ending(self, goodbye: dict[str, Any]) -> Ending:
        output = str(goodbye.get("output") or "")
        code, number = goodbye.get("exit"), goodbye.get("signal")
        if goodbye.get("error"):
            return Ending(Cause.POWER_OFF, f"the guest's init failed: {goodbye['error']}", self._excerpt(), output)
        if self._run_ended:
            return Ending(Cause.FINISHED, "finished", (), output, code)
        victim = self._killed_for_memory()
        memory = f"; the guest ran out of memory and the kernel killed {victim}" if victim else ""
        how = f"was killed by signal {number}" if number else f"ended with status {code}"
        reason = f"the runner {how} without ending the run{memory}"
        return Ending(Cause.RUNNER_DIED, reason, self._excerpt(), output, code)

    def _killed_for_memory(self) -> str:
        for line in reversed(self._window):
            if match := _OUT_OF_MEMORY.search(message_of(line)):
                return match[1]
        return ""

    def _excerpt(self) -> tuple[str, ...]:
        return tuple(self._window[-EXCERPT_LINES:])

    # -- charging

    def settle(self, ending: Ending) -> None:
        """Charge the end of the boot to the test that was open, or, if the kernel is to blame, to nobody in particular."""
        if ending.cause is Cause.FINISHED:
            self._close_lost_test(internal_error(ending.runner_output))
            self._between_tests()
            if self._garbage:
                self._charge_to_nobody(Verdict.ERROR, self._garbage[0], ())
            return
        garbage = f"; {self._garbage[0]}" if self._garbage and ending.cause is not Cause.FLOOD else ""
        if self._open is not None:
            self._charge(ending.cause.verdict, ending.reason + garbage, ending.excerpt)
        elif ending.cause.of_kernel and ending.excerpt and self._last_end is not None:
            self._charge_to_nobody(ending.cause.verdict, ending.reason + garbage, ending.excerpt)
        elif self._run_started:
            self._account.write(Note(time.time(), ending.reason + garbage))

    def _charge(self, verdict: Verdict, reason: str, excerpt: Sequence[str]) -> None:
        assert self._open is not None
        now = time.time()
        duration = max(0.0, time.monotonic() - self._open_since)
        self._account.write(
            TestEnd(self._open.test, now, verdict, duration=duration, reason=reason, kernel_log=tuple(excerpt))
        )
        self._open = None
        self._window.clear()

    def _charge_to_nobody(self, verdict: Verdict, reason: str, excerpt: Sequence[str]) -> None:
        after = self._last_end.test if self._last_end else "the boot"
        self._account.charge_to_nobody(verdict, f"{reason} (after {after})", tuple(excerpt))


def _today() -> dict[str, Any]:
    """The time and some randomness: a guest that was kept has the clock and the entropy of the day it was kept."""
    return {"time": time.time(), "entropy": os.urandom(32).hex()}


def goes_on(message: dict[str, Any]) -> bool:
    """Whether QEMU's monitor says that the guest runs: by its event, or in the answer to `query-status`."""
    answer = message.get("return")
    return message.get("event") == "RESUME" or (isinstance(answer, dict) and answer.get("running") is True)


def regrade(end: TestEnd, verdict: Verdict, reason: str) -> TestEnd:
    """A graver verdict for a test; what it said before is kept in the detail."""
    earlier = f"{end.verdict}: {end.reason}" if end.reason else end.verdict.value
    return replace(end, verdict=verdict, reason=reason, detail=f"the test itself ended: {earlier}\n{end.detail}".strip())


def _told_by(splat: Splat, end: TestEnd) -> bool:
    """Whether a test's own record holds this complaint already: the console may be slower than the result channel."""
    return any(splat.title in line for line in end.kernel_log) or splat.fingerprint in end.reason
