"""The supervisor: against scripted guests in no time, and against real ones that panic, hang, lie and go silent.

The real ones boot a kernel under TCG: that of $KVMGMEM_TEST_KERNEL, or the base kernel last built (`kvmgmem kernel build`).
"""

import base64
import contextlib
import json
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_guests import (
    GOODBYE,
    GREETING,
    MACHINE,
    PANIC,
    RUN_END,
    RUN_START,
    Scripted,
    ScriptedQemu,
    console,
    control,
    passing,
    plan,
    reason,
    record,
    shutdown,
    verdicts,
)

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.guest.initramfs import ImageRequest, archive, build_image
from kvmgmem.lab.guest.machine import CONSOLE, QMP, RESULTS, Machine, require_kernel_image, require_qemu
from kvmgmem.lab.guest.qemu import MAX_LINE, Line, LineCutter, Qemu
from kvmgmem.lab.guest.snapshot import KEPT
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.supervision.ending import Cause, Ending, init_failure, no_test_started, silence_text
from kvmgmem.lab.supervision.lane import Lane
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.result_channel import split_garbage
from kvmgmem.lab.supervision.supervisor import Request, Supervisor
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, exit_code, read_run

RUNNER = Path(__file__).with_name("misbehaving_runner.py")


# --- scripted guests --------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Where a run's records go."""
    return tmp_path / "results.jsonl"


def test_a_run_without_trouble_is_a_success(results: Path) -> None:
    """Hello, job, records, end of the run, goodbye: exit code 0, and the job was sent once."""
    scripted = Scripted(results, [[*GREETING], [RUN_START, plan("a", "b"), *passing("a"), *passing("b"), RUN_END, GOODBYE]])
    run = scripted.run()
    assert exit_code(run) == ExitCode.OK
    assert run.complete
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED}
    preparation = scripted.guests[0].sent[0][1]
    assert preparation["accelerator"] == "tcg"
    assert preparation["environment"] == {"KVMGMEM_TIME_SCALE": "1"}
    assert [word["done"] for word in scripted.guests[0].words] == [[]]


def test_a_panic_is_charged_to_the_open_test_and_the_rest_is_run(results: Path) -> None:
    """The panicking test is not run again; the tests after it are, and the first boot's results are kept."""
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a", "b", "c"), *passing("a"), record("test-start", test="b")], PANIC],
        [[*GREETING, RUN_START, plan("c"), *passing("c"), RUN_END, GOODBYE]],
    )
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PANICKED, "c": Verdict.PASSED}
    assert exit_code(run) == ExitCode.KERNEL
    assert "sysrq triggered crash" in reason(run, "b")
    assert scripted.guests[1].words[0]["done"] == ["a", "b"]
    (panicked,) = [outcome.end for outcome in run.tests if outcome.end.test == "b"]
    assert panicked.kernel_log[0].endswith("Kernel panic - not syncing: sysrq triggered crash")
    assert panicked.repeat == "kvmgmem vm -- b"


def test_a_panic_with_no_test_open_counts_as_well(results: Path) -> None:
    """It is nobody's fault in particular, and still no success."""
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a", "b"), *passing("a")], PANIC],
        [[*GREETING, RUN_START, plan("b"), *passing("b"), RUN_END, GOODBYE]],
    )
    run = scripted.run()
    assert exit_code(run) == ExitCode.KERNEL
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED, "kernel::between-tests#1": Verdict.PANICKED}
    assert "(after a)" in reason(run, "kernel::between-tests#1")


WARNING = console(
    "[    2.000001] ------------[ cut here ]------------",
    "[    2.000002] WARNING: virt/kvm/x.c:1 at bind+0x1/0x2, CPU#0: x/1",
    "[    2.000003] ---[ end trace 0000000000000000 ]---",
)


def test_a_warning_makes_a_passed_test_a_splat(results: Path) -> None:
    """The runner in the guest saw nothing; the console did, and its lines are in the record."""
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), *WARNING]
    run = Scripted(
        results, [[*script, record("test-end", test="a", verdict="passed"), *passing("b"), RUN_END, GOODBYE]]
    ).run()
    assert verdicts(run) == {"a": Verdict.SPLAT, "b": Verdict.PASSED}
    assert exit_code(run) == ExitCode.KERNEL
    (splat,) = [outcome.end for outcome in run.tests if outcome.end.test == "a"]
    assert len(splat.kernel_log) == 3
    assert "passed" in splat.detail


def test_a_warning_between_tests_is_not_lost(results: Path) -> None:
    """No test was open: it is charged to the time between tests, with the test before it named."""
    script = [*GREETING, RUN_START, plan("a", "b"), *passing("a"), *WARNING, *passing("b"), RUN_END, GOODBYE]
    run = Scripted(results, [script]).run()
    assert verdicts(run)["kernel::between-tests#1"] is Verdict.SPLAT
    assert "(after a)" in reason(run, "kernel::between-tests#1")


def test_a_warning_that_the_runner_reported_is_not_counted_twice(results: Path) -> None:
    """The console may lag behind the result channel."""
    end = record(
        "test-end",
        test="a",
        verdict="splat",
        reason="kernel warning",
        kernel_log=["WARNING: virt/kvm/x.c:1 at bind+0x1/0x2, CPU#0: x/1"],
    )
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), end, *WARNING, *passing("b")]
    assert verdicts(Scripted(results, [[*script, RUN_END, GOODBYE]]).run()) == {"a": Verdict.SPLAT, "b": Verdict.PASSED}


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [("WARNING: virt/kvm/x.c:1 at bind+0x1/0x2, CPU#0: x/1", Verdict.KNOWN_BUG), ("WARNING: other", Verdict.SPLAT)],
)
def test_a_warning_that_the_runner_took_for_a_known_bug_stays_one(results: Path, seen: str, verdict: Verdict) -> None:
    """What a test's own record holds its runner has judged: it saw the same lines, and knows the test's known bugs."""
    end = record("test-end", test="a", verdict="known-bug", bugs_shown=["B27"], kernel_log=[seen])
    script = [*GREETING, RUN_START, plan("a"), record("test-start", test="a"), *WARNING, end, RUN_END, GOODBYE]
    assert verdicts(Scripted(results, [script]).run()) == {"a": verdict}


