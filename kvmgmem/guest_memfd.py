"""guest_memfd: a file of guest memory, created by one VM and bound to its slots only."""

from kvmgmem import syscalls
from kvmgmem.abi import PAGE_SIZE, GmemFlag
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.memory import Mapping
from kvmgmem.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

KIND_NAMES = {0: "g0", 1: "gM", 2: "gS", 3: "gMS"}


class RawGuestMemfd:
    """The kernel's answers about a gmem file, as values."""

    def __init__(self, gmem: "GuestMemfd") -> None:
        self._gmem = gmem

    def fallocate(self, mode: int, offset: int, length: int) -> Answer:
        """fallocate(2) with any mode (gm:kvm_gmem_fallocate)."""
        return syscalls.fallocate(self._gmem.fileno(), mode, offset, length)

    def allocate(self, offset: int, length: int) -> Answer:
        """Allocate pages, without populating them (FALLOC_FL_KEEP_SIZE)."""
        return self.fallocate(FALLOC_FL_KEEP_SIZE, offset, length)

    def punch(self, offset: int, length: int) -> Answer:
        """Punch a hole: the pages are freed and gone from every view."""
        return self.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def map(self, length: int | None = None, offset: int = 0, **how: int) -> Mapping | Errno:
        """mmap(2) of the file; `how` may hold prot and flags."""
        return Mapping.try_map(self._gmem.size if length is None else length, fd=self._gmem, offset=offset, **how)


class GuestMemfd(OwnedFd):
    """A gmem file. `size` is bytes; `flags` are those it was created with.

    The file descriptor is *not* close-on-exec (gm:__kvm_gmem_create), and it pins the VM that created it.
    """

    def __init__(self, fd: int, size: int, flags: int) -> None:
        super().__init__(fd)
        self.size = size
        self.flags = GmemFlag(flags)
        self.raw = RawGuestMemfd(self)

    @property
    def kind(self) -> str:
        """The catalogue's short name of its flags: g0, gM, gS or gMS."""
        return KIND_NAMES.get(int(self.flags), f"g{int(self.flags):#x}")

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return self.size // PAGE_SIZE

    def duplicate(self, *, cloexec: bool = True) -> "GuestMemfd":
        """The same file behind a second descriptor."""
        return GuestMemfd(super().dup(cloexec=cloexec).release(), self.size, self.flags)

    def allocate(self, offset: int = 0, length: int | None = None) -> None:
        """Allocate pages of [offset, offset + length); raises `KvmError`."""
        span = self.size - offset if length is None else length
        self._check("fallocate(KEEP_SIZE)", offset, span, self.raw.allocate(offset, span))

    def punch(self, offset: int = 0, length: int | None = None) -> None:
        """Punch a hole over [offset, offset + length); raises `KvmError`."""
        span = self.size - offset if length is None else length
        self._check("fallocate(PUNCH_HOLE|KEEP_SIZE)", offset, span, self.raw.punch(offset, span))

    def map(self, length: int | None = None, offset: int = 0, **how: int) -> Mapping:
        """A shared mapping of the file; raises `KvmError`."""
        return Mapping.of(self, self.size if length is None else length, offset, **how)

    def allocated_pages(self, offset: int = 0, length: int = 0) -> int:
        """How many pages are allocated in the range (length 0: to the end), by cachestat(2)."""
        return syscalls.cachestat(self.fileno(), offset, length)

    def _check(self, call: str, offset: int, length: int, answer: Answer) -> None:
        if isinstance(answer, Errno):
            raise KvmError(call, f"gmem {self.kind} of {self.size:#x}, offset={offset:#x}, length={length:#x}", answer)
