"""GM-MAP: what the kernel does with mapped gmem on somebody's behalf: system calls, direct I/O, pins, fault handlers.

Whatever cannot be touched is an error of the call, never a signal: a SIGBUS would end the test's process.
"""

import errno
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmgmem import syscalls
from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.errors import Errno
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.io_uring import IoUring
from kvmgmem.memory import Mapping
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing import contract, gmem_kinds, requires
from kvmgmem.testing.fixtures import GPA, SIZE, Running
from kvmgmem.testing.shmem import shmem
from kvmgmem.userfaultfd import FEATURE_WP_ASYNC, RegisterMode, Userfaultfd

OLD, NEW = b"\xa5" * PAGE_SIZE, b"\x5a" * PAGE_SIZE
ZEROS = bytes(PAGE_SIZE)
PAGEMAP_UFFD_WP = 1 << 57

mappable = gmem_kinds("gM", "gMS")
shared_from_start = gmem_kinds("gMS")


@contextmanager
def opened(*fds: int) -> Iterator[tuple[int, ...]]:
    """Descriptors that are closed at the end."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def far_side(gmem: GuestMemfd) -> Iterator[tuple[int, int]]:
    """A child process that has mapped the gmem and a page more on its own: its PID, and the address there."""

    def child(channel: Channel) -> None:
        with gmem.map(SIZE + PAGE_SIZE) as theirs:
            channel.send(theirs.address)
            channel.receive()

    with ChildProcess(child) as process:
        yield process.pid, process.receive()
        process.send()
        process.result()


@contract("GM-MAP-033")
@requires("userfaultfd")
@mappable
def test_userfaultfd_cannot_handle_faults(gmem: GuestMemfd) -> None:
    """gmem has no operations for userfaultfd: neither missing nor minor faults can be registered, where shmem's can."""
    with Userfaultfd() as handler, shmem(SIZE) as memory, Mapping.of(memory, SIZE) as control, gmem.map() as host:
        for mode in (RegisterMode.MISSING, RegisterMode.MINOR):
            assert handler.register(control.address, SIZE, mode) == OK, mode
            assert handler.register(host.address, SIZE, mode) == Errno.EINVAL, mode
            assert handler.register(host.address, SIZE, mode | RegisterMode.WP) == Errno.EINVAL, mode


@contract("GM-MAP-034")
@requires("userfaultfd")
@mappable
def test_userfaultfd_write_protection_must_be_asynchronous(gmem: GuestMemfd) -> None:
    """Write protection can be registered only if the kernel resolves its faults alone (UFFD_FEATURE_WP_ASYNC)."""
    with gmem.map() as host:
        with Userfaultfd() as handler, Mapping.anonymous(SIZE) as anonymous:
            assert handler.register(anonymous.address, SIZE, RegisterMode.WP) == OK
            assert handler.register(host.address, SIZE, RegisterMode.WP) == Errno.EINVAL
        with Userfaultfd(FEATURE_WP_ASYNC) as handler:
            assert handler.register(host.address, SIZE, RegisterMode.WP) == OK