def test_a_warning_that_reaches_the_console_late_is_not_the_next_tests(results: Path) -> None:
    """Linux 7.3 prints from a thread: what test a's record holds may come when test b runs already."""
    told = record("test-end", test="a", verdict="splat", kernel_log=["WARNING: virt/kvm/x.c:1 at bind+0x1/0x2, CPU#0: x/1"])
    late = [record("test-start", test="b"), *WARNING, record("test-end", test="b", verdict="passed")]
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), told, *late, RUN_END, GOODBYE]
    assert verdicts(Scripted(results, [script]).run()) == {"a": Verdict.SPLAT, "b": Verdict.PASSED}


def test_a_warning_while_booting_is_a_note(results: Path) -> None:
    """It belongs to no test, and says nothing about what is tested; it is told all the same."""
    run = Scripted(results, [[*GREETING, *WARNING, RUN_START, plan("a"), *passing("a"), RUN_END, GOODBYE]]).run()
    assert exit_code(run) == ExitCode.OK
    assert any("while booting: kernel warning: WARNING: virt/kvm/x.c:1" in note for note in run.notes)


OOPS = console(
    "[    2.000001] BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "[    2.000002] Oops: Oops: 0002 [#1] SMP NOPTI",
    "[    2.000003] ---[ end trace 0000000000000000 ]---",
)


def test_no_test_runs_on_a_kernel_that_oopsed(results: Path) -> None:
    """The test under which it oopsed ends; what comes after it from this kernel is not even heard."""
    oopsing = [record("test-start", test="a"), *OOPS, record("test-end", test="a", verdict="passed")]
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a", "b"), *oopsing, record("test-start", test="b")], None],
        [[*GREETING, RUN_START, plan("b"), *passing("b"), RUN_END, GOODBYE]],
    )
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.SPLAT, "b": Verdict.PASSED}
    assert "kernel oops" in reason(run, "a")


def test_a_test_that_never_ends_after_an_oops_is_charged(results: Path) -> None:
    """Its process died in the kernel, or waits for a lock for ever."""
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a"), record("test-start", test="a"), *OOPS], None],
    )
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PANICKED}
    assert "NULL pointer" in reason(run, "a")


TORN = console(
    "[    2.000002] Oops: int3: 0000 [#1] SMP NOPTI",
    "[    2.000003] ---[ end trace 0000000000000000 ]---",
)


def torn_boot(*tests: str, ends: bool = False) -> list[list[Line] | None]:
    """A boot whose first test meets a torn instruction, whether or not it comes to its end."""
    end = [record("test-end", test=tests[0], verdict="passed")] if ends else []
    return [[*GREETING, RUN_START, plan(*tests), record("test-start", test=tests[0]), *TORN, *end], None]


@pytest.mark.parametrize("ends", [False, True])
def test_what_only_the_emulator_did_is_no_verdict(results: Path, ends: bool) -> None:
    """A kernel that dies of an int3 under TCG with several CPUs is booted again, and the test is begun again."""
    last = [*GREETING, RUN_START, plan("a", "b"), *passing("a"), *passing("b"), RUN_END, GOODBYE]
    scripted = Scripted(results, torn_boot("a", "b", ends=ends), torn_boot("a", "b", ends=ends), [last])
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED}
    assert sum("a is begun again: kernel oops: Oops: int3" in note for note in scripted.notes) == 2
    assert exit_code(run) == ExitCode.OK


def test_what_the_emulator_did_between_tests_is_no_test_at_all(results: Path) -> None:
    """Neither a verdict nor a start without an end, which would read as a lost test."""
    torn = [[*GREETING, RUN_START, plan("a", "b"), *passing("a"), *TORN], None]
    last = [*GREETING, RUN_START, plan("b"), *passing("b"), RUN_END, GOODBYE]
    scripted = Scripted(results, torn, [last])
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED}
    assert any("the guest is begun again: kernel oops: Oops: int3" in note for note in scripted.notes)
    assert exit_code(run) == ExitCode.OK


@pytest.mark.parametrize(
    ("machine", "chances"), [(MACHINE, 5), (replace(MACHINE, cpus=1), 0), (replace(MACHINE, accelerator="kvm"), 0)]
)
def test_an_int3_that_comes_again_is_the_kernels_own(results: Path, machine: Machine, chances: int) -> None:
    """Five further chances and no more; none where no other CPU could have torn an instruction."""
    boots = [torn_boot("a") for _ in range(chances + 1)]
    run = Scripted(results, *boots, machine=machine).run()
    assert verdicts(run) == {"a": Verdict.PANICKED}
    assert "int3" in reason(run, "a")


def test_what_the_emulator_did_while_booting_costs_a_boot(results: Path) -> None:
    """A kernel switches most static keys then."""
    good = [*GREETING, RUN_START, plan("a"), *passing("a"), RUN_END, GOODBYE]
    assert verdicts(Scripted(results, [TORN, None], [good]).run()) == {"a": Verdict.PASSED}


@pytest.mark.parametrize(("machine", "boots"), [(MACHINE, 2), (replace(MACHINE, cpus=1), 1)])
def test_a_kernel_that_boots_into_an_int3_is_its_own_fault(results: Path, machine: Machine, boots: int) -> None:
    """The second time; or the first, where no other CPU could have torn an instruction."""
    scripted = Scripted(results, *([TORN, None] for _ in range(3)), machine=machine)
    with pytest.raises(HarnessError, match="int3") as caught:
        scripted.supervisor.run()
    assert caught.value.code is ExitCode.KERNEL
    assert len(scripted.machines) == boots


HOSTS_RIP = "AssertionError: exit=InternalErrorExit(suberror=3); rip=0xffffffff816c6b8c rdi=0x40002000 rax=0x59cd000"
SHUT_DOWN = "AssertionError: exit=OtherExit(reason=<ExitReason.SHUTDOWN: 8>), expired=False; rip=0xfff0 rdi=0x0 rax=0x0"


