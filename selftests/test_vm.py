"""GM-VM: creating VMs, their types, and which process may use them."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, KiB, VmType
from kvmgmem.arch.x86_64 import REPORT_PORT, GuestCpu, GuestMachine, is_report, programs
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import IoExit
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host, kernel_config
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import LIMIT, in_child, spawn_python
from kvmgmem.testing import contract, gmem_kinds, makes_gmem, requires, vm_types, wait_until
from kvmgmem.testing.descriptor_limit import no_descriptors
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.kernel_log import KernelLog
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

# No ioctl of KVM has this number: _IO(0xAE, 0xfe).
UNKNOWN_IOCTL = 0xAEFE

# After a reset a vCPU has its SMRAM here (x86: kvm_vcpu_reset), saves its state at its end and starts at offset 0x8000.
SMBASE = 0x30000
SMRAM_SIZE = 64 * KiB
SMM_ENTRY = 0x8000
SMM_STATE = 0xFE00


def type_offered(kvm: Kvm, vm_type: int) -> bool:
    """Whether the bitmap of VM types has a bit for this value."""
    return vm_type < 32 and bool(kvm.check_extension(Cap.VM_TYPES) >> vm_type & 1)


def create_and_close(kvm: Kvm, vm_type: int) -> Answer:
    """0 if a VM of this type can be created and answers, else the errno."""
    vm = kvm.raw.create_vm(vm_type)
    if isinstance(vm, Errno):
        return vm
    with vm:
        assert vm.raw.check_extension(Cap.USER_MEMORY2) == 1
    return OK


def vm_answers(vm: Vm, gmem: GuestMemfd) -> dict[str, Answer]:
    """What some VM ioctls answer, the harmless ones included; nothing stays behind."""
    created = vm.raw.create_guest_memfd(PAGE_SIZE)
    answers: dict[str, Answer] = {
        "KVM_CHECK_EXTENSION": vm.raw.check_extension(Cap.USER_MEMORY2),
        "KVM_CREATE_GUEST_MEMFD": closed(created),
        "KVM_SET_USER_MEMORY_REGION2": vm.raw.set_region(MemoryRegion(slot=7, gpa=8 * GPA, size=gmem.size, gmem=gmem)),
        "KVM_SET_USER_MEMORY_REGION2, delete": vm.raw.delete_region(slot=7),
        "KVM_GET_STATS_FD": closed(vm.raw.stats_fd()),
        "KVM_ENABLE_CAP": vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0),
    }
    return answers


def vcpu_answers(vcpu: Vcpu) -> dict[str, Answer]:
    """What some vCPU ioctls answer; KVM_RUN with an immediate exit."""
    vcpu.kvm_run.immediate_exit = 1
    answers = {
        "KVM_RUN": vcpu.raw.ioctl(lib.KVM_RUN),
        "KVM_GET_REGS": vcpu.raw.get_regs()[0],
        "KVM_GET_SREGS": vcpu.raw.get_sregs()[0],
        "KVM_GET_MP_STATE": vcpu.raw.ioctl_struct(lib.KVM_GET_MP_STATE, ffi.new("struct kvm_mp_state *")),
    }
    vcpu.kvm_run.immediate_exit = 0
    return answers


def closed(created: OwnedFd | Errno) -> Answer:
    """0 for something that was created, which is closed, or the errno."""
    if isinstance(created, Errno):
        return created
    created.close()
    return OK


def all_eio(answers: dict[str, Answer]) -> dict[str, Answer]:
    """The same calls, every one of them refused with EIO."""
    return dict.fromkeys(answers, Errno.EIO)


WORKING_VM = {
    "KVM_CHECK_EXTENSION": 1,
    "KVM_CREATE_GUEST_MEMFD": OK,
    "KVM_SET_USER_MEMORY_REGION2": OK,
    "KVM_SET_USER_MEMORY_REGION2, delete": OK,
    "KVM_GET_STATS_FD": OK,
    "KVM_ENABLE_CAP": OK,
}
# An immediate exit is EINTR.
WORKING_VCPU = {"KVM_RUN": Errno.EINTR, "KVM_GET_REGS": OK, "KVM_GET_SREGS": OK, "KVM_GET_MP_STATE": OK}


@contract("GM-VM-001")
def test_every_advertised_type_can_be_created(kvm: Kvm) -> None:
    """A VM type whose bit is set in KVM_CAP_VM_TYPES can be created."""
    bitmap = kvm.check_extension(Cap.VM_TYPES)
    assert bitmap & 1, "the default type is always there"
    wanted = {vm_type: OK for vm_type in range(32) if bitmap >> vm_type & 1}
    assert {vm_type: create_and_close(kvm, vm_type) for vm_type in wanted} == wanted


@contract("GM-VM-002")
def test_unadvertised_type_is_refused(kvm: Kvm) -> None:
    """KVM_CREATE_VM of a type below 32 whose bit is not set in KVM_CAP_VM_TYPES is refused with EINVAL."""
    assert create_and_close(kvm, VmType.DEFAULT) == OK
    wanted = {vm_type: Errno.EINVAL for vm_type in range(32) if not type_offered(kvm, vm_type)}
    assert len(wanted) > 20, "no KVM offers that many types"
    assert {vm_type: create_and_close(kvm, vm_type) for vm_type in wanted} == wanted


@contract("GM-VM-003")
def test_types_from_32_to_63_are_refused(kvm: Kvm) -> None:
    """KVM_CREATE_VM refuses a type from 32 to 63 with EINVAL, also where the type modulo 32 exists."""
    assert create_and_close(kvm, 0) == OK  # the control for 32: bit 0 is set
    wanted = dict.fromkeys(range(32, 64), Errno.EINVAL)
    assert {vm_type: create_and_close(kvm, vm_type) for vm_type in wanted} == wanted


@contract("GM-VM-004")
def test_high_bits_of_a_type_are_not_masked(kvm: Kvm) -> None:
    """KVM_CREATE_VM looks at all 64 bits of the type: a valid one with a high bit set is refused with EINVAL."""
    for vm_type in kvm.vm_types():
        assert create_and_close(kvm, vm_type) == OK
        for high in (1 << 32, 1 << 33, 1 << 63, 0xFFFF_FFFF << 32):
            assert create_and_close(kvm, high | vm_type) == Errno.EINVAL, f"{high | vm_type:#x}"
    assert create_and_close(kvm, 0xFFFF_FFFF_FFFF_FFFF) == Errno.EINVAL


@contract("GM-VM-005")
def test_no_descriptor_is_reported_before_a_bad_type(kvm: Kvm) -> None:
    """KVM_CREATE_VM takes its descriptor before anything else: without one it is EMFILE, whatever the type."""
    bad_type = next(vm_type for vm_type in range(32) if not type_offered(kvm, vm_type))
    with no_descriptors():
        answers = [create_and_close(kvm, VmType.DEFAULT), create_and_close(kvm, bad_type)]
    assert answers == [Errno.EMFILE, Errno.EMFILE]
    assert [create_and_close(kvm, VmType.DEFAULT), create_and_close(kvm, bad_type)] == [OK, Errno.EINVAL]


@contract("GM-VM-006")
def test_vm_vcpu_and_statistics_are_close_on_exec(vm: Vm) -> None:
    """The descriptors of a VM, of a vCPU and of the statistics of both are close-on-exec from the start."""
    with vm.create_vcpu() as vcpu, vm.stats_fd() as vm_stats, vcpu.stats_fd() as vcpu_stats:
        flags = {name: fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) for name, fd in _named(vm, vcpu, vm_stats, vcpu_stats)}
    assert flags == dict.fromkeys(flags, fcntl.FD_CLOEXEC)


def _named(*fds: OwnedFd) -> list[tuple[str, OwnedFd]]:
    return list(zip(("VM", "vCPU", "VM statistics", "vCPU statistics"), fds, strict=True))


@contract("GM-VM-007")
def test_names_of_vm_and_vcpu_in_proc(vm: Vm) -> None:
    """/proc/PID/fd names a VM `anon_inode:kvm-vm` and a vCPU `anon_inode:kvm-vcpu:` with its id."""
    assert os.readlink(f"/proc/self/fd/{vm.fileno()}") == "anon_inode:kvm-vm"
    for vcpu_id in (0, 3, 200):
        with vm.create_vcpu(vcpu_id) as vcpu:
            assert os.readlink(f"/proc/self/fd/{vcpu.fileno()}") == f"anon_inode:kvm-vcpu:{vcpu_id}"


@contract("GM-VM-008")
def test_sw_protected_type_needs_its_option_and_the_tdp_mmu(kvm: Kvm, host: Host) -> None:
    """The software-protected type is offered if and only if the kernel has its option and uses the TDP MMU."""
    # x86: kvm_x86_vendor_init sets the bit for CONFIG_KVM_SW_PROTECTED_VM && tdp_mmu_enabled; the parameter `tdp_mmu` is
    # what was asked for, and counts with two-dimensional paging only (mmu:kvm_configure_mmu).
    tdp_mmu = host.tdp_mmu
    config = kernel_config()
    offered = type_offered(kvm, VmType.SW_PROTECTED)
    if config is None:
        assert not (offered and not tdp_mmu), "offered without the TDP MMU"
    else:
        assert offered == (tdp_mmu and "\nCONFIG_KVM_SW_PROTECTED_VM=y" in config)
    assert create_and_close(kvm, VmType.DEFAULT) == OK
    assert create_and_close(kvm, VmType.SW_PROTECTED) == (OK if offered else Errno.EINVAL)


@contract("GM-VM-009")
@gmem_kinds("g0")
def test_vm_of_another_process_answers_eio(vm: Vm, gmem: GuestMemfd) -> None:
    """A VM belongs to the memory descriptor that created it: in any other process every ioctl on it is EIO."""
    assert vm_answers(vm, gmem) == WORKING_VM
    assert in_child(lambda: vm_answers(vm, gmem)) == all_eio(WORKING_VM)
    assert in_child(lambda: vm.raw.ioctl(UNKNOWN_IOCTL)) == Errno.EIO
    assert vm_answers(vm, gmem) == WORKING_VM


@contract("GM-VM-010")
def test_vcpu_of_another_process_answers_eio(vm: Vm) -> None:
    """A vCPU belongs to the memory descriptor of its VM: in any other process every ioctl on it is EIO, KVM_RUN too."""
    with vm.create_vcpu() as vcpu:
        assert vcpu_answers(vcpu) == WORKING_VCPU
        assert in_child(lambda: vcpu_answers(vcpu)) == all_eio(WORKING_VCPU)
        assert vcpu_answers(vcpu) == WORKING_VCPU


# Argument: the VM, the gmem, then pairs of ioctl and argument for the VM. Prints one answer a line.
_AFTER_EXEC = """
import ctypes, fcntl, sys
vm, gmem, *calls = map(int, sys.argv[1:])
for request, argument in zip(calls[::2], calls[1::2]):
    try:
        print(fcntl.ioctl(vm, request, argument))
    except OSError as error:
        print(-error.errno)
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.fallocate(gmem, 1, ctypes.c_long(4096), ctypes.c_long(8192))
print(-ctypes.get_errno() if failed else 0)
"""


@contract("GM-VM-011")
@gmem_kinds("g0")
def test_exec_makes_a_vm_useless_and_leaves_gmem_usable(vm: Vm, gmem: GuestMemfd) -> None:
    """Exec brings a new memory descriptor: an inherited VM answers EIO, while an inherited gmem can be allocated."""
    calls = [
        (lib.KVM_CHECK_EXTENSION, Cap.USER_MEMORY2),
        (lib.KVM_GET_STATS_FD, 0),
        (lib.KVM_CREATE_VCPU, 0),
        (UNKNOWN_IOCTL, 0),
    ]
    vm.set_cloexec(False)
    arguments = [vm.fileno(), gmem.fileno(), *(int(number) for call in calls for number in call)]
    assert vm.raw.check_extension(Cap.USER_MEMORY2) == 1
    assert run_after_exec(_AFTER_EXEC, arguments) == [*[Errno.EIO] * len(calls), OK]
    assert vm.raw.check_extension(Cap.USER_MEMORY2) == 1
    assert (gmem.allocated_pages(), gmem.allocated_pages(PAGE_SIZE, 2 * PAGE_SIZE)) == (2, 2)


def run_after_exec(code: str, arguments: Sequence[int]) -> list[Answer]:
    """The numbers that a program prints which inherits our descriptors."""
    with spawn_python(code, *map(str, arguments)) as program:
        try:
            text, _ = program.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
    assert program.returncode == 0, f"{sys.executable} ended with {program.returncode}"
    return [entry.answer_of(int(line)) for line in text.split()]


def smram_slot(memory: Mapping) -> MemoryRegion:
    """A slot for SMRAM in the address space that a vCPU has in system management mode."""
    return MemoryRegion(slot=0, as_id=1, gpa=SMBASE, size=SMRAM_SIZE, hva=memory.address)


def write_smi_handler(memory: Mapping) -> None:
    """Put a handler into SMRAM that reports; in 16-bit code its `out` is two bytes wide, in the long-mode program four."""
    memory.write(SMM_ENTRY, programs()["report"])


def run_into_smm(cpu: GuestCpu) -> Answer | IoExit:
    """Send an SMI and run: the exit of the handler's report, or how the run failed."""
    cpu.start("spin")
    assert cpu.vcpu.raw.ioctl(lib.KVM_SMI) == OK
    result = cpu.run()
    return result.exit if isinstance(result.exit, IoExit) and result.answer == OK else result.answer


