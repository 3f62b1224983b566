"""`kvmgmem trace`: a trace as people read it, one call a line, in KVM's words."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace import decode
from kvmgmem.trace.expectation import same, subject
from kvmgmem.trace.steps import Expectation, Step, Trace, load

_DATA = 40


def add_trace_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("trace", help="show a recorded trace (`run --trace`, `vm --trace`) as text")
    parser.add_argument("trace", type=Path, metavar="TRACE", help="what --trace wrote: a file or its directory")
    parser.add_argument("--test", default="", metavar="NODEID", help="which test, if the file holds traces of several")
    parser.add_argument("--ids", action="store_true", help="with the ids that `repro --expect` takes, and with times")


def run_trace(args: argparse.Namespace) -> int:
    """Print the trace; raises `HarnessError`."""
    for line in describe(load(args.trace, args.test), ids=args.ids):
        print(line)
    return ExitCode.OK


def describe(trace: Trace, *, ids: bool = False) -> Iterator[str]:
    """The lines of a trace: the circumstances, a line a step, and what the test wanted below the step that it is about."""
    found = trace.header.get("circumstances", {})
    if trace.header.get("test"):
        yield f"# {trace.header['test']}"
    if found:
        yield f"# {found.get('release')}, {found.get('backend')}, {found.get('paging')} paging, {found.get('where')}"
    wanted: dict[str, list[str]] = {}
    for expectation in trace.expectations:
        check = subject(trace, expectation)
        if check is not None:
            wanted.setdefault(check.step.id, []).append(_wanted(expectation, check.seen, check.wanted))
    several = len({step.process for step in trace.steps}) > 1
    first = trace.steps[0].at if trace.steps else 0
    for step in trace.steps:
        prefix = f"{(step.at - first) / 1e9:10.6f} {step.id:8} " if ids else ""
        prefix += f"{step.process:5} " if several else ""
        prefix += f"{step.thread:3} " if any(other.thread != "t0" for other in trace.steps) else ""
        yield f"{prefix}{call(step)} = {result(step)}"
        for text in wanted.get(step.id, ()):
            yield f"{' ' * len(prefix)}    ^ {text}"
    if not trace.complete:
        yield "# the trace ends here without its end: the process or the kernel died"


def _wanted(expectation: Expectation, seen: Any, wanted: Any) -> str:
    bug = f" ({expectation.bug})" if expectation.bug else ""
    if same(seen, wanted):
        return f"as wanted{bug}"
    return f"wanted {value(wanted)}{bug}"


def call(step: Step) -> str:
    """A step as a call: `KVM_SET_USER_MEMORY_REGION2(vm0, {slot=1, ...})`."""
    arguments = dict(step.arguments)
    structure = arguments.pop("structure", None)
    inside = [step.on] if step.on else []
    fields = [f"{name}={value(item)}" for name, item in arguments.items()]
    if structure is not None:
        inside += [f"{{{', '.join(fields)}}}"] if fields else []
    else:
        inside += [text.partition("=")[2] if text.startswith("argument=") else text for text in fields]
    return f"{step.call}({', '.join(inside)})"


def result(step: Step) -> str:
    """The answer of a step, and what the kernel wrote back."""
    if step.answer is None:
        return "? (it never came back)"
    out = {name: item for name, item in step.out.items() if name != "structure"}
    told = value(step.answer)
    exits = out.pop("exit", None)
    out.pop("debugfs", None)
    short = out.pop("injected", 0)
    if exits is not None:
        told += f" {value(exits)}"
    if out:
        told += f" {value(out)}"
    if short:
        more = " and those after it" if step.shortage == "lasting" else ""
        told += f"  (allocation {step.fail_nth}{more} failed)"
    return told


def value(item: Any) -> str:
    """A value: sizes and addresses in hexadecimal, data cut short."""
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, int):
        return str(item) if -10 < item < 10 else f"{item:#x}"
    if isinstance(item, str):
        return _data(item) if item.startswith(("hex:", "zlib:")) else item
    if isinstance(item, Mapping):
        kind = str(item.get("is", "")).removesuffix("Exit")
        return kind + "{" + ", ".join(f"{name}={value(part)}" for name, part in item.items() if name != "is") + "}"
    if isinstance(item, list):
        return "[" + ", ".join(value(part) for part in item) + "]"
    return json.dumps(item)


def _data(packed: str) -> str:
    data = decode.unpack(packed)
    text = data[: _DATA // 2].hex()
    return f"<{text}{'...' if len(data) > _DATA // 2 else ''}, {len(data)} bytes>"
