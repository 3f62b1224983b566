"""`kvmgmem fuzz`: what it keeps, what it tells, and how it copes with workers and guests that die; kernels are played."""

import argparse
import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import pytest

from kvmgmem import fuzz, fuzz_worker
from kvmgmem.cli import build_parser, main
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.fuzz import State
from kvmgmem.fuzz_worker import Worker
from kvmgmem.lab import fuzz_guest
from kvmgmem.lab.fuzz_guest import FOUND, PLAYED, SEED, TRAITS, Job, Round, dead_kernel
from kvmgmem.lab.progress import Progress
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Plain
from kvmgmem.model.campaign import Found
from kvmgmem.model.journal import FileJournal, LogJournal, NoteJournal
from kvmgmem.model.play import Finding, Played
from kvmgmem.model.traits import REFERENCE
from kvmgmem.results.records import Note, Record, TestEnd, Verdict
from kvmgmem.testing.plugin import SESSION

STEPS = (do.CreateVm("v0"), do.CreateGmem("f0", "v0", 4096, 3), do.Close("f0"))
FINDING = Found("abc", "Close: lifetime: 'gone'", "lifetime of v0: alive, wanted gone", STEPS, ("1. close",), seed=7)


def arguments(*words: str) -> argparse.Namespace:
    """The verb's arguments."""
    return build_parser().parse_args(["fuzz", *words])


# --- findings and state -----------------------------------------------------------------------------------------------


def test_a_finding_survives_its_file(tmp_path: Path) -> None:
    """What was written is what is read, steps one a line for people and programs."""
    path = FINDING.write(tmp_path)
    assert Found.read(path) == FINDING
    assert len(path.read_text().splitlines()) == 1 + len(STEPS)
    assert Found.from_json(json.loads(json.dumps(FINDING.to_json()))) == FINDING


def test_a_file_with_steps_alone_can_be_played(tmp_path: Path) -> None:
    """Somebody's own sequence needs no head."""
    path = tmp_path / "mine.steps"
    path.write_text("\n".join(json.dumps(do.to_json(step)) for step in STEPS) + "\n\n")
    found = Found.read(path)
    assert (found.fingerprint, found.steps, found.sort) == ("mine", STEPS, "")


