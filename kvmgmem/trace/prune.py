"""Which steps of a trace a check depends on: the rest would only make its C program longer.

Kept is what could matter, by what each call can change; what only asks, fails, or concerns other objects goes.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kvmgmem.arch.x86_64 import program_image, programs
from kvmgmem.trace import decode
from kvmgmem.trace.expectation import Check, made
from kvmgmem.trace.steps import Step, Trace

SET_REGION = ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2")
LOOK = "lives"
"""The call by which a trace tells that somebody looked whether a VM lives."""
STATISTIC = "statistic"
"""The call by which a trace tells that somebody read one of KVM's statistics."""
TOUCHES = ("load", "store", "fill", "first_other", "read_bytes", "write_bytes")
BETWEEN_PROCESSES = ("fork", "start", "exit", "wait", "kill", "send", "receive", "exec")

# What is made of an object that matters matters, too: a mapping of a file, a copy of a descriptor, a vCPU of a VM.
_THROUGH = ("mmap", "dup", "found", "KVM_CREATE_VCPU")
_NAME = re.compile(r"[a-z]+\d+(_p[\d_]+)?")  # a handle or a range

# What changes nothing by being asked.
_QUESTIONS = frozenset({
    "KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_REGS", "KVM_GET_SREGS",
    "KVM_GET_SUPPORTED_CPUID", "KVM_TRANSLATE", "KVM_GET_MSRS", "KVM_GET_STATS_FD", "cachestat", "mincore", "kcmp",
    "fstatfs", "get_mempolicy", LOOK, STATISTIC,
})  # fmt: skip
# Their answers depend on slots, files and attributes alone: neither on what is in memory nor on what a guest did.
_BOOKKEEPING = frozenset({
    *SET_REGION, "KVM_CREATE_VM", "KVM_CREATE_GUEST_MEMFD", "KVM_CREATE_VCPU", "KVM_SET_MEMORY_ATTRIBUTES",
    "KVM_CHECK_EXTENSION", "KVM_ENABLE_CAP", "fallocate", "mmap",
})  # fmt: skip


def needed_steps(trace: Trace, check: Check) -> list[Step]:
    """The steps that the check depends on, in order, the check's own last but for those that raced with it."""
    # What began while the check's call was under way raced with it.
    last = max(check.step.start, check.step.end)
    before = [step for step in trace.steps if step is not check.step and step.start < last]
    if check.step.call == LOOK:
        return _without_idle_processes(trace, _holding(trace, before, check.step), check.step)
    candidates = [step for step in before if _may_matter(step) or is_control(step, check)]
    candidates = _with_last_shortage(candidates, check.step)
    if check.aspect == "answer" and check.step.call in _BOOKKEEPING and not check.step.on.startswith("vcpu"):
        candidates = [step for step in candidates if not _is_guest_or_memory(step)]
        candidates = _related_slots(candidates, check.step, _files(trace))
    candidates = _without_round_trips(candidates)
    candidates = _without_unused_programs(_without_lost_registers([*candidates, check.step]))
    kept = _closure(trace, candidates, check.step)
    return _without_idle_processes(trace, kept, check.step)


def all_steps(trace: Trace, check: Check) -> list[Step]:
    """Everything up to the check, but for accesses that raised a signal and looks that change nothing."""
    left_out = ("cachestat", "mincore", "kcmp", LOOK, STATISTIC)
    before = [step for step in trace.steps if step.start < check.step.start]
    before = [step for step in before if step.call not in left_out or is_control(step, check)]
    before = _with_last_shortage(before, check.step)
    return [*(step for step in before if not (step.failed and step.call in TOUCHES)), check.step]


def is_control(step: Step, check: Check) -> bool:
    """Whether a statistic stood, earlier, where the check wants it: where it never does the question means nothing."""
    same = (step.call, step.on, step.arguments.get("name")) == (STATISTIC, check.step.on, check.step.arguments.get("name"))
    return same and step is not check.step and step.answer == check.wanted


def _may_matter(step: Step) -> bool:
    if step.call in _QUESTIONS:
        return False
    return step.call == "KVM_RUN" or not step.failed or step.injected


def _with_last_shortage(steps: list[Step], check: Step) -> list[Step]:
    """Of the calls that failed for want of memory only the last: what a call leaves that fails halfway is the question."""
    halfway = [step for step in steps if step.injected and step.failed]
    kept = [] if check.injected else halfway[-1:]
    return [step for step in steps if step not in halfway or step in kept]


def _is_guest_or_memory(step: Step) -> bool:
    return step.call in ("KVM_CREATE_VCPU", "KVM_RUN", "kick", *TOUCHES) or step.on.startswith("vcpu")


