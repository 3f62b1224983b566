"""Which mappings of KVM's files a process has. Other files with such names will do."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmgmem.testing.kvm_mappings import kvm_mappings


@contextmanager
def mapped(name: str, times: int = 1, flags: int = mmap.MAP_SHARED) -> Iterator[None]:
    """A file of a name, mapped so many times, and not side by side, so that no two become one mapping."""
    fd = os.memfd_create(name)
    os.truncate(fd, 3 * mmap.PAGESIZE)
    pages = [2 * number * mmap.PAGESIZE for number in range(times)]
    mappings = [mmap.mmap(fd, mmap.PAGESIZE, flags=flags, offset=offset) for offset in pages]
    os.close(fd)
    try:
        yield
    finally:
        for mapping in mappings:
            mapping.close()


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_each_mapping_is_told_by_name(flags: int) -> None:
    """One line for each mapping, others' files not at all, and nothing once they are gone."""
    assert kvm_mappings("self") == ()
    with mapped("kvm-vcpu:0", 2, flags), mapped("kvm-gmem", flags=flags), mapped("other", flags=flags):
        found = kvm_mappings("self")
        assert sorted(found) == ["/memfd:kvm-gmem (deleted)", *["/memfd:kvm-vcpu:0 (deleted)"] * 2]
        assert kvm_mappings(str(os.getpid())) == found
    assert kvm_mappings("self") == ()


def test_a_process_that_may_not_be_looked_at_is_an_error() -> None:
    """So that nobody takes silence for an empty answer."""
    with pytest.raises(OSError, match="No such file"):
        kvm_mappings("0")
