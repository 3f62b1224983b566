"""What a C program can do in a loop: runs of a guest that differ by a step in one register, and stores in a row."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from kvmgmem.trace.steps import Step

LEAST = 3
"""So many rounds are worth a loop."""
LEAST_STORES = 5

Moment = tuple[str, Step]


def with_loops(moments: Sequence[Moment], check: Step) -> Iterator[tuple[str, Step, list[Step]]]:
    """The moments with what follows each in a loop: a KVM_SET_REGS, and the runs and settings after it, or stores; else [].

    The page that is shared with a vCPU is mapped before its registers are set, not between that and the run.
    """
    rest = _with_pages_first(moments)
    at = 0
    while at < len(rest):
        found = _rounds(rest[at:], check)
        row = _row(rest[at:], check)
        if len(found) >= 2 * LEAST or len(row) >= LEAST_STORES:
            found = found if len(found) >= 2 * LEAST else row
            yield "do", found[0], found[1:]
            at += len(found)
        else:
            yield (*rest[at], [])
            at += 1


def _with_pages_first(moments: Sequence[Moment]) -> list[Moment]:
    found: list[Moment] = []
    for moment in moments:
        step = moment[1]
        after = found and found[-1][1].call == "KVM_SET_REGS" and found[-1][1].on == step.on
        if step.call == "mmap" and after:
            found.insert(-1, moment)
        else:
            found.append(moment)
    return found


def _rounds(moments: Sequence[Moment], check: Step) -> list[Step]:
    """The longest loop that begins here."""
    found: list[Step] = []
    for (kind, first), (other, second) in zip(moments[::2], moments[1::2], strict=False):
        pair = [first, second]
        if (kind, other) != ("do", "do") or check in pair or not _fits([*found, *pair]):
            break
        found += pair
    return found


def _fits(steps: list[Step]) -> bool:
    setting, run = steps[-2:]
    same = (setting.call, run.call, run.on) == ("KVM_SET_REGS", "KVM_RUN", setting.on) and not run.arguments
    first, first_run = steps[:2]
    alike = (setting.on, setting.process, setting.answer) == (first.on, first.process, 0)
    return same and alike and _way_out(run) == _way_out(first_run) and (len(steps) == 2 or stepped(steps)[2] > 0)


def _way_out(run: Step) -> tuple[object, object, object]:
    told = run.out.get("exit") or {}
    return run.answer, told.get("is"), told.get("reason")


def stepped(steps: Sequence[Step]) -> tuple[str, int, int]:
    """The one register that grows from round to round, where it begins and by how much; ("", 0, 0) if it is not so."""
    settings = [step.arguments for step in steps[::2]]
    names = {name for setting in settings for name in setting}
    moving = [name for name in names if any(setting.get(name, 0) != settings[0].get(name, 0) for setting in settings)]
    if len(moving) != 1:
        return "", 0, 0
    values = [int(setting.get(moving[0], 0)) for setting in settings]
    strides = {b - a for a, b in pairwise(values)}
    return (moving[0], values[0], strides.pop()) if len(strides) == 1 and min(strides) > 0 else ("", 0, 0)


def _row(moments: Sequence[Moment], check: Step) -> list[Step]:
    """The stores that begin here and go through one range in even steps, with values that do so, too."""
    found: list[Step] = []
    for kind, step in moments:
        plain = step.call == "store" and step is not check and step.answer == 0 and not step.fail_nth
        if (kind, plain) != ("do", True) or not _goes_on([*found, step]):
            break
        found.append(step)
    return found


def _goes_on(row: Sequence[Step]) -> bool:
    if len(row) == 1:
        return isinstance(row[0].arguments["address"], str)
    first, last = row[0], row[-1]
    alike = (first.process, first.thread, first.arguments["width"]) == (last.process, last.thread, last.arguments["width"])
    between = rise(row[-2], last)
    return alike and _place(first)[0] == _place(last)[0] and between[0] > 0 and between == rise(*row[:2])


def _place(store: Step) -> tuple[str, int]:
    region, _, offset = str(store.arguments["address"]).partition("+")
    return region, int(offset or "0", 0)


def rise(store: Step, following: Step) -> tuple[int, int]:
    """By how much the place and the value of a store differ from those of the one before it."""
    values = int(following.arguments["value"]) - int(store.arguments["value"])
    return _place(following)[1] - _place(store)[1], values
