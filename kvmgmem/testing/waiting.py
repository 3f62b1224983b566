"""Waiting for a condition, with a limit: what tests do instead of sleeping."""

import os
import time
from collections.abc import Callable

TIME_SCALE = float(os.environ.get("KVMGMEM_TIME_SCALE", "1"))


def wait_until(condition: Callable[[], bool], what: str, limit: float = 5.0) -> None:
    """Return once `condition` holds; raises AssertionError naming `what` after `limit` seconds (scaled under emulation)."""
    deadline = time.monotonic() + limit * TIME_SCALE
    pause = 0.0005
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit * TIME_SCALE:g} s in vain: {what}")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
