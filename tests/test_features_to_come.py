"""The probes for features to come: how answers are judged, that each is asked in peace, and where the findings are shown."""

import json
import os
from pathlib import Path

import pytest

from kvmgmem.cli import main
from kvmgmem.contract_report import features_markdown, features_text
from kvmgmem.errors import Errno, KvmError
from kvmgmem.kvm import DEVICE, Kvm
from kvmgmem.results.compare import compare, write_comparison
from kvmgmem.results.features import features_by_column, features_of
from kvmgmem.results.run import Run, read_run
from kvmgmem.roadmap import FEATURES, Feature, Finding, NotAskedError, State, absent, ask, judge, lookup

HAS_KVM = os.access(DEVICE, os.R_OK | os.W_OK)


def test_an_answer_in_neither_column_is_odd() -> None:
    """Absent and present have their answers; every other is odd, and the sentence names what was expected."""
    wanted = {Errno.ENOTTY: State.ABSENT, Errno.EINVAL: State.PRESENT, Errno.EPERM: State.ODD, 7: State.ODD}
    for answer, state in wanted.items():
        found = judge("the ioctl", answer, without=(Errno.ENOTTY,), having=(Errno.EINVAL,))
        assert found.state is state, answer
    assert (
        "the ioctl answers EPERM, which is none of ENOTTY, EINVAL"
        in judge("the ioctl", Errno.EPERM, without=(Errno.ENOTTY,), having=(Errno.EINVAL,)).sentence
    )


@pytest.mark.parametrize("error", [NotAskedError("one node only"), KvmError("mbind", "here", Errno.ENOSYS)])
def test_a_question_that_cannot_be_put_is_not_absent(error: Exception) -> None:
    """What stands in a probe's way is a state of its own, with the reason: it says nothing about the feature."""

    def probe(_: Kvm) -> Finding:
        raise error

    found = ask(Feature("x", "y", probe), Kvm(-1))
    assert found.state is State.NOT_ASKED
    assert str(error) in found.sentence


def test_names_are_unique_and_can_be_looked_up() -> None:
    """Every feature has a name of its own, by which it is found; another name raises KeyError."""
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)
    for feature in FEATURES:
        assert lookup(feature.name) is feature
    with pytest.raises(KeyError, match="nonsense"):
        lookup("nonsense")


@pytest.mark.skipif(not HAS_KVM, reason="needs /dev/kvm")
def test_caps_tells_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    """`kvmgmem caps` has a line, and `--json` an entry, for each feature; no probe leaves a descriptor behind."""
    before = sorted(os.listdir("/proc/self/fd"))
    assert main(["caps", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["features_to_come"]
    assert list(told) == [feature.name for feature in FEATURES]
    assert {entry["state"] for entry in told.values()} <= set(State)
    assert main(["caps"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {feature.name} " in text for feature in FEATURES)
    assert sorted(os.listdir("/proc/self/fd")) == before


def records(path: Path, release: str, answers: dict[str, Finding]) -> Run:
    """A run on a kernel that answered like this."""
    facts = {
        "release": release,
        "backend": "kvm_amd",
        "paging": "tdp",
        "accelerator": "tcg",
        "cpu_model": "",
        "vm_types": [],
    }
    facts |= {"cpu_model": "", "where": "guest", "kvmgmem": "0", "python": "3", "pytest": "8"}
    lines: list[dict[str, object]] = [{"record": "run-start", "schema": 1, "run": "0", "time": 1, "circumstances": facts}]
    for name, found in answers.items():
        test = f"selftests/test_roadmap.py::test[{name}]"
        lines.append({"record": "test-start", "test": test, "time": 1})
        properties = {f"feature:{name}": str(found), "unrelated": "x"}
        lines.append({"record": "test-end", "test": test, "time": 2, "verdict": "passed", "properties": properties})
    lines.append({"record": "run-end", "time": 3, "exit": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run([path])


def test_findings_are_shown_kernel_by_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What kernels answered is in their records, and from there in the matrix and the contract report."""
    old = records(tmp_path / "old", "7.3", {"write": absent("refused: by name"), "huge-pages": absent("no flag")})
    new = records(tmp_path / "new", "7.4", {"write": Finding(State.PRESENT, "4096"), "dma-buf": Finding(State.ODD, "?")})
    assert features_of(old) == {"write": "absent: refused: by name", "huge-pages": "absent: no flag"}
    assert features_by_column([old, new]) == {
        "write": ["absent", "present"],
        "huge-pages": ["absent", "-"],
        "dma-buf": ["-", "odd"],
    }
    table = list(features_markdown([old, new]))
    assert "| Feature | What it is | 7.3 tdp | 7.4 tdp |" in table
    assert "| write | write() to a gmem | absent | present |" in table
    assert list(features_text([old, new]))[:3] == ["feature to come: write", "    7.3 tdp: absent", "    7.4 tdp: present"]
    assert not list(features_markdown([]))

    import sys

    write_comparison(compare([old, new]), sys.stdout)
    text = capsys.readouterr().out
    assert "  write: A absent, B present" in text
    assert "  dma-buf: A -, B odd" in text
    assert "huge-pages:" not in text
    write_comparison(compare([old]), sys.stdout)
    assert "none of 2 is present in any column" in capsys.readouterr().out
