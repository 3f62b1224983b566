"""GM-FAL: fallocate and holes."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GmemFlag, MiB, VmType
from kvmgmem.arch.x86_64 import GuestCpu
from kvmgmem.errors import Answer, Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping
from kvmgmem.processes import in_child, spawn_python
from kvmgmem.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, NUMBER
from kvmgmem.testing import contract, gmem_kinds, requires, vm_types, wait_until
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.pending_signal import in_child_with_signal_pending
from kvmgmem.testing.stats import Stats
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
FILLER = 0xEE
LARGEST = (1 << 63) - PAGE_SIZE  # of an aligned file: i_size is a signed 64-bit number
BIG = 128 * MiB

# include/uapi/linux/falloc.h (Linux 7.3), and a bit that means nothing yet.
OTHER_MODES = {
    "NO_HIDE_STALE": 0x04,
    "COLLAPSE_RANGE": 0x08,
    "ZERO_RANGE": 0x10,
    "INSERT_RANGE": 0x20,
    "UNSHARE_RANGE": 0x40,
    "WRITE_ZEROES": 0x80,
    "unknown": 0x100,
}

any_kind_will_do = gmem_kinds("g0", "gMS")
"""For what the kernel decides before it looks at the file's flags."""

# Guests reach a gmem without the MMAP flag only where memory is private; those cases are asked for by name.
guest_reaches = gmem_kinds("gM", "gMS")


@contract("GM-FAL-001", "GM-FAL-004", "GM-FAL-005")
@any_kind_will_do
def test_only_two_modes_exist(gmem: GuestMemfd) -> None:
    """A gmem takes KEEP_SIZE alone and with PUNCH_HOLE; every other mode of fallocate is EOPNOTSUPP and does nothing."""
    gmem.allocate(0, 2 * PAGE_SIZE)
    refused = {"none": 0, "PUNCH_HOLE": FALLOC_FL_PUNCH_HOLE}
    for name, mode in OTHER_MODES.items():
        refused |= {name: mode, f"{name}|KEEP_SIZE": mode | FALLOC_FL_KEEP_SIZE}
        refused[f"{name}|PUNCH_HOLE|KEEP_SIZE"] = mode | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    answers = {name: gmem.raw.fallocate(mode, PAGE_SIZE, 2 * PAGE_SIZE) for name, mode in refused.items()}
    assert answers == dict.fromkeys(refused, Errno.ENOTSUP)
    assert gmem.allocated_pages() == 2
    assert gmem.raw.fallocate(FALLOC_FL_KEEP_SIZE, PAGE_SIZE, 2 * PAGE_SIZE) == OK
    assert gmem.allocated_pages() == 3
    assert gmem.raw.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE_SIZE, 2 * PAGE_SIZE) == OK
    assert gmem.allocated_pages() == 1


@contract("GM-FAL-002", "GM-FAL-003")
def test_pages_are_allocated_and_freed_as_asked(gmem: GuestMemfd) -> None:
    """Allocating makes exactly the pages of its range, punching frees exactly the pages of its range, and nothing else."""
    assert gmem.allocated_pages() == 0
    assert gmem.raw.allocate(3 * PAGE_SIZE, 5 * PAGE_SIZE) == OK
    assert populated(gmem, 10) == [3, 4, 5, 6, 7]
    assert gmem.raw.allocate(6 * PAGE_SIZE, 3 * PAGE_SIZE) == OK
    assert gmem.raw.punch(4 * PAGE_SIZE, PAGE_SIZE) == OK
    assert populated(gmem, 10) == [3, 5, 6, 7, 8]
    assert gmem.raw.allocate(0, gmem.size) == OK
    assert gmem.allocated_pages() == gmem.pages
    assert gmem.raw.punch(PAGE_SIZE, gmem.size - 2 * PAGE_SIZE) == OK
    assert [gmem.allocated_pages(page * PAGE_SIZE, PAGE_SIZE) for page in (0, 1, gmem.pages - 1)] == [1, 0, 1]
    assert gmem.allocated_pages() == 2
    assert gmem.raw.punch(0, gmem.size) == OK
    assert gmem.allocated_pages() == 0