@pytest.mark.parametrize("why", [HOSTS_RIP, SHUT_DOWN])
def test_a_vcpu_that_is_lost_is_the_kernels_fault(results: Path, why: str) -> None:
    """TCG did that to guests on the first CPU, where none runs any more: there is no excuse for it."""
    end = record("test-end", test="a", verdict="failed", reason=why)
    failed = record("run-end", exit=1, counts={})
    scripted = Scripted(results, [[*GREETING, RUN_START, plan("a"), record("test-start", test="a"), end, failed, GOODBYE]])
    assert verdicts(scripted.run()) == {"a": Verdict.FAILED}
    assert len(scripted.machines) == 1


def test_silence_is_a_hang_and_an_nmi_asks_where(results: Path) -> None:
    """No record and no heartbeat; the monitor is told to inject an NMI before the guest is given up."""
    scripted = Scripted(results, [[*GREETING, RUN_START, plan("a"), record("test-start", test="a")], None])
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PANICKED}
    assert "no sign of life" in reason(run, "a")
    assert "all CPUs wait" in reason(run, "a")
    asked = [
        message.get("arguments", {}).get("command-line", message["execute"]) for _, message in scripted.guests[0].sent[-4:]
    ]
    assert asked == ["info registers -a", "info lapic 0", "info lapic 1", "inject-nmi"]


def test_a_hang_says_where_the_cpus_stand(results: Path) -> None:
    """As QEMU's monitor answers, behind what the console said; also where the kernel answers no NMI."""
    answer = Line(QMP, json.dumps({"return": "CPU#0\r\nRIP=ffffffff82d0c8d2 CPL=0 HLT=0\r\n"}).encode())
    silence: list[Line] = []
    steps = [*console("the last words"), record("test-start", test="a"), *console("late words")]
    run = Scripted(results, [[*GREETING, RUN_START, plan("a"), *steps], silence, [answer], None]).run()
    (outcome,) = run.tests
    assert outcome.end.kernel_log[-2:] == ("late words", "QEMU: CPU 0: rip=ffffffff82d0c8d2 cpl=0 hlt=0")


class Starved(ScriptedQemu):
    """A guest whose threads wait for a CPU of the host's, three of them all the time."""

    def starved_seconds(self) -> float:
        """Three seconds a second."""
        return 3 * (time.monotonic() - self.started)


@pytest.mark.parametrize(("guest", "waited"), [(ScriptedQemu, "1"), (Starved, "[2-4]")])
def test_a_guest_that_the_host_starves_has_longer_to_boot(results: Path, guest: type[ScriptedQemu], waited: str) -> None:
    """A busy host is not the kernel's fault; but it is waited for once, lest it hold us for ever."""
    scripted = Scripted(results, [], [], limits=Limits(boot=1))
    scripted._waiting[:] = [guest([[], None]), guest([[], None])]
    with pytest.raises(HarnessError, match=f"said nothing on its serial console within {waited} s"):
        scripted.run()
    text = results.read_text()
    assert text.count("the host is busy") == (2 if guest is Starved else 0)


class Beating(ScriptedQemu):
    """A guest whose init shows life where the script has silence."""

    def wait(self, timeout: float) -> list[Line]:
        """Hand out the next step, or a heartbeat."""
        if self._script and self._script[0] is None:
            time.sleep(0.02)
            return [control("heartbeat")]
        return super().wait(timeout)


def test_a_runner_that_is_stuck_in_a_live_guest_is_a_timeout(results: Path) -> None:
    """Heartbeats show that it is not the kernel."""
    scripted = Scripted(results, [])
    scripted._waiting[:] = [Beating([[*GREETING, RUN_START, plan("a"), record("test-start", test="a")], None])]
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.TIMEOUT}
    assert "the guest is alive" in reason(run, "a")


def test_a_test_has_the_time_that_its_runner_gives_it(results: Path) -> None:
    """Some tests may take longer than the rest: the runner ends them, and the supervisor waits for it to."""
    scripted = Scripted(results, [])
    start = record("test-start", test="a", limit=0.5)
    scripted._waiting[:] = [Beating([[*GREETING, RUN_START, plan("a"), start], None])]
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.TIMEOUT}
    assert "within 1 s" in reason(run, "a")


def test_a_runner_that_is_stuck_between_tests_costs_a_boot(results: Path) -> None:
    """A process that cannot be killed may hold the runner where no test is open, while init goes on beating."""
    scripted = Scripted(results, [], [[*GREETING, RUN_START, plan("b"), *passing("b"), RUN_END, GOODBYE]])
    scripted._waiting[0] = Beating([[*GREETING, RUN_START, plan("a", "b"), *passing("a")], None])
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PASSED, "b": Verdict.PASSED}
    assert any("did nothing between two tests" in note for note in run.notes)


@pytest.mark.parametrize(
    ("last", "verdict", "words"),
    [
        ([shutdown("guest-shutdown")], Verdict.ERROR, "powered off"),
        ([*console("[   9.000000] reboot: Restarting system"), shutdown("guest-reset")], Verdict.ERROR, "rebooted"),
        ([shutdown("guest-reset")], Verdict.PANICKED, "triple fault"),
        ([control("goodbye", exit=7, signal=None, output="")], Verdict.CRASHED, "status 7"),
        ([control("goodbye", exit=None, signal=11, output="")], Verdict.CRASHED, "signal 11"),
        (
            [
                *console("[   9.000000] Out of memory: Killed process 66 (python3) total-vm:1kB"),
                control("goodbye", exit=None, signal=9, output=""),
            ],
            Verdict.CRASHED,
            "ran out of memory and the kernel killed python3",
        ),
        ([control("goodbye", exit=None, signal=None, error="OSError: x", output="")], Verdict.ERROR, "init failed"),
        ([], Verdict.ERROR, "QEMU ended with status 0"),
    ],
)
def test_every_other_end_has_its_own_words(results: Path, last: list[Line], verdict: Verdict, words: str) -> None:
    """Power-off, reboot, reset, the runner's death and QEMU's own are told apart."""
    run = Scripted(results, [[*GREETING, RUN_START, plan("a"), record("test-start", test="a"), *last]]).run()
    assert verdicts(run) == {"a": verdict}
    assert words in reason(run, "a")


