"""A second guest for what is left of a run: the two come towards each other, and every test has one verdict."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scripted_guests import (
    GOODBYE,
    GREETING,
    PANIC,
    RUN_END,
    RUN_START,
    Scripted,
    Step,
    console,
    control,
    passing,
    plan,
    reason,
    record,
    verdicts,
)

from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.guest.qemu import Line
from kvmgmem.lab.guest.selection import Selection
from kvmgmem.lab.supervision.lane import Lane
from kvmgmem.lab.supervision.supervisor import Supervisor
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import exit_code

LIMIT = 5.0
EVERY = ("a", "b", "c", "d", "e")


class Asking:
    """A step of a guest's script: whoever started the run has room for a second guest."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.added: list[bool] = []

    def __call__(self) -> list[Line]:
        assert self.supervisor is not None
        self.added.append(self.supervisor.add_guest())
        return []

    def of(self, scripted: Scripted) -> Scripted:
        """The run whose supervisor is asked."""
        self.supervisor = scripted.supervisor
        return scripted


def event() -> tuple[Callable[[], list[Line]], Callable[[], list[Line]]]:
    """A step that says something has come to pass, and one that waits for it."""
    passed = threading.Event()

    def say() -> list[Line]:
        passed.set()
        return []

    def wait() -> list[Line]:
        assert passed.wait(LIMIT)
        return []

    return say, wait


def begins(test: str) -> Line:
    return record("test-start", test=test)


def ends(test: str) -> Line:
    return record("test-end", test=test, verdict="passed")


def told(results: Path, kind: str) -> list[str]:
    """The tests in records of this kind, each as often as there is one."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return sorted(found["test"] for found in records if found["record"] == kind)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Where a run's records go."""
    return tmp_path / "results.jsonl"


def test_two_guests_meet_and_stop_there(results: Path) -> None:
    """The second begins with the last test, knows what is done and what is open, and neither does what the other has."""
    helper_is_there, await_helper = event()
    ask = Asking()
    first: list[Step] = [
        [*GREETING, RUN_START, plan(*EVERY), *passing("a"), begins("b")],
        ask,
        await_helper,
        [ends("b"), begins("c"), begins("never"), ends("never")],
    ]
    second: list[Step] = [
        [*GREETING, RUN_START, plan("e", "d", "c"), *passing("e"), *passing("d"), begins("c")],
        helper_is_there,
        [ends("c"), begins("b"), begins("nor this")],
    ]
    scripted = ask.of(Scripted(results, first, second))
    run = scripted.run()
    assert ask.added == [True]
    assert verdicts(run) == dict.fromkeys(EVERY, Verdict.PASSED)
    assert told(results, "test-start") == told(results, "test-end") == list(EVERY)
    assert run.complete
    assert exit_code(run) == ExitCode.OK
    (word,) = scripted.guests[1].words
    assert (word["backwards"], word["share"], word["done"]) == (True, [0, 1], ["a", "b"])
    assert scripted.guests[0].words[0]["backwards"] is False


def test_what_the_kernel_says_last_is_heard(results: Path) -> None:
    """The console may lag: a complaint about the last test of a guest that is stopped where they meet is not lost."""
    helper_is_there, await_helper = event()
    ask = Asking()
    first: list[Step] = [[*GREETING, RUN_START, plan("a", "b"), *passing("a")], ask, await_helper, [begins("b")]]
    second: list[Step] = [[*GREETING, RUN_START, plan("b"), begins("b")], helper_is_there, [ends("b"), begins("a")]]
    scripted = ask.of(Scripted(results, first, second))
    complaint = console(
        "[    2.000001] ------------[ cut here ]------------",
        "[    2.000002] WARNING: virt/kvm/x.c:1 at bind+0x1/0x2, CPU#0: x/1",
        "[    2.000003] ---[ end trace 0000000000000000 ]---",
    )
    scripted.guests[0].last_words = complaint
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED, "kernel::between-tests#1": Verdict.SPLAT}
    assert "virt/kvm/x.c:1" in reason(run, "kernel::between-tests#1")
    assert "(after a)" in reason(run, "kernel::between-tests#1")


def test_a_guest_that_panics_goes_on_with_what_the_other_has_not(results: Path) -> None:
    """Whichever it is: it is started again from its own end, without the tests of the other one."""
    helper_is_there, await_helper = event()
    first_is_back, await_first = event()
    ask = Asking()
    first: list[Step] = [
        [*GREETING, RUN_START, plan(*EVERY), begins("a")],
        ask,
        await_helper,
        PANIC,
    ]
    second: list[Step] = [
        [*GREETING, RUN_START, plan("e", "d", "c", "b"), *passing("e"), begins("d")],
        helper_is_there,
        await_first,
        [ends("d"), begins("c")],
    ]
    again: list[Step] = [
        [*GREETING, RUN_START, plan("b", "c"), *passing("b"), begins("c")],
        first_is_back,
        [ends("c")],
        [begins("d")],
    ]
    scripted = ask.of(Scripted(results, first, second, again))
    run = scripted.run()
    assert verdicts(run) == {**dict.fromkeys("bcde", Verdict.PASSED), "a": Verdict.PANICKED}
    assert scripted.guests[2].words[0]["done"] == ["a", "d", "e"]
    assert scripted.guests[2].words[0]["backwards"] is False
    assert told(results, "test-start") == told(results, "test-end") == list(EVERY)


