"""The tests of a guest's runner: those of its job, less what other guests do and what an earlier boot has finished.

What is collected depends on the job alone, so a guest that has collected may be kept, and serve another run of the same job.
"""

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest


class Selection:
    """A pytest plugin that waits, when the tests are collected, for the word to begin, and keeps what that says.

    The word holds `share`, the number of this guest and how many there are: it does every n-th test; `done`, exact node
    ids: --deselect matches prefixes, and would take test_ab along with test_a; and `backwards`, for a guest that begins with
    the last one and comes towards another.
    """

    def __init__(self, await_word: Callable[[], dict[str, Any]]) -> None:
        """`await_word` says that all is collected, and returns with the word."""
        self._await_word = await_word

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Before anybody opens the results or plans anything."""
        word = self.wait()
        number, guests = word.get("share", (0, 1))
        done = frozenset(word.get("done", ()))
        everything = list(session.items)
        session.items[:] = [item for item in everything[number::guests] if item.nodeid not in done]
        if word.get("backwards"):
            session.items.reverse()
        if dropped := set(everything).difference(session.items):
            session.config.hook.pytest_deselected(items=list(dropped))
        gc.enable()

    def wait(self) -> dict[str, Any]:
        """What this guest is told when it knows its tests."""
        word = self._await_word()
        random.seed()  # what was there before may have been kept, and be the same in two guests
        return word