def test_garbage_is_charged_and_the_stream_is_found_again(results: Path) -> None:
    """A record right behind garbage on the same line still counts."""
    glued = Line(RESULTS, b"\xff\x00nonsense" + record("test-end", test="a", verdict="passed").data)
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), glued, *passing("b"), RUN_END, GOODBYE]
    run = Scripted(results, [script]).run()
    assert verdicts(run) == {"a": Verdict.ERROR, "b": Verdict.PASSED}
    assert "garbage on the result channel" in reason(run, "a")


def test_a_cut_record_is_charged_to_its_test(results: Path) -> None:
    """The next record begins in the middle of it."""
    cut = Line(RESULTS, b'{"record": "test-end", "te' + record("test-start", test="b").data)
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), cut]
    run = Scripted(results, [[*script, record("test-end", test="b", verdict="passed"), RUN_END, GOODBYE]]).run()
    assert verdicts(run) == {"a": Verdict.ERROR, "b": Verdict.PASSED}
    assert "cut in the middle" in reason(run, "a")


def test_a_test_whose_end_never_arrives_is_an_error(results: Path) -> None:
    """Also when nothing else is wrong."""
    script = [*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a"), *passing("b"), RUN_END, GOODBYE]
    run = Scripted(results, [script]).run()
    assert verdicts(run) == {"a": Verdict.ERROR, "b": Verdict.PASSED}


def test_an_internal_error_of_the_runner_is_named(results: Path) -> None:
    """Pytest ended in the middle of a test and said why: the test's record says it too."""
    said = """INTERNALERROR> Traceback (most recent call last):
INTERNALERROR>   File "/kvmgmem/kvmgmem/testing/session.py", line 144, in run
INTERNALERROR>     outcome = run_isolated(item, limit)
INTERNALERROR> ValueError: nothing left

no tests ran in 1.00s
"""
    end = control("goodbye", exit=4, signal=None, output=said)
    run = Scripted(results, [[*GREETING, RUN_START, plan("a"), record("test-start", test="a"), RUN_END, end]]).run()
    assert verdicts(run) == {"a": Verdict.ERROR}
    place = 'File "/kvmgmem/kvmgmem/testing/session.py", line 144, in run'
    assert reason(run, "a") == f"the runner failed: ValueError: nothing left ({place})"


def test_boots_are_bounded_and_the_rest_is_not_run(results: Path) -> None:
    """What never got its turn is reported as not run, never as passed, and the run is no success."""
    tests = [f"t{number}" for number in range(9)]
    boots = [[[*GREETING, RUN_START, plan(*tests), record("test-start", test=test)], PANIC] for test in tests]
    scripted = Scripted(results, *boots, boots=3)
    run = scripted.run()
    counted = list(verdicts(run).values())
    assert (counted.count(Verdict.PANICKED), counted.count(Verdict.NOT_RUN)) == (3, 6)
    assert "started 3 times" in reason(run, "t8")
    assert scripted.supervisor.boots == 3


def test_a_guest_that_keeps_dying_before_a_test_is_given_up(results: Path) -> None:
    """A loop of fruitless boots ends early."""
    dying = [[*GREETING, *PANIC]]
    scripted = Scripted(
        results, [[*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a")], PANIC], dying, dying, dying
    )
    run = scripted.run()
    assert verdicts(run) == {"a": Verdict.PANICKED, "b": Verdict.NOT_RUN}
    assert scripted.supervisor.boots == 2


def test_a_guest_that_ends_its_run_without_a_goodbye_has_not_finished(results: Path) -> None:
    """A positive end is required; here QEMU vanished right after the last record."""
    run = Scripted(results, [[*GREETING, RUN_START, plan("a"), *passing("a"), RUN_END]]).run()
    assert any("QEMU ended" in note for note in run.notes)


def test_what_the_runner_says_of_itself_is_not_lost(results: Path) -> None:
    """Tests passed, and pytest had an internal error: no success."""
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a"), *passing("a"), record("run-end", exit=4, counts={}, left_out=["x"]), GOODBYE]],
    )
    run = scripted.run()
    assert exit_code(run) == ExitCode.HARNESS
    assert run.left_out == ("x",)


def test_guests_share_the_tests_and_each_is_booted_again_on_its_own(results: Path) -> None:
    """Two guests have every second test each; the one that panics goes on with its own share, and there is one end."""
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a", "c"), *passing("a"), *passing("c"), RUN_END, GOODBYE]],
        [[*GREETING, RUN_START, plan("b", "d"), record("test-start", test="b")], PANIC],
        [[*GREETING, RUN_START, plan("d"), *passing("d"), RUN_END, GOODBYE]],
        guests=2,
    )
    run = scripted.run()
    assert verdicts(run) == {
        "a": Verdict.PASSED,
        "b": Verdict.PANICKED,
        "c": Verdict.PASSED,
        "d": Verdict.PASSED,
    }
    assert exit_code(run) == ExitCode.KERNEL
    assert sorted(run.plan) == ["a", "b", "c", "d"]
    words = [word for guest in scripted.guests for word in guest.words]
    assert sorted(word["share"] for word in words[:2]) == [[0, 2], [1, 2]]
    assert words[2]["done"] == ["b"]
    assert len(run.run_ends) == 1


def test_a_guest_without_a_share_is_no_error(results: Path) -> None:
    """One test for two guests: pytest finds nothing to do in the second, and that is as it should be."""
    nothing = control("goodbye", exit=5, signal=None, output="no tests ran")
    scripted = Scripted(
        results,
        [[*GREETING, RUN_START, plan("a"), *passing("a"), RUN_END, GOODBYE]],
        [[*GREETING, nothing]],
        guests=2,
    )
    assert verdicts(scripted.run()) == {"a": Verdict.PASSED}


@pytest.fixture
def kernel_file(tmp_path: Path) -> Machine:
    """A machine whose kernel exists, as one that is to be kept must."""
    (tmp_path / "bzImage").write_bytes(b"kernel")
    return Machine(kernel=tmp_path / "bzImage", initrd=Path("/k/root.cpio"), accelerator="tcg", qemu="sh")


WHOLE_RUN = (RUN_START, plan("a"), *passing("a"), RUN_END, GOODBYE)
GOES_ON = Line(QMP, b'{"event": "RESUME"}')


def scripted_with_snapshots(path: Path, machine: Machine, *boots: Sequence[list[Line] | None], **request: Any) -> Scripted:
    """A run that may keep guests below `path`, with its records in a file of its own."""
    results = path / f"results-{len(list(path.iterdir()))}.jsonl"
    return Scripted(results, *boots, machine=machine, snapshots=path / "snapshots", **request)


HAS_COLLECTED = control("collected")


def test_a_booted_guest_is_kept_and_gone_on_from(kernel_file: Machine, tmp_path: Path) -> None:
    """The first run boots; the second gets the state, is given its job without a hello, and says that it was resumed."""
    first = scripted_with_snapshots(tmp_path, kernel_file, [[*console("said while booting"), *GREETING, *WHOLE_RUN]])
    assert verdicts(first.run()) == {"a": Verdict.PASSED}
    assert first.machines[0].incoming is None
    (state,) = (tmp_path / "snapshots").glob("*/state")
    second = scripted_with_snapshots(tmp_path, kernel_file, [[GOES_ON, HAS_COLLECTED, *WHOLE_RUN]])
    run = second.run()
    assert verdicts(run) == {"a": Verdict.PASSED}
    assert second.machines[0].incoming == state
    assert len(second.guests[0].jobs) == 1
    assert run.circumstances is not None
    assert run.circumstances.extra["resumed"] is True
    assert (state.parent / "console").read_text() == "said while booting"


def test_a_guest_that_has_collected_is_kept_for_the_same_job(kernel_file: Machine, tmp_path: Path) -> None:
    """From the third run on nothing is collected again, and all that the guest is told is its share and what is done.

    Another job begins with the machine as it booted.
    """
    scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]]).run()
    booted = set((tmp_path / "snapshots").glob("*/state"))
    scripted_with_snapshots(tmp_path, kernel_file, [[GOES_ON, HAS_COLLECTED, *WHOLE_RUN]]).run()
    third = scripted_with_snapshots(tmp_path, kernel_file, [[GOES_ON, *WHOLE_RUN]])
    assert verdicts(third.run()) == {"a": Verdict.PASSED}
    assert {third.machines[0].incoming} == set((tmp_path / "snapshots").glob("*/state")) - booted
    assert not third.guests[0].jobs
    (word,) = third.guests[0].words
    assert (word["share"], word["done"]) == ([0, 1], [])
    assert word["time"] <= time.time()
    other = scripted_with_snapshots(tmp_path, kernel_file, [[GOES_ON, HAS_COLLECTED, *WHOLE_RUN]], pytest_args=("-k", "a"))
    other.run()
    assert {other.machines[0].incoming} == booted
    assert len(other.guests[0].jobs) == 1


