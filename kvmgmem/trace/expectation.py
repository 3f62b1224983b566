"""Which step of a trace a comparison is about, and so what a kernel that behaves answers there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace.steps import Expectation, Step, Trace, is_errno

# Objects that a test compares in place of the answer that made them, by how their repr begins.
_MADE_BY = {
    "Vm(": "KVM_CREATE_VM",
    "GuestMemfd(": "KVM_CREATE_GUEST_MEMFD",
    "Vcpu(": "KVM_CREATE_VCPU",
    "Mapping(": "mmap",
}
ONE_OF = "one of"
"""The key of what a test wants when several answers are right."""
PREFAULT = "Prefault"
"""What KVM_PRE_FAULT_MEMORY did, by `is`: its answer, and the gpa and size that it left."""
# Calls whose answer says nothing that a test would compare: what they bring is in what the kernel wrote back.
_ONLY_OUT = ("KVM_GET_REGS", "KVM_GET_SREGS", "cachestat", "mincore")


@dataclass(frozen=True)
class Check:
    """What decides: one thing that one step tells, and what it should be."""

    step: Step
    aspect: str
    """`answer`, `exit`, `filled`, `pages`, `left` (what a prefault left), or a register's name."""
    wanted: Any
    seen: Any
    shows: Any = None
    bug: str = ""


def find_check(trace: Trace, given: str = "") -> Check:
    """The check that a C program of this trace is to make.

    `given` is ID=ANSWER, which outranks what the trace says: the first comparison that failed, else the first with a known
    bug, else the last one that held. Raises `HarnessError` (USAGE) if there is none.
    """
    if given:
        return _given(trace, given)
    failed = [expectation for expectation in trace.expectations if not same(expectation.seen, expectation.wanted)]
    known = [expectation for expectation in trace.expectations if expectation.shows is not None]
    held = [expectation for expectation in trace.expectations if expectation not in failed and expectation not in known]
    for expectation in [*failed, *known, *reversed(held)]:
        check = subject(trace, expectation)
        if check is not None:
            return check
    if not trace.complete:
        lost = [step for step in trace.steps if step.answer is None]
        if lost:
            return Check(lost[-1], "answer", None, None)
    raise HarnessError(
        "the trace does not say what a kernel that behaves answers",
        "give it as --expect ID=ANSWER (ids: `kvmgmem trace --ids`), as in --expect p0.17=EINVAL",
        ExitCode.USAGE,
    )


def _given(trace: Trace, given: str) -> Check:
    step_id, equals, text = given.partition("=")
    step = trace.step(step_id)
    if not equals or step is None:
        raise HarnessError(
            f"--expect {given}: {'no = in it' if not equals else f'no step {step_id}'}",
            "write ID=ANSWER with an id from `kvmgmem trace --ids`, as in p0.17=EINVAL",
            ExitCode.USAGE,
        )
    if is_errno(text) or text.startswith("SIG"):
        return Check(step, "answer", text, step.answer)
    try:
        value = int(text, 0)
    except ValueError:
        raise HarnessError(f"--expect {given}: {text} is no answer", "give an errno or a number", ExitCode.USAGE) from None
    aspect = "rax" if step.call == "KVM_GET_REGS" else "pages" if step.call == "cachestat" else "answer"
    return Check(step, aspect, value, tell(step, aspect))


def tell(step: Step, aspect: str) -> Any:
    """What a step says about one aspect of it."""
    if aspect == "answer":
        return 0 if made(step) else step.answer
    if aspect == "exit":
        return [step.answer, step.out.get("exit")]
    if aspect == "filled":
        return step.answer == step.arguments["length"]
    if aspect == "left":
        after = step.out if "structure" in step.out else step.arguments
        return {"is": PREFAULT, "answer": step.answer, "gpa": after.get("gpa", 0), "size": after.get("size", 0)}
    return step.out.get(aspect, 0)


def made(step: Step) -> bool:
    """Whether the step made something that has a handle or a name."""
    return isinstance(step.answer, str) and not step.failed