@contract("GM-VM-012")
@requires("smm", "x86")
@vm_types("default")
@gmem_kinds("g0")
def test_vm_enters_smm_where_it_has_smram(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A VM with memory for SMRAM in its second address space survives an SMI and goes on answering."""
    with Mapping.anonymous(SMRAM_SIZE) as memory:
        write_smi_handler(memory)
        vm.set_region(smram_slot(memory))
        assert run_into_smm(cpu) == IoExit(REPORT_PORT, True, 2, 1, b"\0\0")
        assert not memory.is_filled_with(0, SMM_STATE), "the state was saved"
        assert vm_answers(vm, gmem) == WORKING_VM


@contract("GM-VM-012")
@requires("smm", "x86")
@gmem_kinds("gM", "gMS")
def test_dead_vm_answers_eio_for_ever(vm: Vm, gmem: GuestMemfd, machine: GuestMachine) -> None:
    """A dead VM answers EIO to every ioctl on it and on its vCPUs for ever; its gmem and all descriptors stay usable."""
    # An SMI without memory for SMRAM is an ordinary way to die: the state cannot be saved (arch/x86/kvm/smm.c:enter_smm).
    with closing(machine.cpu()) as cpu, vm.create_vcpu(1) as other, gmem.map() as mapping, vm.stats_fd() as stats:
        assert (vm_answers(vm, gmem), vcpu_answers(other)) == (WORKING_VM, WORKING_VCPU)
        gmem.allocate(0, PAGE_SIZE)
        assert run_into_smm(cpu) == Errno.EIO
        for _ in range(3):
            assert vm_answers(vm, gmem) == all_eio(WORKING_VM)
            assert vcpu_answers(cpu.vcpu) == vcpu_answers(other) == all_eio(WORKING_VCPU)
        assert vm.raw.ioctl(UNKNOWN_IOCTL) == other.raw.ioctl(UNKNOWN_IOCTL) == Errno.EIO
        assert_file_works(gmem, mapping)
        assert len(os.pread(stats.fileno(), 24, 0)) == 24  # struct kvm_stats_header


def assert_file_works(gmem: GuestMemfd, mapping: Mapping) -> None:
    """The file does not need its VM alive: pages come and go, and the host reads and writes them if it may."""
    if gmem.flags & GmemFlag.INIT_SHARED:
        mapping.store(0x1234, SIZE - PAGE_SIZE)
        assert mapping.load(SIZE - PAGE_SIZE) == 0x1234
    gmem.allocate()
    assert gmem.allocated_pages() == gmem.pages
    gmem.punch()
    assert gmem.allocated_pages() == 0


@contract("GM-VM-012")
@requires("sev")
def test_source_of_a_sev_move_is_dead(kvm: Kvm) -> None:
    """The source of a successful SEV move is a dead VM: EIO to every ioctl, while its descriptors close as usual."""
    with kvm.create_vm(VmType.SEV) as source, kvm.create_vm(VmType.SEV) as target:
        sev = ffi.new("struct kvm_sev_init *")
        command = ffi.new("struct kvm_sev_cmd *", {"id": lib.KVM_SEV_INIT2, "data": entry.address_of(sev)})
        assert source.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, command) == OK
        with source.create_vcpu() as vcpu, source.create_guest_memfd(SIZE, GmemFlag.MMAP | GmemFlag.INIT_SHARED) as gmem:
            assert (vm_answers(source, gmem), vcpu_answers(vcpu)) == (WORKING_VM, WORKING_VCPU)
            assert target.raw.enable_cap(Cap.VM_MOVE_ENC_CONTEXT_FROM, source.fileno()) == OK
            for _ in range(2):
                assert vm_answers(source, gmem) == all_eio(WORKING_VM)
                assert vcpu_answers(vcpu) == all_eio(WORKING_VCPU)
            with gmem.map() as mapping:
                assert_file_works(gmem, mapping)
        with target.create_guest_memfd(SIZE) as gmem:
            assert vm_answers(target, gmem) == WORKING_VM


@contract("GM-VM-013")
@requires("debugfs")
@makes_gmem()
def test_name_in_debugfs_of_a_living_vm_is_no_obstacle(kvm: Kvm, vm_type: VmType) -> None:
    """A VM whose name in debugfs still belongs to an older VM is created all the same, without a directory."""
    with closing(KernelLog()) as log, kvm.create_vm(vm_type) as first:
        directory, number = VmDirectory.of(first), first.fileno()
        with first.create_guest_memfd(PAGE_SIZE) as gmem:
            first.close()
            assert directory.exists, "the gmem keeps the first VM alive"
            wait_for_duplicate(kvm, vm_type, log, directory.name)
            with kvm.create_vm(vm_type) as second, second.create_guest_memfd(PAGE_SIZE) as own:
                assert second.fileno() == number
                assert vm_answers(second, own) == WORKING_VM
                assert second.raw.set_region(MemoryRegion(gpa=GPA, size=PAGE_SIZE, gmem=gmem)) == Errno.EINVAL
                gmem.close()
                directory.wait_gone()
                assert vm_answers(second, own) == WORKING_VM


def wait_for_duplicate(kvm: Kvm, vm_type: VmType, log: KernelLog, name: str) -> None:
    """Create VMs of the taken name until the kernel's log notes it: of such notes there are at most ten in five seconds."""

    def noted() -> bool:
        with kvm.create_vm(vm_type) as again:
            assert VmDirectory.of(again).name == name
        return any(f"duplicate directory {name}" in line for line in log.new_lines())

    wait_until(noted, f"the kernel's log notes the duplicate directory {name}", 10.0)


@contract("GM-VM-014")
def test_unknown_ioctls(kvm: Kvm, vm: Vm) -> None:
    """An unknown ioctl is ENOTTY on a VM, and EINVAL on /dev/kvm and on a vCPU."""
    with vm.create_vcpu() as vcpu:
        assert kvm.raw.api_version() == lib.KVM_API_VERSION
        assert vm.raw.check_extension(Cap.USER_MEMORY2) == 1
        assert vcpu.raw.get_regs()[0] == OK
        assert entry.ioctl(kvm.fileno(), UNKNOWN_IOCTL) == Errno.EINVAL
        assert vm.raw.ioctl(UNKNOWN_IOCTL) == Errno.ENOTTY
        assert vcpu.raw.ioctl(UNKNOWN_IOCTL) == Errno.EINVAL


@contract("GM-VM-015")
@requires("smm", "x86")
@vm_types("sw-protected")
def test_sw_protected_vm_takes_an_smi_without_memory_for_it(kvm: Kvm, vm: Vm, machine: GuestMachine) -> None:
    """A software-protected VM takes SMIs but has no second address space: SMM finds no memory, and the VM dies of it."""
    assert vm.check_extension(Cap.X86_SMM) == 1
    assert vm.check_extension(Cap.MULTI_ADDRESS_SPACE) == 1
    with Mapping.anonymous(SMRAM_SIZE) as memory, closing(machine.cpu()) as cpu:
        write_smi_handler(memory)
        request = smram_slot(memory)
        assert vm.raw.set_region(request.but(as_id=0)) == OK  # memory there in the only address space does not help
        assert vm.raw.set_region(request) == Errno.EINVAL
        with kvm.create_vm(VmType.DEFAULT) as default:
            assert default.raw.set_region(request) == OK
        assert is_report(cpu.attempt("report"))
        assert run_into_smm(cpu) == Errno.EIO
        assert memory.is_filled_with(0, SMM_STATE), "no state was saved in the first address space"
        assert vm.raw.check_extension(Cap.X86_SMM) == Errno.EIO
