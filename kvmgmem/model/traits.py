"""In what kernels differ, as far as the model cares: switches, each set by asking the kernel, never by its release."""

import dataclasses
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmgmem.abi import PAGE_SIZE, GiB, VmType
from kvmgmem.errors import Errno
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing.interruption import within
from kvmgmem.testing.waiting import TIME_SCALE

if TYPE_CHECKING:
    from kvmgmem.kvm import Kvm
    from kvmgmem.vm import Vm

GPA_BITS = range(36, 64)
HVA_BITS = (47, 56)
LOOP_SECONDS = 2.0


@dataclass(frozen=True)
class KernelTraits:
    """The switches. What depends on the VM's type maps the type's number to the value."""

    gmem_flags: dict[int, int]
    """The creation flags of a gmem that VMs of a type accept (GM-CRE-005, 007)."""
    spaces: dict[int, int]
    """Address spaces of slots: 2 with SMM, and 1 on VMs with private memory (GM-SLOT-008)."""
    attributes: dict[int, int | None]
    """The memory attributes that VMs of a type accept; None where the ioctl is ENOTTY (GM-ATTR-001, 002)."""
    prefault: bool
    """Whether KVM_PRE_FAULT_MEMORY works: two-dimensional paging (GM-PF-004)."""
    gpa_limit: int
    """Where guest physical addresses end (GM-SLOT-014)."""
    hva_limit: int
    """Where user addresses end (GM-SLOT-011)."""
    overlap: str
    """What binding a bound range of the file answers: EEXIST, or EINVAL before 7.2 (GM-BIND-014)."""
    limit_before_overlap: bool
    """Whether a slot beyond the limit of guest addresses is found before its file range is (GM-BIND-019, 7.3.2)."""
    noexec: bool
    """Whether an executable mapping is refused before all else (GM-MAP-004, since 6.16)."""
    prefault_ends: bool
    """Whether a prefault ends that comes after a slot was deleted; where it does not (B30), the model asks for none."""

    @property
    def vm_types(self) -> tuple[int, ...]:
        """The types of VM that can be created."""
        return tuple(sorted(self.gmem_flags))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "KernelTraits":
        """From a JSON object, whose keys are text."""
        fields = dict(data)
        for name in ("gmem_flags", "spaces", "attributes"):
            fields[name] = {int(vm_type): value for vm_type, value in fields[name].items()}
        return cls(**fields)


REFERENCE = KernelTraits(
    gmem_flags={0: 3, 1: 1},
    spaces={0: 2, 1: 1},
    attributes={0: 0, 1: 8},
    prefault=True,
    gpa_limit=1 << 48,
    hva_limit=(1 << 47) - PAGE_SIZE,
    overlap="EEXIST",
    limit_before_overlap=True,
    noexec=True,
    prefault_ends=True,
)
"""Linux 7.3.4 with software-protected VMs: for the model alone, where there is no kernel to ask."""


def probe() -> KernelTraits:
    """Ask the kernel under test; raises `HarnessError` without KVM."""
    from kvmgmem.kvm import Kvm

    gmem_flags: dict[int, int] = {}
    spaces: dict[int, int] = {}
    attributes: dict[int, int | None] = {}
    with Kvm.open() as kvm:
        for vm_type in (VmType.DEFAULT, VmType.SW_PROTECTED):
            vm = kvm.raw.create_vm(vm_type)
            if isinstance(vm, Errno):
                continue
            with vm:
                if not _binds(vm):
                    continue
                gmem_flags[int(vm_type)] = sum(1 << bit for bit in range(64) if _creates(vm, 1 << bit))
                spaces[int(vm_type)] = _spaces(vm)
                attributes[int(vm_type)] = _attributes(vm)
        with kvm.create_vm(min(gmem_flags, default=VmType.DEFAULT)) as vm:
            overlap, limit_first, noexec = _asked_of_a_gmem(vm) if gmem_flags else ("EEXIST", True, True)
            return KernelTraits(
                gmem_flags,
                spaces,
                attributes,
                _prefaults(vm),
                _gpa_limit(vm),
                _hva_limit(vm),
                overlap,
                limit_first,
                noexec,
                _prefault_ends(kvm),
            )


