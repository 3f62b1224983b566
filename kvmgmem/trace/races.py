"""Which calls of a trace ran into each other."""

from collections.abc import Sequence

from kvmgmem.trace.steps import Step


def race_of(steps: Sequence[Step], check: Step) -> list[Step]:
    """The calls that ran into each other: those around the check, or else the last such before it; [] without any."""
    found: list[list[Step]] = []
    for step in steps:
        if step.call in ("start", "fork", "wait", "kill", "exit"):
            continue
        partners = [other for other in steps if happens_in(other, step) and other.thread != step.thread]
        if partners and not (step.call == "KVM_RUN" and step is not check):
            found.append([step, *partners])
    while True:
        merged = _merged(found)
        if len(merged) == len(found):
            break
        found = merged
    around = [group for group in found if check in group] or found[-1:]
    return sorted(around[0], key=lambda step: step.start) if around else []


def happens_in(other: Step, step: Step) -> bool:
    """Whether a call of the same process began while another was under way."""
    if other.process != step.process or other.call in ("start", "fork", "wait", "kill", "exit"):
        return False
    return step.start < other.start and (step.end < 0 or other.start < step.end)


def _merged(groups: list[list[Step]]) -> list[list[Step]]:
    found: list[list[Step]] = []
    for group in groups:
        same = next((other for other in found if any(step in other for step in group)), None)
        if same is None:
            found.append(list(group))
        else:
            same += [step for step in group if step not in same]
    return found
