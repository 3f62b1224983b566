"""Findings of the model as traces: a sequence is played once more, recorded, with what the model wants in the trace."""

import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmgmem.errors import Errno, HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace.expectation import PREFAULT
from kvmgmem.trace.file import TraceFile
from kvmgmem.trace.recorder import recording

SUFFIX = ".steps"

_TEST = '''"""A finding of the model, played once more; its steps are in it, so that they reach the guest."""

import json
from pathlib import Path

from kvmgmem.trace.finding import play_file

STEPS = {text!r}


def test_finding(kvm, tmp_path: Path) -> None:
    """Every answer is the one that the contract asks for."""
    path = tmp_path / "finding.steps"
    path.write_text(json.loads(STEPS))
    found = play_file(path)
    if found:
        raise AssertionError(found)
'''


def told(answer: object) -> Any:
    """A model's answer in the words of a trace."""
    from kvmgmem.model import answers

    if isinstance(answer, answers.Plain):
        if answer is answers.Plain.HVA_FAULT:
            return [Errno.EFAULT.name, {"is": "OtherExit", "reason": "KVM_EXIT_UNKNOWN"}]
        return 0 if answer in (answers.Plain.OK, answers.Plain.NEW, answers.Plain.DONE) else answer.value
    if isinstance(answer, answers.Value):
        return answer.word
    if isinstance(answer, answers.Mmio):
        return {"is": "MmioExit", "gpa": answer.gpa, "write": answer.write}
    if isinstance(answer, answers.MemoryFault):
        exit_told = {"is": "MemoryFaultExit", "flags": 8 if answer.private else 0, "gpa": answer.gpa, "size": 4096}
        return [Errno.EFAULT.name, exit_told]
    if isinstance(answer, answers.Left):
        return {"is": PREFAULT, "answer": answer.answer, "gpa": answer.gpa, "size": answer.size}
    return answer


def play_file(path: Path) -> str:
    """Play a finding's file; what disagreed, or "". Raises `HarnessError` (USAGE) if it is none."""
    from kvmgmem.model.campaign import Found
    from kvmgmem.model.play import play
    from kvmgmem.model.traits import probe

    try:
        found = Found.read(path)
    except ValueError as error:
        raise HarnessError(f"{path} is no finding: {error}", "it wants a step a line", ExitCode.USAGE) from error
    played = play(found.steps, probe())
    return "; ".join(str(finding) for finding in [*played.known, *filter(None, [played.finding])])


def record(path: Path, directory: Path, machine: Sequence[str] = ()) -> Path:
    """Play a finding and record it; the directory that holds the trace.

    Here, or in a guest if `machine` says what `kvmgmem vm` is to be told of it.
    """
    if machine:
        _record_in_guest(path, directory, machine)
    else:
        _record_here(path, directory)
    return directory


def _record_here(path: Path, directory: Path) -> None:
    """In a process of its own: what a finding does to it stays its own affair."""
    from dataclasses import asdict

    from kvmgmem.host import probe
    from kvmgmem.testing import debugfs

    host = asdict(probe())
    known = {name: host[name] for name in ("release", "backend", "paging")} | {"where": "host"}
    pid = os.fork()
    if pid == 0:
        try:
            debugfs.mount_privately()
            file = TraceFile(directory / f"{path.stem}.trace")
            with recording(file, known, test=f"the model's finding {path.stem}"):
                play_file(path)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _record_in_guest(path: Path, directory: Path, machine: Sequence[str]) -> None:
    from kvmgmem.cli import build_parser
    from kvmgmem.lab.vm_cli import run_vm

    with tempfile.TemporaryDirectory(prefix="kvmgmem-finding-") as place:
        tests = Path(place) / "selftests"
        tests.mkdir()
        text = json.dumps(path.read_text(encoding="utf-8"))
        (tests / "test_finding.py").write_text(_TEST.format(text=text))
        args = build_parser().parse_args(["vm", *machine, f"--selftests={tests}", "--jobs=1", f"--trace={directory}"])
        # The selftest made for it is gone when somebody wants to see it again.
        args.repeat = shlex.join(["kvmgmem", "fuzz", "--replay", str(path), *machine])
        args.pytest_args = []
        run_vm(args)
