"""/dev/kvm: the system scope of KVM."""

import os
from pathlib import Path

from kvmgmem import entry
from kvmgmem._native import lib
from kvmgmem.abi import Cap, VmType
from kvmgmem.errors import Answer, Errno, HarnessError, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.vm import Vm

DEVICE = Path("/dev/kvm")


class RawKvm:
    """The kernel's answers on /dev/kvm, as values."""

    def __init__(self, kvm: "Kvm") -> None:
        self._kvm = kvm

    def api_version(self) -> Answer:
        """KVM_GET_API_VERSION (api.rst 4.1)."""
        return entry.ioctl(self._kvm.fileno(), lib.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> Answer:
        """KVM_CHECK_EXTENSION at system scope (api.rst 4.4)."""
        return entry.ioctl(self._kvm.fileno(), lib.KVM_CHECK_EXTENSION, cap)

    def create_vm(self, vm_type: int = VmType.DEFAULT) -> Vm | Errno:
        """KVM_CREATE_VM (api.rst 4.2) with any type value, 64 bits wide."""
        answer = entry.ioctl(self._kvm.fileno(), lib.KVM_CREATE_VM, vm_type)
        return answer if isinstance(answer, Errno) else Vm(answer, vm_type, self._kvm.vcpu_mmap_size)


class Kvm(OwnedFd):
    """An open /dev/kvm."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.raw = RawKvm(self)
        self._vcpu_mmap_size = 0

    @classmethod
    def open(cls, path: Path = DEVICE) -> "Kvm":
        """Open the device and check its API version; raises `HarnessError` with the remedy."""
        try:
            kvm = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError as error:
            raise HarnessError(
                f"there is no {path} on this machine",
                "load kvm_amd or kvm_intel, switch virtualisation on in the firmware, or run in a guest: kvmgmem vm",
            ) from error
        except PermissionError as error:
            raise HarnessError(f"no permission to open {path}", "join its group (usually `kvm`), or run as root") from error
        except OSError as error:
            raise HarnessError(
                f"{path} does not open: {os.strerror(error.errno or 0)}",
                "look into the kernel log for what kvm says, or run in a guest: kvmgmem vm",
            ) from error
        if entry.watcher is not None:
            entry.watcher.opened(str(path), kvm.fileno())
        version = kvm.raw.api_version()
        if version != lib.KVM_API_VERSION:
            kvm.close()
            raise HarnessError(
                f"{path} answers API version {version!r}, wanted {lib.KVM_API_VERSION}",
                "this is not a KVM that any kernel since 2.6.22 would offer; check what the device node points to",
            )
        return kvm

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes to map of a vCPU for its kvm_run (KVM_GET_VCPU_MMAP_SIZE, api.rst 4.5)."""
        if not self._vcpu_mmap_size:
            answer = entry.ioctl(self.fileno(), lib.KVM_GET_VCPU_MMAP_SIZE)
            if isinstance(answer, Errno):
                raise KvmError("KVM_GET_VCPU_MMAP_SIZE", "", answer)
            self._vcpu_mmap_size = answer
        return self._vcpu_mmap_size

    def check_extension(self, cap: int) -> int:
        """The value of a capability at system scope, 0 if unknown; raises `KvmError`."""
        answer = self.raw.check_extension(cap)
        if isinstance(answer, Errno):
            raise KvmError("KVM_CHECK_EXTENSION", _cap_name(cap), answer)
        return answer

    def create_vm(self, vm_type: int = VmType.DEFAULT) -> Vm:
        """A new VM of the given type; raises `KvmError`."""
        vm = self.raw.create_vm(vm_type)
        if isinstance(vm, Errno):
            raise KvmError("KVM_CREATE_VM", f"type={vm_type}", vm)
        return vm

    def vm_types(self) -> list[VmType]:
        """The VM types that this KVM offers; before 6.8 there is no bitmap and only the default type."""
        bitmap = self.check_extension(Cap.VM_TYPES) or 1
        return [vm_type for vm_type in VmType if bitmap & 1 << vm_type]


def _cap_name(cap: int) -> str:
    return Cap(cap).name if cap in Cap.__members__.values() else str(cap)
