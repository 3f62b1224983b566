"""GM-ENC: mirroring and moving encryption between VMs, and populating encrypted memory through gmem."""

import threading
from collections.abc import Callable

import pytest

from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MiB, VmType
from kvmgmem.errors import Answer, Errno
from kvmgmem.exits import IoExit, SystemEventExit
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing import contract, disruptive, gmem_kinds, known_bug, requires, vm_types
from kvmgmem.testing.encryption import (
    SEV_LAUNCH_UPDATE_VMSA,
    SEV_POLICY_ES,
    TDX_GPA_BITS,
    SnpUpdate,
    TdxRegion,
    mirror,
    move,
    sev_command,
    sev_device,
    sev_init,
    sev_launch_start,
    snp_launch_finish,
    snp_launch_start,
    snp_update,
    tdx_command,
    tdx_init,
    tdx_populate,
)
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.shmem import shmem
from kvmgmem.testing.trust_domain import (
    BOOT_GPA,
    BOOT_SIZE,
    LOOKED_AT,
    MARK,
    Entry,
    boot_image,
    start,
)
from kvmgmem.testing.vm_directory import VmDirectory
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

UNUSED_FD = 0xFFFF
UNKNOWN_FLAG = 1
UNKNOWN_IOCTL = 0xAEFE
ROUNDS = 300
STAMP = 0xE4C0_0000_0000_0001
SHARED = GmemFlag.MMAP | GmemFlag.INIT_SHARED
BOTH = [pytest.param(mirror, id="mirror"), pytest.param(move, id="move")]

Act = Callable[[Vm, OwnedFd | int], Answer]


def assert_usable(vm: Vm, slot: int = 7) -> None:
    """A VM must create a gmem, bind it, and give it up again; a VM whose type has no gmem, the same with a plain slot."""
    if not vm.check_extension(Cap.GUEST_MEMFD):
        assert vm.raw.set_region(MemoryRegion(slot=slot, gpa=4 * GPA, size=SIZE)) == OK
        assert vm.raw.delete_region(slot) == OK
        return
    with vm.create_guest_memfd(SIZE) as gmem:
        assert vm.raw.set_region(MemoryRegion(slot=slot, gpa=4 * GPA, size=SIZE, gmem=gmem)) == OK
        assert vm.raw.delete_region(slot) == OK


@contract("GM-ENC-001", "C28")
@requires("no-sev-code")
@gmem_kinds("g0")
@pytest.mark.parametrize("act", BOTH)
def test_without_sev_code_every_source_is_refused(kvm: Kvm, vm: Vm, gmem: GuestMemfd, act: Act) -> None:
    """A KVM without SEV code refuses to mirror or move whatever the source: EINVAL, for no descriptor at all too."""
    assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0) == OK
    with kvm.create_vm(vm.type) as other:
        for source in (other, vm, gmem, kvm, -1, UNUSED_FD, 1 << 32 | other.fileno()):
            assert act(vm, source) == Errno.EINVAL
        assert_usable(vm)
        assert_usable(other)


@contract("GM-ENC-002", "C28")
@requires("sev-code")
@gmem_kinds("g0")
@pytest.mark.parametrize("act", BOTH)
def test_a_source_must_be_a_vm(kvm: Kvm, vm: Vm, gmem: GuestMemfd, act: Act) -> None:
    """The source of a mirror or move must be an open descriptor of a VM, else EBADF."""
    with kvm.create_vm(vm.type) as other, other.create_vcpu() as vcpu, shmem(PAGE_SIZE) as file:
        assert act(vm, other) == Errno.EINVAL  # the control: a VM, which is looked at
        for source in (gmem, vcpu, file, kvm, -1, UNUSED_FD):
            assert act(vm, source) == Errno.EBADF


@contract("GM-ENC-003", "C28")
@requires("sev-code")
@pytest.mark.parametrize("act", BOTH)
def test_a_vm_is_not_its_own_source(vm: Vm, act: Act) -> None:
    """A VM can be neither its own mirror nor moved to itself, by whichever of its descriptors: EINVAL."""
    with vm.dup() as same:
        assert act(vm, vm) == Errno.EINVAL
        assert act(vm, same) == Errno.EINVAL
    assert_usable(vm)


