"""Features to come: what is proposed for guest_memfd and its surroundings, and one behavioural probe for each.

A probe makes a cheap request, on objects of its own, and reads from the answer whether this kernel has the feature. It never
asks by capability number or by release: numbers of what is not merged yet have collided before. An answer that neither a
kernel without the feature nor one with it would give is *odd*: the interface has moved, and somebody must look.
"""

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from kvmgmem import entry
from kvmgmem._native import ffi, lib
from kvmgmem.abi import OK, PAGE_SIZE, Cap, GiB, GmemFlag, MemFlag, MiB, VmType
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.kvm import Kvm
from kvmgmem.memory import Mapping, MemoryRegion
from kvmgmem.proposed_abi import ARM_REALM, MEM_USERFAULT, Conversion, convert, link
from kvmgmem.syscalls import NUMBER
from kvmgmem.vm import Vm, region2

GPA = 1 * GiB
SIZE = 2 * MiB

SHARED = GmemFlag.MMAP | GmemFlag.INIT_SHARED
KNOWN_FLAGS = int(SHARED)

MADV_COLLAPSE = 25
UFFD_MINOR = 1 << 2
UFFDIO_CONTINUE_BIT = 1 << 7


class State(StrEnum):
    """Whether a kernel has a feature."""

    ABSENT = "absent"
    PRESENT = "present"
    ODD = "odd"
    """The answer is neither that of a kernel without the feature nor that of one with it."""
    NOT_ASKED = "not asked"
    """This machine lacks what it takes to ask."""


@dataclass(frozen=True)
class Finding:
    """A probe's answer: the state, and the sentence that says why."""

    state: State
    sentence: str

    def __str__(self) -> str:
        return f"{self.state}: {self.sentence}"


@dataclass(frozen=True)
class Feature:
    """One feature to come."""

    name: str
    title: str
    probe: Callable[[Kvm], Finding]


class NotAskedError(Exception):
    """The question cannot be put here; the message is a whole sentence."""


def absent(sentence: str) -> Finding:
    """The feature is not there."""
    return Finding(State.ABSENT, sentence)


def present(sentence: str) -> Finding:
    """The feature is there."""
    return Finding(State.PRESENT, sentence)


def odd(sentence: str) -> Finding:
    """The answer fits neither."""
    return Finding(State.ODD, sentence)


def told(answer: Answer) -> str:
    """A kernel's answer for a sentence: the errno's name, or the number."""
    return answer.name if isinstance(answer, Errno) else str(answer)


def judge(what: str, answer: Answer, *, without: tuple[Errno, ...], having: tuple[Answer, ...] = (OK,)) -> Finding:
    """`absent` for an answer in `without`, `present` for one in `having`, `odd` for any other."""
    if answer in without:
        return absent(f"{what} answers {told(answer)}")
    if answer in having:
        return present(f"{what} answers {told(answer)}")
    wanted = ", ".join(told(one) for one in (*without, *having))
    return odd(f"{what} answers {told(answer)}, which is none of {wanted}")


def ask(feature: Feature, kvm: Kvm) -> Finding:
    """Put the question; what stands in its way becomes the state `NOT_ASKED` with the reason."""
    try:
        return feature.probe(kvm)
    except NotAskedError as reason:
        return Finding(State.NOT_ASKED, str(reason))
    except KvmError as error:
        return Finding(State.NOT_ASKED, f"this kernel refuses what the question needs: {error}")


@cache
def survey() -> dict[str, Finding]:
    """Every feature's answer by name, asked once in a process; raises `HarnessError` if there is no KVM to ask."""
    with Kvm.open() as kvm:
        return {feature.name: ask(feature, kvm) for feature in FEATURES}


@cache
def has(name: str) -> bool:
    """Whether this kernel has the feature; raises `HarnessError` if there is no KVM to ask."""
    with Kvm.open() as kvm:
        return ask(lookup(name), kvm).state is State.PRESENT


def lookup(name: str) -> Feature:
    """The feature with this name; raises KeyError if there is none."""
    return next((feature for feature in FEATURES if feature.name == name), None) or _unknown(name)


def _unknown(name: str) -> Feature:
    raise KeyError(f"{name!r} is not one of {', '.join(feature.name for feature in FEATURES)}")


# -- grounds to ask on -------------------------------------------------------------------------------------------------


