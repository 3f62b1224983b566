"""The model of the contract, the sequences made on it, and what a search does with what disagrees; no kernel is asked."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmgmem.abi import GmemFlag, MemFlag
from kvmgmem.arch import x86_64
from kvmgmem.errors import Errno
from kvmgmem.kvm import Kvm
from kvmgmem.model import rules, world
from kvmgmem.model import search as searching
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Answer, Left, MemoryFault, Mmio, Plain, Value
from kvmgmem.model.campaign import Campaign, Found, fingerprint
from kvmgmem.model.deviations import recognise
from kvmgmem.model.generate import GPA, LARGE, seeded
from kvmgmem.model.journal import FileJournal, NoteJournal, noted
from kvmgmem.model.play import Finding, Journal, Played, Player
from kvmgmem.model.rules import Model, new_name
from kvmgmem.model.shrink import Shrinker, renamed
from kvmgmem.model.state import File
from kvmgmem.model.steps import ARENA, MAIN, WINDOW, P, Step, from_json, number, to_json
from kvmgmem.model.traits import REFERENCE, KernelTraits
from kvmgmem.model.world import is_open
from kvmgmem.results.records import Note, Record

MMAP, SHARED = int(GmemFlag.MMAP), int(GmemFlag.MMAP | GmemFlag.INIT_SHARED)
G = int(MemFlag.GUEST_MEMFD)
DEFAULT, PROTECTED = 0, 1
BIND = do.SetRegion("v", 1, GPA, 4 * P, G, 0, "f", 0)


def a_model(*steps: Step, traits: KernelTraits = REFERENCE) -> Model:
    """A model after some steps, which must all succeed."""
    model = Model(traits)
    for step in steps:
        answer = perform(model, step)
        assert answer in (Plain.NEW, Plain.OK, Plain.DONE) or isinstance(answer, Value), (step, answer)
    return model


def perform(model: Model, step: Step) -> Answer:
    """A step on the model, with numbers for descriptors as a kernel gives them."""
    answer = model.perform(step)
    name = new_name(step)
    if name and answer in (Plain.NEW, Plain.DONE):
        numbers = model.state.main.numbers
        model.numbered(name, next(n for n in range(5000, 6000) if n not in numbers))
    return answer


def start(vm_type: int = DEFAULT, flags: int = SHARED, pages: int = 8) -> list[Step]:
    """A VM with a vCPU, and a gmem."""
    return [do.CreateVm("v", vm_type), do.CreateGmem("f", "v", pages * P, flags), do.CreateCpu("c", "v")]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_the_support_slot_is_the_binding_s_own() -> None:
    """The model's numbers for the support slot are those that the binding uses."""
    assert (rules.SUPPORT_SLOT, rules.SUPPORT_GPA, rules.SUPPORT_SIZE) == (
        x86_64.SUPPORT_SLOT,
        x86_64.SUPPORT_GPA,
        x86_64.SUPPORT_SIZE,
    )


@pytest.mark.parametrize(
    ("size", "flags", "answer"),
    [
        (8 * P, 0, Plain.NEW),
        (2**63 - P, SHARED, Plain.NEW),
        (0, 0, Errno.EINVAL),
        (P + 1, 0, Errno.EINVAL),
        (2**63, 0, Errno.EINVAL),
        (2**64 - P, 0, Errno.EINVAL),
        (P, 4, Errno.EINVAL),
    ],
)
def test_creating_a_gmem(size: int, flags: int, answer: Answer) -> None:
    """Sizes are positive as signed numbers and whole pages; flags are those that the VM offers."""
    assert a_model(do.CreateVm("v")).perform(do.CreateGmem("f", "v", size, flags)) == answer


