"""A vCPU: its registers, its kvm_run page, and running it with a deadline, a kick, or in a thread of its own."""

import os
import threading
from types import TracebackType
from typing import Any, Self

from kvmgmem import entry, syscalls
from kvmgmem._native import ffi, lib
from kvmgmem.errors import Answer, Errno, KvmError
from kvmgmem.exits import Exit, RunResult, decode
from kvmgmem.fd import OwnedFd

# What one KVM_RUN may take before the harness calls it stuck. Under TCG a step of a guest takes milliseconds.
RUN_LIMIT = 20.0 * float(os.environ.get("KVMGMEM_TIME_SCALE", "1"))


class RawVcpu:
    """The kernel's answers on a vCPU, as values."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu = vcpu

    def ioctl(self, request: int, argument: int = 0) -> Answer:
        """Any ioctl with a numeric argument."""
        return entry.ioctl(self._vcpu.fileno(), request, argument)

    def ioctl_struct(self, request: int, pointer: Any) -> Answer:
        """Any ioctl with a cffi structure."""
        return entry.ioctl_struct(self._vcpu.fileno(), request, pointer)

    def run(self, timeout: float = RUN_LIMIT) -> RunResult:
        """One KVM_RUN (api.rst 4.10) with a deadline in seconds (0: none); never re-entered."""
        vcpu = self._vcpu
        answer = entry.answer_of(
            entry.native.kvmgmem_vcpu_run(vcpu.fileno(), vcpu.kvm_run, vcpu.runner, int(timeout * 1_000_000_000))
        )
        kicked, vcpu.runner.kicked = bool(vcpu.runner.kicked), 0
        return RunResult(answer, decode(vcpu.kvm_run), bool(vcpu.runner.expired), kicked)

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> tuple[Answer, int, int]:
        """KVM_PRE_FAULT_MEMORY (api.rst 4.143): the answer, and the gpa and size that the kernel wrote back."""
        request = ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size, "flags": flags})
        answer = self.ioctl_struct(lib.KVM_PRE_FAULT_MEMORY, request)
        return answer, request.gpa, request.size

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> Answer:
        """KVM_ENABLE_CAP on the vCPU (api.rst 4.37)."""
        request = ffi.new("struct kvm_enable_cap *", {"cap": cap, "flags": flags, "args": list(args)})
        return self.ioctl_struct(lib.KVM_ENABLE_CAP, request)

    def get_regs(self) -> tuple[Answer, Any]:
        """KVM_GET_REGS (api.rst 4.11): the answer and a `struct kvm_regs *`."""
        regs = ffi.new("struct kvm_regs *")
        return self.ioctl_struct(lib.KVM_GET_REGS, regs), regs

    def set_regs(self, regs: Any) -> Answer:
        """KVM_SET_REGS (api.rst 4.12)."""
        return self.ioctl_struct(lib.KVM_SET_REGS, regs)

    def get_sregs(self) -> tuple[Answer, Any]:
        """KVM_GET_SREGS (api.rst 4.13): the answer and a `struct kvm_sregs *`."""
        sregs = ffi.new("struct kvm_sregs *")
        return self.ioctl_struct(lib.KVM_GET_SREGS, sregs), sregs

    def set_sregs(self, sregs: Any) -> Answer:
        """KVM_SET_SREGS (api.rst 4.14)."""
        return self.ioctl_struct(lib.KVM_SET_SREGS, sregs)

    def translate(self, gva: int) -> tuple[Answer, int, bool]:
        """KVM_TRANSLATE (api.rst 4.15): the answer, the gpa, and whether the translation is valid."""
        request = ffi.new("struct kvm_translation *", {"linear_address": gva})
        answer = self.ioctl_struct(lib.KVM_TRANSLATE, request)
        return answer, request.physical_address, bool(request.valid)


class Vcpu(OwnedFd):
    """A vCPU and its kvm_run page. Closing unmaps the page too: page and descriptor each pin the VM on their own."""

    def __init__(self, fd: int, vcpu_id: int, mmap_size: int) -> None:
        super().__init__(fd)
        self.id = vcpu_id
        self.raw = RawVcpu(self)
        self.runner = ffi.new("struct kvmgmem_runner *")
        self._mmap_size = mmap_size
        self._run_address = 0

    @property
    def kvm_run(self) -> Any:
        """The shared page as `struct kvm_run *`, mapped at first use."""
        if not self._run_address:
            answer = syscalls.mmap(0, self._mmap_size, 3, 1, self.fileno(), 0)
            if isinstance(answer, Errno):
                raise KvmError("mmap", f"vCPU {self.id}, kvm_run of {self._mmap_size} bytes", answer)
            self._run_address = answer
        return ffi.cast("struct kvm_run *", self._run_address)

    def unmap_run(self) -> None:
        """Unmap the kvm_run page; a second call does nothing."""
        address, self._run_address = self._run_address, 0
        if address:
            syscalls.munmap(address, self._mmap_size)

    def close(self) -> None:
        """Unmap kvm_run and close the descriptor; a second call does nothing."""
        self.unmap_run()
        super().close()

    def close_fd(self) -> None:
        """Close the descriptor only and keep kvm_run mapped."""
        super().close()

    def run(self, timeout: float = RUN_LIMIT) -> Exit:
        """One KVM_RUN; raises `KvmError` with the exit decoded if it fails, TimeoutError after `timeout` seconds."""
        result = self.raw.run(timeout)
        if result.expired:
            raise TimeoutError(f"vCPU {self.id} did not exit within {timeout:g} s; {self.where()}")
        if isinstance(result.answer, Errno):
            raise KvmError("KVM_RUN", f"vCPU {self.id}, {result.exit}", result.answer)
        return result.exit

    def where(self) -> str:
        """One line about where the vCPU stands, for messages."""
        answer, regs = self.raw.get_regs()
        if answer != 0:
            return f"registers unreadable ({answer!r})"
        return f"rip={regs.rip:#x} rdi={regs.rdi:#x} rax={regs.rax:#x}" if hasattr(regs, "rip") else "registers unknown"

    def kick(self) -> None:
        """Make the vCPU leave KVM_RUN, or not enter it at all if it is on the way in."""
        entry.native.kvmgmem_vcpu_kick(self.kvm_run, self.runner)

    def forget_kick(self) -> None:
        """Take back a kick that came after KVM_RUN had ended anyway, so that it does not end the next one."""
        self.runner.kicked = 0
        self.kvm_run.immediate_exit = 0

    def pre_fault(self, gpa: int, size: int) -> tuple[int, int]:
        """Prefault a range; gpa and size of what is left; raises `KvmError`."""
        answer, left_gpa, left_size = self.raw.pre_fault(gpa, size)
        if isinstance(answer, Errno):
            raise KvmError("KVM_PRE_FAULT_MEMORY", f"gpa={gpa:#x}, size={size:#x}", answer)
        return left_gpa, left_size

    def stats_fd(self) -> OwnedFd:
        """The vCPU's binary statistics; raises `KvmError`."""
        answer = self.raw.ioctl(lib.KVM_GET_STATS_FD)
        if isinstance(answer, Errno):
            raise KvmError("KVM_GET_STATS_FD", f"vCPU {self.id}", answer)
        return OwnedFd(answer)

    def running(self, timeout: float = RUN_LIMIT) -> "RunningVcpu":
        """A context in which the vCPU runs in a thread of its own until it exits, or is kicked at the end."""
        return RunningVcpu(self, timeout)


