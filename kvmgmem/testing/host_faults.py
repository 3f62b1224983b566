"""The signals that host accesses to a gmem mapping raise, compared whole: number, cause and address."""

import signal

from kvmgmem.memory import Fault, Mapping

_BUS_ADRERR = 2
_SEGV_ACCERR = 2


def sigbus(mapping: Mapping, offset: int = 0) -> Fault:
    """SIGBUS because nothing backs this byte (BUS_ADRERR)."""
    return Fault(signal.SIGBUS, _BUS_ADRERR, mapping.address + offset)


def sigsegv(mapping: Mapping, offset: int = 0) -> Fault:
    """SIGSEGV because the mapping's protection forbids the access (SEGV_ACCERR)."""
    return Fault(signal.SIGSEGV, _SEGV_ACCERR, mapping.address + offset)


def assert_sigbus(mapping: Mapping, offset: int = 0) -> None:
    """Loads and stores at `offset` must raise SIGBUS there, whatever their width."""
    for width in (1, 8):
        assert mapping.try_load(offset, width) == sigbus(mapping, offset)
        assert mapping.try_store(1, offset, width) == sigbus(mapping, offset)