def test_a_death_goes_on_from_what_was_collected(kernel_file: Machine, tmp_path: Path) -> None:
    """With a state of the collected tests from the first boot on, a panic costs neither a boot nor a collection."""
    scripted = scripted_with_snapshots(
        tmp_path,
        kernel_file,
        [[*GREETING, RUN_START, plan("a", "b"), record("test-start", test="a")], PANIC],
        [[GOES_ON, RUN_START, plan("b"), *passing("b"), RUN_END, GOODBYE]],
        keep_collected=True,
    )
    assert verdicts(scripted.run()) == {"a": Verdict.PANICKED, "b": Verdict.PASSED}
    assert [word["done"] for word in scripted.guests[1].words] == [["a"]]
    assert not scripted.guests[1].jobs


def test_modules_come_with_the_job_and_not_with_the_state(kernel_file: Machine, tmp_path: Path) -> None:
    """Two modules of one name and other content go to one booted guest, which is never kept with its tests."""
    for content in (b"one module", b"another module"):
        (tmp_path / "000-kvm.ko").write_bytes(content)
        resumes = content == b"another module"
        lines = [GOES_ON, HAS_COLLECTED] if resumes else GREETING
        run = scripted_with_snapshots(
            tmp_path, kernel_file, [[*lines, *WHOLE_RUN]], modules=(tmp_path / "000-kvm.ko",), keep_collected=True
        )
        assert verdicts(run.run()) == {"a": Verdict.PASSED}
        (job,) = run.guests[0].jobs
        assert {name: zlib.decompress(base64.b64decode(data)) for name, data in job["modules"].items()} == {
            "000-kvm.ko": content
        }
        assert (run.machines[0].incoming is not None) == resumes
        assert len(list((tmp_path / "snapshots").iterdir())) == 1


def test_another_kernel_is_another_state(kernel_file: Machine, tmp_path: Path) -> None:
    """One byte of the kernel makes the kept guest nobody's."""
    scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]]).run()
    kernel_file.kernel.write_bytes(b"kernem")
    second = scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]])
    second.run()
    assert second.machines[0].incoming is None
    assert len(list((tmp_path / "snapshots").iterdir())) == 2


def test_a_state_that_cannot_be_resumed_costs_a_boot(kernel_file: Machine, tmp_path: Path) -> None:
    """QEMU rejects it: it is removed, said so, and the guest is booted; the tests are none the wiser."""
    scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]]).run()
    second = scripted_with_snapshots(tmp_path, kernel_file, [[]], [[*GREETING, *WHOLE_RUN]])
    assert verdicts(second.run()) == {"a": Verdict.PASSED}
    assert [machine.incoming is None for machine in second.machines] == [False, True]
    assert any("could not be resumed" in note for note in second.notes)


def test_a_kernel_that_complained_while_booting_is_not_kept(kernel_file: Machine, tmp_path: Path) -> None:
    """Whoever boots it next is to hear the complaint from the kernel itself."""
    scripted_with_snapshots(tmp_path, kernel_file, [[*WARNING, *GREETING, *WHOLE_RUN]]).run()
    assert not list((tmp_path / "snapshots").glob("*"))


