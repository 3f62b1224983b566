"""Storms: calls that run into each other, again and again, for a bounded time.

Every entry into the kernel lets Python's lock go, so threads of one process do meet there. A storm decides nothing: what a
test asserts is what guest and host saw while it raged, and what is left when it is over.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, Self

import pytest

from kvmgmem.abi import PAGE_SIZE
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu
from kvmgmem.errors import Errno
from kvmgmem.exits import MmioExit, RunResult
from kvmgmem.memory import Mapping
from kvmgmem.testing.waiting import TIME_SCALE, wait_until

HOST_SECONDS = 0.1
EMULATED_SECONDS = 0.3
STUCK_LIMIT = 20.0
JITTER = 150e-6  # what it takes to enter and leave the kernel, an order of magnitude up or down

Action = Callable[[], object]


@dataclass
class Storm:
    """How long the storms of one test rage, in seconds all in all, and the random numbers they are drawn from."""

    seconds: float
    seed: int = 1
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    @classmethod
    def of(cls, request: pytest.FixtureRequest) -> "Storm":
        """The storm that a test is worth, by --effort and by where it runs."""
        usual = HOST_SECONDS if TIME_SCALE <= 1 else EMULATED_SECONDS
        return cls(usual * float(request.config.getoption("--effort")))

    def rounds(self, least: int = 2) -> Iterator[int]:
        """Number rounds until the storm's time is over, but not before `least` of them."""
        deadline = time.monotonic() + self.seconds
        number = 0
        while number < least or time.monotonic() < deadline:
            yield number
            number += 1

    def clash(self, *actions: Action) -> list[Any]:
        """Call each action once, each in a thread, at nearly the same time; their answers, in order.

        An exception of an action is raised here; AssertionError if one does not return.
        """
        barrier = threading.Barrier(len(actions))
        delays = [self.random.random() * JITTER if self.random.random() < 0.7 else 0.0 for _ in actions]

        def once(action: Action, delay: float) -> object:
            barrier.wait(STUCK_LIMIT * TIME_SCALE)
            if delay:
                time.sleep(delay)
            return action()

        workers = [_Worker(partial(once, a, d), _name(a)) for a, d in zip(actions, delays, strict=True)]
        return _answers(workers)

    def rage(self, *actions: Action) -> list[int]:
        """Call every action over and over, each in a thread, until the time is over; how often each was called.

        It goes on, within limits, until each action has been called twice. An exception of an action ends it and is raised
        here; AssertionError if one does not return.
        """
        barrier = threading.Barrier(len(actions))
        stop = threading.Event()
        counts = [0] * len(actions)

        def again(index: int, action: Action) -> None:
            barrier.wait(STUCK_LIMIT * TIME_SCALE)
            try:
                while not stop.is_set():
                    action()
                    counts[index] += 1
            except BaseException:
                stop.set()
                raise

        workers = [_Worker(partial(again, i, a), _name(a)) for i, a in enumerate(actions)]
        stop.wait(self.seconds)
        deadline = time.monotonic() + STUCK_LIMIT * TIME_SCALE
        while min(counts) < 2 and time.monotonic() < deadline:
            if stop.wait(0.01):
                break
        stop.set()
        _answers(workers)
        return counts


class _Worker:
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Action, name: str) -> None:
        self.answer: object = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(function,), daemon=True, name=name)
        self.thread.start()

    def _run(self, function: Action) -> None:
        try:
            self.answer = function()
        except BaseException as error:
            self.error = error


def _name(action: Action) -> str:
    return getattr(action, "__qualname__", repr(action)).rpartition(".")[2]


def _answers(workers: list[_Worker]) -> list[Any]:
    deadline = time.monotonic() + STUCK_LIMIT * TIME_SCALE
    for worker in workers:
        worker.thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [worker.thread.name for worker in workers if worker.thread.is_alive()]
    if stuck:
        raise AssertionError(f"{', '.join(stuck)} did not return within {STUCK_LIMIT * TIME_SCALE:g} s")
    for worker in workers:
        _wait_out(worker.thread)
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    return [worker.answer for worker in workers]


