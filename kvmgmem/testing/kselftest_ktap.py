"""What a kernel selftest printed, taken apart: KTAP results, the reason of a skip, what a failed assertion said.

The forms are those of tools/testing/selftests/kselftest.h, kselftest_harness.h and kvm/lib/assert.c of Linux 7.3.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvmgmem.results.records import Verdict

# "ok 1 name", "not ok 2 - name # SKIP reason", "ok 3 # SKIP what", "ok 4 name #  reason" (ksft_test_result_code).
_RESULT = re.compile(r"^ *(?P<status>ok|not ok) \d+\b(?P<rest>.*)$")
_DIRECTIVE = re.compile(
    r"^(?P<name>.*?) *# *(?:(?P<word>SKIP|XFAIL|TODO|XPASS|error)\b)? *(?:- )?(?P<reason>.*)$", re.IGNORECASE
)
_PLAN = re.compile(r"^ *1\.\.(?P<count>\d+)\b")
_SKIPPED = re.compile(r"# *SKIP *(?:- *)?(?P<reason>.*)$")
_BAIL_OUT = re.compile(r"^ *Bail out! *(?P<reason>.*)$")
_ASSERTION = "==== Test Assertion Failure ===="
_NOISE = re.compile(r"pid=\d+\b|\d+\t|(sh|cat|addr2line): |\(stack trace empty\)")
_SKIP_WORDS = ", skipping test"


@dataclass(frozen=True)
class Subtest:
    """One result line of a program's KTAP; `reason` says why it did not simply pass."""

    name: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Ktap:
    """All results that a program printed, and how many it had announced (None: it announced nothing)."""

    subtests: tuple[Subtest, ...]
    planned: int | None

    @property
    def contradiction(self) -> str:
        """Why an exit status of 0 is not to be believed; "" if nothing speaks against it."""
        failed = [subtest.name for subtest in self.subtests if subtest.verdict is Verdict.FAILED]
        if failed:
            return f"it ended with status 0 and reported a failure: {failed[0]}"
        if self.planned is not None and self.planned != len(self.subtests):
            return f"it ended with status 0 and announced {self.planned} results, of which {len(self.subtests)} came"
        return ""


def parse_ktap(text: str) -> Ktap:
    """The results in a program's output, whatever their level, each under a name of its own.

    A plan counts only where there are no levels, because only then is it clear which results it announced.
    """
    subtests: list[Subtest] = []
    plans: list[int] = []
    talk: list[str] = []
    nested = False
    for line in text.splitlines():
        if match := _RESULT.match(line):
            subtests.append(_subtest(match["status"] == "ok", match["rest"], talk, subtests))
            nested |= line.startswith(" ")
            talk = []
        elif match := _PLAN.match(line):
            plans.append(int(match["count"]))
        else:
            talk.append(line)
    return Ktap(tuple(subtests), plans[0] if len(plans) == 1 and not nested else None)


def _subtest(passed: bool, rest: str, talk: Sequence[str], earlier: Sequence[Subtest]) -> Subtest:
    text = rest.strip()
    match = _DIRECTIVE.match(text)
    name, word, reason = (match["name"], (match["word"] or "").upper(), match["reason"].strip()) if match else (text, "", "")
    # Where the name stands behind the directive (ksft_test_result_skip), it is all there is.
    name = _unique(name.strip().removeprefix("- ") or reason or "unnamed", [subtest.name for subtest in earlier])
    if word in ("SKIP", "XFAIL", "TODO"):
        expected = "" if word == "SKIP" else "an expected failure: "
        return Subtest(name, Verdict.SKIPPED, f"{expected}{reason or 'no reason given'}")
    if passed:
        return Subtest(name, Verdict.PASSED)
    return Subtest(name, Verdict.FAILED, assertion_of(talk) or reason or last_word(talk) or "not ok")


def _unique(name: str, taken: Sequence[str]) -> str:
    # A second result of one name keeps its own record.
    again = sum(other == name or other.startswith(f"{name} #") for other in taken)
    return f"{name} #{again + 1}" if again else name


def skip_reason(text: str) -> str:
    """Why a program that ended with status 4 did: its KTAP line, its "..., skipping test", or its last word."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := _SKIPPED.search(line):
            return match["reason"].strip() or "no reason given"
    for line in reversed(lines):
        if line.endswith(_SKIP_WORDS):
            return line.removesuffix(_SKIP_WORDS).removeprefix("- ")
    return last_word(lines) or "no reason given"


def failure_reason(text: str) -> str:
    """The most telling line of a program that failed: an assertion, a KTAP result, why it gave up, its last word."""
    lines = text.splitlines()
    if assertion := assertion_of(lines):
        return assertion
    if match := next(filter(None, map(_BAIL_OUT.match, lines)), None):
        return match["reason"] or "bailed out"
    failed = next((subtest for subtest in parse_ktap(text).subtests if subtest.verdict is Verdict.FAILED), None)
    if failed is not None:
        return f"not ok: {failed.name}"
    return last_word(lines)


def assertion_of(lines: Sequence[str]) -> str:
    """A failed TEST_ASSERT in one line: file, line and condition, and the message behind it; "" if none failed."""
    at = next((number for number, line in enumerate(lines) if _ASSERTION in line), None)
    if at is None:
        return ""
    condition, *rest = lines[at + 1 :] or [""]
    # A line with pid, tid and errno follows, a numbered stack where the machine has addr2line, then the message.
    said = [line.strip() for line in rest if line.startswith("  ") and not _NOISE.match(line.strip())]
    condition = condition.strip()
    return f"{condition}: {said[0]}" if said else condition


def last_word(lines: Sequence[str]) -> str:
    """The last line that says anything."""
    return next((line.strip().removeprefix("# ") for line in reversed(lines) if line.strip()), "")
