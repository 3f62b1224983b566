"""Which selftests would notice each known bug's return, and of those that none can, why: for `kvmgmem contract`."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvmgmem.catalogue import known_bugs

NAMING = ("known_bug", "would_show")
"""By an answer of the kernel that a test recognises, or by its complaint, hang or death under the test."""


def naming_tests(selftests: Path) -> Mapping[str, list[str]]:
    """Bug id to the tests, or helpers of theirs, that name it, read from the source; in the catalogue's order.

    Raises `HarnessError` for a bug that the catalogue does not have.
    """
    found: dict[str, list[str]] = {bug_id: [] for bug_id in known_bugs.load()}
    for path in sorted(selftests.rglob("test_*.py")):
        for bug_id, function in _named_in(ast.parse(path.read_text(), str(path))):
            name = f"{path.relative_to(selftests.parent)}::{function}"
            known = found[known_bugs.get(bug_id).id]
            if name not in known:
                known.append(name)
    return found


def _named_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in NAMING:
                    yield from ((str(word.value), function.name) for word in call.args if isinstance(word, ast.Constant))


def text(tests: Mapping[str, list[str]]) -> Iterator[str]:
    """For a terminal: every bug, with its tests or the sentence why there is none."""
    for bug in known_bugs.load().values():
        yield f"{bug.id}  {bug.title} ({bug.fix})"
        yield from (f"    {test}" for test in tests[bug.id])
        if not tests[bug.id]:
            yield f"    {bug.not_tested_because or 'named by no test'}"


def markdown(tests: Mapping[str, list[str]]) -> Iterator[str]:
    """For docs/contract.md: a section with a table."""
    yield from ("", "## Known kernel bugs", "")
    yield "Recognised by what the kernel does, never by its version."
    yield from ("", "| Bug | What is wrong | Fix | How it shows | Rows | Looked for by |", "|" + "---|" * 6)
    for bug in known_bugs.load().values():
        fix = f"{bug.fix} ({bug.cve})" if bug.cve else bug.fix
        names = "<br>".join(f"`{test.partition('::')[2]}`" for test in tests[bug.id])
        cells = [bug.id, bug.title, fix, bug.symptom, ", ".join(bug.rows), names or f"no test: {bug.not_tested_because}"]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