def references(step: Step) -> set[str]:
    """The handles and ranges that a step names, its own result aside."""
    named = (value.partition("+")[0] for value in _texts(step.arguments))
    return {name for name in (step.on, *named) if _NAME.fullmatch(name)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# -- slots


def _slot(step: Step) -> tuple[str, int]:
    return step.on, int(step.arguments.get("slot", 0))


def _gpas(step: Step) -> range:
    start = int(step.arguments.get("guest_phys_addr", 0))
    return range(start, start + int(step.arguments.get("memory_size", 0)))


def _is_slot(step: Step) -> bool:
    return step.call in SET_REGION


def _files(trace: Trace) -> dict[str, str]:
    """For each copy of a descriptor the handle that the file was made with."""
    found: dict[str, str] = {}
    for step in trace.steps:
        same = step.on if step.call == "dup" else step.arguments.get("same_as")
        if same and made(step):
            found[str(step.answer)] = found.get(same, same)
    return found


def _related_slots(steps: list[Step], check: Step, files: Mapping[str, str]) -> list[Step]:
    """Without the slots that share neither number, file nor guest addresses with the one that the check is about."""
    related = [check] if _is_slot(check) else [step for step in steps if _is_slot(step) and check.on in references(step)]
    if not _is_slot(check) and not related:
        return steps
    rest = [step for step in steps if _is_slot(step) and step not in related]
    while True:
        found = [step for step in rest if any(_relate(step, other, files) for other in related)]
        if not found:
            return [step for step in steps if not _is_slot(step) or step in related]
        related += found
        rest = [step for step in rest if step not in found]


def _relate(a: Step, b: Step, files: Mapping[str, str]) -> bool:
    file, other = (files.get(str(step.arguments.get("guest_memfd")), step.arguments.get("guest_memfd")) for step in (a, b))
    if file is not None and file == other:
        return True
    ours, theirs = _gpas(a), _gpas(b)
    overlap = ours.start < theirs.stop and theirs.start < ours.stop
    return a.on == b.on and (_slot(a) == _slot(b) or overlap)


def _without_round_trips(steps: list[Step]) -> list[Step]:
    """Without slots that were made and deleted again before anybody could use them."""
    dropped: set[str] = set()
    for index, step in enumerate(steps):
        if not _is_slot(step) or step.failed or not step.arguments.get("memory_size") or step.id in dropped:
            continue
        for later in steps[index + 1 :]:
            if later.failed:
                break
            if _is_slot(later) and _slot(later) == _slot(step):
                fresh = not any(
                    _is_slot(earlier) and _slot(earlier) == _slot(step) and earlier.id not in dropped
                    for earlier in steps[:index]
                )
                if fresh and not later.arguments.get("memory_size"):
                    dropped |= {step.id, later.id}
                break
            if not (_is_slot(later) or made(later) or later.call == "munmap"):
                break
    return [step for step in steps if step.id not in dropped]


# -- guests


def _without_lost_registers(steps: list[Step]) -> list[Step]:
    """Without registers that were set again before the vCPU ran."""
    kept: list[Step] = []
    pending: dict[tuple[str, str], Step] = {}
    for step in steps:
        if step.call in ("KVM_SET_REGS",):
            lost = pending.get((step.on, step.call))
            kept = [other for other in kept if other is not lost]
            pending[step.on, step.call] = step
        elif step.call == "KVM_RUN":
            pending.pop((step.on, "KVM_SET_REGS"), None)
        kept.append(step)
    return kept


def _without_unused_programs(steps: list[Step]) -> list[Step]:
    """Without guest programs that no vCPU was ever pointed at."""
    bases = guest_addresses(steps)
    used = {
        value for step in steps if step.call == "KVM_SET_REGS" for value in step.arguments.values() if isinstance(value, int)
    }
    kept: list[Step] = []
    for step in steps:
        region, _, offset = str(step.arguments.get("address", "")).partition("+")
        if step.call != "write_bytes" or region not in bases:
            kept.append(step)
            continue
        data, at = decode.unpack(step.arguments["data"]), int(offset or "0", 0)
        pieces = _programs_in(data)
        if not pieces:
            kept.append(step)
        for start, code in pieces:
            first = bases[region] + at + start
            if any(first <= value < first + len(code) for value in used):
                where = {"address": f"{region}+{at + start:#x}", "data": decode.pack(code)}
                kept.append(replace(step, arguments=where))
    return kept


def _programs_in(data: bytes) -> list[tuple[int, bytes]]:
    """The programs that the data are, each with its place; none if they are something else."""
    known = programs()
    image, starts = program_image()
    if data == image:
        return [(starts[name], code) for name, code in known.items()]
    return [(0, data)] if data in known.values() else []


def guest_addresses(steps: Iterable[Step]) -> dict[str, int]:
    """Where the guest sees the start of each range that backs a slot."""
    found: dict[str, int] = {}
    for step in steps:
        hva = step.arguments.get("userspace_addr")
        if _is_slot(step) and isinstance(hva, str) and "guest_memfd" not in step.arguments:
            region, _, offset = hva.partition("+")
            found[region] = int(step.arguments.get("guest_phys_addr", 0)) - int(offset or "0", 0)
    return found


# -- objects


def _is_mere_look(step: Step, files: Collection[str]) -> bool:
    """Whether an access raised a signal, or only read memory that is no file's: nobody's life depends on it."""
    if step.call not in TOUCHES:
        return False
    looks = step.call in ("load", "first_other", "read_bytes")
    return step.failed or (looks and str(step.arguments.get("address", "")).partition("+")[0] not in files)


def _closure(trace: Trace, steps: list[Step], check: Step) -> list[Step]:
    """The steps on objects that the check names, on those that these were made of, or that were put into them."""
    return _without_idle_objects(_concerned(trace, steps, check), check)


def _concerned(trace: Trace, steps: list[Step], check: Step, through: Collection[str] = _THROUGH) -> list[Step]:
    mapped = {str(step.answer): step.on for step in trace.steps if step.call == "mmap" and made(step)}
    needed = references(check)
    while True:
        kept = [step for step in steps if step is check or _concerns(step, needed, mapped, through)]
        grown = needed.union(*(references(step) for step in kept), (str(step.answer) for step in kept if made(step)))
        if grown == needed:
            return kept
        needed = grown


def _holding(trace: Trace, before: list[Step], look: Step) -> list[Step]:
    """What a VM's life may depend on: all that took hold of it and let go again, were it a call that failed halfway.

    Questions do not, but for those that make a descriptor.
    """
    files = {str(step.answer) for step in before if step.call == "mmap" and step.on}
    candidates = [step for step in before if step.call not in _QUESTIONS or made(step)]
    candidates = [step for step in candidates if not _is_mere_look(step, files)]
    everything = [*_without_unused_programs(_with_last_shortage(candidates, look)), look]
    return _concerned(trace, everything, look, (*_THROUGH, "KVM_CREATE_GUEST_MEMFD", "KVM_GET_STATS_FD"))


def _concerns(step: Step, needed: set[str], mapped: Mapping[str, str], through: Collection[str]) -> bool:
    if step.call in BETWEEN_PROCESSES:
        return True
    if made(step):
        return str(step.answer) in needed or (step.call in through and bool(references(step) & needed))
    if step.call in TOUCHES or (not step.on and "address" in step.arguments):
        region = str(step.arguments.get("address", "")).partition("+")[0]
        return region in needed or mapped.get(region, "") in needed - {""}
    # A slot lets a guest reach what it names.
    return step.on in needed or (_is_slot(step) and bool(references(step) & needed))


def _without_idle_objects(steps: list[Step], check: Step) -> list[Step]:
    """Without what was made and never used by anything else that is kept, and with it its end."""
    while True:
        used: set[str] = set()
        for step in steps:
            if step.call not in ("close", "munmap"):
                used |= references(step)
        idle = {str(step.answer) for step in steps if made(step) and step is not check and str(step.answer) not in used}
        idle = {name for name in idle if not (name.startswith("p") and name[1:2].isdigit())}
        idle -= {str(step.answer) for step in steps if "MAP_POPULATE" in str(step.arguments.get("flags", ""))}
        idle -= {name for name in idle if name.startswith("run")}  # the page that KVM_RUN speaks through
        # What pins a file or VM whose own descriptor goes is not idle.
        closed = {step.on for step in steps if step.call == "close"}
        idle -= {str(step.answer) for step in steps if made(step) and references(step) & closed}
        kept = [
            step
            for step in steps
            if step is check
            or not (str(step.answer) in idle or (step.call in ("close", "munmap") and references(step) & idle))
        ]
        kept = _without_idle_vcpus(kept, check)
        if len(kept) == len(steps):
            return kept
        steps = kept


def _without_idle_vcpus(steps: list[Step], check: Step) -> list[Step]:
    """Without vCPUs that never run, and with them their pages."""
    busy = {step.on for step in steps if step.call == "KVM_RUN"} | references(check)
    idle = {str(step.answer) for step in steps if step.call == "KVM_CREATE_VCPU" and step is not check} - busy
    idle |= {str(step.answer) for step in steps if step.call == "mmap" and step.on in idle}
    return [step for step in steps if step is check or (str(step.answer) not in idle and not references(step) & idle)]


def _without_idle_processes(trace: Trace, steps: list[Step], check: Step) -> list[Step]:
    """Without processes that had ended before the check and did nothing that is kept."""
    idle: set[str] = set()
    for process in {step.process for step in trace.steps} - {"p0"}:
        busy = any(step.process == process and step.call not in ("start", "exit") for step in steps)
        ends = [step for step in steps if step.call in ("wait", "kill") and step.arguments.get("of") == process]
        end = min((step.start for step in ends if step.start < check.start), default=None)
        begin = min((step.start for step in trace.steps if step.answer == process), default=0)
        # While it is there it holds copies of all descriptors and mappings: those who let go of theirs may count on it.
        holds = [step for step in steps if step.call in ("close", "munmap") and begin < step.start < (end or 0)]
        alive = end is None or bool(holds)
        if not busy and not alive:
            idle.add(process)
    return [
        step
        for step in steps
        if step.process not in idle and step.answer not in idle and step.arguments.get("of") not in idle
    ]
