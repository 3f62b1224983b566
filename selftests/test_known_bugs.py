"""Regression tests of known kernel bugs that no row's own test shows: what each was, and what must be there instead."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from kvmgmem._native import lib
from kvmgmem.abi import OK, PAGE_SIZE, Attribute, GmemFlag, MiB, VmType
from kvmgmem.arch.x86_64 import GuestMachine
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import contract, disruptive, gmem_kinds, known_bug, requires, vm_types, wait_until, would_show
from kvmgmem.testing.announcements import Announcements
from kvmgmem.testing.emulated_cpus import cpus_to_run_on
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.testing.hwpoison import poison
from kvmgmem.testing.pending_signal import in_child_with_signal_pending
from kvmgmem.testing.storm import Storm
from kvmgmem.vcpu import Vcpu
from kvmgmem.vm import Vm

NOBODY = 65534


def kill_by_smi(vcpu: Vcpu) -> None:
    """Let the VM die: an SMI without memory for SMRAM cannot save the vCPU's state (arch/x86/kvm/smm.c:enter_smm)."""
    assert vcpu.raw.ioctl(lib.KVM_SMI) == OK
    assert vcpu.raw.run().answer == Errno.EIO


@contract("GM-VM-012")
@requires("smm", "x86")
@vm_types("default")
@gmem_kinds("gMS")
def test_a_vcpu_that_runs_while_its_vm_dies_never_runs_again(vm: Vm, gmem: GuestMemfd, machine: GuestMachine) -> None:
    """A VM that dies takes its running vCPUs out of the guest with EIO, and from then on none of them runs at all."""
    vm.bind(gmem, gpa=GPA)
    with closing(machine.cpu(0)) as victim, closing(machine.cpu(1)) as hammer, gmem.map() as counter:
        hammer.start("hammer", rdi=GPA)
        victim.start("spin")
        with hammer.running() as runs:
            wait_until(lambda: counter.load() > 0, "the guest counts")
            kill_by_smi(victim.vcpu)
            left = runs.result()
        stood = counter.load()
        again = [hammer.run(1.0).answer for _ in range(3)]
        if not known_bug("B21").shows_if(counter.load() != stood):
            assert (left.answer, again) == (Errno.EIO, [Errno.EIO] * 3)


@contract("GM-VM-012", "GM-PF-017")
@requires("smm", "prefault", "x86", "default-vm")
@would_show("B27")
@disruptive()
@vm_types("default")
def test_a_prefault_ends_quietly_when_its_vm_dies(vm: Vm, machine: GuestMachine) -> None:
    """A prefault that is under way when its VM dies ends with EIO or with the part that is done; the kernel says nothing."""
    size = 256 * MiB
    with (
        vm.create_guest_memfd(size, GmemFlag.MMAP) as gmem,
        closing(machine.cpu(0)) as victim,
        vm.create_vcpu(1) as other,
    ):
        vm.bind(gmem, gpa=GPA)
        victim.start("spin")
        answers: list[tuple[Answer, int, int]] = []
        prefault = threading.Thread(target=lambda: answers.append(other.raw.pre_fault(GPA, size)))
        prefault.start()
        wait_until(lambda: gmem.allocated_pages() > 0, "the prefault has begun")
        kill_by_smi(victim.vcpu)
        prefault.join(60)
        answer, gpa, left = answers[0]
        assert answer in (OK, Errno.EIO)
        assert (gpa - GPA, left > 0) == (size - left, True), "it came to its end before the VM died"
        assert other.raw.pre_fault(gpa, left)[0] == Errno.EIO


@contract("GM-RES-014")
@requires("x86")
@would_show("B29")
@vm_types("default")
def test_an_interrupted_creation_leaves_no_vm(kvm: Kvm, vm_type: VmType) -> None:
    """A VM whose creation meets a pending signal is EINTR, with no descriptor, the next one comes, and all is quiet.

    The signal ends mm_take_all_locks, late in kvm_create_vm: all that was made before has to be taken back.
    """

    def create_twice() -> tuple[Errno | None, bool]:
        before = os.listdir("/proc/self/fd")
        first = kvm.raw.create_vm(vm_type)
        nothing_left = os.listdir("/proc/self/fd") == before
        kvm.create_vm(vm_type).close()
        return first if isinstance(first, Errno) else None, nothing_left

    seen = in_child_with_signal_pending(
        create_twice, lambda call: call.number == NUMBER["ioctl"] and call.arguments[1] == lib.KVM_CREATE_VM
    )
    assert seen == (Errno.EINTR, True)


