"""The C program: the steps that a check depends on, as a maintainer would have written them by hand."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmgmem._native import ffi
from kvmgmem.arch.x86_64 import CR0_LONG, CR4_PAE, EFER_LONG, TSS_IO_MAP, identity_tables, programs
from kvmgmem.trace import c_parts, decode
from kvmgmem.trace.c_calls import Calls, CannotExpressError, pointer
from kvmgmem.trace.c_frame import definitions, head
from kvmgmem.trace.c_text import (
    c_answer,
    c_array,
    c_comment,
    c_flags,
    c_number,
    c_wanted,
    exit_reason,
    includes,
    initialiser,
    label,
    operand,
    run_wanted,
    shown,
    signal_number,
    wrapped,
)
from kvmgmem.trace.expectation import ONE_OF, Check, made
from kvmgmem.trace.loops import rise, stepped, with_loops
from kvmgmem.trace.messages import channels, parent_of
from kvmgmem.trace.prune import LOOK, STATISTIC, guest_addresses
from kvmgmem.trace.races import happens_in, race_of
from kvmgmem.trace.steps import OUTLIVED, Step, Trace, is_errno

MOST = 250
"""So many calls a reader may be shown."""
_EXIT_FIELDS = {
    "MemoryFaultExit": {"flags": "memory_fault.flags", "gpa": "memory_fault.gpa", "size": "memory_fault.size"},
    "MmioExit": {"gpa": "mmio.phys_addr", "length": "mmio.len", "write": "mmio.is_write"},
    "IoExit": {"port": "io.port", "size": "io.size"},
    "HypercallExit": {"number": "hypercall.nr"},
}
MAKERS = ("KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_CREATE_GUEST_MEMFD", "KVM_GET_STATS_FD", "mmap")
_REGISTER_VALUES = {
    f"cr0={CR0_LONG}": "PG | AM | WP | NE | ET | MP | PE",
    f"cr4={CR4_PAE}": "PAE",
    f"efer={EFER_LONG}": "LME | LMA",
}
# Whoever makes the VM writes down where its directory is, and whoever looks there may be another process.
_DIRECTORY = "\tdirectory = must_map(NULL, 64, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);"


def c_program(trace: Trace, check: Check, steps: Sequence[Step]) -> str:
    """The text of the program; raises `CannotExpressError`."""
    return _Program(trace, check, list(steps)).text()


@dataclass
class _Body:
    """The lines of one process."""

    lines: list[str] = field(default_factory=list)
    declarations: dict[str, None] = field(default_factory=dict)

    def declare(self, line: str) -> None:
        self.declarations[line] = None

    def add(self, *lines: str) -> None:
        self.lines += [f"\t{line}" if line else "" for line in lines]


class _Program:
    def __init__(self, trace: Trace, check: Check, steps: list[Step]) -> None:
        self.trace, self.check, self.steps = trace, check, steps
        self.helpers: set[str] = set()
        self.data: dict[str, str] = {}
        self.calls = Calls(self.data)
        self.threads: dict[str, str] = {}
        self.bodies: dict[str, _Body] = {}
        self.statics: dict[str, None] = {}
        self.guest = guest_addresses(steps)
        self.sregs: dict[str, Mapping[str, Any]] = {}
        self.race: list[Step] = []
        self.racers: list[str] = []
        self.ended: set[str] = set()
        """Processes that end by themselves before the check."""
        self.entries: dict[str, int] = {}
        """Guest addresses of the programs that have been put into guest memory."""
        self.short = _short_call(steps, check.step)
        """The call during which memory is short."""
        self.look = check.step.call == LOOK
        """Whether the question is if a VM lives."""
        self.outlives = check.step.id.startswith(OUTLIVED) and not self.short
        """Whether that is asked when the processes that made the calls have ended, beyond what a round's own process is."""
        self.kvm = next((str(step.answer) for step in steps if step.call == "open" and step.on == ""), "kvm0")
        self.channels = {step: f"channel_{_c_name(child)}" for step, child in channels(steps).items()}

    # -- the whole

    def text(self) -> str:
        busy = {step.process for step in self.steps}
        self.several = len(busy) > 1
        if self.several and self.short:
            raise CannotExpressError(f"memory that is short ({self.short.id}) among several processes")
        if self.several:
            self.helpers |= {"turn", "await_turn", "must_map", "must"}
        if self.look and not self.check.step.on:
            directory = self.check.step.arguments["directory"]
            raise CannotExpressError(f"the life of a VM ({directory}) that the trace did not see made")
        for step in self.trace.steps:
            if step.call == "KVM_GET_SREGS":
                self.sregs.setdefault(step.on, step.out)
        self._write_bodies()
        functions = [self._function(process) for process in sorted(self.bodies, key=_depth, reverse=True)]
        code = [*self._helper_texts(), self._statics("\n".join([*self.threads.values(), *self.racers, *functions]))]
        code += [*self.data.values(), *self.threads.values(), *self.racers, *functions]
        everything = "\n\n".join(part for part in code if part)
        above = head(self.trace, self.check, self._what(), self._needs())
        parts = [above, includes(everything), definitions(everything), everything]
        return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)) + "\n"

    def _needs(self) -> list[str]:
        """What it takes to ask the question, beside KVM."""
        if self.short:
            return ["It takes root, debugfs, and a kernel with CONFIG_FAULT_INJECTION_DEBUG_FS."]
        return ["It takes root and debugfs, where a VM has a directory for as long as it lives."] if self.look else []

    def _helper_texts(self) -> list[str]:
        needed: set[str] = set()
        for name in self.helpers:
            self._need(name, needed)
        return [self._shortage(text) for name, (_, text) in c_parts.HELPERS.items() if name in needed]

    def _shortage(self, text: str) -> str:
        """A helper's text for the sort of shortage that there is."""
        if self.short is None:
            return text
        lasting = self.short.shortage == "lasting"
        for name, part in (c_parts.LASTING if lasting else c_parts.MOMENTARY).items():
            text = text.replace(f"%{name}%", part)
        text = text.replace("Who wins is luck;", "What follows from which allocation is the kernel's affair;")
        return text.replace("static int fail_nth;", "static int fail_nth, make_it_fail;") if lasting else text

    def _need(self, name: str, into: set[str]) -> None:
        if name == "cannot_tell" and getattr(self, "several", False):
            name = "cannot_tell_turn"
        if name == "verdict" and self.short:
            name = "verdict_of_round"
        if name not in into:
            into.add(name)
            for other in c_parts.HELPERS[name][0]:
                self._need(other, into)

    def _statics(self, used: str) -> str:
        """Handles and ranges: few enough to be global, and so the same for every process and thread."""
        kinds: dict[str, list[str]] = {"int ": [], "unsigned char *": [], "struct kvm_run *": [], "pid_t ": []}
        for name in self.statics:
            if not re.search(rf"\b{name}\b", used):
                continue
            kind = _kind(name)
            if kind == "run":
                kinds["struct kvm_run *"].append(name)
            elif kind in ("map", "mem", "moved"):
                kinds["unsigned char *"].append(name)
            elif kind == "p":
                kinds["pid_t "].append(name)
            else:
                kinds["int "].append(name)
        lines = []
        for kind, names in kinds.items():
            if names:
                stars = kind.endswith("*")
                base = kind[:-1] if stars else kind
                lines.append(f"static {base}" + ", ".join(f"*{name}" if stars else name for name in names) + ";")
        lines += [f"static int {name}[2]; /* [0] is the parent's end */" for name in dict.fromkeys(self.channels.values())]
        lines += [f"static pthread_t thread_{name};" for name in self.threads]
        return "\n".join(lines)

    def _function(self, process: str) -> str:
        body = self.bodies[process]
        declared = [f"\t{line}" for line in body.declarations] + ([""] if body.declarations else [])
        if process != "p0":
            lines = [f"static void {_c_name(process)}_does(void)", "{", *declared, "\tprctl(PR_SET_PDEATHSIG, SIGKILL);"]
            return "\n".join([*lines, *body.lines, "}"])
        if self.race:
            self.helpers |= {"end_of", "must", *(["must_map"] if self.look else [])}
            start = [_DIRECTORY, ""] if self.look else []
            once = ["static int one_round(void)", "{", *declared, *start, *body.lines, "}"]
            return "\n".join(once) + "\n\n" + c_parts.ROUNDS
        if self.outlives:
            return self._all_calls(declared, body)
        start = [f"\tsignal(SIGALRM, {'stuck' if 'stuck' in self.helpers else 'too_long'});", "\talarm(60);"]
        if self.short:
            self.helpers |= {"shortage", "end_of", "must"}
            start.append("\tprepare_shortage();")
        if self.look:
            self.helpers.add("must_map")
            start.append(_DIRECTORY)
        start += self._several_start()
        if self.short:
            once = ["static int one_round(int nth)", "{", *declared, *start, "", *body.lines, "}"]
            return "\n".join(once) + "\n\n" + c_parts.SHORT_ROUNDS
        return "\n".join(["int main(void)", "{", *declared, *start, "", *body.lines, "}"])

    def _all_calls(self, declared: list[str], body: _Body) -> str:
        """The calls in a process of their own, and main, which looks when that has ended."""
        self.helpers |= {"end_of", "must", "must_map"}
        start = self._several_start()
        calls = [
            "static int all_calls(void)",
            "{",
            *declared,
            *start,
            *([""] if start else []),
            *body.lines,
            "\treturn 0;",
            "}",
        ]
        asked = "\n".join(f"\t{line}" for line in [*self._question(), f"return {self._asked_life()};"])
        return "\n".join(calls) + "\n\n" + c_parts.OUTLIVES.replace("%DIRECTORY%", _DIRECTORY).replace("%ASK%", asked)

    def _several_start(self) -> list[str]:
        """What several processes need before they part."""
        lines = []
        if self.several:
            shared = "PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0"
            lines.append(f"\tturn = must_map(NULL, sizeof(*turn), {shared});")
        for name in dict.fromkeys(self.channels.values()):
            lines.append(f'\tmust(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, {name}), "socketpair");')
        return lines

    # -- the steps

    def _write_bodies(self) -> None:
        """Go through the steps in order, handing the turn from process to process."""
        hangs = self.check.step.answer is None or bool(self.check.step.out.get("expired"))
        self.helpers.add("stuck" if hangs else "too_long")
        current, number = "p0", 0
        told = list(with_loops(self._moments(), self.check.step))
        if len(told) > MOST:
            raise CannotExpressError(f"{len(told)} calls matter, which nobody would read")
        for kind, step, more in told:
            if step.process != current:
                self._body(current).add(f"*turn = {number + 1};")
                number += 1
                current = step.process
                self._body(current).add("", f"await_turn({number});")
            if more and step.call == "store":
                self._body(current).add(*self._stores(step, more))
            elif more:
                self._emit_loop(self._body(current), step, more)
            else:
                self._emit(kind, step)
        self._finish(current)

    def _body(self, process: str) -> _Body:
        return self.bodies.setdefault(process, _Body())

    def _moments(self) -> list[tuple[str, Step]]:
        """Steps in order; one during which others of its process happened counts twice, as its beginning and its end.

        Those that race stand together, at the place of the first of them.
        """
        self.race = race_of(self.steps, self.check.step)
        found: list[tuple[int, str, Step]] = []
        for step in self.steps:
            if step.call == "start" or step in self.race:
                continue
            during = [other for other in self.steps if happens_in(other, step)]
            if step is self.check.step or step.call != "KVM_RUN" or not during:
                found.append((step.start, "do", step))
                continue
            found.append((step.start, "begin", step))
            if 0 <= step.end < self.check.step.start:
                found.append((step.end, "end", step))
        if self.race:
            self.outlives = False
            if self.several or self.short:
                what = "among several processes" if self.several else "while memory is short"
                raise CannotExpressError(f"a race ({self.race[0].id}) {what}")
            found.append((self.race[0].start, "race", self.race[0]))
            if self.check.step in self.race:
                found.append((self.race[-1].start, "judge", self.check.step))
        return [(kind, step) for _, kind, step in sorted(found, key=lambda item: item[0])]

    def _emit_race(self, body: _Body) -> None:
        """Each thread's calls in a function of its own, released together; main goes through it all again and again."""
        by_thread: dict[str, list[Step]] = {}
        for step in self.race:
            by_thread.setdefault(step.thread, []).append(step)
        body.add("", "/* These run into each other, once in a while in the way that matters. */")
        body.add(f"pthread_barrier_init(&barrier, NULL, {len(by_thread)});")
        self.data["barrier"] = "static pthread_barrier_t barrier;"
        for number, steps in enumerate(by_thread.values()):
            lines = _Body()
            for step in steps:
                lines.add(*wrapped(self._racing_call(step)))
            self.racers.append(
                f"static void *racer{number}(void *unused)\n{{\n\t(void)unused;\n\tpthread_barrier_wait(&barrier);\n"
                + "\n".join(lines.lines)
                + "\n\treturn NULL;\n}"
            )
            body.declare(f"pthread_t thread{number};")
            body.add(f"pthread_create(&thread{number}, NULL, racer{number}, NULL);")
        body.add(*(f"pthread_join(thread{number}, NULL);" for number in range(len(by_thread))))

    def _racing_call(self, step: Step) -> str:
        if step is self.check.step:
            if self.check.aspect != "answer" or step.call in ("load", "store"):
                raise CannotExpressError(f"a race for {self.check.aspect} of {step.call} ({step.id})")
            self.helpers.add("answered")
            self.data["raced"] = "static long answer;"
            return f"answer = answered({self.calls.of(step)});"
        if step.call == "close":
            return f"close({step.on});"
        if step.call in ("store", "load", "fill", "first_other", "read_bytes"):
            return self._touch(step)[0]
        if step.call == "KVM_RUN":
            return f"ioctl({step.on}, KVM_RUN, 0);"
        if made(step):
            self.statics[str(step.answer)] = None
            return f"{step.answer} = {self.calls.of(step)};"
        return f"{self.calls.of(step)};"

    def _judge_race(self, body: _Body, step: Step) -> None:
        body.add("", *self._question())
        self.helpers.add("race_verdict")
        seen = 0 if made(step) else step.answer
        got = "answer > 0 ? 0 : answer" if step.call in MAKERS else "answer"
        body.add(*wrapped(f'return race_verdict("{self._what()}", {got}, {c_answer(seen)});'))

    def _emit(self, kind: str, step: Step) -> None:
        body = self._body(step.process)
        if kind == "race":
            self._emit_race(body)
        elif kind == "judge":
            self._judge_race(body, step)
        elif step is self.check.step and self.outlives:
            self.helpers.add("verdict")
        elif step is self.check.step:
            self._emit_check(body, step)
        elif step is self.short:
            self._emit_short(body, step)
        elif kind == "begin":
            self._begin_thread(body, step)
        elif kind == "end":
            body.add(f"pthread_join(thread_{step.on}, NULL);")
        else:
            self._emit_step(body, step)

    def _begin_thread(self, body: _Body, step: Step) -> None:
        page = self._page(step.on)
        if step.on not in self.threads:
            self.threads[step.on] = (
                f"static void *{step.on}_runs(void *unused)\n{{\n\t(void)unused;\n"
                f"\tioctl({step.on}, KVM_RUN, 0);\n\t{page}->immediate_exit = 0;\n\treturn NULL;\n}}"
            )
        body.add(f"pthread_create(&thread_{step.on}, NULL, {step.on}_runs, NULL);")
        body.add("usleep(100000); /* until it is in the guest */")

    def _emit_step(self, body: _Body, step: Step) -> None:  # noqa: PLR0912 - one case a call
        arguments, name = step.arguments, str(step.answer)
        if made(step):
            self.statics[name] = None
        body.add(*self._comment(step))
        if step.call == "open":
            self.helpers.add("must")
            body.add(f'{name} = must(open("{arguments["path"]}", O_RDWR | O_CLOEXEC), "open {arguments["path"]}");')
        elif step.call == "found":
            self._emit_found(body, step)
        elif step.call == "dup":
            self.helpers.add("must")
            body.add(f'{name} = must(dup({step.on}), "dup");')
        elif step.call == "close":
            body.add(f"close({step.on});")
        elif step.call == "mmap" and not step.failed:
            self._emit_mmap(body, step)
        elif step.call in ("store", "load", "fill", "first_other", "read_bytes"):
            body.add(*self._touch(step))
        elif step.call == "write_bytes":
            self._emit_data(body, step)
        elif step.call == "KVM_RUN":
            self._emit_run(body, step)
        elif step.call == "KVM_SET_SREGS":
            self._emit_sregs(body, step)
        elif step.call == "KVM_SET_CPUID2" and arguments.get("entries") == "supported":
            self.helpers.add("set_supported_cpuid")
            body.add(f"set_supported_cpuid({self.kvm}, {step.on});")
        elif step.call == "KVM_SET_MSRS" and len(arguments.get("entries", ())) == 1:
            self.helpers.add("set_msr")
            entry = arguments["entries"][0]
            body.add(f"set_msr({step.on}, {c_number(entry['index'])}, {c_number(entry.get('data', 0))});")
        elif step.call == "kick":
            self.helpers.add("kick")
            vcpu = next((other.on for other in self.trace.steps if str(other.answer) == step.on), "")
            if vcpu in self.threads:
                body.add("signal(SIGUSR1, on_kick);", f"kick(thread_{vcpu}, {step.on});")
        elif step.call == STATISTIC:
            self.helpers.add("must_stand")
            body.add(f'must_stand({step.on}, "{arguments["name"]}", {c_number(step.answer)}); /* a control */')
        elif step.call == "exec":
            raise CannotExpressError(f"a program that was started in a fresh process ({step.id}) and what it did there")
        elif step.call in ("fork", "exit", "wait", "kill", "send", "receive"):
            self._emit_process(body, step)
        else:
            self._emit_call(body, step)

    def _emit_call(self, body: _Body, step: Step) -> None:
        """A call that has to answer as it did, if it did not fail."""
        call, name = self.calls.of(step), str(step.answer)
        if step.failed:
            body.add(*wrapped(f"(void){call.removeprefix('(long)')};" if step.call == "mmap" else f"{call};"))
            return
        self.helpers.add("must")
        target = f"{name} = " if made(step) else ""
        body.add(*wrapped(f'{target}must({call}, "{label(step)}");'))
        if self.look and name == self.check.step.on and made(step):
            self.helpers.add("directory")
            body.add(f"note_directory({name});")

    def _emit_short(self, body: _Body, step: Step) -> None:
        """The call during which memory is short; the round goes on if it then answers as it did."""
        body.add("", *self._comment(step), "/* The call during which an allocation fails. */")
        if step.call in ("load", "store"):
            body.add("arm(nth);", *self._touch(step), "if (!disarm())", "\treturn UNTOUCHED;", "")
            return
        self._emit_armed(body, step)
        right = "answer < 0" if made(step) else f"answer != {c_answer(step.answer)}"
        body.add(f"if ({right})", "\treturn ANOTHER_WAY;")
        if made(step):
            self.statics[str(step.answer)] = None
            body.add(f"{step.answer} = {'(void *)' if step.call == 'mmap' else ''}answer;")
        body.add("")

    def _emit_armed(self, body: _Body, step: Step) -> None:
        self.helpers.add("answered")
        body.declare("long answer;")
        body.declare("int hit;")
        if step.call == "KVM_RUN":
            self._pokes(body, step)
        call = f"ioctl({step.on}, KVM_RUN, 0)" if step.call == "KVM_RUN" else self.calls.of(step)
        body.add("arm(nth);", *wrapped(f"answer = answered({call});"), "hit = disarm();")
        body.add("if (!hit)", "\treturn UNTOUCHED;")

    def _emit_found(self, body: _Body, step: Step) -> None:
        received = any(other.call == "receive" and step.answer in other.arguments["fds"] for other in self.steps)
        if received:
            return
        self.helpers.add("must")
        same, path = step.arguments.get("same_as"), str(step.arguments["path"])
        if same:
            body.add(f'{step.answer} = must(dup({same}), "dup");')
        elif path.startswith("/") and "(deleted)" not in path and "memfd:" not in path:
            body.add(f'{step.answer} = must(open("{path}", O_RDONLY | O_CLOEXEC), "open {path}");')
        else:
            raise CannotExpressError(f"a descriptor of {path}, which the trace did not see made")

    def _emit_mmap(self, body: _Body, step: Step) -> None:
        self.helpers.add("must_map")
        arguments = step.arguments
        if str(step.answer) in self.guest and not step.on:
            body.add("", f"/* Guest memory, at guest address {self.guest[str(step.answer)]:#x}. */")
        address = pointer(arguments["address"]) if "address" in arguments else "NULL"
        body.add(
            *wrapped(
                f"{step.answer} = must_map({address}, {c_number(arguments['length'])}, {c_flags(arguments['prot'])}, "
                f"{c_flags(arguments['flags'])}, {step.on or '-1'}, {c_number(arguments.get('offset', 0))});"
            )
        )

    def _touch(self, step: Step) -> list[str]:
        arguments = step.arguments
        where = pointer(arguments["address"])
        if step.call == "fill":
            return [f"memset({where}, {c_number(arguments['byte'])}, {c_number(arguments['length'])});"]
        bits = 8 * int(arguments.get("width", 8))
        if step.call == "store":
            return [f"*(volatile uint{bits}_t *){operand(where)} = {c_number(arguments['value'])};"]
        if step.call == "load":
            return [f"(void)*(volatile uint{bits}_t *){operand(where)};"]
        self.helpers.add("is_filled")
        return [f"is_filled({where}, {c_number(arguments['length'])}, 0);"]

    def _comment(self, step: Step) -> list[str]:
        """What is behind a call that its arguments do not tell."""
        if step.call == "store" and step.arguments.get("value") == TSS_IO_MAP and step.arguments.get("width") == 2:
            return ["/* A task state segment whose I/O permission bitmap lets the guest's port accesses through. */"]
        if step.call == "KVM_SET_REGS":
            name = next((name for name, start in self.entries.items() if start == step.arguments.get("rip")), "")
            return ["", f"/* The guest runs {name}. */"] if name else [""]
        return []

    def _emit_data(self, body: _Body, step: Step) -> None:
        data = decode.unpack(step.arguments["data"])
        where = pointer(step.arguments["address"])
        tables = self._tables(data)
        if tables is not None:
            self.helpers.add("identity_tables")
            body.add(f"identity_tables({where}, {c_number(tables)});")
            return
        name = next((name for name, code in programs().items() if code == data), "") or f"data{len(self.data)}"
        region, _, offset = str(step.arguments["address"]).partition("+")
        self.entries[name] = self.guest.get(region, 0) + int(offset or "0", 0)
        if name not in self.data:
            self.data[name] = c_array(name, data)
        body.add(f"memcpy({where}, {name}, sizeof({name}));")

    @staticmethod
    def _tables(data: bytes) -> int | None:
        """The guest address of page tables as the harness builds them; None if the data are none."""
        start = (int.from_bytes(data[:8], "little") & ~0xFFF) - 0x1000
        return start if start >= 0 and data == identity_tables(start) else None

    def _page(self, vcpu: str) -> str:
        steps = self.trace.steps
        return next((str(step.answer) for step in steps if step.call == "mmap" and step.on == vcpu and made(step)), "")

    def _pokes(self, body: _Body, step: Step) -> None:
        page = self._page(step.on)
        if step.arguments.get("immediate_exit"):
            body.add(f"{page}->immediate_exit = 1;")
        if "mmio_data" in step.arguments:
            raw = bytes.fromhex(step.arguments["mmio_data"])
            text = "".join(f"\\x{byte:02x}" for byte in raw)
            body.add(f'memcpy({page}->mmio.data, "{text}", 8);')
        if "hypercall_ret" in step.arguments:
            body.add(f"{page}->hypercall.ret = {c_number(step.arguments['hypercall_ret'])};")

    def _emit_run(self, body: _Body, step: Step) -> None:
        self._pokes(body, step)
        reason = exit_reason(step.out.get("exit", {}))
        if not reason:  # made with a bare ioctl, so that nobody looked at the exit
            body.add(f"ioctl({step.on}, KVM_RUN, 0);")
            return
        self.helpers.add("run")
        body.add(f"run({step.on}, {self._page(step.on)}, {c_answer(step.answer)}, {reason});")

    def _emit_loop(self, body: _Body, first: Step, runs: Sequence[Step]) -> None:
        """Runs of one program whose registers differ by a step in one of them."""
        name, start, stride = stepped([first, *runs])
        fields = {**first.arguments, name: name}
        fields.pop("structure")
        body.add(*self._comment(first))
        end = start + (len(runs) // 2 + 1) * stride
        body.add(f"for (uint64_t {name} = {c_number(start)}; {name} < {end:#x}; {name} += {stride:#x}) {{")
        self.helpers.add("must")
        registers = initialiser(ffi.typeof("struct kvm_regs"), fields)
        call = wrapped(f'must(ioctl({first.on}, KVM_SET_REGS, &{registers}), "KVM_SET_REGS");')
        inner = _Body()
        inner.add(*call)
        self._emit_run(inner, runs[0])
        body.add(*inner.lines, "}")

    @staticmethod
    def _stores(first: Step, more: Sequence[Step]) -> list[str]:
        """Stores in a row, in even steps."""
        stride, more_each = rise(first, more[0])
        value = c_number(first.arguments["value"])
        if more_each:
            each = f"at / {c_number(stride)}" if abs(more_each) == 1 else f"{abs(more_each):#x} * (at / {c_number(stride)})"
            value += f" {'+' if more_each > 0 else '-'} {each}"
        bits = 8 * int(first.arguments["width"])
        end = c_number((len(more) + 1) * stride)
        return [
            f"for (uint64_t at = 0; at < {end}; at += {c_number(stride)})",
            f"\t*(volatile uint{bits}_t *)({pointer(first.arguments['address'])} + at) = {value};",
        ]

    def _emit_sregs(self, body: _Body, step: Step) -> None:
        self.helpers.add("must")
        before = self.sregs.get(step.on, {})
        after = step.arguments
        self.sregs[step.on] = after
        body.add("", "/* The processor's mode: as at reset, but for this. */")
        body.add(f'must(ioctl({step.on}, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");')
        body.declare("struct kvm_sregs sregs;")
        groups: dict[str, list[str]] = {}
        names = [name for name, _ in ffi.typeof("struct kvm_sregs").fields]
        for name in names:
            if after.get(name, 0) == before.get(name, 0):
                continue
            kind = dict(ffi.typeof("struct kvm_sregs").fields)[name].type
            groups.setdefault(initialiser(kind, after.get(name, 0)), []).append(name)
        for value, fields in groups.items():
            meaning = _REGISTER_VALUES.get(f"{fields[0]}={after.get(fields[0], 0)}", "")
            line = " = ".join(f"sregs.{name}" for name in fields) + f" = {value};"
            body.add(*wrapped(line + (f" /* {meaning} */" if meaning else "")))
        body.add(f'must(ioctl({step.on}, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");', "")

    def _emit_process(self, body: _Body, step: Step) -> None:
        if step.call == "fork":
            child = str(step.answer)
            if child not in {other.process for other in self.steps}:
                return
            self._body(child)
            self.helpers.add("must")
            name = _c_name(child)
            self.statics[name] = None
            body.add(f'{name} = must(fork(), "fork");', f"if (!{name})", f"\t{name}_does();")
        elif step.call == "exit":
            self.ended.add(step.process)  # after it has given the turn away
        elif step.call in ("wait", "kill"):
            self._emit_end(body, step)
        else:
            self._emit_message(body, step)

    def _emit_end(self, body: _Body, step: Step) -> None:
        """The end of a child, by its parent's hand or awaited by it."""
        name = _c_name(str(step.arguments.get("of", "")))
        if name not in self.statics:
            return
        # How it ended is not in the trace if it neither left by itself nor was killed: it became another program, say.
        if step.call == "kill" or step.arguments["of"] not in self.ended:
            body.add(f"kill({name}, SIGKILL);")
        if step.call == "wait":
            body.add(f"waitpid({name}, NULL, 0);")

    def _emit_message(self, body: _Body, step: Step) -> None:
        """Descriptors that pass between a child and its parent."""
        channel = self.channels.get(step.id)
        if channel is None:
            raise CannotExpressError(f"descriptors that pass between processes in a way not understood ({step.id})")
        end = f"{channel}[{0 if channel != f'channel_{_c_name(step.process)}' else 1}]"
        for fd in step.arguments["fds"]:
            if step.call == "send":
                self.helpers.add("send_fd")
                body.add(f"send_fd({end}, {fd});")
            else:
                self.helpers.add("receive_fd")
                self.statics[str(fd)] = None
                body.add(f"{fd} = receive_fd({end});")

    # -- the check

    def _what(self) -> str:
        step = self.check.step
        if self.look:
            return f"whether {step.on} lives"
        if step.call == STATISTIC:
            return f"the statistic {step.arguments['name']} of {step.on}"
        if self.check.aspect == "exit":
            return "KVM_RUN"
        if step.call == "KVM_GET_REGS":
            return f"{self.check.aspect} of the guest"
        if step.call in ("load", "store", "first_other", "fill"):
            return f"the host's {'store' if step.call in ('store', 'fill') else 'load'}"
        if self.check.aspect == "pages":
            return "allocated pages"
        return label(step)

    def _question(self) -> list[str]:
        check = self.check
        release = self.trace.header.get("circumstances", {}).get("release", "?")
        if check.step.answer is None:
            return c_comment(f"The question: {release} never came back from this.")
        right = "" if check.seen == check.wanted else f"; {shown(check.wanted)} is right"
        return c_comment(f"The question: on {release} this gives {shown(check.seen)}{right}.")

    def _emit_check(self, body: _Body, step: Step) -> None:
        if step is not self.short:
            self.helpers.add("verdict")
        body.add("", *self._question())
        if "stuck" in self.helpers:
            body.add("asked = 1;")
        what = self._what().replace('"', "")
        check = self.check
        self._must_be_plain()
        if step is self.short:
            self._check_short(body, step, what)
        elif check.aspect == "exit":
            self._check_exit(body, step)
        elif check.aspect == "left":
            self._check_prefault(body, step)
        elif self.look:
            body.add(*self._return(self._asked_life(), step))
        elif step.call == STATISTIC:
            self.helpers.add("statistic")
            body.add(*self._return(f'verdict("{what}", {self.calls.of(step)}, {c_wanted(check.wanted)})', step))
        elif step.call == "KVM_GET_REGS":
            self.helpers.add("must")
            body.declare("struct kvm_regs regs;")
            body.add(f'must(ioctl({step.on}, KVM_GET_REGS, &regs), "KVM_GET_REGS");')
            body.add(
                *self._return(
                    f'verdict("{what}", regs.{check.aspect}, {c_wanted(check.wanted, f"regs.{check.aspect}")})', step
                )
            )
        elif check.aspect == "pages":
            self.helpers.add("must")
            span = f"{{ {c_number(step.arguments['offset'])}, {c_number(step.arguments['length'])} }}"
            body.declare(f"uint64_t range[2] = {span}, found[5];")
            body.add(f'must(syscall(SYS_cachestat, {step.on}, range, found, 0), "cachestat");')
            body.add(*self._return(f'verdict("{what}", found[0], {c_wanted(check.wanted, "found[0]")})', step))
        elif check.aspect == "filled":
            self.helpers.add("is_filled")
            call = f"is_filled({pointer(step.arguments['address'])}, {c_number(step.arguments['length'])}, "
            call += f"{c_number(step.arguments.get('byte', 0))})"
            body.add(
                *self._return(
                    f'verdict("memory is {c_number(step.arguments.get("byte", 0))}", {call}, {int(check.wanted)})', step
                )
            )
        elif step.call in ("load", "store"):
            self._check_touch(body, step)
        else:
            self.helpers.add("answered")
            wanted = c_wanted(check.wanted)
            # What makes something answers with its number, which is nobody's business.
            got = "answer > 0 ? 0 : answer" if step.call in MAKERS else "answer"
            body.add(*wrapped(f"answer = answered({self.calls.of(step)});"))
            body.declare("long answer;")
            body.add(*self._return(f'verdict("{what}", {got}, {wanted})', step))

    def _asked_life(self) -> str:
        self.helpers.add("directory")
        return f'verdict("{self._what()}", lives({int(self.check.wanted)}), {int(self.check.wanted)})'

    def _must_be_plain(self) -> None:
        """Raise `CannotExpressError` where several answers would be right, unless they are numbers and errnos."""
        wanted, step = self.check.wanted, self.check.step
        if not (isinstance(wanted, Mapping) and ONE_OF in wanted):
            return
        plain = all(isinstance(each, int) or is_errno(each) for each in wanted[ONE_OF])
        if not plain or self.check.aspect in ("exit", "filled", "left") or step.call in ("load", "store"):
            raise CannotExpressError(f"that any of {shown(wanted)} is right ({step.id})")

    def _check_short(self, body: _Body, step: Step, what: str) -> None:
        """Of the answer itself only the one that nobody should get says something: which allocation failed is luck."""
        if self.check.aspect not in ("answer", "exit") or step.call in ("load", "store"):
            raise CannotExpressError(
                f"memory that is short while {self.check.aspect} of {step.call} is looked at ({step.id})"
            )
        self.helpers.add("race_verdict")
        self._emit_armed(body, step)
        got = "answer > 0 ? 0 : answer" if step.call in MAKERS else "answer"
        seen = 0 if made(step) else step.answer
        body.add(*wrapped(f'return race_verdict("{what}", {got}, {c_answer(seen)});'))

    def _check_touch(self, body: _Body, step: Step) -> None:
        wanted = self.check.wanted
        where = pointer(step.arguments["address"])
        if isinstance(wanted, dict):
            number = f"-{signal_number(wanted)}"
        elif isinstance(wanted, str) and wanted.startswith("SIG"):
            number = f"-{wanted.split()[0]}"
        else:
            number = "0"
        if step.call == "store":
            self.helpers.add("touch_store")
            body.add(
                *self._return(
                    f'verdict("{self._what()}", try_store({where}, {c_number(step.arguments["value"])}), {number})', step
                )
            )
            return
        self.helpers.add("touch")
        body.declare("uint64_t value = 0;")
        body.declare("long signalled;")
        body.add(f"signalled = try_load({where}, {step.arguments['width']}, &value);")
        if number == "0":
            body.add(
                "if (signalled)", *(f"\t{line}" for line in self._return(f'verdict("{self._what()}", signalled, 0)', step))
            )
            body.add(*self._return(f'verdict("{self._what()}", value, {c_number(int(wanted))})', step))
        else:
            body.add(*self._return(f'verdict("{self._what()} (minus a signal)", signalled, {number})', step))

    def _check_prefault(self, body: _Body, step: Step) -> None:
        """The answer of a prefault, and what it wrote back: where it stopped."""
        self.helpers.add("answered")
        body.declare("struct kvm_pre_fault_memory range;")
        body.declare("long answer;")
        body.declare("int wrong = 0;")
        fields = {name: value for name, value in step.arguments.items() if name != "structure"}
        body.add(*wrapped(f"range = {initialiser(ffi.typeof('struct kvm_pre_fault_memory'), fields)};"))
        body.add(f"answer = answered(ioctl({step.on}, KVM_PRE_FAULT_MEMORY, &range));")
        wanted = self.check.wanted
        body.add(f'wrong |= verdict("KVM_PRE_FAULT_MEMORY", answer, {c_answer(wanted["answer"])});')
        for name in ("gpa", "size"):
            body.add(f'wrong |= verdict("{name} left", range.{name}, {c_number(wanted[name])});')
        body.add(*self._return("wrong", step))

    def _check_exit(self, body: _Body, step: Step) -> None:
        """A run that must come out with this answer and this exit; each part of it that can be wrong has a line."""
        self.helpers.add("answered")
        self._pokes(body, step)
        page = self._page(step.on)
        answer, wanted = run_wanted(self.check.wanted)
        body.declare("long answer;")
        body.declare("int wrong = 0;")
        body.add(f"answer = answered(ioctl({step.on}, KVM_RUN, 0));")
        if answer is not None:
            body.add(f'wrong |= verdict("the answer of KVM_RUN", answer, {c_answer(answer)});')
        reason = exit_reason(wanted) if wanted else ""
        if reason:
            body.add(f'wrong |= verdict("the exit", {page}->exit_reason, {reason});')
        for name, place in _EXIT_FIELDS.get(str(wanted.get("is", "")), {}).items():
            if name in wanted:
                value = f"{page}->{place}"
                body.add("if (!wrong)", f'\twrong |= verdict("{place}", {value}, {c_number(int(wanted[name]))});')
        body.add(*self._return("wrong", step))

    def _return(self, verdict: str, step: Step) -> list[str]:
        """Hand the verdict on: out of main, or as the exit status of a child, which its parents pass on."""
        if step.process == "p0":
            return wrapped(f"return {verdict};")
        return wrapped(f"exit({verdict});")

    def _finish(self, current: str) -> None:
        """What the other processes do once the check has been made by its own."""
        decides = self.check.step.process
        for process, body in self.bodies.items():
            if process == decides:
                continue
            nearer = next((name for name in self.bodies if _is_below(decides, name) and parent_of(name) == process), None)
            if nearer is not None:
                self.helpers.add("end_of")
                exit_line = f"end_of({_c_name(nearer)})"
                body.add(f"return {exit_line};" if process == "p0" else f"exit({exit_line});")
            elif process in self.ended:
                body.add("exit(0);")
            else:
                body.add("for (;;)", "\tpause();")


def _short_call(steps: Sequence[Step], check: Step) -> Step | None:
    """The call to be made while memory is short: the check's own, or the last that failed for it, or that did without."""
    if check.injected:
        return check
    short = [step for step in steps if step.injected]
    return next(reversed([step for step in short if step.failed] or short), None)


def _depth(process: str) -> tuple[int, str]:
    return (0 if process == "p0" else 1 + process.count("."), process)


def _c_name(process: str) -> str:
    return process.replace(".", "_")


def _is_below(process: str, ancestor: str) -> bool:
    return process == ancestor or process.startswith(f"{ancestor}.")


def _kind(name: str) -> str:
    return name.partition("_")[0].rstrip("0123456789")
