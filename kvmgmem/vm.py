"""A VM: memory slots, guest_memfds, attributes and vCPUs are made through it, by the process that created it."""

from typing import Any

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import PAGE_SIZE, Cap, GmemFlag, VmType
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.memory import MemoryRegion
from kvmgmem.vcpu import Vcpu

U64 = 0xFFFF_FFFF_FFFF_FFFF
U32 = 0xFFFF_FFFF


class RawVm:
    """The kernel's answers on a VM, as values."""

    def __init__(self, vm: "Vm") -> None:
        self._vm = vm

    def ioctl(self, request: int, argument: int = 0) -> Answer:
        """Any ioctl with a numeric argument."""
        return entry.ioctl(self._vm.fileno(), request, argument)

    def ioctl_struct(self, request: int, pointer: Any) -> Answer:
        """Any ioctl with a cffi structure."""
        return entry.ioctl_struct(self._vm.fileno(), request, pointer)

    def check_extension(self, cap: int) -> Answer:
        """KVM_CHECK_EXTENSION at VM scope (api.rst 4.4)."""
        return self.ioctl(lib.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> Answer:
        """KVM_ENABLE_CAP on the VM (api.rst 4.37)."""
        request = ffi.new("struct kvm_enable_cap *", {"cap": cap, "flags": flags, "args": [a & U64 for a in args]})
        return self.ioctl_struct(lib.KVM_ENABLE_CAP, request)

    def create_guest_memfd(self, size: int, flags: int = 0, reserved: tuple[int, ...] = ()) -> GuestMemfd | Errno:
        """KVM_CREATE_GUEST_MEMFD (api.rst 4.142); `size` in bytes, `reserved` up to six words."""
        request = ffi.new(
            "struct kvm_create_guest_memfd *", {"size": size & U64, "flags": flags & U64, "reserved": list(reserved)}
        )
        answer = self.ioctl_struct(lib.KVM_CREATE_GUEST_MEMFD, request)
        return answer if isinstance(answer, Errno) else GuestMemfd(answer, size, flags)

    def set_region(self, region: MemoryRegion) -> Answer:
        """KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140)."""
        return self.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, region2(region))

    def set_region_v1(self, region: MemoryRegion) -> Answer:
        """KVM_SET_USER_MEMORY_REGION (api.rst 4.35): the 32-byte request without the gmem fields."""
        return self.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION, region1(region))

    def delete_region(self, slot: int, as_id: int = 0) -> Answer:
        """Delete a slot: KVM_SET_USER_MEMORY_REGION2 with size 0."""
        return self.set_region(MemoryRegion(slot=slot, as_id=as_id))

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> Answer:
        """KVM_SET_MEMORY_ATTRIBUTES (api.rst 4.141); `gpa` and `size` in bytes."""
        fields = {"address": gpa & U64, "size": size & U64, "attributes": attributes & U64, "flags": flags & U64}
        return self.ioctl_struct(lib.KVM_SET_MEMORY_ATTRIBUTES, ffi.new("struct kvm_memory_attributes *", fields))

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu | Errno:
        """KVM_CREATE_VCPU (api.rst 4.7)."""
        answer = self.ioctl(lib.KVM_CREATE_VCPU, vcpu_id)
        return answer if isinstance(answer, Errno) else Vcpu(answer, vcpu_id, self._vm.vcpu_mmap_size)

    def dirty_log(self, slot: int, pages: int, as_id: int = 0) -> bytes | Errno:
        """KVM_GET_DIRTY_LOG (api.rst 4.8): one bit per page, lowest first."""
        bitmap = ffi.new("uint64_t[]", (pages + 63) // 64)
        fields = {"slot": (slot | as_id << 16) & U32, "dirty_bitmap": entry.address_of(bitmap)}
        answer = self.ioctl_struct(lib.KVM_GET_DIRTY_LOG, ffi.new("struct kvm_dirty_log *", fields))
        return answer if isinstance(answer, Errno) else bytes(ffi.buffer(bitmap))

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes | None = None) -> Answer:
        """KVM_CLEAR_DIRTY_LOG (api.rst 4.117) for the pages whose bit is set; None: all."""
        size = (pages + 63) // 64 * 8
        bits = ffi.new("uint8_t[]", bitmap if bitmap is not None else b"\xff" * size)
        fields = {"slot": slot & U32, "num_pages": pages & U32, "first_page": first_page}
        fields["dirty_bitmap"] = entry.address_of(bits)
        return self.ioctl_struct(lib.KVM_CLEAR_DIRTY_LOG, ffi.new("struct kvm_clear_dirty_log *", fields))

    def create_irqchip(self) -> Answer:
        """KVM_CREATE_IRQCHIP (api.rst 4.24)."""
        return self.ioctl(lib.KVM_CREATE_IRQCHIP)

    def stats_fd(self) -> OwnedFd | Errno:
        """KVM_GET_STATS_FD (api.rst 4.133)."""
        answer = self.ioctl(lib.KVM_GET_STATS_FD)
        return answer if isinstance(answer, Errno) else OwnedFd(answer)


