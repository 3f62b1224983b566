"""What is made of a trace: which steps stay, the C program, and the replay; on memory and processes, which need no KVM."""

import mmap
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import cli, entry, host
from kvmgmem._native import lib
from kvmgmem.abi import PAGE_SIZE, GiB, MiB
from kvmgmem.errors import Errno
from kvmgmem.exit_codes import ExitCode
from kvmgmem.fail_nth import Shortage
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.model import play, traits, world
from kvmgmem.model.answers import Left, Plain
from kvmgmem.model.steps import Close, CreateVm
from kvmgmem.processes import ChildProcess
from kvmgmem.testing.stats import read_stat
from kvmgmem.trace import c_parts, decode
from kvmgmem.trace.c_program import c_program
from kvmgmem.trace.expectation import ONE_OF, find_check
from kvmgmem.trace.file import TraceFile
from kvmgmem.trace.finding import told
from kvmgmem.trace.prune import needed_steps
from kvmgmem.trace.pytest_plugin import TracePlugin
from kvmgmem.trace.recorder import recording
from kvmgmem.trace.repeat import repeat
from kvmgmem.trace.repro import COMPILER
from kvmgmem.trace.repro import build as build_program
from kvmgmem.trace.steps import Trace, build, load
from kvmgmem.trace.text import describe
from kvmgmem.vm import Vm

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")
needs_cc = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C compiler on this machine")

STAMP = 0x5EED
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


