"""Features to come as a run's records tell them: what `selftests/test_roadmap.py` was answered."""

from collections.abc import Mapping, Sequence
from typing import Final

from kvmgmem.results.run import Run

PREFIX: Final = "feature:"
"""What begins the name of a test's property that holds such an answer; the feature's name follows."""


def features_of(run: Run) -> Mapping[str, str]:
    """By feature, the state and the sentence that the kernel's answer came to (`absent: ...`); empty if it was not asked."""
    found = (outcome.end.properties for outcome in run.tests)
    return {
        name.removeprefix(PREFIX): text
        for properties in found
        for name, text in properties.items()
        if name.startswith(PREFIX)
    }


def state_of(text: str) -> str:
    """The state alone: absent, present, odd, or not asked."""
    return text.partition(":")[0]


def features_by_column(runs: Sequence[Run]) -> Mapping[str, list[str]]:
    """Feature to its state in each run, `-` where the run does not say; in the order in which runs name features."""
    columns = [features_of(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [state_of(column.get(name, "-")) for column in columns] for name in names}