@contract("GM-RES-014")
@requires("root")
@disruptive()
@vm_types("default")
def test_a_vm_without_a_file_is_not_counted(kvm: Kvm, vm_type: VmType) -> None:
    """A VM for which the system has no file left is ENFILE, with no descriptor, and KVM's count of VMs stays right."""
    limit = Path("/proc/sys/fs/file-max")
    usual = limit.read_text()

    def create(channel: Channel) -> tuple[Errno | None, bool]:
        lowest = os.dup(0)
        os.close(lowest)
        limit.write_text("0")
        os.setresuid(NOBODY, NOBODY, NOBODY)  # the limit is not root's
        answer = kvm.raw.create_vm(vm_type)
        return answer if isinstance(answer, Errno) else None, os.dup(0) == lowest  # a directory could not be opened now

    def count() -> int:
        kvm.create_vm(vm_type).close()
        return announced.next("create")

    with closing(Announcements()) as announced:
        before = count()
        try:
            with ChildProcess(create) as child:
                seen = child.result()
        finally:
            limit.write_text(usual)
        after = count()
    assert seen == (Errno.ENFILE, True)
    # 7.3.4: the VM is destroyed, and leaves a count that it joins with its file only.
    if not known_bug("B28").shows_if(after < before or after >= 1 << 63):
        assert after == before


@contract("GM-HWP-006", "GM-RACE-006")
@requires("memory-failure", "root")
@would_show("B7", "B2")
@disruptive()
@vm_types("default")
@gmem_kinds("gMS")
def test_poison_beside_the_end_of_file_and_slot(vm: Vm, gmem_kind: GmemFlag, request: pytest.FixtureRequest) -> None:
    """A page that breaks while its file is closed and its slot deleted disturbs neither, and what comes next is all new."""
    storm = Storm.of(request)
    # EFAULT and ENOMEM: the mapping was gone first. EBUSY: gmem keeps the page. EHWPOISON, EIO: it was going already.
    possible = (OK, Errno.EBUSY, Errno.EFAULT, Errno.ENOMEM, Errno.EIO, Errno.EHWPOISON)
    for number in storm.rounds(4):
        gmem = vm.create_guest_memfd(SIZE, gmem_kind)
        vm.bind(gmem, gpa=GPA)
        mapping = gmem.map()
        mapping.store(1)

        def end(gmem: GuestMemfd = gmem, unmap: Callable[[], None] = mapping.unmap) -> None:
            gmem.close()
            unmap()  # the last reference to the file

        broken, _, deleted = storm.clash(partial(poison, mapping), end, partial(vm.raw.delete_region, 0))
        assert broken[0] in possible
        assert deleted == OK
        with vm.create_guest_memfd(SIZE, gmem_kind) as fresh:
            vm.bind(fresh, gpa=GPA)
            with fresh.map() as host:
                assert host.is_filled_with(0, 0, 16 * PAGE_SIZE)
            vm.delete_region(0)
        if number >= 30:  # a broken page is lost to this kernel
            break


@contract("GM-ATTR-017")
@vm_types("sw-protected")
def test_a_long_conversion_lets_others_run(vm: Vm, request: pytest.FixtureRequest) -> None:
    """A conversion of many pages gives way to another thread on its CPU many times before it is over.

    A kernel that preempts itself does so anyway; B12 shows on one that does not.
    """
    os.sched_setaffinity(0, {min(cpus_to_run_on())})
    pages = 1 << 16
    gaps: list[float] = []
    while len(gaps) < 5 and pages <= 1 << 20:
        took, longest = conversion_beside_a_thread(vm, pages)
        if took < 0.3 * float(request.config.getoption("--effort")):
            pages *= 2
            continue
        gaps.append(longest / took)
        if gaps[-1] < 0.5:
            break
    if not gaps:
        pytest.skip("converting 2^20 pages takes too short a time here for a turn to be taken")
    if not known_bug("B12").shows_if(min(gaps) > 0.8):
        assert min(gaps) < 0.5


def conversion_beside_a_thread(vm: Vm, pages: int) -> tuple[float, float]:
    """How long a conversion takes whose CPU is wanted by this thread too, and the longest time that this one has to wait."""
    bounds: list[float] = []

    def convert() -> None:
        bounds.append(time.monotonic())
        assert vm.raw.set_attributes(GPA, pages * PAGE_SIZE, Attribute.PRIVATE) == OK
        bounds.append(time.monotonic())

    thread = threading.Thread(target=convert)
    turns = []
    thread.start()
    while thread.is_alive():
        turns.append(time.monotonic())
        time.sleep(0)
    thread.join()
    vm.set_shared(GPA, pages * PAGE_SIZE)
    begin, end = bounds
    seen = [begin, *(turn for turn in turns if begin < turn < end), end]
    return end - begin, max(later - earlier for earlier, later in itertools.pairwise(seen))
