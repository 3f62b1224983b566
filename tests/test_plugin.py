"""The pytest plugin on small test files that leak, crash, hang and lie, each on this machine's real KVM."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmgmem.exit_codes import ExitCode
from kvmgmem.kvm import Kvm
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing.emulated_cpus import rcu_threads
from kvmgmem.testing.waiting import TIME_SCALE, wait_until
from kvmgmem.trace.expectation import find_check
from kvmgmem.trace.steps import load

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")

HEAD = """
import os, signal, time, threading
import pytest
from kvmgmem.errors import Errno
from kvmgmem.testing import contract, disruptive, known_bug, need, requires, test_timeout
"""


class Outcome:
    """What a run of the plugin said: its exit status, its records, its output."""

    def __init__(self, status: int, lines: list[str], text: str) -> None:
        self.status = status
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.text = text

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["record"] == kind]

    @property
    def ends(self) -> dict[str, dict[str, Any]]:
        return {record["test"].partition("::")[2]: record for record in self.of("test-end")}

    def verdicts(self) -> dict[str, str]:
        return {name: record["verdict"] for name, record in self.ends.items()}


def run(pytester: pytest.Pytester, body: str, *options: str) -> Outcome:
    """Run pytest on a file with this body, in a process of its own."""
    pytester.makepyfile(HEAD + body)
    results = pytester.path / "results.jsonl"
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", f"--results={results}", *options, timeout=90)
    lines = results.read_text().splitlines() if results.exists() else []
    return Outcome(int(done.ret), lines, done.stdout.str() + done.stderr.str())


def test_a_passing_test_leaves_a_whole_record(pytester: pytest.Pytester) -> None:
    """A run is: circumstances, plan, a start and an end for each test, and an end of its own that says 0."""
    outcome = run(
        pytester,
        '''
@contract("GM-VM-001")
def test_it(kvm):
    """The rule
    in two lines.

    And more.
    """
    assert kvm.create_vm().fileno() >= 0
''',
    )
    assert [record["record"] for record in outcome.records if record["record"] != "note"] == [
        "run-start",
        "plan",
        "test-start",
        "test-end",
        "run-end",
    ]
    start = outcome.of("test-start")[0]
    assert (start["area"], start["contract"], start["rule"]) == ("GM-VM", ["GM-VM-001"], "The rule in two lines.")
    circumstances = outcome.of("run-start")[0]["circumstances"]
    assert circumstances["release"] == os.uname().release
    assert circumstances["where"] == "host"
    assert outcome.verdicts() == {"test_it": "passed"}
    assert outcome.of("run-end")[0]["exit"] == outcome.status == ExitCode.OK


def test_the_start_is_written_before_the_test_runs(pytester: pytest.Pytester) -> None:
    """While a test runs, its start record is in the file already: what a panic leaves behind names it."""
    outcome = run(
        pytester,
        """
def test_it(kvm, request):
    text = open(request.config.getoption("--results")).read()
    assert '"test-start","test":"' + request.node.nodeid in text
    assert '"test-end"' not in text
""",
    )
    assert outcome.verdicts() == {"test_it": "passed"}, outcome.text


LEAKS = {
    "a_descriptor": ("os.dup(kvm.fileno())", "descriptor"),
    "a_vm": ("kvm.create_vm().release()", "anon_inode:kvm-vm"),
    "a_gmem": ("kvm.create_vm().create_guest_memfd(8192, 3).release()", "kvm-gmem"),
    "a_thread": ("threading.Thread(target=time.sleep, args=(30,), daemon=True).start()", "1 thread"),
    "a_mapping": (
        "vm = kvm.create_vm(); vcpu = vm.create_vcpu(); vcpu.kvm_run; vcpu.close_fd(); vcpu._run_address = 0",
        "mapping of anon_inode:kvm-vcpu",
    ),
    "a_process": ("os.fork() or time.sleep(30)", "process"),
}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
@pytest.mark.parametrize(
    "wants_more",
    [
        "threading.Thread(target=cpus.append, args=(1,)).start()",
        "os.waitpid(os.fork() or os._exit(0), 0)",
        "subprocess.run(['true'], check=True)",
        "cpus_to_run_on()",
    ],
    ids=["a_thread", "a_process", "a_program", "asking"],
)
def test_all_but_a_test_that_wants_more_keeps_to_the_first_emulated_cpu(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, accelerator: str, wants_more: str
) -> None:
    """Under TCG the runner has the first CPU, and so has a test until it can use another one; elsewhere they have all."""
    monkeypatch.setenv("KVMGMEM_ACCELERATOR", accelerator)
    cpus = os.sched_getaffinity(0)
    confined = {min(cpus)} if accelerator == "tcg" else cpus
    outcome = run(
        pytester,
        f"""
