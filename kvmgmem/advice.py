"""madvise(2)'s advice by name (include/uapi/asm-generic/mman-common.h); Python's own list lacks what is newer than 5.4."""

from enum import IntEnum


class Advice(IntEnum):
    """MADV_*."""

    WILLNEED = 3
    DONTNEED = 4
    FREE = 8
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    WIPEONFORK = 18
    COLD = 20
    PAGEOUT = 21
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    COLLAPSE = 25
    HWPOISON = 100
    SOFT_OFFLINE = 101
    GUARD_INSTALL = 102
    GUARD_REMOVE = 103
