"""Files of plain shared memory (memfd_create), which gmem is compared with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmgmem.fd import OwnedFd


@contextmanager
def shmem(size: int) -> Iterator[OwnedFd]:
    """A shmem file of `size` bytes, closed at the end."""
    with OwnedFd(os.memfd_create("kvmgmem-control", os.MFD_CLOEXEC)) as file:
        os.ftruncate(file.fileno(), size)
        yield file
