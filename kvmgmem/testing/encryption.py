"""Encrypted VMs, made and launched step by step.

AMD SEV, SEV-ES and SEV-SNP: virt/kvm/x86/amd-memory-encryption.rst; Intel TDX: virt/kvm/x86/intel-tdx.rst (Linux 7.3).
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import PAGE_SIZE, Cap
from kvmgmem.errors import Answer, Errno
from kvmgmem.fd import OwnedFd
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

SEV_LAUNCH_UPDATE_VMSA = 4
SEV_POLICY_ES = 1 << 2
SNP_POLICY = 1 << 16 | 1 << 17  # SMT is allowed; and the bit that must be 1
_LAUNCH_START_SIZE = 40  # struct kvm_sev_launch_start (arch/x86/include/uapi/asm/kvm.h, Linux 7.3)


def mirror(vm: Vm, source: OwnedFd | int, flags: int = 0) -> Answer:
    """Make `vm` a mirror of the source (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, api.rst section 7)."""
    return vm.raw.enable_cap(Cap.VM_COPY_ENC_CONTEXT_FROM, _number(source), flags=flags)


def move(vm: Vm, source: OwnedFd | int, flags: int = 0) -> Answer:
    """Move the source's encryption to `vm` (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, api.rst section 7)."""
    return vm.raw.enable_cap(Cap.VM_MOVE_ENC_CONTEXT_FROM, _number(source), flags=flags)


def _number(source: OwnedFd | int) -> int:
    return source if isinstance(source, int) else source.fileno()


@contextmanager
def sev_device() -> Iterator[int]:
    """The descriptor of /dev/sev; skips the test if it does not open."""
    try:
        device = OwnedFd(os.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"/dev/sev does not open: {os.strerror(error.errno or 0)}")
    with device:
        yield device.fileno()


def sev_command(vm: Vm, device: int, command: int, data: Any = ffi.NULL) -> Answer:
    """KVM_MEMORY_ENCRYPT_OP with a command and its structure."""
    fields = {"id": command, "data": entry.address_of(data), "sev_fd": device}
    return vm.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, ffi.new("struct kvm_sev_cmd *", fields))


def sev_init(vm: Vm, device: int) -> Answer:
    """KVM_SEV_INIT2 with all defaults: from then on the VM is encrypted."""
    return sev_command(vm, device, lib.KVM_SEV_INIT2, ffi.new("struct kvm_sev_init *"))


def encrypt(vm: Vm) -> None:
    """Make a SEV VM encrypted (KVM_SEV_INIT2); skips the test, saying what was answered, where that does not work.

    A KVM that offers such VMs may have no key left for one (EBUSY), or no firmware that hands one out.
    """
    with sev_device() as device:
        answer = sev_init(vm, device)
    if isinstance(answer, Errno):
        pytest.skip(f"KVM_SEV_INIT2 on a {vm.type.label} VM answers {answer.name}")


