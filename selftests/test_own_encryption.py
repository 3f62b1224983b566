"""GM-OWN: VMs that share or take over an encryption key do not share the gmem (C26 to C29)."""

from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, VmType
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.testing import (
    contract,
    gmem_kinds,
    known_bug,
    requires,
    vm_types,
)
from kvmgmem.testing.encryption import encrypt, mirror, move
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.strangers import complaints_about
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vm import Vm


@contract("C26")
@requires("sev", "debugfs")
def test_mirror_does_not_inherit_gmem(kvm: Kvm) -> None:
    """A mirror shares its owner's encryption key but not its gmem: to the file it is just another VM."""
    with kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as helper, kvm.create_vm(VmType.SEV) as third:
        encrypt(vm)
        directory, helpers = VmDirectory.of(vm), VmDirectory.of(helper)
        with vm.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem:
            assert mirror(helper, vm) == OK
            assert complaints_about(helper, gmem, "the mirror") == []
            assert mirror(third, helper) == Errno.EINVAL
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)) == OK
        vm.close()
        assert directory.exists  # the mirror holds its owner, and with it the key
        helper.close()
        helpers.wait_gone()
        directory.wait_gone()


@contract("C27", "C2")
@requires("sev", "debugfs")
def test_move_does_not_move_the_gmem(kvm: Kvm) -> None:
    """Moving a VM's encryption to another leaves its gmem with the dead source, which it goes on pinning."""
    with kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as target:
        encrypt(vm)
        directory = VmDirectory.of(vm)
        with vm.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem:
            assert vm.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)) == OK
            assert move(target, vm) == OK
            assert vm.raw.check_extension(Cap.GUEST_MEMFD) == Errno.EIO
            assert vm.raw.delete_region(0) == Errno.EIO
            assert complaints_about(target, gmem, "the target") == []
            assert gmem.raw.allocate(0, 2 * PAGE_SIZE) == OK
            assert gmem.raw.punch(0, PAGE_SIZE) == OK
            assert gmem.allocated_pages() == 1
            vm.close()
            assert directory.exists
        directory.wait_gone()


@contract("C28")
@requires("x86")
@vm_types("default")
@gmem_kinds("g0")
def test_mirror_and_move_are_refused_without_encryption(kvm: Kvm, vm: Vm, gmem: GuestMemfd) -> None:
    """Without encryption there is nothing to mirror or move: EINVAL for every VM, and no effect on either.

    A kernel with CONFIG_KVM_AMD_SEV on AMD looks at the descriptor first and answers EBADF for what is not a VM; one
    without, or any other vendor's, does not look (x86.c: kvm_vm_ioctl_enable_cap). The capability reads 1 on both.
    """
    assert vm.check_extension(Cap.VM_COPY_ENC_CONTEXT_FROM) == 1
    assert vm.check_extension(Cap.VM_MOVE_ENC_CONTEXT_FROM) == 1
    with kvm.create_vm() as other, other.create_vcpu() as vcpu:
        for act in (mirror, move):
            looks = act(vm, -1)
            assert looks in (Errno.EBADF, Errno.EINVAL)
            for not_a_vm in (kvm, gmem, vcpu, 0xFFFF):
                assert act(vm, not_a_vm) == looks
            assert act(vm, other) == Errno.EINVAL
            assert act(vm, vm) == Errno.EINVAL
        for survivor in (vm, other):
            assert survivor.raw.check_extension(Cap.GUEST_MEMFD) == 1
            with survivor.create_guest_memfd(SIZE) as own:
                assert survivor.raw.set_region(MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=own)) == OK


@contract("C29")
@requires("snp", "sev")
def test_snp_is_neither_mirrored_nor_moved(kvm: Kvm) -> None:
    """An SNP VM can be the source of neither a mirror nor a move."""
    for act in (mirror, move):
        with kvm.create_vm(VmType.SEV) as plain, kvm.create_vm(VmType.SEV) as accepted:
            encrypt(plain)
            assert act(accepted, plain) == OK  # the control: only the type differs
        with kvm.create_vm(VmType.SNP) as vm, kvm.create_vm(VmType.SNP) as target:
            encrypt(vm)
            known_bug("B15").expect(act(target, vm), Errno.EINVAL, shows=OK)