import subprocess
from kvmgmem.testing.emulated_cpus import cpus_to_run_on

def test_it(kvm):
    assert os.sched_getaffinity(os.getppid()) == {confined}
    cpus = [os.sched_getaffinity(0)]
    {wants_more}
    assert cpus[0] == {confined}
    assert os.sched_getaffinity(0) == {cpus}

def test_that_chooses_for_itself(kvm):
    os.sched_setaffinity(0, {{max(cpus_to_run_on())}})
    threading.Thread(target=int).start()
    assert os.sched_getaffinity(0) == {{max({cpus})}}
""",
    )
    assert outcome.verdicts() == {"test_it": "passed", "test_that_chooses_for_itself": "passed"}, outcome.text


def test_only_the_threads_of_rcu_are_rcus(tmp_path: Path) -> None:
    """They are told by their names; what has no name (any more) is none of them."""
    for pid, name in ((1, "init"), (15, "rcu_preempt"), (16, "rcu_exp_gp_kthr"), (17, "rcuc/0"), (18, "kworker/0:0-rcu_gp")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
    (tmp_path / "19").mkdir()
    assert sorted(rcu_threads(tmp_path)) == [15, 16]


def test_leaks_of_every_kind_fail_the_test(pytester: pytest.Pytester) -> None:
    """A descriptor, VM, gmem, thread, mapping or process that a test leaves behind fails it, and is named."""
    body = "".join(f"\ndef test_{name}(kvm):\n    {code}\n" for name, (code, _) in LEAKS.items())
    outcome = run(pytester, body)
    for name, (_, needle) in LEAKS.items():
        end = outcome.ends[f"test_{name}"]
        assert (end["verdict"], needle in end["reason"] + end["detail"]) == ("failed", True), (name, end)
    assert outcome.status == ExitCode.TEST_FAILED


def test_what_the_runner_has_mapped_is_nobodys_leak(pytester: pytest.Pytester) -> None:
    """A test starts with the mappings of the process that it is forked from; one more is the test's."""
    outcome = run(
        pytester,
        """
from kvmgmem.kvm import Kvm
KVM = Kvm.open()
VCPU = KVM.create_vm().create_vcpu()
VCPU.kvm_run
def test_clean(kvm):
    with open("/proc/self/maps") as maps:
        assert "kvm-vcpu" in maps.read()
def test_one_more(kvm):
    vm = kvm.create_vm(); vcpu = vm.create_vcpu(); vcpu.kvm_run; vcpu.close_fd(); vcpu._run_address = 0
""",
    )
    assert outcome.verdicts() == {"test_clean": "passed", "test_one_more": "failed"}, outcome.ends
    assert outcome.ends["test_one_more"]["detail"].count("mapping of") == 1


def test_allocated_pages_are_named_with_a_leaked_gmem(pytester: pytest.Pytester) -> None:
    """A gmem left behind is reported with the pages it holds."""
    outcome = run(
        pytester,
        """
def test_it(kvm):
    with kvm.create_vm() as vm:
        gmem = vm.create_guest_memfd(5 * 4096)
        gmem.allocate(0, 3 * 4096)
        gmem.release()
""",
    )
    assert "with 3 allocated pages" in outcome.ends["test_it"]["reason"]