@contract("GM-ENC-004", "C28")
@requires("sev-code")
@vm_types("default")
@pytest.mark.parametrize("act", BOTH)
def test_plain_vms_are_not_mirrored_or_moved(kvm: Kvm, running: Running, act: Act) -> None:
    """Where neither VM is encrypted there is nothing to take over: EINVAL, and both go on running their guests."""
    from kvmgmem.arch.x86_64 import GuestMachine

    with kvm.create_vm() as other:
        machine = GuestMachine(other)
        cpu = machine.cpu()
        with other.create_guest_memfd(SIZE, SHARED) as gmem:
            other.bind(gmem, gpa=GPA)
            for target, source in ((running.vm, other), (other, running.vm)):
                assert act(target, source) == Errno.EINVAL
            with gmem.map() as mapping:
                cpu.store(GPA, STAMP)
                assert mapping.load() == STAMP
            assert isinstance(running.cpu.attempt("report").exit, IoExit)
            assert_usable(running.vm)
        cpu.close()
        machine.close()


@contract("GM-ENC-005")
@requires("x86")
@pytest.mark.parametrize("act", BOTH)
def test_flags_are_refused_before_the_source_is_looked_at(
    kvm: Kvm, vm: Vm, act: Callable[[Vm, OwnedFd | int, int], Answer]
) -> None:
    """Neither capability has flags: any is EINVAL, even where the source alone would be EBADF."""
    assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0) == OK
    assert vm.raw.enable_cap(Cap.EXIT_HYPERCALL, 0, flags=UNKNOWN_FLAG) == Errno.EINVAL
    with kvm.create_vm(vm.type) as other:
        for source in (other, vm, UNUSED_FD, -1):
            for flags in (UNKNOWN_FLAG, 1 << 31):
                assert act(vm, source, flags) == Errno.EINVAL


@contract("GM-ENC-006")
@requires("sev-code")
@gmem_kinds("g0")
@pytest.mark.parametrize("act", BOTH)
def test_a_source_is_32_bits(kvm: Kvm, vm: Vm, gmem: GuestMemfd, act: Act) -> None:
    """Only the low half of the argument names the source: with bits above it a VM is a VM and a gmem is none."""
    with kvm.create_vm(vm.type) as other:
        for above in (0, 1 << 32, 0xFFFF_FFFF << 32):
            assert act(vm, above | other.fileno()) == Errno.EINVAL
            assert act(vm, above | gmem.fileno()) == Errno.EBADF


@contract("GM-ENC-007")
@requires("sev-code")
@pytest.mark.parametrize("act", BOTH)
def test_a_source_may_be_another_processs_vm(vm: Vm, act: Act) -> None:
    """Only the target must be the caller's own VM (EIO); a source that another process made is judged like any other."""

    def maker(channel: Channel) -> None:
        with Kvm.open() as kvm, kvm.create_vm() as theirs:
            channel.send(fds=[theirs.fileno()])
            channel.receive()

    with ChildProcess(maker) as process:
        _, (number,) = process.channel.receive_with_fds()
        with Vm(number, VmType.DEFAULT, vm.vcpu_mmap_size) as theirs:
            assert act(theirs, vm) == Errno.EIO
            assert act(vm, theirs) == Errno.EINVAL
        process.send()
        process.result()