@contextmanager
def a_gmem(kvm: Kvm, flags: int = 0, size: int = SIZE) -> Iterator[GuestMemfd]:
    """A gmem of a default VM. Any kernel with guest_memfd makes one, though not all can bind it."""
    with kvm.create_vm() as vm, vm.create_guest_memfd(size, flags) as gmem:
        yield gmem


@contextmanager
def a_mapping(kvm: Kvm, flags: int = SHARED, size: int = SIZE) -> Iterator[tuple[GuestMemfd, Mapping]]:
    """A gmem that the host may touch, and a mapping of it at a multiple of 2 MiB; raises `NotAskedError` without one."""
    with kvm.create_vm() as vm:
        if vm.gmem_flags() & SHARED != SHARED:
            raise NotAskedError("this kernel has no gmem that the host may map and touch (6.18 has)")
        with vm.create_guest_memfd(size, flags) as gmem, Mapping.anonymous(size + SIZE) as room:
            address = -(-room.address // SIZE) * SIZE
            place = mmap.MAP_SHARED | 0x10  # MAP_FIXED: over what we reserved
            mapping = Mapping.try_map(size, fd=gmem, address=address, flags=place)
            if isinstance(mapping, Errno):
                raise KvmError("mmap", f"a gmem of flags {flags:#x}", mapping)
            # The reservation's own end unmaps it all.
            with mapping:
                yield gmem, mapping


@contextmanager
def a_binding(kvm: Kvm) -> Iterator[tuple[Vm, MemoryRegion]]:
    """A VM, and a request that binds its gmem and was seen to succeed; raises `NotAskedError` if no VM type can."""
    for vm_type in (VmType.DEFAULT, VmType.SW_PROTECTED):
        if vm_type not in kvm.vm_types():
            continue
        with kvm.create_vm(vm_type) as vm, vm.create_guest_memfd(SIZE) as gmem:
            request = MemoryRegion(slot=0, gpa=GPA, size=SIZE, gmem=gmem)
            if vm.raw.set_region(request) == OK:
                vm.delete_region(0)
                yield vm, request
                return
    raise NotAskedError("no VM that this KVM offers can bind a gmem")


def extra_flags(vm: Vm) -> list[int]:
    """Creation flags that this kernel offers beyond those we know, one bit each."""
    offered = vm.check_extension(Cap.GUEST_MEMFD_FLAGS) & ~KNOWN_FLAGS
    return [1 << bit for bit in range(64) if offered >> bit & 1]


def an_open(path: str, what: str) -> OwnedFd:
    """A device; raises `NotAskedError` if it does not open."""
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise NotAskedError(f"{path} does not open ({name}), {what}") from error


# -- conversion in place -----------------------------------------------------------------------------------------------


IN_PLACE_PARAMETER = Path("/sys/module/kvm/parameters/gmem_in_place_conversion")


def _conversion(kvm: Kvm) -> Finding:
    with a_gmem(kvm) as gmem:
        answer, _ = convert(gmem, Conversion())
    found = judge(
        "KVM_SET_MEMORY_ATTRIBUTES2 of no bytes on a gmem", answer, without=(Errno.ENOTTY,), having=(Errno.EINVAL,)
    )
    if found.state is State.ABSENT and IN_PLACE_PARAMETER.exists():
        return absent(f"{found.sentence}: switched off, {IN_PLACE_PARAMETER.name}={IN_PLACE_PARAMETER.read_text().strip()}")
    return found


def _content_modes(kvm: Kvm) -> Finding:
    needed = _conversion(kvm)
    if needed.state is not State.PRESENT:
        return absent(f"there is no conversion to give a mode to ({needed.sentence})")
    with a_gmem(kvm) as gmem:
        control, _ = convert(gmem, Conversion(size=PAGE_SIZE))
        answer, _ = convert(gmem, Conversion(size=PAGE_SIZE, flags=1))
    if control != OK:
        return odd(f"a conversion of one page to shared answers {told(control)}")
    return judge("the same with flags 1 (contents become zero)", answer, without=(Errno.EINVAL,))


def _vm_scope(kvm: Kvm) -> Finding:
    with kvm.create_vm() as vm:
        answer, _ = convert(vm, Conversion())
    return judge("KVM_SET_MEMORY_ATTRIBUTES2 of 0 bytes on a VM", answer, without=(Errno.ENOTTY,), having=(Errno.EINVAL,))


# -- a second file on one inode ----------------------------------------------------------------------------------------


def _second_file(kvm: Kvm) -> Finding:
    with kvm.create_vm() as target, a_gmem(kvm) as gmem:
        refused = link(target, gmem, flags=~0)
        what = "KVM_LINK_GUEST_MEMFD with all flags"
        found = judge(what, refused, without=(Errno.ENOTTY,), having=(Errno.EINVAL,))
        if found.state is not State.PRESENT:
            return found
        made = link(target, gmem)
        if isinstance(made, Errno):
            return odd(f"{what} answers EINVAL, but linking a gmem {told(made)}: is this ioctl another one?")
        with OwnedFd(made) as second:
            one, two = os.fstat(gmem.fileno()), os.fstat(second.fileno())
        if (one.st_dev, one.st_ino) != (two.st_dev, two.st_ino):
            return odd("KVM_LINK_GUEST_MEMFD makes a file of another inode")
        return present("KVM_LINK_GUEST_MEMFD makes a second file of a gmem's inode")


# -- kinds of gmem -----------------------------------------------------------------------------------------------------


def _is_huge(vm: Vm, flags: int) -> bool:
    made = vm.raw.create_guest_memfd(1 * GiB, flags)
    if isinstance(made, Errno):
        return False
    with made:
        return os.fstat(made.fileno()).st_blksize > PAGE_SIZE


def _huge_pages(kvm: Kvm) -> Finding:
    with kvm.create_vm() as vm:
        for flag in extra_flags(vm):
            if _is_huge(vm, flag):
                return present(f"a gmem with creation flag {flag:#x} has huge blocks")
        order = 9
        made = vm.raw.create_guest_memfd(SIZE, 0, reserved=(order,))
        if isinstance(made, Errno):
            if made == Errno.EINVAL:
                return absent("a page order in the reserved words of KVM_CREATE_GUEST_MEMFD answers EINVAL")
            return odd(f"a page order in the reserved words of KVM_CREATE_GUEST_MEMFD answers {told(made)}")
        with made:
            size = os.fstat(made.fileno()).st_blksize
    if size == PAGE_SIZE:
        return absent("no creation flag makes huge blocks, and reserved words are not looked at")
    return present(f"a page order of {order} in KVM_CREATE_GUEST_MEMFD makes blocks of {size} bytes")


def _refuses_gup(address: int) -> bool:
    """Whether the kernel cannot take references to pages of this process: then vmsplice(2) answers EFAULT."""
    reader, writer = (OwnedFd(number) for number in os.pipe())
    with reader, writer:
        vector = ffi.new("uint64_t[2]", [address, PAGE_SIZE])
        return syscall(NUMBER["vmsplice"], writer.fileno(), address_of(vector), 1, 0) == Errno.EFAULT


def _no_direct_map(kvm: Kvm) -> Finding:
    with kvm.create_vm() as vm:
        flags = extra_flags(vm)
    for flag in flags:
        with a_mapping(kvm, SHARED | flag) as (_, mapping):
            mapping.store(1)
            if _refuses_gup(mapping.address):
                return present(f"the host may touch a gmem with creation flag {flag:#x}, but the kernel takes no reference")
    return absent("no creation flag keeps the kernel from taking references to a mapped gmem's pages")


def _writable(kvm: Kvm) -> Finding:
    page = ffi.new("char[]", b"w" * PAGE_SIZE)
    with kvm.create_vm() as vm:
        offered = vm.check_extension(Cap.GUEST_MEMFD_FLAGS)
        for flags in dict.fromkeys((0, offered & KNOWN_FLAGS, *(offered & KNOWN_FLAGS | flag for flag in extra_flags(vm)))):
            made = vm.raw.create_guest_memfd(SIZE, flags)
            if isinstance(made, Errno):
                continue
            with made:
                answer = syscall(NUMBER["pwrite64"], made.fileno(), address_of(page), PAGE_SIZE, 0)
                if answer == PAGE_SIZE:
                    filled = made.allocated_pages()
                    return present(f"pwrite() to a gmem with creation flags {flags:#x} fills {filled} page")
                if answer not in (Errno.ESPIPE, Errno.EINVAL, Errno.EBADF):
                    return odd(f"pwrite() to a gmem with creation flags {flags:#x} answers {told(answer)}")
    return absent("pwrite() to a gmem of any kind is refused")


def _other_flags(kvm: Kvm) -> Finding:
    with kvm.create_vm() as vm:
        flags = extra_flags(vm)
        unexplained = [flag for flag in flags if not _is_huge(vm, flag)]
    if not flags:
        return absent("KVM_CAP_GUEST_MEMFD_FLAGS names no creation flag beyond MMAP and INIT_SHARED")
    if unexplained and not any(probe(kvm).state is State.PRESENT for probe in (_no_direct_map, _writable)):
        return odd(f"creation flags {sum(unexplained):#x} are offered, and no feature that we know of is behind them")
    return present(f"creation flags {sum(flags):#x} are offered, and known features are behind them")


def _blocks(kvm: Kvm) -> Finding:
    with a_gmem(kvm) as gmem:
        before = os.fstat(gmem.fileno()).st_blocks
        gmem.allocate(0, 8 * PAGE_SIZE)
        after = os.fstat(gmem.fileno()).st_blocks
    if (before, after) == (0, 0):
        return absent("st_blocks stays 0 when pages are allocated")
    if (before, after) == (0, 8 * PAGE_SIZE // 512):
        return present("st_blocks counts allocated pages")
    return odd(f"st_blocks goes from {before} to {after} when 8 pages are allocated")


# -- who else may handle its pages -------------------------------------------------------------------------------------


def _minor_faults(kvm: Kvm) -> Finding:
    from kvmgmem.userfaultfd import FEATURE_MINOR_SHMEM, Userfaultfd

    try:
        faults = Userfaultfd(FEATURE_MINOR_SHMEM)
    except KvmError as error:
        raise NotAskedError(f"no userfaultfd with minor faults is to be had ({error.answer.name})") from error
    with faults, a_mapping(kvm) as (_, mapping):
        answer, ioctls = faults.try_register(mapping.address, mapping.length, UFFD_MINOR)
    found = judge("UFFDIO_REGISTER of a gmem's mapping for minor faults", answer, without=(Errno.EINVAL,))
    if found.state is State.PRESENT and not ioctls & UFFDIO_CONTINUE_BIT:
        return odd(f"{found.sentence}, but offers no UFFDIO_CONTINUE")
    return found


def _userfault_slots(kvm: Kvm) -> Finding:
    with kvm.create_vm() as vm, Mapping.anonymous(SIZE) as memory, Mapping.anonymous(PAGE_SIZE) as bitmap:
        bitmap.fill(0xFF)
        plain = MemoryRegion(slot=0, gpa=GPA, size=SIZE, hva=memory.address)
        vm.set_region(plain)
        vm.delete_region(0)
        request = region2(plain.but(flags=MEM_USERFAULT))
        request.pad2[0] = bitmap.address
        answer = vm.raw.ioctl_struct(lib.KVM_SET_USER_MEMORY_REGION2, request)
        found = judge("a slot with the flag for faults told by a bitmap", answer, without=(Errno.EINVAL,))
        if found.state is not State.PRESENT or os.uname().machine != "x86_64":
            return found
        return _faults_by_bitmap(vm)


def _faults_by_bitmap(vm: Vm) -> Finding:
    from kvmgmem.arch.x86_64 import GuestMachine
    from kvmgmem.exits import MemoryFaultExit

    machine = GuestMachine(vm)
    cpu = machine.cpu()
    try:
        result = cpu.try_load(GPA)
    finally:
        cpu.close()
        machine.close()
    if isinstance(result.exit, MemoryFaultExit):
        return present("an access to a page whose bit is set leaves the guest with a memory fault exit")
    return odd(f"slot flag {MEM_USERFAULT:#x} is accepted, but an access does not leave the guest: {result}")


def _migration(kvm: Kvm) -> Finding:
    from kvmgmem.numa import memory_nodes, move_pages, nodes_of

    nodes = memory_nodes()
    if len(nodes) < 2:
        raise NotAskedError("it takes two NUMA nodes with memory to see a page move")
    with a_mapping(kvm) as (_, mapping):
        mapping.store(0x5EED)
        (here,) = nodes_of([mapping.address])
        target = next(node for node in nodes if node != here)
        _, (status,) = move_pages([mapping.address], target)
        (now,) = nodes_of([mapping.address])
        contents = mapping.load()
    if contents != 0x5EED:
        return odd(f"a page that was to move from node {here} to {target} has lost its contents")
    if now == target:
        return present("move_pages() puts a gmem's page on another node")
    if now == here:
        return absent(f"move_pages() leaves a gmem's page where it is (status {told(status)})")
    return odd(f"a page that was to move from node {here} to {target} is on {told(now)}")


def _transparent_huge_pages(kvm: Kvm) -> Finding:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        raise NotAskedError("this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)")
    with a_mapping(kvm) as (_, mapping):
        mapping.fill(1)
        answer = mapping.advise(MADV_COLLAPSE)
    # With 0 nothing is touched any more: where the feature is a defect (B17), the next fault would warn.
    return judge("MADV_COLLAPSE of a whole huge page's worth of gmem", answer, without=(Errno.EINVAL,))


# -- slots -------------------------------------------------------------------------------------------------------------


def _slot_flag(flag: MemFlag, what: str) -> Callable[[Kvm], Finding]:
    def probe(kvm: Kvm) -> Finding:
        with a_binding(kvm) as (vm, request):
            answer = vm.raw.set_region(request.but(flags=MemFlag.GUEST_MEMFD | flag))
        return judge(f"a gmem slot {what}", answer, without=(Errno.EINVAL,))

    return probe


# -- devices, the next kernel, other architectures ---------------------------------------------------------------------

_IOAS_ALLOC = 0x3B81
_IOAS_MAP_FILE = 0x3B8F
_IOMMU_TEST = 0x3BA0
_TEST_COMMAND = struct.Struct("<4I48xI4x")  # struct iommu_test_cmd (drivers/iommu/iommufd/iommufd_test.h, Linux 7.3)
_TEST_MOCK_DOMAIN = 2
_MAP_READ_WRITE = 1 << 1 | 1 << 2


def _map_file(iommu: OwnedFd, ioas: int, file: OwnedFd) -> Answer:
    fields = struct.pack("<3IiQQQ", 40, _MAP_READ_WRITE, ioas, file.fileno(), 0, SIZE, 0)
    return entry.ioctl_struct(iommu.fileno(), _IOAS_MAP_FILE, ffi.new("char[]", fields))


def _iommufd(kvm: Kvm) -> Finding:
    with an_open("/dev/iommu", "so no device's mappings can be made (CONFIG_IOMMUFD)") as iommu:
        allocated = ffi.new("uint32_t[3]", [12, 0, 0])
        answer = entry.ioctl_struct(iommu.fileno(), _IOAS_ALLOC, allocated)
        if isinstance(answer, Errno):
            raise NotAskedError(f"IOMMU_IOAS_ALLOC answers {told(answer)}")
        # Pages are pinned only once a device is behind the mapping: the mock one of CONFIG_IOMMUFD_TEST will do.
        command = ffi.new("char[]", _TEST_COMMAND.pack(_TEST_COMMAND.size, _TEST_MOCK_DOMAIN, allocated[2], 0, 0))
        answer = entry.ioctl_struct(iommu.fileno(), _IOMMU_TEST, command)
        if isinstance(answer, Errno):
            raise NotAskedError(f"there is no mock device to map memory for ({told(answer)}; CONFIG_IOMMUFD_TEST)")
        with OwnedFd(os.memfd_create("control", os.MFD_CLOEXEC)) as control, a_gmem(kvm, _shared_flags(kvm)) as gmem:
            os.ftruncate(control.fileno(), SIZE)
            accepted = _map_file(iommu, allocated[2], control)
            if isinstance(accepted, Errno):
                raise NotAskedError(f"IOMMU_IOAS_MAP_FILE of a memfd answers {told(accepted)}")
            answer = _map_file(iommu, allocated[2], gmem)
    return judge("IOMMU_IOAS_MAP_FILE of a gmem", answer, without=(Errno.EINVAL, Errno.EBADF, Errno.ENOTSUP))


def _shared_flags(kvm: Kvm) -> int:
    with kvm.create_vm() as vm:
        return int(vm.gmem_flags() & SHARED)


def _dma_buf(kvm: Kvm) -> Finding:
    with an_open("/dev/udmabuf", "so no memory can be made a dma-buf (CONFIG_UDMABUF)") as device, a_gmem(kvm) as gmem:
        # struct udmabuf_create: memfd, flags (CLOEXEC), offset, size (include/uapi/linux/udmabuf.h)
        fields = ffi.new("uint64_t[3]", [gmem.fileno() | 1 << 32, 0, SIZE])
        answer = entry.ioctl_struct(device.fileno(), 0x4018_7542, fields)
    if not isinstance(answer, Errno):
        os.close(answer)
        return present("UDMABUF_CREATE makes a dma-buf of a gmem")
    return judge("UDMABUF_CREATE of a gmem", answer, without=(Errno.EBADFD, Errno.EINVAL))


_CREATE_SESSION = 0xBA00
_PRESERVE = 0xBA40


def _live_update(kvm: Kvm) -> Finding:
    if not Path("/dev/liveupdate").exists():
        return absent("there is no /dev/liveupdate (CONFIG_LIVEUPDATE)")
    with an_open("/dev/liveupdate", "so nothing can be kept for the next kernel") as device:
        request = ffi.new("char[]", struct.pack("<Ii64s", 72, -1, f"kvmgmem-{os.getpid()}".encode()))
        answer = entry.ioctl_struct(device.fileno(), _CREATE_SESSION, request)
        if isinstance(answer, Errno):
            raise NotAskedError(f"a session with /dev/liveupdate answers {told(answer)}")
        _, number = struct.unpack_from("<Ii", ffi.buffer(request))
        with OwnedFd(number) as session, kvm.create_vm() as vm, vm.create_guest_memfd(SIZE, _shared_flags(kvm)) as gmem:
            for token, file in enumerate((vm, gmem)):
                fields = ffi.new("char[]", struct.pack("<IiQ", 16, file.fileno(), token))
                answer = entry.ioctl_struct(session.fileno(), _PRESERVE, fields)
                if answer != OK and file is vm and answer != Errno.ENOENT:
                    return odd(f"preserving a VM answers {told(answer)}")
    return judge("preserving a gmem for the next kernel", answer, without=(Errno.ENOENT, Errno.ENOTSUP))


def _arm_vm(vm_type: int, what: str) -> Callable[[Kvm], Finding]:
    def probe(kvm: Kvm) -> Finding:
        if os.uname().machine != "aarch64":
            raise NotAskedError("it is a feature of arm64")
        vm = kvm.raw.create_vm(vm_type)
        if isinstance(vm, Errno):
            return judge(f"KVM_CREATE_VM of {what}", vm, without=(Errno.EINVAL,))
        with vm:
            flags = vm.check_extension(Cap.GUEST_MEMFD_FLAGS)
            if not flags:
                return absent(f"{what} can be created, but offers no gmem")
            made = vm.raw.create_guest_memfd(SIZE, flags & -flags)
            if isinstance(made, Errno):
                return odd(f"{what} offers creation flags {flags:#x}, but the first of them answers {told(made)}")
            made.close()
        return present(f"{what} has gmem with creation flags {flags:#x}")

    return probe


FEATURES = (
    Feature("in-place-conversion", "conversion in place, by an ioctl of the gmem file", _conversion),
    Feature("content-modes", "conversion that says what becomes of the contents", _content_modes),
    Feature("vm-attributes2", "KVM_SET_MEMORY_ATTRIBUTES2 of a whole VM", _vm_scope),
    Feature("second-file", "a second file on one inode, for another VM (KVM_LINK_GUEST_MEMFD)", _second_file),
    Feature("huge-pages", "gmem of huge pages", _huge_pages),
    Feature("no-direct-map", "gmem that the kernel itself has no mapping of", _no_direct_map),
    Feature("write", "write() to a gmem", _writable),
    Feature("other-flags", "creation flags beyond MMAP and INIT_SHARED", _other_flags),
    Feature("stat-blocks", "allocated pages counted by stat()", _blocks),
    Feature("minor-faults", "minor faults of a gmem's mapping told by userfaultfd", _minor_faults),
    Feature("userfault-slots", "slots whose faults a bitmap gives to userspace (KVM_USERFAULT)", _userfault_slots),
    Feature("migration", "pages of a gmem move between NUMA nodes", _migration),
    Feature("transparent-huge-pages", "pages of a gmem are collapsed into huge ones", _transparent_huge_pages),
    Feature("dirty-logging", "dirty logging of gmem slots", _slot_flag(MemFlag.LOG_DIRTY, "with dirty logging")),
    Feature("read-only-slots", "read-only gmem slots", _slot_flag(MemFlag.READONLY, "that is read-only")),
    Feature("iommufd", "gmem mapped for devices by IOMMUFD", _iommufd),
    Feature("dma-buf", "gmem exported as a dma-buf", _dma_buf),
    Feature("live-update", "gmem kept over a live update of the kernel", _live_update),
    Feature("arm-cca", "gmem of arm64's realms (CCA)", _arm_vm(ARM_REALM, "a realm")),
    Feature("arm-pkvm", "gmem of arm64's protected VMs (pKVM)", _arm_vm(1 << 31, "a protected VM")),
)
"""What there is to ask about; none is asked by capability number."""
