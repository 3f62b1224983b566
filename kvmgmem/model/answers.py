"""What a step can answer, as values that model and kernel are compared by."""

from dataclasses import dataclass
from enum import Enum

from kvmgmem.errors import Errno


class Plain(Enum):
    """Answers that carry no number."""

    OK = "0"
    NEW = "a new descriptor"
    DONE = "done"
    SIGBUS = "SIGBUS"
    SIGSEGV = "SIGSEGV"
    HVA_FAULT = "EFAULT without an exit reason"
    SKIPPED = "left out"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Value:
    """What a load returned."""

    word: int

    def __str__(self) -> str:
        return f"{self.word:#x}"


@dataclass(frozen=True)
class Mmio:
    """A KVM_EXIT_MMIO."""

    gpa: int
    write: bool

    def __str__(self) -> str:
        return f"an MMIO {'write' if self.write else 'read'} at {self.gpa:#x}"


@dataclass(frozen=True)
class MemoryFault:
    """EFAULT with KVM_EXIT_MEMORY_FAULT for one page."""

    gpa: int
    private: bool

    def __str__(self) -> str:
        return f"EFAULT, memory fault at {self.gpa:#x}, {'private' if self.private else 'shared'}"


@dataclass(frozen=True)
class Left:
    """What KVM_PRE_FAULT_MEMORY answered, and what it wrote back."""

    answer: Errno | int
    gpa: int
    size: int

    def __str__(self) -> str:
        return f"{self.answer!r} with gpa {self.gpa:#x}, size {self.size:#x} left"


@dataclass(frozen=True)
class Other:
    """Anything else, in words."""

    text: str

    def __str__(self) -> str:
        return self.text


Answer = Errno | Plain | Value | Mmio | MemoryFault | Left | Other


def sort_of(answer: object) -> str:
    """The answer without its numbers: what two findings of one bug have in common."""
    if isinstance(answer, Errno):
        return answer.name
    if isinstance(answer, Plain):
        return answer.name.lower()
    if isinstance(answer, Value):
        return "zero" if answer.word == 0 else "data"
    if isinstance(answer, Left):
        return f"prefault {answer.answer!r}"
    if isinstance(answer, Mmio):
        return "mmio"
    if isinstance(answer, MemoryFault):
        return "memory fault, private" if answer.private else "memory fault, shared"
    return str(answer)