def test_a_state_that_is_not_written_whole_is_not_kept(kernel_file: Machine, tmp_path: Path) -> None:
    """The run goes on; nothing is left behind."""
    scripted = scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]])
    scripted.guests[0].saves = False
    assert verdicts(scripted.run()) == {"a": Verdict.PASSED}
    assert not list((tmp_path / "snapshots").iterdir())


def test_drafts_of_other_runs_are_left_alone_unless_they_are_old(kernel_file: Machine, tmp_path: Path) -> None:
    """Another run may be writing one at this moment; one that nobody finished within an hour was left behind."""
    (tmp_path / "snapshots/.a-1").mkdir(parents=True)
    (tmp_path / "snapshots/.b-2").mkdir()
    os.utime(tmp_path / "snapshots/.b-2", (1, 1))
    scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]]).run()
    assert [entry.name for entry in (tmp_path / "snapshots").glob(".*")] == [".a-1"]


def test_interrupting_while_a_state_is_written_leaves_no_draft(kernel_file: Machine, tmp_path: Path) -> None:
    """Ctrl-C may come then as at any other time."""

    class Interrupted(ScriptedQemu):
        def save_state(self, path: Path, limit: float = 60.0) -> bool:
            path.write_text("half a sta")
            raise KeyboardInterrupt

    scripted = scripted_with_snapshots(tmp_path, kernel_file, [])
    scripted._waiting[:] = [Interrupted([[*GREETING]])]
    with pytest.raises(KeyboardInterrupt):
        scripted.supervisor.run()
    assert not list((tmp_path / "snapshots").iterdir())


def test_a_guest_that_starts_while_the_run_is_being_stopped_is_ended(results: Path) -> None:
    """Stopping tells the guests that are known; one that has just been started learns it from the account."""
    killed: list[bool] = []
    scripted = Scripted(results, [])
    scripted.guests[0].process = SimpleNamespace(poll=lambda: None, kill=lambda: killed.append(True))
    scripted.supervisor.stopping = True
    Lane(scripted.supervisor, 0).run()
    assert killed


def test_the_least_used_states_go(kernel_file: Machine, tmp_path: Path) -> None:
    """As many are kept as a large matrix uses."""
    for number in range(KEPT + 2):
        kernel_file.kernel.write_bytes(bytes([number]))
        scripted_with_snapshots(tmp_path, kernel_file, [[*GREETING, *WHOLE_RUN]]).run()
    assert len(list((tmp_path / "snapshots").iterdir())) == KEPT


def test_the_console_is_kept(results: Path, tmp_path: Path) -> None:
    """All of it, boot by boot."""
    kept = tmp_path / "console"
    script = [[*GREETING, *console("hello from the kernel"), RUN_START, plan("a"), *passing("a"), RUN_END, GOODBYE]]
    Scripted(results, script, console=kept).run()
    assert "--- boot 1 ---\nhello from the kernel\n" in kept.read_text()


def test_interrupting_keeps_what_was_written(results: Path) -> None:
    """Ctrl-C in the middle: records so far are there, and the run does not look finished."""

    class Interrupted(ScriptedQemu):
        def wait(self, timeout: float) -> list[Line]:
            if self._script[0] is None:
                raise KeyboardInterrupt
            return super().wait(timeout)

    scripted = Scripted(results, [[]])
    scripted._waiting[:] = [Interrupted([[*GREETING, RUN_START, plan("a", "b"), *passing("a")], None])]
    with pytest.raises(KeyboardInterrupt):
        scripted.supervisor.run()
    run = read_run([results])
    assert verdicts(run)["a"] is Verdict.PASSED
    assert not run.complete


def test_a_cancelled_job_ends_its_guests(results: Path) -> None:
    """SIGTERM, by which CI ends a job, is taken as Ctrl-C is, and means what it did again afterwards."""

    class Cancelled(ScriptedQemu):
        def wait(self, timeout: float) -> list[Line]:
            if self._script[0] is None and not cancelled.is_set():
                cancelled.set()  # once: what a further signal would end is the tests
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(timeout)

    killed, cancelled = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    scripted = Scripted(results, [[]])
    guest = Cancelled([[*GREETING, RUN_START, plan("a", "b"), *passing("a")], None])
    guest.process = SimpleNamespace(poll=lambda: None, kill=killed.set)
    scripted._waiting[:] = [guest]
    with pytest.raises(SystemExit) as caught:
        scripted.supervisor.run()
    assert caught.value.code == 128 + signal.SIGTERM
    assert killed.is_set()
    assert verdicts(read_run([results]))["a"] is Verdict.PASSED
    assert signal.getsignal(signal.SIGTERM) == before


# --- judgements -------------------------------------------------------------------------------------------------------


def test_lines_are_cut_and_an_endless_one_is_handed_out_in_pieces() -> None:
    """A guest must not fill the supervisor's memory, and half a line is marked as such."""
    cutter = LineCutter(CONSOLE)
    assert cutter.feed(b"one\r\ntw") == [Line(CONSOLE, b"one")]
    assert cutter.feed(b"o\nthr") == [Line(CONSOLE, b"two")]
    assert cutter.finish() == [Line(CONSOLE, b"thr", cut=True)]
    assert cutter.finish() == []
    (piece,) = cutter.feed(b"x" * (MAX_LINE + 1))
    assert piece.cut


@pytest.mark.parametrize(
    ("line", "garbage", "rest"),
    [
        (b'{"record": "note"}', b"", b'{"record": "note"}'),
        (b'{"record":"note","text":"{\\"record\\":1}"}', b"", b'{"record":"note","text":"{\\"record\\":1}"}'),
        (b"nonsense", b"nonsense", b""),
        (b'{"rec{"record":"note"}', b'{"rec', b'{"record":"note"}'),
        (b'{"record":"a{"record":"b"}', b'{"record":"a', b'{"record":"b"}'),
    ],
)
def test_garbage_is_parted_from_records(line: bytes, garbage: bytes, rest: bytes) -> None:
    """Whole records stay whole, even if they quote one."""
    assert split_garbage(line) == (garbage, rest)


