"""The page: contract areas and tests over kernels, one self-contained file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from kvmgmem.catalogue import contract as catalogue
from kvmgmem.results.compare import Column, Comparison, Row, compare, reason_of
from kvmgmem.results.known_bug_text import bug_line, bugs_by_column
from kvmgmem.results.run import NO_AREA, Run, exit_code, run_fault
from kvmgmem.results.summary import outcome_text
from kvmgmem.results.text import printable

PAGE: Final = Path(__file__).with_name("page.html")

DETAIL_LIMIT: Final = 20_000
"""Characters of a test's detail that the page keeps; the records have all of it."""


def write_html(run: Run, out: TextIO) -> None:
    """Write the page of one run."""
    write_html_comparison(compare([run]), out)


def write_html_comparison(comparison: Comparison, out: TextIO) -> None:
    """Write the page of several runs side by side."""
    data = {
        "columns": [_column(column) for column in comparison.columns],
        "areas": _areas(comparison.rows),
        "rows": {row_id: _contract_row(row_id) for row in comparison.rows for row_id in row.contract},
        "tests": [_test(row) for row in comparison.rows],
        "bugs": [
            {"id": bug, "line": bug_line(bug).removeprefix(f"{bug}: "), "shows": shows}
            for bug, shows in bugs_by_column([column.run for column in comparison.columns]).items()
        ],
    }
    # "</script>" inside a text must not end the element that holds it.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("</", "<\\/")
    out.write(PAGE.read_text(encoding="utf-8").replace("@DATA@", text))


def _column(column: Column) -> dict[str, Any]:
    facts = column.run.circumstances
    about = {} if facts is None else {
        "backend": facts.backend,
        "paging": facts.paging,
        "accelerator": facts.accelerator,
        "cpu": facts.cpu_model,
        "VM types": ", ".join(facts.vm_types),
        "config": facts.config_hash or "unknown",
        "release": facts.release,
        "time": f"{column.run.duration:.1f} s",
    }  # fmt: skip
    return {
        "label": column.label,
        "line": outcome_text(column.run),
        "exit": int(exit_code(column.run)),
        "fault": run_fault(column.run),
        "about": about,
        "leftOut": list(column.run.left_out),
    }


def _areas(rows: Sequence[Row]) -> list[dict[str, str]]:
    used = {row.area for row in rows}
    known = [{"id": area.id, "title": area.title} for area in catalogue.AREAS if area.id in used]
    rest = sorted(used - {area.id for area in catalogue.AREAS})
    return known + [{"id": area, "title": "names no row" if area == NO_AREA else ""} for area in rest]


def _contract_row(row_id: str) -> dict[str, str]:
    row = catalogue.load().get(row_id)
    if row is None:
        return {"statement": "not in the catalogue of this version"}
    return {"statement": row.statement, "call": row.call or row.expect, "needs": row.precondition, "source": row.source}


def _test(row: Row) -> dict[str, Any]:
    return {
        "name": row.test,
        "area": row.area,
        "contract": list(row.contract),
        "rule": row.rule,
        "differs": row.differs,
        "cells": [
            None
            if outcome is None
            else {
                "verdict": str(outcome.verdict),
                "reason": reason_of(outcome) if outcome.verdict != "passed" else "",
                "detail": printable(outcome.end.detail)[:DETAIL_LIMIT],
                "log": [printable(line) for line in outcome.end.kernel_log],
                "repeat": outcome.end.repeat or "",
                "seconds": round(outcome.end.duration, 3),
            }
            for outcome in row.outcomes
        ],
    }
