"""A guest that starts as a TDX trust domain does, at the reset vector, and then looks at one page again and again.

It reports what it reads, stores its mark over it, and starts over. The report is TDG.VP.VMCALL for port output; with a plain
`out` in its place the same code runs in an ordinary VM, which is how it is tried without the hardware.
"""

import struct
from enum import Enum

from kvmgmem._native import ffi
from kvmgmem.abi import OK, PAGE_SIZE, MiB
from kvmgmem.arch.x86_64 import CR4_PAE, EFER_LONG, PTE_LARGE, PTE_PRESENT, PTE_WRITE
from kvmgmem.vcpu import Vcpu

MARK = 0x5EED_0001
LOOKED_AT = 0x4000_0000
"""The guest physical address of the page, without the bit that makes it shared."""

_CODE = 0xFFFF_F000  # its last bytes are the reset vector
_TABLES = _CODE - 4 * PAGE_SIZE
BOOT_GPA = _TABLES
BOOT_SIZE = 5 * PAGE_SIZE

# 32-bit: lgdt [_CODE + 0xc0]; cr4 |= PAE; cr3 = _TABLES; cr0 |= PG | PE (EFER.LME is set); far jump to the next part.
_START = bytes.fromhex("0f0115c0f0ffff 0f20e0 83c820 0f22e0 b800b0ffff 0f22d8 0f20c0 0d01000080 0f22c0 ea40f0ffff0800")
# 64-bit: edi = LOOKED_AT; again: r15d = [rdi]; [rdi] = MARK; then the registers of TDG.VP.VMCALL for `out` to port 0x10:
# eax = 0, ecx = mask of r10..r15, r10 = 0, r11 = 30 (I/O), r12 = 4 bytes, r13 = write, r14 = port; the report; to `again`.
_LOOK = bytes.fromhex(
    "bf00000040 448b3f c7070100ed5e 31c0 b900fc0000 4531d2 41bb1e000000 41bc04000000 41bd01000000 41be10000000"
)
_TDCALL = bytes.fromhex("660f01cc 90")
_OUT = bytes.fromhex("4489f8 e710")  # mov eax, r15d; out 0x10, eax
_AGAIN = bytes.fromhex("ebce")
_JUMP_TO_START = bytes.fromhex("e90bf0ffff")
_DESCRIPTORS = struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

_CR0_RESET = 0x21  # PE | NE, as the TDX module leaves it
_CR0_PG = 1 << 31
_EFER_LME = 1 << 8


def boot_image(shared_bit: int, *, trust_domain: bool) -> bytes:
    """What lies at `BOOT_GPA`: page tables, in which the page has `shared_bit` (0: none), and the code."""
    table = PTE_PRESENT | PTE_WRITE
    upper = [0] * 512
    upper[1], upper[3] = _TABLES + 3 * PAGE_SIZE | table, _TABLES + 2 * PAGE_SIZE | table
    last = [0] * 511 + [(1 << 32) - 2 * MiB | table | PTE_LARGE]
    page = [LOOKED_AT | shared_bit | table | PTE_LARGE] + [0] * 511
    words = [_TABLES + PAGE_SIZE | table, *[0] * 511, *upper, *last, *page]
    code = bytearray(PAGE_SIZE)
    parts = {
        0x000: _START,
        0x040: _LOOK + (_TDCALL if trust_domain else _OUT) + _AGAIN,
        0x0A0: _DESCRIPTORS,
        0x0C0: struct.pack("<HI", len(_DESCRIPTORS) - 1, _CODE + 0x0A0),
        0xFF0: _JUMP_TO_START,
    }
    for at, part in parts.items():
        code[at : at + len(part)] = part
    return struct.pack("<2048Q", *words) + bytes(code)


class Entry(Enum):
    """Where an ordinary vCPU begins, in place of a trust domain's: the value is the address."""

    RESET = _CODE + 0xFF0
    """The reset vector, in 32-bit code without paging."""
    LONG_MODE = _CODE + 0x040
    """Where the page is looked at, in 64-bit code."""


def start(vcpu: Vcpu, entry: Entry) -> None:
    """Let an ordinary vCPU begin there, in the state that a trust domain's is in; raises AssertionError."""
    long_mode = entry is Entry.LONG_MODE
    answer, sregs = vcpu.raw.get_sregs()
    assert answer == OK
    flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1}
    sregs.cs = {**flat, "type": 11, "selector": 8 if long_mode else 0, "l": long_mode, "db": not long_mode}
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, {**flat, "type": 3, "db": 1})
    # A trust domain's CR4 has no PAE yet, and without paging it is all the same. But QEMU (7.2 to 11.1) restores the host's
    # CR0 before its CR4: with EFER.LME and no PAE cpu_x86_update_cr0() leaves paging off, and the host's CPU is lost.
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_RESET, 0, CR4_PAE, _EFER_LME
    if long_mode:
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_RESET | _CR0_PG, _TABLES, CR4_PAE, EFER_LONG
    assert vcpu.raw.set_sregs(sregs) == OK
    assert vcpu.raw.set_regs(ffi.new("struct kvm_regs *", {"rip": entry.value, "rflags": 2})) == OK
