"""`kvmgmem.fail_nth` around one call: files stand in for the kernel's, and a call that writes into them for its counting."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import entry, fail_nth, host, syscalls
from kvmgmem._native import ffi
from kvmgmem.errors import Errno, HarnessError
from kvmgmem.fail_nth import LASTING_FAILURES, MemoryShortage, Shortage
from kvmgmem.memory import Fault, Mapping
from kvmgmem.trace.recorder import recording
from kvmgmem.trace.steps import build

KNOBS = ("ignore-gfp-wait", "task-filter", "probability", "times", "interval", "space", "verbose")
OF_PAGES = ("ignore-gfp-highmem", "min-order")
OF_SLABS = ("cache-filter",)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with files like those of a kernel that can let allocations fail; each knob holds "7"."""
    for injector, more in (("failslab", OF_SLABS), ("fail_page_alloc", OF_PAGES)):
        (tmp_path / injector).mkdir()
        for knob in (*KNOBS, *more):
            (tmp_path / injector / knob).write_text("7\n")
    for name in ("fail-nth", "make-it-fail"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(host, "DEBUGFS", tmp_path)
    monkeypatch.setattr(fail_nth, "COUNTER", tmp_path / "fail-nth")
    monkeypatch.setattr(fail_nth, "FILTER", tmp_path / "make-it-fail")
    return tmp_path


def knobs(kernel: Path) -> dict[str, str]:
    """What stands in every knob, by injector and name."""
    found = sorted([*kernel.glob("failslab/*"), *kernel.glob("fail_page_alloc/*")])
    return {f"{place.parent.name}/{place.name}": place.read_text().strip() for place in found}


class Written:
    """A call that writes a text into a file: what a kernel does to its counter, say."""

    def __init__(self, path: Path, text: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._text = ffi.new("char[]", text.encode())
        self._length = len(text)

    def __call__(self) -> object:
        return syscalls.pwrite(self._fd, entry.address_of(self._text), self._length)

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.parametrize(("left", "injected"), [("0", True), ("3", False), ("12", False)])
def test_an_allocation_failed_if_the_counter_came_to_zero(kernel: Path, left: str, injected: bool) -> None:
    """What the counter holds after the call says whether it came to its n-th allocation; then it is disarmed."""
    count = Written(kernel / "fail-nth", f"{left}\n")
    with MemoryShortage() as memory:
        outcome = memory.call(40, count)
    count.close()
    assert (outcome.nth, outcome.answer, outcome.injected) == (40, len(left) + 1, injected)
    assert outcome.allocations == 40 - int(left)
    assert (kernel / "fail-nth").read_text()[0] == "0"


def test_nothing_fails_with_nth_zero(kernel: Path) -> None:
    """Without an allocation that is to fail none was injected, although the counter stands at zero."""
    with MemoryShortage() as memory:
        assert memory.call(0, lambda: syscalls.munmap(1, 0)).injected is False


@pytest.mark.parametrize("shortage", list(Shortage))
def test_the_counter_is_armed_during_the_call_alone(kernel: Path, shortage: Shortage) -> None:
    """During the call the counter holds n, and a lasting shortage has marked the thread; before and after neither does."""
    seen: dict[str, str] = {}
    buffer = ffi.new("char[]", 8)
    for name, armed in (("fail-nth", "5"), ("make-it-fail", "1" if shortage is Shortage.LASTING else "")):
        fd = os.open(kernel / name, os.O_RDONLY)
        with MemoryShortage(shortage) as memory:
            assert os.pread(fd, 8, 0) in (b"", b"0")
            length = memory.call(5, lambda: syscalls.pread(fd, entry.address_of(buffer), 8)).answer  # noqa: B023
            seen[name] = ffi.buffer(buffer)[:length].decode()
            assert seen[name] == armed
            assert os.pread(fd, 8, 0) in (b"", b"0")
        os.close(fd)


@pytest.mark.parametrize(
    ("shortage", "marked", "probability"), [(Shortage.MOMENTARY, "N", "0"), (Shortage.LASTING, "Y", "100")]
)
def test_knobs_are_set_and_put_back(kernel: Path, shortage: Shortage, marked: str, probability: str) -> None:
    """Within the context sleeping allocations take part, silently; after it all knobs are as before, whatever ended it."""
    before = knobs(kernel)
    within: dict[str, str] = {}

    def fail() -> None:
        with MemoryShortage(shortage):
            within.update(knobs(kernel))
            raise RuntimeError("from within")

    with pytest.raises(RuntimeError, match="from within"):
        fail()
    for injector in fail_nth.INJECTORS:
        assert within[f"{injector}/ignore-gfp-wait"] == "N"
        assert within[f"{injector}/verbose"] == "0"
        assert within[f"{injector}/task-filter"] == marked
        assert within[f"{injector}/probability"] == probability
        assert within[f"{injector}/times"] == str(LASTING_FAILURES)
    assert (within["fail_page_alloc/min-order"], within["failslab/cache-filter"]) == ("0", "N")
    assert knobs(kernel) == before


@pytest.mark.parametrize("shortage", list(Shortage))
def test_no_allocation_is_to_fail_while_knobs_are_set(
    kernel: Path, shortage: Shortage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probability that somebody left is 0 before any other knob is touched, on the way in and on the way out."""
    written: list[tuple[str, str, str]] = []
    write = Path.write_text

    def note(path: Path, text: str) -> int:
        probability = (path.parent / "probability").read_text().strip()
        written.append((path.parent.name, path.name, probability))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", note)
    with MemoryShortage(shortage):
        pass
    for injector in fail_nth.INJECTORS:
        others = [standing for where, knob, standing in written if where == injector and knob != "probability"]
        assert others == ["0"] * len(others)
        assert len(others) == 2 * (len(KNOBS) - 1 + len(OF_PAGES if injector == "fail_page_alloc" else OF_SLABS))


def test_each_call_has_all_the_failures_of_a_lasting_shortage(kernel: Path) -> None:
    """However many allocations one call failed, the next one meets as many failures."""
    with MemoryShortage(Shortage.LASTING) as memory:
        for injector in fail_nth.INJECTORS:
            (kernel / injector / "times").write_text("0")
        memory.call(1, lambda: syscalls.munmap(1, 0))
        assert [knobs(kernel)[f"{injector}/times"] for injector in fail_nth.INJECTORS] == [str(LASTING_FAILURES)] * 2


@pytest.mark.parametrize("entries", [0, 2])
def test_a_call_enters_the_kernel_exactly_once(kernel: Path, entries: int) -> None:
    """What makes no entry into the kernel, or a second one, would prove nothing: it is refused, the binding put back."""
    usual = entry.native
    with MemoryShortage() as memory, pytest.raises(ValueError, match="must enter the kernel once"):
        memory.call(1, lambda: [syscalls.munmap(1, 0) for _ in range(entries)])
    assert entry.native is usual


@pytest.mark.parametrize("shortage", list(Shortage))
def test_a_recording_sees_the_call(kernel: Path, shortage: Shortage) -> None:
    """A trace has the call with the allocation that was to fail, and whether it came to that; calls around it are plain."""
    lines: list[dict[str, Any]] = []
    untouched, touched = Written(kernel / "fail-nth", "3\n"), Written(kernel / "fail-nth", "0\n")
    with recording(lines.append, {}), MemoryShortage(shortage) as memory, Mapping.anonymous(4096) as mapping:
        assert not memory.call(9, untouched).injected
        outcome = memory.call(7, touched)
        mapping.store(1)
        memory.call(2, lambda: mapping.try_store(2))
        memory.call(0, mapping.try_load)
    untouched.close()
    touched.close()
    assert (outcome.answer, outcome.injected) == (2, True)
    steps = build(lines).steps
    told = [
        (step.call, step.fail_nth, step.shortage, step.injected)
        for step in steps
        if step.call not in ("mmap", "munmap", "found")
    ]
    assert told == [
        ("pwrite64", 9, shortage.value, False),
        ("pwrite64", 7, shortage.value, True),
        ("store", 0, "", False),
        ("store", 2, shortage.value, False),
        ("load", 0, "", False),
    ]


def test_answers_of_all_sorts_come_through(kernel: Path) -> None:
    """System calls, ioctls and guarded accesses answer as they do without a shortage."""
    with MemoryShortage() as memory, Mapping.anonymous(4096) as mapping, Mapping.anonymous(4096, prot=0) as closed:
        assert memory.call(1, lambda: entry.ioctl(-1, 0xAE00)).answer == Errno.EBADF
        assert memory.call(1, lambda: syscalls.munmap(1, 0)).answer == Errno.EINVAL
        assert memory.call(1, lambda: mapping.try_store(0x1234, 8)).answer is None
        assert memory.call(1, lambda: mapping.try_load(8)).answer == 0x1234
        fault = memory.call(1, lambda: closed.try_load(16)).answer
        assert isinstance(fault, Fault)
        assert (fault.signal, fault.address) == (signal.SIGSEGV, closed.address + 16)
        assert (kernel / "fail-nth").read_text()[0] == "0"


def test_a_counter_that_cannot_be_set_is_said(kernel: Path) -> None:
    """If the kernel does not take the count, the call is not made, and the error names what it answered."""
    with MemoryShortage() as memory:
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), memory._fds[0], inheritable=False)
        with Mapping.anonymous(4096) as mapping, pytest.raises(HarnessError, match="fail-nth answers EBADF"):
            memory.call(1, lambda: mapping.try_store(1))
        assert mapping._mapped is False


def test_a_kernel_without_the_option_is_said(kernel: Path) -> None:
    """Without fault injection in the kernel the error names the file that is missing, and nothing stays changed."""
    before = knobs(kernel)
    (kernel / "fail-nth").unlink()
    with pytest.raises(HarnessError, match=f"fail-nth: {os.strerror(errno.ENOENT)}") as caught, MemoryShortage():
        pass
    assert "CONFIG_FAULT_INJECTION_DEBUG_FS" in caught.value.hint
    assert knobs(kernel) == before
    (kernel / "failslab" / "probability").unlink()
    with pytest.raises(HarnessError, match="failslab/probability"), MemoryShortage():
        pass
    assert threading.active_count() == 1
