"""Encrypted VMs: AMD SEV, SEV-ES and SEV-SNP (virt/kvm/x86/amd-memory-encryption.rst), made and launched step by step."""

import os
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
