"""Traces as they are written and read: what a recorder notes of memory, processes and calls that never come back."""

import json
import mmap
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kvmgmem import cli, entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import PAGE_SIZE
from kvmgmem.errors import Errno, HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.memory import Mapping
from kvmgmem.processes import ChildProcess
from kvmgmem.results.records import Trace as TraceRecord
from kvmgmem.results.records import parse_line, to_line
from kvmgmem.syscalls import NUMBER
from kvmgmem.trace import decode, offer, text
from kvmgmem.trace.expectation import find_check, subject
from kvmgmem.trace.file import TraceFile, name_for, write_traces
from kvmgmem.trace.file import to_line as trace_line
from kvmgmem.trace.recorder import recording
from kvmgmem.trace.steps import Trace, build, load

STAMP = 0x5EED


def recorded(tmp_path: Path, action: Any) -> Trace:
    """Record what `action(recorder)` does, through a file."""
    file = TraceFile(tmp_path / "a.trace")
    with recording(file, {"release": "1.2.3"}) as recorder:
        action(recorder)
    file.close()
    return load(tmp_path / "a.trace")


def calls(trace: Trace) -> list[tuple[str, object]]:
    """Calls and answers, in order."""
    return [(step.call, step.answer) for step in trace.steps]


# -- words


@pytest.mark.parametrize("value", [0, 1, 3, 0x12, 0x8022, 1 << 40])
def test_flags_read_as_c_and_come_back(value: int) -> None:
    """A flag word by name means the same number; what has no name is in it as a number."""
    assert decode.number(decode.map_flags(value)) == value


def test_flags_by_name() -> None:
    """Known bits have the names of the kernel's headers."""
    assert decode.map_flags(0x22 | 1 << 40) == "MAP_PRIVATE|MAP_ANONYMOUS|0x10000000000"
    assert decode.prot(0) == "PROT_NONE"
    assert decode.falloc_mode(3) == "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE"


def test_a_structure_by_fields_and_back() -> None:
    """Fields that are zero are left out, flags have names, and the fields fill another structure with the same bytes."""
    fields = {"slot": 1, "flags": 4 | 0x100, "guest_memfd_offset": 1 << 63, "pad2": [7] * 14}
    region = ffi.new("struct kvm_userspace_memory_region2 *", fields)
    told = decode.structure_fields(region)
    assert told == {**fields, "flags": "KVM_MEM_GUEST_MEMFD|0x100"}
    again = ffi.new("struct kvm_userspace_memory_region2 *")
    decode.assign(again[0], told)
    assert bytes(ffi.buffer(again)) == bytes(ffi.buffer(region))


@pytest.mark.parametrize("data", [b"", b"\x01\x02", bytes(70000), os.urandom(3000)])
def test_data_are_packed_and_come_back(data: bytes) -> None:
    """Data of any length survive."""
    assert decode.unpack(decode.pack(data)) == data


# -- recording


def test_nothing_is_in_the_way_when_nobody_records(tmp_path: Path) -> None:
    """The binding itself makes the calls: before, and again after a recording."""
    assert entry.native is lib
    recorded(tmp_path, lambda _: None)
    assert entry.native is lib
    assert entry.watcher is None


def test_memory_has_names_and_faults_are_answers(tmp_path: Path) -> None:
    """A range is named once; what is done to it says where in it, and a signal is an answer with a place."""

    def action(_: object) -> None:
        with Mapping.anonymous(2 * PAGE_SIZE) as memory:
            memory.store(STAMP, PAGE_SIZE + 8, width=2)
            memory.protect(mmap.PROT_READ)
            memory.try_store(1, 16)
            assert memory.load(PAGE_SIZE + 8) == STAMP

    trace = recorded(tmp_path, action)
    assert calls(trace) == [
        ("mmap", "mem0"), ("store", 0), ("mprotect", 0), ("store", "SIGSEGV 2 at mem0+0x10"), ("load", STAMP), ("munmap", 0),
    ]  # fmt: skip
    assert trace.steps[1].arguments == {"address": "mem0+0x1008", "width": 2, "value": STAMP}
    assert trace.complete


def test_a_range_that_begins_where_another_ends_has_its_own_name(tmp_path: Path) -> None:
    """One past the end of a range is the next range's begin, if there is one."""

    def action(_: object) -> None:
        with Mapping.anonymous(2 * PAGE_SIZE) as room:
            lower = Mapping.try_map(PAGE_SIZE, address=room.address, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10)
            upper = Mapping.try_map(
                PAGE_SIZE, address=room.address + PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
            )
            assert isinstance(lower, Mapping)
            assert isinstance(upper, Mapping)
            upper.load()
            lower.load(PAGE_SIZE - 8)
            upper.unmap()
            lower.unmap()

    trace = recorded(tmp_path, action)
    assert [step.arguments["address"] for step in trace.steps if step.call == "load"] == ["mem2", "mem1+0xff8"]


