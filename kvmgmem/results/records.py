"""The records of a run: one JSON object to a line, written as things happen, and what each must hold.

Imported in the guest under emulation, so it needs the standard library's lighter half only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final, NoReturn

SCHEMA: Final = 1
"""The version of the record schema; a reader refuses any other."""


class Verdict(StrEnum):
    """What became of one test, from harmless to grave: the order of definition is the order of severity."""

    PASSED = "passed"
    SKIPPED = "skipped"
    KNOWN_BUG = "known-bug"
    """The test showed a recorded kernel defect, by behaviour."""
    NOT_RUN = "not-run"
    """It was planned, and its turn never came."""
    FAILED = "failed"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    """The process of the test died."""
    ERROR = "error"
    """The harness could not run it."""
    SPLAT = "splat"
    """The kernel reported WARN, KASAN or the like meanwhile."""
    PANICKED = "panicked"
    """The kernel died or hung under it."""

    @property
    def severity(self) -> int:
        """Place in the order of severity; 0 is the most harmless."""
        return _SEVERITY[self]


_SEVERITY: Final = {verdict: place for place, verdict in enumerate(Verdict)}


@dataclass(frozen=True)
class Circumstances:
    """What a run ran on. Keys that this version does not know are kept in `extra` and written out again."""

    release: str
    backend: str
    """kvm_amd, kvm_intel, kvm_pvm, ..."""
    paging: str
    """tdp or shadow."""
    accelerator: str
    """host, tcg or kvm."""
    cpu_model: str
    vm_types: tuple[str, ...]
    where: str
    """host or guest."""
    kvmgmem: str
    python: str
    pytest: str
    config_hash: str | None = None
    flavour: str | None = None
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStart:
    """A run, or its continuation after the guest was booted again, begins."""

    run: str
    """A UUID in hex."""
    time: float
    """Seconds since the epoch, as all times here."""
    circumstances: Circumstances


@dataclass(frozen=True)
class Plan:
    """The tests that are going to run, in order."""

    tests: tuple[str, ...]


@dataclass(frozen=True)
class TestStart:
    """A test begins; until its end comes it is open, and a panic or hang is charged to it."""

    __test__ = False  # a name like this is not a test class to pytest

    test: str
    time: float
    area: str | None = None
    contract: tuple[str, ...] = ()
    rule: str = ""
    """What must hold: the first paragraph of the test's docstring."""
    limit: float = 0.0
    """Seconds that the runner gives it; 0 if it does not say."""