def test_init_shared_needs_a_vm_without_private_memory() -> None:
    """INIT_SHARED is refused on a VM with private memory."""
    model = a_model(do.CreateVm("v", PROTECTED))
    assert model.perform(do.CreateGmem("f", "v", P, SHARED)) == Errno.EINVAL
    assert model.perform(do.CreateGmem("f", "v", P, MMAP)) == Plain.NEW


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, Plain.OK),
        ({"offset": 4 * P}, Plain.OK),
        ({"offset": 5 * P}, Errno.EINVAL),
        ({"offset": 2**63 - P}, Errno.EINVAL),
        ({"offset": 2**64 - P}, Errno.EINVAL),
        ({"offset": 1}, Errno.EINVAL),
        ({"fd": -1}, Errno.EBADF),
        ({"fd": -1, "offset": 1}, Errno.EINVAL),
        ({"fd": "v"}, Errno.EINVAL),
        ({"fd": -1, "gpa": 1 << 48}, Errno.EBADF),
        ({"gpa": (1 << 48) - 4 * P}, Plain.OK),
        ({"gpa": (1 << 48) - 3 * P}, Errno.EINVAL),
        ({"gpa": 2**64 - 4 * P}, Errno.EINVAL),
        ({"hva": (1 << 47) - 5 * P}, Plain.OK),
        ({"hva": (1 << 47) - 4 * P}, Errno.EINVAL),
        ({"slot": 32763}, Plain.OK),
        ({"slot": 32764}, Errno.EINVAL),
        ({"slot": 0x10001}, Plain.OK),
        ({"slot": 0x20001}, Errno.EINVAL),
        ({"flags": G | 1}, Errno.EINVAL),
        ({"flags": G | 1 << 17}, Errno.EINVAL),
        ({"version": 1}, Errno.EINVAL),
        ({"size": 0}, Errno.EINVAL),
        ({"size": 2**31 * P}, Errno.EINVAL),
    ],
)
def test_binding(change: dict[str, Any], answer: Answer) -> None:
    """One field of a good request changed: what the kernel must say."""
    assert a_model(*start()).perform(replace(BIND, **change)) == answer


def test_overlaps_and_their_order() -> None:
    """A guest range in use comes before a bad descriptor, the limit of guest addresses before a file range in use."""
    model = a_model(*start(), BIND)
    beside = replace(BIND, slot=2, gpa=GPA + 64 * P)
    assert model.perform(replace(BIND, slot=2, fd=-1)) == Errno.EEXIST
    assert model.perform(beside) == Errno.EEXIST
    assert model.perform(replace(beside, gpa=1 << 48)) == Errno.EINVAL
    older = a_model(*start(), BIND, traits=replace(REFERENCE, overlap="EINVAL", limit_before_overlap=False))
    assert older.perform(beside) == Errno.EINVAL
    seventh = a_model(*start(), BIND, traits=replace(REFERENCE, limit_before_overlap=False))
    assert seventh.perform(replace(beside, gpa=1 << 48)) == Errno.EEXIST
    assert model.perform(replace(beside, offset=4 * P)) == Plain.OK


def test_gmem_slots_never_change_and_plain_ones_may() -> None:
    """A gmem slot set again is EINVAL whatever the request, a plain one may move and be logged."""
    model = a_model(*start(), BIND)
    for change in ({}, {"gpa": GPA + 64 * P}, {"flags": 0}, {"flags": 0, "version": 1}):
        assert model.perform(do.changed(BIND, **change)) == Errno.EINVAL
    plain = do.SetRegion("v", 2, GPA + 32 * P, 2 * P)
    for change in ({}, {"gpa": GPA + 33 * P}, {"gpa": GPA + 33 * P, "flags": 1}):
        assert model.perform(do.changed(plain, **change)) == Plain.OK
    assert model.perform(replace(plain, gpa=GPA)) == Errno.EEXIST
    assert model.perform(replace(plain, flags=2)) == Errno.EINVAL
    assert model.perform(replace(plain, size=P)) == Errno.EINVAL
    assert [model.perform(replace(BIND, size=0)) for _ in range(2)] == [Plain.OK, Errno.EINVAL]


def test_a_number_belongs_to_whoever_has_it_now() -> None:
    """A closed descriptor's number is EBADF until it is used again, and then the new file's."""
    model = a_model(*start(), do.Close("f"))
    assert model.perform(BIND) == Errno.EBADF
    assert perform(model, do.CreateGmem("g", "v", 8 * P, SHARED)) == Plain.NEW
    assert model.perform(BIND) == Plain.OK
    other = a_model(*start(), do.CreateVm("w"), do.Close("f"), do.CreateGmem("g", "w", 8 * P, SHARED))
    assert other.perform(BIND) == Errno.EINVAL