@pytest.mark.parametrize(
    ("silent", "used", "words"),
    [(10.0, 19.0, "something spins"), (10.0, 0.2, "all CPUs wait"), (10.0, 4.0, "or very slow")],
)
def test_cpu_time_tells_a_hang_from_slowness(silent: float, used: float, words: str) -> None:
    """The facts are in the message, whatever the conclusion."""
    text = silence_text(silent, used)
    assert words in text
    assert f"{used:.1f} s of CPU time" in text


def test_inits_last_words_are_found() -> None:
    """The exception, not the traceback above it."""
    lines = ["[ 1.0] x", "kvmgmem: init failed", "Traceback (most recent call last):", "  File x", "OSError: [5] no port"]
    assert init_failure(lines) == "OSError: [5] no port"
    assert init_failure(lines[:1]) == ""


@pytest.mark.parametrize(
    ("ending", "message", "hint", "code"),
    [
        (
            Ending(Cause.PANIC, "kernel panic: x", ("VFS: Unable to mount root fs on unknown-block(0,0)",)),
            "no test was started: kernel panic: x",
            "CONFIG_BLK_DEV_INITRD",
            ExitCode.KERNEL,
        ),
        (Ending(Cause.NO_BOOT, "the kernel said nothing"), "said nothing", "console is in", ExitCode.HARNESS),
        (
            Ending(Cause.RUNNER_DIED, "x", (), "...\nkvmgmem: error: no /dev/kvm\n  hint: build it in\n", 4),
            "in the guest: no /dev/kvm",
            "build it in",
            ExitCode.HARNESS,
        ),
        (
            Ending(Cause.RUNNER_DIED, "x", (), "ERROR: unrecognized arguments: --frob\n", 4),
            "pytest: unrecognized arguments: --frob",
            "pytest --help",
            ExitCode.USAGE,
        ),
        (Ending(Cause.RUNNER_DIED, "x", (), "", 5), "no selftest was selected", "collect-only", ExitCode.NOTHING_RAN),
    ],
)
def test_a_guest_without_a_test_is_explained(ending: Ending, message: str, hint: str, code: ExitCode) -> None:
    """One line with the cause, the likeliest remedy, and the exit code that belongs to it."""
    error = no_test_started(ending, Path("/c"))
    assert message in error.message
    assert hint in error.hint
    assert error.code == code


# --- real guests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel() -> Path:
    """A kernel to boot; skips with what is missing."""
    try:
        require_qemu()
        wanted = os.environ.get("KVMGMEM_TEST_KERNEL")
        return require_kernel_image(kernels.resolve(wanted or "base").image)
    except HarnessError as error:
        pytest.skip(f"no guest can be booted: {error.message} ({error.hint})")


class Tamperer:
    """Shows no progress, but does to QEMU what a test of the guest asks the host to do."""

    def __init__(self) -> None:
        self.qemu: Qemu | None = None

    def start(self, machine: Machine) -> Qemu:
        """Start QEMU, and remember it."""
        self.qemu = Qemu(machine)
        return self.qemu

    def update(self, detail: str, fraction: float | None = None) -> None:
        """A test begins."""
        assert self.qemu is not None
        if detail == "host_kills_qemu":
            os.kill(self.qemu.process.pid, signal.SIGKILL)
        elif detail == "host_stops_the_cpus":
            self.qemu.qmp("stop")

    def note(self, text: str) -> None:
        """Shown by pytest if something fails."""
        print(text)


