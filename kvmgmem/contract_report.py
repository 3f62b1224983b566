"""`kvmgmem contract`: the rows of the contract, the tests that assert each, and what kernels answered."""

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmgmem import bug_coverage
from kvmgmem.catalogue import contract as catalogue
from kvmgmem.catalogue import known_bugs
from kvmgmem.catalogue.contract import Row
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.results.compare import label_of
from kvmgmem.results.features import features_by_column
from kvmgmem.results.records import Verdict
from kvmgmem.results.run import Run, read_run
from kvmgmem.run import selftests_directory


@dataclass
class RowReport:
    """One row: the tests that assert it, and by kernel what became of them."""

    row: Row
    tests: list[str] = field(default_factory=list)
    answers: dict[str, list["Told"]] = field(default_factory=dict)

    def cell(self, kernel: str) -> str:
        """The row on one kernel in a word, the gravest of its tests; a known bug with its id, a skip with its reason."""
        found = self.answers.get(kernel, [])
        ran = [told for told in found if told.verdict is not Verdict.SKIPPED]
        if not ran:
            return f"skipped: {found[0].reason}" if found else "-"
        # A test of many rows, such as the model's, says nothing about those that its bug has nothing to do with.
        of_this_row = [told for told in ran if told.verdict is not Verdict.KNOWN_BUG or self._concerned_by(told.bugs)]
        if not of_this_row:
            return f"hidden by {' '.join(_bugs(ran))}"
        verdict = max((told.verdict for told in of_this_row), key=lambda verdict: verdict.severity)
        if verdict is not Verdict.KNOWN_BUG:
            return str(verdict)
        return " ".join((str(verdict), *(bug for bug in _bugs(of_this_row) if self._concerned_by((bug,)))))

    def _concerned_by(self, bugs: Sequence[str]) -> bool:
        known = known_bugs.load()  # which may not hold a bug that records of a later version name
        return any(self.row.id in known[bug].rows for bug in bugs if bug in known)


@dataclass(frozen=True)
class Told:
    """What one test told of a row."""

    verdict: Verdict
    reason: str
    bugs: tuple[str, ...]


def _bugs(told: Sequence[Told]) -> list[str]:
    return list(dict.fromkeys(bug for each in told for bug in each.bugs))


def add_contract_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("contract", help="the rows of the contract, what asserts them, what kernels answered")
    parser.add_argument("files", nargs="*", type=Path, metavar="RECORDS", help="records of runs (--results)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown, for docs/contract.md")
    parser.add_argument("--check", action="store_true", help="fail if a row is asserted by no test")


def run_contract(args: argparse.Namespace) -> int:
    """Print or write the table; returns 1 with --check if a row is asserted by nothing. Raises `HarnessError`."""
    runs = [read_run([path]) for path in args.files]
    reports = report(asserting_tests(selftests_directory()), runs)
    unasserted = [entry.row.id for entry in reports if not entry.tests]
    if args.markdown:
        bugs = bug_coverage.markdown(bug_coverage.naming_tests(selftests_directory()))
        lines = [*markdown(reports, _kernels(runs)), *bugs, *features_markdown(runs)]
        _write(args.markdown, "\n".join(lines) + "\n")
    elif not args.check:
        bugs = bug_coverage.text(bug_coverage.naming_tests(selftests_directory()))
        sys.stdout.write("\n".join([*text(reports, _kernels(runs)), *bugs, *features_text(runs)]) + "\n")
    if unasserted:
        out = sys.stderr if args.check else sys.stdout
        out.write(f"asserted by no test ({len(unasserted)}): {' '.join(unasserted)}\n")
    return ExitCode.TEST_FAILED if args.check and unasserted else ExitCode.OK


def asserting_tests(selftests: Path) -> Mapping[str, list[str]]:
    """Row id to the tests that name it, read from the source: neither KVM nor pytest is asked.

    Raises `HarnessError` for a row that the catalogue does not have.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(selftests.rglob("test_*.py")):
        for row_id, test in _rows_in(ast.parse(path.read_text(), str(path))):
            catalogue.row(row_id)
            found.setdefault(row_id, []).append(f"{path.relative_to(selftests.parent)}::{test}")
    return found


def _rows_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The rows that `contract(...)` names in the decorators of a module's tests, parameters' marks included."""
    shared = _assignments(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for decorator in node.decorator_list:
                written_out = shared.get(decorator.id, decorator) if isinstance(decorator, ast.Name) else decorator
                for row_id in _named(written_out):
                    yield row_id, node.name


def _assignments(tree: ast.Module) -> Mapping[str, ast.expr]:
    """What the module's names stand for: a decorator that several tests share is written out once."""
    plain = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {name.id: node.value for node in plain for name in node.targets if isinstance(name, ast.Name)}


def _named(decorator: ast.AST) -> Iterator[str]:
    for call in ast.walk(decorator):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "contract":
            yield from (word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str))


