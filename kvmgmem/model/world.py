"""The steps on a real kernel, through the binding: what each answers there, and what can be seen from outside."""

import mmap
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from kvmgmem import syscalls
from kvmgmem.abi import GmemFlag
from kvmgmem.advice import Advice
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine, is_report
from kvmgmem.errors import Errno, HarnessError, KvmError
from kvmgmem.exits import MemoryFaultExit, MmioExit, RunResult
from kvmgmem.exits import OtherExit as PlainExit
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import DEBUGFS
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Fault, Mapping, MemoryRegion
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Answer, Left, MemoryFault, Mmio, Other, Plain, Value
from kvmgmem.model.steps import ARENA, ARENA_END, MAIN, WINDOW, P, Step
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.vm import Vm

MAP_FIXED_NOREPLACE = 0x100000
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


class World:
    """The kernel's side of one sequence. A context: at its end everything is closed, whatever had happened."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self.name = MAIN
        self.fds: dict[str, OwnedFd] = {}
        self._cpus: dict[str, GuestCpu] = {}
        self._machines: dict[str, GuestMachine] = {}
        self._cpus_made: dict[str, int] = {}
        self._vm_of: dict[str, str] = {}
        """By the name of a VM's descriptor, or of a copy: the name it was created under."""
        self._areas: dict[int, Mapping] = {}
        self._children: dict[str, ChildProcess] = {}
        self.directories: dict[str, str] = {}
        """debugfs names of VMs by the name they were created under."""
        self._older = _directories()
        """Those of VMs that were there before: none of this sequence's."""
        self._taken = _take_numbers(self._older)
        """Descriptors in the way of VMs that would be called as one that never went, and be nowhere in debugfs."""
        self._acts: dict[type[Step], Callable[[Any], Answer]] = {
            do.CreateVm: self._create_vm,
            do.CreateGmem: self._create_gmem,
            do.Fallocate: self._fallocate,
            do.MapFile: self._map_file,
            do.MapMemory: self._map_memory,
            do.Unmap: self._unmap,
            do.Remove: self._remove,
            do.HostLoad: self._host_load,
            do.HostStore: self._host_store,
            do.CreateCpu: self._create_cpu,
            do.GuestLoad: self._guest_load,
            do.GuestStore: self._guest_store,
            do.SetAttributes: self._set_attributes,
            do.Prefault: self._prefault,
            do.Dup: self._dup,
            do.Send: self._send,
            do.Fork: self._fork,
            do.Kill: self._kill,
            do.Close: self._close,
            do.CloseCpu: self._close_cpu,
        }
        _must(syscalls.mmap(ARENA, ARENA_END - ARENA, 0, RESERVED | MAP_FIXED_NOREPLACE, -1, 0), "the arena")

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the children, close every descriptor and unmap everything."""
        for name in list(self._children):
            self._kill(do.Kill(name))
        for cpu in self._cpus.values():
            cpu.close()
        for fd in self.fds.values():
            fd.close()
        for machine in self._machines.values():
            machine.close()
        for number in self._taken:
            os.close(number)
        for area in self._areas.values():
            area._mapped = False  # part of the arena
        syscalls.munmap(ARENA, ARENA_END - ARENA)

    # -- playing

    def perform(self, step: Step, number: int = 0) -> Answer:
        """Play a step; `number` is what the request's descriptor field is to hold."""
        by = getattr(step, "by", MAIN)
        if by != self.name:
            return self._in_child(by, step, number)
        try:
            if isinstance(step, do.SetRegion):
                return self._set_region(step, number)
            return self._acts[type(step)](step)
        except KvmError as error:
            return Other(str(error))

    def number_of(self, name: str) -> int:
        """The number behind a descriptor's name."""
        return self._cpus[name].vcpu.fileno() if name in self._cpus else self.fds[name].fileno()

    def pid_of(self, process: str) -> int:
        """The pid of a child; 0 for the process that plays."""
        child = self._children.get(process)
        return child.pid if child else 0

    def _in_child(self, name: str, step: Step, number: int) -> Answer:
        child = self._children[name]
        child.send((step, number))
        answer: Answer = child.receive()
        return answer

    def _vm(self, name: str) -> Vm:
        vm = self.fds[name]
        assert isinstance(vm, Vm)
        return vm

    def _gmem(self, name: str) -> GuestMemfd:
        gmem = self.fds[name]
        assert isinstance(gmem, GuestMemfd)
        return gmem

    def _create_vm(self, step: do.CreateVm) -> Answer:
        vm = self._kvm.raw.create_vm(step.type)
        if isinstance(vm, Errno):
            return vm
        self.fds[step.name], self._vm_of[step.name] = vm, step.name
        # KVM names the directory after the thread; an older VM may still have the name (GM-VM-013).
        directory = f"{threading.get_native_id()}-{vm.fileno()}"
        if directory not in {*self.directories.values(), *self._older} and _exists(directory):
            self.directories[step.name] = directory
        return Plain.NEW

    def _create_gmem(self, step: do.CreateGmem) -> Answer:
        gmem = self._vm(step.vm).raw.create_guest_memfd(step.size, step.flags)
        if isinstance(gmem, Errno):
            return gmem
        self.fds[step.name] = gmem
        return Plain.NEW

    def _set_region(self, step: do.SetRegion, number: int) -> Answer:
        region = MemoryRegion(
            slot=step.slot,
            gpa=step.gpa,
            size=step.size,
            hva=step.hva,
            gmem=number,
            gmem_offset=step.offset,
            flags=step.flags,
        )
        raw = self._vm(step.vm).raw
        return _ok(raw.set_region(region) if step.version == 2 else raw.set_region_v1(region))

    def delete_region(self, vm: str, slot: int) -> Answer:
        """Take away a slot that a known bug let in."""
        return _ok(self._vm(vm).raw.delete_region(slot & 0xFFFF, slot >> 16))

    def _fallocate(self, step: do.Fallocate) -> Answer:
        return _ok(syscalls.fallocate(self.fds[step.fd].fileno(), step.mode, step.offset, step.length))

    # -- host memory

    def _place(self, window: int, pages: int, prot: int, flags: int, fd: int, offset: int) -> Answer:
        at = ARENA + window * WINDOW
        answer = syscalls.mmap(at, pages * P, prot, flags | MAP_FIXED, fd, offset)
        if isinstance(answer, Errno):
            return answer
        self._areas[window] = Mapping(at, pages * P)
        return Plain.DONE

    def _map_file(self, step: do.MapFile) -> Answer:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if step.writable else 0) | (mmap.PROT_EXEC if step.executable else 0)
        flags = mmap.MAP_SHARED if step.shared else mmap.MAP_PRIVATE
        return self._place(step.window, step.pages, prot, flags, self.fds[step.fd].fileno(), step.offset)

    def _map_memory(self, step: do.MapMemory) -> Answer:
        answer = self._place(step.window, step.pages, mmap.PROT_READ | mmap.PROT_WRITE, RESERVED, -1, 0)
        for page in range(step.pages):
            self._areas[step.window].store(step.seed + page, page * P)
        return answer

    def _unmap(self, step: do.Unmap) -> Answer:
        area = self._areas.pop(step.window)
        area._mapped = False
        answer = syscalls.munmap(area.address, area.length)
        # The address stays ours, lest something of the process's own comes to lie there.
        _must(syscalls.mmap(area.address, area.length, 0, RESERVED | MAP_FIXED, -1, 0), "the arena")
        return answer if isinstance(answer, Errno) else Plain.DONE

    def _remove(self, step: do.Remove) -> Answer:
        return _ok(self._areas[step.window].advise(Advice.REMOVE, step.page * P, step.pages * P))

    def host_word(self, window: int, page: int) -> int | Fault:
        """The first word of a page of a window of this process."""
        return self._areas[window].try_load(page * P)

    def _host_load(self, step: do.HostLoad) -> Answer:
        found = self.host_word(step.window, step.page)
        return _signal(found) if isinstance(found, Fault) else Value(found)

    def _host_store(self, step: do.HostStore) -> Answer:
        fault = self._areas[step.window].try_store(step.value, step.page * P)
        return _signal(fault) if fault else Plain.DONE

    # -- guests

    def _create_cpu(self, step: do.CreateCpu) -> Answer:
        origin = self._vm_of[step.vm]
        if origin not in self._machines:
            self._machines[origin] = GuestMachine(self._vm(step.vm))
        machine = self._machines[origin]
        machine.vm = self._vm(step.vm)
        number = self._cpus_made.get(origin, 0)
        self._cpus[step.name] = machine.cpu(number)
        self._cpus_made[origin] = number + 1
        return Plain.DONE

    def guest_word(self, cpu: str, gpa: int) -> Answer:
        """What a guest reads at a page, or how its run ended instead."""
        return self._finish(self._cpus[cpu], self._cpus[cpu].try_load(gpa), write=False)

    def _guest_load(self, step: do.GuestLoad) -> Answer:
        return self.guest_word(step.cpu, step.gpa)

    def _guest_store(self, step: do.GuestStore) -> Answer:
        cpu = self._cpus[step.cpu]
        return self._finish(cpu, cpu.try_store(step.gpa, step.value), write=True)

    @staticmethod
    def _finish(cpu: GuestCpu, result: RunResult, *, write: bool) -> Answer:
        if result.expired:
            return Other("KVM_RUN did not come back")
        if result.answer == 0 and is_report(result):
            return Plain.DONE if write else Value(cpu.registers().rax)
        if result.answer == 0 and isinstance(result.exit, MmioExit):
            # The next KVM_RUN completes the access, before the registers may be touched.
            rest = cpu.run() if result.exit.write else cpu.answer_mmio(0)
            return Mmio(result.exit.gpa, result.exit.write) if is_report(rest) else Other(f"after MMIO, {rest.exit}")
        if result.answer == Errno.EFAULT and isinstance(result.exit, MemoryFaultExit):
            fault = result.exit
            if fault.size == P and fault.flags & ~8 == 0:
                return MemoryFault(fault.gpa, fault.private)
        if result.answer == Errno.EFAULT and isinstance(result.exit, PlainExit) and result.exit.reason == 0:
            return Plain.HVA_FAULT
        return Other(f"{result.answer!r} with {result.exit}")

    def _set_attributes(self, step: do.SetAttributes) -> Answer:
        return _ok(self._vm(step.vm).raw.set_attributes(step.gpa, step.size, step.attributes, step.flags))

    def _prefault(self, step: do.Prefault) -> Answer:
        return Left(*self._cpus[step.cpu].vcpu.raw.pre_fault(step.gpa, step.size, step.flags))

    # -- descriptors and processes

    def _copy(self, name: str, fd: int) -> OwnedFd:
        """An object of the same kind for another descriptor of the same file."""
        original = self.fds[name]
        if isinstance(original, Vm):
            return Vm(fd, original.type, original.vcpu_mmap_size)
        return GuestMemfd(fd, original.size, original.flags) if isinstance(original, GuestMemfd) else OwnedFd(fd)

    def _dup(self, step: do.Dup) -> Answer:
        self.fds[step.name] = self._copy(step.fd, os.dup(self.fds[step.fd].fileno()))
        if step.fd in self._vm_of:
            self._vm_of[step.name] = self._vm_of[step.fd]
        return Plain.NEW

    def _send(self, step: do.Send) -> Answer:
        child, original = self._children[step.to], self.fds[step.fd]
        facts = (original.size, int(original.flags)) if isinstance(original, GuestMemfd) else None
        vm_type = int(original.type) if isinstance(original, Vm) else None
        child.send((step.name, facts, vm_type), [original.fileno()])
        answer: Answer = child.receive()
        return answer

    def _fork(self, step: do.Fork) -> Answer:
        self._children[step.name] = ChildProcess(lambda channel: self._serve(step.name, channel))
        return Plain.DONE

    def _serve(self, name: str, channel: Channel) -> None:
        """The child: it has a copy of all of this, and plays what it is told to."""
        self.name = name
        while True:
            message, fds = channel.receive_with_fds(limit=600)
            if fds:
                self._received(message, fds[0])
                channel.send(Plain.NEW)
            else:
                channel.send(self.perform(*message))

    def _received(self, message: tuple[str, tuple[int, int] | None, int | None], fd: int) -> None:
        name, facts, vm_type = message
        if vm_type is not None:
            self.fds[name] = Vm(fd, vm_type, self._kvm.vcpu_mmap_size)
        elif facts is not None:
            self.fds[name] = GuestMemfd(fd, facts[0], GmemFlag(facts[1]))

    def _kill(self, step: do.Kill) -> Answer:
        child = self._children.pop(step.process)
        child.kill()
        child.channel.close()
        return Plain.DONE

    def _close(self, step: do.Close) -> Answer:
        self.fds.pop(step.fd).close()
        return Plain.DONE

    def _close_cpu(self, step: do.CloseCpu) -> Answer:
        self._cpus.pop(step.cpu).close()
        return Plain.DONE

    # -- from outside

    def allocated(self, name: str, page: int = 0, pages: int = 0) -> int:
        """How many pages of a gmem are allocated; -1 if this kernel cannot say."""
        try:
            return self._gmem(name).allocated_pages(page * P, pages * P)
        except KvmError as error:
            if error.answer == Errno.ENOSYS:
                return -1
            raise

    def lives(self, vm: str) -> bool | None:
        """Whether a VM lives, by its debugfs directory; None if it has none."""
        directory = self.directories.get(vm)
        return _exists(directory) if directory else None

    def forget(self, vm: str) -> None:
        """A VM is gone: its directory's name may be given to another."""
        self.directories.pop(vm, None)