def test_a_call_is_written_before_it_is_made(tmp_path: Path) -> None:
    """A process that dies within a call leaves the call behind, without an answer."""
    pid = os.fork()
    if pid == 0:
        file = TraceFile(tmp_path / "a.trace")
        with recording(file, {}):
            entry.syscall(62, os.getpid(), signal.SIGKILL)  # kill(2): it does not come back
    os.waitpid(pid, 0)
    trace = load(tmp_path / "a.trace")
    assert [(step.call, step.answer, step.overlapped) for step in trace.steps] == [("syscall 62", None, True)]
    assert not trace.complete
    assert "never came back" in "\n".join(text.describe(trace))
    assert find_check(trace).step.call == "syscall 62"


def test_processes_and_descriptors_on_their_way(tmp_path: Path) -> None:
    """Each process has its own line of steps; descriptors that pass have handles on both sides."""

    def action(_: object) -> None:
        opened = os.open("/dev/null", os.O_RDWR)

        def child(channel: Any) -> int:
            (fd,) = channel.receive_with_fds()[1]
            return int(entry.syscall(NUMBER["write"], fd, 0, 0))

        with ChildProcess(child, close_fds=[opened]) as process:
            process.send(fds=[opened])
            assert process.result() == 0
            process.wait()
        os.close(opened)

    trace = recorded(tmp_path, action)
    assert [step.call for step in trace.steps if step.process == "p0"] == ["fork", "found", "send", "wait"]
    assert [step.call for step in trace.steps if step.process == "p1"] == [
        "start", "found", "close", "found", "receive", "write", "exit",
    ]  # fmt: skip
    wait = next(step for step in trace.steps if step.call == "wait")
    assert wait.arguments["of"] == "p1"
    assert next(step for step in trace.steps if step.call == "write").on == "file1_p1"


# -- reading


