"""io_uring, as far as memory goes: a ring that registers buffers (long-term pins) and moves bytes through them.

Numbers and layouts are those of include/uapi/linux/io_uring.h.
"""

import os
import struct

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.fd import OwnedFd
from kvmgmem.memory import Mapping
from kvmgmem.syscalls import NUMBER

_REGISTER_BUFFERS = 0
_UNREGISTER_BUFFERS = 1
_ENTER_GETEVENTS = 1
_READ_FIXED = 4
_WRITE_FIXED = 5
_SINGLE_MMAP = 1 << 0
_OFFSET_OF_SQES = 0x1000_0000
_CURRENT_POSITION = 0xFFFF_FFFF_FFFF_FFFF

_PARAMS = struct.Struct("<30I")
_SQE = struct.Struct("<BBHiQQIIQH22x")  # opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, buf_index
_CQE = struct.Struct("<QiI")  # user_data, res, flags


class IoUring(OwnedFd):
    """A ring with one request in flight at a time. Closing it unregisters its buffers and unmaps it."""

    def __init__(self, entries: int = 4) -> None:
        """Make the ring; raises `KvmError` (ENOSYS, EPERM) where there is none to have."""
        params = ffi.new("uint8_t[]", _PARAMS.size)
        answer = syscall(NUMBER["io_uring_setup"], entries, address_of(params))
        if isinstance(answer, Errno):
            raise KvmError("io_uring_setup", f"entries={entries}", answer)
        super().__init__(answer)
        os.set_inheritable(answer, False)
        words = _PARAMS.unpack(bytes(ffi.buffer(params)))
        self._sq, self._cq, features = words[10:20], words[20:30], words[5]
        if not features & _SINGLE_MMAP:
            raise NotImplementedError("io_uring without IORING_FEAT_SINGLE_MMAP (before Linux 5.4)")
        length = max(self._sq[6] + 4 * words[0], self._cq[5] + _CQE.size * words[1])
        self._rings = Mapping.of(self, length)
        self._sqes = Mapping.of(self, _SQE.size * words[0], _OFFSET_OF_SQES)
        self._registered = False

    def register(self, address: int, length: int) -> Answer:
        """IORING_REGISTER_BUFFERS of one buffer: the kernel pins its pages until `unregister` or `close`."""
        vector = ffi.new("uint64_t[]", [address, length])
        answer = syscall(NUMBER["io_uring_register"], self.fileno(), _REGISTER_BUFFERS, address_of(vector), 1)
        self._registered = self._registered or answer == 0
        return answer

    def unregister(self) -> Answer:
        """IORING_UNREGISTER_BUFFERS: the pins are gone when it returns."""
        self._registered = False
        return syscall(NUMBER["io_uring_register"], self.fileno(), _UNREGISTER_BUFFERS, 0, 0)

    def read_fixed(self, fd: int, address: int, length: int) -> Answer:
        """Read from a pipe or a file's position into the registered buffer (IORING_OP_READ_FIXED)."""
        return self._submit(_READ_FIXED, fd, address, length)

    def write_fixed(self, fd: int, address: int, length: int) -> Answer:
        """Write from the registered buffer (IORING_OP_WRITE_FIXED)."""
        return self._submit(_WRITE_FIXED, fd, address, length)

    def _submit(self, opcode: int, fd: int, address: int, length: int) -> Answer:
        """One request from start to end; its result."""
        sq_tail, sq_mask, sq_array = self._sq[1], self._sq[2], self._sq[6]
        tail = self._rings.load(sq_tail, width=4)
        index = tail & self._rings.load(sq_mask, width=4)
        self._sqes.write(_SQE.size * index, _SQE.pack(opcode, 0, 0, fd, _CURRENT_POSITION, address, length, 0, tail, 0))
        self._rings.store(index, sq_array + 4 * index, width=4)
        self._rings.store(tail + 1 & 0xFFFF_FFFF, sq_tail, width=4)
        answer = syscall(NUMBER["io_uring_enter"], self.fileno(), 1, 1, _ENTER_GETEVENTS, 0, 0)
        if isinstance(answer, Errno):
            raise KvmError("io_uring_enter", f"opcode={opcode}, fd={fd}, length={length:#x}", answer)
        return self._result()

    def _result(self) -> Answer:
        cq_head, cq_mask, cqes = self._cq[0], self._cq[2], self._cq[5]
        head = self._rings.load(cq_head, width=4)
        index = head & self._rings.load(cq_mask, width=4)
        _, result, _ = _CQE.unpack(self._rings.read(cqes + _CQE.size * index, _CQE.size))
        self._rings.store(head + 1 & 0xFFFF_FFFF, cq_head, width=4)
        return int(result) if result >= 0 else Errno(result)

    def close(self) -> None:
        """Unregister, unmap, close; a second call does nothing. The last close alone would drop the pins only later."""
        if self.closed:
            return
        if self._registered:
            self.unregister()
        self._rings.unmap()
        self._sqes.unmap()
        super().close()
