"""KVM's numbers under their own names, as enumerations that print readably.

The values come from native/kvm_abi.h; nothing is repeated here but the names.
"""

from enum import IntEnum, IntFlag

from kvmgmem._native import lib

PAGE_SIZE = 4096
KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
OK = 0


class Cap(IntEnum):
    """KVM_CAP_* that the contract asks about (api.rst sections 4.4 and 8)."""

    NR_MEMSLOTS = lib.KVM_CAP_NR_MEMSLOTS
    READONLY_MEM = lib.KVM_CAP_READONLY_MEM
    CHECK_EXTENSION_VM = lib.KVM_CAP_CHECK_EXTENSION_VM
    DISABLE_QUIRKS = lib.KVM_CAP_DISABLE_QUIRKS
    X86_SMM = lib.KVM_CAP_X86_SMM
    MULTI_ADDRESS_SPACE = lib.KVM_CAP_MULTI_ADDRESS_SPACE
    IMMEDIATE_EXIT = lib.KVM_CAP_IMMEDIATE_EXIT
    NESTED_STATE = lib.KVM_CAP_NESTED_STATE
    MANUAL_DIRTY_LOG_PROTECT2 = lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    DIRTY_LOG_RING = lib.KVM_CAP_DIRTY_LOG_RING
    VM_COPY_ENC_CONTEXT_FROM = lib.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM
    EXIT_HYPERCALL = lib.KVM_CAP_EXIT_HYPERCALL
    BINARY_STATS_FD = lib.KVM_CAP_BINARY_STATS_FD
    VM_MOVE_ENC_CONTEXT_FROM = lib.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
    VM_GPA_BITS = lib.KVM_CAP_VM_GPA_BITS
    DISABLE_QUIRKS2 = lib.KVM_CAP_DISABLE_QUIRKS2
    DIRTY_LOG_RING_ACQ_REL = lib.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    USER_MEMORY2 = lib.KVM_CAP_USER_MEMORY2
    MEMORY_FAULT_INFO = lib.KVM_CAP_MEMORY_FAULT_INFO
    MEMORY_ATTRIBUTES = lib.KVM_CAP_MEMORY_ATTRIBUTES
    GUEST_MEMFD = lib.KVM_CAP_GUEST_MEMFD
    VM_TYPES = lib.KVM_CAP_VM_TYPES
    PRE_FAULT_MEMORY = lib.KVM_CAP_PRE_FAULT_MEMORY
    GUEST_MEMFD_FLAGS = lib.KVM_CAP_GUEST_MEMFD_FLAGS


class MemFlag(IntFlag):
    """Flags of a memory slot (KVM_MEM_*)."""

    LOG_DIRTY = lib.KVM_MEM_LOG_DIRTY_PAGES
    READONLY = lib.KVM_MEM_READONLY
    GUEST_MEMFD = lib.KVM_MEM_GUEST_MEMFD


class GmemFlag(IntFlag):
    """Creation flags of a guest_memfd (GUEST_MEMFD_FLAG_*)."""

    MMAP = lib.GUEST_MEMFD_FLAG_MMAP
    INIT_SHARED = lib.GUEST_MEMFD_FLAG_INIT_SHARED


class Attribute(IntFlag):
    """Memory attributes (KVM_MEMORY_ATTRIBUTE_*)."""

    PRIVATE = lib.KVM_MEMORY_ATTRIBUTE_PRIVATE


class VmType(IntEnum):
    """The argument of KVM_CREATE_VM on x86-64 (KVM_X86_*_VM)."""

    DEFAULT = 0
    SW_PROTECTED = 1
    SEV = 2
    SEV_ES = 3
    SNP = 4
    TDX = 5

    @property
    def label(self) -> str:
        """The name used in test ids and on the command line: `default`, `sw-protected`, ..."""
        return self.name.lower().replace("_", "-")

    @property
    def has_private_memory(self) -> bool:
        """Whether guests of this type have private memory (x86: kvm_arch_has_private_mem)."""
        return self in (VmType.SW_PROTECTED, VmType.SNP, VmType.TDX)


class ExitReason(IntEnum):
    """Why KVM_RUN came back (KVM_EXIT_*)."""

    UNKNOWN = lib.KVM_EXIT_UNKNOWN
    EXCEPTION = lib.KVM_EXIT_EXCEPTION
    IO = lib.KVM_EXIT_IO
    HYPERCALL = lib.KVM_EXIT_HYPERCALL
    DEBUG = lib.KVM_EXIT_DEBUG
    HLT = lib.KVM_EXIT_HLT
    MMIO = lib.KVM_EXIT_MMIO
    IRQ_WINDOW_OPEN = lib.KVM_EXIT_IRQ_WINDOW_OPEN
    SHUTDOWN = lib.KVM_EXIT_SHUTDOWN
    FAIL_ENTRY = lib.KVM_EXIT_FAIL_ENTRY
    INTR = lib.KVM_EXIT_INTR
    INTERNAL_ERROR = lib.KVM_EXIT_INTERNAL_ERROR
    SYSTEM_EVENT = lib.KVM_EXIT_SYSTEM_EVENT
    DIRTY_RING_FULL = lib.KVM_EXIT_DIRTY_RING_FULL
    MEMORY_FAULT = lib.KVM_EXIT_MEMORY_FAULT
    TDX = lib.KVM_EXIT_TDX
