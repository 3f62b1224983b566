"""Features to come: each is absent or present on a kernel, and its answer is recorded with the run."""

from collections.abc import Callable

import pytest

from kvmgmem.kvm import Kvm
from kvmgmem.roadmap import FEATURES, Feature, State, ask


@pytest.mark.parametrize("feature", FEATURES, ids=[feature.name for feature in FEATURES])
def test_feature_is_absent_or_present(kvm: Kvm, feature: Feature, record_property: Callable[[str, object], None]) -> None:
    """A proposed feature answers as a kernel without it does, or as one with it; anything else is a moved interface."""
    found = ask(feature, kvm)
    record_property(f"feature:{feature.name}", str(found))
    if found.state is State.NOT_ASKED:
        pytest.skip(f"{feature.title}: {found.sentence}")
    assert found.state is not State.ODD, f"{feature.title}: {found.sentence}"
