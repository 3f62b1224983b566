"""Whose the memory policy is that mbind sets on a gmem mapping: the file's since 6.19, the mapping's before."""

from functools import cache

from kvmgmem import numa
from kvmgmem.abi import PAGE_SIZE, GmemFlag
from kvmgmem.errors import Errno
from kvmgmem.kvm import Kvm
from kvmgmem.numa import Mode, Policy


@cache
def policy_belongs_to_the_file() -> bool:
    """Whether a second mapping of a gmem reports the policy that was set through the first one."""
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        gmem = vm.raw.create_guest_memfd(PAGE_SIZE, GmemFlag.MMAP)
        if isinstance(gmem, Errno):
            return False
        with gmem, gmem.map() as first, gmem.map() as second:
            policy = Policy.of(Mode.BIND, numa.memory_nodes()[0])
            return numa.mbind(first.address, PAGE_SIZE, policy) == 0 and numa.get_policy(second.address) == policy