def same(seen: Any, wanted: Any) -> bool:
    """Whether what was seen is what was wanted; of an object only the fields that are wanted count."""
    if isinstance(wanted, dict) and ONE_OF in wanted:
        return any(same(seen, each) for each in wanted[ONE_OF])
    if isinstance(wanted, dict) and isinstance(seen, dict):
        return all(key in seen and same(seen[key], value) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(seen, list):
        return len(wanted) == len(seen) and all(same(a, b) for a, b in zip(seen, wanted, strict=True))
    return bool(seen == wanted)


def subject(trace: Trace, expectation: Expectation) -> Check | None:
    """The step and aspect that a comparison is about; None if nothing in the trace looks like what was seen."""
    before = [
        step
        for step in reversed(trace.steps)
        if step.process == expectation.process and step.end < expectation.line and step.answer is not None
    ]
    seen, wanted, shows = expectation.seen, expectation.wanted, expectation.shows
    if isinstance(seen, list) and isinstance(wanted, list) and len(seen) == len(wanted):
        whole = _latest(before, seen)
        if whole is None:
            return _in_list(before, expectation)
        return Check(whole[0], whole[1], wanted, seen, shows, expectation.bug)
    if len(expectation.of) == 1:
        step = trace.step(expectation.of[0])
        if step is not None:
            return Check(step, "answer", wanted, seen, shows, expectation.bug)
    found = _latest(before, seen)
    if found is None:
        return None
    step, aspect = found
    told_of_run = isinstance(wanted, dict | list) and ONE_OF not in wanted
    if told_of_run and aspect not in ("exit", "answer", "left"):
        # A register was read, where the run should not even have ended in a report.
        run = next((other for other in before if other.call == "KVM_RUN" and other.end < step.start), None)
        return Check(run, "exit", wanted, tell(run, "exit"), shows, expectation.bug) if run else None
    if aspect == "exit" and not told_of_run:
        # The other way round: it should have ended in one.
        wanted = {"answer": 0, "exit": {"is": "IoExit"}} if isinstance(wanted, int) else wanted
    return Check(step, aspect, wanted, seen, shows, expectation.bug)


def _in_list(before: list[Step], expectation: Expectation) -> Check | None:
    """Of several values that were compared at once, the first that is not what it should be (or that a bug would change)."""
    shows = expectation.shows if isinstance(expectation.shows, list) else expectation.seen
    checks: list[Check | None] = []
    rest = before
    for seen, wanted, shown in reversed(list(zip(expectation.seen, expectation.wanted, shows, strict=False))):
        found = _latest(rest, seen)
        if found is None:
            checks.append(None)
            continue
        rest = rest[rest.index(found[0]) + 1 :]
        checks.append(Check(*found, wanted, seen, shown if expectation.shows is not None else None, expectation.bug))
    in_order = [check for check in reversed(checks) if check is not None]
    wrong = [check for check in in_order if not same(check.seen, check.wanted)]
    told = [check for check in in_order if check.shows is not None and check.shows != check.wanted]
    return next(iter(wrong or told), None)


def _latest(steps: Iterable[Step], seen: Any) -> tuple[Step, str] | None:
    """The latest step that told this value, and which aspect of it did."""
    for step in steps:
        for aspect, value in _aspects(step, seen):
            if type(value) is type(seen) and same(value, seen):
                return step, aspect
    return None


def _aspects(step: Step, seen: Any) -> Iterator[tuple[str, Any]]:
    if step.call == "KVM_RUN":
        exit_told = step.out.get("exit")
        full = {"is": "RunResult", "answer": step.answer, "exit": exit_told}
        yield "exit", {**full, "expired": bool(step.out.get("expired")), "kicked": bool(step.out.get("kicked"))}
        yield "exit", [step.answer, exit_told]
        yield "exit", exit_told
    if step.call == "KVM_GET_REGS":
        for register in ("rax", "rcx", "rbx", "rdi", "rip"):
            yield register, step.out.get(register, 0)
    if step.call == "cachestat":
        yield "pages", step.out.get("pages")
    if step.call == "KVM_PRE_FAULT_MEMORY":
        yield "left", tell(step, "left")
    if step.call == "first_other":
        yield "filled", step.answer == step.arguments["length"]
    if isinstance(seen, str) and any(seen.startswith(start) and step.call == call for start, call in _MADE_BY.items()):
        if made(step):
            yield "answer", seen
        return
    if isinstance(seen, dict) and seen.get("is") == "Fault" and isinstance(step.answer, str):
        yield "answer", seen if step.answer.startswith("SIG") else None
    if isinstance(seen, str) and seen.startswith("SIG") and str(step.answer).split()[0] == seen:
        yield "answer", seen
    if step.call not in (*_ONLY_OUT, "close", "munmap", "found", "open", "start", "wait", "exit"):
        yield "answer", tell(step, "answer")
