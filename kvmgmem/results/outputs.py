"""The files a run leaves besides its records, and the report that ends every verb that ran tests."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

from kvmgmem.errors import HarnessError
from kvmgmem.results.junit import write_junit
from kvmgmem.results.ktap import write_ktap
from kvmgmem.results.markdown import write_markdown
from kvmgmem.results.run import Run, exit_code, read_run
from kvmgmem.results.summary import write_summary
from kvmgmem.results.text import wants_colour


def _html(run: Run, out: TextIO) -> None:
    from kvmgmem.results.html import write_html

    write_html(run, out)


WRITERS: dict[str, Callable[[Run, TextIO], None]] = {
    "ktap": write_ktap,
    "junit": write_junit,
    "markdown": write_markdown,
    "html": _html,
}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --results and one option for each format."""
    group = parser.add_argument_group("what is written")
    group.add_argument("--results", metavar="FILE", help="the records, one JSON object a line, as things happen")
    group.add_argument("--ktap", metavar="FILE", help="KTAP, - for standard output instead of the summary")
    group.add_argument("--junit", metavar="FILE", help="JUnit XML")
    group.add_argument("--html", metavar="FILE", help="a self-contained page")
    group.add_argument("--markdown", metavar="FILE", help="a short Markdown table, for a CI job's summary")


def report(results: Path, args: argparse.Namespace) -> int:
    """Write what was asked for and the summary; returns the run's exit code."""
    run = read_run([results])
    for name, writer in WRITERS.items():
        target = getattr(args, name, None)
        if target and target != "-":
            write_file(Path(target), partial(writer, run))
    if getattr(args, "ktap", None) == "-":
        write_ktap(run, sys.stdout)
    else:
        sys.stdout.write("\n")
        write_summary(run, sys.stdout, wants_colour(sys.stdout))
        sys.stdout.write(f"records: {results}\n")
    sys.stdout.flush()
    return int(exit_code(run))


def write_file(target: Path, write: Callable[[TextIO], None]) -> None:
    """Let `write` fill a file; raises `HarnessError` if it cannot be written."""
    try:
        with target.open("w", encoding="utf-8", errors="backslashreplace") as out:
            write(out)
    except OSError as error:
        raise HarnessError(
            f"cannot write {target}: {error.strerror}", "make room or name another file; the records are kept"
        ) from error
