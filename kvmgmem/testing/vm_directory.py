"""Whether a VM still lives, told by its debugfs directory, which outlasts every descriptor of the VM."""

import os
import threading
from dataclasses import dataclass

from kvmgmem.host import DEBUGFS
from kvmgmem.testing.waiting import wait_until
from kvmgmem.vm import Vm


@dataclass(frozen=True)
class VmDirectory:
    """The directory `<creator>-<descriptor>` below debugfs's kvm, which is there exactly as long as the VM (struct kvm).

    It can be sent to another process. virt/kvm/kvm_main.c: kvm_create_vm_debugfs, kvm_destroy_vm_debugfs (Linux 7.3).
    """

    name: str

    @classmethod
    def of(cls, vm: Vm) -> "VmDirectory":
        """The directory of a VM that the calling thread created; raises AssertionError if it is not there."""
        # KVM names it after task_pid_nr(current), which is the thread and not the process.
        found = cls(f"{threading.get_native_id()}-{vm.fileno()}")
        assert found.exists, f"a VM was created, but debugfs has no kvm/{found.name}"
        return found

    @property
    def exists(self) -> bool:
        """Whether the VM lives."""
        return os.path.isdir(DEBUGFS / "kvm" / self.name)  # noqa: PTH112 - polled

    def wait_gone(self, limit: float = 1.0) -> None:
        """Return once the VM is gone; raises AssertionError after `limit` seconds (scaled under emulation)."""
        wait_until(lambda: not self.exists, f"the VM {self.name} is gone", limit)