@pytest.mark.parametrize(
    ("mode", "offset", "length", "answer", "left"),
    [
        (1, 0, 8 * P, Plain.OK, 8),
        (1, 7 * P, 2 * P, Errno.EINVAL, 1),
        (3, 0, 8 * P, Plain.OK, 0),
        (3, 9 * P, 8 * P, Plain.OK, 1),
        (3, 1, P, Errno.EINVAL, 1),
        (3, 2**63 - P, P, Errno.EFBIG, 1),
        (2, 2**63 - P, P, Errno.ENOTSUP, 1),
        (0, 0, P, Errno.ENOTSUP, 1),
        (0, 2**63 - P, P, Errno.EFBIG, 1),
        (3, 2**63, P, Errno.EINVAL, 1),
        (3, 0, 0, Errno.EINVAL, 1),
    ],
)
def test_fallocate(mode: int, offset: int, length: int, answer: Answer, left: int) -> None:
    """What fallocate answers, and how many of the file's pages are then allocated, if one was before."""
    model = a_model(*start(), do.Fallocate("f", 1, 3 * P, P))
    assert model.perform(do.Fallocate("f", mode, offset, length)) == answer
    assert len(model.state.files()[0].pages) == left


def test_guest_and_host_see_one_page_until_it_is_punched() -> None:
    """Through a slot and through a mapping the same word is seen, at any offset, and zero after a punch."""
    model = a_model(*start(), replace(BIND, offset=2 * P), do.MapFile("f", 0, 8))
    assert model.perform(do.HostStore(0, 3, 7)) == Plain.DONE
    assert model.perform(do.GuestLoad("c", GPA + P)) == Value(7)
    assert model.perform(do.GuestStore("c", GPA + P, 8)) == Plain.DONE
    assert model.perform(do.HostLoad(0, 3)) == Value(8)
    assert model.perform(do.Remove(0, 3, 1)) == Plain.OK
    assert model.perform(do.GuestLoad("c", GPA + P)) == Value(0)
    assert model.perform(do.GuestLoad("c", GPA + 4 * P)) == Mmio(GPA + 4 * P, False)


def test_what_a_slot_answers_depends_on_the_kind_of_its_gmem() -> None:
    """A gmem that cannot be mapped is never used by a default VM; a protected one uses it for private pages alone."""
    window = ARENA
    model = a_model(*start(flags=0), do.MapMemory(0, 4, 0xA0), replace(BIND, hva=window))
    assert model.perform(do.GuestLoad("c", GPA + P)) == Value(0xA1)
    model = a_model(*start(PROTECTED, flags=0), do.MapMemory(0, 4, 0xA0), replace(BIND, hva=window))
    assert model.perform(do.GuestLoad("c", GPA)) == Value(0xA0)
    assert model.perform(do.SetAttributes("v", GPA, P, 8)) == Plain.OK
    assert model.perform(do.GuestLoad("c", GPA)) == Value(0)
    assert model.perform(do.SetAttributes("v", GPA, 8 * P, 8)) == Plain.OK
    assert model.perform(do.GuestLoad("c", GPA + 5 * P)) == MemoryFault(GPA + 5 * P, True)


def test_the_last_reference_kills_the_slots_and_the_vm() -> None:
    """Descriptors, copies, mappings and other processes keep a gmem; a slot does not; and the gmem keeps its VM."""
    model = a_model(*start(), BIND, do.Fork("p"), do.MapFile("f", 0, 1), do.Dup("d", "f"))
    releases: tuple[Step, ...] = (do.Close("f"), do.Close("d"), do.Unmap(0))
    for step in releases:
        assert model.perform(step) == Plain.DONE
        assert model.perform(do.GuestLoad("c", GPA)) == Value(0)
    assert model.perform(do.Kill("p")) == Plain.DONE
    assert model.perform(do.GuestLoad("c", GPA)) == MemoryFault(GPA, False)
    releases = (do.Close("v"), do.CloseCpu("c"))
    for step in releases:
        assert model.state.vms()
        assert model.perform(step) == Plain.DONE
    assert not model.state.vms()


def test_a_child_holds_files_and_no_vm() -> None:
    """Another process may punch what it holds; every VM ioctl of it is EIO."""
    model = a_model(*start(), do.Fork("p"), do.Fallocate("f", 1, 0, P))
    assert model.perform(do.Fallocate("f", 3, 0, P, by="p")) == Plain.OK
    assert model.perform(replace(BIND, by="p")) == Errno.EIO
    assert model.perform(do.CreateGmem("g", "v", P, 0, by="p")) == Errno.EIO
    assert not model.state.files()[0].pages


def test_prefault_stops_where_there_is_nothing() -> None:
    """Prefault goes as far as it can, and says where it stopped; without two-dimensional paging it does not exist."""
    model = a_model(*start(), BIND)
    assert model.perform(do.Prefault("c", GPA + 2 * P, 4 * P)) == Left(0, GPA + 4 * P, 2 * P)
    assert len(model.state.files()[0].pages) == 2
    assert model.perform(do.Prefault("c", GPA + 4 * P, P)) == Left(Errno.ENOENT, GPA + 4 * P, P)
    shadow = a_model(*start(), BIND, traits=replace(REFERENCE, prefault=False))
    assert shadow.perform(do.Prefault("c", GPA, P)) == Left(Errno.ENOTSUP, GPA, P)