def is_write_protected(host: Mapping, offset: int) -> bool:
    """Whether /proc/self/pagemap says that userfaultfd protects the page."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek((host.address + offset) // PAGE_SIZE * 8)
        (entry,) = struct.unpack("<Q", pagemap.read(8))
    return bool(entry & PAGEMAP_UFFD_WP)


@contract("GM-MAP-034")
@requires("userfaultfd")
@shared_from_start
def test_asynchronous_write_protection_tracks_writes(gmem: GuestMemfd) -> None:
    """Asynchronous write protection marks pages, lets loads pass and is lifted by a store, which goes to the shared page."""
    with gmem.map() as host, gmem.map() as other, Userfaultfd(FEATURE_WP_ASYNC) as handler:
        host.store(1)
        assert handler.register(host.address, SIZE, RegisterMode.WP) == OK
        assert handler.write_protect(host.address, SIZE) == OK
        assert host.load() == 1
        assert (is_write_protected(host, 0), is_write_protected(host, PAGE_SIZE)) == (True, True)
        host.store(2)
        assert (is_write_protected(host, 0), is_write_protected(host, PAGE_SIZE)) == (False, True)
        assert other.load() == 2


@contract("GM-MAP-035")
@requires(config="CROSS_MEMORY_ATTACH")
@shared_from_start
def test_process_vm_calls_reach_shared_memory(gmem: GuestMemfd) -> None:
    """process_vm_readv and writev reach gmem that another process has mapped, up to the end of the file."""
    with gmem.map() as host, Mapping.anonymous(2 * PAGE_SIZE) as ours, far_side(gmem) as (pid, theirs):
        host.write(PAGE_SIZE, OLD)
        assert syscalls.process_vm_readv(pid, ours.address, theirs + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
        assert ours.read(0, PAGE_SIZE) == OLD
        ours.write(0, NEW + OLD)
        assert syscalls.process_vm_writev(pid, ours.address, theirs + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
        assert host.read(PAGE_SIZE, PAGE_SIZE) == NEW
        last = SIZE - PAGE_SIZE
        assert syscalls.process_vm_writev(pid, ours.address, theirs + last, 2 * PAGE_SIZE) == PAGE_SIZE
        assert host.read(last, PAGE_SIZE) == NEW
        assert syscalls.process_vm_readv(pid, ours.address, theirs + SIZE, PAGE_SIZE) == Errno.EFAULT
    assert gmem.allocated_pages() == 2


@contract("GM-MAP-035")
@requires(config="CROSS_MEMORY_ATTACH")
@gmem_kinds("gM")
def test_process_vm_calls_do_not_reach_other_memory(gmem: GuestMemfd) -> None:
    """process_vm_readv and writev are EFAULT for gmem that the host may not touch, on either side, and allocate nothing."""
    with gmem.map() as host, Mapping.anonymous(PAGE_SIZE) as ours, far_side(gmem) as (pid, theirs):
        for call in (syscalls.process_vm_readv, syscalls.process_vm_writev):
            assert call(pid, ours.address, theirs, PAGE_SIZE) == Errno.EFAULT
            assert call(os.getpid(), host.address, ours.address, PAGE_SIZE) == Errno.EFAULT
            assert call(os.getpid(), ours.address + 64, ours.address, 64) == 64
    assert gmem.allocated_pages() == 0


def errno_of(call: Callable[[], object]) -> int:
    """The errno that a call of the os module raises; 0 if it works."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


@contract("GM-MAP-036")
@shared_from_start
def test_proc_mem_reaches_shared_memory(gmem: GuestMemfd) -> None:
    """/proc/pid/mem reads and writes gmem that the process has mapped; a read-only mapping of it cannot even be forced."""
    with gmem.map() as host, gmem.map(prot=mmap.PROT_READ) as reader, far_side(gmem) as (pid, theirs):
        host.write(0, OLD)
        with opened(os.open(f"/proc/{pid}/mem", os.O_RDWR)) as (memory,):
            assert os.pread(memory, PAGE_SIZE, theirs) == OLD
            assert os.pwrite(memory, NEW, theirs + PAGE_SIZE) == PAGE_SIZE
            assert host.read(PAGE_SIZE, PAGE_SIZE) == NEW
            assert errno_of(lambda: os.pread(memory, PAGE_SIZE, theirs + SIZE)) == errno.EIO
            assert len(os.pread(memory, 2 * PAGE_SIZE, theirs + SIZE - PAGE_SIZE)) == PAGE_SIZE
        with opened(os.open("/proc/self/mem", os.O_RDWR)) as (memory,):
            assert os.pwrite(memory, NEW, host.address) == PAGE_SIZE
            assert os.pread(memory, PAGE_SIZE, reader.address) == NEW
            assert errno_of(lambda: os.pwrite(memory, OLD, reader.address)) == errno.EIO
            assert host.read(0, PAGE_SIZE) == NEW


@contract("GM-MAP-036")
@gmem_kinds("gM")
def test_proc_mem_does_not_reach_other_memory(gmem: GuestMemfd) -> None:
    """/proc/pid/mem gives EIO for gmem that the host may not touch, and allocates nothing."""
    with opened(os.open("/proc/self/mem", os.O_RDWR)) as (memory,), gmem.map() as host, Mapping.anonymous(SIZE) as control:
        assert os.pwrite(memory, NEW, control.address) == PAGE_SIZE
        assert errno_of(lambda: os.pwrite(memory, NEW, host.address)) == errno.EIO
        assert errno_of(lambda: os.pread(memory, PAGE_SIZE, host.address)) == errno.EIO
    assert gmem.allocated_pages() == 0


def _pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)


def _socket_pair() -> tuple[int, int]:
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiver.setblocking(False)
    return receiver.detach(), sender.detach()


CHANNELS = (_pipe, _socket_pair)