@pytest.fixture
def record(tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """Record an action; the trace's path."""

    def into_file(action: Callable[[Any], None]) -> Path:
        file = TraceFile(tmp_path / "a.trace")
        with recording(
            file, {"release": "1.2.3", "backend": "none", "paging": "no"}, test="the test", rule="A rule."
        ) as recorder:
            action(recorder)
        file.close()
        return tmp_path / "a.trace"

    return into_file


def memory(recorder: Any) -> None:
    """A store, and a load that finds it."""
    with Mapping.anonymous(PAGE_SIZE) as unused, Mapping.anonymous(PAGE_SIZE) as memory:
        unused.store(1)
        memory.store(STAMP, 8, width=4)
        recorder.expect(memory.load(8), STAMP)


def run_program(trace: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Make the program, compile it with every warning an error, and run it."""
    source = trace.with_name("bug.c")
    assert cli.main(["repro", str(trace), "-o", str(source), "--build", *options]) == ExitCode.OK
    return subprocess.run([source.with_suffix("")], check=False, capture_output=True, text=True, timeout=60)


def calls(trace: Trace, expect: str = "") -> list[str]:
    """The steps that stay."""
    return [step.id for step in needed_steps(trace, find_check(trace, expect))]


# -- programs


@needs_cc
def test_a_program_says_that_all_is_well_or_not(record: Any) -> None:
    """Exit status 0 if the answer is what is wanted, 1 if not; what does not matter is not in it."""
    path = record(memory)
    done = run_program(path)
    assert (done.returncode, done.stdout) == (0, "OK: the host's load: got 0x5eed, wanted 0x5eed\n")
    text = path.with_name("bug.c").read_text()
    assert "A rule." in text
    assert "mem1" in text
    assert "mem0" not in text
    done = run_program(path, "--expect", "p0.5=1")
    assert (done.returncode, done.stdout) == (1, "BUG: the host's load: got 0x5eed, wanted 0x1\n")


@needs_cc
def test_a_program_that_cannot_tell_skips(record: Any, tmp_path: Path) -> None:
    """What has to work first and does not is no answer to the question: 4, as a kselftest skips."""

    def action(_: object) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            memory.load()

    path = record(action)
    path.write_text(path.read_text().replace('"length":4096,"prot"', f'"length":{1 << 60},"prot"'))
    assert run_program(path, "--expect", "p0.2=0").returncode == 4


@needs_cc
def test_a_signal_is_an_answer_in_c_too(record: Any) -> None:
    """A load that raises a signal does not end the program."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE, prot=0) as memory:
            recorder.expect(memory.try_load(), 0)

    path = record(action)
    assert run_program(path).returncode == 1
    assert run_program(path, "--expect", "p0.2=SIGSEGV").returncode == 0


@needs_cc
@pytest.mark.parametrize(("right", "status"), [((0, Errno.EINVAL), 0), ((0, Errno.ENOMEM), 1)])
def test_any_of_several_answers_may_be_right(record: Any, right: tuple[int, Errno], status: int) -> None:
    """What a test looks for among several answers is wrong only if it is none of them."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            recorder.expect(memory.protect(mmap.PROT_READ, 1), {ONE_OF: list(right)})

    path = record(action)
    assert run_program(path).returncode == status
    if status:
        assert "EINVAL; 0 or ENOMEM is right." in path.with_name("bug.c").read_text()


def test_answers_that_are_no_numbers_cannot_be_chosen_from(record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A choice with a signal in it is more than a line of C: exit code 6, and no broken program."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            recorder.expect(memory.load(), {ONE_OF: [1, "SIGBUS"]})

    assert cli.main(["repro", str(record(action))]) == ExitCode.CANNOT_EXPRESS
    assert "that any of 1 or SIGBUS is right (p0.2)" in capsys.readouterr().err


def a_child_protects(recorder: Any) -> None:
    """A child makes the call; its parent says what should have come of it, after calls of its own."""
    with Mapping.anonymous(PAGE_SIZE) as memory:

        def child(channel: Any) -> None:
            channel.send(int(memory.protect(mmap.PROT_READ, 1)))
            channel.receive()

        with ChildProcess(child) as process:
            answer = process.receive()
            memory.protect(mmap.PROT_READ, 1)
            recorder.expect(Errno(answer), Errno.EINVAL, peer=process.pid)


@needs_cc
def test_a_comparison_may_be_about_a_child_s_call(record: Any) -> None:
    """The check is the call of the process that was answered, and its verdict becomes the program's."""
    path = record(a_child_protects)
    check = find_check(load(path))
    assert (check.step.process, check.step.call) == ("p1", "mprotect")
    done = run_program(path)
    assert (done.returncode, done.stdout) == (0, "OK: mprotect: got Invalid argument, wanted Invalid argument\n")
    assert run_program(path, "--expect", f"{check.step.id}=ENOMEM").returncode == 1


class Short:
    """What makes calls while memory is short: the binding, and an allocation of each call fails."""

    injected = True

    def __init__(self, answer: Errno | None = None) -> None:
        self._answer = answer

    def kvmgmem_syscall(self, number: int, *arguments: int) -> int:
        """A call that is made, or that fails for want of memory."""
        return int(lib.kvmgmem_syscall(number, *arguments)) if self._answer is None else int(self._answer)


def short_of_memory(shortage: str) -> Callable[[Any], None]:
    """Calls during which allocations fail, the first of them after one that went well."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(2 * PAGE_SIZE) as memory:
            for answer in (None, Errno.ENOMEM, Errno.ENOMEM):
                with entry.through(Short(answer), fail_nth=3, shortage=shortage):
                    memory.protect(mmap.PROT_READ)
            recorder.expect(memory.load(), 1)

    return action


@needs_cc
@pytest.mark.skipif(Path("/proc/self/fail-nth").exists(), reason="this kernel can have allocations fail")
@pytest.mark.parametrize("shortage", list(Shortage))
def test_memory_runs_short_in_c_too(record: Any, shortage: Shortage) -> None:
    """The last call that failed for want of memory fails again, at each of its allocations; without them: a skip."""
    path = record(short_of_memory(shortage.value))
    trace = load(path)
    assert [step.id for step in trace.steps if step.injected] == ["p0.2", "p0.3", "p0.4"]
    assert [step.id for step in needed_steps(trace, find_check(trace))] == ["p0.1", "p0.2", "p0.4", "p0.5"]
    done = run_program(path)
    assert done.returncode == 4
    assert done.stdout.startswith("SKIP: /sys/kernel/debug/fail")
    text = path.with_name("bug.c").read_text()
    assert run_program(path, "--all").returncode == 4
    assert path.with_name("bug.c").read_text().count("mprotect(") == text.count("mprotect(") == 2
    assert text.count("arm(nth);") == 1
    assert text.index("arm(nth);") < text.index("mprotect(mem0, 0x2000, PROT_READ)", text.index("must(mprotect") + 20)
    assert "if (answer != -ENOMEM)\n\t\treturn ANOTHER_WAY;" in text
    assert ("make_it_fail" in text) is (shortage is Shortage.LASTING)
    lines = list(describe(trace))
    after = " and those after it" if shortage is Shortage.LASTING else ""
    assert [line.endswith(f"= ENOMEM  (allocation 3{after} failed)") for line in lines].count(True) == 2


@pytest.mark.skipif(Path("/proc/self/fail-nth").exists(), reason="this kernel can have allocations fail")
def test_what_failed_for_want_of_memory_is_not_repeated_without(record: Any) -> None:
    """A replay on a kernel that cannot have allocations fail leaves the call out and says so: it would succeed."""
    outcome = repeat(load(record(short_of_memory("lasting"))))
    assert (outcome.first, outcome.differing) == (None, 0)
    assert len(outcome.notes) == 3
    assert outcome.notes[0].startswith("p0.2 mprotect was left out: allocations cannot be made to fail")


@needs_cc
@pytest.mark.skipif(Path("/proc/self/fail-nth").exists(), reason="this kernel can have allocations fail")
def test_an_answer_for_want_of_memory_may_be_the_question(record: Any) -> None:
    """Which allocation leads to which answer may change: only the answer that nobody should get is wrong."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            for _ in range(2):
                with entry.through(Short(Errno.EFAULT), fail_nth=1, shortage="momentary"):
                    answer = memory.protect(mmap.PROT_READ)
            recorder.expect(answer, Errno.ENOMEM)

    path = record(action)
    assert run_program(path).returncode == 4
    text = path.with_name("bug.c").read_text()
    assert 'return race_verdict("mprotect", answer, -EFAULT);' in text
    assert text.count("mprotect(") == 1


@needs_cc
def test_several_processes_take_turns(record: Any) -> None:
    """What a child stores the parent loads, and the other way round, in the recorded order."""

    def action(recorder: Any) -> None:
        with Mapping.try_map(PAGE_SIZE, flags=SHARED) as memory:  # type: ignore[union-attr]
            memory.store(1)

            def child(channel: Any) -> None:
                memory.store(memory.load() + 1)
                channel.send("done")
                channel.receive()
                memory.store(STAMP)

            with ChildProcess(child) as process:
                assert process.receive() == "done"
                memory.store(3, 8)
                process.send()
                process.result()
                process.wait()
            recorder.expect(memory.load(), STAMP)

    path = record(action)
    assert [step.process for step in load(path).steps if step.call == "store"] == ["p0", "p1", "p0", "p1"]
    assert run_program(path).returncode == 0
    assert "static void p1_does(void)" in path.with_name("bug.c").read_text()


@needs_cc
def test_descriptors_pass_in_c_as_they_did(record: Any) -> None:
    """A descriptor that a child sent is used by the parent."""

    def action(recorder: Any) -> None:
        def child(channel: Any) -> None:
            channel.send(fds=[os.open("/dev/zero", os.O_RDWR)])
            channel.receive()

        with ChildProcess(child) as process:
            (fd,) = process.channel.receive_with_fds()[1]
            os.set_inheritable(fd, False)
            mapping = Mapping.try_map(PAGE_SIZE, fd=fd, flags=mmap.MAP_PRIVATE)
            recorder.expect(0 if isinstance(mapping, Mapping) else mapping, Errno.EBADF)
            process.send()
            process.wait()
        os.close(fd)

    path = record(action)
    done = run_program(path)
    assert (done.returncode, done.stdout) == (1, "BUG: mmap: got 0, wanted Bad file descriptor\n")


@needs_cc
def test_calls_that_ran_into_each_other_do_so_again(record: Any) -> None:
    """Two threads are released together, round after round, until the answer comes that nobody should get."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            beside = threading.Thread(target=lambda: memory.protect(mmap.PROT_READ))
            answer = memory.protect(mmap.PROT_READ, 1)
            beside.start()
            beside.join()
            recorder.expect(answer, Errno.ENOMEM)

    path = record(action)
    lines = path.read_text().splitlines()
    first_answer = next(number for number, line in enumerate(lines) if '"answer":"EINVAL"' in line)
    # As if the second call had begun before the first one was answered.
    lines.insert(first_answer, lines.pop(first_answer + 1))
    path.write_text("\n".join(lines) + "\n")
    done = run_program(path)
    assert (done.returncode, done.stdout) == (1, "BUG: mprotect: Invalid argument\n")
    text = path.with_name("bug.c").read_text()
    assert text.count("pthread_barrier_wait(&barrier);") == 2


@needs_cc
def test_a_child_that_became_something_else_is_ended(record: Any) -> None:
    """A child whose end the trace does not hold is killed where its parent waited for it: in C and in a replay."""

    def action(recorder: Any) -> None:
        with Mapping.try_map(PAGE_SIZE, flags=SHARED) as memory:  # type: ignore[union-attr]

            def child(_: object) -> None:
                memory.store(STAMP)
                os.execv("/bin/true", ["true"])

            with ChildProcess(child) as process:
                process.wait()
            recorder.expect(memory.load(), STAMP)

    path = record(action)
    assert run_program(path).returncode == 0
    outcome = repeat(load(path))
    assert (outcome.first, outcome.notes) == (None, [])


def test_what_c_cannot_express_is_said(record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A call that the generator does not know, on which the check depends, is an exit code of its own."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            memory.resize(2 * PAGE_SIZE)

    path = record(action)
    assert cli.main(["repro", str(path), "--expect", "p0.2=0"]) == ExitCode.CANNOT_EXPRESS
    assert "cannot express this in C: the call mremap" in capsys.readouterr().err


def test_every_guest_program_is_explained() -> None:
    """The comment beside a program's bytes says what they do."""
    pytest.importorskip("kvmgmem.arch.x86_64")
    from kvmgmem.arch.x86_64 import programs

    assert set(c_parts.PROGRAMS) == set(programs())


# -- with KVM


def bound_twice(recorder: Any) -> None:
    """A page that is bound already is bound again, after much that has nothing to do with it."""
    from kvmgmem.kvm import Kvm

    with Kvm.open() as kvm, kvm.create_vm() as other, kvm.create_vm() as vm:
        other.check_extension(1)
        with vm.create_guest_memfd(2 * MiB) as gmem, vm.create_guest_memfd(2 * MiB) as unrelated:
            page = MemoryRegion(slot=1, gpa=GiB, size=PAGE_SIZE, gmem=gmem)
            vm.set_region(page.but(slot=7))
            vm.delete_region(7)
            vm.set_region(page.but(slot=2, gpa=3 * GiB, gmem=unrelated))
            vm.set_region(page)
            copy = gmem.duplicate()
            answer = vm.raw.set_region(page.but(slot=3, gpa=2 * GiB, gmem=copy))
            recorder.expect(answer, Errno.EEXIST, shows=Errno.EINVAL, bug="B14")
            copy.close()


@needs_kvm
@needs_cc
def test_only_what_the_answer_depends_on_stays(record: Any) -> None:
    """Other VMs, files and slots go, and so does a slot that was made and deleted; a copy of a descriptor is the file."""
    path = record(bound_twice)
    trace = load(path)
    kept = needed_steps(trace, find_check(trace))
    assert [step.call.removeprefix("KVM_") for step in kept] == [
        "open", "CREATE_VM", "CREATE_GUEST_MEMFD", "SET_USER_MEMORY_REGION2", "dup", "SET_USER_MEMORY_REGION2",
    ]  # fmt: skip
    assert [step.arguments["slot"] for step in kept if "slot" in step.arguments] == [1, 3]
    answered = kept[-1].answer
    assert run_program(path).returncode == (0 if answered == "EEXIST" else 1)
    assert "KVM_CAP" not in path.with_name("bug.c").read_text()


@needs_kvm
@needs_cc
def test_a_guest_comes_along(record: Any) -> None:
    """Page tables, the program that runs, registers and mode are in the C program; the guest reads what the host stored."""
    pytest.importorskip("kvmgmem.arch.x86_64")
    from kvmgmem.arch.x86_64 import GuestMachine
    from kvmgmem.kvm import Kvm

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm() as vm, Mapping.anonymous(2 * MiB) as memory:
            memory.store(STAMP, PAGE_SIZE)
            vm.set_region(MemoryRegion(slot=1, gpa=GiB, size=2 * MiB, hva=memory.address))
            machine = GuestMachine(vm)
            cpu = machine.cpu()
            cpu.store(GiB, 1)
            recorder.expect(cpu.load(GiB + PAGE_SIZE), STAMP)
            cpu.close()
            machine.close()

    path = record(action)
    done = run_program(path)
    assert (done.returncode, done.stdout) == (0, "OK: rax of the guest: got 0x5eed, wanted 0x5eed\n")
    text = path.with_name("bug.c").read_text()
    assert "identity_tables(mem1 + 0x1000, 0xd0001000);" in text
    assert {name for name in c_parts.PROGRAMS if f" {name}[] = " in text} == {"load8", "store8"}


@needs_kvm
@needs_cc
def test_a_guest_that_goes_through_pages_does_so_in_a_loop(record: Any) -> None:
    """Runs that differ by a step in one register are one loop; what should have ended otherwise is checked by itself."""
    pytest.importorskip("kvmgmem.arch.x86_64")
    from kvmgmem.arch.x86_64 import GuestMachine
    from kvmgmem.kvm import Kvm

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm() as vm, Mapping.anonymous(MiB) as memory:
            for page in range(5):
                memory.store(page, page * PAGE_SIZE)
            vm.set_region(MemoryRegion(slot=1, gpa=GiB, size=MiB, hva=memory.address))
            machine = GuestMachine(vm)
            cpu = machine.cpu()
            for page in range(5):
                assert cpu.load(GiB + page * PAGE_SIZE) == page
            recorder.expect(4, told(Plain.HVA_FAULT))
            recorder.expect(4, 4)
            cpu.close()
            machine.close()

    path = record(action)
    done = run_program(path)
    assert done.returncode == 1
    assert "BUG: the answer of KVM_RUN: got 0, wanted Bad address" in done.stdout
    text = path.with_name("bug.c").read_text()
    assert "for (uint64_t rdi = 0x40000000; rdi < 0x40004000; rdi += 0x1000) {" in text
    assert ".rdi = rdi," in text
    assert "KVM_EXIT_IO (port 0x10" in text
    assert text.count('"KVM_SET_REGS")') == 2
    last = [step.id for step in load(path).steps if step.call == "KVM_GET_REGS"][-1]
    done = run_program(path, "--expect", f"{last}=4")
    assert (done.returncode, done.stdout) == (0, "OK: rax of the guest: got 0x4, wanted 0x4\n")
    assert "rdi < 0x40005000;" in path.with_name("bug.c").read_text()


@needs_cc
@pytest.mark.parametrize(
    ("stride", "rise", "text"),
    [
        (PAGE_SIZE, 0, "0x300;"),
        (PAGE_SIZE, 1, "0x300 + at / 0x1000;"),
        (PAGE_SIZE, -1, "0x300 - at / 0x1000;"),
        (8, 16, "0x300 + 0x10 * (at / 8);"),
    ],
)
def test_stores_in_a_row_become_a_loop(record: Any, stride: int, rise: int, text: str) -> None:
    """Hundreds of stores are a line of C: with the values that they had, and only as far as they go in even steps."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(MiB) as memory:
            memory.store(STAMP, MiB // 2)
            for page in range(100):
                memory.store(0x300 + rise * page, 16 + stride * page)
            memory.store(STAMP, 16 + stride * 101)
            for page in (0, 1, 57, 99):
                assert memory.load(16 + stride * page) == 0x300 + rise * page
            assert memory.load(16 + stride * 100) == 0
            recorder.expect(memory.load(16 + stride * 99), 0x300 + rise * 99)

    path = record(action)
    assert run_program(path).returncode == 0
    program = path.with_name("bug.c").read_text()
    assert program.count("for (uint64_t at = 0; ") == 1
    assert f"*(volatile uint64_t *)(mem0 + 0x10 + at) = {text}" in program
    assert program.count(hex(STAMP)) == 2


def test_where_a_prefault_stopped_is_part_of_the_check(tmp_path: Path) -> None:
    """A prefault may answer what it should and stop elsewhere: the program looks at what the kernel wrote back, too."""
    asked = {"structure": "kvm_pre_fault_memory", "gpa": GiB, "size": 2 * PAGE_SIZE}
    left = {"structure": "kvm_pre_fault_memory", "gpa": GiB + 2 * PAGE_SIZE}
    common = {"at": 1, "pid": 1, "tid": 1, "process": "p0", "thread": "t0"}
    lines: list[dict[str, Any]] = [{"trace": "begin", "schema": 1}]
    for number, (call, on, arguments, answer) in enumerate(
        [
            ("open", "", {"path": "/dev/kvm"}, "kvm0"),
            ("KVM_CREATE_VM", "kvm0", {}, "vm0"),
            ("KVM_CREATE_VCPU", "vm0", {}, "vcpu0"),
            ("KVM_PRE_FAULT_MEMORY", "vcpu0", asked, 0),
        ]
    ):
        lines.append({"trace": "call", "id": f"p0.{number}", "call": call, "on": on, "arguments": arguments, **common})
        out = {"out": left} if call == "KVM_PRE_FAULT_MEMORY" else {}
        lines.append({"trace": "answer", "id": f"p0.{number}", "answer": answer, **out})
    seen, wanted = (decode.plain(told(Left(0, GiB + pages * PAGE_SIZE, (2 - pages) * PAGE_SIZE))) for pages in (2, 1))
    lines.append({"trace": "expected", "process": "p0", "seen": seen, "wanted": wanted})
    trace = build(lines)
    check = find_check(trace)
    assert (check.step.call, check.aspect) == ("KVM_PRE_FAULT_MEMORY", "left")
    text = c_program(trace, check, needed_steps(trace, check))
    told_as = text.replace("\n *", "")
    assert "gives 0 with gpa 0x40002000, size 0x0 left; 0 with gpa 0x40001000, size 0x1000 left is right." in told_as
    assert 'verdict("gpa left", range.gpa, 0x40001000)' in text
    source = tmp_path / "bug.c"
    source.write_text(text)
    if shutil.which(COMPILER[0]):
        build_program(source)


@needs_kvm
def test_a_trace_of_kvm_is_repeated(record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The same kernel gives the same answers; a recording that says otherwise is found out where it does."""
    path = record(bound_twice)
    assert cli.main(["replay", str(path)]) == ExitCode.OK
    assert "answers are as recorded" in capsys.readouterr().out
    text = path.read_text()
    last = load(path).step(find_check(load(path)).step.id)
    assert last is not None
    changed = text.replace(f'"answer":"{last.answer}"', '"answer":"EPERM"')
    assert changed != text
    path.write_text(changed)
    assert cli.main(["replay", str(path)]) == ExitCode.TEST_FAILED
    told = capsys.readouterr().out
    assert f"first differ at {last.id}: KVM_SET_USER_MEMORY_REGION2(vm1, {{slot=3" in told
    assert "recorded: EPERM" in told


@needs_cc
@pytest.mark.parametrize(
    ("verb", "options", "repeat"),
    [
        ("replay", (), "kvmgmem replay {trace} --kernel 7.3"),
        (
            "replay",
            ("--variant=npt0", "--append=a=1 b", "--test=the test"),
            "kvmgmem replay {trace} --kernel 7.3 --variant npt0 '--append=a=1 b' --test 'the test'",
        ),
        ("repro", ("-o", "{c}"), "kvmgmem repro {trace} -o {c} --kernel 7.3"),
        (
            "repro",
            ("-o", "{c}", "--append=a=1", "--expect=p0.1=0", "--all"),
            "kvmgmem repro {trace} -o {c} --kernel 7.3 --append=a=1 --expect=p0.1=0 --all",
        ),
    ],
)
def test_what_fails_in_a_guest_is_repeated_by_its_own_command(
    record: Any, monkeypatch: pytest.MonkeyPatch, verb: str, options: tuple[str, ...], repeat: str
) -> None:
    """The selftest that such a guest runs is made for it alone: nobody can be told to run that again."""
    asked = []

    def run_vm(args: Any) -> int:
        asked.append((args.repeat, args.kernel, args.variant, args.append))
        return 0

    monkeypatch.setattr("kvmgmem.lab.vm_cli.run_vm", run_vm)
    trace = record(memory)
    names = {"trace": str(trace), "c": str(trace.with_name("bug.c"))}
    options = tuple(option.format(**names).replace("p0.1", find_check(load(trace)).step.id) for option in options)
    assert cli.main([verb, str(trace), "--kernel", "7.3", *options]) == ExitCode.OK
    wanted = repeat.format(**names).replace("p0.1", find_check(load(trace)).step.id)
    variant = "npt0" if "--variant=npt0" in options else "plain"
    append = next((option.partition("=")[2] for option in options if option.startswith("--append=")), "")
    assert asked == [(wanted, "7.3", variant, append)]


# -- what a trace tells beside calls: whether VMs live, and KVM's statistics

DEBUGFS_PLACE = "/sys/kernel/debug"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="debugfs is root's")


def run_with(kind: str, trace: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Make the program and run it where another file system is mounted in debugfs's place."""
    source = trace.with_name("bug.c")
    assert cli.main(["repro", str(trace), "-o", str(source), "--build", *options]) == ExitCode.OK
    script = f"mount -t {kind} none {DEBUGFS_PLACE} && exec {source.with_suffix('')}"
    words = ["unshare", "--mount", "sh", "-c", script]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)


def directory_of(vm: Vm) -> str:
    """Its name in debugfs, which need not be mounted here."""
    return f"{threading.get_native_id()}-{vm.fileno()}"


@needs_kvm
@needs_cc
@needs_root
@pytest.mark.parametrize(("letting_go", "status"), [(True, 0), (False, 1)])
def test_whether_a_vm_lives_is_a_question_in_c_too(record: Any, letting_go: bool, status: int) -> None:
    """What may hold a VM stays in the program, failed calls too, and it looks where debugfs has the VM: 0, 1, or a skip."""

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm(0) as other, kvm.create_vm(0) as vm:
            name, stats = directory_of(vm), vm.stats_fd()
            assert vm.raw.create_guest_memfd(1) == Errno.EINVAL
            assert other.raw.delete_region(0) == Errno.EINVAL
            vm.close()
            if letting_go:
                stats.close()
            recorder.lives(name, alive=not letting_go)
            recorder.should_live(name, wanted=False)
            stats.close()

    path = record(action)
    done = run_with("debugfs", path)
    seen = "OK: whether vm1 lives: got 0, wanted 0" if letting_go else "BUG: whether vm1 lives: got 0x1, wanted 0"
    assert (done.returncode, done.stdout.replace("0x0", "0")) == (status, f"{seen}\n")
    text = path.with_name("bug.c").read_text()
    assert "KVM_CREATE_GUEST_MEMFD" in text
    assert " vm0" not in text
    done = run_with("tmpfs", path)
    assert (done.returncode, done.stdout.rpartition("/")[0]) == (4, "SKIP: /sys/kernel/debug/kvm")


@needs_kvm
@needs_cc
@needs_root
def test_another_process_may_ask_for_the_vm(record: Any) -> None:
    """A child's VM ends with the child, and its parent knows where to look."""

    def action(recorder: Any) -> None:
        def child(channel: Any) -> None:
            vm = Kvm.open().create_vm(0)
            channel.send(directory_of(vm))
            channel.receive()

        with ChildProcess(child) as process:
            name = process.receive()
            recorder.lives(name, alive=True)
            process.send()
            process.wait()
        recorder.lives(name, alive=False)
        recorder.should_live(name, wanted=True)

    path = record(action)
    first = next(step for step in load(path).steps if step.call == "lives")
    assert first.on == "vm0_p1"
    assert run_with("debugfs", path).returncode == 1  # it is gone, and the "test" wanted it to live
    assert run_with("debugfs", path, "--expect", f"{first.id}=1").returncode == 0


@needs_kvm
@needs_cc
@needs_root
def test_a_vm_that_outlived_its_test_is_looked_for_at_the_end(record: Any) -> None:
    """The runner adds to a trace what it saw after the test's end; the program makes the calls in a process of its own."""

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm(0) as vm:
            vm.create_guest_memfd(PAGE_SIZE).release()
            recorder.left = directory_of(vm)

    path = record(action)
    name = next(step.out["debugfs"] for step in load(path).steps if "debugfs" in step.out)
    plugin = TracePlugin(str(path.parent), lambda item: True)
    path.rename(plugin.path_of("a test") or path)
    plugin.outlived("a test", [name])
    trace = load(plugin.path_of("a test") or path)
    assert trace.complete
    check = find_check(trace)
    assert (check.step.call, check.step.on, check.seen, check.wanted) == ("lives", "vm0", 1, 0)
    done = run_with("debugfs", plugin.path_of("a test") or path)
    assert (done.returncode, done.stdout) == (0, "OK: whether vm0 lives: got 0, wanted 0\n")


@needs_kvm
@needs_cc
def test_a_statistic_is_read_in_c_too(record: Any) -> None:
    """A statistic by its name; where it once stood as it should, it must have stood for the question to mean anything."""

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm(0) as vm:
            assert read_stat(vm, "remote_tlb_flush_requests") == 0
            recorder.expect(read_stat(vm, "remote_tlb_flush_requests"), 0)

    path = record(action)
    check = find_check(load(path))
    assert [step.call for step in needed_steps(load(path), check)][-2:] == ["statistic", "statistic"]
    assert run_program(path).returncode == 0
    assert run_program(path, "--expect", f"{check.step.id}=7").returncode == 1
    assert "must_stand" not in path.with_name("bug.c").read_text()
    # As if both had been 5 where it was recorded.
    control = next(step.id for step in load(path).steps if step.call == "statistic")
    text = path.read_text()
    for step in (control, check.step.id):
        text = re.sub(rf'("id":"{step}","at":\d+,"answer":)0', r"\g<1>5", text)
    path.write_text(text.replace('"seen":0,"wanted":0', '"seen":5,"wanted":5'))
    done = run_program(path)
    assert (done.returncode, done.stdout) == (4, "SKIP: remote_tlb_flush_requests: so it says nothing\n")


@needs_kvm
def test_looks_are_repeated(record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay looks whether its own VM lives, and reads its statistics; what is otherwise here differs."""

    def action(recorder: Any) -> None:
        with Kvm.open() as kvm, kvm.create_vm(0) as vm:
            read_stat(vm, "remote_tlb_flush_requests")
            recorder.lives(directory_of(vm), alive=False)

    monkeypatch.setattr(host, "DEBUGFS", tmp_path)  # where no VM has a directory
    path = record(action)
    outcome = repeat(load(path))
    assert (outcome.first, outcome.notes) == (None, [])
    look = next(step.id for step in load(path).steps if step.call == "lives")
    text = path.read_text().replace("remote_tlb_flush_requests", "nothing")
    path.write_text(re.sub(rf'("id":"{look}","at":\d+,"answer":)0', r"\g<1>1", text))
    outcome = repeat(load(path))
    assert "there is no such statistic here: 'nothing'" in outcome.notes[0]
    assert outcome.first is not None
    assert (outcome.first.step.call, outcome.first.answered.answer) == ("lives", 0)


@needs_kvm
def test_a_life_that_the_model_says_otherwise_is_told(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that should have ended with its last descriptor, and does not, is what a recorded sequence is about."""
    monkeypatch.setattr(world, "_exists", lambda directory: True)
    monkeypatch.setattr(play, "GONE_LIMIT", 0.01)
    known = traits.probe()
    path = record(lambda _: play.play([CreateVm("v0", 0), Close("v0")], known, prefetches=False))
    check = find_check(load(path))
    assert (check.step.call, check.step.on, check.seen, check.wanted) == ("lives", "vm0", 1, 0)
    assert [step.call for step in needed_steps(load(path), check)] == ["open", "KVM_CREATE_VM", "close", "lives"]


# -- the plugin


@needs_kvm
def test_failing_tests_offer_their_program(pytester: pytest.Pytester) -> None:
    """Each test has a trace of its own; the record of a failure ends with the command that makes a C program of it."""
    import json

    pytester.makepyfile(
        """
        from kvmgmem.errors import Errno
        from kvmgmem.testing import contract, vm_types

        @contract("GM-CRE-001")
        @vm_types("default")
        def test_fails(vm):
            '''A rule.'''
            assert vm.raw.delete_region(5) == Errno.EPERM

        @contract("GM-CRE-001")
        @vm_types("default")
        def test_raises(vm):
            '''A rule.'''
            vm.delete_region(6)

        @contract("GM-CRE-001")
        @vm_types("default")
        def test_chooses(vm):
            '''A rule.'''
            assert vm.raw.delete_region(7) in (0, Errno.EPERM)
        """
    )
    results, traces = pytester.path / "results.jsonl", pytester.path / "traces"
    done = pytester.runpytest_subprocess(f"--results={results}", f"--trace-to={traces}", timeout=90)
    assert done.ret == ExitCode.TEST_FAILED
    ends = [json.loads(line) for line in results.read_text().splitlines() if '"verdict":"failed"' in line]
    wanted = {"fails": (5, "EPERM"), "raises": (6, 0), "chooses": (7, {ONE_OF: [0, "EPERM"]})}
    for end in ends:
        command = end["detail"].splitlines()[-1]
        name = end["test"].partition("::test_")[2].partition("[")[0]
        path = next(traces.glob(f"*test_{name}*"))
        assert command.startswith("as a C program: kvmgmem repro ")
        assert path.name in command
        check = find_check(load(path))
        assert (check.step.arguments["slot"], check.wanted) == wanted.pop(name)
        assert check.step.answer == check.seen == "EINVAL"
        assert load(path).header["rule"] == "A rule."
    assert not wanted


@needs_kvm
@needs_root
def test_what_a_test_says_of_a_vm_s_life_is_recorded(pytester: pytest.Pytester) -> None:
    """An assertion about a VM's directory is a comparison, too, and about the look that it was made with."""
    pytester.makepyfile(
        """
        from kvmgmem.testing import contract, vm_types
        from kvmgmem.testing.vm_directory import VmDirectory

        @contract("GM-CRE-001")
        @vm_types("default")
        def test_is_not_there(vm):
            directory = VmDirectory.of(vm)
            vm.check_extension(1)
            with vm.stats_fd():
                assert not directory.exists, "so early"

        @contract("GM-CRE-001")
        @vm_types("default")
        def test_waits(vm):
            VmDirectory.of(vm).wait_gone(0.01)
        """
    )
    results, traces = pytester.path / "results.jsonl", pytester.path / "traces"
    done = pytester.runpytest_subprocess(f"--results={results}", f"--trace-to={traces}", timeout=90)
    done.assert_outcomes(failed=2)
    for path in traces.iterdir():
        trace = load(path)
        check = find_check(trace)
        assert (check.step.call, check.step.on, check.seen, check.wanted) == ("lives", "vm0", 1, 0)
        assert check.step.id == [step.id for step in trace.steps if step.call == "lives"][-1]
    assert len(list(traces.iterdir())) == 2
