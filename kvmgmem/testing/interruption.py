"""A call that may never end: waited for, then interrupted by a signal, which a call that loops in the kernel looks for."""

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call`, one call into the kernel, answers; after `seconds` a signal ends it, so that the answer may be EINTR.

    For the main thread of a test, because it sets the handler of SIGUSR1 for as long as it waits.
    """
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        thread.start()
        thread.join(seconds)
        if thread.is_alive() and thread.ident is not None:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, handler)
    return results[0]
