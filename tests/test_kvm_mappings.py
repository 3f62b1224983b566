"""Which mappings of KVM's files a process has: the kernel's two ways to tell agree. Other files with such names will do."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from kvmgmem.testing.kvm_mappings import kvm_mappings


@contextmanager
def mapped(name: str, times: int = 1) -> Iterator[None]:
    """A file of a name, mapped so many times, and not side by side, so that no two become one mapping."""
    fd = os.memfd_create(name)
    os.truncate(fd, 3 * mmap.PAGESIZE)
    mappings = [mmap.mmap(fd, mmap.PAGESIZE, offset=2 * number * mmap.PAGESIZE) for number in range(times)]
    os.close(fd)
    try:
        yield
    finally:
        for mapping in mappings:
            mapping.close()


@pytest.fixture(params=["asked", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`asked`: as this kernel allows; `read`: on one from before 6.11, which knows no PROCMAP_QUERY."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    if request.param == "read":
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_each_mapping_is_told_by_name() -> None:
    """One line for each mapping, others' files not at all, and nothing once they are gone."""
    assert kvm_mappings("self") == ()
    with mapped("kvm-vcpu:0", 2), mapped("kvm-gmem"), mapped("other"):
        found = kvm_mappings("self")
        assert sorted(found) == ["/memfd:kvm-gmem (deleted)", *["/memfd:kvm-vcpu:0 (deleted)"] * 2]
        assert kvm_mappings(str(os.getpid())) == found
    assert kvm_mappings("self") == ()


@pytest.mark.usefixtures("way")
def test_a_process_that_may_not_be_looked_at_is_an_error() -> None:
    """So that nobody takes silence for an empty answer."""
    with pytest.raises(OSError, match="No such file"):
        kvm_mappings("0")


def test_another_refusal_is_not_taken_for_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ENOTTY says that there is no such ioctl."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(PermissionError), closing(mmap.mmap(-1, mmap.PAGESIZE)):
        kvm_mappings("self")
