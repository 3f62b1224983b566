"""The recorder: stands between Python and the binding and writes down each entry into the kernel, before and after it.

A call is written before it is made, so that the one that takes the kernel down is in the trace; its answer follows in a
line of its own. Descriptors get handles (`vm0`, `gmem1`) and ranges names (`mem0+0x1000`), the same ones in every run.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvmgmem._native import ffi, lib
from kvmgmem.abi import PAGE_SIZE
from kvmgmem.entry import address_of, watch
from kvmgmem.errors import HarnessError
from kvmgmem.exits import decode as decode_exit
from kvmgmem.memory import Fault, _fault_of
from kvmgmem.syscalls import NUMBER
from kvmgmem.trace import decode

SCHEMA: Final = 1

Sink = Callable[[dict[str, Any]], None]

# What a successful call makes, by the kind that its handle is named after.
_MAKES: Final = {
    "KVM_CREATE_VM": "vm",
    "KVM_CREATE_VCPU": "vcpu",
    "KVM_CREATE_GUEST_MEMFD": "gmem",
    "KVM_GET_STATS_FD": "stats",
    "userfaultfd": "uffd",
    "memfd_secret": "secret",
    "pidfd_open": "pidfd",
    "pidfd_getfd": "fd",
    "io_uring_setup": "ring",
    "openat2": "fd",
    "open_by_handle_at": "fd",
    "open_tree": "tree",
    "fsopen": "fs",
}
_LINKS: Final = (("kvm-vm", "vm"), ("kvm-vcpu", "vcpu"), ("kvm-gmem", "gmem"), ("/dev/kvm", "kvm"), ("pipe:", "pipe"))
_KIND_OF_MAPPING: Final = {"gmem": "map", "vcpu": "run", "": "mem"}
_READS_BACK: Final = 0x8000_0000  # _IOC_READ in an ioctl's number


class Answered(int):
    """A kernel's answer that remembers which call gave it, so that a comparison with it is known to be about that call."""

    step: str

    @classmethod
    def by(cls, key: str, value: int) -> "Answered":
        """The answer of the call that goes by `key`."""
        self = cls(value)
        self.step = key
        return self


def _steps_behind(value: object) -> list[str]:
    if isinstance(value, Answered):
        return [value.step]
    return [key for item in value for key in _steps_behind(item)] if isinstance(value, list | tuple) else []


@dataclass
class Region:
    """A range of the address space under a name; it keeps the name after munmap, until another one takes its place."""

    name: str
    address: int
    length: int