@pytest.fixture(scope="module")
def guest(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A guest whose runner misbehaves on request."""
    directory = tmp_path_factory.mktemp("guest")
    (directory / "selftests").mkdir()
    (directory / "selftests/README").write_text("the runner brings its own tests")
    request = ImageRequest(directory / "selftests", extra=(("/kvmgmem/pytest.py", RUNNER),))
    image = build_image(request, directory / "cache")
    return Machine(kernel, image.path, "tcg", memory_mib=320, append="reboot=t")


@pytest.fixture(scope="module")
def evil_run(guest: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One supervised run over everything a guest can do wrong; each death costs a boot."""
    directory = tmp_path_factory.mktemp("evil")
    tamperer = Tamperer()
    # The stand-ins go on for a second after a complaint; on a busy machine that takes longer, so an oops has more.
    limits = Limits(boot=120, silence=6, test=90, shutdown=5, oops=20, nmi=3)
    # From the second boot on the guest is resumed: each death would cost a boot otherwise.
    request = Request(
        guest,
        directory / "results.jsonl",
        tuple(EXPECTED),
        limits=limits,
        console=directory / "console",
        snapshots=directory / "snapshots",
        keep_collected=True,
    )
    supervisor = Supervisor(request, tamperer, tamperer.start)
    code = supervisor.run()
    run = read_run([directory / "results.jsonl"])
    assert code == exit_code(run) == ExitCode.KERNEL
    yield run
    with contextlib.suppress(OSError):
        print((directory / "console").read_text()[-4000:])


EXPECTED = {
    "passes_first": (Verdict.PASSED, ""),
    "panics": (Verdict.PANICKED, "sysrq triggered crash"),
    "complains": (Verdict.SPLAT, "WARNING: virt/kvm/fake.c:12"),
    "writes_garbage": (Verdict.ERROR, "garbage on the result channel"),
    "spins": (Verdict.PANICKED, "no sign of life"),
    "kills_init": (Verdict.PANICKED, "Attempted to kill init"),
    "takes_all_memory": (Verdict.CRASHED, "ran out of memory"),
    "powers_off": (Verdict.ERROR, "powered off"),
    "reboots": (Verdict.ERROR, "rebooted"),
    "triple_faults": (Verdict.PANICKED, "triple fault"),
    "oopses": (Verdict.SPLAT, "kernel oops: BUG: kernel NULL pointer dereference"),
    "cuts_its_record": (Verdict.ERROR, "cut in the middle"),
    "passes_after_cut": (Verdict.PASSED, ""),
    "exits": (Verdict.CRASHED, "ended with status 7"),
    "floods": (Verdict.ERROR, "floods"),
    "host_kills_qemu": (Verdict.ERROR, "QEMU was killed by SIGKILL"),
    "host_stops_the_cpus": (Verdict.PANICKED, "all CPUs wait"),
    "passes_last": (Verdict.PASSED, ""),
}


@pytest.mark.parametrize("test", EXPECTED)
def test_a_real_guest_gets_the_verdict_it_deserves(evil_run: Run, test: str) -> None:
    """Whatever the guest does, each of its tests has a verdict that names the cause."""
    verdict, words = EXPECTED[test]
    assert verdicts(evil_run)[test] is verdict, reason(evil_run, test)
    assert words in reason(evil_run, test)


def test_a_runner_that_stops_in_a_real_guest_is_a_timeout(guest: Machine, results: Path) -> None:
    """PID 1 goes on showing life, so it is the runner that is at fault, and the next test is run."""
    limits = Limits(boot=120, silence=9, test=4, shutdown=5)
    request = Request(guest, results, ("stops_itself", "passes_last"), limits=limits)
    tamperer = Tamperer()
    assert Supervisor(request, tamperer, tamperer.start).run() is ExitCode.TEST_FAILED
    run = read_run([results])
    assert verdicts(run) == {"stops_itself": Verdict.TIMEOUT, "passes_last": Verdict.PASSED}
    assert "the guest is alive" in reason(run, "stops_itself")


def test_a_real_run_leaves_nothing_out_and_adds_nothing(evil_run: Run) -> None:
    """Every planned test once, no damaged lines, a positive end."""
    assert list(verdicts(evil_run)) == list(EXPECTED)
    assert evil_run.complete
    assert not evil_run.damaged


def test_a_hang_and_a_panic_come_with_a_stack(evil_run: Run) -> None:
    """The panic's own, and for the hang the one that an NMI brought out of it."""
    logs = {outcome.end.test: "\n".join(outcome.end.kernel_log) for outcome in evil_run.tests}
    assert "sysrq_handle_crash" in logs["panics"]
    assert "Call Trace" in logs["spins"] or "RIP:" in logs["spins"]
    assert re.search(r"^QEMU: CPU 0: rip=[0-9a-f]{16} .*\bcr0=8[0-9a-f]{7}\b", logs["spins"], re.MULTILINE)


def test_a_real_guest_goes_on_from_its_kept_state(guest: Machine, tmp_path: Path) -> None:
    """Booted once, resumed once: the same verdict, and the clock of today."""
    runs = []
    for name in ("booted", "resumed"):
        limits = Limits(boot=120, silence=30, test=60)
        request = Request(guest, tmp_path / name, ("passes_first",), limits=limits, snapshots=tmp_path / "snapshots")
        before = time.time()
        tamperer = Tamperer()
        assert Supervisor(request, tamperer, tamperer.start).run() is ExitCode.OK
        runs.append(read_run([tmp_path / name]))
        assert runs[-1].start is not None
        assert before - 1 <= runs[-1].start <= time.time() + 1, (before, runs[-1].start, time.time())
    assert [run.circumstances.extra["resumed"] for run in runs if run.circumstances] == [False, True]


def test_a_kernel_that_dies_while_booting_is_explained(guest: Machine, results: Path) -> None:
    """No test was started: an error of its own, with the kernel's exit code and the console kept."""
    nothing = results.with_name("empty.cpio")
    nothing.write_bytes(archive([]))
    machine = Machine(guest.kernel, nothing, "tcg", memory_mib=320)
    request = Request(machine, results, limits=Limits(boot=120, shutdown=10), console=results.with_suffix(".console"))
    with pytest.raises(HarnessError, match="Kernel panic - not syncing") as caught:
        Supervisor(request, Tamperer()).run()
    assert caught.value.code is ExitCode.KERNEL
    assert "Kernel panic" in results.with_suffix(".console").read_text()


def test_a_qemu_that_does_not_start_is_explained(guest: Machine, results: Path) -> None:
    """Its own complaint is the message."""
    machine = Machine(guest.kernel, Path("/nowhere/root.cpio"), "tcg")
    with pytest.raises(HarnessError, match=r"QEMU ended with status 1.*/nowhere/root.cpio"):
        Supervisor(Request(machine, results), Tamperer()).run()


def test_no_limits_are_no_error(guest: Machine) -> None:
    """A guest that waits for a debugger may do so for ever, and what comes from QEMU meanwhile is read."""
    with Qemu(replace(guest, append="console=none")) as qemu:
        assert any(b"QMP" in line.data for line in qemu.wait(Limits.unlimited().boot))


def test_a_guest_goes_on_whose_state_took_too_long(guest: Machine, tmp_path: Path) -> None:
    """What is not written in time is given up: should it come to its end after all, that would stop the machine for good."""
    with Qemu(guest) as qemu:
        deadline = time.monotonic() + 60
        while not any(line.channel == CONSOLE for line in qemu.wait(1.0)):
            assert time.monotonic() < deadline
        assert not qemu.save_state(tmp_path / "slow", limit=0.0)
        answers = [answer_of(qemu, "query-migrate")]
        while answers[-1]["status"] not in ("completed", "failed", "cancelled"):
            assert time.monotonic() < deadline
            answers.append(answer_of(qemu, "query-migrate"))
        assert answer_of(qemu, "query-status")["running"], answers[-1]["status"]
        assert qemu.save_state(tmp_path / "state", limit=60.0)  # the control: it is written where it has the time
        assert answer_of(qemu, "query-status")["running"]


def answer_of(qemu: Qemu, command: str) -> dict[str, Any]:
    """What QEMU's monitor answers to one command."""
    qemu.qmp(command)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in qemu.wait(1.0):
            answer = json.loads(line.data).get("return") if line.channel == QMP else None
            if isinstance(answer, dict) and "status" in answer and ("running" in answer) == (command == "query-status"):
                return answer
    raise TimeoutError(command)


def test_qemu_dies_with_its_supervisor(guest: Machine) -> None:
    """However the supervisor ends: a killed one must not leave a guest behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        qemu = Qemu(guest)
        os.write(writer, str(qemu.process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    pid = int(os.read(reader, 32))
    os.close(reader)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
