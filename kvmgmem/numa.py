"""NUMA: memory policies of ranges and tasks, and the nodes that pages lie on (mm/mempolicy.c, mm/migrate.c)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.syscalls import NUMBER

MF_STRICT = 1 << 0
MF_MOVE = 1 << 1
F_NODE = 1 << 0
F_ADDR = 1 << 1

_HAS_MEMORY = Path("/sys/devices/system/node/has_memory")
# What fits every kernel: MAX_NUMNODES is 1024 at most (NODES_SHIFT 10), and get_mempolicy wants room for all its nodes.
_MASK_BITS = 1024


class Mode(IntEnum):
    """MPOL_*: how the node of a new page is chosen."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4


@dataclass(frozen=True)
class Policy:
    """A memory policy: its mode and its nodes."""

    mode: int
    nodes: frozenset[int] = frozenset()

    @classmethod
    def of(cls, mode: int, *nodes: int) -> "Policy":
        """The policy of this mode on these nodes."""
        return cls(mode, frozenset(nodes))


DEFAULT = Policy(Mode.DEFAULT)


def memory_nodes() -> list[int]:
    """The numbers of the nodes with memory, lowest first; node 0 alone on a kernel without CONFIG_NUMA."""
    try:
        text = _HAS_MEMORY.read_text().strip()
    except OSError:
        return [0]
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def mbind(address: int, length: int, policy: Policy, flags: int = 0) -> Answer:
    """mbind(2): the policy of a range of this process, `flags` of MF_*."""
    mask = _mask(policy.nodes)
    return syscall(NUMBER["mbind"], address, length, policy.mode, address_of(mask), _MASK_BITS, flags)


def get_policy(address: int) -> Policy | Errno:
    """The policy of the range that holds an address (get_mempolicy(2) with MPOL_F_ADDR)."""
    mode, mask = ffi.new("int *"), _mask(())
    answer = syscall(NUMBER["get_mempolicy"], address_of(mode), address_of(mask), _MASK_BITS, address, F_ADDR)
    if isinstance(answer, Errno):
        return answer
    nodes = frozenset(bit for bit in range(_MASK_BITS) if mask[bit // 64] >> bit % 64 & 1)
    return Policy(mode[0], nodes)


def node_behind(address: int) -> Answer:
    """The node of the page at an address, faulted in if need be (get_mempolicy(2) with MPOL_F_NODE | MPOL_F_ADDR)."""
    node = ffi.new("int *")
    answer = syscall(NUMBER["get_mempolicy"], address_of(node), 0, 0, address, F_NODE | F_ADDR)
    return answer if isinstance(answer, Errno) else int(node[0])


def set_task_policy(policy: Policy) -> None:
    """set_mempolicy(2): how the calling thread's own allocations choose their nodes; raises `KvmError`."""
    answer = syscall(NUMBER["set_mempolicy"], policy.mode, address_of(_mask(policy.nodes)), _MASK_BITS)
    if isinstance(answer, Errno):
        raise KvmError("set_mempolicy", str(policy), answer)


def nodes_of(addresses: Sequence[int]) -> list[Answer]:
    """The node of each page of this process, ENOENT where none is mapped (move_pages(2) that moves nothing)."""
    answer, status = _move_pages(addresses, None, 0)
    if answer != 0:
        raise KvmError("move_pages", f"{len(addresses)} pages, no nodes", Errno(answer))
    return status


def move_pages(addresses: Sequence[int], node: int) -> tuple[Answer, list[Answer]]:
    """move_pages(2) of this process's pages to a node: how many stayed, and the kernel's word on each (-1: none)."""
    return _move_pages(addresses, node, MF_MOVE)


def _move_pages(addresses: Sequence[int], node: int | None, flags: int) -> tuple[Answer, list[Answer]]:
    count = len(addresses)
    pages, status = ffi.new("uint64_t[]", list(addresses)), ffi.new("int[]", [-1] * count)
    nodes = 0 if node is None else ffi.new("int[]", [node] * count)
    where = 0 if node is None else address_of(nodes)
    answer = syscall(NUMBER["move_pages"], 0, count, address_of(pages), where, address_of(status), flags)
    return answer, [status[i] if status[i] >= 0 else Errno(status[i]) for i in range(count)]


def _mask(nodes: Iterable[int]) -> ffi.CData:
    words = [0] * (_MASK_BITS // 64)
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    return ffi.new("uint64_t[]", words)
