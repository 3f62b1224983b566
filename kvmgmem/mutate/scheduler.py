"""Spreading a campaign over machines: each mutant is a task of dask.distributed, an optional extra.

Every worker keeps private trees and a kernel of its own below its own cache folder. It needs kvmgmem, QEMU, what building a
kernel takes, and the kernel tree at the path that was given. One thread a worker: `dask worker ADDRESS --nthreads 1`.
"""

import importlib
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate.campaign import Campaign, Plan, Site, result_line
from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.judge import Fate
from kvmgmem.mutate.state import Result, State

CONNECT_SECONDS = 20.0


def run_spread(address: str, plan: Plan, mutants: Sequence[Mutant], state: State, progress: Progress) -> None:
    """Have the workers of a scheduler try these mutants; results are kept as they come. Raises HarnessError."""
    distributed = load_distributed()
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise HarnessError(
            f"no dask scheduler answers at {address}: {error or type(error).__name__}", "start one: dask scheduler"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise HarnessError(
                f"the dask scheduler at {address} has no workers", f"start one: dask worker {address} --nthreads 1"
            )
        futures = [client.submit(try_here, plan, mutant, pure=False, retries=0) for mutant in mutants]
        for done, future in enumerate(distributed.as_completed(futures), start=1):
            result = future.result()
            state.add(result)
            progress.note(result_line(result, done, len(mutants)))
            progress.update(result.mutant, done / len(mutants))


def load_distributed() -> Any:
    """The engine, if it is installed; raises HarnessError (USAGE) if not."""
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise HarnessError(
            "--scheduler needs dask.distributed, which is not installed",
            "install it: pip install 'kvmgmem[mutate-distributed]'",
            ExitCode.USAGE,
        ) from error


_CAMPAIGNS: dict[Path, Campaign] = {}
_LOCK = threading.Lock()


def try_here(plan: Plan, mutant: Mutant) -> Result:
    """Try one mutant on this worker; the first one builds the worker's kernel. What goes wrong is the result's reason."""
    with _LOCK:  # a worker with several threads would have them share one tree
        try:
            campaign = _campaign(plan)
            campaign.prepare_baseline([mutant])
            return campaign.try_mutant(Site(campaign.plan.work / "tree-1", 1), mutant)
        except HarnessError as error:
            return Result(mutant.id, Fate.ERROR, reason=f"{socket.gethostname()}: {error.message}")


def _campaign(plan: Plan) -> Campaign:
    work = plan.work / f"worker-{socket.gethostname()}"
    if work not in _CAMPAIGNS:
        work.mkdir(parents=True, exist_ok=True)
        state = State(work / "worker.jsonl")
        with Progress(f"kvmgmem: mutants on {socket.gethostname()}") as progress:
            campaign = Campaign(replace(plan, work=work, jobs=1), state, progress)
            campaign.prepare()
        _CAMPAIGNS[work] = campaign
    return _CAMPAIGNS[work]
