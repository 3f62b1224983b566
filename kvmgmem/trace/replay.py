"""`kvmgmem replay`: make the calls of a trace again, here or in a guest, and say where the answers first differ."""

import argparse
import base64
import shlex
import tempfile
import zlib
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace.repeat import Outcome, repeat
from kvmgmem.trace.steps import Trace, load
from kvmgmem.trace.text import call, result, value

_TEST = '''"""Replay of one trace; the trace itself is in it, so that it reaches the guest whole."""

import base64
import zlib
from pathlib import Path

from kvmgmem.trace.replay import report
from kvmgmem.trace.repeat import repeat
from kvmgmem.trace.steps import load

TRACE = "{packed}"


def test_replay(kvm, tmp_path: Path) -> None:
    """The kernel gives the answers that the trace holds."""
    path = tmp_path / "replayed.trace"
    path.write_bytes(zlib.decompress(base64.b64decode(TRACE)))
    outcome = repeat(load(path))
    if outcome.first is not None:
        raise AssertionError("\\n".join(report(outcome)))
'''


def add_replay_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "replay",
        help="make the calls of a trace again and say where the answers first differ",
        epilog="Exit codes: 0 every answer is the recorded one, 1 one differs, 6 there was nothing that can be repeated. "
        "This process makes the calls: do not replay here what takes a kernel down.",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="what --trace wrote: a file or its directory")
    parser.add_argument("--test", default="", metavar="NODEID", help="which test, if the file holds traces of several")
    parser.add_argument("--kernel", metavar="IMAGE|NAME", help="replay in a QEMU guest with this kernel (default: here)")
    parser.add_argument("--variant", default="plain", metavar="NAME", help="the guest's machine (see `matrix`)")
    parser.add_argument("--append", default="", metavar="OPTIONS", help="more of its kernel's command line")


def run_replay(args: argparse.Namespace) -> int:
    """Replay; returns the exit code. Raises `HarnessError`."""
    trace = load(args.trace, args.test)
    if args.kernel:
        return _in_guest(args, trace)
    from kvmgmem.host import probe

    probe()  # says in one line if there is no KVM here
    outcome = repeat(trace)
    if not outcome.repeated:
        raise HarnessError("nothing in this trace can be repeated", "see `kvmgmem trace`", ExitCode.CANNOT_EXPRESS)
    for line in report(outcome):
        print(line)
    return ExitCode.OK if outcome.first is None else ExitCode.TEST_FAILED


def report(outcome: Outcome) -> list[str]:
    """What came of it, the first difference first."""
    lines = []
    if outcome.first is not None:
        step, answered = outcome.first.step, outcome.first.answered
        lines += [
            f"the answers first differ at {step.id}: {call(step)}",
            f"  recorded: {result(step)}",
            f"  here:     {result(answered)}",
        ]
        if outcome.differing > 1:
            lines.append(f"  {outcome.differing - 1} more answers after it differ")
    else:
        lines.append(f"all {outcome.repeated} answers are as recorded")
    lines += [f"note: {text}" for text in outcome.notes]
    return lines


def _in_guest(args: argparse.Namespace, trace: Trace) -> int:
    """The replay as the one selftest of a guest: its summary and its exit code are the guest's."""
    from kvmgmem.cli import build_parser
    from kvmgmem.lab.vm_cli import run_vm
    from kvmgmem.trace.file import to_line

    text = b"".join(to_line(dict(line)) for line in trace.lines)
    packed = base64.b64encode(zlib.compress(text, 9)).decode()
    with tempfile.TemporaryDirectory(prefix="kvmgmem-replay-") as directory:
        tests = Path(directory) / "selftests"
        tests.mkdir()
        (tests / "test_replay.py").write_text(_TEST.format(packed=packed))
        machine = [f"--kernel={args.kernel}", f"--variant={args.variant}", f"--append={args.append}"]
        vm_args = build_parser().parse_args(["vm", *machine, f"--selftests={tests}", "--jobs=1"])
        vm_args.pytest_args = []
        vm_args.repeat = repeat_command(args)
        return run_vm(vm_args)


def repeat_command(args: argparse.Namespace) -> str:
    """The command that replays the trace in such a guest again: the selftest made for it is gone by then."""
    words = ["kvmgmem", "replay", str(args.trace), "--kernel", args.kernel]
    words += ["--variant", args.variant] if args.variant != "plain" else []
    words += [f"--append={args.append}"] if args.append else []
    words += ["--test", args.test] if args.test else []
    return shlex.join(words)


__all__ = ["add_replay_parser", "report", "run_replay", "value"]
