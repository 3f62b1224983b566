"""Whether a VM still lives, told by its debugfs directory, which outlasts every descriptor of the VM."""

import os
import re
import threading
from dataclasses import dataclass

from kvmgmem import entry
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
        alive = self._is_there()
        if entry.watcher is not None:
            entry.watcher.lives(self.name, alive)
        return alive

    def wait_gone(self, limit: float = 1.0) -> None:
        """Return once the VM is gone; raises AssertionError after `limit` seconds (scaled under emulation)."""
        try:
            wait_until(lambda: not self._is_there(), f"the VM {self.name} is gone", limit)
        except AssertionError:
            if entry.watcher is not None:
                entry.watcher.lives(self.name, alive=True)
                entry.watcher.should_live(self.name, wanted=False)
            raise

    def _is_there(self) -> bool:
        return os.path.isdir(DEBUGFS / "kvm" / self.name)  # noqa: PTH112 - polled


_DENIED = re.compile(r"where (True|False) = VmDirectory\(name='(\d+-\d+)'\)\.exists")


def tell_denied(error: AssertionError) -> None:
    """Have a recording say what a test wanted of a VM's life, if that is what its assertion was about."""
    found = _DENIED.search(str(error))
    if found and entry.watcher is not None:
        entry.watcher.should_live(found[2], wanted=found[1] == "False")