def report(tests: Mapping[str, list[str]], runs: Sequence[Run]) -> list[RowReport]:
    """Every row of the catalogue in its order, with its tests and what the runs say."""
    reports = {row_id: RowReport(row, list(tests.get(row_id, []))) for row_id, row in catalogue.load().items()}
    for run in runs:
        kernel = _kernel(run)
        for outcome in run.tests:
            end = outcome.end
            told = Told(outcome.verdict, end.reason if end else "", end.bugs_shown if end else ())
            for row_id in outcome.contract:
                if row_id in reports:
                    reports[row_id].answers.setdefault(kernel, []).append(told)
    return list(reports.values())


def _kernel(run: Run) -> str:
    facts = run.circumstances
    if facts is None:
        raise HarnessError(
            "a file of records has no run-start, so its kernel is unknown", "leave that file out", ExitCode.USAGE
        )
    return f"{label_of(facts)} {facts.paging}"


def _kernels(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(_kernel(run) for run in runs))


def text(reports: Sequence[RowReport], kernels: Sequence[str]) -> Iterator[str]:
    """For a terminal: unasserted rows first, then every row with its tests and kernels."""
    for entry in sorted(reports, key=lambda entry: bool(entry.tests)):
        yield f"{entry.row.id}  {entry.row.statement}"
        yield from (f"    {test}" for test in dict.fromkeys(entry.tests))
        if not entry.tests:
            yield "    asserted by no test"
        yield from (f"    {kernel}: {entry.cell(kernel)}" for kernel in kernels)


def features_text(runs: Sequence[Run]) -> Iterator[str]:
    """The features to come, by what the kernels of the runs answered; nothing if none was asked."""
    kernels = [_kernel(run) for run in runs]
    for name, states in features_by_column(runs).items():
        yield f"feature to come: {name}"
        yield from (f"    {kernel}: {state}" for kernel, state in dict(zip(kernels, states, strict=True)).items())


def features_markdown(runs: Sequence[Run]) -> Iterator[str]:
    """The same as a section of docs/contract.md."""
    found = features_by_column(runs)
    if not found:
        return
    from kvmgmem.roadmap import FEATURES

    titles = {feature.name: feature.title for feature in FEATURES}
    yield from ("", "## Features to come", "")
    yield "What is proposed and not merged, by what each kernel answers (`kvmgmem caps` says why)."
    yield ""
    yield "| " + " | ".join(["Feature", "What it is", *(_kernel(run) for run in runs)]) + " |"
    yield "|" + "---|" * (2 + len(runs))
    for name, states in found.items():
        yield "| " + " | ".join([name, titles.get(name, ""), *states]) + " |"


def markdown(reports: Sequence[RowReport], kernels: Sequence[str]) -> Iterator[str]:
    """For docs/contract.md: a table per area."""
    asserted = sum(bool(entry.tests) for entry in reports)
    yield "# The contract of guest_memfd"
    yield ""
    yield "What userspace may rely on, row by row, and the selftests that assert it."
    yield f"Written by `kvmgmem contract --markdown`; {asserted} of {len(reports)} rows are asserted by a test."
    for area in catalogue.AREAS:
        yield from ("", f"## {area.title} ({area.id})", "")
        yield "| " + " | ".join(["Row", "What must hold", "Needs", "Kernel source", "Asserted by", *kernels]) + " |"
        yield "|" + "---|" * (5 + len(kernels))
        for entry in reports:
            if entry.row.area == area.id:
                yield _markdown_row(entry, kernels)


def _markdown_row(entry: RowReport, kernels: Sequence[str]) -> str:
    row = entry.row
    rule = " — ".join(filter(None, (row.statement, row.call or row.expect)))
    tests = "<br>".join(f"`{test.partition('::')[2]}`" for test in dict.fromkeys(entry.tests)) or "**no test**"
    cells = [row.id, rule, row.precondition, row.source, tests, *(entry.cell(kernel) for kernel in kernels)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise HarnessError(
            f"cannot write {path}: {error.strerror}", "name a file in a directory that can be written"
        ) from error
