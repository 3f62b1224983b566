"""A guest that runs some selftests on one kernel, once: what a mutant's kernel is put through."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.guest.machine import Machine
from kvmgmem.lab.guest.qemu import Line, Qemu
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.supervisor import Request, Supervisor
from kvmgmem.mutate.modules import Kernel
from kvmgmem.results.records import Plan, Record, TestEnd, TestStart, Verdict

TEST_SECONDS: Final = 10.0
"""What one test may take, before scaling. The slowest takes a third of it; a mutant that hangs a guest costs it whole."""

# Less patience than a run of tests has: what is silent for so long on a kernel with a fault in it does not come back.
LIMITS: Final = Limits(boot=24.0, silence=10.0, shutdown=4.0)

GUEST_SECONDS: Final = {True: 180.0, False: 1200.0}
"""What a whole guest may take, before scaling: with some of the tests, and with all of them."""

QUIET: Final = ("-q", "--no-header", "--no-summary", "--tb=no", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Guest:
    """The machine that every mutant runs on, and the image with the selftests in it."""

    image: Path
    accelerator: str
    time_scale: float
    qemu: str
    memory_mib: int = 1536
    cpus: int = 2
    numa_nodes: int = 2
    """Two, so that policies have a choice."""
    snapshots: Path | None = None
    """Where a booted guest is kept, for kernels that differ in their modules alone: those come with the tests."""


@dataclass(frozen=True)
class Trial:
    """What came of one run in one guest."""

    planned: tuple[str, ...] = ()
    ends: tuple[TestEnd, ...] = ()
    """In the order of their arrival; tests that never got their turn are not among them."""
    complete: bool = False
    """Every planned test got its turn, and the guest came to its end by itself."""
    trouble: str = ""
    """Why not one test was started."""
    kernel_died: bool = False
    """It is the kernel's fault that none was."""
    first_test_after: float | None = None
    seconds: float = 0.0
    """From the start of QEMU to its end."""
    cpu_seconds: float = 0.0
    """What QEMU used of the processors, over all boots."""
    console: Path | None = field(default=None, compare=False)


class Silent:
    """A listener that keeps to itself: dozens of guests would drown the one line that tells how far all is."""

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


def run_tests(
    guest: Guest,
    kernel: Kernel,
    tests: Sequence[str],
    records: Path,
    *,
    stop_at_failure: bool,
    test_seconds: float = TEST_SECONDS,
) -> Trial:
    """Boot a kernel and run these tests (all, where none is named), in one boot, or as many as it takes.

    Records and console go to `records` and beside it. What keeps every test from starting is told, not raised: with a
    mutant's kernel that is an answer. Raises HarnessError only for what has nothing to do with the kernel.
    """
    records.unlink(missing_ok=True)
    console = records.with_suffix(".console")
    console.unlink(missing_ok=True)
    stopping = ["-x"] if stop_at_failure else []
    machine = Machine(
        kernel=kernel.image,
        initrd=guest.image,
        accelerator=guest.accelerator,
        memory_mib=guest.memory_mib,
        cpus=guest.cpus,
        numa_nodes=guest.numa_nodes,
        qemu=guest.qemu,
    )
    request = Request(
        machine=machine,
        results=records,
        pytest_args=(*QUIET, f"--test-timeout={test_seconds:g}", *stopping, *tests),
        time_scale=guest.time_scale,
        limits=replace(LIMITS, test=2 * test_seconds).scaled(guest.time_scale),
        boots=1 if stop_at_failure else 25,
        console=console,
        snapshots=guest.snapshots,
        modules=kernel.modules,
    )
    supervisor = OneShot(request, stop_at_failure, GUEST_SECONDS[bool(tests)] * guest.time_scale)
    trouble, kernel_died = "", False
    started = time.monotonic()
    try:
        supervisor.run_bounded()
    except HarnessError as error:
        if any(isinstance(record, TestStart) for record in supervisor.records):
            raise
        trouble, kernel_died = error.message, error.code is ExitCode.KERNEL
    trial = _trial(supervisor, trouble, kernel_died)
    return replace(
        trial,
        first_test_after=supervisor.first_test_after,
        seconds=time.monotonic() - started,
        cpu_seconds=supervisor.cpu_seconds,
        console=console,
    )


class MeteredQemu(Qemu):
    """A QEMU that tells, once it is over, what it used of the processors."""

    def __init__(self, machine: Machine, tell: Callable[[float], None]) -> None:
        super().__init__(machine)
        self._tell = tell
        self._used = 0.0

    def wait(self, timeout: float) -> list[Line]:
        """As ever; when everything has been read, nobody has waited for the process yet, and it can still be asked."""
        lines = super().wait(timeout)
        self._used = max(self._used, self.cpu_seconds())
        return lines

    def close(self) -> None:
        """Tell, then close; the second time there is nothing more to tell."""
        self._tell(max(self._used, self.cpu_seconds()))
        self._tell = lambda _: None
        super().close()


class OneShot(Supervisor):
    """A supervisor that ends the guest at the first failure, and when its time is up, rather than wait for its runner.

    A process that a mutant holds in the kernel for ever keeps the runner from ending, while the guest shows signs of life.
    """

    def __init__(self, request: Request, stop_at_failure: bool, seconds: float) -> None:
        self.out_of_time = False
        self.cpu_seconds = 0.0
        self._stop_at_failure = stop_at_failure
        self._seconds = seconds
        self._qemu: Qemu | None = None
        super().__init__(request, Silent(), self._start)

    def _start(self, machine: Machine) -> Qemu:
        self._qemu = MeteredQemu(machine, self._spend)
        return self._qemu

    def _spend(self, seconds: float) -> None:
        self.cpu_seconds += seconds

    def run_bounded(self) -> None:
        """Run, but for no longer than the time given. Raises HarnessError as `run` does."""
        timer = threading.Timer(self._seconds, self._time_is_up)
        timer.daemon = True
        timer.start()
        try:
            self.run()
        finally:
            timer.cancel()

    def write(self, record: Record) -> None:
        """Keep a record; a failure may be the last that is asked for."""
        super().write(record)
        if self._stop_at_failure and isinstance(record, TestEnd) and record.verdict.severity >= Verdict.FAILED.severity:
            self._end_guest()

    def _time_is_up(self) -> None:
        self.out_of_time = True
        self._end_guest()

    def _end_guest(self) -> None:
        self.stopping = True
        if self._qemu is not None and self._qemu.process.poll() is None:
            self._qemu.process.kill()


def _trial(supervisor: OneShot, trouble: str, kernel_died: bool) -> Trial:
    records = supervisor.records
    planned = tuple(test for record in records if isinstance(record, Plan) for test in record.tests)
    started = {record.test for record in records if isinstance(record, TestStart)}
    ends = tuple(record for record in records if isinstance(record, TestEnd) and record.test in started)
    if not started and not trouble:
        trouble = "the guest ended before a test was started"
        kernel_died = True
    complete = not supervisor.out_of_time and started.issuperset(planned)
    return Trial(planned, ends, complete, trouble, kernel_died)