def test_a_step_about_nothing_is_left_out() -> None:
    """What is not there cannot be touched: such a step changes nothing, so that steps can be taken out of a sequence."""
    model = Model(REFERENCE)
    for step in (BIND, do.GuestLoad("c", GPA), do.Close("f"), do.Kill("p"), do.HostLoad(0, 0), do.Send("d", "f", "p")):
        assert model.perform(step) is Plain.SKIPPED


# --- steps and sequences ----------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, database=None)
def test_sequences_survive_a_file_and_come_again_by_seed(seed: int) -> None:
    """A seed gives the same sequence each time, and every step is the same after a trip through JSON."""
    steps = seeded(seed, REFERENCE)
    assert seeded(seed, REFERENCE) == steps
    assert [from_json(json.loads(json.dumps(to_json(step)))) for step in steps] == steps


def test_no_sequence_asks_for_much_memory() -> None:
    """Whatever the fields, no step makes a kernel that behaves allocate, map or walk more than a few pages."""
    for seed in range(150):
        model = Model(REFERENCE)
        for step in seeded(seed, REFERENCE):
            if isinstance(step, do.Look):
                continue
            answer = perform(model, step)
            assert sum(len(file.pages) for file in model.state.files()) <= LARGE // P
            assert all(len(vm.private) <= LARGE // P * 4 for vm in model.state.vms())
            if isinstance(step, do.SetRegion) and answer is Plain.OK:
                assert step.size <= LARGE


def test_sequences_reach_everything() -> None:
    """Two hundred seeds hold every kind of step, and succeed and fail in many ways."""
    kinds, answers = set[type[Step]](), set[str]()
    for seed in range(200):
        model = Model(REFERENCE)
        for step in seeded(seed, REFERENCE):
            kinds.add(type(step))
            if not isinstance(step, do.Look):
                answer = perform(model, step)
                answers.add(f"{type(step).__name__} {answer!r}" if isinstance(answer, Errno) else type(answer).__name__)
    assert kinds == set(do.KINDS.values())
    for wanted in ("EBADF", "EEXIST", "EINVAL", "EIO"):
        assert f"SetRegion {wanted}" in answers
    assert {"Value", "Mmio", "MemoryFault", "Left", "Fallocate EFBIG", "MapFile ENODEV", "CreateGmem EIO"} <= answers


@pytest.mark.parametrize(
    ("value", "text"),
    [(2**63 - P, "2^63-1P"), (2**63, "2^63"), (2**64 - 1, "2^64-1"), (3 * P, "3P"), (0, "0"), (2**63 + P, "2^63+1P")],
)
def test_numbers_say_how_far_they_are_from_an_end(value: int, text: str) -> None:
    """Sizes and offsets read as pages, or as distances from 2^63 and 2^64."""
    assert number(value) == text


def test_a_step_that_is_none_is_named() -> None:
    """A file with a wrong step says what is wrong with it."""
    with pytest.raises(ValueError, match="'Explode' is not a step"):
        from_json({"do": "Explode"})
    with pytest.raises(ValueError, match="CreateVm"):
        from_json({"do": "CreateVm", "name": "v", "colour": 1})


# --- playing, against a kernel that is the model with a fault -----------------------------------------------------------


class Twin:
    """Stands for the world of a kernel: a model of its own, into which a test may put a fault."""

    def __init__(self, traits: KernelTraits, fault: "Fault | None") -> None:
        self.model = Model(traits)
        self._fault = fault
        self._numbers: dict[str, int] = {}
        self.directories: dict[str, str] = {}

    def perform(self, step: Step, number: int = 0) -> Answer:
        """The step, as the kernel answers it."""
        if isinstance(step, do.SetRegion):
            self.model.state.foreign = {number} if number >= 0 and is_open(number) else set()
        wrong = self._fault(self.model, step) if self._fault else None
        return perform(self.model, step) if wrong is None else wrong

    def number_of(self, name: str) -> int:
        """A descriptor's number."""
        return self.model.state.last_number[name]

    def allocated(self, name: str, page: int = 0, pages: int = 0) -> int:
        """How many pages are allocated."""
        file = self.model.state.main.fds[name]
        assert isinstance(file, File)
        return len([p for p in file.pages if not pages or page <= p < page + pages])

    def host_word(self, window: int, page: int) -> object:
        """What the host sees."""
        answer = self.model.perform(do.HostLoad(window, page))
        return answer.word if isinstance(answer, Value) else answer

    def guest_word(self, cpu: str, gpa: int) -> Answer:
        """What a guest reads."""
        return self.perform(do.GuestLoad(cpu, gpa))

    def delete_region(self, vm: str, slot: int) -> Answer:
        """A slot that was let in, taken away."""
        return Plain.OK

    def lives(self, _: str) -> bool:
        """Not watched here."""
        return True

    def pid_of(self, process: str) -> int:
        """A child's pid."""
        return 0 if process == MAIN else 4711


Fault = Callable[[Model, Step], Answer | None]


def punch_forgets_the_last_page(model: Model, step: Step) -> Answer | None:
    """A kernel that leaves the last page of several in the file."""
    if isinstance(step, do.Fallocate) and step.mode == 3 and step.length >= 2 * P and step.offset % P == 0:
        return model.perform(replace(step, length=step.length - P))
    return None


def any_vm_may_bind(model: Model, step: Step) -> Answer | None:
    """A kernel that does not ask whose gmem it is."""
    if isinstance(step, do.SetRegion) and isinstance(step.fd, str):
        file, vm = model.state.find(step.fd), model.state.find(step.vm)
        if isinstance(file, File) and file.vm is not vm:
            own, file.vm = file.vm, vm  # type: ignore[assignment]
            answer = model.perform(step)
            file.vm = own
            return answer
    return None


def signed_offsets(model: Model, step: Step) -> Answer | None:
    """A kernel with B1."""
    if not isinstance(step, do.SetRegion) or not step.offset < 2**63 <= step.offset + step.size:
        return None
    answer = model.perform(step)
    lets_in = answer == Errno.EINVAL and model.perform(replace(step, offset=0)) is Plain.OK
    if lets_in:
        model.perform(replace(step, size=0))
    return Plain.OK if lets_in else answer


def a_player(fault: Fault | None) -> Callable[..., Played]:
    """Something to call in place of `play`."""

    def play(
        steps: Sequence[Step], traits: KernelTraits, *, journal: Journal | None = None, patience: float = 1.0
    ) -> Played:
        assert patience == 1.0  # no fault is about a VM's life
        world: Any = Twin(traits, fault)
        return Player(steps, Model(traits), world, journal, prefetches=False).run()

    return play


FAR_OFFSETS = 195
"""A seed whose sequence comes to an offset near 2^63."""


def search(monkeypatch: pytest.MonkeyPatch, fault: Fault | None, seeds: int = 150, first: int = 1) -> list[Found]:
    """What a campaign finds in a kernel with this fault."""
    for module in ("campaign", "search"):
        monkeypatch.setattr(f"kvmgmem.model.{module}.play", a_player(fault))
    campaign = Campaign(REFERENCE)
    return [event for event in campaign.run(first, seeds, float("inf")) if isinstance(event, Found)]


def test_a_kernel_that_is_the_model_gives_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all goes as the model says there is silence."""
    assert search(monkeypatch, None, 60) == []


@pytest.mark.parametrize("fault", [punch_forgets_the_last_page, any_vm_may_bind])
def test_faults_are_found_and_shrunk(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """A planted fault is found, told once for each of a few shapes, and comes down to a handful of steps."""
    found = search(monkeypatch, fault)
    assert found
    assert len({each.fingerprint for each in found}) == len(found)
    assert all(each.again for each in found)
    assert min(len(each.steps) for each in found) <= 5, found


@pytest.fixture
def selftest() -> ModuleType:
    """The selftest that plays the model, which asks hypothesis only where more effort is wanted."""
    path = Path(__file__).parent.parent / "selftests" / "test_model.py"
    spec = importlib.util.spec_from_file_location("selftest_of_the_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hypothesis_looks_elsewhere(monkeypatch: pytest.MonkeyPatch, selftest: ModuleType) -> None:
    """It draws as many sequences as it is asked for, and a planted fault comes out of it shrunk, as out of a seed."""
    monkeypatch.setattr(selftest, "play", a_player(None))
    tally = searching.Tally()
    selftest.by_hypothesis(REFERENCE, lambda steps: None, 20, tally)
    assert tally.sequences == 20
    assert tally.steps > 100
    for module in (selftest, searching):
        monkeypatch.setattr(module, "play", a_player(punch_forgets_the_last_page))
    with pytest.raises(AssertionError, match="the shortest sequence found") as caught:
        selftest.by_hypothesis(REFERENCE, lambda steps: None, 60, searching.Tally())
    assert len(str(caught.value).splitlines()) < 10


def test_known_bugs_are_named_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """B1 goes by its name, and what comes after it in a sequence is still looked at."""
    found = search(monkeypatch, signed_offsets, 20, FAR_OFFSETS)
    assert [each.fingerprint for each in found if each.bug] == ["B1"]
    b1 = next(each for each in found if each.bug)
    assert len(b1.steps) == 3
    assert "2^63" in b1.lines[2]


def test_what_was_told_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A campaign that knows what has been told is silent about it, and spends no time on shrinking it."""
    first = search(monkeypatch, punch_forgets_the_last_page, 30)
    known = search(monkeypatch, signed_offsets, 20, FAR_OFFSETS)

    def no_shrinking(*_: object, **__: object) -> Played:
        raise AssertionError("it was told already")

    monkeypatch.setattr("kvmgmem.model.campaign.shrink", no_shrinking)
    campaign = Campaign(REFERENCE, {"B1"}, {found.sort: 99 for found in first})
    for fault, found, seed in ((punch_forgets_the_last_page, first, 1), (signed_offsets, known, FAR_OFFSETS)):
        assert found
        monkeypatch.setattr("kvmgmem.model.campaign.play", a_player(fault))
        assert not [event for event in campaign.run(seed, 30, float("inf")) if isinstance(event, Found)]


class Told:
    """A recording that keeps what a player says the kernel should have answered."""

    def __init__(self) -> None:
        self.expected: list[tuple[object, object, int]] = []

    def expect(self, seen: object, wanted: object, *, shows: object = None, bug: str = "", peer: int = 0) -> None:
        """Keep it."""
        self.expected.append((seen, wanted, peer))


def a_child_may_create(model: Model, step: Step) -> Answer | None:
    """A kernel that lets another process create gmem for a VM."""
    return model.perform(replace(step, by=MAIN)) if isinstance(step, do.CreateGmem) and step.by != MAIN else None


def a_load_that_faults_reads_zero(model: Model, step: Step) -> Answer | None:
    """A kernel that gives a guest a page where there is none."""
    return Value(0) if isinstance(step, do.GuestLoad) and model.perform(step) is Plain.HVA_FAULT else None


PUNCH = do.Fallocate("f", 3, 0, 2 * P)


@pytest.mark.parametrize(
    ("steps", "fault", "told"),
    [
        # The number of pages, not the list of them, is what a call answered.
        ([*start(), do.Fallocate("f", 1, 0, 2 * P), PUNCH], punch_forgets_the_last_page, (1, 0, 0)),
        ([*start(), do.Fork("p"), do.CreateGmem("g", "v", P, 0, "p")], a_child_may_create, (0, Errno.EIO, 4711)),
        # What is seen after a child's step is the player's own again.
        (
            [*start(), do.Fallocate("f", 1, 0, 2 * P), do.Fork("p"), replace(PUNCH, by="p")],
            punch_forgets_the_last_page,
            (1, 0, 0),
        ),
        (
            [*start(PROTECTED, 0), BIND, do.GuestLoad("c", GPA)],
            a_load_that_faults_reads_zero,
            (0, ["EFAULT", {"is": "OtherExit", "reason": "KVM_EXIT_UNKNOWN"}], 0),
        ),
    ],
)
def test_a_recording_learns_which_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, steps: list[Step], fault: Fault, told: tuple[object, object, int]
) -> None:
    """Of a finding the trace says what a call told, what it should have, and which process it told it."""
    recording = Told()
    monkeypatch.setattr("kvmgmem.entry.watcher", recording)
    played = a_player(fault)(steps, REFERENCE)
    assert played.finding is not None
    assert recording.expected == [told]


