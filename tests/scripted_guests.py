"""Guests whose every word is known beforehand, for tests of the supervisor that take no time."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvmgmem.lab.guest.machine import CONSOLE, CONTROL, QMP, RESULTS, Machine
from kvmgmem.lab.guest.qemu import Line, Qemu
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.supervisor import Request, Supervisor
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, exit_code, read_run

MACHINE = Machine(kernel=Path("/k/bzImage"), initrd=Path("/k/root.cpio"), accelerator="tcg")
Step = list[Line] | None | Callable[[], list[Line]]


def record(kind: str, **fields: object) -> Line:
    """A record on the result channel."""
    return Line(RESULTS, json.dumps({"record": kind, "time": 1.0, **fields}).encode())


def control(kind: str, **fields: object) -> Line:
    """A message on the control channel."""
    return Line(CONTROL, json.dumps({"record": kind, **fields}).encode())


def console(*lines: str) -> list[Line]:
    """Lines of the kernel."""
    return [Line(CONSOLE, line.encode()) for line in lines]


def shutdown(reason: str) -> Line:
    """QEMU's word on why it ends."""
    return Line(QMP, json.dumps({"event": "SHUTDOWN", "data": {"guest": True, "reason": reason}}).encode())


CIRCUMSTANCES = {
    "release": "7.3.4",
    "backend": "kvm_amd",
    "paging": "tdp",
    "accelerator": "tcg",
    "cpu_model": "x",
    "vm_types": ["default"],
    "where": "guest",
    "kvmgmem": "0",
    "python": "3",
    "pytest": "9",
}
GREETING = (control("hello", protocol=3), control("ready"), control("collected"))
RUN_START = record("run-start", schema=1, run="0" * 32, circumstances=CIRCUMSTANCES)
RUN_END = record("run-end", exit=0, counts={})
GOODBYE = control("goodbye", exit=0, signal=None, output="")
PANIC = console(
    "[    3.0] ignored",
    "[    3.000001] Kernel panic - not syncing: sysrq triggered crash",
    "[    3.000002] Call Trace:",
    "[    3.000003]  sysrq_handle_crash+0x1/0x2",
    "[    3.000004] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---",
)


def plan(*tests: str) -> Line:
    """The plan of a boot."""
    return record("plan", tests=list(tests))


def passing(test: str) -> list[Line]:
    """A test from start to end."""
    return [record("test-start", test=test), record("test-end", test=test, verdict="passed")]


class ScriptedQemu(Qemu):
    """A guest whose every line is known beforehand.

    A step of its script is the lines that come at once, `None` for silence, or a function that may wait for another guest
    and returns the lines.
    """

    def __init__(self, script: Sequence[Step], exit_status: int = 0) -> None:
        self._script = list(script)
        self._exit_status = exit_status
        self.started = time.monotonic()
        self.cpus = 2
        self.complaints: list[str] = []
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.saves = True
        self.last_words: list[Line] = []
        self.process: Any = SimpleNamespace(poll=lambda: exit_status)

    def close(self) -> None:
        """Nothing was started."""

    @property
    def ended(self) -> bool:
        return not self._script

    def wait(self, timeout: float) -> list[Line]:
        """Hand out the next step."""
        if self._script and self._script[0] is None:
            time.sleep(max(0.0, min(timeout, 1.0)))
            return []
        step = self._script.pop(0) if self._script else None
        return (step() if callable(step) else step) or []

    def wait_for_console(self, timeout: float) -> list[Line]:
        """What it says last, once."""
        lines, self.last_words = self.last_words, []
        return lines

    def send(self, channel: str, message: dict[str, Any]) -> None:
        """Remember what the guest or the monitor was told."""
        self.sent.append((channel, message))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs among what the guest was told."""
        return [message for channel, message in self.sent if channel == CONTROL and "pytest_args" in message]

    @property
    def words(self) -> list[dict[str, Any]]:
        """What it was told before its first test."""
        return [message for channel, message in self.sent if channel == CONTROL and "share" in message]

    def save_state(self, path: Path, limit: float = 60.0) -> bool:
        """Write a state that says which script it came from, unless told to fail."""
        if self.saves:
            path.write_text("state")
        return self.saves

    def cpu_seconds(self) -> float:
        """No CPU time at all."""
        return 0.0

    def starved_seconds(self) -> float:
        """No waiting for a CPU either."""
        return 0.0


class Scripted:
    """Runs a supervisor over scripts, one for each boot."""

    def __init__(self, results: Path, *boots: Sequence[Step], **request: Any) -> None:
        self.results = results
        self.guests = [ScriptedQemu(script) for script in boots]
        self.notes: list[str] = []
        self.machines: list[Machine] = []
        self._waiting = list(self.guests)
        request.setdefault("limits", Limits(boot=0.2, silence=0.2, test=0.2, shutdown=0.2, oops=0.1, nmi=0.1))
        self.supervisor = Supervisor(Request(request.pop("machine", MACHINE), results, **request), self, self._start)

    def _start(self, machine: Machine) -> Qemu:
        self.machines.append(machine)
        return self._waiting.pop(0)

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Progress nobody looks at."""

    def note(self, text: str) -> None:
        """Lines that stay."""
        self.notes.append(text)

    def run(self) -> Run:
        """Run to the end, and check that the exit code is what the records say."""
        code = self.supervisor.run()
        run = read_run([self.results])
        assert code == exit_code(run)
        assert not run.damaged
        return run


def verdicts(run: Run) -> dict[str, Verdict]:
    """Verdict by test."""
    return {outcome.end.test: outcome.verdict for outcome in run.tests}


def reason(run: Run, test: str) -> str:
    """The reason of one test's verdict."""
    return next(outcome.end.reason for outcome in run.tests if outcome.end.test == test)