def is_open(number: int) -> bool:
    """Whether there is a file behind a descriptor number of this process."""
    return os.path.lexists(f"/proc/self/fd/{number}")


def _directories() -> set[str]:
    """The debugfs names of the living VMs of this thread."""
    try:
        return {name for name in os.listdir(DEBUGFS / "kvm") if name.startswith(f"{threading.get_native_id()}-")}
    except OSError:
        return set()


def _take_numbers(directories: set[str]) -> list[int]:
    """Open something under each number that these VMs had and that is free; the numbers."""
    free = [number for number in (int(name.partition("-")[2]) for name in directories) if not is_open(number)]
    if not free:
        return []
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for number in free:
        if number != nothing:
            os.dup2(nothing, number, inheritable=False)
    if nothing not in free:
        os.close(nothing)
    return free


def _exists(directory: str) -> bool:
    return os.path.isdir(DEBUGFS / "kvm" / directory)  # noqa: PTH112 - asked after every step


def _ok(answer: int | Errno) -> Answer:
    if isinstance(answer, Errno):
        return answer
    return Plain.OK if answer == 0 else Other(str(answer))


def _signal(fault: Fault) -> Answer:
    known = {signal.SIGBUS: Plain.SIGBUS, signal.SIGSEGV: Plain.SIGSEGV}
    return known.get(fault.signal) or Other(str(fault))


def _must(answer: int | Errno, what: str) -> None:
    if isinstance(answer, Errno):
        raise HarnessError(f"cannot map {what}: {answer.name}", "something else lies there; a bug of kvmgmem")