@dataclass(frozen=True)
class TestEnd:
    """A test ended."""

    __test__ = False

    test: str
    time: float
    verdict: Verdict
    duration: float = 0.0
    """Seconds, harness included."""
    reason: str = ""
    """One line; reports group skips by it, verbatim."""
    detail: str = ""
    bugs_shown: tuple[str, ...] = ()
    bugs_absent: tuple[str, ...] = ()
    kernel_log: tuple[str, ...] = ()
    repeat: str | None = None
    """The command that runs this test again."""
    overhead: float | None = None
    """Seconds spent on isolation and leak checks, of `duration`."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """What the test had to say beside its verdict (pytest's record_property)."""


@dataclass(frozen=True)
class Note:
    """Something a reader of the report should know."""

    time: float
    text: str


@dataclass(frozen=True)
class Trace:
    """A line of a test's trace on its way out of a guest: what is not on the wire dies with the kernel."""

    test: str
    line: Mapping[str, Any]


@dataclass(frozen=True)
class Heartbeat:
    """The runner lives."""

    time: float


@dataclass(frozen=True)
class RunEnd:
    """The run came to its end. Without this record a run is never a success."""

    time: float
    exit: int
    counts: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """What was not looked at, and why."""


Record = RunStart | Plan | TestStart | TestEnd | Note | Trace | Heartbeat | RunEnd

_KIND_OF: Final[dict[type[Record], str]] = {
    RunStart: "run-start",
    Plan: "plan",
    TestStart: "test-start",
    TestEnd: "test-end",
    Note: "note",
    Trace: "trace",
    Heartbeat: "heartbeat",
    RunEnd: "run-end",
}


def to_line(record: Record) -> str:
    """Return the record as one line of pure ASCII, without a newline. Lone surrogates survive as escapes.

    Raises ValueError for a number that JSON lacks (NaN, infinity).
    """
    fields = dict(vars(record))
    head: dict[str, Any] = {"record": _KIND_OF[type(record)]}
    if isinstance(record, RunStart):
        head["schema"] = SCHEMA
        circumstances = asdict(record.circumstances)
        # A key of this version outranks one of the same name among the unknown ones.
        fields["circumstances"] = {**circumstances.pop("extra"), **circumstances}
    return json.dumps({**head, **fields}, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def parse_line(line: str) -> Record:
    """Return the record that the line holds; keys this version does not know are dropped, but for circumstances.

    Raises ValueError that says what is wrong with the line.
    """
    try:
        document = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not a record: nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"not a JSON object but {_kind_of_value(document)}")
    kind = _Fields(document, "a record").text("record")
    if kind not in _PARSERS:
        raise ValueError(f"{kind!r} is not a kind of record")
    return _PARSERS[kind](_Fields(document, kind))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a record may hold")


def _kind_of_value(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names[type(value)]


class _Fields:
    """The fields of one parsed object; each method takes one out, checked."""

    def __init__(self, fields: dict[str, Any], what: str) -> None:
        self.fields = fields
        self.what = what

    def _wrong(self, key: str, wanted: str, value: object) -> ValueError:
        return ValueError(f"{self.what}: {key!r} must be {wanted}, not {_kind_of_value(value)}")

    def _required(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"{self.what}: {key!r} is missing")
        return self.fields[key]

    def text(self, key: str, default: str | None = None) -> str:
        value = self._required(key) if default is None else self.fields.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def text_or_null(self, key: str) -> str | None:
        return None if self.fields.get(key) is None else self.text(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._required(key) if default is None else self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if number in (float("inf"), float("-inf")):  # 1e999 is valid JSON
            raise ValueError(f"{self.what}: {key!r} is too large a number")
        return number

    def number_or_null(self, key: str) -> float | None:
        return None if self.fields.get(key) is None else self.number(key)

    def whole(self, key: str) -> int:
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number", value)
        return value

    def whole_or_null(self, key: str) -> int | None:
        return None if self.fields.get(key) is None else self.whole(key)

    def texts(self, key: str, required: bool = False) -> tuple[str, ...]:
        value = self._required(key) if required else self.fields.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{self.what}: {key!r} must be a list of texts")
        return tuple(value)

    def texts_by_name(self, key: str) -> Mapping[str, str]:
        value = self.fields.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise ValueError(f"{self.what}: {key!r} must be an object of texts")
        return value

    def object(self, key: str) -> "_Fields":
        value = self._required(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return _Fields(value, f"{self.what}: {key}")


_CIRCUMSTANCES: Final = frozenset(Circumstances.__dataclass_fields__) - {"extra"}


def _circumstances(fields: _Fields) -> Circumstances:
    return Circumstances(
        release=fields.text("release"),
        backend=fields.text("backend"),
        paging=fields.text("paging"),
        accelerator=fields.text("accelerator"),
        cpu_model=fields.text("cpu_model"),
        vm_types=fields.texts("vm_types", required=True),
        where=fields.text("where"),
        kvmgmem=fields.text("kvmgmem"),
        python=fields.text("python"),
        pytest=fields.text("pytest"),
        config_hash=fields.text_or_null("config_hash"),
        flavour=fields.text_or_null("flavour"),
        seed=fields.whole_or_null("seed"),
        extra={key: value for key, value in fields.fields.items() if key not in _CIRCUMSTANCES},
    )


def _run_start(fields: _Fields) -> RunStart:
    schema = fields.whole("schema")
    if schema != SCHEMA:
        raise ValueError(f"run-start: written in schema {schema}, and only schema {SCHEMA} can be read")
    return RunStart(fields.text("run"), fields.number("time"), _circumstances(fields.object("circumstances")))


def _test_start(fields: _Fields) -> TestStart:
    return TestStart(
        test=fields.text("test"),
        time=fields.number("time"),
        area=fields.text_or_null("area"),
        contract=fields.texts("contract"),
        rule=fields.text("rule", ""),
        limit=fields.number("limit", 0.0),
    )


def _verdict(fields: _Fields) -> Verdict:
    text = fields.text("verdict")
    try:
        return Verdict(text)
    except ValueError:
        raise ValueError(f"{fields.what}: {text!r} is not a verdict") from None


def _test_end(fields: _Fields) -> TestEnd:
    return TestEnd(
        test=fields.text("test"),
        time=fields.number("time"),
        verdict=_verdict(fields),
        duration=fields.number("duration", 0.0),
        reason=fields.text("reason", ""),
        detail=fields.text("detail", ""),
        bugs_shown=fields.texts("bugs_shown"),
        bugs_absent=fields.texts("bugs_absent"),
        kernel_log=fields.texts("kernel_log"),
        repeat=fields.text_or_null("repeat"),
        overhead=fields.number_or_null("overhead"),
        properties=fields.texts_by_name("properties"),
    )


def _run_end(fields: _Fields) -> RunEnd:
    counts = fields.object("counts") if "counts" in fields.fields else _Fields({}, "run-end: counts")
    return RunEnd(
        time=fields.number("time"),
        exit=fields.whole("exit"),
        counts={key: counts.whole(key) for key in counts.fields},
        left_out=fields.texts("left_out"),
    )


_PARSERS: Final[dict[str, Callable[[_Fields], Record]]] = {
    "run-start": _run_start,
    "plan": lambda fields: Plan(fields.texts("tests", required=True)),
    "test-start": _test_start,
    "test-end": _test_end,
    "note": lambda fields: Note(fields.number("time"), fields.text("text")),
    "trace": lambda fields: Trace(fields.text("test"), fields.object("line").fields),
    "heartbeat": lambda fields: Heartbeat(fields.number("time")),
    "run-end": _run_end,
}