def test_a_console_can_be_played(tmp_path: Path) -> None:
    """Of a guest that died the console holds what it did last, and that can be played as it is."""
    console = tmp_path / "run.console"
    console.write_text("")
    with LogJournal(console) as journal:
        journal.begin(STEPS)(0, STEPS[0])
        before = journal.begin(STEPS)
        for at, step in enumerate(STEPS[:2]):
            before(at, step)
    lines = ["[    0.000000] Linux version 7.3", *console.read_text().replace("<6>", "[    9.1] ").splitlines(), "BUG: bad"]
    console.write_text("\n".join(lines))
    assert Found.read(console).steps == STEPS[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no steps"), ("{", "line 1"), ('{"do":"Fly"}', "'Fly' is not a step"), ('{"do":"Close"}', "line 1: Close")],
)
def test_a_file_that_is_no_finding_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    """A bad file is a usage error that says where it is bad."""
    path = tmp_path / "bad.steps"
    path.write_text(text)
    assert main(["fuzz", "--replay", str(path)]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "0"), "no time"),
        (("--jobs", "0"), "--jobs 0"),
        (("--host", "--kernel", "x"), "contradict"),
        (("--replay", "/nowhere/x.steps"), "cannot read"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str) -> None:
    """What cannot be meant is said before anything runs."""
    assert main(["fuzz", *words]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Seeds that were begun and not played come first, then new ones; findings are kept and not told again."""
    state = State.open(tmp_path, "host x", seed=5)
    first, end = state.take_block(50)
    assert (first, end) == (5, 55)
    assert state.take_block(50) == (55, 105)
    state.put_back(5, 20)
    state.put_back(55, 105)
    assert state.take_block(50) == (20, 55)
    assert state.add(FINDING)
    again = State.open(tmp_path, "host x", seed=99)
    assert again.unfinished == [[20, 55]], "what is being played when the process is killed is not lost"
    assert again.take_block(50) == (20, 55)
    assert again.take_block(50) == (105, 155)
    assert not again.add(FINDING)
    assert again.sorts == {FINDING.sort: 1}
    assert again.read("abc") == FINDING


def test_a_directory_belongs_to_one_kernel(tmp_path: Path) -> None:
    """Findings of two kernels do not go into one directory, and a broken state is not guessed at."""
    State.open(tmp_path, "host x", 1).save()
    with pytest.raises(HarnessError, match="another kernel: host x"):
        State.open(tmp_path, "guests, 7.3", 1)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(HarnessError, match="broken"):
        State.open(tmp_path, "host x", 1)


def test_places_tell_machines_apart() -> None:
    """Another kernel, another machine or other kernel parameters are another search."""
    places = {
        fuzz._place(arguments(*words))
        for words in (("--host",), ("--kernel", "a"), ("--kernel", "b"), ("--variant", "npt0"), ("--append", "x=1"))
    }
    assert len(places) == 5


@pytest.mark.parametrize(
    ("words", "replay", "repro"),
    [
        (("--host",), " --host", ""),
        (("--kernel", "a/bzImage"), " --kernel a/bzImage", " --record-on a/bzImage"),
        (("--variant", "npt0"), " --kernel newest --variant npt0", " --record-on newest --variant npt0"),
        (("--kernel", "a", "--append", "x=1 y"), " --kernel a '--append=x=1 y'", " --record-on a '--append=x=1 y'"),
    ],
)
def test_a_finding_is_played_again_where_it_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, replay: str, repro: str
) -> None:
    """What is said at the end can be typed as it stands: kernel, machine and parameters are in it."""
    monkeypatch.setattr("kvmgmem.lab.kernel.kernels.resolve", lambda _: argparse.Namespace(name="newest"))
    monkeypatch.setattr(fuzz.Search, "in_guests", lambda search, _: search._found(FINDING))
    monkeypatch.setattr(fuzz.Search, "on_host", lambda search, _: search._found(FINDING))
    assert main(["fuzz", "--out", str(tmp_path), *words]) == ExitCode.TEST_FAILED
    said = capsys.readouterr().out
    assert f"play it again: kvmgmem fuzz --replay {tmp_path}/abc.steps{replay}\n" in said
    assert f"as a C program: kvmgmem repro {tmp_path}/abc.steps -o bug.c{repro}\n" in said
    for line in (line.partition("kvmgmem ")[2] for line in said.splitlines() if ": kvmgmem " in line):
        build_parser().parse_args(shlex.split(line))


# --- on a host --------------------------------------------------------------------------------------------------------


def a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Any) -> Worker:
    """A worker whose process does `work(writer, journal)` in place of playing."""

    def stand_in(writer: int, journal: Path, *_: object) -> None:
        try:
            work(writer, journal)
        finally:
            os._exit(0)

    monkeypatch.setattr(fuzz_worker, "_work", stand_in)
    return Worker(tmp_path / "journal")


def say(writer: int, **message: object) -> None:
    """One line of a worker."""
    os.write(writer, json.dumps(message).encode() + b"\n")


def begin(journal: Path, made: int) -> None:
    """Write a sequence, of which some steps were made, into the journal."""
    before = FileJournal(journal).begin(STEPS)
    for at in range(made):
        before(at, STEPS[at])


def test_a_worker_tells_findings_and_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the process says comes out, and its place in the block is known."""

    def work(writer: int, _: Path) -> None:
        say(writer, found=FINDING.to_json())
        say(writer, seed=3, sequences=4, steps=50)

    with a_worker(monkeypatch, tmp_path, work) as worker:
        assert list(worker.play(0, 10, 0.0, [], {}, 5)) == [FINDING]
        assert (worker.next_seed, worker.sequences, worker.steps) == (4, 4, 50)


def test_a_worker_that_dies_leaves_its_sequence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that a sequence kills is a finding with the steps up to its death, and the next seed is the next one."""

    def work(writer: int, journal: Path) -> None:
        begin(journal, 2)
        say(writer, seed=3, sequences=4, steps=50)
        os.kill(os.getpid(), signal.SIGKILL)

    with a_worker(monkeypatch, tmp_path, work) as worker:
        found = list(worker.play(0, 10, 0.0, [], {}, 5))
        assert [each.steps for each in found] == [STEPS[:2]]
        assert "SIGKILL" in found[0].text
        assert found[0].sort.startswith("CreateGmem")
        assert (found[0].seed, worker.next_seed) == (4, 5)


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sequence that does not come to its end is a finding, and its process does not stay."""

    def work(writer: int, journal: Path) -> None:
        begin(journal, 3)
        say(writer, seed=0, sequences=1, steps=3)
        time.sleep(60)

    monkeypatch.setattr(fuzz_worker, "SHRINK_LIMIT", 0.0)
    monkeypatch.setattr(fuzz_worker, "END_LIMIT", 0.1)
    with a_worker(monkeypatch, tmp_path, work) as worker:
        started = time.monotonic()
        found = list(worker.play(0, 10, 0.0, [], {}, 0.3))
        assert time.monotonic() - started < 5
        assert [each.text for each in found] == ["the sequence did not come to an end"]
        assert found[0].steps == STEPS
    assert not list(tmp_path.iterdir())


# --- in guests --------------------------------------------------------------------------------------------------------


def notes(*texts: str) -> list[Record]:
    """Notes as a guest writes them."""
    return [Note(0.0, text) for text in texts]


def test_a_round_is_read_from_its_notes() -> None:
    """Findings, seeds, traits, a played sequence and the last one begun come out of a guest's records."""
    sequence: list[Record] = []
    NoteJournal(sequence.append).begin(STEPS)
    result = Round()
    for record in [
        *notes(TRAITS + json.dumps(REFERENCE.to_json()), FOUND + json.dumps(FINDING.to_json()), SEED + "[12, 3, 40]"),
        *notes("left out: something", PLAYED + '{"lines": [], "findings": []}'),
        *sequence,
        TestEnd("t", 0.0, Verdict.PASSED),
    ]:
        result.take(record)
    assert (result.found, result.last_seed, result.sequences, result.steps) == ([FINDING], 12, 3, 40)
    assert result.traits == REFERENCE
    assert result.last_sequence == list(STEPS)
    assert (result.died, result.failed) == (False, "")


@pytest.mark.parametrize(
    ("verdict", "died"),
    [(Verdict.PANICKED, True), (Verdict.SPLAT, True), (Verdict.TIMEOUT, True), (Verdict.FAILED, False)],
)
def test_how_a_round_ended(verdict: Verdict, died: bool) -> None:
    """A kernel that died or hung is a finding; a search that failed by itself is the harness's own fault."""
    result = Round()
    assert result.failed
    result.take(TestEnd("t", 0.0, verdict, reason="why"))
    assert result.died is died
    assert bool(result.failed) is not died


def test_a_dead_kernel_goes_by_its_complaint() -> None:
    """One panic is one finding, whatever the sequence; its text and the steps are in it."""
    result = Round(
        end=TestEnd("t", 0.0, Verdict.PANICKED, reason="BUG: bad [kvm_gmem_release:1a2b]", kernel_log=("BUG: bad",))
    )
    found = dead_kernel(result, STEPS, 5)
    assert found.fingerprint == "kernel-kvm-gmem-release-1a2b"
    assert found.fingerprint == dead_kernel(result, STEPS[:1], 9).fingerprint
    assert found.lines[-1] == "BUG: bad"
    assert "close f0" in "\n".join(found.lines)


def test_guests_search_shrink_and_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A round's findings are kept as they come; a kernel that dies has its sequence shrunk by further boots, once."""
    jobs: list[Job] = []

    def round_(_: object, job: Job, follow: Any) -> Round:
        jobs.append(job)
        result = Round(last_seed=job.first_seed + 2)
        panic = TestEnd("t", 0.0, Verdict.PANICKED, reason="BUG: bad [f:1]")
        if job.steps:
            result.end = panic if any(isinstance(step, do.Close) for step in job.steps) else TestEnd("t", 0, Verdict.PASSED)
            return result
        result.last_sequence = [do.CreateVm("v9"), *STEPS]
        result.found.append(FINDING)
        follow(result)
        result.end = panic
        return result

    monkeypatch.setattr(fuzz_guest, "run_round", round_)
    state = State.open(tmp_path, "guests", 1)
    with Path(os.devnull).open("w") as null, Progress("test", null) as progress:
        search = fuzz.Search(arguments("--out", str(tmp_path)), state, progress)
        for _ in range(2):
            search._round(lambda first, _: search._guest_round(first, time.monotonic() + 5), *state.take_block(1000))
    assert set(state.found) == {"abc", "kernel-f-1"}
    kept = state.read("kernel-f-1")
    assert kept is not None
    assert kept.steps == (do.Close("f0"),)
    searches = [job for job in jobs if not job.steps]
    assert [job.first_seed for job in searches] == [1, 5]  # beyond the deadly seed
    assert searches[1].told == ("abc", "kernel-f-1")
    assert len([job for job in jobs if job.steps]) < fuzz.DEATH_PLAYS


@pytest.mark.parametrize(("bug", "rounds"), [("", 1), ("B1", 3)])
def test_a_search_may_end_at_its_first_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: str, rounds: int
) -> None:
    """With --first a finding ends the search, a known bug does not."""
    jobs: list[Job] = []

    def round_(_: object, job: Job, follow: Any) -> Round:
        jobs.append(job)
        if len(jobs) > 3:
            raise HarnessError("enough")
        result = Round(found=[replace(FINDING, bug=bug)], end=TestEnd("t", 0.0, Verdict.PASSED), last_seed=job.first_seed)
        follow(result)
        return result

    monkeypatch.setattr(fuzz_guest, "run_round", round_)
    state = State.open(tmp_path, "guests", 1)
    with Path(os.devnull).open("w") as null, Progress("test", null) as progress, suppress(HarnessError):
        fuzz.Search(arguments("--first", "--out", str(tmp_path)), state, progress).in_guests(time.monotonic() + 1000)
    assert min(len(jobs), 3) == rounds
    assert all(job.first for job in jobs)