def test_every_step_is_noted_before_it_is_made(tmp_path: Path) -> None:
    """The journal holds the whole sequence, and the step that is being made when the kernel dies."""
    steps = [*start(), BIND, do.GuestStore("c", GPA, 1)]

    def dies(model: Model, step: Step) -> Answer | None:
        if isinstance(step, do.SetRegion):
            raise OSError("the kernel died")
        return None

    with FileJournal(tmp_path / "journal") as journal:
        journal.begin(steps[:1])(0, steps[0])  # the sequence before
        with pytest.raises(OSError, match="died"):
            a_player(dies)(steps, REFERENCE, journal=journal.begin(steps))
        assert journal.read() == (steps, 3)


def test_a_note_holds_a_sequence() -> None:
    """What goes into the results before a sequence is played can be read back from there."""
    records: list[Record] = []
    NoteJournal(records.append).begin([*start(), BIND])
    note = records[0]
    assert isinstance(note, Note)
    assert noted(note.text) == [*start(), BIND]
    assert noted("left out: something") is None


# --- shrinking --------------------------------------------------------------------------------------------------------


def test_shrinking_keeps_what_is_needed() -> None:
    """Only the steps that the finding needs are left, with plain fields, under plain names."""
    noise = [do.CreateVm(f"x{n}") for n in range(20)]
    deep = do.SetRegion("v7", 3, GPA + 5 * P, 4 * P, G, ARENA, "f9", 2**63 - P)
    steps = [*noise[:10], do.CreateVm("v7"), *noise[10:], do.CreateGmem("f9", "v7", 8 * P, 3), deep]

    def shows(tried: Sequence[Step]) -> bool:
        names = [getattr(step, "name", "") for step in tried]
        return {"v7", "f9"} <= set(names) and any(getattr(step, "offset", 0) >= 2**62 for step in tried)

    small = renamed(Shrinker(shows).shrink(steps))
    assert small == [
        do.CreateVm("v0"),
        do.CreateGmem("f0", "v0", P, 0),
        do.SetRegion("v0", 0, GPA, P, 0, 0, "f0", 2**63 - P),
    ]