def test_what_one_gives_up_the_other_does(results: Path) -> None:
    """A boot that comes to nothing ends a guest's part; its tests are not lost while another comes towards them."""
    helper_is_there, await_helper = event()
    ask = Asking()

    def await_giving_up() -> list[Line]:
        deadline = time.monotonic() + LIMIT
        while not any("giving up" in note for note in scripted.notes):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return []

    first: list[Step] = [[*GREETING, RUN_START, plan("a", "b", "c"), begins("a")], ask, await_helper, PANIC]
    second: list[Step] = [
        [*GREETING, RUN_START, plan("c", "b"), begins("c")],
        helper_is_there,
        await_giving_up,
        [ends("c"), *passing("b"), RUN_END, GOODBYE],
    ]
    nothing: list[Step] = [[*GREETING, RUN_START, plan("b")], PANIC]
    scripted = ask.of(Scripted(results, first, second, nothing))
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PANICKED, "b": Verdict.PASSED, "c": Verdict.PASSED}
    assert told(results, "test-end") == ["a", "b", "c"]
    assert run.complete


def test_what_both_give_up_was_not_run(results: Path) -> None:
    """And says why; silence is never success."""
    helper_is_there, await_helper = event()
    ask = Asking()
    first: list[Step] = [[*GREETING, RUN_START, plan(*EVERY), begins("a")], ask, await_helper, PANIC]
    second: list[Step] = [[*GREETING, RUN_START, plan("e", "d", "c", "b"), begins("e")], helper_is_there, PANIC]
    nothing: list[Step] = [[*GREETING, RUN_START, plan("b")], PANIC]
    run = ask.of(Scripted(results, first, second, list(nothing), list(nothing))).run()
    assert {verdicts(run)[test] for test in "ae"} == {Verdict.PANICKED}
    assert {verdicts(run)[test] for test in "bcd"} == {Verdict.NOT_RUN}
    assert "ended before a test began" in reason(run, "b")


def test_a_second_guest_that_does_not_come_is_no_error(results: Path) -> None:
    """The first one does it all, and somebody reads why it was alone."""
    says_goodbye, await_goodbye = event()
    ask = Asking()
    first: list[Step] = [
        [*GREETING, RUN_START, plan("a", "b"), begins("a")],
        ask,
        await_goodbye,
        [ends("a"), *passing("b"), RUN_END, GOODBYE],
    ]
    second: list[Step] = [
        [*GREETING, control("goodbye", exit=4, signal=None, output="kvmgmem: error: it is dark")],
        says_goodbye,
    ]
    scripted = ask.of(Scripted(results, first, second))
    run = scripted.run()
    assert verdicts(run) == dict.fromkeys("ab", Verdict.PASSED)
    assert any("there is no second guest: in the guest: it is dark" in note for note in scripted.notes)


@pytest.mark.parametrize("request_", [{"guests": 2}, {"counters": Path("/nowhere")}], ids=["several", "counters"])
def test_not_every_run_takes_a_second_guest(results: Path, request_: dict[str, Any]) -> None:
    """One of several guests has no other end to begin at; and counters die with a guest that is stopped on its way."""
    ask = Asking()
    script: list[Step] = [[*GREETING, RUN_START, plan("a")], ask, [*passing("a"), RUN_END, GOODBYE]]
    share: list[Step] = [[*GREETING, control("goodbye", exit=5, signal=None, output="")]]
    scripted = ask.of(Scripted(results, script, *([share] if "guests" in request_ else []), **request_))
    run = scripted.run()
    assert ask.added == [False]
    assert verdicts(run) == {"a": Verdict.PASSED}
    assert scripted.supervisor.add_guest() is False


def test_one_of_several_guests_that_are_still_to_start_is_not_alone(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demand that comes between the start of the first and that of the second is no demand for a third."""
    asked, await_asked = event()
    ask = Asking()
    start = Supervisor._start_lane

    def start_late(supervisor: Supervisor, lane: Lane) -> None:
        if lane.number == 1:
            await_asked()
        start(supervisor, lane)

    monkeypatch.setattr(Supervisor, "_start_lane", start_late)
    script: list[Step] = [[*GREETING, RUN_START, plan("a")], ask, asked, [*passing("a"), RUN_END, GOODBYE]]
    share: list[Step] = [[*GREETING, control("goodbye", exit=5, signal=None, output="")]]
    run = ask.of(Scripted(results, script, share, guests=2)).run()
    assert ask.added == [False]
    assert verdicts(run) == {"a": Verdict.PASSED}


@dataclass(frozen=True)
class Item:
    nodeid: str


@pytest.mark.parametrize(("backwards", "left"), [(False, ["a", "c"]), (True, ["c", "a"])])
def test_the_runner_begins_at_the_end_it_is_told(backwards: bool, left: list[str]) -> None:
    """What another guest has done or begun is left out at either end."""
    items = [Item(name) for name in ("a", "b", "c")]
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    session = SimpleNamespace(items=items, config=SimpleNamespace(hook=hook))
    word = {"share": [0, 1], "done": ["b"], "backwards": backwards}
    Selection(lambda: word).pytest_collection_finish(cast(pytest.Session, session))
    assert [item.nodeid for item in session.items] == left
