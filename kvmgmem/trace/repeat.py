"""Making the calls of a trace again, in as many processes as made them, one after the other in the recorded order.

A recorder watches the replay, so that old and new answers are told in the same words and can be compared as they are.
"""

import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvmgmem import entry, host
from kvmgmem._native import ffi, lib
from kvmgmem.entry import address_of
from kvmgmem.errors import Errno, HarnessError, KvmError
from kvmgmem.fail_nth import MemoryShortage, Shortage
from kvmgmem.fd import OwnedFd
from kvmgmem.memory import Mapping as HostMapping
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing.stats import read_stat
from kvmgmem.trace import decode, messages
from kvmgmem.trace.recorder import recording
from kvmgmem.trace.steps import Step, Trace

RUN_SECONDS: Final = 20
LOOK_SECONDS: Final = 2.0
"""How long a VM may take to be gone."""
_LOW: Final = 4 << 20
# Facts of a kernel, not answers to what the trace did: they may differ.
_FACTS: Final = ("KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_SUPPORTED_CPUID", "KVM_GET_MSRS")
_NOTHING: Final = ("start", "exec")
_MESSAGE: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Difference:
    """A step, and the same step with the answer of this kernel."""

    step: Step
    answered: Step


@dataclass
class Outcome:
    """What came of a replay."""

    repeated: int = 0
    differing: int = 0
    first: Difference | None = None
    notes: list[str] = field(default_factory=list)


class _UnrepeatableError(Exception):
    """A step that cannot be made again; its text says why."""


def repeat(trace: Trace) -> Outcome:
    """Make the calls of a trace in this process and in children of it."""
    answers: list[dict[str, Any]] = []
    with recording(answers.append, {}):
        director = _Director(trace, answers)
        try:
            return director.play()
        finally:
            director.close()


class _Director:
    """Has each process make its calls when their turn comes, and compares."""

    def __init__(self, trace: Trace, answers: list[dict[str, Any]]) -> None:
        self.trace = trace
        self.outcome = Outcome()
        names = sorted({step.process for step in trace.steps} - {"p0"})
        self.lines = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in names}
        self.channels = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in names}
        self.actor = _Actor(trace, answers, {name: pair[1] for name, pair in self.lines.items()}, self.channels)
        self.lost: set[str] = set()

    def play(self) -> Outcome:
        moments = [(step.start, "begin", step) for step in self.trace.steps]
        moments += [(step.end, "end", step) for step in self.trace.steps if step.end >= 0 and step.overlapped]
        for _, kind, step in sorted(moments, key=lambda moment: moment[0]):
            if kind == "begin" and step.overlapped and step.call not in ("fork", "wait"):
                if step.end >= 0 or step.call == "KVM_RUN":
                    self._ask(step, "begin")
            elif kind == "begin":
                self._compare(step, self._ask(step, "do"))
            elif step.call not in ("fork", "wait"):
                self._compare(step, self._ask(step, "end"))
        return self.outcome

    def _ask(self, step: Step, how: str) -> Any:
        if step.process == "p0":
            return self.actor.perform(step, how)
        if step.process in self.lost:
            return f"process {step.process} is gone"
        line = self.lines[step.process][0]
        line.settimeout(RUN_SECONDS + 10)
        try:
            line.send(pickle.dumps((step, how)))
            if step.call == "exit":
                return step.answer, {}
            return pickle.loads(line.recv(_MESSAGE))
        except (OSError, EOFError):
            self.lost.add(step.process)
            return f"process {step.process} did not answer"

    def _compare(self, step: Step, told: Any) -> None:
        if isinstance(told, str):
            if told:
                self.outcome.notes.append(f"{step.id} {step.call} was left out: {told}")
            return
        answer, out = told
        self.outcome.repeated += 1
        answered = replace(step, answer=answer, out=out)
        if step.call in _FACTS or step.answer is None or _alike(step, answered):
            return
        self.outcome.differing += 1
        if self.outcome.first is None:
            self.outcome.first = Difference(step, answered)

    def close(self) -> None:
        for pair in [*self.lines.values(), *self.channels.values()]:
            for end in pair:
                end.close()
        self.actor.close()