def populated(gmem: GuestMemfd, pages: int) -> list[int]:
    """Which of the first pages of the file are allocated."""
    return [page for page in range(pages) if gmem.allocated_pages(page * PAGE_SIZE, PAGE_SIZE)]


@contract("GM-FAL-006")
@any_kind_will_do
def test_unaligned_ranges_are_refused(gmem: GuestMemfd) -> None:
    """Offset and length of both modes are multiples of the page size: EINVAL, and no page comes or goes."""
    gmem.allocate(0, 2 * PAGE_SIZE)
    for mode in (FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE):
        for odd in (1, 511, 512, 2048, PAGE_SIZE - 1):
            assert gmem.raw.fallocate(mode, PAGE_SIZE + odd, 2 * PAGE_SIZE) == Errno.EINVAL
            assert gmem.raw.fallocate(mode, PAGE_SIZE, PAGE_SIZE + odd) == Errno.EINVAL
            assert gmem.raw.fallocate(mode, PAGE_SIZE, odd) == Errno.EINVAL
            assert gmem.raw.fallocate(mode, PAGE_SIZE + odd, PAGE_SIZE - odd) == Errno.EINVAL
        assert gmem.allocated_pages() == 2
        assert gmem.raw.fallocate(mode, PAGE_SIZE, 2 * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == (3 if mode == FALLOC_FL_KEEP_SIZE else 1)
        gmem.punch(2 * PAGE_SIZE, PAGE_SIZE)
        gmem.allocate(0, 2 * PAGE_SIZE)


@contract("GM-FAL-007")
@any_kind_will_do
def test_empty_and_negative_ranges_are_refused(gmem: GuestMemfd) -> None:
    """A length of zero, a negative length and a negative offset are EINVAL in both modes, however well aligned."""
    gmem.allocate(0, 2 * PAGE_SIZE)
    for mode in (FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE):
        for length in (0, -PAGE_SIZE, -(1 << 63)):
            assert gmem.raw.fallocate(mode, PAGE_SIZE, length) == Errno.EINVAL
        for offset in (-PAGE_SIZE, -(1 << 63)):
            assert gmem.raw.fallocate(mode, offset, 2 * PAGE_SIZE) == Errno.EINVAL
        assert gmem.allocated_pages() == 2
        assert gmem.raw.fallocate(mode, PAGE_SIZE, 2 * PAGE_SIZE) == OK
        gmem.punch(2 * PAGE_SIZE, PAGE_SIZE)
        gmem.allocate(0, 2 * PAGE_SIZE)


@contract("GM-FAL-008", "GM-FAL-011")
def test_the_end_of_all_offsets(vm: Vm) -> None:
    """A range may end at the largest offset, 2^63-1 rounded down to a page; one page more is EFBIG in both modes."""
    with vm.create_guest_memfd(LARGEST) as gmem:
        last = LARGEST - PAGE_SIZE
        assert gmem.raw.allocate(last, PAGE_SIZE) == OK
        assert gmem.allocated_pages(last, PAGE_SIZE) == 1
        assert gmem.raw.allocate(LARGEST, PAGE_SIZE) == Errno.EFBIG
        assert gmem.raw.allocate(last, 2 * PAGE_SIZE) == Errno.EFBIG
        assert gmem.raw.punch(LARGEST, PAGE_SIZE) == Errno.EFBIG
        assert gmem.raw.punch(last, LARGEST) == Errno.EFBIG
        assert gmem.raw.punch(0, LARGEST - PAGE_SIZE) == OK
        assert gmem.allocated_pages(last, PAGE_SIZE) == 1
        assert gmem.raw.punch(last, PAGE_SIZE) == OK
        assert gmem.allocated_pages(last, PAGE_SIZE) == 0


@contract("GM-FAL-009", "GM-FAL-010")
def test_nothing_is_allocated_past_the_end(gmem: GuestMemfd) -> None:
    """Allocating never grows the file: a range that is not wholly inside it is EINVAL as a whole, its good part too."""
    end = gmem.size
    for offset, length in (
        (end, PAGE_SIZE),
        (end + PAGE_SIZE, PAGE_SIZE),
        (LARGEST - PAGE_SIZE, PAGE_SIZE),
        (end - PAGE_SIZE, 2 * PAGE_SIZE),
        (0, end + PAGE_SIZE),
        (0, LARGEST),
    ):
        assert gmem.raw.allocate(offset, length) == Errno.EINVAL
    assert gmem.allocated_pages() == 0
    assert gmem.raw.allocate(end - PAGE_SIZE, PAGE_SIZE) == OK
    assert gmem.raw.allocate(0, end) == OK
    assert gmem.allocated_pages() == gmem.pages
    assert os.fstat(gmem.fileno()).st_size == end


@contract("GM-FAL-011", "GM-FAL-012")
def test_punching_where_nothing_is_succeeds(gmem: GuestMemfd) -> None:
    """A hole may be punched where one is already, at the end of the file, behind it and across it, up to 2^63-4096."""
    end = gmem.size
    for _ in range(2):
        assert gmem.raw.punch(0, end) == OK
    gmem.allocate(0, 2 * PAGE_SIZE)
    gmem.allocate(end - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    for offset, length in (
        (end, PAGE_SIZE),
        (end + 7 * PAGE_SIZE, PAGE_SIZE),
        (end, LARGEST - end),
        (LARGEST - PAGE_SIZE, PAGE_SIZE),
    ):
        assert gmem.raw.punch(offset, length) == OK
        assert gmem.allocated_pages() == 4
    for _ in range(2):
        assert gmem.raw.punch(end - PAGE_SIZE, 2 * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == 3
    for _ in range(2):
        assert gmem.raw.punch(PAGE_SIZE, LARGEST - PAGE_SIZE) == OK
        assert gmem.allocated_pages() == 1
    assert os.fstat(gmem.fileno()).st_size == end
    gmem.allocate(end - 4 * PAGE_SIZE)
    assert gmem.allocated_pages() == 5


@contract("GM-FAL-013")
@gmem_kinds("gMS")
def test_allocating_what_is_there_keeps_its_contents(gmem: GuestMemfd) -> None:
    """Allocating a range that is populated in part keeps the contents of that part and adds zeroed pages."""
    with gmem.map() as host:
        for page in (1, 3):
            host.fill(FILLER, page * PAGE_SIZE, PAGE_SIZE)
        for _ in range(2):
            assert gmem.raw.allocate(0, 5 * PAGE_SIZE) == OK
            assert gmem.allocated_pages() == 5
            assert [host.is_filled_with(FILLER, page * PAGE_SIZE, PAGE_SIZE) for page in range(5)] == [0, 1, 0, 1, 0]
            assert [host.is_filled_with(0, page * PAGE_SIZE, PAGE_SIZE) for page in range(5)] == [1, 0, 1, 0, 1]


@contract("GM-FAL-014", "C22")
@gmem_kinds("gMS")
def test_allocated_pages_read_as_zero_on_the_host(gmem: GuestMemfd) -> None:
    """Pages that were only allocated are zeroed when the host first touches them, whatever the memory held before."""
    leave_dirty_memory_behind()
    gmem.allocate(0, LOOKED_AT)
    with gmem.map(LOOKED_AT) as host:
        # Allocating alone leaves the pages not up to date, so nothing but the touch can have zeroed them.
        assert not any(host.resident_pages())
        assert host.is_filled_with(0)
        assert all(host.resident_pages())
    assert gmem.allocated_pages() == LOOKED_AT // PAGE_SIZE


@contract("GM-FAL-014", "C22")
@guest_reaches
def test_allocated_pages_read_as_zero_in_the_guest(running: Running) -> None:
    """Pages that were only allocated are zeroed when the guest first touches them, whatever the memory held before."""
    assert_zero_for_guest(running.cpu, running.gmem)


@contract("GM-FAL-014", "C22")
@vm_types("sw-protected")
@gmem_kinds("g0")
def test_allocated_pages_read_as_zero_in_private_memory(running: Running) -> None:
    """Pages that were only allocated are zeroed when the guest first touches them as private memory."""
    running.vm.set_private(GPA, SIZE)
    assert_zero_for_guest(running.cpu, running.gmem)


LOOKED_AT = 64 * PAGE_SIZE


def leave_dirty_memory_behind() -> None:
    """Give pages back to the kernel that are not zero: whoever forgets to clear a page will show them."""
    with Mapping.anonymous(4 * LOOKED_AT) as dirty:
        dirty.fill(FILLER)


def assert_zero_for_guest(cpu: GuestCpu, gmem: GuestMemfd) -> None:
    """Allocate, and let the guest look at every word of the file."""
    leave_dirty_memory_behind()
    gmem.allocate(0, LOOKED_AT)
    assert cpu.first_not(0, GPA, LOOKED_AT // 8, step=8) is None
    assert gmem.allocated_pages() == LOOKED_AT // PAGE_SIZE


@contract("GM-FAL-015", "GM-FAL-016")
@gmem_kinds("gMS")
def test_a_hole_is_exact_and_reaches_old_mappings(gmem: GuestMemfd) -> None:
    """A punch takes its pages away under existing mappings, which read zero there and the old bytes on each side."""
    with gmem.map(16 * PAGE_SIZE) as host, gmem.map(4 * PAGE_SIZE, 6 * PAGE_SIZE) as other:
        host.fill(FILLER)
        assert other.is_filled_with(FILLER)
        gmem.punch(7 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert gmem.allocated_pages() == 14
        assert host.is_filled_with(FILLER, 0, 7 * PAGE_SIZE)
        assert host.is_filled_with(FILLER, 9 * PAGE_SIZE)
        assert host.is_filled_with(0, 7 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert other.is_filled_with(0, PAGE_SIZE, 2 * PAGE_SIZE)
        # What is there now is one new page for both, not each mapping's own.
        other.store(STAMP, PAGE_SIZE)
        assert host.load(7 * PAGE_SIZE) == STAMP
        assert gmem.allocated_pages() == 16


@contextmanager
def harmless_signal() -> Iterator[int]:
    """A signal whose handler does nothing, so that it interrupts a call and no more."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        yield signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


@contract("GM-FAL-017")
@any_kind_will_do
def test_a_signal_ends_a_long_allocation(vm: Vm, gmem_kind: GmemFlag) -> None:
    """A signal ends an allocation with EINTR; the pages made so far stay, from the start without gaps, and it can go on."""
    with vm.create_guest_memfd(BIG, gmem_kind) as gmem, harmless_signal() as number:
        for _ in range(20):  # an allocation that was over before the signal came is no answer
            answer, pages = allocate_under_signal(gmem, number)
            if answer != OK:
                break
            gmem.punch()
        assert answer == Errno.EINTR
        assert 0 < pages < gmem.pages
        assert gmem.allocated_pages(0, pages * PAGE_SIZE) == pages
        assert gmem.raw.allocate(0, (pages + 1) * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == pages + 1


def allocate_under_signal(gmem: GuestMemfd, number: int) -> tuple[Answer, int]:
    """Allocate the whole file in a thread, signal the thread at the first page; its answer, and the pages there are."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(gmem.raw.allocate(0, gmem.size)))
    thread.start()
    deadline = time.monotonic() + 20
    while not gmem.allocated_pages() and time.monotonic() < deadline:
        pass  # no pause: the allocation takes milliseconds
    if thread.ident is not None and thread.is_alive():
        signal.pthread_kill(thread.ident, number)
    thread.join()
    return answers[0], gmem.allocated_pages()


@contract("GM-FAL-018")
@gmem_kinds("g0")
def test_an_allocation_under_a_pending_signal_does_nothing(gmem: GuestMemfd) -> None:
    """With a signal already pending, an allocation answers EINTR and has made no page; the next one is not affected."""
    wanted = {"arguments": (gmem.fileno(), FALLOC_FL_KEEP_SIZE, 0, SIZE)}

    def allocate_twice() -> tuple[Answer, int, Answer, int]:
        first, pages = gmem.raw.allocate(0, SIZE), gmem.allocated_pages()
        return first, pages, gmem.raw.allocate(0, SIZE), gmem.allocated_pages()

    seen = in_child_with_signal_pending(
        allocate_twice, lambda call: call.number == NUMBER["fallocate"] and call.arguments[:4] == wanted["arguments"]
    )
    assert seen == (Errno.EINTR, 0, OK, gmem.pages)


@contract("GM-FAL-018")
@gmem_kinds("g0")
def test_a_punch_under_a_pending_signal_is_done(gmem: GuestMemfd) -> None:
    """Punching does not ask for signals: with one pending it punches the whole hole."""
    gmem.allocate()
    answer = in_child_with_signal_pending(lambda: gmem.raw.punch(0, SIZE), lambda call: call.number == NUMBER["fallocate"])
    assert answer == OK
    assert gmem.allocated_pages() == 0


@contract("GM-FAL-019", "C13")
@any_kind_will_do
def test_another_process_may_allocate_and_punch(vm: Vm, gmem: GuestMemfd) -> None:
    """Who holds the descriptor may allocate and punch, although the VM's own ioctls answer EIO to everyone but its owner."""
    gmem.allocate(0, 2 * PAGE_SIZE)

    def in_other_process() -> tuple[Answer, Answer, Answer]:
        return (
            vm.raw.check_extension(Cap.GUEST_MEMFD),
            gmem.raw.allocate(4 * PAGE_SIZE, PAGE_SIZE),
            gmem.raw.punch(0, PAGE_SIZE),
        )

    assert in_other_process()[0] == 1
    gmem.allocate(0, PAGE_SIZE)
    gmem.punch(4 * PAGE_SIZE, PAGE_SIZE)
    assert in_child(in_other_process) == (Errno.EIO, OK, OK)
    assert populated(gmem, 8) == [1, 4]


ALLOCATE_AND_PUNCH = f"""
import ctypes, fcntl, sys
vm, gmem, check_extension, capability = map(int, sys.argv[1:])
try:
    print(fcntl.ioctl(vm, check_extension, capability))
except OSError as error:
    print(-error.errno)
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
print(fallocate(gmem, {FALLOC_FL_KEEP_SIZE}, {4 * PAGE_SIZE}, {PAGE_SIZE}))
print(fallocate(gmem, {FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE}, 0, {PAGE_SIZE}))
"""


@contract("GM-FAL-019", "C14")
@gmem_kinds("g0")
def test_another_program_may_allocate_and_punch(vm: Vm, gmem: GuestMemfd) -> None:
    """A program that only inherited the descriptor may allocate and punch, while the VM answers EIO to it."""
    gmem.allocate(0, 2 * PAGE_SIZE)
    vm.set_cloexec(False)
    numbers = (vm.fileno(), gmem.fileno(), lib.KVM_CHECK_EXTENSION, int(Cap.GUEST_MEMFD))
    with spawn_python(ALLOCATE_AND_PUNCH, *map(str, numbers)) as program:
        answers, _ = program.communicate(timeout=60)
    assert [int(line) for line in answers.split()] == [Errno.EIO, 0, 0]
    assert populated(gmem, 8) == [1, 4]


@contract("GM-FAL-020")
def test_the_file_works_without_its_vm(running: Running) -> None:
    """Pages come and go when the VM's descriptor and its vCPUs are closed, and the file is all that is left."""
    gmem = running.gmem
    running.cpu.load(running.machine.gpa)  # the vCPU has run
    running.cpu.close()
    running.vm.close()
    assert gmem.raw.allocate(0, gmem.size) == OK
    assert gmem.allocated_pages() == gmem.pages
    assert gmem.raw.punch(PAGE_SIZE, gmem.size) == OK
    assert gmem.allocated_pages() == 1


@contract("GM-FAL-020")
@requires("sev")
def test_the_file_works_after_its_vm_died(kvm: Kvm) -> None:
    """Pages come and go when the VM is dead, as the source of a successful SEV move is, and answers EIO to its owner."""
    with kvm.create_vm(VmType.SEV) as source, kvm.create_vm(VmType.SEV) as target, source.create_guest_memfd(SIZE) as gmem:
        sev = ffi.new("struct kvm_sev_init *")
        command = ffi.new("struct kvm_sev_cmd *", {"id": lib.KVM_SEV_INIT2, "data": entry.address_of(sev)})
        assert source.raw.ioctl_struct(lib.KVM_MEMORY_ENCRYPT_OP, command) == OK
        assert source.raw.check_extension(Cap.GUEST_MEMFD) == 1
        assert target.raw.enable_cap(Cap.VM_MOVE_ENC_CONTEXT_FROM, source.fileno()) == OK
        assert source.raw.check_extension(Cap.GUEST_MEMFD) == Errno.EIO
        assert gmem.raw.allocate(0, SIZE) == OK
        assert gmem.allocated_pages() == gmem.pages
        assert gmem.raw.punch(PAGE_SIZE, SIZE) == OK
        assert gmem.allocated_pages() == 1


@contract("GM-FAL-021")
@any_kind_will_do
def test_the_file_size_limit_does_not_count(gmem: GuestMemfd) -> None:
    """RLIMIT_FSIZE does not bound the allocation of a gmem, whose size never changes."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    control = os.memfd_create("control", os.MFD_CLOEXEC)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, hard))
        # The limit is in force: a file that grows meets it.
        assert syscalls.fallocate(control, 0, 0, PAGE_SIZE) == OK
        assert syscalls.fallocate(control, 0, 0, 16 * PAGE_SIZE) == Errno.EFBIG
        assert gmem.raw.allocate(0, 16 * PAGE_SIZE) == OK
        assert gmem.allocated_pages() == 16
        assert gmem.raw.punch(PAGE_SIZE, 15 * PAGE_SIZE) == OK
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
        os.close(control)
    assert gmem.allocated_pages() == 1


@contract("GM-FAL-022", "C23")
@guest_reaches
def test_one_punch_reaches_every_slot_of_the_file(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A punch over a part of the file that several slots share out takes the pages from all of them."""
    assert_punch_reaches_all_slots(vm, gmem, cpu)


@contract("GM-FAL-022", "C23")
@vm_types("sw-protected")
@gmem_kinds("g0")
def test_one_punch_reaches_every_private_slot_of_the_file(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A punch over a part of the file that several slots share out takes the pages from all of them, private memory too."""
    for gpa in SHARES.values():
        vm.set_private(gpa, 4 * PAGE_SIZE)
    assert_punch_reaches_all_slots(vm, gmem, cpu)


SHARES = {0: GPA + 64 * MiB, 4: GPA, 8: GPA + 32 * MiB}
"""Where the guest sees which four pages of the file, by the first of them: in another order than in the file."""


def assert_punch_reaches_all_slots(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Three slots of four pages each, and a punch over the last two, all, and the first two pages."""
    for slot, (first, gpa) in enumerate(SHARES.items()):
        vm.bind(gmem, slot=slot, gpa=gpa, size=4 * PAGE_SIZE, offset=first * PAGE_SIZE)
        cpu.stamp(gpa, STAMP + first, 4)
    gmem.punch(2 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert populated(gmem, 12) == [0, 1, 10, 11]
    seen = {first + page: cpu.load(gpa + page * PAGE_SIZE) for first, gpa in SHARES.items() for page in range(4)}
    assert seen == {page: 0 if 2 <= page < 10 else STAMP + page for page in range(12)}


@contract("GM-FAL-023", "C23")
@guest_reaches
def test_a_punch_finds_the_right_guest_pages(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Where a slot shows the file from an offset on, a punch takes those guest pages that show the punched ones."""
    assert_punch_is_translated(vm, gmem, cpu)


@contract("GM-FAL-023", "C23")
@vm_types("sw-protected")
@gmem_kinds("g0")
def test_a_punch_finds_the_right_private_pages(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Where a slot shows the file from an offset on, a punch takes those private pages that show the punched ones."""
    for gpa in LOW_AND_HIGH:
        vm.set_private(gpa, 8 * PAGE_SIZE)
    assert_punch_is_translated(vm, gmem, cpu)


LOW_AND_HIGH = (MiB // 4, GPA)
"""Guest addresses whose page numbers lie below and above those of the file's pages 99 to 109."""


def assert_punch_is_translated(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """A slot over pages k to k+8 of the file, punched around its two ends and inside, at a low and a high address."""
    k, pages = 100, 8
    for gpa in LOW_AND_HIGH:
        region = vm.bind(gmem, gpa=gpa, size=pages * PAGE_SIZE, offset=k * PAGE_SIZE)
        for first, count in ((k - 1, 2), (k + pages - 1, 2), (k + 3, 2), (k - 4, 4), (k + pages, 4), (k - 1, pages + 2)):
            gmem.allocate((k - 8) * PAGE_SIZE, (pages + 16) * PAGE_SIZE)
            cpu.stamp(gpa, STAMP, pages)
            gmem.punch(first * PAGE_SIZE, count * PAGE_SIZE)
            assert gmem.allocated_pages() == pages + 16 - count
            assert gmem.allocated_pages(first * PAGE_SIZE, count * PAGE_SIZE) == 0
            wanted = [0 if first <= k + page < first + count else STAMP + page for page in range(pages)]
            assert [cpu.load(gpa + page * PAGE_SIZE) for page in range(pages)] == wanted
        vm.delete_region(region.slot)


@contract("GM-FAL-024")
@guest_reaches
def test_a_punch_of_unbound_pages_leaves_the_guest_alone(
    vm: Vm, gmem: GuestMemfd, cpu: GuestCpu, request: pytest.FixtureRequest
) -> None:
    """Allocating and punching pages that no slot shows neither flushes translations nor makes a running vCPU fault."""
    bound = 4 * PAGE_SIZE
    vm.bind(gmem, gpa=GPA, size=bound, offset=bound)
    cpu.stamp(GPA, STAMP, 4)
    rounds = int(20 * request.config.getoption("--effort"))
    with Stats(vm) as of_vm, Stats(cpu.vcpu) as of_vcpu:
        cpu.start("watch", rdi=GPA, rsi=STAMP, rdx=STAMP)
        with cpu.running() as run:
            wait_until(lambda: of_vcpu["exits"] > 0, "the vCPU runs")
            flushes, faults = of_vm["remote_tlb_flush_requests"], of_vcpu["pf_taken"]
            for _ in range(rounds):
                for offset, length in ((0, bound), (2 * bound, 8 * bound)):
                    gmem.allocate(offset, length)
                    gmem.punch(offset, length)
            assert (of_vm["remote_tlb_flush_requests"], of_vcpu["pf_taken"]) == (flushes, faults)
            assert run.alive
            # The control: what the guest is reading is flushed, and the guest sees it.
            gmem.punch(bound, PAGE_SIZE)
            assert cpu.finish(run.result()).rax == 0
            assert of_vm["remote_tlb_flush_requests"] > flushes
            assert of_vcpu["pf_taken"] > faults
    assert [cpu.load(GPA + page * PAGE_SIZE) for page in range(4)] == [0, STAMP + 1, STAMP + 2, STAMP + 3]
