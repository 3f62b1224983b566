"""GM-CAP: what KVM says of itself, and whether it keeps its word."""

import pytest

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Attribute, Cap, GmemFlag, VmType
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host, kernel_config
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.testing import contract, gmem_kinds, requires
from kvmgmem.testing.fixtures import GPA
from kvmgmem.vm import Vm

ALL_FLAGS = GmemFlag.MMAP | GmemFlag.INIT_SHARED
HC_MAP_GPA_RANGE = 1 << lib.KVM_HC_MAP_GPA_RANGE
U64_MAX = 0xFFFF_FFFF_FFFF_FFFF

# Every capability of guest memory; those that KVM_ENABLE_CAP could take are not among them.
MEMORY_CAPS = (
    Cap.USER_MEMORY2,
    Cap.MEMORY_FAULT_INFO,
    Cap.MEMORY_ATTRIBUTES,
    Cap.GUEST_MEMFD,
    Cap.VM_TYPES,
    Cap.PRE_FAULT_MEMORY,
    Cap.GUEST_MEMFD_FLAGS,
)

ANY_TYPE = [
    pytest.param(vm_type, id=vm_type.label, marks=() if vm_type is VmType.DEFAULT else requires(vm_type.label))
    for vm_type in VmType
]
PROTECTED_STATE = (VmType.SEV_ES, VmType.SNP, VmType.TDX)


def config_has(option: str, otherwise: bool) -> bool:
    """Whether the kernel was built with an option; `otherwise` if its configuration cannot be read."""
    config = kernel_config()
    return otherwise if config is None else f"\nCONFIG_{option}=y" in config


def plain_slot(memory: Mapping, slot: int = 0, as_id: int = 0) -> MemoryRegion:
    """One page of ordinary memory."""
    return MemoryRegion(slot, GPA, PAGE_SIZE, memory.address, as_id=as_id)


@contract("GM-CAP-001")
@pytest.mark.parametrize("type_", ANY_TYPE)
def test_guest_memfd_is_there_for_every_type(kvm: Kvm, type_: VmType) -> None:
    """KVM_CAP_GUEST_MEMFD is 1 for KVM as a whole and for VMs of every type, and a gmem can be bound where it is 1."""
    assert kvm.check_extension(Cap.GUEST_MEMFD) == 1
    with kvm.create_vm(type_) as vm, vm.create_guest_memfd(PAGE_SIZE) as gmem:
        # Linux 6.8 to 6.17 said 0 for VMs without private memory, which could create a gmem but not bind it. 6.18 gave it to
        # every type, and brought KVM_CAP_GUEST_MEMFD_FLAGS.
        before_618 = not kvm.check_extension(Cap.GUEST_MEMFD_FLAGS)
        offered = not before_618 or type_.has_private_memory
        assert vm.check_extension(Cap.GUEST_MEMFD) == int(offered)
        with Mapping.anonymous(PAGE_SIZE) as memory:
            request = plain_slot(memory)
            assert vm.raw.set_region(request) == OK
            vm.delete_region(slot=0)
            assert vm.raw.set_region(request.but(gmem=gmem)) == (OK if offered else Errno.EINVAL)


@contract("GM-CAP-002")
@requires(cap=Cap.GUEST_MEMFD_FLAGS)
def test_system_lists_every_flag(kvm: Kvm) -> None:
    """On /dev/kvm KVM_CAP_GUEST_MEMFD_FLAGS lists every creation flag: MMAP and INIT_SHARED."""
    assert kvm.check_extension(Cap.GUEST_MEMFD_FLAGS) == ALL_FLAGS


@contract("GM-CAP-003", "GM-CAP-004")
@requires(cap=Cap.GUEST_MEMFD_FLAGS)
@pytest.mark.parametrize("type_", ANY_TYPE)
def test_vm_lists_the_flags_of_its_type(kvm: Kvm, type_: VmType) -> None:
    """A VM lists both creation flags, or MMAP alone if its type has private memory; the system scope lists both anyway."""
    with kvm.create_vm(type_) as vm:
        assert vm.gmem_flags() == (GmemFlag.MMAP if type_.has_private_memory else ALL_FLAGS)
        assert kvm.check_extension(Cap.GUEST_MEMFD_FLAGS) == ALL_FLAGS


