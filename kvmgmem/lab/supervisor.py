"""The supervisor: whatever the kernel under test does, every test gets a verdict, and the verdict names its cause.

It stands outside the guest, writes the guest's records to the host's file as they come, holds all the time limits, and
when a guest dies charges that to the open test, boots again, and has the remaining tests run.
"""

import json
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.guest_init import PROTOCOL
from kvmgmem.lab.machine import CONSOLE, CONTROL, QMP, RESULTS, Machine
from kvmgmem.lab.qemu import Line, Qemu
from kvmgmem.results.records import (
    Heartbeat,
    Note,
    Plan,
    Record,
    RunEnd,
    RunStart,
    TestEnd,
    TestStart,
    Verdict,
    parse_line,
)
from kvmgmem.results.run import collect, exit_code
from kvmgmem.results.stream import ResultStream
from kvmgmem.splats import Kind, Splat, block_is_complete, find_splats, kind_of, message_of

EXCERPT_LINES = 60
GARBAGE_LIMIT = 1 << 20
"""Bytes of garbage on the result channel after which the guest is given up."""

BLOCK_SECONDS = 1.0
"""What the rest of a complaint may take to arrive from the serial console, once its first line has."""

FRUITLESS_BOOTS = 2
"""Boots in a row without a single test started, after which there is no point in another."""


