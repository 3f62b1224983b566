"""A process that plays seeds for a search on this host: what hangs or dies there is a finding, and the search goes on."""

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvmgmem import splats
from kvmgmem.model.campaign import Campaign, Found
from kvmgmem.model.journal import FileJournal
from kvmgmem.model.play import step_lines
from kvmgmem.testing.kernel_log import KernelLog

END_LIMIT = 2.0
"""What a worker that has said all may take to end."""
SHRINK_LIMIT = 120.0
"""What a worker may be silent for beside a sequence's own time: shrinking is many plays."""


class Worker:
    """Plays one block of seeds. A context: at its end the process is gone, and so is its journal."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._pid = 0
        self._log = KernelLog()
        self.sequences = 0
        self.steps = 0
        self.next_seed = 0
        """The first seed that was not played."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        self._log.close()
        self._journal.unlink(missing_ok=True)

    def play(
        self,
        first: int,
        end: int,
        deadline: float,
        told: Sequence[str],
        sorts: dict[str, int],
        limit: float,
    ) -> Iterator[Found]:
        """Play the seeds from `first` to `end` until `deadline`, `limit` seconds at most for each; gives what is found."""
        reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(reader)
            _work(writer, self._journal, first, end - first, deadline, told, sorts)
        os.close(writer)
        self.next_seed = first
        try:
            for message in _messages(reader, limit + SHRINK_LIMIT):
                if "found" in message:
                    yield Found.from_json(message["found"])
                    continue
                self.next_seed, self.sequences, self.steps = message["seed"] + 1, message["sequences"], message["steps"]
                if complaint := self._complaint():
                    yield self._kernel_finding(complaint, self.next_seed - 1)
            if status := self._end():
                self.next_seed += 1
                yield self._lost(status, self.next_seed - 1)
        except TimeoutError:
            self._end()
            self.next_seed += 1
            yield self._lost(-signal.SIGKILL, self.next_seed - 1, "the sequence did not come to an end")
        finally:
            os.close(reader)

    def _end(self) -> int:
        """Kill the process if it lives; its exit code, negative for a signal that was not ours."""
        pid, self._pid = self._pid, 0
        if not pid:
            return 0
        found, status = os.waitpid(pid, os.WNOHANG)
        deadline = time.monotonic() + END_LIMIT
        while not found and time.monotonic() < deadline:
            time.sleep(0.01)
            found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 0

    def _complaint(self) -> splats.Splat | None:
        found = splats.find_splats(self._log.new_lines())
        return found[0] if found else None

    def _kernel_finding(self, splat: splats.Splat, seed: int) -> Found:
        steps, _ = FileJournal(self._journal).read()
        lines = (*step_lines(steps).splitlines(), *splat.lines[:40])
        name = "".join(letter if letter.isalnum() else "-" for letter in splat.fingerprint)
        return Found(f"kernel-{name}", f"kernel: {splat.fingerprint}", splat.reason, tuple(steps), lines, seed)

    def _lost(self, status: int, seed: int, reason: str = "") -> Found:
        steps, at = FileJournal(self._journal).read()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        text = reason or f"the process that played it died: {how}"
        last = type(steps[at]).__name__ if 0 <= at < len(steps) else "nothing"
        sort = f"{last}: {text}"
        name = "".join(letter if letter.isalnum() else "-" for letter in sort)[:60]
        return Found(name, sort, text, tuple(steps[: at + 1]), tuple(step_lines(steps[: at + 1]).splitlines()), seed)


def _messages(reader: int, limit: float) -> Iterator[dict[str, Any]]:
    """What the worker says until it has ended; raises TimeoutError if it says nothing for too long."""
    buffer = b""
    while True:
        if not select.select([reader], [], [], limit)[0]:
            raise TimeoutError
        data = os.read(reader, 1 << 16)
        if not data:
            return
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            yield json.loads(line)


def _work(
    writer: int,
    journal: Path,
    first: int,
    count: int,
    deadline: float,
    told: Sequence[str],
    sorts: dict[str, int],
) -> None:
    """The worker's process; never returns."""
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ending us is the search's business
        from kvmgmem.model.traits import probe

        with FileJournal(journal) as file:
            campaign = Campaign(probe(), set(told), dict(sorts))
            for event in campaign.run(first, count, deadline, file.begin):
                if isinstance(event, Found):
                    message: dict[str, Any] = {"found": event.to_json()}
                else:
                    message = {"seed": event, "sequences": campaign.sequences, "steps": campaign.steps}
                os.write(writer, json.dumps(message).encode() + b"\n")
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