def test_shrinking_begins_with_what_the_last_step_is_about() -> None:
    """A long sequence comes down to the objects of its last step at once, or to what was done with them."""
    about_others = [
        do.CreateVm("x"),
        do.CreateGmem("y", "x", 8 * P, 3),
        do.SetRegion("x", 1, GPA, P, G, 0, "y"),
        do.Look(),
    ] * 9
    made = [do.CreateVm("v"), do.MapMemory(2, 1, 5), do.CreateGmem("f", "v", 8 * P, 3)]
    used = [do.Fallocate("f", 0, 0, P), do.HostStore(2, 0, 7)]
    last = do.SetRegion("v", 1, GPA, P, G, ARENA + 2 * WINDOW, "f")
    a_guest = [do.CreateCpu("c", "v"), do.GuestLoad("c", GPA)]
    steps = [*about_others, *made, *about_others, *used, *a_guest, do.CreateCpu("d", "x"), last]
    for needed, plays in (([*made, last], 2), ([*made, *used, last], 3), ([*made, *used, *a_guest, last], 4)):
        tried: list[Sequence[Step]] = []

        def shows(candidate: Sequence[Step], needed: list[Step] = needed, tried: list[Sequence[Step]] = tried) -> bool:
            tried.append(candidate)
            return all(step in candidate for step in needed)

        Shrinker(shows, plays).shrink(steps)
        assert tried[-1] == needed
    # Where the last step says nothing, what disagreed does.
    tried = []
    Shrinker(lambda candidate: not tried.append(candidate), 2, about="allocated pages of f").shrink([*steps, do.Look()])  # type: ignore[func-returns-value]
    assert tried[-1] == [made[0], made[2], do.Look()]