def sev_launch_start(vm: Vm, device: int, policy: int) -> Answer:
    """KVM_SEV_LAUNCH_START of a SEV or SEV-ES VM."""
    start = ffi.new("uint32_t[]", _LAUNCH_START_SIZE // 4)
    start[1] = policy
    return sev_command(vm, device, lib.KVM_SEV_LAUNCH_START, start)


def snp_launch_start(vm: Vm, device: int) -> Answer:
    """KVM_SEV_SNP_LAUNCH_START."""
    start = ffi.new("struct kvm_sev_snp_launch_start *", {"policy": SNP_POLICY})
    return sev_command(vm, device, lib.KVM_SEV_SNP_LAUNCH_START, start)


def snp_launch_finish(vm: Vm, device: int) -> Answer:
    """KVM_SEV_SNP_LAUNCH_FINISH: the guest may run."""
    return sev_command(vm, device, lib.KVM_SEV_SNP_LAUNCH_FINISH, ffi.new("struct kvm_sev_snp_launch_finish *"))


@dataclass(frozen=True)
class SnpUpdate:
    """A request to populate private memory: `gpa` and `size` in bytes, `source` an address in this process."""

    gpa: int
    source: int
    size: int = PAGE_SIZE
    type: int = lib.KVM_SEV_SNP_PAGE_TYPE_NORMAL
    flags: int = 0

    def but(self, **changes: int) -> "SnpUpdate":
        """The same request with some fields changed."""
        return replace(self, **changes)


def snp_update(vm: Vm, device: int, request: SnpUpdate) -> tuple[Answer, SnpUpdate]:
    """KVM_SEV_SNP_LAUNCH_UPDATE: the answer, and the request as the kernel left it."""
    fields = {"gfn_start": request.gpa // PAGE_SIZE, "uaddr": request.source, "len": request.size}
    raw = ffi.new("struct kvm_sev_snp_launch_update *", {**fields, "type": request.type, "flags": request.flags})
    answer = sev_command(vm, device, lib.KVM_SEV_SNP_LAUNCH_UPDATE, raw)
    return answer, SnpUpdate(raw.gfn_start * PAGE_SIZE, raw.uaddr, raw.len, raw.type, raw.flags)


def looks_at_descriptors(vm: Vm) -> bool:
    """Whether this KVM has SEV code: it then looks at the source of a mirror before anything else."""
    return mirror(vm, -1) == Errno.EBADF


TDX_GPA_BITS = 48
"""Width of a trust domain's addresses here; the upper half of them is shared memory."""

_CAP_SPLIT_IRQCHIP = 121
_CPUID_WIDTHS = 0x8000_0008
_XFAM_X87_SSE = 3
# struct kvm_tdx_capabilities: 256 words of which the second is supported_xfam, then a struct kvm_cpuid2.
_TDX_CAPABILITIES_SIZE = 8 * 256
_TDX_XFAM_AT = 8
_TDX_CPUIDS = 256


def tdx_command(of: Vm | Vcpu, command: int, data: Any = ffi.NULL) -> Answer:
    """KVM_MEMORY_ENCRYPT_OP of a TDX VM or vCPU with a command and its structure."""
    request = ffi.new("struct kvm_tdx_cmd *", {"id": command, "data": entry.address_of(data)})
    return of.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, request)


def tdx_init(vm: Vm) -> Answer:
    """KVM_TDX_INIT_VM with the fewest features: x87 and SSE, no attributes; what it needs before that is asserted."""
    vm.enable_cap(_CAP_SPLIT_IRQCHIP, 24)
    capabilities = ffi.new("char[]", _TDX_CAPABILITIES_SIZE + 8 + 40 * _TDX_CPUIDS)
    struct.pack_into("<I", ffi.buffer(capabilities), _TDX_CAPABILITIES_SIZE, _TDX_CPUIDS)
    assert tdx_command(vm, lib.KVM_TDX_CAPABILITIES, capabilities) == 0
    (xfam,) = struct.unpack_from("<Q", ffi.buffer(capabilities), _TDX_XFAM_AT)
    # struct kvm_tdx_init_vm: 256 bytes, then a struct kvm_cpuid2 of one entry.
    fields = struct.pack("<QQ240x", 0, xfam & _XFAM_X87_SSE)
    cpuid = struct.pack("<II", 1, 0) + struct.pack("<10I", _CPUID_WIDTHS, 0, 0, TDX_GPA_BITS << 16, 0, 0, 0, 0, 0, 0)
    return tdx_command(vm, lib.KVM_TDX_INIT_VM, ffi.new("char[]", fields + cpuid))


@dataclass(frozen=True)
class TdxRegion:
    """A request to populate a trust domain's memory: addresses in bytes, `source` in this process."""

    gpa: int
    source: int
    pages: int = 1

    def but(self, **changes: int) -> "TdxRegion":
        """The same request with some fields changed."""
        return replace(self, **changes)


def tdx_populate(vcpu: Vcpu, request: TdxRegion) -> tuple[Answer, TdxRegion]:
    """KVM_TDX_INIT_MEM_REGION: the answer, and the request as the kernel left it."""
    fields = {"source_addr": request.source, "gpa": request.gpa, "nr_pages": request.pages}
    raw = ffi.new("struct kvm_tdx_init_mem_region *", fields)
    answer = tdx_command(vcpu, lib.KVM_TDX_INIT_MEM_REGION, raw)
    return answer, TdxRegion(raw.gpa, raw.source_addr, raw.nr_pages)
