"""What counts as a complaint of the kernel in its log: deny patterns, a narrow allow-list with reasons, one reader.

Used by the pytest plugin on /dev/kmsg and by the supervisor on a serial console, hence light to import. Patterns match
a message from its start, without priority, time stamp and caller.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What sort of complaint it is; the value is how a verdict's reason names it."""

    PANIC = "kernel panic"
    OOPS = "kernel oops"
    KASAN = "KASAN report"
    UBSAN = "UBSAN report"
    LOCKDEP = "lockdep report"
    LOCKUP = "lockup"
    RCU_STALL = "RCU stall"
    HUNG_TASK = "hung task"
    LEAK = "kmemleak report"
    BUG = "kernel bug report"
    WARNING = "kernel warning"


@dataclass(frozen=True)
class Pattern:
    """One kind of complaint and how its first line reads."""

    kind: Kind
    regex: str


@dataclass(frozen=True)
class Allowed:
    """A line that a deny pattern would catch, and why it is no complaint about the kernel under test."""

    regex: str
    reason: str


# In order: the first that matches names the kind. Wordings as of Linux 7.3, older ones (to 6.8) where they differ.
DENY = (
    Pattern(Kind.PANIC, r"Kernel panic - not syncing"),
    Pattern(Kind.KASAN, r"BUG: (KASAN|KFENCE|KMSAN|KCSAN): "),
    # show_fault_oops (arch/x86/mm/fault.c) and its arm64 sibling; die() ends each of its headings with [#count].
    Pattern(Kind.OOPS, r"BUG: (unable to handle|kernel NULL pointer dereference)"),
    Pattern(Kind.OOPS, r"Unable to handle kernel "),
    Pattern(Kind.OOPS, r"kernel BUG at "),
    Pattern(Kind.OOPS, r"Oops\b.*:"),
    Pattern(Kind.OOPS, r"\S.*: [0-9a-f]{4,16} \[#\d+\]"),
    Pattern(Kind.OOPS, r"BUG: (TASK|IRQ|NMI) stack guard page was hit"),
    Pattern(Kind.UBSAN, r"UBSAN: "),
    Pattern(Kind.LOCKUP, r"(NMI )?watchdog: .*(soft lockup|hard LOCKUP)"),
    Pattern(Kind.LOCKUP, r"(CPU\d+: )?Watchdog detected hard LOCKUP"),
    Pattern(Kind.LOCKUP, r"BUG: (soft|workqueue) lockup"),
    Pattern(Kind.RCU_STALL, r"(rcu: )?INFO: \S+ (self-)?detected (expedited )?stalls? on CPU"),
    Pattern(Kind.RCU_STALL, r"(rcu: )?\S+ kthread (timer wakeup didn't happen|starved) for \d+ jiffies"),
    Pattern(Kind.HUNG_TASK, r"INFO: task .* blocked.* for more than \d+ seconds"),
    Pattern(Kind.LOCKDEP, r"WARNING: (possible (circular|recursive|irq lock)|inconsistent lock state|suspicious RCU)"),
    Pattern(Kind.LOCKDEP, r"WARNING: (bad (unlock balance|contention)|held lock freed|lock held when returning)"),
    Pattern(Kind.LOCKDEP, r"WARNING: (Nested lock was not taken|chain_key collision|\S+ still has locks held)"),
    Pattern(Kind.LOCKDEP, r"WARNING: \S+-safe -> \S+-unsafe lock order detected"),
    Pattern(Kind.LOCKDEP, r"(INFO: trying to register non-static key|\[ BUG: Invalid wait context \])"),
    Pattern(Kind.LEAK, r"kmemleak: \d+ new suspected memory leaks"),
    Pattern(Kind.BUG, r"BUG: "),
    Pattern(Kind.BUG, r"BUG [\w-]+ \(.*\): "),  # SLUB: corrupted object or red zone
    Pattern(Kind.BUG, r"(list_add|list_del) corruption"),
    Pattern(Kind.WARNING, r"WARNING: "),
)

ALLOW: tuple[Allowed, ...] = ()
"""Empty so far: no kernel that was booted under this harness complained about something that is not its fault."""

FATAL = frozenset({Kind.PANIC, Kind.OOPS})
"""After these the kernel must not be trusted with another test, even if it goes on."""


@dataclass(frozen=True)
class Splat:
    """One complaint: its kind, its first line, the block of log it came with, and a fingerprint of its cause."""

    kind: Kind
    title: str
    lines: tuple[str, ...]
    fingerprint: str

    @property
    def fatal(self) -> bool:
        return self.kind in FATAL

    @property
    def reason(self) -> str:
        """One line for a verdict."""
        return f"{self.kind}: {self.title} [{self.fingerprint}]"


_TIME = re.compile(r"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ?")
_PRIORITY = re.compile(r"^(?:<\d+>|\d+,\d+,-?\d+,[^;]*;)")
_COMPILED = tuple((pattern.kind, re.compile(pattern.regex)) for pattern in DENY)
_ANY = re.compile("|".join(f"(?:{pattern.regex})" for pattern in DENY))
_ALLOWED = re.compile("|".join(f"(?:{allowed.regex})" for allowed in ALLOW) or r"(?!)")

_CUT_HERE = re.compile(r"-+\[ cut here \]-+|={20,}")
_END = re.compile(r"---\[ end ")
MAX_BLOCK_LINES = 120
"""A block without an end mark is cut here: lockdep prints its locks at length, and a task dump has no end."""