class Vm(OwnedFd):
    """A VM. Its ioctls answer EIO to every process but the one whose memory it was created with."""

    def __init__(self, fd: int, vm_type: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self.type = VmType(vm_type) if vm_type in VmType.__members__.values() else VmType.DEFAULT
        self.vcpu_mmap_size = vcpu_mmap_size
        self.raw = RawVm(self)

    def check_extension(self, cap: int) -> int:
        """The value of a capability for this VM, 0 if unknown; raises `KvmError`."""
        return _checked("KVM_CHECK_EXTENSION", str(cap), self.raw.check_extension(cap))

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Enable a capability; raises `KvmError`."""
        _checked("KVM_ENABLE_CAP", f"cap={cap}, args={args}, flags={flags:#x}", self.raw.enable_cap(cap, *args, flags=flags))

    def gmem_flags(self) -> GmemFlag:
        """The creation flags this VM offers: KVM_CAP_GUEST_MEMFD_FLAGS (6.18), none before."""
        return GmemFlag(self.check_extension(Cap.GUEST_MEMFD_FLAGS))

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """A new gmem of `size` bytes; raises `KvmError`."""
        gmem = self.raw.create_guest_memfd(size, flags)
        if isinstance(gmem, Errno):
            raise KvmError("KVM_CREATE_GUEST_MEMFD", f"size={size:#x}, flags={GmemFlag(flags)!r}", gmem)
        return gmem

    def set_region(self, region: MemoryRegion) -> None:
        """Create, change or delete a slot; raises `KvmError`."""
        _checked("KVM_SET_USER_MEMORY_REGION2", str(region), self.raw.set_region(region))

    def delete_region(self, slot: int, as_id: int = 0) -> None:
        """Delete a slot; raises `KvmError`."""
        _checked("KVM_SET_USER_MEMORY_REGION2", f"slot={slot}, as_id={as_id}, size=0", self.raw.delete_region(slot, as_id))

    def bind(
        self, gmem: GuestMemfd, *, slot: int = 0, gpa: int = 0, size: int = 0, offset: int = 0, hva: int = 0
    ) -> MemoryRegion:
        """Bind a range of a gmem to a new slot (size 0: from `offset` to its end); raises `KvmError`."""
        region = MemoryRegion(slot, gpa, size or gmem.size - offset, hva, gmem, offset)
        self.set_region(region)
        return region

    def set_private(self, gpa: int, size: int) -> None:
        """Mark a range of guest memory private; raises `KvmError`."""
        answer = self.raw.set_attributes(gpa, size, lib.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        _checked("KVM_SET_MEMORY_ATTRIBUTES", f"gpa={gpa:#x}, size={size:#x}, PRIVATE", answer)

    def set_shared(self, gpa: int, size: int) -> None:
        """Mark a range of guest memory shared; raises `KvmError`."""
        _checked("KVM_SET_MEMORY_ATTRIBUTES", f"gpa={gpa:#x}, size={size:#x}, 0", self.raw.set_attributes(gpa, size, 0))

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """A new vCPU; raises `KvmError`."""
        vcpu = self.raw.create_vcpu(vcpu_id)
        if isinstance(vcpu, Errno):
            raise KvmError("KVM_CREATE_VCPU", f"id={vcpu_id}", vcpu)
        return vcpu

    def dirty_pages(self, slot: int, pages: int, as_id: int = 0) -> set[int]:
        """The page numbers of the slot that its dirty log names, clearing them; raises `KvmError`."""
        bitmap = self.raw.dirty_log(slot, pages, as_id)
        if isinstance(bitmap, Errno):
            raise KvmError("KVM_GET_DIRTY_LOG", f"slot={slot}, pages={pages}", bitmap)
        return {page for page in range(pages) if bitmap[page // 8] >> page % 8 & 1}

    def stats_fd(self) -> OwnedFd:
        """The VM's binary statistics; raises `KvmError`."""
        stats = self.raw.stats_fd()
        if isinstance(stats, Errno):
            raise KvmError("KVM_GET_STATS_FD", "", stats)
        return stats


def region2(region: MemoryRegion) -> Any:
    """The request as `struct kvm_userspace_memory_region2`."""
    return ffi.new(
        "struct kvm_userspace_memory_region2 *",
        {
            "slot": region.slot_word,
            "flags": region.flag_word & U32,
            "guest_phys_addr": region.gpa & U64,
            "memory_size": region.size & U64,
            "userspace_addr": region.hva & U64,
            "guest_memfd_offset": region.gmem_offset & U64,
            "guest_memfd": region.gmem_number,
            "pad1": region.pad1,
            "pad2": [region.pad2] * 14,
        },
    )


def region1(region: MemoryRegion) -> Any:
    """The request as `struct kvm_userspace_memory_region`."""
    return ffi.new(
        "struct kvm_userspace_memory_region *",
        {
            "slot": region.slot_word,
            "flags": region.flag_word & U32,
            "guest_phys_addr": region.gpa & U64,
            "memory_size": region.size & U64,
            "userspace_addr": region.hva & U64,
        },
    )


def _checked(call: str, arguments: str, answer: Answer) -> int:
    if isinstance(answer, Errno):
        raise KvmError(call, arguments, answer)
    return answer


__all__ = ["PAGE_SIZE", "RawVm", "Vm", "region1", "region2"]
