"""What each operation answers, and what it changes: the contract, one rule to a method.

Written from the contract, not from the harness: nothing here looks at a kernel. The order of the checks is the kernel's
where userspace can see it (a request with two faults has one answer), and arbitrary where all the answers are EINVAL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvmgmem.abi import Attribute, GmemFlag, MemFlag
from kvmgmem.errors import Errno
from kvmgmem.model import steps as do
from kvmgmem.model.answers import Answer, Left, MemoryFault, Mmio, Plain, Value
from kvmgmem.model.state import Area, Cpu, File, Held, Process, Slot, State, Vm
from kvmgmem.model.steps import MAIN, P, Step
from kvmgmem.model.traits import KernelTraits

U64 = 1 << 64
S64 = 1 << 63
SLOT_IDS = 32764
MAX_PAGES = 2**31 - 1
SUPPORT_SLOT, SUPPORT_GPA, SUPPORT_SIZE = 32000, 0xD000_0000, 1 << 20
"""The slot with page tables and programs that the first vCPU of a VM brings along."""

KEEP_SIZE, PUNCH_HOLE = 1, 2
V1_FLAGS = int(MemFlag.LOG_DIRTY | MemFlag.READONLY)  # as a number: ~ of an IntFlag forgets the bits it has no name for


A = TypeVar("A")


@dataclass(frozen=True)
class FilePage:
    """Where an access goes: a page of a gmem."""

    file: File
    index: int

    def load(self) -> Value:
        return Value(self.file.pages.setdefault(self.index, 0))

    def store(self, word: int) -> None:
        self.file.pages[self.index] = word


@dataclass(frozen=True)
class AreaPage:
    """Where an access goes: a page of anonymous memory."""

    area: Area
    index: int

    def load(self) -> Value:
        return Value(self.area.words.get(self.index, 0))

    def store(self, word: int) -> None:
        self.area.words[self.index] = word


class Model:
    """The model of one sequence's world. `perform` plays a step on it and says what the kernel must answer."""

    def __init__(self, traits: KernelTraits) -> None:
        self.traits = traits
        self.state = State()
        self.rows: set[str] = set()
        """The rows of the contract that have decided an answer."""
        self._rules: dict[type[Step], Callable[[Any], Answer]] = {
            do.CreateVm: self.create_vm,
            do.CreateGmem: self.create_gmem,
            do.SetRegion: self.set_region,
            do.Fallocate: self.fallocate,
            do.MapFile: self.map_file,
            do.MapMemory: self.map_memory,
            do.Unmap: self.unmap,
            do.Remove: self.remove,
            do.HostLoad: self.host_load,
            do.HostStore: self.host_store,
            do.CreateCpu: self.create_cpu,
            do.GuestLoad: self.guest_load,
            do.GuestStore: self.guest_store,
            do.SetAttributes: self.set_attributes,
            do.Prefault: self.prefault,
            do.Dup: self.dup,
            do.Send: self.send,
            do.Fork: self.fork,
            do.Kill: self.kill,
            do.Close: self.close,
            do.CloseCpu: self.close,
        }

    def perform(self, step: Step) -> Answer:
        """Play a step: the answer it must have. SKIPPED, with nothing changed, if what it is about is not there."""
        return self._rules[type(step)](step)

    def numbered(self, name: str, number: int) -> None:
        """Note the number that the kernel gave to a new descriptor of the main process."""
        self.state.main.numbers[number] = name
        self.state.last_number[name] = number

    def _by(self, row: str, answer: A) -> A:
        """The answer that a row of the contract gives."""
        self.rows.add(row)
        return answer

    # -- VMs and files

    def create_vm(self, step: do.CreateVm) -> Answer:
        """The types on offer, and nothing else."""
        if step.type not in self.traits.vm_types:
            return self._by("GM-VM-002" if step.type < 32 else "GM-VM-004", Errno.EINVAL)
        self.state.main.fds[step.name] = Vm(step.name, step.type)
        return self._by("GM-VM-001", Plain.NEW)

    def create_gmem(self, step: do.CreateGmem) -> Answer:
        """A size that is positive as a signed number, whole pages, flags that the VM offers; only the creator of the VM."""
        vm = self.state.find(step.vm, step.by)
        if not isinstance(vm, Vm):
            return Plain.SKIPPED
        if step.by != MAIN:
            return self._by("GM-VM-009", Errno.EIO)
        if step.flags & ~self.traits.gmem_flags[vm.type]:
            return self._by("GM-CRE-007" if step.flags < 4 else "GM-CRE-005", Errno.EINVAL)
        if step.size == 0 or step.size >= S64 or step.size % P:
            return self._by(f"GM-CRE-00{1 if step.size == 0 else 2 if step.size < S64 else 3}", Errno.EINVAL)
        self.state.main.fds[step.name] = File(step.name, vm, step.size, step.flags)
        return self._by("GM-CRE-004" if step.size == S64 - P else "GM-CRE-005", Plain.NEW)

    # -- slots

    def set_region(self, step: do.SetRegion) -> Answer:
        """What is wrong with the request itself, then what stands in its way."""
        vm = self.state.find(step.vm, step.by)
        if not isinstance(vm, Vm):
            return Plain.SKIPPED
        if step.by != MAIN:
            return self._by("GM-SLOT-033", Errno.EIO)
        if row := self._malformed(vm, step):
            return self._by(row, Errno.EINVAL)
        key = (step.slot >> 16, step.slot & 0xFFFF)
        old = vm.slots.get(key)
        if step.size == 0:
            return self._delete(vm, key, step)
        if old is not None:
            return self._change(vm, key, old, step)
        return self._create(vm, key, step)

    def _malformed(self, vm: Vm, step: do.SetRegion) -> str:
        """The row of the contract that refuses the request for itself; "" if none does."""
        flags, gmem = step.flags, bool(step.flags & MemFlag.GUEST_MEMFD)
        if step.version == 1 and flags & ~V1_FLAGS:
            return "GM-SLOT-001"
        if flags & ~(int(MemFlag.GUEST_MEMFD) if gmem else V1_FLAGS):
            return "GM-BIND-002" if gmem else "GM-SLOT-002"
        if step.slot & 0xFFFF >= SLOT_IDS:
            return "GM-SLOT-006"
        if step.slot >> 16 >= self.traits.spaces[vm.type]:
            return "GM-SLOT-007" if step.slot >> 16 > 1 else "GM-SLOT-008"
        if step.size % P or step.gpa % P or step.hva % P:
            return "GM-SLOT-010"
        if step.hva + step.size > self.traits.hva_limit:
            return "GM-SLOT-011"
        if gmem and step.offset % P:
            return "GM-BIND-009"
        # A sum of exactly 2^64 is 0 in the kernel's arithmetic, and so below what it was made from.
        if gmem and step.size and step.offset + step.size >= U64:
            return "GM-BIND-010"
        if step.size and step.gpa + step.size >= U64:
            return "GM-SLOT-013"
        return "GM-SLOT-015" if step.size // P > MAX_PAGES else ""

    def _delete(self, vm: Vm, key: tuple[int, int], step: do.SetRegion) -> Answer:
        """A slot that is there, whatever the request says beside its number."""
        if key not in vm.slots:
            return self._by("GM-SLOT-017", Errno.EINVAL)
        gmem = vm.slots[key].flags & MemFlag.GUEST_MEMFD
        del vm.slots[key]
        return self._by("GM-SLOT-019" if step.gpa else "GM-BIND-023" if gmem else "GM-SLOT-017", Plain.OK)

    def _change(self, vm: Vm, key: tuple[int, int], old: Slot, step: do.SetRegion) -> Answer:
        """A plain slot may move and be logged; a gmem slot never changes."""
        if old.flags & MemFlag.GUEST_MEMFD:
            return self._by("GM-BIND-020" if step.flags & MemFlag.GUEST_MEMFD else "GM-BIND-021", Errno.EINVAL)
        if step.flags & MemFlag.GUEST_MEMFD:
            return self._by("GM-BIND-022", Errno.EINVAL)
        if (step.hva, step.size) != (old.hva, old.size) or (step.flags ^ old.flags) & int(MemFlag.READONLY):
            return self._by("GM-SLOT-021", Errno.EINVAL)
        row = "GM-SLOT-020" if step.flags == old.flags else "GM-SLOT-022"
        if step.gpa != old.gpa:
            row = "GM-SLOT-023"
            if self._overlaps(vm, key, step):
                return self._by("GM-SLOT-024", Errno.EEXIST)
            if step.gpa + step.size > self.traits.gpa_limit:
                return self._by("GM-SLOT-014", Errno.EINVAL)
        old.gpa, old.flags = step.gpa, step.flags
        return self._by(row, Plain.OK)

    def _create(self, vm: Vm, key: tuple[int, int], step: do.SetRegion) -> Answer:
        """First the guest's addresses, then the file, then the limit of guest addresses, and last the file's range."""
        if self._overlaps(vm, key, step):
            no_file = step.flags & MemFlag.GUEST_MEMFD and self.number_of(step.fd) not in self.state.main.numbers
            return self._by("GM-BIND-017" if no_file else "GM-SLOT-024", Errno.EEXIST)
        gmem = self._gmem_of(vm, step) if step.flags & MemFlag.GUEST_MEMFD else None
        if isinstance(gmem, Errno):
            return gmem
        too_high = step.gpa + step.size > self.traits.gpa_limit
        bound = gmem is not None and self._is_bound(gmem, step)
        if too_high and (self.traits.limit_before_overlap or not bound):
            return self._by("GM-BIND-019" if bound else "GM-SLOT-014", Errno.EINVAL)
        if bound:
            return self._by("GM-BIND-014", Errno[self.traits.overlap])
        mappable = gmem is not None and bool(gmem.flags & GmemFlag.MMAP)
        vm.slots[key] = Slot(step.gpa, step.size, step.hva, step.flags, gmem, step.offset // P, mappable)
        row = "GM-SLOT-009" if key[0] else "GM-SLOT-012"
        return self._by("GM-BIND-001" if gmem else row, Plain.OK)

    def _overlaps(self, vm: Vm, key: tuple[int, int], step: do.SetRegion) -> bool:
        """Whether another slot of the same address space lies there."""
        others = (slot for at, slot in vm.slots.items() if at[0] == key[0] and at != key)
        return any(slot.gpa < step.gpa + step.size and step.gpa < slot.end for slot in others)

    def _gmem_of(self, vm: Vm, step: do.SetRegion) -> File | Errno:
        """The file to be bound, by descriptor number."""
        number = self.number_of(step.fd)
        if number in self.state.foreign:
            return self._by("GM-BIND-006", Errno.EINVAL)
        name = self.state.main.numbers.get(number)
        if name is None:
            return self._by("GM-BIND-003", Errno.EBADF)
        file = self.state.main.fds[name]
        if not isinstance(file, File):
            return self._by("GM-BIND-005", Errno.EINVAL)
        if file.vm is not vm:
            return self._by("GM-BIND-007", Errno.EINVAL)
        if step.offset + step.size > file.size:
            far = "GM-BIND-011" if step.offset >= S64 else "GM-BIND-012"
            return self._by(far if step.offset + step.size >= S64 else "GM-BIND-013", Errno.EINVAL)
        return file

    def number_of(self, fd: str | int) -> int:
        """The number that a request holds: of a descriptor that is open, or was, or never has been."""
        return fd if isinstance(fd, int) else self.state.last_number.get(fd, -1)

    def _is_bound(self, file: File, step: do.SetRegion) -> bool:
        first, end = step.offset // P, (step.offset + step.size) // P
        slots = (slot for slot in file.vm.slots.values() if slot.gmem is file)
        return any(slot.first < end and first < slot.first + slot.size // P for slot in slots)

    # -- pages

    def fallocate(self, step: do.Fallocate) -> Answer:
        """Whole pages allocated within the file, or punched out anywhere; any process with the descriptor may."""
        file = self.state.find(step.fd, step.by)
        if not isinstance(file, File):
            return Plain.SKIPPED
        if step.offset >= S64 or step.length == 0 or step.length >= S64:
            return self._by("GM-FAL-007", Errno.EINVAL)
        if step.mode not in (KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE):
            # Modes that only the file itself refuses come after the size of the range.
            late = step.mode in (0, 0x10, 0x11, 0x40, 0x41, 0x8, 0x20)
            if late and step.offset + step.length >= S64:
                return self._by("GM-FAL-008", Errno.EFBIG)
            return self._by({0: "GM-FAL-001", PUNCH_HOLE: "GM-FAL-004"}.get(step.mode, "GM-FAL-005"), Errno.ENOTSUP)
        if step.offset + step.length >= S64:
            return self._by("GM-FAL-008", Errno.EFBIG)
        if step.offset % P or step.length % P:
            return self._by("GM-FAL-006", Errno.EINVAL)
        first, end = step.offset // P, (step.offset + step.length) // P
        if step.by != MAIN:
            self.rows.add("GM-FAL-019")
        if step.mode & PUNCH_HOLE:
            self.rows.add("GM-FAL-011" if end > file.size // P else "GM-FAL-003")
            self._punch(file, first, end)
        elif end > file.size // P:
            return self._by("GM-FAL-009" if first >= file.size // P else "GM-FAL-010", Errno.EINVAL)
        else:
            self.rows.add("GM-FAL-002")
            for page in range(first, end):
                file.pages.setdefault(page, 0)
        return Plain.OK

    @staticmethod
    def _punch(file: File, first: int, end: int) -> None:
        for page in [page for page in file.pages if first <= page < end]:
            del file.pages[page]

    # -- the host's view

    def map_file(self, step: do.MapFile) -> Answer:
        """A shared mapping of a gmem that was made for it; its range may lie outside the file."""
        process, file = self.state.process(step.by), self.state.find(step.fd, step.by)
        if process is None or not isinstance(file, File) or step.window in process.areas:
            return Plain.SKIPPED
        if step.offset % P:
            return self._by("GM-MAP-008", Errno.EINVAL)
        if step.offset // P > (S64 - 1 - step.pages * P) // P:
            return self._by("GM-MAP-010", Errno.EOVERFLOW)
        if step.executable and self.traits.noexec:
            return self._by("GM-MAP-004", Errno.EPERM)
        if not file.flags & GmemFlag.MMAP:
            return self._by("GM-MAP-001" if step.shared else "GM-MAP-003", Errno.ENODEV)
        if not step.shared:
            return self._by("GM-MAP-002", Errno.EINVAL)
        process.areas[step.window] = Area(step.pages, file, step.offset // P, step.writable)
        return Plain.DONE

    def map_memory(self, step: do.MapMemory) -> Answer:
        """Memory of the host's own, for plain slots and for userspace_addr of others."""
        if step.window in self.state.main.areas:
            return Plain.SKIPPED
        words = {page: step.seed + page for page in range(step.pages)}
        self.state.main.areas[step.window] = Area(step.pages, words=words)
        return Plain.DONE

    def unmap(self, step: do.Unmap) -> Answer:
        """A mapping keeps its file; munmap may be the last release (GM-LIFE-007)."""
        process = self.state.process(step.by)
        area = process.areas.pop(step.window, None) if process else None
        if area is None:
            return Plain.SKIPPED
        self._released()
        return Plain.DONE

    def remove(self, step: do.Remove) -> Answer:
        """MADV_REMOVE punches a hole."""
        area = self._file_area(step.window, step.by)
        if area is None or area.file is None or step.page + step.pages > area.pages:
            return Plain.SKIPPED
        first = area.first + step.page
        self._punch(area.file, first, first + step.pages)
        return self._by("GM-MAP-020", Plain.OK)

    def _file_area(self, window: int, by: str) -> Area | None:
        process = self.state.process(by)
        return process.areas.get(window) if process else None

    def host_load(self, step: do.HostLoad) -> Answer:
        """What lies behind the page; SIGBUS where nothing does."""
        area = self._file_area(step.window, step.by)
        if area is None or step.page >= area.pages or (area.file is None and step.by != MAIN):
            return Plain.SKIPPED
        page = self._host_page(area, step.page)
        return page.load() if page else Plain.SIGBUS

    def host_store(self, step: do.HostStore) -> Answer:
        """The same for a write, which the mapping must allow."""
        area = self._file_area(step.window, step.by)
        if area is None or step.page >= area.pages or (area.file is None and step.by != MAIN):
            return Plain.SKIPPED
        if not area.writable:
            return self._by("GM-MAP-018", Plain.SIGSEGV)
        page = self._host_page(area, step.page)
        if page is None:
            return Plain.SIGBUS
        page.store(step.value)
        return Plain.DONE

    def _host_page(self, area: Area, index: int) -> FilePage | AreaPage | None:
        """What lies behind a page of a mapping; None: SIGBUS."""
        if area.file is None:
            return AreaPage(area, index)
        page = area.first + index
        if page >= area.file.size // P:
            return self._by("GM-MAP-011", None)
        if not area.file.flags & GmemFlag.INIT_SHARED:
            return self._by("GM-MAP-014" if page in area.file.pages else "GM-MAP-013", None)
        return self._by("GM-MAP-015" if page in area.file.pages else "GM-MAP-012", FilePage(area.file, page))

    # -- the guest's view

    def create_cpu(self, step: do.CreateCpu) -> Answer:
        """It keeps its VM alive (GM-LIFE-014); the first one needs a place for the support slot."""
        vm = self.state.find(step.vm)
        if not isinstance(vm, Vm):
            return Plain.SKIPPED
        if not vm.cpus:
            support = do.SetRegion(step.vm, SUPPORT_SLOT, SUPPORT_GPA, SUPPORT_SIZE)
            if (0, SUPPORT_SLOT) in vm.slots or self._overlaps(vm, (0, SUPPORT_SLOT), support):
                return Plain.SKIPPED
            vm.slots[0, SUPPORT_SLOT] = Slot(SUPPORT_GPA, SUPPORT_SIZE, 0, 0)
        self.state.main.fds[step.name] = Cpu(step.name, vm, vm.cpus)
        vm.cpus += 1
        return Plain.DONE

    def guest_load(self, step: do.GuestLoad) -> Answer:
        """What the guest reads, or how KVM_RUN ends instead."""
        place = self._guest_place(step.cpu, step.gpa, write=False)
        return place.load() if isinstance(place, FilePage | AreaPage) else place

    def guest_store(self, step: do.GuestStore) -> Answer:
        """The same for a write."""
        place = self._guest_place(step.cpu, step.gpa, write=True)
        if not isinstance(place, FilePage | AreaPage):
            return place
        place.store(step.value)
        return Plain.DONE

    def _guest_place(self, cpu: str, gpa: int, *, write: bool) -> FilePage | AreaPage | Answer:
        held = self.state.find(cpu)
        if not isinstance(held, Cpu):
            return Plain.SKIPPED
        place = self.place(held.vm, gpa, write=write)
        if isinstance(place, Mmio):
            held.vm.mmio.add(gpa // P)
        return place

    def place(self, vm: Vm, gpa: int, *, write: bool) -> FilePage | AreaPage | Answer:
        """Where a guest's access goes, or how KVM_RUN ends instead."""
        private, slot = gpa // P in vm.private, self.slot_at(vm, gpa)
        if slot is None:
            return self._by("GM-RUN-012", MemoryFault(gpa, True)) if private else self._by("GM-RUN-017", Mmio(gpa, write))
        if private or slot.gmem_only:
            if slot.gmem is None:
                return self._by(_row_of_dead_slot(slot, private), MemoryFault(gpa, private))
            return self._by(_row_of_gmem(slot.gmem, private), FilePage(slot.gmem, slot.first + (gpa - slot.gpa) // P))
        if write and slot.flags & MemFlag.READONLY:
            return self._by("GM-SLOT-032", Mmio(gpa, True))
        found = self.behind_hva(slot, gpa, write=write)
        if found is None:
            return self._by("GM-RUN-019", Plain.HVA_FAULT)
        if isinstance(found, FilePage):
            self.rows.add("GM-BIND-032")
        elif slot.gmem:
            self.rows.add("GM-RUN-032" if vm.type else "GM-RUN-003")
        return found

    def slot_at(self, vm: Vm, gpa: int) -> Slot | None:
        """The slot of address space 0 at a guest address."""
        slots = (slot for at, slot in vm.slots.items() if at[0] == 0)
        return next((slot for slot in slots if slot.gpa <= gpa < slot.end), None)

    def behind_hva(self, slot: Slot, gpa: int, *, write: bool) -> FilePage | AreaPage | None:
        """What the host has at a slot's userspace_addr for a guest address."""
        found = self.state.area_at(slot.hva + gpa - slot.gpa)
        if found is None or (write and not found[0].writable):
            return None
        return self._host_page(*found)

    # -- attributes and prefault

    def set_attributes(self, step: do.SetAttributes) -> Answer:
        """Attributes belong to guest addresses, with slots there or without."""
        vm = self.state.find(step.vm, step.by)
        if not isinstance(vm, Vm):
            return Plain.SKIPPED
        if step.by != MAIN:
            return self._by("GM-VM-009", Errno.EIO)
        supported = self.traits.attributes[vm.type]
        if supported is None:
            return self._by("GM-ATTR-001", Errno.ENOTTY)
        if step.flags or step.attributes & ~supported:
            return self._by("GM-ATTR-003" if step.flags else "GM-ATTR-004" if supported else "GM-ATTR-002", Errno.EINVAL)
        if step.size == 0 or step.gpa + step.size >= U64:
            return self._by("GM-ATTR-005", Errno.EINVAL)
        if step.gpa % P or step.size % P:
            return self._by("GM-ATTR-006", Errno.EINVAL)
        frames = range(step.gpa // P, (step.gpa + step.size) // P)
        if step.attributes & Attribute.PRIVATE:
            vm.private.update(frames)
        else:
            vm.private.difference_update(frames)
        return self._by("GM-ATTR-010", Plain.OK)

    def prefault(self, step: do.Prefault) -> Answer:
        """Pages up to the first that cannot be, and success if there was one."""
        cpu = self.state.find(step.cpu)
        if not isinstance(cpu, Cpu) or not self.traits.prefault_ends:
            return Plain.SKIPPED
        if step.flags or step.gpa % P or step.size % P or step.size == 0 or step.gpa + step.size >= U64:
            return self._by("GM-PF-001" if step.flags else "GM-PF-002", Left(Errno.EINVAL, step.gpa, step.size))
        if not self.traits.prefault:
            return self._by("GM-PF-004", Left(Errno.ENOTSUP, step.gpa, step.size))
        done, failure, rows = 0, 0, self.rows
        self.rows = set()  # what a guest would meet there is not what is asked here
        while done < step.size and not failure:
            failure = self._prefault_page(cpu.vm, step.gpa + done)
            done += 0 if failure else P
        self.rows = rows
        row = "GM-PF-007" if not failure else "GM-PF-008" if failure == Errno.ENOENT else "GM-PF-013"
        return self._by(row, Left(0 if done else Errno(failure), step.gpa + done, step.size - done))

    def _prefault_page(self, vm: Vm, gpa: int) -> int:
        place = self.place(vm, gpa, write=False)
        if isinstance(place, Mmio):
            vm.mmio.add(gpa // P)
            return Errno.ENOENT
        if not isinstance(place, FilePage | AreaPage):
            return Errno.EFAULT
        place.load()
        return 0

    # -- descriptors and processes

    def dup(self, step: do.Dup) -> Answer:
        """The same open file (GM-FD-032)."""
        held = self.state.find(step.fd, step.by)
        process = self.state.process(step.by)
        if process is None or not isinstance(held, Vm | File):
            return Plain.SKIPPED
        process.fds[step.name] = held
        return Plain.NEW

    def send(self, step: do.Send) -> Answer:
        """A received copy is the same open file, too (GM-LIFE-011)."""
        held, target = self.state.find(step.fd), self.state.process(step.to)
        if target is None or step.to == MAIN or not isinstance(held, Vm | File):
            return Plain.SKIPPED
        target.fds[step.name] = held
        return Plain.NEW

    def fork(self, step: do.Fork) -> Answer:
        """The child holds all that the parent holds (GM-LIFE-008, GM-MAP-016)."""
        main = self.state.main
        if step.name in self.state.processes:
            return Plain.SKIPPED
        areas = {window: Area(a.pages, a.file, a.first, a.writable) for window, a in main.areas.items()}
        self.state.processes[step.name] = Process(step.name, dict(main.fds), {}, areas)
        return Plain.DONE

    def kill(self, step: do.Kill) -> Answer:
        """All that a process held is released with it."""
        if step.process == MAIN or self.state.processes.pop(step.process, None) is None:
            return Plain.SKIPPED
        self._released()
        return Plain.DONE

    def close(self, step: do.Close | do.CloseCpu) -> Answer:
        """One reference less; what nothing refers to any more goes."""
        name, by = (step.fd, step.by) if isinstance(step, do.Close) else (step.cpu, MAIN)
        process = self.state.process(by)
        held = process.fds.get(name) if process else None
        if process is None or held is None or isinstance(held, Cpu) != isinstance(step, do.CloseCpu):
            return Plain.SKIPPED
        del process.fds[name]
        process.numbers = {number: other for number, other in process.numbers.items() if other != name}
        self._released(held)
        return Plain.DONE

    def _released(self, held: Held | None = None) -> None:
        """See what a reference less means; `held` is what a descriptor that was closed referred to."""
        if isinstance(held, Vm) and held in self.state.vms() and held not in self.state.held():
            self.rows.add("GM-LIFE-001" if any(file.vm is held for file in self.state.files()) else "GM-LIFE-014")
        if isinstance(held, File) and held in self.state.files():
            self.rows.add(self._row_of_kept(held))
        for vm in self.state.vms():
            if self.state.drop_dead_gmems(vm):
                self.rows.add("GM-LIFE-002")

    def _row_of_kept(self, file: File) -> str:
        """Why a gmem is still there although a descriptor of it was closed."""
        if file in self.state.main.fds.values():
            return "GM-LIFE-006"
        mapped = any(area.file is file for area in self.state.main.areas.values())
        return "GM-LIFE-007" if mapped else "GM-LIFE-008"


def _row_of_gmem(file: File, private: bool) -> str:
    if private:
        return "GM-RUN-033" if file.flags & GmemFlag.MMAP else "GM-RUN-034"
    if file.vm.type:
        return "GM-RUN-033"
    return "GM-RUN-001" if file.flags & GmemFlag.INIT_SHARED else "GM-RUN-002"


def _row_of_dead_slot(slot: Slot, private: bool) -> str:
    if not slot.flags & MemFlag.GUEST_MEMFD:
        return "GM-RUN-013"
    return "GM-RUN-011" if private else "GM-RUN-010"


def new_name(step: Step) -> str | None:
    """The name of the main process's descriptor that a step makes; None if it makes none there."""
    if isinstance(step, do.CreateVm | do.CreateCpu) or (isinstance(step, do.CreateGmem | do.Dup) and step.by == MAIN):
        return step.name
    return None