def test_a_vm_that_outlives_its_process_is_a_leak(pytester: pytest.Pytester) -> None:
    """A VM kept alive by a descriptor elsewhere is seen by KVM's own uevents, although the test's process is gone."""
    holder = pytester.path / "holder.py"
    holder.write_text(
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\nprint('ready', flush=True)\n"
        "c, _ = s.accept()\nmessage = socket.recv_fds(c, 1, 1)\nc.sendall(b'k')\ntime.sleep(30)\n"
    )
    outcome = run(
        pytester,
        f"""
import socket, subprocess, sys
HOLDER = subprocess.Popen([sys.executable, {str(holder)!r}, {str(pytester.path / "s")!r}], stdout=subprocess.PIPE)
HOLDER.stdout.readline()
from kvmgmem.testing import isolation
isolation.keep(HOLDER.pid)
def test_it(kvm):
    with kvm.create_vm() as vm, vm.create_guest_memfd(4096) as gmem, socket.socket(socket.AF_UNIX) as s:
        s.connect({str(pytester.path / "s")!r})
        socket.send_fds(s, [b"x"], [gmem.fileno()])
        assert s.recv(1) == b"k"
def test_the_next_one_is_not_blamed(kvm):
    pass
def test_end(request):
    HOLDER.kill()
    HOLDER.wait()
""",
        f"--trace-to={pytester.path / 'traces'}",
    )
    assert outcome.ends["test_it"]["verdict"] == "failed", outcome.text
    assert "VMs outlive the test" in outcome.ends["test_it"]["reason"]
    assert outcome.ends["test_the_next_one_is_not_blamed"]["verdict"] == "passed"
    if os.geteuid() == 0:  # debugfs tells which VM it was
        check = find_check(load(next((pytester.path / "traces").glob("*test_it.trace"))))
        assert (check.step.call, check.step.on, check.wanted) == ("lives", "vm0", 0)


def test_a_process_that_dies_waiting_for_its_test_costs_none(pytester: pytest.Pytester) -> None:
    """Each is forked while the last test ends; whatever kills it before it is told a test, the test has another one."""
    pytester.makeconftest(
        """
import os, signal
from kvmgmem.testing import isolation
def pytest_runtest_logfinish():
    for pid in WAITING:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        print("killed", pid)
    WAITING.clear()
WAITING = set()
keep = isolation.keep
def note(pid):
    WAITING.add(pid)
    keep(pid)
isolation.keep = note
release = isolation.release
def forget(pid):
    WAITING.discard(pid)
    release(pid)
isolation.release = forget
"""
    )
    outcome = run(pytester, "\ndef test_a(kvm): pass\ndef test_b(kvm): pass\ndef test_c(kvm): pass\n", "-s")
    assert outcome.verdicts() == {"test_a": "passed", "test_b": "passed", "test_c": "passed"}, outcome.text
    assert outcome.text.count("killed") == 2
    assert outcome.status == ExitCode.OK


def test_crash_hang_and_failure_cost_one_test_each(pytester: pytest.Pytester) -> None:
    """A dead process, an endless one and a failed assertion are told apart, and the tests after them run."""
    outcome = run(
        pytester,
        """
def test_killed(kvm):
    os.kill(os.getpid(), signal.SIGKILL)
def test_left(kvm):
    os._exit(3)
@test_timeout(1.5)
def test_hung(kvm):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True: time.sleep(1)
def test_failed(kvm):
    assert kvm.raw.check_extension(0) == Errno.EINVAL
def test_after(kvm):
    pass
""",
    )
    assert outcome.verdicts() == {
        "test_killed": "crashed",
        "test_left": "crashed",
        "test_hung": "timeout",
        "test_failed": "failed",
        "test_after": "passed",
    }
    limits = {record["test"].partition("::")[2]: record["limit"] for record in outcome.of("test-start")}
    assert (limits["test_hung"], limits["test_after"]) == (1.5 * TIME_SCALE, 30 * TIME_SCALE)
    assert "SIGKILL" in outcome.ends["test_killed"]["reason"]
    assert "exit status 3" in outcome.ends["test_left"]["reason"]
    assert "test_hung" in outcome.ends["test_hung"]["detail"], "where it hung is said"
    assert "EINVAL" in outcome.ends["test_failed"]["reason"]
    assert outcome.status == ExitCode.TEST_FAILED


