"""Memory that runs short in the middle of one call: its n-th allocation fails, and what the call answers then.

Linux does it on demand (Documentation/fault-injection/fault-injection.rst, CONFIG_FAULT_INJECTION): a thread's fail-nth
counts its allocations down, and debugfs says which allocations take part. The knobs there are the whole kernel's. They are
set as long as a `MemoryShortage` lasts and put back at its end, so it belongs into a guest.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from kvmgmem import entry, host
from kvmgmem._native import ffi, lib
from kvmgmem.errors import Errno, HarnessError
from kvmgmem.syscalls import NUMBER

T = TypeVar("T")
U64 = 0xFFFF_FFFF_FFFF_FFFF

COUNTER = Path("/proc/thread-self/fail-nth")
FILTER = Path("/proc/thread-self/make-it-fail")
INJECTORS = ("failslab", "fail_page_alloc")

LASTING_FAILURES = 64
"""How many allocations a lasting shortage fails. Not all for ever: a page fault of the host's own is retried until it has
its page (mm/oom_kill.c:pagefault_out_of_memory), and would never end."""

# Allocations that may sleep take part, of single pages too, and nothing is said about it in the kernel's log.
_KNOBS = {
    "ignore-gfp-wait": "N",
    "ignore-gfp-highmem": "N",
    "min-order": "0",
    "cache-filter": "N",
    "verbose": "0",
    "interval": "1",
    "space": "0",
}


class Shortage(StrEnum):
    """How long memory stays short once the n-th allocation has failed."""

    MOMENTARY = "momentary"
    """That allocation alone fails: what falls back on another one is seen to."""
    LASTING = "lasting"
    """Those after it fail too, LASTING_FAILURES of each sort: what tries again with more effort fails as well."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call answered, whether it came to the allocation that was to fail, and how many it had made by then."""

    nth: int
    answer: T
    injected: bool
    allocations: int


class MemoryShortage:
    """A context in which allocations of the calling thread can be made to fail, in one call at a time.

    Needs root, debugfs and CONFIG_FAULT_INJECTION_DEBUG_FS; raises `HarnessError` that says which is missing. It belongs to
    the thread that enters it. Other threads must not call into the kernel through this package while a call is made.
    """

    def __init__(self, shortage: Shortage = Shortage.MOMENTARY) -> None:
        self.shortage = shortage
        self._raw = ffi.new("struct kvmgmem_fail_nth *")
        self._before: dict[Path, str] = {}
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._set_knobs()
            self._raw.counter_fd = self._open(COUNTER)
            self._raw.filter_fd = self._open(FILTER) if self.shortage is Shortage.LASTING else -1
        except OSError as error:
            self._leave()
            raise HarnessError(
                f"allocations cannot be made to fail: {error.filename}: {os.strerror(error.errno or 0)}",
                "it needs root, debugfs, and a kernel with CONFIG_FAULT_INJECTION_DEBUG_FS (flavour debug)",
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _set_knobs(self) -> None:
        lasting = self.shortage is Shortage.LASTING
        wanted = {**_KNOBS, "task-filter": "Y" if lasting else "N", "times": str(LASTING_FAILURES)}
        for injector in INJECTORS:
            # First, whoever set it: without the filter it would be everybody's allocations that fail.
            self._set(injector, "probability", "0")
            for knob, value in wanted.items():
                # min-order and ignore-gfp-highmem are of pages, cache-filter is of slabs; the rest everybody has.
                if knob in ("times", "verbose") or (host.DEBUGFS / injector / knob).exists():
                    self._set(injector, knob, value)
            # Last, because from then on they fail, if only for threads that are marked.
            if lasting:
                self._set(injector, "probability", "100")

    def _set(self, injector: str, knob: str, value: str) -> None:
        place = host.DEBUGFS / injector / knob
        self._before.setdefault(place, place.read_text().strip())
        place.write_text(value)

    def _open(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def _leave(self) -> None:
        """Put the knobs back, with none to fail until the filter is what it was: the probability was the first to be set."""
        for place in self._before:
            if place.name == "probability":
                place.write_text("0")
        for place, value in reversed(self._before.items()):
            place.write_text(value)
        for fd in self._fds:
            os.close(fd)
        self._before, self._fds = {}, []

    def call(self, nth: int, what: Callable[[], T]) -> Outcome[T]:
        """Let `what`, which must enter the kernel exactly once, do so while its n-th allocation (from 1) fails.

        0: none fails, for a control. Raises ValueError if `what` makes more entries or none, and `HarnessError` if the
        kernel cannot be told. What `what` returns is handed on; a KVM_RUN has no deadline here.
        """
        self._raw.nth, self._raw.left, self._raw.error = nth, nth, 0
        if self.shortage is Shortage.LASTING:
            for injector in INJECTORS:
                (host.DEBUGFS / injector / "times").write_text(str(LASTING_FAILURES))
        once = _Once(self._raw)
        with entry.through(once, **({"fail_nth": nth, "shortage": self.shortage.value} if nth else {})):
            answer = what()
        if self._raw.error:
            reason = Errno(self._raw.error).name
            raise HarnessError(
                f"an allocation cannot be made to fail: fail-nth answers {reason}",
                "the thread that calls must be the one that entered the MemoryShortage, and alive",
            )
        if once.entries != 1:
            raise ValueError(f"a call during which memory is short must enter the kernel once, not {once.entries} times")
        return Outcome(nth, answer, once.injected, nth - self._raw.left)


class _Once:
    """The binding's functions by their own names, each with the allocation failure around it."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.entries = 0

    @property
    def injected(self) -> bool:
        """Whether the call came to the allocation that was to fail."""
        return bool(self._raw.nth > 0 and self._raw.left == 0)

    def _enter(self) -> None:
        self.entries += 1
        if self.entries > 1:
            raise ValueError("a call during which memory is short must enter the kernel once")

    def kvmgmem_syscall(self, number: int, *arguments: int) -> int:
        self._enter()
        return int(lib.kvmgmem_fail_nth_syscall(self._raw, number, *(argument & U64 for argument in arguments)))

    def kvmgmem_ioctl(self, fd: int, request: int, argument: int) -> int:
        return self.kvmgmem_syscall(NUMBER["ioctl"], fd, request, argument, 0, 0, 0)

    def kvmgmem_ioctl_ptr(self, fd: int, request: int, pointer: Any) -> int:
        return self.kvmgmem_ioctl(fd, request, entry.address_of(pointer))

    def kvmgmem_vcpu_run(self, fd: int, run: object, runner: Any, deadline_ns: int) -> int:
        # The timer of a deadline would be an allocation of its own.
        runner.expired = 0
        return self.kvmgmem_ioctl(fd, lib.KVM_RUN, 0)

    def kvmgmem_load(self, address: int, width: int, fault: Any) -> int:
        self._enter()
        return int(lib.kvmgmem_fail_nth_load(self._raw, address, width, fault))

    def kvmgmem_store(self, address: int, width: int, value: int, fault: Any) -> None:
        self._enter()
        lib.kvmgmem_fail_nth_store(self._raw, address, width, value, fault)
