"""`kvmgmem repro`: a trace in, a C program out, for people who have no kvmgmem."""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace import finding
from kvmgmem.trace.c_program import c_program
from kvmgmem.trace.expectation import find_check
from kvmgmem.trace.prune import all_steps, needed_steps
from kvmgmem.trace.steps import Trace, load
from kvmgmem.trace.tryout import run_here, run_in_guest

COMPILER = ("cc", "-Wall", "-Wextra", "-Werror", "-static")


def add_repro_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "repro",
        help="write a C program that shows what a trace shows",
        epilog="The program needs nothing but a C library; it exits 0 if the kernel behaves, 1 if it shows the bug, 4 if it "
        "cannot tell. Exit code 6: the trace holds something that such a program cannot do.",
    )
    parser.add_argument(
        "trace", type=Path, metavar="TRACE", help="what --trace wrote: a file or its directory; or a finding"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the program (default: standard output)")
    parser.add_argument("--expect", default="", metavar="ID=ANSWER", help="what decides, if the test did not say it")
    parser.add_argument("--test", default="", metavar="NODEID", help="which test, if the file holds traces of several")
    parser.add_argument("--all", action="store_true", help="keep every call, also those on which nothing seems to depend")
    parser.add_argument("--build", action="store_true", help="compile it, too (beside FILE, without its suffix)")
    parser.add_argument("--run", action="store_true", help="compile and run it here: exit code 0, 1, or 3 if it cannot tell")
    parser.add_argument("--kernel", metavar="IMAGE|NAME", help="compile it and run it in a QEMU guest with this kernel")
    parser.add_argument("--record-on", metavar="IMAGE|NAME", help="a finding is played in a guest with it, not here")
    parser.add_argument("--variant", default="plain", metavar="NAME", help="that guest's machine (see `matrix`)")
    parser.add_argument("--append", default="", metavar="OPTIONS", help="more of its kernel's command line")


def run_repro(args: argparse.Namespace) -> int:
    """Write the program; raises `HarnessError`."""
    trace = _trace_of(args)
    check = find_check(trace, args.expect)
    steps = all_steps(trace, check) if args.all else needed_steps(trace, check)
    text = c_program(trace, check, steps)
    if args.output is None and not (args.build or args.run or args.kernel):
        sys.stdout.write(text)
        return ExitCode.OK
    if args.output is None:
        raise HarnessError("there is no file to compile", "name one with -o", ExitCode.USAGE)
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HarnessError(f"cannot write {args.output}: {error.strerror}", "name a file you may write") from error
    needed = f"{len(steps)} of {len(trace.steps)} steps are needed"
    print(f"kvmgmem: {args.output}: {needed} for {check.step.call} ({check.step.id})")
    if not (args.build or args.run or args.kernel):
        return ExitCode.OK
    program = build(args.output)
    if args.kernel:
        return run_in_guest(program, machine_words(args, args.kernel), repeat_command(args))
    return run_here(program) if args.run else ExitCode.OK


def repeat_command(args: argparse.Namespace) -> str:
    """The command that makes the program and runs it in such a guest again."""
    words = ["kvmgmem", "repro", str(args.trace), "-o", str(args.output), "--kernel", args.kernel]
    for name, default in (("variant", "plain"), ("append", ""), ("test", ""), ("expect", ""), ("record_on", None)):
        if getattr(args, name) != default:
            words.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    return shlex.join([*words, "--all"] if args.all else words)


def machine_words(args: argparse.Namespace, kernel: str) -> list[str]:
    """What `kvmgmem vm` is told of the guest."""
    return [f"--kernel={kernel}", f"--variant={args.variant}", f"--append={args.append}"]


def _trace_of(args: argparse.Namespace) -> Trace:
    """The trace named; a finding of `kvmgmem fuzz` is played and recorded first."""
    if args.trace.suffix != finding.SUFFIX:
        return load(args.trace, args.test)
    with tempfile.TemporaryDirectory(prefix="kvmgmem-trace-") as directory:
        return load(_record(args, Path(directory)))


def _record(args: argparse.Namespace, directory: Path) -> Path:
    return finding.record(args.trace, directory, machine_words(args, args.record_on) if args.record_on else ())


def build(source: Path) -> Path:
    """Compile a program with every warning an error; the executable's path. Raises `HarnessError` if it does not compile."""
    target = source.with_suffix("")
    try:
        done = subprocess.run([*COMPILER, "-o", str(target), str(source)], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise HarnessError("there is no C compiler here (cc)", "install gcc, or compile the file elsewhere") from None
    if done.returncode:
        raise HarnessError(f"{source} does not compile:\n{done.stderr.strip()}", "report this: every program should")
    return target