def test_a_failure_of_the_runner_costs_one_test(pytester: pytest.Pytester) -> None:
    """What goes wrong in the harness is said and no verdict on the kernel; the tests after it run."""
    outcome = run(
        pytester,
        """
from kvmgmem.testing.session import Session
usual = Session._judge
def judge(self, outcome, limit, bugs):
    Session._judge = usual
    raise ValueError("no verdict")
Session._judge = judge
def test_it(kvm):
    pass
def test_after(kvm):
    pass
""",
    )
    assert outcome.verdicts() == {"test_it": "error", "test_after": "passed"}, outcome.text
    assert outcome.ends["test_it"]["reason"] == "the runner failed: ValueError: no verdict"
    assert "in judge" in outcome.ends["test_it"]["detail"]
    assert outcome.status == ExitCode.HARNESS


def test_requirements_skip_with_their_reason_and_fail_when_required(pytester: pytest.Pytester) -> None:
    """What is missing is the skip reason, from a marker or from within; --require makes it a failure."""
    body = """
@requires("tdx")
def test_marked(kvm):
    pass
def test_within(kvm):
    need("tdx")
"""
    outcome = run(pytester, body)
    assert outcome.verdicts() == {"test_marked": "skipped", "test_within": "skipped"}
    reasons = {end["reason"] for end in outcome.ends.values()}
    assert reasons == {"this KVM offers no TDX VM (bit 5 of KVM_CAP_VM_TYPES)"}
    assert outcome.status == ExitCode.NOTHING_RAN
    (pytester.path / "results.jsonl").unlink()
    required = run(pytester, body, "--require=tdx")
    assert required.verdicts() == {"test_marked": "failed", "test_within": "failed"}
    assert required.status == ExitCode.TEST_FAILED


@pytest.mark.parametrize(
    ("body", "needle"),
    [
        ('@contract("GM-BIND-999")\ndef test_it(kvm): pass', "GM-BIND-999"),
        ('@requires("tpd")\ndef test_it(kvm): pass', "'tpd' is not a requirement"),
        ('def test_it(kvm): known_bug("B99")', "B99"),
        ('@pytest.mark.parametrize("x", [])\ndef test_it(kvm, x): pass', "would test nothing"),
    ],
)
def test_mistakes_in_tests_are_errors(pytester: pytest.Pytester, body: str, needle: str) -> None:
    """An unknown row, requirement or bug, and an empty parameter list, are never silent."""
    outcome = run(pytester, body)
    assert needle in outcome.text
    assert outcome.status not in (ExitCode.OK, ExitCode.NOTHING_RAN)


def test_an_unknown_requirement_on_the_command_line_is_a_usage_error(pytester: pytest.Pytester) -> None:
    """--require of a name that is none says so instead of requiring nothing."""
    outcome = run(pytester, "def test_it(kvm): pass", "--require=tpd")
    assert "'tpd' is not a requirement" in outcome.text
    assert outcome.records == []


def test_known_bugs_are_neither_pass_nor_failure(pytester: pytest.Pytester) -> None:
    """A bug that shows makes its test a known bug; an answer that is neither right nor the bug fails; absence is noted."""
    outcome = run(
        pytester,
        """
def test_shows(kvm):
    known_bug("B14").expect(Errno.EINVAL, Errno.EEXIST, shows=Errno.EINVAL)
def test_shows_and_fails(kvm):
    known_bug("B14").expect(Errno.EINVAL, Errno.EEXIST, shows=Errno.EINVAL)
    assert False
def test_gone(kvm):
    known_bug("B14").expect(Errno.EEXIST, Errno.EEXIST, shows=Errno.EINVAL)
def test_other(kvm):
    known_bug("B14").expect(Errno.EBADF, Errno.EEXIST, shows=Errno.EINVAL)
""",
    )
    assert outcome.verdicts() == {
        "test_shows": "known-bug",
        "test_shows_and_fails": "failed",
        "test_gone": "passed",
        "test_other": "failed",
    }
    assert outcome.ends["test_shows"]["bugs_shown"] == ["B14"]
    assert outcome.ends["test_gone"]["bugs_absent"] == ["B14"]