@contract("GM-ENC-008")
@requires("sev-code")
@pytest.mark.parametrize("act", BOTH)
def test_opposite_requests_do_not_deadlock(kvm: Kvm, vm: Vm, act: Act) -> None:
    """Two VMs that each take the other for their source do not wait for each other: one may be told EBUSY."""
    answers: set[Answer] = set()
    with kvm.create_vm(vm.type) as other:
        start = threading.Barrier(2)

        def ask(target: Vm, source: Vm) -> None:
            start.wait(10)
            for _ in range(ROUNDS):
                answers.add(act(target, source))

        threads = [threading.Thread(target=ask, args=pair) for pair in ((vm, other), (other, vm))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert answers <= {Errno.EINVAL, Errno.EBUSY}
        # Nobody is left marked as busy.
        assert (act(vm, other), act(other, vm)) == (Errno.EINVAL, Errno.EINVAL)


@contract("GM-ENC-009")
@requires("sev")
def test_a_move_is_between_vms_of_one_type(kvm: Kvm) -> None:
    """Encryption moves only to a VM of the source's own type, and only from one that is encrypted."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SEV) as vm,
        kvm.create_vm(VmType.SEV) as target,
        kvm.create_vm() as plain,
    ):
        assert move(target, vm) == Errno.EINVAL  # not encrypted yet
        assert sev_init(vm, device) == OK
        assert move(plain, vm) == Errno.EINVAL
        assert move(target, plain) == Errno.EINVAL
        assert move(target, vm) == OK


@contract("GM-ENC-010")
@requires("sev", "sev-es")
@pytest.mark.parametrize("act", BOTH)
def test_an_encrypted_vm_is_no_target(kvm: Kvm, act: Act) -> None:
    """A VM that is encrypted already can become neither a mirror nor the target of a move: EINVAL."""
    for vm_type in (VmType.SEV, VmType.SEV_ES):
        with sev_device() as device, kvm.create_vm(vm_type) as vm, kvm.create_vm(vm_type) as target:
            assert sev_init(vm, device) == OK
            with kvm.create_vm(vm_type) as busy:
                assert sev_init(busy, device) == OK
                assert act(busy, vm) == Errno.EINVAL
            assert act(target, vm) == OK


@contract("GM-ENC-010")
@requires("sev-es")
def test_a_move_wants_equal_and_finished_vcpus(kvm: Kvm) -> None:
    """SEV-ES moves between VMs with as many vCPUs, all of which the source has encrypted, else EINVAL."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SEV_ES) as vm,
        kvm.create_vm(VmType.SEV_ES) as target,
        kvm.create_vm(VmType.SEV_ES) as empty,
    ):
        assert sev_init(vm, device) == OK
        with vm.create_vcpu(), target.create_vcpu():
            assert sev_launch_start(vm, device, SEV_POLICY_ES) == OK
            assert move(target, vm) == Errno.EINVAL  # the vCPU's state is not encrypted
            assert sev_command(vm, device, SEV_LAUNCH_UPDATE_VMSA) == OK
            assert move(empty, vm) == Errno.EINVAL  # no vCPU for it
            assert move(target, vm) == OK


@contract("GM-ENC-011")
@requires("snp", "sev")
@pytest.mark.parametrize("act", BOTH)
def test_snp_is_no_source(kvm: Kvm, act: Act) -> None:
    """An SNP VM can be neither mirrored nor moved: EINVAL, where a SEV VM can."""
    with sev_device() as device:
        with kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as target:
            assert sev_init(vm, device) == OK
            assert act(target, vm) == OK
        with kvm.create_vm(VmType.SNP) as vm, kvm.create_vm(VmType.SNP) as target:
            assert sev_init(vm, device) == OK
            known_bug("B15").expect(act(target, vm), Errno.EINVAL, shows=OK)