def message_of(line: str) -> str:
    """Return a log line without what printk, klogd or /dev/kmsg put before the message.

    A time stamp in the middle counts: on a serial console a panic may begin behind half a line of somebody else's.
    """
    text = _PRIORITY.sub("", line.rstrip("\r\n"), count=1)
    stamps = [stamp.end() for stamp in _TIME.finditer(text)]
    return text[stamps[-1] :] if stamps else text


def kind_of(line: str) -> Kind | None:
    """Say which complaint begins with this line; None if none does, or if the allow-list knows better."""
    message = message_of(line)
    if not _ANY.match(message) or _ALLOWED.match(message):
        return None
    return next(kind for kind, regex in _COMPILED if regex.match(message))


def find_splats(lines: Iterable[str]) -> list[Splat]:
    """Find the complaints in a piece of log, in order.

    A complaint that begins inside the block of another one of the same event (the "Oops:" after "BUG: unable to
    handle", the panic that an oops ends in) makes one splat with it, of the graver kind.
    """
    log = [line.rstrip("\r\n") for line in lines]
    found: list[Splat] = []
    position = 0
    while position < len(log):
        kind = kind_of(log[position])
        if kind is None:
            position += 1
            continue
        end = _block_end(log, position)
        found.append(_splat(kind, log, position, end))
        position = end
    return found


def _block_end(log: Sequence[str], start: int) -> int:
    """The line after a block: behind its end mark, before the next "cut here", or where it gets too long.

    An oops goes on into the panic it causes, which follows its end mark at once.
    """
    limit = min(len(log), start + MAX_BLOCK_LINES)
    for index in range(start + 1, limit):
        message = message_of(log[index])
        if _END.match(message):
            following = index + 1
            if following < limit and kind_of(log[following]) is Kind.PANIC:
                return _block_end(log, following)
            return following
        if message.startswith("------------[ cut here"):
            return index
    return limit


def _splat(kind: Kind, log: Sequence[str], start: int, end: int) -> Splat:
    block = log[start:end]
    kinds = [kind, *(later for line in block[1:] if (later := kind_of(line)) is not None)]
    first = start - 1 if start > 0 and _CUT_HERE.match(message_of(log[start - 1])) else start
    gravest = Kind.PANIC if Kind.PANIC in kinds else kind
    return Splat(gravest, _title(block), tuple(log[first:end]), stack_fingerprint(block))


def _title(block: Sequence[str]) -> str:
    """The first line; of a panic behind an oops, the oops, because it names the cause."""
    return message_of(block[0])


def block_is_complete(splat: Splat) -> bool:
    """Whether a complaint has come to its end mark; some kinds have none, and are complete when the log goes quiet."""
    return _END.match(message_of(splat.lines[-1])) is not None


# Frames that every report shares: how the kernel came to print, and how it was entered.
_PLUMBING = re.compile(
    r"(dump_stack|show_stack|show_regs|show_trace|print_|kasan_|__asan_|__kasan_|panic$|vpanic$|nmi_panic|__warn|warn_|"
    r"report_bug|handle_bug|exc_|asm_exc_|asm_sysvec_|sysvec_|page_fault_oops|__die|die|do_trap|no_context|"
    r"bad_area|kernelmode_fixup|do_user_addr_fault|do_kern_addr_fault|__bad_area|oops_|crash_kexec|"
    r"default_do_nmi|unknown_nmi_error|end_repeat_nmi|asm_nmi|"
    r"entry_SYSCALL|do_syscall|x64_sys_call|ret_from_fork|lockdep_rcu_suspicious|check_noncircular|"
    r"watchdog_|hrtimer_|__hrtimer|__sysvec|local_apic|irq_exit|__irq_exit)"
)
# "func+0x12/0x34", maybe behind "? " (a guess of the unwinder, left out) and before " [module]".
_FRAME = re.compile(r"^\s*(?P<guess>\? )?(?P<name>[A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x[0-9a-f]+")
_RIP = re.compile(r"^(?:RIP: 0010:|pc : )(?P<name>[A-Za-z_][\w.]*)\+0x")
_WARNED_AT = re.compile(r"^WARNING: .*? at (?:\S+:\d+ )?(?P<name>[A-Za-z_][\w.]*)\+0x")
_TRACE = re.compile(r"^\s*(Call Trace:|Call trace:|Backtrace:)")
_CLONE_SUFFIX = re.compile(r"\.(isra|constprop|part|cold|llvm)\b.*$")
FINGERPRINT_FRAMES = 8


def stack_functions(block: Iterable[str]) -> tuple[str, ...]:
    """Name the functions of a block's first call trace, innermost first, without offsets and common plumbing."""
    names: list[str] = []
    in_trace = False
    for line in block:
        message = message_of(line)
        if (match := _RIP.match(message) or _WARNED_AT.match(message)) and not in_trace and not names:
            names.append(_plain(match["name"]))
        elif _TRACE.match(message):
            if in_trace:
                break
            in_trace = True
        elif in_trace and (match := _FRAME.match(message)) and not match["guess"]:
            name = _plain(match["name"])
            if not _PLUMBING.match(name) and (not names or names[-1] != name):
                names.append(name)
    return tuple(names)


def stack_fingerprint(block: Sequence[str]) -> str:
    """Eight hex digits that are the same for reports of one cause: of the stack, or without one of the first line.

    Numbers in the first line are left out, as they hold addresses, PIDs and times.
    """
    functions = stack_functions(block)[:FINGERPRINT_FRAMES]
    text = "\n".join(functions) if functions else re.sub(r"0x[0-9a-f]+|\d+", "#", message_of(block[0]) if block else "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _plain(name: str) -> str:
    return _CLONE_SUFFIX.sub("", name)
