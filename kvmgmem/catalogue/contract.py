"""The contract: every behaviour of guest_memfd and of memory slots that selftests pin down, by id.

The rows live in contract.json, one to a line. Nothing is read before the first question.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from kvmgmem.catalogue.lookup import unknown_id

CATALOGUE_FILE: Final = Path(__file__).with_name("contract.json")


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the contract: the prefix that its rows' ids share, and what it is about."""

    id: str
    title: str


@dataclass(frozen=True, slots=True)
class Row:
    """One behaviour. Rows of GM-OWN have `design`, `expect` and `oracle`, all others `call`, `source` and what follows.

    An absent field is "". Abbreviations are explained by `legend()`.
    """

    id: str
    area: str
    statement: str
    call: str = ""
    """The call, and behind an arrow what must come of it."""
    precondition: str = ""
    """What a kernel must offer beyond KVM_CAP_GUEST_MEMFD; "" when that is enough."""
    source: str = ""
    """Where Linux 7.3.4 implements it."""
    upstream: str = ""
    """The upstream selftests that assert it; "" or "NOT ..." when none does."""
    verified: str = ""
    design: str = ""
    expect: str = ""
    oracle: str = ""


AREAS: Final = (
    Area("GM-VM", "VM creation and VM types"),
    Area("GM-CAP", "Capability reporting"),
    Area("GM-CRE", "Creating a guest_memfd"),
    Area("GM-FD", "The file descriptor and the file"),
    Area("GM-MAP", "mmap semantics"),
    Area("GM-NUMA", "NUMA policy"),
    Area("GM-FAL", "fallocate and holes"),
    Area("GM-SLOT", "Memory slots in general"),
    Area("GM-BIND", "Binding a guest_memfd to a slot"),
    Area("GM-LIFE", "Lifetime"),
    Area("GM-RUN", "Guest access and exits"),
    Area("GM-ATTR", "Memory attributes"),
    Area("GM-PF", "Pre-fault"),
    Area("GM-DIRTY", "Dirty tracking around guest_memfd"),
    Area("GM-ENC", "Mirror, move, and population of encrypted VMs"),
    Area("GM-RES", "Resource limits and accounting"),
    Area("GM-HWP", "Memory errors"),
    Area("GM-RACE", "Concurrency"),
    Area("GM-OWN", "Ownership: one struct kvm for each guest_memfd file"),
)
"""All areas, in the order in which reports list them."""


def _ownership_id(row_id: str) -> bool:
    """Say whether the id has the form of an ownership statement: C1 to C33, or C4p."""
    return row_id.startswith("C") and row_id[1:].removesuffix("p").isdecimal()


def area_of(row_id: str) -> str:
    """Return the area's id ("GM-BIND") for a row's id ("GM-BIND-007"), by its form: the catalogue is not read.

    Raises HarnessError (USAGE) for an id that has the form of no area; whether the number exists, `row` says.
    """
    if _ownership_id(row_id):
        return "GM-OWN"
    prefix, _, number = row_id.rpartition("-")
    if number.isdecimal() and any(prefix == area.id for area in AREAS if area.id != "GM-OWN"):
        return prefix
    raise unknown_id("contract row", row_id, load(), f"kvmgmem/catalogue/{CATALOGUE_FILE.name}")


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))
    return document


@cache
def load() -> Mapping[str, Row]:
    """Return all rows by id, in the order of the contract; read once, and read-only."""
    return MappingProxyType({fields["id"]: Row(**fields) for fields in _document()["rows"]})


def row(row_id: str) -> Row:
    """Return the row with this id; raises HarnessError (USAGE) that suggests the nearest id where there is none."""
    known = load()
    if row_id not in known:
        raise unknown_id("contract row", row_id, known, f"kvmgmem/catalogue/{CATALOGUE_FILE.name}")
    return known[row_id]


def legend() -> Mapping[str, Mapping[str, str]]:
    """Return what the short names in the rows' fields stand for: field name, then short name, then meaning."""
    meanings: dict[str, dict[str, str]] = _document()["legend"]
    return MappingProxyType(meanings)