def _short_of_memory(method: Callable[[Step], object], step: Step) -> object:
    """Make a call while the allocation fails that failed when it was recorded."""
    try:
        with MemoryShortage(Shortage(step.shortage)) as memory:
            return memory.call(step.fail_nth, lambda: method(step)).answer
    except (HarnessError, ValueError) as error:
        raise _UnrepeatableError(str(error)) from error


def _alike(step: Step, answered: Step) -> bool:
    """Whether two answers say the same; what was made counts as made, whatever it is called."""
    if _made_kind(step.answer) or _made_kind(answered.answer):
        return _made_kind(step.answer) == _made_kind(answered.answer)
    return step.answer == answered.answer and dict(step.out) == dict(answered.out)


def _made_kind(answer: Any) -> str:
    match = re.fullmatch(r"([a-z]+)\d+(_\w+)?", answer) if isinstance(answer, str) else None
    return match.group(1) if match else ""


class _Held:
    """A VM or a vCPU of the replay, as far as its statistics are concerned."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def stats_fd(self) -> OwnedFd:
        answer = entry.ioctl(self._fd, lib.KVM_GET_STATS_FD)
        if isinstance(answer, Errno):
            raise KvmError("KVM_GET_STATS_FD", "", answer)
        return OwnedFd(answer)


class _Actor:
    """One process of the replay: what its handles and ranges are here, and how each call is made."""

    def __init__(
        self,
        trace: Trace,
        answers: list[dict[str, Any]],
        ears: Mapping[str, socket.socket],
        channels: Mapping[str, tuple[socket.socket, socket.socket]],
    ) -> None:
        self.answers = answers
        self.ears, self.channels = ears, channels
        self.fds: dict[str, int] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.children: dict[str, int] = {}
        self.runners: dict[str, Any] = {}
        mapped = [step for step in trace.steps if step.call == "mmap" and step.on.startswith("vcpu")]
        self.pages = {step.on: str(step.answer) for step in mapped}
        self.vcpus = {page: vcpu for vcpu, page in self.pages.items()}
        self.runs_guests = any(step.call == "KVM_RUN" for step in trace.steps)
        self.workers: dict[str, tuple[threading.Thread, list[Any]]] = {}
        self.kept: list[Any] = []
        self.directories: dict[str, str] = {}
        """The debugfs directories of the VMs that this process has made."""
        self.passing = messages.channels(trace.steps)
        self.leaving = {step.process for step in trace.steps if step.call == "exit"}
        self.receives = [step for step in trace.steps if step.call == "receive"]

    def perform(self, step: Step, how: str) -> Any:
        """Make a call, begin it in a thread, or wait for one begun: (answer, out), or why it could not be made."""
        try:
            if how == "begin":
                return self._begin(step)
            if how == "end":
                thread, box = self.workers.pop(step.id, (None, ["it was not begun"]))
                if thread is not None:
                    thread.join(RUN_SECONDS + 5)
                return box[0] if box else "it never came back"
            return self._make(step)
        except (_UnrepeatableError, OSError) as error:
            return str(error)

    def _begin(self, step: Step) -> str:
        box: list[Any] = []

        def work() -> None:
            try:
                box.append(self._make(step))
            except _UnrepeatableError as error:
                box.append(str(error))

        thread = threading.Thread(target=work, daemon=True)
        self.workers[step.id] = (thread, box)
        thread.start()
        threading.Event().wait(0.02)  # until it is where the recorded one was when the next call was made
        return ""

    def _make(self, step: Step) -> Any:
        if step.call in _NOTHING:
            return "it has no counterpart here" if step.call == "exec" else ""
        method: Callable[[Step], object] | None = getattr(self, f"_do_{step.call}", None)
        if method is None:
            method = self._do_ioctl if step.call.startswith(("KVM_", "ioctl ")) else self._do_other
        before = len(self.answers)
        direct = _short_of_memory(method, step) if step.injected else method(step)
        if isinstance(direct, tuple):
            return direct
        mine = threading.get_native_id()
        calls = {line["id"]: line for line in self.answers[before:] if line["trace"] == "call" and line["tid"] == mine}
        found = [line for line in self.answers[before:] if line["trace"] == "answer" and line["id"] in calls]
        if not found:
            raise _UnrepeatableError("nothing answered")
        last = found[-1]
        self._register(step, last["answer"])
        if "debugfs" in last.get("out", {}):
            self.directories[str(step.answer)] = last["out"]["debugfs"]
        return last["answer"], last.get("out", {})

    def _register(self, step: Step, answer: Any) -> None:
        """Remember under the recorded name what was made here under its own."""
        watcher: Any = entry.watcher
        kind = _made_kind(step.answer)
        if not kind or not _made_kind(answer):
            return
        for fd, (name, _) in watcher._tables.handles.items():
            if name == answer:
                self.fds[str(step.answer)] = fd
        for region in watcher._tables.regions:
            if region.name == answer:
                self.ranges[str(step.answer)] = (region.address, region.length)

    # -- names

    def _fd(self, name: Any) -> int:
        if isinstance(name, int):
            return name
        if name in self.fds:
            return self.fds[name]
        if re.fullmatch(r"-?\d+", name):
            return int(name)
        raise _UnrepeatableError(f"{name} was not made here")

    def _address(self, value: Any) -> int:
        if isinstance(value, int):
            return value
        region, _, offset = str(value).partition("+")
        if region not in self.ranges:
            raise _UnrepeatableError(f"{region} was not mapped here")
        return self.ranges[region][0] + int(offset or "0", 0)

    # -- calls, by their names in the trace

    def _do_open(self, step: Step) -> None:
        fd = os.open(step.arguments["path"], os.O_RDWR | os.O_CLOEXEC)
        self.fds[str(step.answer)] = fd
        if entry.watcher is not None:
            entry.watcher.opened(step.arguments["path"], fd)

    def _do_found(self, step: Step) -> Any:
        name = str(step.answer)
        # A trace names what came with a message before it says that the message came.
        receive = next((other for other in self.receives if name in other.arguments["fds"]), None)
        if receive is not None:
            self._do_receive(receive)
            return (step.answer, {})
        same, path = step.arguments.get("same_as"), str(step.arguments["path"])
        if same is not None and same in self.fds:
            self.fds[name] = os.dup(self.fds[same])
        elif path.startswith("/") and os.path.exists(path):  # noqa: PTH110
            self.fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            raise _UnrepeatableError(f"a descriptor of {path}, which the trace did not see made")
        return (step.answer, {})

    def _do_lives(self, step: Step) -> Any:
        """A look at the VM's directory; one that was gone may take a moment here, too."""
        if step.on not in self.directories:
            raise _UnrepeatableError("another process made the VM")
        directory = host.DEBUGFS / "kvm" / self.directories[step.on]
        deadline = time.monotonic() + LOOK_SECONDS
        while directory.is_dir() and not step.answer and time.monotonic() < deadline:
            time.sleep(0.01)
        return int(directory.is_dir()), {}

    def _do_statistic(self, step: Step) -> Any:
        try:
            return read_stat(_Held(self._fd(step.on)), str(step.arguments["name"])), {}
        except (KvmError, KeyError) as error:
            raise _UnrepeatableError(f"there is no such statistic here: {error}") from error

    def _do_dup(self, step: Step) -> None:
        fd = self._fd(step.on)
        copy = os.dup(fd)
        if entry.watcher is not None:
            entry.watcher.duplicated(fd, copy)

    def _do_close(self, step: Step) -> None:
        fd = self._fd(step.on)
        self.fds.pop(step.on, None)
        if entry.watcher is not None:
            entry.watcher.closing(fd)
        os.close(fd)

    def _do_ioctl(self, step: Step) -> None:
        if not hasattr(lib, step.call) or "words" in step.arguments:
            raise _UnrepeatableError("its argument is not known by fields")
        request = getattr(lib, step.call)
        structure = step.arguments.get("structure")
        if structure is None:
            argument = step.arguments.get("argument", 0)
            number = self._address(argument) if isinstance(argument, str) and "+" in argument else decode.number(argument)
            entry.ioctl(self._fd(step.on), request, number)
            return
        entry.ioctl_struct(self._fd(step.on), request, self._structure(step, structure))

    def _structure(self, step: Step, structure: str) -> Any:
        values = {name: value for name, value in step.arguments.items() if name != "structure"}
        if structure == "kvm_cpuid2":
            return self._cpuid(values)
        if structure == "kvm_msrs":
            entries = values.get("entries", [])
            pointer = ffi.new("struct kvm_msrs *", {"nmsrs": len(entries), "entries": len(entries)})
            for index, fields in enumerate(entries):
                decode.assign(pointer.entries[index], fields)
            return pointer
        pointer = ffi.new(f"struct {structure} *")
        if structure in ("kvm_dirty_log", "kvm_clear_dirty_log"):
            packed = decode.unpack(values.pop("bitmap", step.out.get("bitmap", "hex:")))
            bitmap = ffi.new("uint8_t[]", packed.ljust(max(len(packed), 1 << 16), b"\0"))
            self.kept.append(bitmap)
            values["dirty_bitmap"] = address_of(bitmap)
        if structure.startswith("kvm_userspace_memory_region"):
            if "userspace_addr" in values:
                values["userspace_addr"] = self._address(values["userspace_addr"])
            if "guest_memfd" in values:
                values["guest_memfd"] = self._fd(values["guest_memfd"]) & 0xFFFF_FFFF
                self._keep_low_memory_out(values)
        decode.assign(pointer[0], values)
        return pointer

    def _keep_low_memory_out(self, values: dict[str, Any]) -> None:
        """With shadow paging KVM may map what lies at userspace_addr (bug B24), and low addresses are this interpreter's."""
        if self.runs_guests and values.get("userspace_addr", 0) < _LOW and values.get("memory_size", 0) > _LOW:
            reserved = HostMapping.anonymous(values["memory_size"], prot=0)
            self.kept.append(reserved)
            values["userspace_addr"] = reserved.address

    @staticmethod
    def _cpuid(values: Mapping[str, Any]) -> Any:
        entries = values.get("entries", [])
        if entries == "supported":
            from kvmgmem.arch.x86_64 import _supported_cpuid

            return _supported_cpuid()
        pointer = ffi.new("struct kvm_cpuid2 *", {"nent": values.get("nent", 0), "entries": values.get("nent", 0)})
        for index, fields in enumerate(entries):
            decode.assign(pointer.entries[index], fields)
        return pointer

    def _do_KVM_RUN(self, step: Step) -> None:  # noqa: N802 - the call's own name
        page = self.pages.get(step.on, "")
        run = ffi.cast("struct kvm_run *", self._address(page))
        runner = self.runners.setdefault(step.on, ffi.new("struct kvmgmem_runner *"))
        if step.arguments.get("immediate_exit"):
            run.immediate_exit = 1
        if "mmio_data" in step.arguments:
            run.mmio.data = bytes.fromhex(step.arguments["mmio_data"])
        if "hypercall_ret" in step.arguments:
            run.hypercall.ret = step.arguments["hypercall_ret"]
        entry.native.kvmgmem_vcpu_run(self._fd(step.on), run, runner, RUN_SECONDS * 1_000_000_000)
        runner.kicked = 0

    def _do_kick(self, step: Step) -> None:
        run = ffi.cast("struct kvm_run *", self._address(step.on))
        runner = self.runners.setdefault(self.vcpus.get(step.on, ""), ffi.new("struct kvmgmem_runner *"))
        entry.native.kvmgmem_vcpu_kick(run, runner)

    def _do_mmap(self, step: Step) -> None:
        arguments = step.arguments
        flags = decode.number(arguments["flags"])
        fd = self._fd(step.on) if step.on else -1
        entry.syscall(
            NUMBER["mmap"], self._address(arguments.get("address", 0)), arguments["length"],
            decode.number(arguments["prot"]), flags, fd, arguments.get("offset", 0),
        )  # fmt: skip

    def _do_fallocate(self, step: Step) -> None:
        arguments = step.arguments
        mode = decode.number(arguments["mode"])
        entry.syscall(NUMBER["fallocate"], self._fd(step.on), mode, arguments["offset"], arguments["length"])

    def _do_cachestat(self, step: Step) -> None:
        fields = {"off": step.arguments["offset"], "len": step.arguments["length"]}
        span = ffi.new("struct kvmgmem_cachestat_range *", fields)
        found = ffi.new("struct kvmgmem_cachestat *")
        entry.syscall(NUMBER["cachestat"], self._fd(step.on), address_of(span), address_of(found), 0)

    def _do_mincore(self, step: Step) -> None:
        length = step.arguments["length"]
        vector = ffi.new("unsigned char[]", max(1, (length + 4095) // 4096))
        entry.syscall(NUMBER["mincore"], self._address(step.arguments["address"]), length, address_of(vector))

    def _do_other(self, step: Step) -> None:
        arguments = step.arguments
        if step.call in ("read", "write", "pread64", "pwrite64"):
            place = (self._address(arguments["address"]), arguments["length"], arguments.get("offset", 0))
            entry.syscall(NUMBER[step.call], self._fd(step.on), *place)
        elif "address" in arguments and step.call in NUMBER:
            names = ("prot", "advice", "new_length", "flags")
            last = [decode.number(arguments[name]) for name in names if name in arguments]
            entry.syscall(NUMBER[step.call], self._address(arguments["address"]), arguments["length"], *last)
        else:
            raise _UnrepeatableError("its arguments are not known by name")

    def _do_load(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        entry.native.kvmgmem_load(self._address(step.arguments["address"]), step.arguments["width"], raw)

    def _do_store(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        arguments = step.arguments
        entry.native.kvmgmem_store(self._address(arguments["address"]), arguments["width"], arguments["value"], raw)

    def _do_fill(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        arguments = step.arguments
        entry.native.kvmgmem_fill(self._address(arguments["address"]), arguments["length"], arguments["byte"], raw)

    def _do_first_other(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        arguments = step.arguments
        entry.native.kvmgmem_first_other(self._address(arguments["address"]), arguments["length"], arguments["byte"], raw)

    def _do_read_bytes(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        buffer = ffi.new("char[]", max(1, step.arguments["length"]))
        entry.native.kvmgmem_copy_in(buffer, self._address(step.arguments["address"]), step.arguments["length"], raw)

    def _do_write_bytes(self, step: Step) -> None:
        raw = ffi.new("struct kvmgmem_fault *")
        data = decode.unpack(step.arguments["data"])
        entry.native.kvmgmem_copy_out(self._address(step.arguments["address"]), data, len(data), raw)

    # -- processes

    def _do_fork(self, step: Step) -> Any:
        child = str(step.answer)
        if child not in self.ears:
            return (step.answer, {})  # it did nothing that was recorded
        pid = os.fork()
        if pid == 0:
            try:
                entry.syscall(NUMBER["prctl"], _PR_SET_PDEATHSIG, signal.SIGKILL)
                self._serve(self.ears[child])
            finally:
                os._exit(0)
        self.children[child] = pid
        return (step.answer, {})

    def _serve(self, ear: socket.socket) -> None:
        """A child's life: make calls as told, until it is told to end or nobody is left to tell it."""
        self.children, self.workers = {}, {}
        while True:
            data = ear.recv(_MESSAGE)
            if not data:
                return
            step, how = pickle.loads(data)
            if step.call == "exit":
                return
            ear.send(pickle.dumps(self.perform(step, how)))

    def _do_exit(self, step: Step) -> Any:
        return (step.answer, {})

    def _do_wait(self, step: Step) -> Any:
        child = str(step.arguments.get("of", ""))
        pid = self.children.pop(child, 0)
        if pid:
            if child not in self.leaving:  # how it ended is not in the trace: it became another program, say
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return (step.answer, {})

    def _do_kill(self, step: Step) -> Any:
        pid = self.children.get(str(step.arguments.get("of", "")), 0)
        if pid:
            os.kill(pid, signal.SIGKILL)
        return (step.answer, {})

    def _end(self, step: Step) -> socket.socket:
        child = self.passing.get(step.id)
        if child is None:
            raise _UnrepeatableError("between which processes it passes is not in the trace")
        return self.channels[child][1 if child == step.process else 0]

    def _do_send(self, step: Step) -> Any:
        socket.send_fds(self._end(step), [b"f"], [self._fd(name) for name in step.arguments["fds"]])
        return (step.answer, {})

    def _do_receive(self, step: Step) -> Any:
        names = [str(name) for name in step.arguments["fds"]]
        if not all(name in self.fds for name in names):
            self._fetch(step, names)
        return (step.answer, {})

    def _fetch(self, step: Step, names: list[str]) -> None:
        end = self._end(step)
        end.settimeout(RUN_SECONDS)
        _, fds, _, _ = socket.recv_fds(end, 16, len(names))
        self.fds.update(zip(names, fds, strict=True))

    def close(self) -> None:
        """End what was begun: children, mappings, descriptors."""
        for pid in self.children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for address, length in self.ranges.values():
            lib.kvmgmem_syscall(NUMBER["munmap"], address, length, 0, 0, 0, 0)
        for fd in self.fds.values():
            os.close(fd)
