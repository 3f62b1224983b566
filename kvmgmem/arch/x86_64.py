"""x86-64 guests: a small machine of page tables and programs, and vCPUs that touch memory on request.

A guest runs long-mode code at CPL 3. Every backend executes that natively, kvm-pvm too, which emulates CPL 0 code and
would then read guest memory through userspace_addr instead of faulting (seen on 6.18). There is no descriptor table: an
exception in the guest is a triple fault and ends in a SHUTDOWN exit.
"""

import struct
from array import array
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from kvmgmem._native import ffi, lib
from kvmgmem.abi import GiB, MiB
from kvmgmem.entry import ioctl_struct
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.exits import IoExit, RunResult
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.vcpu import RUN_LIMIT, RunningVcpu, Vcpu
from kvmgmem.vm import Vm

REPORT_PORT = 0x10
SUPPORT_GPA = 0xD000_0000
SUPPORT_SIZE = 1 * MiB
SUPPORT_SLOT = 32000
IDENTITY_LIMIT = 4 * GiB

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_USER = 1 << 2
PTE_LARGE = 1 << 7
_TABLE = PTE_PRESENT | PTE_WRITE | PTE_USER

CR0_LONG = 0x8005_0033  # PG | AM | WP | NE | ET | MP | PE
CR4_PAE = 1 << 5
EFER_LONG = 1 << 8 | 1 << 10  # LME | LMA
RFLAGS_FIXED = 1 << 1
RFLAGS_IOPL3 = 3 << 12

# A task state segment whose I/O permission bitmap opens ports 0..255. kvm-pvm runs CPL 3 code on the real CPU without the
# guest's IOPL and has the emulator decide about the port access, which looks here (seen on 6.18).
TSS_IO_MAP = 104
TSS_LIMIT = TSS_IO_MAP + 256 // 8


class Mode(Enum):
    """How the guest's code runs."""

    USER = "long mode, CPL 3, IOPL 3"
    KERNEL = "long mode, CPL 0"
    COMPATIBILITY = "long mode, CPL 0, 32-bit code segment"
    REAL = "real mode"


@cache
def programs() -> dict[str, bytes]:
    """The guest programs of native/guest_x86_64.c, by name."""
    raw = ffi.new("struct kvmgmem_guest_program *")
    found: dict[str, bytes] = {}
    for index in range(lib.kvmgmem_guest_program_count()):
        lib.kvmgmem_guest_program_get(index, raw)
        found[ffi.string(raw.name).decode()] = bytes(ffi.buffer(raw.code, raw.size))
    return found


@cache
def program_image() -> tuple[bytes, dict[str, int]]:
    """All programs in one piece, and where each begins in it."""
    image, starts = bytearray(), dict[str, int]()
    for name, code in programs().items():
        starts[name] = len(image)
        image += code.ljust((len(code) + 15) & ~15, b"\0")
    return bytes(image), starts


def warm_up() -> None:
    """Find out now what every guest needs and no guest changes; raises `HarnessError` or `KvmError` without KVM.

    For a process that forks one for each test: what it knows none of them has to find out.
    """
    program_image()
    _supported_cpuid()


def identity_tables(gpa: int) -> bytes:
    """Page tables, to lie at `gpa` with their root first, that map the first 4 GiB to themselves with 2 MiB pages."""
    pdpt, directories = gpa + 0x1000, [gpa + 0x2000 + 0x1000 * index for index in range(4)]
    root = struct.pack("<512Q", pdpt | _TABLE, *[0] * 511)
    upper = struct.pack("<512Q", *[directory | _TABLE for directory in directories], *[0] * 508)
    # Not page by page: every guest of every test is made these, which is 10 ms of Python under emulation.
    pages = array("Q", range(_TABLE | PTE_LARGE, IDENTITY_LIMIT, 2 * MiB))
    return root + upper + pages.tobytes()


