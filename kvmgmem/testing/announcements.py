"""What KVM says of the VMs that come and go, to everybody (virt/kvm/kvm_main.c:kvm_uevent_notify_change)."""

import errno
import socket
import threading

from kvmgmem.testing.waiting import TIME_SCALE

NETLINK_KOBJECT_UEVENT, FROM_THE_KERNEL = 15, 1


class Announcements:
    """KVM's uevents about VMs from its making on; owns a socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT)
        self._socket.settimeout(5 * TIME_SCALE)
        self._socket.bind((0, FROM_THE_KERNEL))

    def next(self, event: str) -> int:
        """Wait for a VM of this thread to come ("create") or go ("destroy"): COUNT=, the VMs there are then."""
        wanted = (event.encode(), str(threading.get_native_id()).encode())
        while True:
            words = dict(word.partition(b"=")[::2] for word in self._receive().split(b"\0"))
            if (words.get(b"EVENT"), words.get(b"PID")) == wanted:
                return int(words[b"COUNT"])

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # an earlier one was lost: no memory for our copy (netlink_overrun)
                raise
            return b""

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