def _creates(vm: "Vm", flags: int) -> bool:
    gmem = vm.raw.create_guest_memfd(PAGE_SIZE, flags)
    if isinstance(gmem, Errno):
        return False
    gmem.close()
    return True


def _binds(vm: "Vm") -> bool:
    gmem = vm.raw.create_guest_memfd(PAGE_SIZE)
    if isinstance(gmem, Errno):
        return False
    with gmem:
        answer = vm.raw.set_region(MemoryRegion(gpa=GiB, size=PAGE_SIZE, gmem=gmem))
        return not isinstance(answer, Errno) and not isinstance(vm.raw.delete_region(0), Errno)


def _spaces(vm: "Vm") -> int:
    found = 0
    while found < 4 and vm.raw.set_region(MemoryRegion(gpa=GiB, size=PAGE_SIZE, as_id=found)) == 0:
        vm.delete_region(0, found)
        found += 1
    return found


def _attributes(vm: "Vm") -> int | None:
    if vm.raw.set_attributes(GiB, PAGE_SIZE, 0) == Errno.ENOTTY:
        return None
    found = sum(1 << bit for bit in range(64) if vm.raw.set_attributes(GiB, PAGE_SIZE, 1 << bit) == 0)
    vm.raw.set_attributes(GiB, PAGE_SIZE, 0)
    return found


def _prefaults(vm: "Vm") -> bool:
    with vm.create_vcpu() as vcpu:
        return vcpu.raw.pre_fault(GiB, PAGE_SIZE)[0] not in (Errno.ENOTSUP, Errno.ENOTTY, Errno.EINVAL)


def _gpa_limit(vm: "Vm") -> int:
    inside = 0
    for bits in GPA_BITS:
        answer = vm.raw.set_region(MemoryRegion(gpa=(1 << bits) - PAGE_SIZE, size=PAGE_SIZE))
        if answer == 0:
            vm.delete_region(0)
            inside = bits
    return 1 << inside


def _hva_limit(vm: "Vm") -> int:
    inside = 0
    for bits in HVA_BITS:
        top = (1 << bits) - PAGE_SIZE
        if vm.raw.set_region(MemoryRegion(gpa=GiB, size=PAGE_SIZE, hva=top - PAGE_SIZE)) == 0:
            vm.delete_region(0)
            inside = top
    return inside


def _asked_of_a_gmem(vm: "Vm") -> tuple[str, bool, bool]:
    with vm.create_guest_memfd(PAGE_SIZE) as gmem:
        whole = MemoryRegion(slot=1, gpa=GiB, size=PAGE_SIZE, gmem=gmem)
        vm.set_region(whole)
        overlap = vm.raw.set_region(whole.but(slot=2, gpa=2 * GiB))
        both = vm.raw.set_region(whole.but(slot=2, gpa=1 << 62))
        vm.delete_region(1)
        executable = gmem.raw.map(prot=mmap.PROT_EXEC)
    # A kernel that accepts the second binding has no right answer of its own: the contract's is what it is held against.
    return ("EINVAL" if overlap == Errno.EINVAL else "EEXIST"), both == Errno.EINVAL, executable == Errno.EPERM


def _prefault_ends(kvm: "Kvm") -> bool:
    """Asked with a timer beside it, whose signal ends what would not."""
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu, Mapping.anonymous(PAGE_SIZE) as memory:
        for slot in (0, 1):
            vm.set_region(MemoryRegion(slot, (slot + 1) * GiB, PAGE_SIZE, memory.address))
        vcpu.raw.pre_fault(GiB, PAGE_SIZE)  # now the vCPU has page tables
        vm.delete_region(0)
        return within(LOOP_SECONDS * TIME_SCALE, lambda: vcpu.raw.pre_fault(2 * GiB, PAGE_SIZE))[0] != Errno.EINTR