@dataclass(frozen=True)
class Registers:
    """The general registers a program reports with."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rip: int


class GuestMachine:
    """What every guest of a VM shares: one plain slot that holds page tables and programs.

    Virtual addresses below 4 GiB are identity mapped with 2 MiB pages; `map` adds 4 KiB mappings above. The slot has no
    gmem, because page tables and emulated code are read through userspace_addr on backends without two-dimensional paging.
    """

    _CODE = 0x0000
    _TSS = 0x0E00
    _PML4 = 0x1000  # and what else identity_tables() makes
    _FREE = 0x7000

    def __init__(self, vm: Vm, *, gpa: int = SUPPORT_GPA, slot: int = SUPPORT_SLOT) -> None:
        self.vm = vm
        self.gpa = gpa
        self.slot = slot
        self.memory = Mapping.anonymous(SUPPORT_SIZE)
        self._next_table = self._FREE
        self._write_programs()
        self.memory.write(self._PML4, identity_tables(self.cr3))
        vm.set_region(MemoryRegion(slot, gpa, SUPPORT_SIZE, self.memory.address))

    def _write_programs(self) -> None:
        image, _ = program_image()
        if self._CODE + len(image) > self._TSS:
            raise ValueError("the guest programs no longer fit into their page")
        self.memory.write(self._CODE, image)
        self.memory.store(TSS_IO_MAP, self._TSS + 102, width=2)
        # What ends an I/O permission bitmap is a byte of ones.
        self.memory.store(0xFF, self._TSS + TSS_LIMIT, width=1)

    def entry(self, program: str) -> int:
        """The guest address of a program."""
        return self.gpa + self._CODE + program_image()[1][program]

    @property
    def tss(self) -> int:
        """The guest address of the task state segment."""
        return self.gpa + self._TSS

    @property
    def cr3(self) -> int:
        """The guest physical address of the page table root."""
        return self.gpa + self._PML4

    def map(self, gva: int, gpa: int, *, flags: int = _TABLE) -> None:
        """Map one 4 KiB page at `gva`, which must not lie in the identity map."""
        if gva < IDENTITY_LIMIT:
            raise ValueError(f"{gva:#x} is identity mapped")
        table = self._PML4
        for shift in (39, 30, 21):
            table = self._next(table + 8 * (gva >> shift & 511))
        self.memory.store(gpa | flags, table + 8 * (gva >> 12 & 511))

    def _next(self, at: int) -> int:
        pointer = self.memory.load(at)
        if not pointer:
            table, self._next_table = self._next_table, self._next_table + 0x1000
            if self._next_table > SUPPORT_SIZE:
                raise ValueError("no room left for page tables")
            self.memory.store(self.gpa + table | _TABLE, at)
            return table
        return (pointer & ~0xFFF) - self.gpa

    def cpu(self, vcpu_id: int = 0, mode: Mode = Mode.USER) -> "GuestCpu":
        """A new vCPU of the VM, set up to run the programs."""
        return GuestCpu(self, self.vm.create_vcpu(vcpu_id), mode)

    def close(self) -> None:
        """Unmap the support memory (the slot itself goes with the VM)."""
        self.memory.unmap()


class GuestCpu:
    """A vCPU that runs one program at a time and reports by port I/O."""

    def __init__(self, machine: GuestMachine, vcpu: Vcpu, mode: Mode = Mode.USER) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.mode = mode
        set_supported_cpuid(vcpu)
        self._set_mode()

    def _set_mode(self) -> None:
        answer, sregs = self.vcpu.raw.get_sregs()
        _must("KVM_GET_SREGS", answer)
        if self.mode is Mode.REAL:
            sregs.cs.base, sregs.cs.selector = 0, 0
        else:
            _set_long_mode(sregs, self.machine, 3 if self.mode is Mode.USER else 0)
            if self.mode is Mode.COMPATIBILITY:
                sregs.cs.l, sregs.cs.db = 0, 1
        _must("KVM_SET_SREGS", self.vcpu.raw.set_sregs(sregs))

    def set_page_tables(self, root: int) -> None:
        """Use the page tables whose root lies at this guest physical address (CR3)."""
        answer, sregs = self.vcpu.raw.get_sregs()
        _must("KVM_GET_SREGS", answer)
        sregs.cr3 = root
        _must("KVM_SET_SREGS", self.vcpu.raw.set_sregs(sregs))

    def set_interrupt_table(self, base: int, limit: int = 0xFFF) -> None:
        """Let the processor look for its interrupt descriptor table at a linear address (IDTR)."""
        answer, sregs = self.vcpu.raw.get_sregs()
        _must("KVM_GET_SREGS", answer)
        sregs.idt = {"base": base, "limit": limit}
        _must("KVM_SET_SREGS", self.vcpu.raw.set_sregs(sregs))

    def set_msr(self, index: int, value: int) -> Answer:
        """Set a model specific register (KVM_SET_MSRS, api.rst 4.19): 1 if it was set, 0 if the vCPU refuses it."""
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": 1, "entries": 1})
        msrs.entries[0] = {"index": index, "data": value}
        return self.vcpu.raw.ioctl_struct(lib.KVM_SET_MSRS, msrs)

    def start(self, program: str | int, **registers: int) -> None:
        """Point the vCPU at a program (or an address) with these registers, all others zero."""
        rip = self.machine.entry(program) if isinstance(program, str) else program
        iopl = RFLAGS_IOPL3 if self.mode is Mode.USER else 0
        regs = ffi.new("struct kvm_regs *", {"rip": rip, "rflags": RFLAGS_FIXED | iopl, **registers})
        _must("KVM_SET_REGS", self.vcpu.raw.set_regs(regs))

    def registers(self) -> Registers:
        """The general registers as they stand."""
        answer, regs = self.vcpu.raw.get_regs()
        _must("KVM_GET_REGS", answer)
        return Registers(regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rip)

    def run(self, timeout: float = RUN_LIMIT) -> RunResult:
        """One KVM_RUN of the program that was started."""
        return self.vcpu.raw.run(timeout)

    def running(self, timeout: float = RUN_LIMIT) -> RunningVcpu:
        """The program that was started, in a thread."""
        return self.vcpu.running(timeout)

    def attempt(self, program: str | int, timeout: float = RUN_LIMIT, **registers: int) -> RunResult:
        """Start a program and run it once: whatever comes of it."""
        self.start(program, **registers)
        return self.run(timeout)

    def call(self, program: str | int, timeout: float = RUN_LIMIT, **registers: int) -> Registers:
        """Start a program and wait for its report; raises `GuestError` at any other exit."""
        return self.finish(self.attempt(program, timeout, **registers))

    def answer_mmio(self, data: int) -> RunResult:
        """Complete a pending MMIO read with this value, little endian, and run on.

        Before that the registers must not be touched: the next KVM_RUN finishes the old instruction (api.rst section 5).
        """
        self.vcpu.kvm_run.mmio.data = data.to_bytes(8, "little")
        return self.run()

    def finish(self, result: RunResult) -> Registers:
        """The registers of a run that must have ended in a report; raises `GuestError` otherwise."""
        if result.answer != 0 or not is_report(result):
            raise GuestError(result, self.vcpu.where())
        return self.registers()

    def load(self, gva: int, width: int = 8) -> int:
        """What the guest reads at `gva`."""
        return self.call(f"load{width}", rdi=gva).rax

    def store(self, gva: int, value: int, width: int = 8) -> None:
        """Let the guest write `value` at `gva`."""
        self.call(f"store{width}", rdi=gva, rsi=value)

    def try_load(self, gva: int, width: int = 8) -> RunResult:
        """One attempt of the guest to read at `gva`."""
        return self.attempt(f"load{width}", rdi=gva)

    def try_store(self, gva: int, value: int, width: int = 8) -> RunResult:
        """One attempt of the guest to write at `gva`."""
        return self.attempt(f"store{width}", rdi=gva, rsi=value)

    def stamp(self, gva: int, first: int, count: int, step: int = 4096) -> None:
        """Store first, first+1, ... at `count` addresses `step` bytes apart."""
        self.call("store_each", rdi=gva, rsi=first, rcx=count, rdx=step)

    def first_unstamped(self, gva: int, first: int, count: int, step: int = 4096) -> int | None:
        """The index of the first address that does not hold its stamp; None if all do."""
        left = self.call("check_each", rdi=gva, rsi=first, rcx=count, rdx=step).rcx
        return count - left if left else None

    def first_not(self, value: int, gva: int, count: int, step: int = 4096) -> int | None:
        """The index of the first of `count` addresses that does not hold `value`; None if all do."""
        left = self.call("check_same", rdi=gva, rsi=value, rcx=count, rdx=step).rcx
        return count - left if left else None

    def close(self) -> None:
        """Close the vCPU."""
        self.vcpu.close()


class GuestError(Exception):
    """The guest did not do what it was asked to: the run's result says what happened instead."""

    def __init__(self, result: RunResult, where: str) -> None:
        ended = "no exit before the deadline" if result.expired else f"{result.answer!r} with {result.exit}"
        super().__init__(f"KVM_RUN: {ended}; {where}")
        self.result = result