def test_disruptive_tests_wait_to_be_asked_for(pytester: pytest.Pytester) -> None:
    """A host runs a disruptive test only with --disruptive."""
    body = "@disruptive()\ndef test_it(kvm): pass"
    assert run(pytester, body).verdicts() == {"test_it": "skipped"}
    (pytester.path / "results.jsonl").unlink()
    assert run(pytester, body, "--disruptive").verdicts() == {"test_it": "passed"}


def test_other_tests_are_left_alone(pytester: pytest.Pytester) -> None:
    """A test that uses nothing of ours runs in pytest's own process, and leaves no record."""
    outcome = run(
        pytester,
        """
PID = os.getpid()
def test_it():
    assert os.getpid() == PID
@pytest.fixture
def vm():
    return 1
def test_with_a_fixture_of_the_same_name(vm):
    assert os.getpid() == PID
""",
    )
    assert outcome.status == 0
    assert outcome.records == []


def test_the_ladder_of_fixtures(pytester: pytest.Pytester) -> None:
    """kvm, vm, gmem, bound, running: each stands on the one before, over every kind the kernel offers."""
    outcome = run(
        pytester,
        """
from kvmgmem.testing import gmem_kinds, vm_types
@vm_types("default")
@gmem_kinds("gM", "gMS")
def test_it(kvm, vm, gmem, bound, running):
    assert bound.vm is vm and bound.gmem is gmem and running.gmem is gmem
    running.cpu.store(running.gpa, 42)
    assert running.cpu.load(running.gpa) == 42
    assert gmem.allocated_pages() == 1
@vm_types("default")
def test_kinds(gmem):
    pass
""",
    )
    names = set(outcome.verdicts())
    assert names >= {"test_it[default-gM]", "test_it[default-gMS]", "test_kinds[default-g0]", "test_kinds[default-gS]"}
    assert set(outcome.verdicts().values()) <= {"passed", "skipped"}, outcome.text


def test_nothing_of_the_host_stays_changed(pytester: pytest.Pytester) -> None:
    """debugfs is mounted for the run alone: the host's own mounts are what they were."""
    before = Path("/proc/self/mounts").read_text()
    outcome = run(pytester, "def test_it(kvm): assert os.path.isdir('/sys/kernel/debug/kvm') or os.geteuid()")
    assert outcome.verdicts() == {"test_it": "passed"}
    assert Path("/proc/self/mounts").read_text() == before


def order_of(outcome: Outcome) -> list[str]:
    """The tests of a run in the order in which they began."""
    return [record["test"].partition("::")[2] for record in outcome.of("test-start")]


def test_shuffling_depends_on_the_seed_alone(pytester: pytest.Pytester) -> None:
    """The same seed gives the same order, to a part of the tests as to all; another gives another; records name the seed."""
    body = "".join(f"\ndef test_{letter}(kvm):\n    pass\n" for letter in "abcdefgh")
    plain = run(pytester, body)
    plain_order = order_of(plain)
    (pytester.path / "results.jsonl").unlink()
    first = run(pytester, body, "--shuffle=1")
    (pytester.path / "results.jsonl").unlink()
    part = run(pytester, body, "--shuffle=1", "-k", "test_a or test_b or test_c or test_d")
    (pytester.path / "results.jsonl").unlink()
    other = run(pytester, body, "--shuffle=2")
    assert plain_order == sorted(order_of(first)) == sorted(order_of(other))
    assert len({tuple(order) for order in (plain_order, order_of(first), order_of(other))}) == 3
    assert order_of(part) == [name for name in order_of(first) if name in {"test_a", "test_b", "test_c", "test_d"}]
    seeds = [outcome.of("run-start")[0]["circumstances"]["seed"] for outcome in (plain, first, other)]
    assert seeds == [None, 1, 2]


