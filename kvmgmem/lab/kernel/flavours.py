"""Kernel flavours: named configuration fragments, and the check that a configuration kept what they ask for."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode

Version = tuple[int, int]
"""A kernel series: (7, 3) for every 7.3.x."""

BASE = "base"

_REQUEST = re.compile(r"(CONFIG_[A-Za-z0-9_]+)=(.+)")
_UNSET = re.compile(r"# (CONFIG_[A-Za-z0-9_]+) is not set")
_EXCEPTION = re.compile(r"# (since|until) (\d+)\.(\d+): \S")


@dataclass(frozen=True)
class Option:
    """One requested line of a configuration, and the kernels that must honour it."""

    name: str
    value: str
    since: Version | None = None
    until: Version | None = None

    def required_of(self, version: Version) -> bool:
        """Whether a kernel of this series must have the option."""
        return (self.since is None or version >= self.since) and (self.until is None or version < self.until)

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True)
class Difference:
    """A requested option, and the value that the configuration has instead."""

    option: Option
    actual: str

    def __str__(self) -> str:
        return f"{self.option} (is {self.actual})"


@dataclass(frozen=True)
class Comparison:
    """What became of a flavour's options: `lost` is an error, `excused` is what this kernel need not have."""

    lost: tuple[Difference, ...]
    excused: tuple[Difference, ...]


@dataclass(frozen=True)
class Flavour:
    """A named set of requested options; later fragments have overridden earlier ones."""

    name: str
    options: tuple[Option, ...]

    @property
    def fragment(self) -> str:
        """The options as a fragment that scripts/kconfig/merge_config.sh reads."""
        return "".join(f"{option}\n" for option in self.options)

    @property
    def digest(self) -> str:
        """Eight hex digits that change when any option does: a part of the cache's key."""
        return hashlib.sha256(self.fragment.encode()).hexdigest()[:8]


def flavour_names() -> list[str]:
    """The names of the flavours that the package holds."""
    files = resources.files("kvmgmem.lab.kernel").joinpath("flavours").iterdir()
    return sorted(file.name.removesuffix(".config") for file in files if file.name.endswith(".config"))


def load_flavour(name: str) -> Flavour:
    """The flavour of that name: `base` alone, or `base` with the named fragment on top.

    Raises HarnessError for a name that the package does not have.
    """
    if name not in flavour_names():
        raise HarnessError(
            f"no kernel flavour is called {name!r}", f"the flavours are: {', '.join(flavour_names())}", ExitCode.USAGE
        )
    options = parse_fragment(_read(BASE), BASE)
    if name != BASE:
        options = overlay(options, parse_fragment(_read(name), name))
    return Flavour(name, options)


def parse_fragment(text: str, origin: str) -> tuple[Option, ...]:
    """The options of a fragment, in its order.

    A comment `# since X.Y: why` or `# until X.Y: why` holds for the options up to the next blank line.
    Raises HarnessError for a line that is neither blank, a comment nor CONFIG_NAME=VALUE, and for a name given twice.
    """
    options: dict[str, Option] = {}
    since: Version | None = None
    until: Version | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped:
            since = until = None
        elif exception := _EXCEPTION.match(stripped):
            version = (int(exception[2]), int(exception[3]))
            since, until = (version, until) if exception[1] == "since" else (since, version)
        elif stripped.startswith("#"):
            continue
        elif request := _REQUEST.fullmatch(stripped):
            if request[1] in options:
                raise HarnessError(f"{origin}.config:{number}: {request[1]} is requested twice", "keep one of the lines")
            options[request[1]] = Option(request[1], request[2], since, until)
        else:
            raise HarnessError(f"{origin}.config:{number}: not an option: {stripped}", "write CONFIG_NAME=VALUE")
    return tuple(options.values())


def overlay(below: Iterable[Option], above: Iterable[Option]) -> tuple[Option, ...]:
    """Both fragments as one; where both name an option, `above` decides."""
    merged = {option.name: option for option in below}
    for option in above:
        merged.pop(option.name, None)
        merged[option.name] = option
    return tuple(merged.values())


def parse_config(text: str) -> dict[str, str]:
    """A kernel's .config as a mapping from name to value; options that are not set have the value "n"."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        if request := _REQUEST.fullmatch(line):
            values[request[1]] = request[2]
        elif unset := _UNSET.fullmatch(line):
            values[unset[1]] = "n"
    return values


def compare(options: Iterable[Option], config: Mapping[str, str], version: Version) -> Comparison:
    """Which of the requested options the configuration of a kernel of that series does not have.

    An option that Kconfig does not even mention counts as "n", which is what it means for the code.
    """
    lost: list[Difference] = []
    excused: list[Difference] = []
    for option in options:
        actual = config.get(option.name, "n")
        if actual != option.value:
            difference = Difference(option, actual if option.name in config else "absent")
            (lost if option.required_of(version) else excused).append(difference)
    return Comparison(tuple(lost), tuple(excused))


def config_hash(config: str) -> str:
    """Twelve hex digits that name a whole configuration; the same for a build's .config and its /proc/config.gz."""
    return hashlib.sha256(config.encode()).hexdigest()[:12]


def _read(name: str) -> str:
    return resources.files("kvmgmem.lab.kernel").joinpath("flavours", f"{name}.config").read_text(encoding="utf-8")
