"""The HTML page, which is gcovr's: every measured file with its source, line by line, coloured by what ran."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmgmem.coverage.notes import Notes
from kvmgmem.coverage.numbers import FileResult, Line, Numbers, Region
from kvmgmem.errors import HarnessError

GCOVR_SECONDS = 300.0


def find_gcovr() -> list[str]:
    """The command that is gcovr: of this Python, or of the PATH. Raises HarnessError if there is none."""
    try:
        found = importlib.util.find_spec("gcovr") is not None
    except ValueError:
        found = False
    if found:
        return [sys.executable, "-m", "gcovr"]
    if path := shutil.which("gcovr"):
        return [path]
    raise HarnessError(
        "the page is made by gcovr, which is not installed",
        "pip install 'kvmgmem[coverage]' (or gcovr alone), or go without the page: --no-page",
    )


def write_page(gcovr: Sequence[str], folder: Path, numbers: Numbers, notes: Notes) -> Path:
    """Write the page and what it links to into a folder; the page's path. Raises HarnessError with gcovr's own words.

    gcovr gets these very numbers, in its own format (gcovr's documentation, "JSON Output"), rather than the counters: so
    page and report cannot differ, and the source may have gone from where it was compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    with tempfile.TemporaryDirectory(prefix="kvmgmem-gcovr-") as temporary:
        # Files of another version of the format are refused: an empty report says which version this gcovr has.
        empty = Path(temporary, "empty")
        empty.mkdir()
        content = json.loads(_run(*gcovr, "--root", str(empty), "--json", "-", str(empty)))
        content["files"] = [_file(file) for file in numbers.files]
        trace = Path(temporary, "trace.json")
        trace.write_text(json.dumps(content))
        _run(
            *(*gcovr, "--root", str(notes.source), "--add-tracefile", str(trace)),
            *("--html-details", str(page), "--html-title", "What the selftests of kvmgmem reach"),
        )
    return page


def _file(file: FileResult) -> dict[str, Any]:
    return {
        "file": file.measured.path,
        "lines": [_line(line) for line in file.whole.lines],
        "functions": [_function(region) for region in file.functions if region.name],
    }


# Fields that some versions of gcovr insist on, and whose values no page shows.
_OF_BRANCHES = {"fallthrough": False, "throw": False, "blockno": 0, "source_block_id": 0}
_OF_FUNCTIONS = {"returned_count": 0}


def _line(line: Line) -> dict[str, Any]:
    branches = [{"branchno": number, "count": taken, **_OF_BRANCHES} for number, taken in enumerate(line.count.branches)]
    return {"line_number": line.number, "count": line.count.ran, "branches": branches, "function_name": line.function}


def _function(region: Region) -> dict[str, Any]:
    first = region.lines[0]
    return {
        "name": region.name,
        "demangled_name": region.name,
        "lineno": first.number,
        "execution_count": max(line.count.ran for line in region.lines),
        "blocks_percent": round(region.line_share.percent, 1),
        **_OF_FUNCTIONS,
    }


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GCOVR_SECONDS)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "rror" in line), lines[-1] if lines else "nothing")
        raise HarnessError(f"gcovr failed with status {done.returncode}: {said}", "go without the page: --no-page")
    return done.stdout