@contract("GM-CAP-005")
def test_user_memory2_is_always_there(kvm: Kvm, vm: Vm) -> None:
    """KVM_CAP_USER_MEMORY2 is 1 at both scopes, and the ioctl takes a region."""
    assert kvm.check_extension(Cap.USER_MEMORY2) == 1
    assert vm.check_extension(Cap.USER_MEMORY2) == 1
    with Mapping.anonymous(PAGE_SIZE) as memory:
        assert vm.raw.set_region(plain_slot(memory)) == OK


@contract("GM-CAP-006")
@requires("x86")
def test_memory_fault_info_is_unconditional(kvm: Kvm, vm: Vm) -> None:
    """KVM_CAP_MEMORY_FAULT_INFO is 1 at both scopes, for VMs without private memory too."""
    assert kvm.check_extension(Cap.MEMORY_FAULT_INFO) == 1
    assert vm.check_extension(Cap.MEMORY_FAULT_INFO) == 1


@contract("GM-CAP-007")
def test_memory_attributes_of_the_system(kvm: Kvm, vm: Vm) -> None:
    """On /dev/kvm KVM_CAP_MEMORY_ATTRIBUTES is PRIVATE if attributes are compiled in; else 0, and the ioctl is ENOTTY."""
    attributes = kvm.check_extension(Cap.MEMORY_ATTRIBUTES)
    assert attributes in (Attribute.PRIVATE, 0)
    assert bool(attributes) == config_has("KVM_GENERIC_MEMORY_ATTRIBUTES", otherwise=bool(attributes))
    assert vm.raw.set_attributes(GPA, PAGE_SIZE, 0) == (OK if attributes else Errno.ENOTTY)


@contract("GM-CAP-008")
@requires("attributes")
@pytest.mark.parametrize("type_", ANY_TYPE)
def test_memory_attributes_of_a_vm(kvm: Kvm, type_: VmType) -> None:
    """A VM has the PRIVATE attribute if its type has private memory, and none otherwise, whatever the system scope says."""
    assert kvm.check_extension(Cap.MEMORY_ATTRIBUTES) == Attribute.PRIVATE
    with kvm.create_vm(type_) as vm:
        private = type_.has_private_memory
        assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == (Attribute.PRIVATE if private else 0)
        assert vm.raw.set_attributes(GPA, PAGE_SIZE, 0) == OK
        assert vm.raw.set_attributes(GPA, PAGE_SIZE, Attribute.PRIVATE) == (OK if private else Errno.EINVAL)


@contract("GM-CAP-009")
def test_vm_types_at_both_scopes(kvm: Kvm, vm: Vm) -> None:
    """KVM_CAP_VM_TYPES always has the default type's bit, and a VM of any type gives the same bitmap as /dev/kvm."""
    bitmap = kvm.check_extension(Cap.VM_TYPES)
    assert bitmap & 1 << VmType.DEFAULT
    assert vm.check_extension(Cap.VM_TYPES) == bitmap


@contract("GM-CAP-010")
@requires("x86")
@gmem_kinds("gM")
def test_prefault_is_two_dimensional_paging(kvm: Kvm, host: Host, vm: Vm, gmem: GuestMemfd) -> None:
    """KVM_CAP_PRE_FAULT_MEMORY is 1 with EPT or NPT and 0 with shadow paging; where it is 0 the ioctl is EOPNOTSUPP."""
    # The module's parameter is an oracle of its own. kvm_pvm has none: it is always shadow paging.
    parameter = {"kvm_amd": "kvm_amd.npt", "kvm_intel": "kvm_intel.ept"}.get(host.backend, "")
    two_dimensional = host.parameters.get(parameter) in ("Y", "1")
    assert kvm.check_extension(Cap.PRE_FAULT_MEMORY) == int(two_dimensional)
    assert vm.check_extension(Cap.PRE_FAULT_MEMORY) == int(two_dimensional)
    vm.bind(gmem, gpa=GPA)
    with vm.create_vcpu() as vcpu:
        answer, gpa, size = vcpu.raw.pre_fault(GPA, PAGE_SIZE)
        wanted = (OK, GPA + PAGE_SIZE, 0) if two_dimensional else (Errno.ENOTSUP, GPA, PAGE_SIZE)
        assert (answer, gpa, size) == wanted