@dataclass
class _Tables:
    """What is known of this process's descriptors and ranges."""

    handles: dict[int, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    slot_sizes: dict[tuple[Any, int], int] = field(default_factory=dict)
    runs: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    """By the address of a kvm_run: what userspace may have changed since KVM_RUN came back: mmio.data, hypercall.ret."""


class Recorder:
    """Writes every entry of this process, and of those it forks, to a sink that takes one JSON object at a time.

    It has the binding's functions by their own names, because it takes the binding's place (`kvmgmem.entry.watch`).
    """

    def __init__(self, sink: Sink, circumstances: Mapping[str, Any], **header: Any) -> None:
        self.process = "p0"
        self.active = True
        self._sink = sink
        self._lock = threading.RLock()
        self._tables = _Tables()
        self._count = 0
        self._threads: dict[int, str] = {}
        self._forked = 0
        self._cpuid = _supported_cpuid()
        self._caller: Any = lib
        self._facts: dict[str, Any] = {}
        self._special = ""
        self._looks: dict[str, str] = {}
        """The last look at each VM's directory, by the key of its call."""
        os.register_at_fork(before=self._before_fork, after_in_parent=self._in_parent, after_in_child=self._in_child)
        self._write("begin", schema=SCHEMA, time=time.time(), circumstances=dict(circumstances), **header)

    def __getattr__(self, name: str) -> Any:
        """The binding's other functions, which are not calls into the kernel by themselves."""
        return getattr(lib, name)

    # -- lines

    def _write(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._sink({"trace": kind, **fields})

    def _call(self, call: str, on: str = "", **arguments: Any) -> str:
        """Write down a call that is about to be made; returns the key that its answer goes by."""
        with self._lock:
            self._count += 1
            key = f"{self.process}.{self._count}"
            thread = self._threads.setdefault(threading.get_ident(), f"t{len(self._threads)}")
            fields: dict[str, Any] = {"id": key, "at": time.monotonic_ns(), "pid": os.getpid()}
            fields |= {"tid": threading.get_native_id(), "process": self.process, "thread": thread, "call": call}
            facts = {} if call == "found" else self._facts
            self._special = key if facts else self._special
            self._write("call", **fields, **({"on": on} if on else {}), **facts, arguments=arguments)
            return key

    def _answer(self, key: str, answer: object, **out: Any) -> None:
        if key == self._special and getattr(self._caller, "injected", False):
            out = {**out, "injected": 1}
        self._write("answer", id=key, at=time.monotonic_ns(), answer=answer, **({"out": out} if out else {}))

    def end(self) -> None:
        """Write the end and look no more."""
        self._write("end", at=time.monotonic_ns())
        self.active = False

    def through(self, caller: Any, **facts: Any) -> None:
        """Have `caller` make the calls from now on; `facts` go into the line of each."""
        self._caller, self._facts = caller, facts

    # -- names

    def _new_name(self, kind: str) -> str:
        number = self._tables.counts.get(kind, 0)
        self._tables.counts[kind] = number + 1
        return f"{kind}{number}" + ("" if self.process == "p0" else f"_{self.process.replace('.', '_')}")

    def _keep(self, fd: int, kind: str) -> str:
        name = self._new_name(kind)
        self._tables.handles[fd] = (name, _identity(fd))
        return name

    def _fd(self, fd: int) -> str | int:
        """The handle of a descriptor; the number itself if nothing is open behind it."""
        if fd >= 1 << 31:
            fd -= 1 << 32
        identity = _identity(fd)
        if identity == (0, 0):
            return fd
        known = self._tables.handles.get(fd)
        if known is not None and known[1] == identity:
            return known[0]
        return self._discover(fd)

    def _discover(self, fd: int) -> str | int:
        """Name a descriptor that came about without the binding, and write down what it is."""
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            return fd  # another thread has closed it meanwhile
        same = next((name for number, (name, _) in self._tables.handles.items() if _same_file(fd, number)), None)
        kind = "dup" if same else next((kind for text, kind in _LINKS if text in link), "file")
        name = self._keep(fd, kind)
        self._answer(self._call("found", path=link, **({"same_as": same} if same else {})), name)
        return name

    def _address(self, address: int) -> str | int:
        """A range's name and the offset into it; the number itself outside all ranges."""
        regions = [*reversed(self._tables.regions)]
        inside = [region for region in regions if region.address <= address < region.address + region.length]
        # One past the end is what tests like to name, but a range that begins there comes first.
        at_end = [region for region in regions if address == region.address + region.length]
        for region in [*inside, *at_end]:
            offset = address - region.address
            return f"{region.name}+{offset:#x}" if offset else region.name
        return address

    def _map(self, address: int, length: int, kind: str) -> str:
        name = self._new_name(kind)
        self._tables.regions = [*self._tables.regions, Region(name, address, length)]
        return name

    # -- the binding's functions

    def kvmgmem_ioctl(self, fd: int, request: int, argument: int) -> int:
        """An ioctl with a number."""
        name = decode.request_name(request)
        value: Any = argument
        if name == "KVM_CREATE_VM":
            value = decode.vm_type(argument)
        elif name == "KVM_CHECK_EXTENSION":
            value = decode.capability(argument)
        elif argument > PAGE_SIZE:
            value = self._address(argument)
        key = self._call(name, str(self._fd(fd)), **({"argument": value} if argument else {}))
        answer = int(self._caller.kvmgmem_ioctl(fd, request, argument))
        made = self._made(name, answer)
        out = {}
        if name == "KVM_CREATE_VM" and answer >= 0:
            # KVM names the VM's directory after task_pid_nr(current), which is the thread (kvm_create_vm_debugfs).
            out = {"debugfs": f"{threading.get_native_id()}-{answer}"}
        self._answer(key, made, **out)
        return Answered.by(key, answer)

    def kvmgmem_ioctl_ptr(self, fd: int, request: int, pointer: Any) -> int:
        """An ioctl with a structure."""
        name = decode.request_name(request)
        before = self._structure(name, pointer)
        key = self._call(name, str(self._fd(fd)), **before)
        answer = int(self._caller.kvmgmem_ioctl_ptr(fd, request, pointer))
        made = self._made(name, answer)
        out: dict[str, Any] = {}
        if request & _READS_BACK:
            after = self._structure(name, pointer)
            out = after if after != before else {}
        if name == "KVM_GET_DIRTY_LOG" and answer == 0:
            out = {"bitmap": decode.pack(self._bitmap(str(self._fd(fd)), pointer))}
        if name.startswith("KVM_SET_USER_MEMORY_REGION") and answer == 0:
            self._tables.slot_sizes[str(self._fd(fd)), pointer.slot] = pointer.memory_size
        self._answer(key, made, **out)
        return Answered.by(key, answer)

    def kvmgmem_syscall(self, number: int, *arguments: int) -> int:
        """A system call."""
        key, name = self._system_call(number, arguments)
        answer = int(self._caller.kvmgmem_syscall(number, *arguments))
        self._system_answer(key, name, answer, arguments)
        return Answered.by(key, answer)

    def kvmgmem_guarded_syscall(self, number: int, *rest: Any) -> int:
        """A system call during which a signal is an answer."""
        *arguments, raw = rest
        key, name = self._system_call(number, arguments)
        answer = int(self._caller.kvmgmem_guarded_syscall(number, *rest))
        fault = _fault_of(raw)
        self._system_answer(key, name, answer, arguments, **({"signal": self._fault(fault)} if fault else {}))
        return answer

    def kvmgmem_load(self, address: int, width: int, raw: Any) -> int:
        """A load of up to eight bytes."""
        key = self._call("load", address=self._address(address), width=width)
        value = int(self._caller.kvmgmem_load(address, width, raw))
        self._answer(key, self._fault(_fault_of(raw)) or value)
        return value

    def kvmgmem_store(self, address: int, width: int, value: int, raw: Any) -> None:
        """A store of up to eight bytes."""
        key = self._call("store", address=self._address(address), width=width, value=value)
        self._caller.kvmgmem_store(address, width, value, raw)
        self._answer(key, self._fault(_fault_of(raw)) or 0)

    def kvmgmem_fill(self, address: int, length: int, byte: int, raw: Any) -> None:
        """A memset."""
        key = self._call("fill", address=self._address(address), length=length, byte=byte)
        self._caller.kvmgmem_fill(address, length, byte, raw)
        self._answer(key, self._fault(_fault_of(raw)) or 0)

    def kvmgmem_first_other(self, address: int, length: int, byte: int, raw: Any) -> int:
        """A look for the first byte that differs."""
        key = self._call("first_other", address=self._address(address), length=length, byte=byte)
        at = int(self._caller.kvmgmem_first_other(address, length, byte, raw))
        self._answer(key, self._fault(_fault_of(raw)) or at)
        return at

    def kvmgmem_copy_in(self, buffer: Any, address: int, length: int, raw: Any) -> None:
        """A copy out of the watched memory."""
        key = self._call("read_bytes", address=self._address(address), length=length)
        self._caller.kvmgmem_copy_in(buffer, address, length, raw)
        fault = self._fault(_fault_of(raw))
        self._answer(key, fault or decode.pack(bytes(ffi.buffer(buffer, length))))

    def kvmgmem_copy_out(self, address: int, data: bytes, length: int, raw: Any) -> None:
        """A copy into the watched memory."""
        key = self._call("write_bytes", address=self._address(address), data=decode.pack(bytes(data[:length])))
        self._caller.kvmgmem_copy_out(address, data, length, raw)
        self._answer(key, self._fault(_fault_of(raw)) or 0)

    def kvmgmem_vcpu_run(self, fd: int, run: Any, runner: Any, deadline_ns: int) -> int:
        """One KVM_RUN."""
        key = self._call("KVM_RUN", str(self._fd(fd)), **self._pokes(run, runner))
        answer = int(self._caller.kvmgmem_vcpu_run(fd, run, runner, deadline_ns))
        self._tables.runs[address_of(run)] = _answers_to_an_exit(run)
        # An answer that went in with the call does not describe how it came out (EINTR leaves the old exit standing).
        exits: dict[str, Any] = {"exit": decode.plain(decode_exit(run))}
        ended = {name: 1 for name in ("expired", "kicked") if getattr(runner, name)}
        self._answer(key, decode.answer(answer), **exits, **ended)
        return answer

    def kvmgmem_vcpu_kick(self, run: Any, runner: Any) -> None:
        """A kick."""
        key = self._call("kick", str(self._address(address_of(run))))
        lib.kvmgmem_vcpu_kick(run, runner)
        self._answer(key, 0)

    # -- what is not the binding's

    def opened(self, path: str, fd: int) -> None:
        """A device was opened."""
        self._answer(self._call("open", path=path), self._keep(fd, "kvm" if path.endswith("/kvm") else "file"))

    def closing(self, fd: int) -> None:
        """A descriptor is about to be closed."""
        handle = self._fd(fd)
        self._tables.handles.pop(fd, None)
        self._answer(self._call("close", str(handle)), 0)

    def duplicated(self, fd: int, copy: int) -> None:
        """A descriptor got a second number."""
        self._answer(self._call("dup", str(self._fd(fd))), self._keep(copy, "dup"))

    def event(self, name: str, peer: int = 0, fds: Sequence[int] = ()) -> None:
        """Something between processes; messages without descriptors only order what the trace orders anyway."""
        if name in ("send", "receive") and not fds:
            return
        arguments: dict[str, Any] = {"fds": [self._fd(fd) for fd in fds]} if fds else {}
        if peer:
            arguments["pid"] = peer
        self._answer(self._call(name, **arguments), 0)

    def expect(self, seen: object, wanted: object, *, shows: object = None, bug: str = "", peer: int = 0) -> None:
        """A comparison of the test's: written beside the calls, and matched with the one it is about when it is read."""
        fields = {"seen": decode.plain(seen), "wanted": decode.plain(wanted)}
        steps = _steps_behind(seen)
        if steps:
            fields["of"] = steps
        if shows is not None:
            fields["shows"] = decode.plain(shows)
        if peer:
            fields["pid"] = peer
        self._write("expected", process=self.process, at=time.monotonic_ns(), **fields, **({"bug": bug} if bug else {}))

    def lives(self, directory: str, alive: bool) -> None:
        """A look whether a VM lives: 1 if it does."""
        key = self._call("lives", directory=directory)
        self._looks[directory] = key
        self._answer(key, int(alive))

    def should_live(self, directory: str, wanted: bool) -> None:
        """What a test wanted the last look to tell."""
        if directory in self._looks:
            told = {"seen": int(not wanted), "wanted": int(wanted), "of": [self._looks[directory]]}
            self._write("expected", process=self.process, at=time.monotonic_ns(), **told)

    def statistic(self, fd: int, name: str, value: int) -> int:
        """A statistic of a VM or a vCPU by name."""
        key = self._call("statistic", str(self._fd(fd)), name=name)
        self._answer(key, value)
        return Answered.by(key, value)

    # -- fork

    def _before_fork(self) -> None:
        self._lock.acquire()
        if self.active:
            self._fork_key = self._call("fork")

    def _in_parent(self) -> None:
        if self.active:
            name = self._next_child()
            self._answer(self._fork_key, name)
        self._lock.release()

    def _in_child(self) -> None:
        name = self._next_child()
        self._lock = threading.RLock()
        if not self.active:
            return
        self.process, self._count, self._forked = name, 0, 0
        self._threads = {}
        # A child's first line tells readers which process has its pid.
        self._answer(self._call("start"), 0)

    def _next_child(self) -> str:
        self._forked += 1
        return f"p{self._forked}" if self.process == "p0" else f"{self.process}.{self._forked}"

    # -- details

    def _made(self, call: str, answer: int) -> int | str:
        if answer >= 0 and call in _MAKES:
            return self._keep(answer, _MAKES[call])
        return decode.answer(answer)

    def _structure(self, call: str, pointer: Any) -> dict[str, Any]:
        name = decode.structure_name(pointer)
        if not name:
            items = [int(item) for item in pointer] if ffi.typeof(pointer).kind == "array" else []
            return {"words": [self._address(item) if item > PAGE_SIZE else item for item in items]}
        found = {"structure": name, **decode.structure_fields(pointer)}
        if name.startswith("kvm_userspace_memory_region"):
            found["userspace_addr"] = self._address(pointer.userspace_addr)
            if name.endswith("2") and (pointer.guest_memfd or pointer.flags & lib.KVM_MEM_GUEST_MEMFD):
                found["guest_memfd"] = self._fd(pointer.guest_memfd)
        elif name in ("kvm_dirty_log", "kvm_clear_dirty_log"):
            found.pop("dirty_bitmap", None)
            if name == "kvm_clear_dirty_log":
                size = (pointer.num_pages + 63) // 64 * 8
                found["bitmap"] = decode.pack(bytes(ffi.buffer(ffi.cast("uint8_t *", pointer.dirty_bitmap), size)))
        elif name == "kvm_cpuid2":
            known = _bytes_of_cpuid(pointer) == self._cpuid
            entries = [decode.structure_fields(pointer.entries + i) for i in range(0 if known else pointer.nent)]
            found["entries"] = "supported" if known else entries
        elif name == "kvm_msrs":
            found["entries"] = [decode.structure_fields(pointer.entries + i) for i in range(pointer.nmsrs)]
        return {key: value for key, value in found.items() if value != 0}

    def _bitmap(self, vm: str, pointer: Any) -> bytes:
        pages = self._tables.slot_sizes.get((vm, pointer.slot), 0) // PAGE_SIZE
        return bytes(ffi.buffer(ffi.cast("uint8_t *", pointer.dirty_bitmap), (pages + 63) // 64 * 8))

    def _fault(self, fault: Fault | None) -> str:
        """A signal as the answer of an access: `SIGBUS 2 at map0+0x1000`, with its si_code."""
        return f"{fault.signal.name} {fault.code} at {_hex(self._address(fault.address))}" if fault else ""

    def _pokes(self, run: Any, runner: Any) -> dict[str, Any]:
        """What userspace wrote into kvm_run since the last exit."""
        found: dict[str, Any] = {"immediate_exit": 1} if run.immediate_exit or runner.kicked else {}
        before = self._tables.runs.get(address_of(run))
        now = _answers_to_an_exit(run)
        if before is not None and now != before:
            if run.exit_reason == lib.KVM_EXIT_MMIO:
                found["mmio_data"] = now[0].hex()
            elif run.exit_reason == lib.KVM_EXIT_HYPERCALL:
                found["hypercall_ret"] = now[1]
        return found

    def _system_call(self, number: int, arguments: Sequence[int]) -> tuple[str, str]:
        name = decode.syscall_names().get(number, f"syscall {number}")
        on, decoded = _SYSTEM_CALLS.get(name, _any_call)(self, arguments)
        return self._call(name, on, **decoded), name

    def _system_answer(self, key: str, name: str, answer: int, arguments: Sequence[int], **out: Any) -> None:
        told = self._made(name, answer)
        if answer >= 0 and name == "mmap":
            told = self._map(answer, arguments[1], _mapping_kind(self, arguments))
        elif answer >= 0 and name == "mremap":
            told = self._map(answer, arguments[2], "moved")
        elif answer == 0 and name == "cachestat":
            out["pages"] = int(ffi.cast("struct kvmgmem_cachestat *", arguments[2]).nr_cache)
        elif answer == 0 and name == "mincore":
            pages = (arguments[1] + PAGE_SIZE - 1) // PAGE_SIZE
            out["resident"] = decode.pack(bytes(ffi.buffer(ffi.cast("uint8_t *", arguments[2]), pages)))
        elif answer >= 0 and self._address(answer) != answer:
            told = str(self._address(answer))
        self._answer(key, told, **out)


Decoded = tuple[str, dict[str, Any]]


def _mmap(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    address, length, prot, flags, fd, offset = arguments
    found: dict[str, Any] = {"address": recorder._address(address)} if address else {}
    found |= {"length": length, "prot": decode.prot(prot), "flags": decode.map_flags(flags)}
    if offset:
        found["offset"] = offset
    return ("" if flags & decode.C_LIBRARY["MAP_ANONYMOUS"] else str(recorder._fd(fd & 0xFFFF_FFFF))), found


def _range(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    return "", {"address": recorder._address(arguments[0]), "length": arguments[1]}


def _mprotect(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    return "", {**_range(recorder, arguments)[1], "prot": decode.prot(arguments[2])}


def _madvise(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    return "", {**_range(recorder, arguments)[1], "advice": decode.advice(arguments[2])}


def _mremap(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    return "", {**_range(recorder, arguments)[1], "new_length": arguments[2], "flags": arguments[3]}


def _msync(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    return "", {**_range(recorder, arguments)[1], "flags": arguments[2]}


def _fallocate(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    fd, mode, offset, length = arguments[:4]
    return str(recorder._fd(fd & 0xFFFF_FFFF)), {"mode": decode.falloc_mode(mode), "offset": offset, "length": length}


def _cachestat(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    span = ffi.cast("struct kvmgmem_cachestat_range *", arguments[1])
    return str(recorder._fd(arguments[0] & 0xFFFF_FFFF)), {"offset": int(span.off), "length": int(span.len)}


def _transfer(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    fd, address, length, offset = arguments[:4]
    found = {"address": recorder._address(address), "length": length, **({"offset": offset} if offset else {})}
    return str(recorder._fd(fd & 0xFFFF_FFFF)), found


def _any_call(recorder: Recorder, arguments: Sequence[int]) -> Decoded:
    """A call without a decoder: its numbers, those that lie in a known range by its name."""
    named = [recorder._address(argument) if argument > PAGE_SIZE else argument for argument in arguments]
    while named and named[-1] == 0:
        named.pop()
    return "", {"arguments": named}


_SYSTEM_CALLS: Final[dict[str, Callable[[Recorder, Sequence[int]], Decoded]]] = {
    "mmap": _mmap, "munmap": _range, "mprotect": _mprotect, "madvise": _madvise, "mremap": _mremap, "msync": _msync,
    "mlock": _range, "munlock": _range, "mincore": _range, "fallocate": _fallocate, "cachestat": _cachestat,
    "read": _transfer, "write": _transfer, "pread64": _transfer, "pwrite64": _transfer,
}  # fmt: skip


def _mapping_kind(recorder: Recorder, arguments: Sequence[int]) -> str:
    if arguments[3] & decode.C_LIBRARY["MAP_ANONYMOUS"]:
        return "mem"
    handle = str(recorder._fd(arguments[4] & 0xFFFF_FFFF))
    return _KIND_OF_MAPPING.get(handle.partition("_")[0].rstrip("0123456789"), "map")


def _identity(fd: int) -> tuple[int, int]:
    try:
        found = os.fstat(fd)
    except (OSError, OverflowError):
        return (0, 0)
    return found.st_dev, found.st_ino


def _same_file(fd: int, other: int) -> bool:
    pid = os.getpid()
    return bool(lib.kvmgmem_syscall(NUMBER["kcmp"], pid, pid, 0, fd, other, 0) == 0)


def _answers_to_an_exit(run: Any) -> tuple[bytes, int]:
    return bytes(ffi.buffer(run.mmio.data)), int(run.hypercall.ret)


def _bytes_of_cpuid(pointer: Any) -> bytes:
    return bytes(ffi.buffer(pointer, ffi.sizeof("struct kvm_cpuid2") + pointer.nent * ffi.sizeof("struct kvm_cpuid_entry2")))


def _supported_cpuid() -> bytes:
    """What KVM_GET_SUPPORTED_CPUID gives here: vCPUs get just that, and another kernel's replay gives them its own."""
    if not hasattr(lib, "KVM_GET_SUPPORTED_CPUID"):
        return b""
    from kvmgmem.arch.x86_64 import _supported_cpuid as ask

    try:
        return _bytes_of_cpuid(ask())
    except HarnessError:
        return b""  # no KVM: then no vCPU will get anything either


def _hex(value: str | int) -> str:
    return value if isinstance(value, str) else f"{value:#x}"


@contextlib.contextmanager
def recording(sink: Sink, circumstances: Mapping[str, Any], **header: Any) -> Iterator[Recorder]:
    """Record everything the binding does within the block; yields the recorder."""
    recorder = Recorder(sink, circumstances, **header)
    watch(recorder)
    try:
        yield recorder
    finally:
        watch(None)
        recorder.end()