@contract("GM-MAP-037")
@shared_from_start
def test_write_and_read_take_shared_memory(gmem: GuestMemfd) -> None:
    """write() from gmem and read() into it move its bytes, as with any memory."""
    for channel in CHANNELS:
        with gmem.map() as host, gmem.map() as other, opened(*channel()) as (out, into):
            other.write(0, OLD + ZEROS)
            assert syscalls.write(into, host.address, PAGE_SIZE) == PAGE_SIZE, channel
            assert os.read(out, PAGE_SIZE) == OLD
            assert os.write(into, NEW) == PAGE_SIZE
            assert syscalls.read(out, host.address + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE, channel
            assert other.read(PAGE_SIZE, PAGE_SIZE) == NEW
    assert gmem.allocated_pages() == 2


@contract("GM-MAP-037")
@mappable
def test_write_and_read_of_other_memory_are_efault(gmem: GuestMemfd) -> None:
    """write() from and read() into gmem that cannot be touched, or past its end, are EFAULT and move nothing."""
    with gmem.map(SIZE + PAGE_SIZE) as host, Mapping.anonymous(PAGE_SIZE) as control:
        bad = host.address + (SIZE if gmem.kind == "gMS" else 0)
        for channel in CHANNELS:
            with opened(*channel()) as (out, into):
                assert syscalls.write(into, bad, PAGE_SIZE) == Errno.EFAULT, channel
                assert syscalls.read(out, control.address, PAGE_SIZE) == Errno.EAGAIN  # nothing has arrived
                assert syscalls.write(into, control.address, PAGE_SIZE) == PAGE_SIZE, channel
                assert syscalls.read(out, bad, PAGE_SIZE) == Errno.EFAULT, channel
    assert gmem.allocated_pages() == 0


@contract("GM-MAP-037")
@mappable
def test_read_of_dev_zero_clears_shared_memory_only(gmem: GuestMemfd) -> None:
    """Reading /dev/zero clears shared gmem; for other gmem it is EFAULT and allocates nothing."""
    with gmem.map() as host, opened(os.open("/dev/zero", os.O_RDONLY)) as (zero,):
        if gmem.kind == "gMS":
            host.write(0, OLD + OLD)
            assert syscalls.read(zero, host.address, PAGE_SIZE) == PAGE_SIZE
            assert host.read(0, 2 * PAGE_SIZE) == ZEROS + OLD
        else:
            assert syscalls.read(zero, host.address, PAGE_SIZE) == Errno.EFAULT
            assert gmem.allocated_pages() == 0


@contextmanager
def direct_file() -> Iterator[tuple[int, int]]:
    """A new file, opened twice: buffered and for direct I/O."""
    with tempfile.TemporaryFile() as file:
        path = f"/proc/self/fd/{file.fileno()}"
        with opened(os.open(path, os.O_RDWR | os.O_DIRECT)) as (direct,):
            yield file.fileno(), direct


@contract("GM-MAP-038")
@requires("direct-io")
@shared_from_start
def test_direct_io_takes_shared_memory(gmem: GuestMemfd) -> None:
    """O_DIRECT writes take their bytes straight from gmem, and reads put them there."""
    with gmem.map() as host, gmem.map() as other, direct_file() as (buffered, direct):
        other.write(0, OLD)
        assert syscalls.pwrite(direct, host.address, PAGE_SIZE) == PAGE_SIZE
        assert os.pread(buffered, PAGE_SIZE, 0) == OLD
        assert os.pwrite(buffered, NEW, 0) == PAGE_SIZE
        os.fsync(buffered)
        assert syscalls.pread(direct, host.address + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
        assert other.read(0, 2 * PAGE_SIZE) == OLD + NEW
    assert gmem.allocated_pages() == 2


@contract("GM-MAP-038")
@requires("direct-io")
@gmem_kinds("gM")
def test_direct_io_of_other_memory_is_efault(gmem: GuestMemfd) -> None:
    """O_DIRECT I/O with gmem that the host may not touch is EFAULT, and changes neither file nor gmem."""
    with gmem.map() as host, Mapping.anonymous(PAGE_SIZE) as control, direct_file() as (buffered, direct):
        control.write(0, OLD)
        assert syscalls.pwrite(direct, control.address, PAGE_SIZE) == PAGE_SIZE
        assert syscalls.pwrite(direct, host.address, PAGE_SIZE) == Errno.EFAULT
        assert syscalls.pread(direct, host.address, PAGE_SIZE) == Errno.EFAULT
        assert os.pread(buffered, 2 * PAGE_SIZE, 0) == OLD
        assert syscalls.pread(direct, control.address, PAGE_SIZE) == PAGE_SIZE
    assert gmem.allocated_pages() == 0


@contract("GM-MAP-039")
@shared_from_start
def test_vmsplice_passes_the_pages_themselves(gmem: GuestMemfd) -> None:
    """vmsplice puts gmem's pages into a pipe, not copies: later stores show there, and a punched page lives on there."""
    with gmem.map() as host, opened(*_pipe()) as (out, into):
        host.write(0, OLD + OLD)
        assert syscalls.vmsplice(into, host.address, 2 * PAGE_SIZE) == 2 * PAGE_SIZE
        host.write(0, NEW)
        gmem.punch(PAGE_SIZE, PAGE_SIZE)
        host.write(PAGE_SIZE, NEW)
        assert os.read(out, 2 * PAGE_SIZE) == NEW + OLD
        assert host.read(0, 2 * PAGE_SIZE) == NEW + NEW


@contract("GM-MAP-039")
@mappable
def test_vmsplice_of_other_memory_is_efault(gmem: GuestMemfd) -> None:
    """vmsplice from gmem that cannot be touched, or past its end, is EFAULT."""
    with gmem.map(SIZE + PAGE_SIZE) as host, Mapping.anonymous(PAGE_SIZE) as control, opened(*_pipe()) as (_, into):
        assert syscalls.vmsplice(into, control.address, PAGE_SIZE) == PAGE_SIZE
        bad = host.address + (SIZE if gmem.kind == "gMS" else 0)
        assert syscalls.vmsplice(into, bad, PAGE_SIZE) == Errno.EFAULT
    assert gmem.allocated_pages() == 0


@contract("GM-MAP-040")
@requires("io-uring")
@mappable
def test_long_term_pins_take_shared_memory_only(gmem: GuestMemfd) -> None:
    """Buffers of io_uring, pinned for long, can lie in shared gmem; other gmem, and what is past the end, is EFAULT."""
    with gmem.map(SIZE + PAGE_SIZE) as host, IoUring() as ring:
        for offset, length, works in ((0, 4 * PAGE_SIZE, True), (0, SIZE, True), (SIZE - PAGE_SIZE, 2 * PAGE_SIZE, False)):
            reachable = works and gmem.kind == "gMS"
            assert ring.register(host.address + offset, length) == (OK if reachable else Errno.EFAULT)
            assert gmem.allocated_pages() == 0 or gmem.kind == "gMS"
            if reachable:
                assert gmem.allocated_pages(offset, length) == length // PAGE_SIZE
                assert ring.unregister() == OK


@contract("GM-MAP-040")
@requires("io-uring")
@shared_from_start
def test_registered_buffers_move_the_pages_bytes(gmem: GuestMemfd) -> None:
    """I/O through a registered buffer reads and writes the gmem's pages."""
    with gmem.map() as host, gmem.map() as other, IoUring() as ring, opened(*_pipe()) as (out, into):
        assert ring.register(host.address, 2 * PAGE_SIZE) == OK
        other.write(0, OLD)
        assert ring.write_fixed(into, host.address, PAGE_SIZE) == PAGE_SIZE
        assert os.read(out, PAGE_SIZE) == OLD
        assert os.write(into, NEW) == PAGE_SIZE
        assert ring.read_fixed(out, host.address + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
        assert other.read(0, 2 * PAGE_SIZE) == OLD + NEW


@contract("GM-MAP-041")
@requires("io-uring")
@shared_from_start
def test_punching_a_pinned_page_detaches_it(running: Running) -> None:
    """A punch replaces a page even while it is pinned: mapping and guest get a new zero page, the pin keeps the old one."""
    with ExitStack() as stack:
        host = stack.enter_context(running.gmem.map())
        ring = stack.enter_context(IoUring())
        out, into = stack.enter_context(opened(*_pipe()))
        host.write(0, OLD + OLD)
        assert running.cpu.load(GPA) == int.from_bytes(OLD[:8], "little")
        assert ring.register(host.address, 2 * PAGE_SIZE) == OK
        running.gmem.punch(0, PAGE_SIZE)
        assert running.gmem.allocated_pages() == 1
        assert running.cpu.load(GPA) == 0
        assert host.read(0, 2 * PAGE_SIZE) == ZEROS + OLD

        assert ring.write_fixed(into, host.address, 2 * PAGE_SIZE) == 2 * PAGE_SIZE
        assert os.read(out, 2 * PAGE_SIZE) == OLD + OLD
        assert os.write(into, NEW + NEW) == 2 * PAGE_SIZE
        assert ring.read_fixed(out, host.address, 2 * PAGE_SIZE) == 2 * PAGE_SIZE
        assert host.read(0, 2 * PAGE_SIZE) == ZEROS + NEW
        assert running.cpu.load(GPA) == 0
        assert ring.write_fixed(into, host.address, PAGE_SIZE) == PAGE_SIZE
        assert os.read(out, PAGE_SIZE) == NEW