def _wait_out(thread: threading.Thread) -> None:
    """Wait until a thread that has ended for Python has ended for the kernel too: the check for leaks asks the kernel."""
    # 3.11: Thread.join returns when the thread has given its interpreter state up, which it outlives.
    wait_until(lambda: not os.path.exists(f"/proc/self/task/{thread.native_id}"), f"{thread.name} is gone")  # noqa: PTH110


class Resident:
    """A vCPU that stays in the program it was started with, in a thread of its own, while the `with` block runs.

    Reads that meet no memory get zeros. `accepts` says of any other exit whether the guest may go on after it; one that it
    may not ends the run and becomes `result`, which is None as long as the guest is where it should be. A vCPU whose
    descriptor another thread closes does not come back once it has left.
    """

    def __init__(self, cpu: GuestCpu, accepts: Callable[[RunResult], bool] = lambda _: False) -> None:
        self.cpu = cpu
        self.result: RunResult | None = None
        self.mmio_exits = 0
        self.accepted = 0
        self._accepts = accepts
        self._stop = threading.Event()
        _ = cpu.vcpu.kvm_run  # mapped here, so that a kick never races with the mapping
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"vcpu{cpu.vcpu.id}")

    def _run(self) -> None:
        # A run that is interrupted has finished the MMIO before it, so that the registers may be set again (api.rst 5).
        while True:
            try:
                result = self.cpu.run()
            except ValueError:
                if self.cpu.vcpu.closed:
                    return
                raise
            if result.answer == Errno.EINTR:
                if self._stop.is_set():
                    return
            elif isinstance(result.exit, MmioExit) and result.answer == 0:
                self.mmio_exits += 1
                self.cpu.vcpu.kvm_run.mmio.data = bytes(8)
            elif self._accepts(result):
                self.accepted += 1
            else:
                self.result = result
                return

    @property
    def inside(self) -> bool:
        """Whether the vCPU is still in its program."""
        return self._thread.is_alive()

    def wait_out(self, limit: float = 10.0) -> RunResult:
        """Wait until the vCPU has left its program by itself; the result it left with."""
        wait_until(lambda: not self.inside, "the vCPU leaves its program", limit)
        assert self.result is not None
        return self.result

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()

        def ended() -> bool:
            if self.inside:
                self.cpu.vcpu.kick()
            return not self.inside

        wait_until(ended, "the vCPU is out of the kernel")
        _wait_out(self._thread)
        self.cpu.vcpu.forget_kick()

    def __repr__(self) -> str:
        return f"{self.result}, {self.mmio_exits} MMIO and {self.accepted} accepted exits; {self.cpu.vcpu.where()}"


def patrol(cpu: GuestCpu, gpa: int, pages: int, stamp: int, other: int | None = None, *, write: bool = True) -> None:
    """Start the guest on a round of pages that never ends, unless one holds other values than 0, `stamp` and `other`.

    With `write` it stamps the pages that it finds zero.
    """
    end = gpa + pages * PAGE_SIZE
    wanted = stamp if other is None else other
    cpu.start("patrol", rdi=gpa, r8=gpa, r9=end, rsi=stamp, rdx=wanted, rbx=stamp if write else 0)


class Dirt:
    """Foreign memory: an action that writes into fresh pages all over and frees them, so that others get them next.

    Whoever still sees a freed page through a stale mapping sees `BYTE`.
    """

    BYTE = 0xA5

    def __init__(self, pages: int = 64) -> None:
        self._memory = Mapping.anonymous(pages * PAGE_SIZE)
        self._memory.advise(Advice.NOHUGEPAGE)

    def __call__(self) -> None:
        self._memory.fill(self.BYTE)
        self._memory.advise(Advice.DONTNEED)

    def close(self) -> None:
        """Unmap it."""
        self._memory.unmap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