class RunningVcpu:
    """One KVM_RUN in a thread. `result()` waits for it; leaving the context kicks it out."""

    def __init__(self, vcpu: Vcpu, timeout: float) -> None:
        self._vcpu = vcpu
        self._result: RunResult | None = None
        _ = vcpu.kvm_run  # mapped by the starting thread, so that a kick never races with the mapping
        self._thread = threading.Thread(target=self._run, args=(timeout,), daemon=True, name=f"vcpu{vcpu.id}")

    def _run(self, timeout: float) -> None:
        self._result = self._vcpu.raw.run(timeout)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def result(self, timeout: float = RUN_LIMIT + 5) -> RunResult:
        """Wait for the run to end; raises TimeoutError if it does not."""
        self._thread.join(timeout)
        if self._result is None:
            raise TimeoutError(f"vCPU {self._vcpu.id} is still running after {timeout:g} s")
        return self._result

    def kick(self) -> RunResult:
        """Kick the vCPU out and return how its run ended."""
        self._vcpu.kick()
        result = self.result()
        self._vcpu.forget_kick()
        return result

    @property
    def alive(self) -> bool:
        """Whether the vCPU is still in its run."""
        return self._thread.is_alive()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._vcpu.kick()
            self._thread.join(RUN_LIMIT + 5)
            self._vcpu.forget_kick()
        if self._thread.is_alive():
            raise TimeoutError(f"vCPU {self._vcpu.id} ignored the kick")