@contract("GM-CAP-011")
@requires("snp")
def test_prefault_cap_of_an_unfinished_snp_vm(kvm: Kvm) -> None:
    """An SNP VM says that it can prefault before it is finalised, when the ioctl still is EOPNOTSUPP."""
    with kvm.create_vm(VmType.DEFAULT) as plain:
        assert prefault_one_page(plain) == (1, OK)
    with kvm.create_vm(VmType.SNP) as vm:
        sev = ffi.new("struct kvm_sev_init *")
        command = ffi.new("struct kvm_sev_cmd *", {"id": lib.KVM_SEV_INIT2, "data": entry.address_of(sev)})
        assert vm.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, command) == OK
        assert prefault_one_page(vm) == (1, Errno.ENOTSUP)


def prefault_one_page(vm: Vm) -> tuple[int, Answer]:
    """The capability, and what prefaulting a page of a new gmem answers."""
    with vm.create_guest_memfd(PAGE_SIZE, GmemFlag.MMAP) as gmem, vm.create_vcpu() as vcpu:
        vm.bind(gmem, gpa=GPA)
        return vm.check_extension(Cap.PRE_FAULT_MEMORY), vcpu.raw.pre_fault(GPA, PAGE_SIZE)[0]


@contract("GM-CAP-011")
@requires("tdx")
def test_prefault_cap_of_an_unfinished_tdx_vm(kvm: Kvm) -> None:
    """A TDX VM says that it can prefault before it is finalised, when it cannot even have a vCPU to prefault with."""
    # A vCPU needs KVM_TDX_INIT_VM first (tdx:tdx_vcpu_create, EIO); prefault is per vCPU.
    with kvm.create_vm(VmType.DEFAULT) as plain:
        assert prefault_one_page(plain) == (1, OK)
    with kvm.create_vm(VmType.TDX) as vm:
        assert vm.check_extension(Cap.PRE_FAULT_MEMORY) == 1
        assert vm.raw.create_vcpu() == Errno.EIO


@contract("GM-CAP-012")
@requires("x86")
def test_address_spaces_of_the_system(kvm: Kvm) -> None:
    """On /dev/kvm KVM_CAP_MULTI_ADDRESS_SPACE is 2 if SMM is compiled in; else 0, and there is no second address space."""
    spaces = kvm.check_extension(Cap.MULTI_ADDRESS_SPACE)
    assert spaces in (2, 0)
    assert bool(spaces) == config_has("KVM_SMM", otherwise=bool(spaces))
    if kvm.check_extension(Cap.X86_SMM):
        assert spaces == 2
    with kvm.create_vm() as vm, Mapping.anonymous(PAGE_SIZE) as memory:
        assert vm.check_extension(Cap.MULTI_ADDRESS_SPACE) == spaces
        assert vm.raw.set_region(plain_slot(memory)) == OK
        assert vm.raw.set_region(plain_slot(memory, as_id=1)) == (OK if spaces else Errno.EINVAL)


@contract("GM-CAP-013")
@requires("smm")
@pytest.mark.parametrize("type_", ANY_TYPE)
def test_address_spaces_of_a_vm(kvm: Kvm, type_: VmType) -> None:
    """A VM has two address spaces, or one if its type has private memory, and takes slots in exactly those."""
    spaces = 1 if type_.has_private_memory else 2
    with kvm.create_vm(type_) as vm, Mapping.anonymous(PAGE_SIZE) as memory:
        assert vm.check_extension(Cap.MULTI_ADDRESS_SPACE) == spaces
        answers = [vm.raw.set_region(plain_slot(memory, as_id=as_id)) for as_id in range(3)]
        assert answers == [OK if as_id < spaces else Errno.EINVAL for as_id in range(3)]


@contract("GM-CAP-014")
def test_number_of_slots(kvm: Kvm, vm: Vm) -> None:
    """KVM_CAP_NR_MEMSLOTS is 32764 at both scopes, and the slot ids are those below it."""
    slots = 32764
    assert kvm.check_extension(Cap.NR_MEMSLOTS) == slots
    assert vm.check_extension(Cap.NR_MEMSLOTS) == slots
    with Mapping.anonymous(PAGE_SIZE) as memory:
        request = plain_slot(memory, slots - 1)
        assert vm.raw.set_region(request) == OK
        vm.delete_region(slots - 1)
        assert vm.raw.set_region(request.but(slot=slots)) == Errno.EINVAL