def test_a_cut_last_line_is_what_a_panic_leaves(tmp_path: Path) -> None:
    """Everything before it is read."""
    path = tmp_path / "a.trace"
    recorded(tmp_path, lambda _: Mapping.anonymous(PAGE_SIZE).unmap())
    path.write_bytes(path.read_bytes()[:-40])
    assert calls(load(path)) == [("mmap", "mem0"), ("munmap", None)]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("", "no beginning"),
        ('{"trace":"begin","schema":99}\n', "schema 99"),
        ("nonsense\n{}\n", "line 1 is no JSON"),
        ('{"other":1}\n', "no line of a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, wrong: str) -> None:
    """One line says what is wrong, and the exit code is that of a wrong command line."""
    path = tmp_path / "a.trace"
    path.write_text(content)
    assert cli.main(["trace", str(path)]) == ExitCode.USAGE
    assert wrong in capsys.readouterr().err


def test_a_directory_stands_for_the_trace_in_it(tmp_path: Path) -> None:
    """One trace is found; of two, one has to be named."""
    recorded(tmp_path, lambda _: None)
    assert load(tmp_path).complete
    (tmp_path / "b.trace").write_bytes((tmp_path / "a.trace").read_bytes())
    with pytest.raises(HarnessError, match=r"2 traces: a\.trace, b\.trace"):
        load(tmp_path)


def test_a_trace_comes_out_of_a_guest_as_records(tmp_path: Path) -> None:
    """Its lines are records among the others; they go into a file for each test, and are read from the results as well."""
    trace = recorded(tmp_path, lambda _: Mapping.anonymous(PAGE_SIZE).unmap())
    records = [parse_line(to_line(TraceRecord("test_a.py::test_b[x]", line))) for line in trace.lines]
    (path,) = write_traces(records, tmp_path / "out")
    assert path.name == "test_a.py--test_b[x].trace"
    assert load(path).lines == trace.lines
    results = tmp_path / "results.jsonl"
    results.write_text("".join(f"{to_line(record)}\n" for record in records))
    assert load(results).lines == trace.lines
    assert load(results, "test_a.py::test_b[x]").lines == trace.lines


def test_file_names_hold_nothing_odd() -> None:
    """Slashes and colons of a node id do not reach the file system."""
    assert name_for("selftests/test_x.py::test_y[default-gM]") == "test_x.py--test_y[default-gM].trace"


# -- what a comparison is about


def lines(*steps: dict[str, Any], **expected: Any) -> Trace:
    """A trace of these steps, each with its answer, and one comparison after them."""
    found: list[dict[str, Any]] = [{"trace": "begin", "schema": 1}]
    for number, step in enumerate(steps, 1):
        head = {"id": f"p0.{number}", "at": number, "pid": 1, "tid": 1, "process": "p0", "thread": "t0"}
        fields = {"arguments": {}, **{key: value for key, value in step.items() if key not in ("answer", "out")}}
        found.append({"trace": "call", **head, **fields})
        found.append(
            {"trace": "answer", "id": head["id"], "at": number, "answer": step["answer"], "out": step.get("out", {})}
        )
    if expected:
        found.append({"trace": "expected", "process": "p0", **expected})
    return build([*found, {"trace": "end"}])


SET = {"call": "KVM_SET_USER_MEMORY_REGION2", "on": "vm0"}
REGS = {"call": "KVM_GET_REGS", "on": "vcpu0", "answer": 0}


def test_the_latest_call_with_that_answer_is_meant() -> None:
    """Without more to go by, it is the last call that answered what was seen; one that only asks is not meant."""
    trace = lines({**SET, "answer": "EINVAL"}, {**SET, "answer": "EINVAL"}, REGS, seen="EINVAL", wanted="EEXIST", bug="B14")
    check = find_check(trace)
    assert (check.step.id, check.aspect, check.wanted, check.bug) == ("p0.2", "answer", "EEXIST", "B14")


def test_an_answer_remembers_its_call(tmp_path: Path) -> None:
    """Of two calls that answered 0 the one is meant whose answer was compared, also when it is not the last."""

    def action(recorder: Any) -> None:
        with Mapping.anonymous(PAGE_SIZE) as memory:
            first = memory.protect(mmap.PROT_READ)
            memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
            recorder.expect(first, Errno.EACCES)

    check = find_check(recorded(tmp_path, action))
    assert check.step.arguments["prot"] == "PROT_READ"


def test_of_several_values_the_first_wrong_one_decides() -> None:
    """A list is matched with the calls that told its elements."""
    trace = lines(
        *({**REGS, "out": {"rax": value}} for value in (1, 0xEE, 0xEE, 4)), seen=[1, 0xEE, 0xEE, 4], wanted=[1, 2, 3, 4]
    )
    check = find_check(trace)
    assert (check.step.id, check.aspect, check.wanted) == ("p0.2", "rax", 2)


def test_a_run_is_compared_by_answer_and_exit() -> None:
    """The whole result, the pair of answer and exit, or the exit alone name the run."""
    exit_told = {"is": "MmioExit", "gpa": 4096, "length": 8, "write": False, "data": "hex:00"}
    run = {"call": "KVM_RUN", "on": "vcpu0", "answer": 0, "out": {"exit": exit_told}}
    whole = {"is": "RunResult", "answer": 0, "exit": exit_told, "expired": False, "kicked": False}
    for seen in (whole, [0, exit_told], exit_told):
        trace = lines(run, {**SET, "answer": 0}, seen=seen, wanted={"is": "x"})
        check = subject(trace, trace.expectations[0])
        assert check is not None
        assert (check.step.id, check.aspect) == ("p0.1", "exit")


def test_without_a_comparison_the_command_line_decides() -> None:
    """A trace of a test that passed says nothing of what is right."""
    trace = lines({**SET, "answer": 0})
    with pytest.raises(HarnessError, match="does not say what"):
        find_check(trace)
    assert find_check(trace, "p0.1=EINVAL").wanted == "EINVAL"
    for wrong in ("p0.1", "p0.9=0", "p0.1=soon"):
        with pytest.raises(HarnessError, match="--expect"):
            find_check(trace, wrong)


def test_text_says_what_was_wanted_below_the_call() -> None:
    """One line a call, in KVM's words, and the comparison under the call that it is about."""
    request = {"structure": "kvm_userspace_memory_region2", "slot": 1, "memory_size": 0x2000}
    trace = lines({**SET, "arguments": request, "answer": "EINVAL"}, seen="EINVAL", wanted="EEXIST", bug="B14")
    assert list(text.describe(trace)) == [
        "KVM_SET_USER_MEMORY_REGION2(vm0, {slot=1, memory_size=0x2000}) = EINVAL",
        "    ^ wanted EEXIST (B14)",
    ]


def test_the_offer_records_where_nothing_is_recorded_yet() -> None:
    """One command line: with a trace it is `repro`, without one it runs the test again with --trace first."""
    assert offer.offer("why", "kvmgmem run -- {test}", "a.py::b[c]") == (
        "why\nas a C program: kvmgmem run --trace bug-trace -- 'a.py::b[c]'; kvmgmem repro bug-trace -o bug.c"
    )
    done = offer.offer("", "kvmgmem vm --kernel x -- {test}", "a", Path("/d/a.trace"))
    assert done == "as a C program: kvmgmem repro /d/a.trace -o bug.c"
    assert offer.offer(done, "kvmgmem run -- {test}", "a") == done


def test_lines_are_ascii_and_whole() -> None:
    """A line is JSON and ends in a newline."""
    line = trace_line({"trace": "x", "text": "ü"})
    assert line.endswith(b"\n")
    assert json.loads(line.decode("ascii")) == {"trace": "x", "text": "ü"}