class Lines:
    """A terminal that keeps what is written to it."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        """It is one, so that every line of progress comes."""
        return True

    def write(self, text: str) -> None:
        """Keep it."""
        self.text += text

    def flush(self) -> None:
        """It is kept already."""


def endless(follow: Any, first_seed: int, gave_up: list[int]) -> Round:
    """A guest that searches until whoever follows it has enough; it gives up after 5 s."""
    result, until = Round(), time.monotonic() + 5
    while time.monotonic() < until:
        result.last_seed, result.sequences = first_seed + result.sequences, result.sequences + 1
        follow(result)
        time.sleep(0.01)
    gave_up.append(first_seed)
    return result


@pytest.mark.parametrize("how", ["finding", "error", "ctrl-c"])
def test_the_end_of_a_search_ends_every_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """With several jobs a first finding, a guest that cannot go on, or Ctrl-C ends the others; their seeds are not lost."""
    under_way, gave_up = threading.Event(), list[int]()

    def round_(_: object, job: Job, follow: Any) -> Round:
        if job.first_seed > 1:
            under_way.set()
            return endless(follow, job.first_seed, gave_up)
        assert under_way.wait(10)
        time.sleep(0.1)
        if how == "finding":
            follow(Round(found=[FINDING], last_seed=1, sequences=1))
        if how == "error":
            raise HarnessError("a guest failed")
        return endless(follow, 1, gave_up)

    def interrupted(*_: object) -> Any:
        assert under_way.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz_guest, "run_round", round_)
    if how == "ctrl-c":
        monkeypatch.setattr("concurrent.futures.wait", interrupted)
    state = State.open(tmp_path, "guests", 1)
    ends: dict[str, Any] = {"error": pytest.raises(HarnessError, match="a guest failed"), "finding": nullcontext()}
    with Progress("test", cast(TextIO, Lines())) as progress, ends.get(how, pytest.raises(KeyboardInterrupt)):
        words = ("--jobs", "2", "--first", "--out", str(tmp_path))
        fuzz.Search(arguments(*words), state, progress).in_guests(time.monotonic() + 1000)
    assert not gave_up
    again = State.open(tmp_path, "guests", 1)
    assert again.sequences > 0
    assert sum(reached - (end - fuzz.SEEDS_A_ROUND) for reached, end in again.unfinished) == again.sequences


def test_progress_counts_what_guests_are_playing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sequences count when they are played, not when the guest that played them has ended, and then once."""

    def round_(_: object, job: Job, follow: Any) -> Round:
        result = Round(end=TestEnd("t", 0.0, Verdict.PASSED))
        for played in (1, 2, 3):
            result.last_seed, result.sequences, result.steps = played, played, 7 * played
            time.sleep(0.11)  # a line of progress may come every 0.1 s
            follow(result)
        return result

    monkeypatch.setattr(fuzz_guest, "run_round", round_)
    state, lines = State.open(tmp_path, "guests", 1), Lines()
    with Progress("test", cast(TextIO, lines)) as progress:
        fuzz.Search(arguments("--out", str(tmp_path)), state, progress).in_guests(time.monotonic() + 0.2)
    assert [number for number in (1, 2, 3, 4) if f" {number} sequences" in lines.text] == [1, 2, 3]
    assert (state.sequences, state.steps) == (3, 21)