@contract("GM-ENC-012")
@requires("sev")
def test_a_mirror_starts_without_vcpus_and_has_no_mirrors(kvm: Kvm) -> None:
    """A VM with vCPUs cannot become a mirror, and a mirror cannot be mirrored: EINVAL."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SEV) as vm,
        kvm.create_vm(VmType.SEV) as target,
        kvm.create_vm(VmType.SEV) as third,
    ):
        assert sev_init(vm, device) == OK
        with kvm.create_vm(VmType.SEV) as inhabited, inhabited.create_vcpu():
            assert mirror(inhabited, vm) == Errno.EINVAL
        assert mirror(target, vm) == OK
        assert mirror(third, target) == Errno.EINVAL
        assert mirror(third, vm) == OK


@contract("GM-ENC-013", "GM-ENC-014")
@requires("sev")
def test_a_moved_vm_is_dead_and_keeps_its_gmem(kvm: Kvm) -> None:
    """The source of a move answers EIO to everything, while its gmem lives on: as its own and never as the target's."""
    with sev_device() as device, kvm.create_vm(VmType.SEV) as vm, kvm.create_vm(VmType.SEV) as target:
        assert sev_init(vm, device) == OK
        request = MemoryRegion(slot=0, gpa=GPA, size=SIZE)
        with vm.create_guest_memfd(SIZE, SHARED) as gmem, target.create_guest_memfd(SIZE, SHARED) as own:
            assert vm.raw.set_region(request.but(gmem=gmem)) == OK
            assert move(target, vm) == OK
            assert vm.raw.check_extension(Cap.USER_MEMORY2) == Errno.EIO
            assert vm.raw.create_vcpu() == Errno.EIO
            assert vm.raw.create_guest_memfd(SIZE) == Errno.EIO
            assert vm.raw.set_region(MemoryRegion(slot=0)) == Errno.EIO
            assert target.raw.set_region(request.but(gmem=gmem)) == Errno.EINVAL
            assert target.raw.set_region(request.but(gmem=own)) == OK
            with gmem.map() as mapping:
                mapping.store(STAMP)
                assert gmem.raw.allocate(0, 4 * PAGE_SIZE) == OK
                assert gmem.raw.punch(PAGE_SIZE, PAGE_SIZE) == OK
                assert (mapping.load(), gmem.allocated_pages()) == (STAMP, 3)


@contract("GM-ENC-015")
@requires("sev", "debugfs")
def test_a_mirror_keeps_its_source(kvm: Kvm) -> None:
    """A source lives as long as its mirror does, after all of its own descriptors are closed."""
    with sev_device() as device, kvm.create_vm(VmType.SEV) as target:
        with kvm.create_vm(VmType.SEV) as vm:
            directory = VmDirectory.of(vm)
            assert sev_init(vm, device) == OK
            assert mirror(target, vm) == OK
        assert directory.exists
        target.close()
        directory.wait_gone()


@contract("GM-ENC-016")
@requires("x86", "no-encryption")
def test_encryption_is_unknown_where_nothing_can_be_encrypted(vm: Vm) -> None:
    """A VM of a KVM without encryption knows neither encryption commands nor encrypted regions: ENOTTY.

    A region is read first, so that one at a bad address is EFAULT; a command is not.
    """
    command, region = ffi.new("struct kvm_sev_cmd *"), ffi.new("struct kvm_enc_region *", {"size": PAGE_SIZE})
    assert vm.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, command) == Errno.ENOTTY
    assert vm.raw.ioctl(lib.KVM_MEMORY_ENCRYPT_OP, 8) == Errno.ENOTTY
    for request in (lib.KVM_MEMORY_ENCRYPT_REG_REGION, lib.KVM_MEMORY_ENCRYPT_UNREG_REGION):
        assert vm.raw.ioctl_struct(request, region) == Errno.ENOTTY
        assert vm.raw.ioctl(request, 8) == Errno.EFAULT
    with vm.create_vcpu() as vcpu:
        answer = vcpu.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, command)
        # Before 6.16, and so long before gmem had flags, vCPUs had no such ioctl: TDX has brought it.
        if vm.check_extension(Cap.GUEST_MEMFD_FLAGS) or answer == Errno.ENOTTY:
            assert answer == Errno.ENOTTY
        else:
            assert answer == vcpu.raw.ioctl(UNKNOWN_IOCTL) == Errno.EINVAL
    assert_usable(vm)


@contract("GM-ENC-017")
@requires("sev")
def test_only_sev_vms_are_initialised(kvm: Kvm, vm: Vm) -> None:
    """KVM_SEV_INIT2 wants a VM that was created as one to be encrypted: EINVAL on any other."""
    with sev_device() as device:
        assert sev_init(vm, device) == Errno.EINVAL
        with kvm.create_vm(VmType.SEV) as encrypted:
            assert sev_init(encrypted, device) == OK
            assert sev_init(encrypted, device) == Errno.EINVAL
    assert_usable(vm)


