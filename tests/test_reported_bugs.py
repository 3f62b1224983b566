"""Known bugs that show by a complaint of the kernel: the plugin and the supervisor do not take them for splats."""

import json
import os

import pytest

from kvmgmem.exit_codes import ExitCode

REPORT = "WARNING: arch/x86/kvm/../../../virt/kvm/kvm_main.c:4418 at kvm_vcpu_ioctl+0x8ea/0x9a0, CPU#1: init/50"
OTHER = "WARNING: virt/kvm/guest_memfd.c:112 at kvm_gmem_get_folio+0x8ea/0x9a0, CPU#1: init/50"

# A plain file stands in for the kernel's log: each test's one write is one record.
HEAD = f"""
import os
from kvmgmem.testing import kernel_log, would_show
kernel_log.KernelLog.__init__.__defaults__ = (kernel_log.Path("kmsg"),)
def report(*titles):
    with open("kmsg", "a") as log:
        log.write("".join(f"4,1,1,-;{{title}}\\n" for title in titles[:1]))
BUG, OTHER = {REPORT!r}, {OTHER!r}
"""


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")
def test_a_complaint_that_a_test_announces_is_a_known_bug(pytester: pytest.Pytester) -> None:
    """The report of a bug that the test would show is that bug; anything else, or in any other test, is a splat."""
    pytester.path.joinpath("kmsg").write_text("")
    pytester.makepyfile(
        HEAD
        + """
@would_show("B27")
def test_shows(kvm):
    report(BUG)
@would_show("B27", "B2")
def test_quiet(kvm):
    pass
@would_show("B27")
def test_something_else(kvm):
    report(OTHER)
@would_show("B2")
def test_another_bug(kvm):
    report(BUG)
def test_nothing_announced(kvm):
    report(BUG)
@would_show("B27")
def test_fails_too(kvm):
    report(BUG)
    assert False
"""
    )
    results = pytester.path / "results.jsonl"
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", f"--results={results}", timeout=90)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    ends = {record["test"].partition("::")[2]: record for record in records if record["record"] == "test-end"}
    assert {name: (end["verdict"], end["bugs_shown"], end["bugs_absent"]) for name, end in ends.items()} == {
        "test_shows": ("known-bug", ["B27"], []),
        "test_quiet": ("passed", [], ["B27"]),
        "test_something_else": ("splat", [], []),
        "test_another_bug": ("splat", [], []),
        "test_nothing_announced": ("splat", [], []),
        "test_fails_too": ("failed", ["B27"], []),
    }, done.stdout.str()
    assert ends["test_shows"]["kernel_log"] == [REPORT]
    assert int(done.ret) == ExitCode.KERNEL


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine")
@pytest.mark.parametrize(
    ("otherwise", "absent"),
    [
        ("report_needs=('guest-memfd',)", ["B27"]),
        ("report_needs=('no-such-code',)", []),
        ("report_by_chance=True", []),
    ],
    ids=["it_could", "it_lacks_the_code", "it_would_by_chance"],
)
def test_silence_says_something_only_where_the_bug_would_speak(
    pytester: pytest.Pytester, otherwise: str, absent: list[str]
) -> None:
    """A kernel without what makes it complain, or that does so by chance, is not said to be without the bug."""
    pytester.path.joinpath("kmsg").write_text("")
    pytester.makepyfile(
        HEAD
        + f"""
from dataclasses import replace
from kvmgmem.catalogue import known_bugs
from kvmgmem.testing.requirements import REQUIREMENTS, Requirement
REQUIREMENTS["no-such-code"] = Requirement("no-such-code", lambda host: False, "this kernel has none")
known_bugs.load = lambda bugs=known_bugs.load(): {{**bugs, "B27": replace(bugs["B27"], {otherwise})}}
@would_show("B27")
def test_quiet(kvm):
    pass
"""
    )
    results = pytester.path / "results.jsonl"
    pytester.runpytest_subprocess("-p", "no:cacheprovider", f"--results={results}", timeout=90)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["bugs_absent"] for record in records if record["record"] == "test-end"] == [absent]