@contract("GM-CAP-015")
@pytest.mark.parametrize("type_", ANY_TYPE)
def test_readonly_memory_of_a_vm(kvm: Kvm, type_: VmType) -> None:
    """KVM_CAP_READONLY_MEM is 1 on /dev/kvm, and 0 for VMs with protected state, which refuse a read-only slot."""
    assert kvm.check_extension(Cap.READONLY_MEM) == 1
    offered = type_ not in PROTECTED_STATE
    with kvm.create_vm(type_) as vm, Mapping.anonymous(PAGE_SIZE) as memory:
        assert vm.check_extension(Cap.READONLY_MEM) == int(offered)
        request = plain_slot(memory)
        assert vm.raw.set_region(request) == OK
        vm.delete_region(slot=0)
        assert vm.raw.set_region(request.but(flags=lib.KVM_MEM_READONLY)) == (OK if offered else Errno.EINVAL)


@contract("GM-CAP-016")
@requires("x86")
def test_exit_hypercall_offers_map_gpa_range_only(kvm: Kvm, vm: Vm) -> None:
    """KVM_CAP_EXIT_HYPERCALL is the bit of HC_MAP_GPA_RANGE alone, and no other bit can be enabled."""
    assert HC_MAP_GPA_RANGE == 0x1000
    assert kvm.check_extension(Cap.EXIT_HYPERCALL) == HC_MAP_GPA_RANGE
    assert vm.check_extension(Cap.EXIT_HYPERCALL) == HC_MAP_GPA_RANGE
    answers = {bit: vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 1 << bit) for bit in range(64)}
    assert answers == {bit: OK if bit == lib.KVM_HC_MAP_GPA_RANGE else Errno.EINVAL for bit in range(64)}


@contract("GM-CAP-017")
@requires("x86")
def test_memory_caps_cannot_be_enabled(vm: Vm) -> None:
    """The capabilities of guest memory are answers only: KVM_ENABLE_CAP refuses each with EINVAL, on a VM and on a vCPU."""
    assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0) == OK
    refused = dict.fromkeys(MEMORY_CAPS, Errno.EINVAL)
    for argument in (0, 1, U64_MAX):
        assert {cap: vm.raw.enable_cap(cap, argument) for cap in MEMORY_CAPS} == refused
    with vm.create_vcpu() as vcpu:
        assert {cap: vcpu.raw.enable_cap(cap, 1) for cap in MEMORY_CAPS} == refused
    assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0) == OK


@contract("GM-CAP-018")
@requires("x86")
@pytest.mark.parametrize("cap", [Cap.VM_COPY_ENC_CONTEXT_FROM, Cap.VM_MOVE_ENC_CONTEXT_FROM], ids=["mirror", "move"])
def test_mirror_and_move_claim_to_be_there(kvm: Kvm, vm: Vm, cap: Cap) -> None:
    """Mirror and move are 1 on every x86 KVM; enabling them between VMs without encryption is EINVAL and harms neither."""
    assert kvm.check_extension(cap) == 1
    assert vm.check_extension(cap) == 1
    with kvm.create_vm(vm.type) as source:
        assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0) == OK
        assert vm.raw.enable_cap(cap, source.fileno()) == Errno.EINVAL
        assert vm.raw.enable_cap(cap, vm.fileno()) == Errno.EINVAL
        assert vm.check_extension(Cap.USER_MEMORY2) == 1
        assert source.check_extension(Cap.USER_MEMORY2) == 1


@contract("GM-CAP-019")
def test_unknown_capabilities_are_zero(kvm: Kvm, vm: Vm) -> None:
    """An unknown capability number is 0 and no error, and the number is looked at in full."""
    unknown = [99999, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 32 | Cap.USER_MEMORY2, 1 << 63 | Cap.USER_MEMORY2, U64_MAX]
    assert [kvm.raw.check_extension(cap) for cap in [Cap.USER_MEMORY2, *unknown]] == [1] + [0] * len(unknown)
    assert [vm.raw.check_extension(cap) for cap in [Cap.USER_MEMORY2, *unknown]] == [1] + [0] * len(unknown)


@contract("GM-CAP-020")
def test_gmem_answers_no_capability_query(vm: Vm, gmem: GuestMemfd) -> None:
    """A gmem has no ioctls of its own: KVM_CHECK_EXTENSION on it is ENOTTY, where its VM answers."""
    assert vm.raw.check_extension(Cap.GUEST_MEMFD) == 1
    assert entry.ioctl(gmem.fileno(), lib.KVM_CHECK_EXTENSION, Cap.GUEST_MEMFD) == Errno.ENOTTY
