"""What a test says of itself: the rows it asserts, what it needs, which VM types and gmem kinds it runs on."""

import pytest

from kvmgmem.abi import Cap
from kvmgmem.catalogue import contract as catalogue
from kvmgmem.catalogue import known_bugs
from kvmgmem.testing import requirements


def contract(*row_ids: str) -> pytest.MarkDecorator:
    """The rows of the contract that a test asserts; raises `HarnessError` for an id the catalogue does not have."""
    if not row_ids:
        raise TypeError("contract() wants at least one row id")
    for row_id in row_ids:
        catalogue.row(row_id)
    return pytest.mark.contract(*row_ids)


def requires(*names: str, cap: Cap | None = None, config: str | None = None) -> pytest.MarkDecorator:
    """What a test needs beyond guest_memfd itself: names of requirements, a capability, a kernel option.

    What is missing becomes the skip reason, and with `--require NAME` a failure. Raises `HarnessError` for a name that is
    none (see `kvmgmem caps`).
    """
    wanted = [*names]
    if cap is not None:
        wanted.append(f"cap:{cap.name}")
    if config is not None:
        wanted.append(f"config:{config}")
    for name in wanted:
        requirements.lookup(name)
    return pytest.mark.requires(*wanted)


def vm_types(*labels: str) -> pytest.MarkDecorator:
    """Restrict the `vm_type` parameter to these labels (`default`, `sw-protected`)."""
    return pytest.mark.vm_types(*labels)


def gmem_kinds(*names: str) -> pytest.MarkDecorator:
    """Restrict the `gmem_kind` parameter to these kinds (`g0`, `gM`, `gS`, `gMS`)."""
    return pytest.mark.gmem_kinds(*names)


def makes_gmem() -> pytest.MarkDecorator:
    """The test makes gmems of `vm` by itself, without the fixture: a type of VM without them is a skip, as with `gmem`."""
    return pytest.mark.makes_gmem


def disruptive() -> pytest.MarkDecorator:
    """The test can take down a kernel with known bugs, poison memory or exhaust it: guests run it, a host when asked."""
    return pytest.mark.disruptive


def would_show(*bug_ids: str) -> pytest.MarkDecorator:
    """The known bugs that would make the kernel complain, hang or die under the test.

    What a test recognises by an answer it notes with `known_bug`. A bug that has a `report` is recognised by this mark in
    the kernel's log, and is then a known bug and no splat. Raises `HarnessError` for a bug that the catalogue does not have.
    """
    return pytest.mark.would_show(*(known_bugs.get(bug_id).id for bug_id in bug_ids))


def test_timeout(seconds: float) -> pytest.MarkDecorator:
    """A budget other than the default, in seconds on real hardware; emulation scales it."""
    return pytest.mark.test_timeout(seconds)


test_timeout.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name