class SnpLaunch:
    """An SNP VM in the middle of its launch: private memory at `GPA`, and a page-aligned source of contents."""

    def __init__(self, vm: Vm, device: int, gmem: GuestMemfd, source: Mapping) -> None:
        self.vm, self.device, self.gmem, self.source = vm, device, gmem, source
        assert sev_init(vm, device) == OK
        vm.bind(gmem, gpa=GPA)
        vm.set_private(GPA, gmem.size)
        source.fill(0x5C)

    def page(self, number: int = 0) -> SnpUpdate:
        """The request to populate one page with contents."""
        return SnpUpdate(GPA + number * PAGE_SIZE, self.source.address)

    def update(self, request: SnpUpdate) -> Answer:
        """What a request answers."""
        return snp_update(self.vm, self.device, request)[0]


@contract("GM-ENC-018")
@requires("snp")
def test_requests_to_populate_are_checked(kvm: Kvm) -> None:
    """Populating wants a started SNP launch, whole pages of a known type without flags, a source, and a slot with gmem."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SNP) as vm,
        kvm.create_vm() as plain,
        vm.create_guest_memfd(SIZE) as gmem,
        Mapping.anonymous(2 * PAGE_SIZE) as source,
    ):
        launch = SnpLaunch(vm, device, gmem, source)
        good = launch.page()
        assert launch.update(good) == Errno.EINVAL  # not started
        assert snp_launch_start(vm, device) == OK
        assert snp_update(plain, device, good)[0] == Errno.EINVAL
        vm.set_region(MemoryRegion(slot=1, gpa=2 * GPA, size=2 * PAGE_SIZE, hva=source.address))
        for bad in (
            good.but(size=0),
            good.but(size=PAGE_SIZE + 1),
            good.but(flags=UNKNOWN_FLAG),
            good.but(type=0),
            good.but(type=2),
            good.but(type=7),
            good.but(source=0),
            good.but(source=source.address + 8),
            good.but(gpa=2 * GPA),
            good.but(gpa=3 * GPA),
        ):
            assert launch.update(bad) == Errno.EINVAL, bad
        assert gmem.allocated_pages() == 0
        assert launch.update(good) == OK
        assert launch.update(launch.page(1).but(type=lib.KVM_SEV_SNP_PAGE_TYPE_ZERO, source=0)) == OK
        assert gmem.allocated_pages() == 2


@contract("GM-ENC-019")
@requires("snp")
def test_a_page_that_cannot_be_populated_is_an_io_error(kvm: Kvm) -> None:
    """If not one page could be populated the answer is EIO, whatever the reason was."""
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SNP) as vm,
        vm.create_guest_memfd(SIZE) as gmem,
        Mapping.anonymous(PAGE_SIZE) as source,
    ):
        launch = SnpLaunch(vm, device, gmem, source)
        assert snp_launch_start(vm, device) == OK
        assert launch.update(launch.page()) == OK
        assert launch.update(launch.page()) == Errno.EIO  # populated already
        vm.set_shared(GPA + PAGE_SIZE, PAGE_SIZE)
        assert launch.update(launch.page(1)) == Errno.EIO
        vm.set_private(GPA + PAGE_SIZE, PAGE_SIZE)
        assert launch.update(launch.page(1)) == OK
        request = launch.page(2)
        source.unmap()
        assert launch.update(request) == Errno.EIO
        with Mapping.anonymous(PAGE_SIZE) as other:
            assert launch.update(request.but(source=other.address)) == OK
            gmem.close()
            assert launch.update(launch.page(3).but(source=other.address)) == Errno.EIO


@contract("GM-ENC-020")
@requires("snp")
def test_population_stops_at_the_end_of_the_slot(kvm: Kvm) -> None:
    """Population ends with the slot, answers 0, and says in the request where to go on."""
    pages = 4
    with (
        sev_device() as device,
        kvm.create_vm(VmType.SNP) as vm,
        vm.create_guest_memfd(pages * PAGE_SIZE) as gmem,
        vm.create_guest_memfd(pages * PAGE_SIZE) as beside,
        Mapping.anonymous(2 * pages * PAGE_SIZE) as source,
    ):
        SnpLaunch(vm, device, gmem, source)
        vm.bind(beside, slot=1, gpa=GPA + gmem.size)
        vm.set_private(GPA + gmem.size, beside.size)
        assert snp_launch_start(vm, device) == OK
        first = SnpUpdate(GPA, source.address, gmem.size + beside.size)
        rest = SnpUpdate(GPA + gmem.size, source.address + gmem.size, beside.size)
        assert snp_update(vm, device, first) == (OK, rest)
        assert (gmem.allocated_pages(), beside.allocated_pages()) == (pages, 0)
        assert snp_update(vm, device, rest) == (OK, SnpUpdate(rest.gpa + rest.size, rest.source + rest.size, 0))
        assert (gmem.allocated_pages(), beside.allocated_pages()) == (pages, pages)


# Real mode, where all memory is private: mov ecx, GHCB; mov eax, a request to terminate; xor edx, edx; wrmsr; vmgexit; hlt.
TERMINATE = bytes.fromhex("66b9300101c0 66b800010000 6631d2 0f30 f30f01d9 f4")
GHCB_TERMINATION_REQUEST = 0x100
CODE_GPA = 0x1_0000
SYSTEM_EVENT_SEV_TERM = 6


@contract("GM-ENC-021")
@requires("snp")
def test_an_snp_guest_runs_from_gmem(kvm: Kvm) -> None:
    """A guest that was populated through gmem runs: its request to terminate arrives as a SEV_TERM system event."""
    from kvmgmem.arch.x86_64 import set_supported_cpuid

    with (
        sev_device() as device,
        kvm.create_vm(VmType.SNP) as vm,
        vm.create_guest_memfd(1 * MiB) as gmem,
        Mapping.anonymous(PAGE_SIZE) as source,
    ):
        assert sev_init(vm, device) == OK
        vm.bind(gmem)
        vm.set_private(0, gmem.size)
        source.write(0, TERMINATE)
        with vm.create_vcpu() as vcpu:
            set_supported_cpuid(vcpu)
            _, sregs = vcpu.raw.get_sregs()
            sregs.cs.base, sregs.cs.selector = CODE_GPA, CODE_GPA >> 4
            assert vcpu.raw.set_sregs(sregs) == OK
            assert vcpu.raw.set_regs(ffi.new("struct kvm_regs *", {"rip": 0, "rflags": 2})) == OK
            assert snp_launch_start(vm, device) == OK
            assert snp_update(vm, device, SnpUpdate(CODE_GPA, source.address))[0] == OK
            assert snp_launch_finish(vm, device) == OK
            assert vcpu.run() == SystemEventExit(SYSTEM_EVENT_SEV_TERM, (GHCB_TERMINATION_REQUEST,))


@contract("GM-ENC-022")
@requires("tdx")
def test_requests_to_populate_a_trust_domain_are_checked(kvm: Kvm) -> None:
    """Populating a trust domain takes whole private pages until it is finalised, and says how far it came."""
    with (
        kvm.create_vm(VmType.TDX) as vm,
        vm.create_guest_memfd(SIZE) as gmem,
        Mapping.anonymous(2 * PAGE_SIZE) as source,
    ):
        assert tdx_init(vm) == OK
        vm.bind(gmem, gpa=GPA)
        vm.set_private(GPA, SIZE)
        source.fill(0x5C)
        good = TdxRegion(GPA, source.address)
        with vm.create_vcpu() as vcpu:
            assert tdx_populate(vcpu, good) == (Errno.EINVAL, good)  # the vCPU is not initialised
            assert tdx_command(vcpu, lib.KVM_TDX_INIT_VCPU) == OK
            for bad in (
                good.but(gpa=GPA + 8),
                good.but(source=source.address + 8),
                good.but(source=0),
                good.but(pages=0),
                good.but(pages=(1 << 52) - 1),
                good.but(gpa=GPA | 1 << TDX_GPA_BITS - 1),
            ):
                assert tdx_populate(vcpu, bad) == (Errno.EINVAL, bad)
            assert gmem.allocated_pages() == 0
            # The second of two pages is not private.
            vm.set_shared(GPA + PAGE_SIZE, PAGE_SIZE)
            rest = TdxRegion(GPA + PAGE_SIZE, source.address + PAGE_SIZE)
            assert tdx_populate(vcpu, good.but(pages=2)) == (Errno.EINVAL, rest)
            vm.set_private(GPA + PAGE_SIZE, PAGE_SIZE)
            done = TdxRegion(rest.gpa + PAGE_SIZE, rest.source + PAGE_SIZE, 0)
            assert tdx_populate(vcpu, rest) == (OK, done)
            assert tdx_command(vm, lib.KVM_TDX_FINALIZE_VM) == OK
            late = good.but(gpa=GPA + 2 * PAGE_SIZE)
            assert tdx_populate(vcpu, late) == (Errno.EINVAL, late)


def assert_sees_holes(vcpu: Vcpu, gmem: GuestMemfd) -> None:
    """Let the guest of `trust_domain` look at its page: its mark is there until a punch, and zero after each."""
    for expected in (0, MARK, MARK):
        assert reported(vcpu) == expected
    for _ in range(3):
        gmem.punch()
        assert gmem.allocated_pages() == 0
        assert reported(vcpu) == 0
        assert gmem.allocated_pages() == 1
        assert reported(vcpu) == MARK


def reported(vcpu: Vcpu) -> int:
    """What the guest says that it has read."""
    ended = vcpu.run()
    assert isinstance(ended, IoExit), ended
    return int.from_bytes(ended.data, "little")


@contract("GM-ENC-023")
@requires("tdx")
@disruptive()
def test_a_punch_reaches_what_a_trust_domain_shares(kvm: Kvm) -> None:
    """A trust domain that reads a page through a shared address sees a punch of it at once, and no freed page.

    A gmem that can be mapped serves shared accesses as well, so a punch must zap the shared half of guest memory too.
    """
    image = boot_image(1 << TDX_GPA_BITS - 1, trust_domain=True)
    with (
        kvm.create_vm(VmType.TDX) as vm,
        vm.create_guest_memfd(BOOT_SIZE) as private,
        vm.create_guest_memfd(SIZE, GmemFlag.MMAP) as gmem,
        Mapping.anonymous(BOOT_SIZE) as source,
    ):
        source.write(0, image)
        assert tdx_init(vm) == OK
        vm.bind(private, gpa=BOOT_GPA)
        vm.set_private(BOOT_GPA, BOOT_SIZE)
        vm.bind(gmem, slot=1, gpa=LOOKED_AT)
        with vm.create_vcpu() as vcpu:
            assert tdx_command(vcpu, lib.KVM_TDX_INIT_VCPU) == OK
            region = TdxRegion(BOOT_GPA, source.address, BOOT_SIZE // PAGE_SIZE)
            assert tdx_populate(vcpu, region)[0] == OK
            assert tdx_command(vm, lib.KVM_TDX_FINALIZE_VM) == OK
            assert_sees_holes(vcpu, gmem)


@contract("GM-ENC-023")
@vm_types("default")
@gmem_kinds("gMS")
@pytest.mark.parametrize("entry", [pytest.param(Entry.RESET, id="reset"), pytest.param(Entry.LONG_MODE, id="long-mode")])
def test_a_punch_reaches_what_an_ordinary_guest_sees(vm: Vm, gmem: GuestMemfd, entry: Entry) -> None:
    """The same code in a VM that is no trust domain, where all its memory is shared, sees each punch.

    The slot has the gmem's own mapping for host address: kvm_pvm, which emulates this code, looks there.
    """
    from kvmgmem.arch.x86_64 import set_supported_cpuid

    with Mapping.anonymous(BOOT_SIZE) as memory, gmem.map() as mapping, vm.create_vcpu() as vcpu:
        memory.write(0, boot_image(0, trust_domain=False))
        vm.set_region(MemoryRegion(slot=0, gpa=BOOT_GPA, size=BOOT_SIZE, hva=memory.address))
        vm.bind(gmem, slot=1, gpa=LOOKED_AT, hva=mapping.address)
        set_supported_cpuid(vcpu)
        start(vcpu, entry)
        assert_sees_holes(vcpu, gmem)