@pytest.mark.parametrize("more", [0, 5])
def test_a_vm_that_never_went_keeps_its_number(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """A second VM of its name would be nowhere in debugfs, and its own life be nobody's finding."""
    free = os.dup(0)
    os.close(free)
    before = os.fstat(0)
    monkeypatch.setattr(world, "_directories", lambda: {f"1-{free + more}", f"1-{free + 7}", "1-0"})
    with world.World(cast("Kvm", None)):
        null = Path(os.devnull).stat()
        for number in (free + more, free + 7):
            assert os.path.samestat(os.fstat(number), null)
            assert not os.get_inheritable(number)
        assert os.path.samestat(os.fstat(0), before)
        if more:
            assert not is_open(free)
    assert not is_open(free + more)
    assert not is_open(free + 7)
    assert is_open(0)


@pytest.mark.parametrize(("what", "hasty"), [("lifetime of v0", True), ("answer", False)])
def test_a_life_without_end_is_shrunk_in_haste(monkeypatch: pytest.MonkeyPatch, what: str, hasty: bool) -> None:
    """What is left out is tried without waiting long for a VM that stays; what is told was given all its time."""
    steps: list[Step] = [do.CreateVm("v0"), do.CreateVm("v1"), do.Close("v0")]
    patiences: list[float] = []

    def fake_play(tried: Sequence[Step], _: KernelTraits, patience: float = 1.0) -> Played:
        patiences.append(patience)
        finding = Finding(len(tried) - 1, tried[-1], what, "gone", "alive", "a sort") if len(tried) > 1 else None
        return Played(tried, dict.fromkeys(range(len(tried)), Plain.OK), finding=finding)

    monkeypatch.setattr(searching, "play", fake_play)
    found = fake_play(steps, REFERENCE).finding
    assert found is not None
    patiences.clear()
    small = searching.shrink(Played(steps, finding=found), found, REFERENCE)
    assert len(small.steps) == 2
    assert patiences[-2:] == [1.0, 1.0]
    assert set(patiences[:-2]) == {searching.HASTE if hasty else 1.0}


def test_shrinking_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that shows nothing again is left as it is, and no more plays are made than allowed."""
    steps = seeded(1, REFERENCE)
    shrinker = Shrinker(lambda _: False)
    assert shrinker.shrink(steps) == steps
    assert shrinker.played == 1
    shrinker = Shrinker(lambda tried: len(tried) > 3, plays=10)
    shrinker.shrink(steps)
    assert shrinker.played == 10


def test_fingerprints_tell_shapes_apart_and_bugs_by_name() -> None:
    """One sort in one shape has one fingerprint whatever the numbers; another shape another; a known bug its own name."""
    world: Any = Twin(REFERENCE, punch_forgets_the_last_page)
    steps = [*start(), do.Fallocate("f", 1, 0, 4 * P), do.Fallocate("f", 3, 0, 2 * P)]
    played = Player(steps, Model(REFERENCE), world, None, prefetches=False).run()
    finding = played.finding
    assert finding is not None
    assert finding.what == "allocated pages of f"
    assert fingerprint(finding, steps) == fingerprint(replace(finding, at=1, got="[2]"), steps)
    assert fingerprint(finding, steps) != fingerprint(finding, steps[:-1])
    assert fingerprint(replace(finding, bug="B1"), steps) == "B1"


# --- known bugs -------------------------------------------------------------------------------------------------------


def test_known_bugs_are_recognised_by_what_the_kernel_did() -> None:
    """Each deviation has its name only where its own symptom is; anything else is nobody's."""
    far = replace(BIND, offset=2**63 - P)

    def bug(model: Model, step: Step, wanted: Answer, got: Answer, prefetches: bool = False) -> str:
        known = recognise(model, step, wanted, got, prefetches=prefetches)
        return known.bug if known else ""

    model = a_model(*start())
    assert bug(model, far, Errno.EINVAL, Plain.OK) == "B1"
    assert bug(model, replace(far, offset=2**63), Errno.EINVAL, Plain.OK) == ""
    assert bug(model, replace(BIND, offset=5 * P), Errno.EINVAL, Plain.OK) == ""
    model = a_model(*start(), do.MapMemory(0, 4, 0xA0), replace(BIND, hva=ARENA))
    assert bug(model, replace(BIND, flags=0), Errno.EINVAL, Plain.OK) == "B3"
    assert bug(model, replace(BIND, gpa=GPA + 64 * P), Errno.EINVAL, Plain.OK) == "B9"
    load = do.GuestLoad("c", GPA + P)
    assert bug(model, load, Value(0), Value(0xA1), prefetches=True) == "B24"
    assert bug(model, load, Value(0), Value(0xA1)) == ""
    assert bug(model, load, Value(0), Value(0xA2), prefetches=True) == ""
    assert bug(model, load, Value(0), Mmio(GPA + P, False)) == ""
    protected = a_model(*start(PROTECTED, MMAP), do.SetAttributes("v", GPA, P, 8))
    load = do.GuestLoad("c", GPA)
    assert bug(protected, load, MemoryFault(GPA, True), Mmio(GPA, False)) == ""
    protected.state.vms()[0].mmio.add(GPA // P)
    assert bug(protected, load, MemoryFault(GPA, True), Mmio(GPA, False)) == "B25"
    assert bug(protected, load, MemoryFault(GPA, True), MemoryFault(GPA, False)) == "B25"


def test_traits_survive_json() -> None:
    """The switches come back from JSON, whose keys are text."""
    assert KernelTraits.from_json(json.loads(json.dumps(REFERENCE.to_json()))) == REFERENCE
    assert MAIN in Model(REFERENCE).state.processes