@pytest.mark.parametrize("bug", ["", "B1"])
def test_a_finding_played_in_a_guest_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], bug: str
) -> None:
    """The steps and below them what disagreed, once, also if it is a known bug, which ends no sequence."""
    finding = Finding(1, STEPS[1], "answer", "EINVAL", "0", "SetRegion: answer", bug)
    played = Played(STEPS, {0: Plain.NEW, 1: Plain.OK, 2: Plain.DONE}, [finding] if bug else [], None if bug else finding)
    monkeypatch.setattr(fuzz_guest, "play", lambda *_: played)
    monkeypatch.setattr(fuzz_guest, "probe", lambda: REFERENCE)

    def round_(_: object, job: Job, __: object) -> Round:
        result = Round(end=TestEnd("t", 0.0, Verdict.PASSED))
        monkeypatch.setenv(fuzz_guest.JOB, json.dumps(job.to_json()))
        session = argparse.Namespace(write=result.take)
        fuzz_guest.in_guest(argparse.Namespace(stash={SESSION: session}))
        return result

    monkeypatch.setattr(fuzz_guest, "run_round", round_)
    path = replace(FINDING, sort=finding.sort, bug=bug).write(tmp_path)
    assert main(["fuzz", "--replay", str(path), "--kernel", "7.3"]) == ExitCode.TEST_FAILED
    said = capsys.readouterr()
    assert said.out.count("answer: 0, wanted EINVAL") == 1
    assert "  2. f0 = v0.create gmem" in said.out
    assert "it still shows" in said.out
    assert f"playing {path}, guests, 7.3" in said.err


def test_a_failed_search_is_no_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guest's test that fails by itself ends the search with its reason."""
    failed = Round(end=TestEnd("t", 0.0, Verdict.FAILED, reason="NameError: x"))
    monkeypatch.setattr(fuzz_guest, "run_round", lambda *_: failed)
    state = State.open(tmp_path, "guests", 1)
    with Path(os.devnull).open("w") as null, Progress("test", null) as progress:
        search = fuzz.Search(arguments("--out", str(tmp_path)), state, progress)
        with pytest.raises(HarnessError, match="NameError: x"):
            search.in_guests(time.monotonic() + 5)
    assert State.open(tmp_path, "guests", 1).unfinished[0][0] == 1
