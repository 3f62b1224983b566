"""Descriptors on their way between processes: which sending belongs to which receiving."""

from collections.abc import Sequence

from kvmgmem.trace.steps import Step


def parent_of(process: str) -> str:
    """The process that forked this one: p0 for p1, p1 for p1.2."""
    return process.rpartition(".")[0] or "p0"


def channels(steps: Sequence[Step]) -> dict[str, str]:
    """For each send and receive, by its id, the child between which and its parent the descriptors pass.

    Where neither of two processes is the other's parent, there is no entry.
    """
    found: dict[str, str] = {}
    receives = [step for step in steps if step.call == "receive"]
    for send in (step for step in steps if step.call == "send"):
        receive = next((step for step in receives if step.id not in found and _fits(send, step)), None)
        if receive is not None:
            a, b = send.process, receive.process
            child = b if parent_of(b) == a else a if parent_of(a) == b else ""
            if child:
                found[send.id] = found[receive.id] = child
    return found


def _fits(send: Step, receive: Step) -> bool:
    if receive.start < send.start or receive.process == send.process:
        return False
    return len(receive.arguments["fds"]) == len(send.arguments["fds"])
