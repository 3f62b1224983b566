"""Nested guests on AMD: a vCPU put into one from outside, and a guest that starts one of its own with VMRUN.

The VMCB's layout is that of the AMD64 manual, volume 2, appendix B; the state's that of api.rst 4.114.
"""

import struct

from kvmgmem.abi import PAGE_SIZE
from kvmgmem.arch.x86_64 import CR0_LONG, CR4_PAE, EFER_LONG, GuestCpu, GuestMachine
from kvmgmem.exits import RunResult

KVM_SET_NESTED_STATE = 0x4080_AEBF
EFER_SVME = 1 << 12
VMEXIT_VMMCALL = 0x81
EXIT_CODE_AT = 0x70  # EXITCODE in a VMCB

_FORMAT_SVM = 1
_GUEST_MODE = 1 << 0
_GIF_SET = 1 << 8
_MSR_VM_HSAVE_PA = 0xC001_0117
_SAVE = 0x400  # where the state save area begins in a VMCB
_INTERCEPT_VMRUN_VMMCALL = 1 << 0 | 1 << 1
_CODE64 = 0x29B  # type 11, S, present, L: a code segment's attributes as the VMCB packs them
_DATA = 0xC93  # type 3, S, present, D, G

NOT_NESTED = struct.pack("<HHI120x", _GIF_SET, _FORMAT_SVM, 128)
"""The state of a vCPU that is in no nested guest."""

# Room that GuestMachine leaves free in its slot.
_VMCB = 0xE_0000
_HOST_SAVE = 0xE_1000
_OUTER = 0xE_2000
_INNER = 0xE_3000
# mov rax, rdi; vmrun; mov eax, [rdi + 0x70]: the low half of EXITCODE; out 0x10, eax; back to the out.
_OUTER_PROGRAM = bytes.fromhex("4889f8 0f01d8 8b4770 e710 ebfc")
# vmmcall; hlt.
_INNER_PROGRAM = bytes.fromhex("0f01d9 f4")


def nested_state(machine: GuestMachine, *, nested_paging: bool) -> bytes:
    """A vCPU in a nested guest, for KVM_SET_NESTED_STATE."""
    vmcb = bytearray(PAGE_SIZE)
    struct.pack_into("<I", vmcb, 0x010, 1)  # intercept VMRUN
    struct.pack_into("<I", vmcb, 0x058, 1)  # ASID
    struct.pack_into("<Q", vmcb, 0x090, int(nested_paging))
    struct.pack_into("<Q", vmcb, 0x0B0, machine.cr3)  # root of the nested page tables
    # The save area is what the host of the nested guest goes on with.
    struct.pack_into("<Q", vmcb, _SAVE + 0x0D0, EFER_LONG | EFER_SVME)
    struct.pack_into("<QQQ", vmcb, _SAVE + 0x148, CR4_PAE, machine.cr3, CR0_LONG)
    struct.pack_into("<QQQ", vmcb, _SAVE + 0x160, 0x400, 0xFFFF_0FF0, 2)  # DR7, DR6, RFLAGS
    header = struct.pack("<Q112x", machine.gpa + _VMCB)
    size = 8 + len(header) + len(vmcb)
    return struct.pack("<HHI", _GUEST_MODE | _GIF_SET, _FORMAT_SVM, size) + header + bytes(vmcb)


def guest_vmcb(machine: GuestMachine) -> bytes:
    """A page that VMRUN takes: a nested guest in long mode at CPL 0 that makes a VMMCALL, which its host intercepts."""
    vmcb = bytearray(PAGE_SIZE)
    struct.pack_into("<I", vmcb, 0x010, _INTERCEPT_VMRUN_VMMCALL)
    struct.pack_into("<I", vmcb, 0x058, 1)  # ASID
    for at, attributes in ((0x00, _DATA), (0x10, _CODE64), (0x20, _DATA), (0x30, _DATA)):  # ES, CS, SS, DS
        struct.pack_into("<HHIQ", vmcb, _SAVE + at, 0x30 if attributes == _CODE64 else 0x28, attributes, 0xFFFF_FFFF, 0)
    struct.pack_into("<Q", vmcb, _SAVE + 0x0D0, EFER_LONG | EFER_SVME)
    struct.pack_into("<QQQ", vmcb, _SAVE + 0x148, CR4_PAE, machine.cr3, CR0_LONG)
    struct.pack_into("<QQQQ", vmcb, _SAVE + 0x160, 0x400, 0xFFFF_0FF0, 2, machine.gpa + _INNER)  # DR7, DR6, RFLAGS, RIP
    return bytes(vmcb)


class NestedHost:
    """A guest, at CPL 0, that can start a nested guest from a VMCB anywhere in its memory."""

    def __init__(self, cpu: GuestCpu) -> None:
        machine = cpu.machine
        machine.memory.write(_OUTER, _OUTER_PROGRAM)
        machine.memory.write(_INNER, _INNER_PROGRAM)
        self._cpu = cpu
        _, sregs = cpu.vcpu.raw.get_sregs()
        sregs.efer |= EFER_SVME
        assert cpu.vcpu.raw.set_sregs(sregs) == 0
        assert cpu.set_msr(_MSR_VM_HSAVE_PA, machine.gpa + _HOST_SAVE) == 1
        self.plain_vmcb = machine.gpa + _VMCB
        machine.memory.write(_VMCB, guest_vmcb(machine))

    def vmrun(self, gpa: int) -> RunResult:
        """Let the guest do VMRUN with the VMCB at `gpa` and report how its own guest ended (EXITCODE).

        There is no descriptor table: where VMRUN raises an exception, the run ends in a SHUTDOWN exit.
        """
        return self._cpu.attempt(self._cpu.machine.gpa + _OUTER, rdi=gpa)

    def exit_code(self, gpa: int) -> int:
        """The low half of EXITCODE that the guest finds at `gpa` after its VMRUN; raises `GuestError` if VMRUN fails."""
        return self._cpu.finish(self.vmrun(gpa)).rax