def test_what_a_test_records_is_in_its_end(pytester: pytest.Pytester) -> None:
    """What a test says of itself with record_property is kept, of one that is skipped too."""
    outcome = run(
        pytester,
        """
def test_it(kvm, record_property):
    record_property("rate", 3)
def test_skipped(kvm, record_property):
    record_property("rate", "unknown")
    pytest.skip("for a reason")
""",
    )
    assert {name: end["properties"] for name, end in outcome.ends.items()} == {
        "test_it": {"rate": "3"},
        "test_skipped": {"rate": "unknown"},
    }


def everybody_has_python() -> bool:
    """Whether an ordinary user can read the interpreter's own files."""
    home = Path(sys.base_prefix)
    return all(place.stat().st_mode & 0o001 for place in (home, *home.parents))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user, which root can")
@pytest.mark.skipif(not everybody_has_python(), reason="this Python lies where an ordinary user may not look")
def test_an_ordinary_user_is_told_what_only_root_can_see(pytester: pytest.Pytester) -> None:
    """Without root, what needs it is skipped and counted under what was left out, by reason; the rest runs."""
    body = """
@requires("root")
def test_marked(kvm):
    pass
def test_within(kvm):
    need("root")
def test_rest(kvm):
    assert os.geteuid() == 65534
"""
    # A device node of its own, which the user may open, in a mount namespace of the run's own.
    pytester.makeconftest("""
import ctypes, os, pathlib, stat, subprocess
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session):
    here = session.config.getoption("--results").rpartition("/")[0]
    if ctypes.CDLL(None).unshare(0x20000):
        pytest.exit("no mount namespace to be had", 77)
    os.mknod(here + "/kvm", 0o600 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
    for path in (here, here + "/kvm"):
        os.chown(path, 65534, 65534)
    for parent in pathlib.Path(here).parents:
        parent.chmod(parent.stat().st_mode | 0o001)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", here + "/kvm", "/dev/kvm"], check=True)
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
""")
    outcome = run(pytester, body)
    if outcome.status == 77:
        pytest.skip("unshare(CLONE_NEWNS) is refused here")
    assert outcome.verdicts() == {"test_marked": "skipped", "test_within": "skipped", "test_rest": "passed"}, outcome.text
    assert "tests (2): needs root (CAP_SYS_ADMIN)" in outcome.of("run-end")[0]["left_out"]


def test_vms_of_others_are_none_of_our_business(pytester: pytest.Pytester) -> None:
    """A VM that a process outside the run made, and that outlives it, is charged to no test."""
    began, go_on = pytester.path / "began", pytester.path / "go-on"
    held: list[int] = []

    def stranger() -> None:
        wait_until(began.exists, "the test has begun", 60)
        with ChildProcess(make_a_gmem) as process:
            held.extend(process.channel.receive_with_fds()[1])
        go_on.touch()

    thread = threading.Thread(target=stranger)
    thread.start()
    try:
        outcome = run(
            pytester,
            f"""
from pathlib import Path
def test_it(kvm):
    Path({str(began)!r}).touch()
    while not Path({str(go_on)!r}).exists():
        time.sleep(0.01)
""",
        )
    finally:
        thread.join()
        for number in held:
            os.close(number)
    assert held
    assert outcome.verdicts() == {"test_it": "passed"}, outcome.text


def make_a_gmem(channel: Channel) -> None:
    """Make a VM and give its gmem away, which keeps it alive."""
    with Kvm.open() as kvm, kvm.create_vm() as vm, vm.create_guest_memfd(4096) as gmem:
        channel.send(fds=[gmem.fileno()])