@dataclass(frozen=True)
class Limits:
    """Seconds that things may take on a machine with hardware virtualisation; `scaled` stretches them.

    Silence means neither a record nor a heartbeat. A test is the runner's to end; the
    limit here is for a runner that does not.
    """

    boot: float = 30.0
    silence: float = 15.0
    test: float = 60.0
    shutdown: float = 5.0
    oops: float = 1.0
    """What a test in whose course the kernel oopsed may still take to end."""
    nmi: float = 1.0
    """What a silent guest may take to answer an NMI with its stacks."""

    @property
    def heartbeat(self) -> float:
        """How often the guest is to show life: three times in what would be silence."""
        return min(5.0, self.silence / 3)

    def scaled(self, factor: float) -> "Limits":
        """Limits for emulation, for a kernel full of checks, for a busy host."""
        return Limits(*(getattr(self, name) * factor for name in self.__dataclass_fields__))

    @classmethod
    def unlimited(cls) -> "Limits":
        """For a guest that a debugger holds."""
        return cls(*(float("inf") for _ in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Request:
    """One supervised run: what to boot, what pytest is to do there, and where its records go."""

    machine: Machine
    results: Path
    pytest_args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flavour: str | None = None
    time_scale: float = 1.0
    limits: Limits = Limits()
    boots: int = 25
    """How often the guest is started at most."""
    repeat: str = "kvmgmem vm -- {test}"
    """The command that repeats one test; `{test}` stands for its quoted node id."""
    console: Path | None = None
    """Where the consoles of all boots are kept."""


class Listener(Protocol):
    """Whoever shows progress: `kvmgmem.lab.progress.Progress` fits."""

    def update(self, detail: str, fraction: float | None = None) -> None: ...
    def note(self, text: str) -> None: ...


class Cause(Enum):
    """How a boot ended; the value is the verdict for the test that was open."""

    FINISHED = ("finished", Verdict.ERROR)
    PANIC = ("panic", Verdict.PANICKED)
    OOPS = ("oops", Verdict.PANICKED)
    HANG = ("hang", Verdict.PANICKED)
    RESET = ("reset", Verdict.PANICKED)
    REBOOT = ("reboot", Verdict.ERROR)
    POWER_OFF = ("power-off", Verdict.ERROR)
    QEMU_DIED = ("qemu-died", Verdict.ERROR)
    RUNNER_DIED = ("runner-died", Verdict.CRASHED)
    STUCK = ("stuck", Verdict.TIMEOUT)
    NO_BOOT = ("no-boot", Verdict.PANICKED)
    FLOOD = ("flood", Verdict.ERROR)

    @property
    def verdict(self) -> Verdict:
        return self.value[1]

    @property
    def of_kernel(self) -> bool:
        """Whether it is the kernel that is to blame, so that it counts even with no test open."""
        return self.verdict is Verdict.PANICKED


@dataclass(frozen=True)
class Ending:
    """The end of one boot: its cause, one line that says so, and the console lines that show it."""

    cause: Cause
    reason: str
    excerpt: tuple[str, ...] = ()
    runner_output: str = ""
    runner_exit: int | None = None


class Supervisor:
    """Runs the tests of one request to their end, over as many boots as that takes."""

    def __init__(self, request: Request, listener: Listener, start_qemu: Callable[[Machine], Qemu] = Qemu) -> None:
        self.request = request
        self._listener = listener
        self._start_qemu = start_qemu
        self._stream = ResultStream(request.results)
        self.records: list[Record] = []
        self.plan: tuple[str, ...] = ()
        self.done: dict[str, Verdict] = {}
        self.left_out: dict[str, None] = {}
        self.boots = 0
        self.first_test_after: float | None = None
        """Seconds from QEMU's start to the first test's start record."""
        self.runner_output = ""
        """What the runner of the last boot printed; pytest's list of tests, if that was asked for."""
        self._console = request.console.open("ab") if request.console else None

    def run(self) -> ExitCode:
        """Boot, supervise, boot again; returns what the records amount to.

        Without a single record if there was nothing to run (--collect-only). Raises HarnessError if not one test could be
        started; its code is KERNEL if the kernel died of itself.
        """
        try:
            return self._run()
        finally:
            self._stream.close()
            if self._console:
                self._console.close()

    def _run(self) -> ExitCode:
        fruitless = 0
        verbose = self.request.machine.verbose
        while True:
            self.boots += 1
            before = len(self.done)
            ending = self._boot(replace(self.request.machine, verbose=verbose))
            self.runner_output = ending.runner_output
            if ending.cause is Cause.FINISHED:
                break
            if not self.records and ending.runner_exit == 0:
                return ExitCode.OK  # nothing was to be run: --collect-only, --version
            fruitless = fruitless + 1 if len(self.done) == before else 0
            verbose = verbose or fruitless > 0
            if not self._remaining() and self.plan:
                break
            if fruitless >= FRUITLESS_BOOTS or (fruitless and not worth_another_boot(ending)):
                if not self.plan:
                    raise no_test_started(ending, self.request)
                self._give_up(f"{fruitless} boots in a row ended before a test began: {ending.reason}")
                break
            if self.boots >= self.request.boots:
                self._give_up(f"the guest was started {self.boots} times, which is the limit")
                break
            self._listener.note(f"the guest is started again after: {ending.reason}")
        return self._finish()

    def _boot(self, machine: Machine) -> Ending:
        with self._start_qemu(machine) as qemu:
            boot = Boot(self, qemu)
            try:
                ending = boot.run()
            finally:
                # Also on Ctrl-C: the console up to there may be what the user looks for.
                self.keep_console(f"--- boot {self.boots} ---", boot.whole_console)
        boot.settle(ending)
        return ending

    def keep_console(self, heading: str, lines: Iterable[str]) -> None:
        """Append a boot's console to the file it is kept in."""
        if self._console:
            self._console.write("\n".join([heading, *lines, ""]).encode(errors="replace"))
            self._console.flush()

    def job(self) -> dict[str, Any]:
        """What the guest is told to do: everything but the tests that are done."""
        environment = {
            "KVMGMEM_TIME_SCALE": f"{self.request.time_scale:g}",
            "KVMGMEM_REPEAT": self.request.repeat,
            "KVMGMEM_NO_SUMMARY": "1",
            **self.request.environment,
        }
        return {
            "pytest_args": list(self.request.pytest_args),
            "environment": environment,
            "accelerator": self.request.machine.accelerator,
            "flavour": self.request.flavour,
            "time_scale": self.request.time_scale,
            "heartbeat": self.request.limits.heartbeat,
            "done": sorted(self.done),
        }

    def write(self, record: Record) -> None:
        """Add a record to the host's file, and keep account of it."""
        if isinstance(record, TestEnd):
            record = self._with_repeat(record)
            self.done[record.test] = record.verdict
        if isinstance(record, Plan) and not self.plan:
            self.plan = record.tests
        self._stream.write(record)
        if not isinstance(record, Heartbeat):
            self.records.append(record)
        self._show(record)

    def _with_repeat(self, end: TestEnd) -> TestEnd:
        if end.verdict in (Verdict.PASSED, Verdict.SKIPPED) or end.test.startswith(PSEUDO_PREFIX):
            return end
        return replace(end, repeat=self.request.repeat.replace("{test}", shlex.quote(end.test)))

    def _show(self, record: Record) -> None:
        if isinstance(record, TestStart):
            fraction = len(self.done) / len(self.plan) if self.plan else None
            self._listener.update(record.test, fraction)
        elif isinstance(record, TestEnd) and record.verdict.severity >= Verdict.FAILED.severity:
            self._listener.note(f"{record.verdict}: {record.test}: {record.reason}")

    def _remaining(self) -> list[str]:
        return [test for test in self.plan if test not in self.done]

    def _give_up(self, reason: str) -> None:
        self._listener.note(f"giving up: {reason}")
        self.write(Note(time.time(), reason))
        for test in self._remaining():
            self.write(TestEnd(test, time.time(), Verdict.NOT_RUN, reason=reason))

    def _finish(self) -> ExitCode:
        """Write the one end of the whole run: the guest's own ends speak for one boot only."""
        now = time.time()
        code = exit_code(collect([*self.records, RunEnd(now, ExitCode.OK)]))
        counts: dict[str, int] = {}
        for verdict in self.done.values():
            counts[verdict.value] = counts.get(verdict.value, 0) + 1
        guest_codes = [record.exit for record in self._guest_ends]
        if code in (ExitCode.OK, ExitCode.NOTHING_RAN, ExitCode.TEST_FAILED):
            # What the runner says beyond its tests: an internal error of pytest, an interruption.
            code = max([code, *(known_code(value) for value in guest_codes)], key=_GRAVITY.index)
        self.write(RunEnd(now, int(code), counts, tuple(self.left_out)))
        return code

    _guest_ends: Sequence[RunEnd] = ()

    def note_guest_end(self, end: RunEnd) -> None:
        """Keep what the runner of one boot ended with."""
        self._guest_ends = [*self._guest_ends, end]
        self.left_out.update(dict.fromkeys(end.left_out))


_GRAVITY = (
    ExitCode.OK,
    ExitCode.NOTHING_RAN,
    ExitCode.TEST_FAILED,
    ExitCode.USAGE,
    ExitCode.HARNESS,
    ExitCode.KERNEL,
)


def known_code(value: int) -> ExitCode:
    """The exit code of a guest's runner; 3 is for all boots together to say, and an unknown one is the harness's fault."""
    try:
        code = ExitCode(value)
    except ValueError:
        return ExitCode.HARNESS
    return ExitCode.OK if code is ExitCode.NOTHING_RAN else code


# --- one boot ---------------------------------------------------------------------------------------------------------

PSEUDO_PREFIX = "kernel::"
"""Node ids of what happens while no test is open."""

_OUT_OF_MEMORY = re.compile(r"(?:Out of memory|oom-kill).*?: Killed process \d+ \(([^)]*)\)")
_RESTARTING = "reboot: Restarting system"
_RECORD_BEGINS = (b'{"record":', b'{"record" :')


class Boot:
    """One guest from its start to its end; decides what that end was."""

    def __init__(self, supervisor: Supervisor, qemu: Qemu) -> None:
        self._supervisor = supervisor
        self._qemu = qemu
        self._limits = supervisor.request.limits
        self.whole_console: deque[str] = deque(maxlen=20_000)
        self._window: list[str] = []
        """The console since the last start or end of a test."""
        self._open: TestStart | None = None
        self._open_since = 0.0
        self._last_end: TestEnd | None = None
        self._hello = False
        self._job_sent = False
        self._run_started = False
        self._run_ended = False
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
        self._nmi_since: float | None = None
        self._silence_text = ""

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
            return [self._qemu.started + limits.boot]
        silence = max(self._sign, self._pardoned) + limits.silence
        # A test's limit counts while there are heartbeats; without them it is not known to be the runner's fault.
        if self._open is not None and time.monotonic() - self._sign < 2.5 * limits.heartbeat:
            return [silence, self._open_since + limits.test]
        return [silence]

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
        elif record == "heartbeat":
            self._supervisor.write(Heartbeat(time.time()))
        elif record == "goodbye":
            self._goodbye = message

    def _on_hello(self, message: dict[str, Any]) -> None:
        if message.get("protocol") != PROTOCOL:
            raise HarnessError(
                f"the guest speaks protocol {message.get('protocol')}, and this kvmgmem {PROTOCOL}",
                hint="remove the cached images: kvmgmem kernel rm --help",
            )
        self._hello = True
        if not self._job_sent:
            self._job_sent = True
            self._qemu.send(CONTROL, self._supervisor.job())

    def _on_qmp(self, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            return
        if isinstance(message, dict) and message.get("event") == "SHUTDOWN":
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
        if data.startswith(_RECORD_BEGINS):
            what = what or "a record that was cut in the middle"
        self._garbage.append(f"{what or 'garbage'} on {where}: {data[:60]!r} ({len(data)} bytes)")

    def _on_record(self, record: Record) -> None:
        match record:
            case RunStart():
                self._run_started = True
                extra = {**record.circumstances.extra, "boot": self._supervisor.boots}
                self._supervisor.write(replace(record, circumstances=replace(record.circumstances, extra=extra)))
            case TestStart():
                self._close_lost_test()
                self._between_tests()
                self._open = record
                self._open_since = time.monotonic()
                if self._supervisor.first_test_after is None:
                    self._supervisor.first_test_after = self._open_since - self._qemu.started
                self._supervisor.write(record)
            case TestEnd():
                self._on_test_end(record)
            case RunEnd():
                self._run_ended = True
                self._supervisor.note_guest_end(record)
            case _:
                self._supervisor.write(record)

    def _on_test_end(self, end: TestEnd) -> None:
        end = self._with_console(end)
        if self._garbage and end.verdict.severity < Verdict.ERROR.severity:
            end = regrade(end, Verdict.ERROR, self._garbage[0])
            self._garbage.clear()
        self._supervisor.write(end)
        self._last_end = end
        self._open = None
        self._window.clear()

    def _with_console(self, end: TestEnd) -> TestEnd:
        """Add what only the console says: a complaint that the runner did not see, a process killed for memory."""
        self._complete_block()
        splats = find_splats(self._window)
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

    def _close_lost_test(self) -> None:
        """A test whose end never came, because another one begins."""
        if self._open is None:
            return
        why = self._garbage[0] if self._garbage else "its end record never arrived"
        self._garbage.clear()
        self._charge(Verdict.ERROR, why, ())

    def _between_tests(self) -> None:
        """Judge what the console said while no test was open."""
        for splat in find_splats(self._window):
            if self._last_end is None:
                self._supervisor.write(Note(time.time(), f"the kernel complained while booting: {splat.reason}"))
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
            return self._no_boot_ending()
        if now >= max(self._sign, self._pardoned) + self._limits.silence:
            return self._on_silence(now)
        return Ending(
            Cause.STUCK,
            f"the runner did not end this test within {self._limits.test:.0f} s, although the guest is alive",
            self._excerpt(),
        )

    def _on_silence(self, now: float) -> Ending | None:
        silent = now - self._sign
        starved = self._qemu.starved_seconds() - self._sign_starved
        if starved > silent and not self._pardoned:
            # The host gave QEMU no CPU: that is not the guest's silence. Once, lest a busy host holds us for ever.
            self._pardoned = now
            self._supervisor.write(
                Note(
                    time.time(), f"the host is busy: within {silent:.0f} s, QEMU's threads waited {starved:.0f} s for a CPU"
                )
            )
            return None
        used = self._qemu.cpu_seconds() - self._sign_cpu
        self._silence_text = silence_text(silent, used)
        # unknown_nmi_panic is on the kernel's command line: a kernel that still takes an NMI says where it stands.
        self._qemu.qmp("inject-nmi")
        self._nmi_since = now
        return None

    def _hang_ending(self) -> Ending:
        splats = find_splats(self._window)
        if splats:
            return Ending(Cause.HANG, f"{self._silence_text} [{splats[-1].fingerprint}]", splats[-1].lines)
        return Ending(Cause.HANG, self._silence_text, self._excerpt())

    def _fatal_ending(self) -> Ending:
        splats = [splat for splat in find_splats(self._window) if splat.fatal]
        cause = Cause.PANIC if self._fatal is Kind.PANIC else Cause.OOPS
        if not splats:  # the window was cleared by the end of a test, which has been charged with it
            return Ending(cause, f"{self._fatal} under {self._last_end.test if self._last_end else 'no test'}")
        return Ending(cause, splats[-1].reason if len(splats) == 1 else splats[0].reason, splats[0].lines)

    def _no_boot_ending(self) -> Ending:
        limit = f"{self._limits.boot:.0f} s"
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
            self._close_lost_test()
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
            self._supervisor.write(Note(time.time(), ending.reason + garbage))

    def _charge(self, verdict: Verdict, reason: str, excerpt: Sequence[str]) -> None:
        assert self._open is not None
        now = time.time()
        duration = max(0.0, time.monotonic() - self._open_since)
        self._supervisor.write(
            TestEnd(self._open.test, now, verdict, duration=duration, reason=reason, kernel_log=tuple(excerpt))
        )
        self._open = None
        self._window.clear()

    def _charge_to_nobody(self, verdict: Verdict, reason: str, excerpt: Sequence[str]) -> None:
        after = self._last_end.test if self._last_end else "the boot"
        test = f"{PSEUDO_PREFIX}between-tests#{1 + sum(name.startswith(PSEUDO_PREFIX) for name in self._supervisor.done)}"
        now = time.time()
        self._supervisor.write(TestStart(test, now, rule="The kernel is well between the tests, too."))
        self._supervisor.write(TestEnd(test, now, verdict, reason=f"{reason} (after {after})", kernel_log=tuple(excerpt)))


# --- judgements without a guest ---------------------------------------------------------------------------------------


def split_garbage(line: bytes) -> tuple[bytes, bytes]:
    """Part a line into what is garbage and the record behind it, if any.

    A record that was cut has the next one right behind it: the last place where a record begins is where one may be
    whole.
    """
    if line.startswith(_RECORD_BEGINS) and _is_json(line):
        return b"", line
    start = max(line.rfind(begin) for begin in _RECORD_BEGINS)
    if start < 0:
        return line, b""
    return line[:start], line[start:]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def regrade(end: TestEnd, verdict: Verdict, reason: str) -> TestEnd:
    """A graver verdict for a test; what it said before is kept in the detail."""
    earlier = f"{end.verdict}: {end.reason}" if end.reason else end.verdict.value
    return replace(end, verdict=verdict, reason=reason, detail=f"the test itself ended: {earlier}\n{end.detail}".strip())


def _told_by(splat: Splat, end: TestEnd) -> bool:
    """Whether a test's own record holds this complaint already: the console may be slower than the result channel."""
    return any(splat.title in line for line in end.kernel_log) or splat.fingerprint in end.reason


def silence_text(silent: float, used: float) -> str:
    """Say whether a silent guest hangs busily, hangs idly, or may merely be slow; both in seconds, `used` of CPU time."""
    share = used / silent if silent > 0 else 0.0
    facts = f"no sign of life for {silent:.0f} s, in which QEMU used {used:.1f} s of CPU time"
    if share > 0.7:
        return f"hang: {facts}: something spins"
    if share < 0.1:
        return f"hang: {facts}: all CPUs wait"
    return f"hang, or very slow: {facts}"


def init_failure(console: Iterable[str]) -> str:
    """What the guest's init said it died of: the last line of its traceback; "" if it did not."""
    lines = iter(console)
    for line in lines:
        if message_of(line).startswith("kvmgmem: init failed"):
            rest = [message_of(text) for text in lines]
            return next(
                (text for text in reversed(rest) if re.match(r"\w+(Error|Exception|Interrupt)?: ", text)), "see the console"
            )
    return ""


def worth_another_boot(ending: Ending) -> bool:
    """Whether a boot that came to nothing may fare better the next time."""
    return ending.cause in (Cause.NO_BOOT, Cause.HANG)


def usage_error(output: Iterable[str]) -> str:
    """What pytest does not like about its arguments: argparse's line, or a line that begins with ERROR."""
    lines = list(output)
    found = [line.partition("error: ")[2] for line in lines if ": error: " in line]
    found += [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return found[0] if found else ""


# What stands on the console when a kernel cannot start this guest, and what is missing then.
_BOOT_HINTS = (
    (r"Initramfs unpacking failed|System is deadlocked on memory", "give the guest more memory: --memory MiB"),
    (r"Unable to mount root fs|VFS: Cannot open root", "the kernel needs CONFIG_BLK_DEV_INITRD"),
    (r"Failed to execute /init|No working init found", "the kernel needs CONFIG_BINFMT_SCRIPT and CONFIG_BINFMT_ELF"),
    (r"no virtio-serial port", "the kernel needs CONFIG_VIRTIO_PCI and CONFIG_VIRTIO_CONSOLE"),
)


def no_test_started(ending: Ending, request: Request) -> HarnessError:
    """The error for a guest in which not one test began: what happened, and the likeliest remedy."""
    words = [line.strip() for line in ending.runner_output.splitlines()]
    told = next((line for line in words if line.startswith("kvmgmem: error: ")), "")
    if told:
        hint = next((line.removeprefix("hint: ") for line in words if line.startswith("hint: ")), "")
        return HarnessError(
            f"in the guest: {told.removeprefix('kvmgmem: error: ')}", hint, known_code(ending.runner_exit or 4)
        )
    if ending.cause is Cause.RUNNER_DIED and ending.runner_exit == 4 and (usage := usage_error(words)):
        return HarnessError(f"pytest: {usage}", "see pytest --help", ExitCode.USAGE)
    if ending.cause is Cause.RUNNER_DIED and ending.runner_exit in (3, 5):
        return HarnessError(
            "no selftest was selected", "see what there is: kvmgmem run -- --collect-only -q", ExitCode.NOTHING_RAN
        )
    console = "\n".join(ending.excerpt) + "\n" + ending.reason
    hint = next((text for pattern, text in _BOOT_HINTS if re.search(pattern, console)), "")
    kept = f"the console is in {request.console}" if request.console else ""
    code = ExitCode.KERNEL if ending.cause in (Cause.PANIC, Cause.OOPS, Cause.RESET, Cause.HANG) else ExitCode.HARNESS
    last = next((line for line in reversed(words) if line), "")
    detail = f": {last}" if ending.cause is Cause.RUNNER_DIED and last else ""
    return HarnessError(f"no test was started: {ending.reason}{detail}", "; ".join(filter(None, (hint, kept))), code)