def is_report(result: RunResult) -> bool:
    """Whether a run ended with a program's report."""
    return isinstance(result.exit, IoExit) and result.exit.port == REPORT_PORT


def hypercall_program(backend: str) -> str:
    """The program with the hypercall instruction that the vendor's processors know; kvm-pvm takes AMD's."""
    return "vmcall" if backend == "kvm_intel" else "vmmcall"


def set_supported_cpuid(vcpu: Vcpu) -> None:
    """Give the vCPU everything that KVM supports (KVM_SET_CPUID2, api.rst 4.64); long mode needs its bit."""
    _must("KVM_SET_CPUID2", vcpu.raw.ioctl_struct(lib.KVM_SET_CPUID2, _supported_cpuid()))


@cache
def max_gpa_bits(paging: str) -> int:
    """Width of the largest guest physical address that a slot may have (x86: mmu.h:kvm_mmu_max_gfn).

    With `paging` "tdp" it is the host's MAXPHYADDR, which CPUID leaf 0x80000008 passes on; shadow paging allows all 52 bits.
    """
    if paging != "tdp":
        return 52
    cpuid = _supported_cpuid()
    found = (cpuid.entries[i] for i in range(cpuid.nent))
    return next((int(entry.eax & 0xFF) for entry in found if entry.function == 0x8000_0008), 36)


@cache
def _supported_cpuid() -> Any:
    from kvmgmem.kvm import Kvm

    room = 256
    cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
    with Kvm.open() as kvm:
        _must("KVM_GET_SUPPORTED_CPUID", ioctl_struct(kvm.fileno(), lib.KVM_GET_SUPPORTED_CPUID, cpuid))
    return cpuid


def _set_long_mode(sregs: Any, machine: GuestMachine, cpl: int) -> None:
    # The base too: cffi leaves alone what is not named, and at reset the code segment's is 0xffff0000.
    flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "dpl": cpl, "s": 1, "g": 1}
    code = {**flat, "selector": 0x30 | cpl, "type": 11, "l": 1}
    data = {**flat, "selector": 0x28 | cpl, "type": 3, "db": 1}
    sregs.cs = code
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.tr = {"base": machine.tss, "limit": TSS_LIMIT, "selector": 0x40, "type": 11, "present": 1}
    sregs.cr0 = CR0_LONG
    sregs.cr3 = machine.cr3
    sregs.cr4 = CR4_PAE
    sregs.efer = EFER_LONG


def _must(call: str, answer: Answer) -> None:
    if isinstance(answer, Errno):
        raise KvmError(call, "", answer)
