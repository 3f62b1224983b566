"""`kvmgmem report`: reports from records of runs made anywhere; several runs side by side."""

import argparse
import sys
from functools import partial
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, gravest
from kvmgmem.results.compare import compare, write_comparison
from kvmgmem.results.outputs import WRITERS, write_file
from kvmgmem.results.run import Run, exit_code, read_run
from kvmgmem.results.summary import write_summary
from kvmgmem.results.text import wants_colour


def add_report_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("report", help="reports from records; several runs side by side")
    parser.add_argument("files", nargs="+", type=Path, metavar="RECORDS", help="one file a run, as --results wrote it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a self-contained page")
    for name in ("ktap", "junit", "markdown"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"{name} of one run")


def run_report(args: argparse.Namespace) -> int:
    """Write what was asked for, and a table or summary; the gravest exit code of the runs. Raises `HarnessError`."""
    from kvmgmem.results.html import write_html_comparison

    runs = [_read(path) for path in args.files]
    for name in ("ktap", "junit", "markdown"):
        target = getattr(args, name)
        if target and len(runs) > 1:
            raise HarnessError(f"--{name} is a report of one run", "name one file of records", ExitCode.USAGE)
        if target:
            write_file(target, partial(WRITERS[name], runs[0]))
    comparison = compare(runs)
    if args.html:
        write_file(args.html, partial(write_html_comparison, comparison))
    if len(runs) > 1:
        write_comparison(comparison, sys.stdout)
    else:
        write_summary(runs[0], sys.stdout, wants_colour(sys.stdout))
    return gravest(int(exit_code(run)) for run in runs)


def _read(path: Path) -> Run:
    """The run of a file; one in which every line is damaged is some other file, and its lines are nobody's business."""
    run = read_run([path])
    if run.damaged and run.finish is None:
        raise HarnessError(f"{path} holds no records: {run.damaged[0]}", "name a file that a run wrote", ExitCode.USAGE)
    return run
