"""The pytest plugin, and what a test imports from it.

from kvmgmem.testing import contract, gmem_kinds, known_bug, requires

@contract("GM-BIND-007")
def test_gmem_of_another_vm_is_refused(kvm, gmem): ...
"""

from kvmgmem.testing.known_bugs import known_bug
from kvmgmem.testing.marks import contract, disruptive, gmem_kinds, makes_gmem, requires, test_timeout, vm_types, would_show
from kvmgmem.testing.requirements import need
from kvmgmem.testing.waiting import wait_until

__all__ = [
    "contract",
    "disruptive",
    "gmem_kinds",
    "known_bug",
    "makes_gmem",
    "need",
    "requires",
    "test_timeout",
    "vm_types",
    "wait_until",
    "would_show",
]
