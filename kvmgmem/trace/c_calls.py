"""Calls as C expressions, without a judgement of their answers."""

from typing import Any

from kvmgmem._native import ffi, lib
from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.trace import decode
from kvmgmem.trace.c_text import c_array, c_flags, c_number, initialiser, operand
from kvmgmem.trace.prune import STATISTIC
from kvmgmem.trace.steps import Step

_PLAIN_CALLS = ("munmap", "mprotect", "madvise", "msync", "mlock", "munlock")
_TRANSFERS = {"read": "read", "write": "write", "pread64": "pread", "pwrite64": "pwrite"}


class CannotExpressError(HarnessError):
    """The trace holds something that no program of this kind can do."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"cannot express this in C: {what}",
            "`kvmgmem replay` repeats it; --expect with an earlier call may leave it out",
            ExitCode.CANNOT_EXPRESS,
        )


class Calls:
    """Makes expressions of steps; what these need beside them (bitmaps) goes into `data`, by name."""

    def __init__(self, data: dict[str, str]) -> None:
        self.data = data

    def of(self, step: Step) -> str:
        """The C expression of a call, without a judgement of its answer."""
        arguments = step.arguments
        if step.call.startswith("KVM_"):
            return self._ioctl(step)
        if step.call == STATISTIC:
            return f'statistic({step.on}, "{arguments["name"]}")'
        if step.call == "mmap":
            address = pointer(arguments["address"]) if "address" in arguments else "NULL"
            return (
                f"(long)mmap({address}, {c_number(arguments['length'])}, {c_flags(arguments['prot'])}, "
                f"{c_flags(arguments['flags'])}, {step.on or '-1'}, {c_number(arguments.get('offset', 0))})"
            )
        if step.call == "fallocate":
            span = f"{c_number(arguments['offset'])}, {c_number(arguments['length'])}"
            return f"fallocate({step.on}, {c_flags(arguments['mode'])}, {span})"
        if step.call in _PLAIN_CALLS:
            last = {"mprotect": "prot", "madvise": "advice", "msync": "flags"}.get(step.call)
            more = f", {c_flags(arguments[last])}" if last else ""
            return f"{step.call}({pointer(arguments['address'])}, {c_number(arguments['length'])}{more})"
        if step.call in _TRANSFERS:
            more = f", {c_number(arguments.get('offset', 0))}" if step.call.startswith("p") else ""
            place = f"{pointer(arguments['address'])}, {c_number(arguments['length'])}"
            return f"{_TRANSFERS[step.call]}({step.on}, {place}{more})"
        raise CannotExpressError(f"the call {step.call} ({step.id})")

    def _ioctl(self, step: Step) -> str:
        arguments = step.arguments
        structure = arguments.get("structure")
        if "words" in arguments or not hasattr(lib, step.call):
            raise CannotExpressError(f"the call {step.call} ({step.id})")
        if structure is None:
            value = arguments.get("argument", 0)
            text = pointer(value) if isinstance(value, str) and "+" in value else c_flags(value)
            return f"ioctl({step.on}, {step.call}, {text})"
        values = {key: value for key, value in arguments.items() if key != "structure"}
        if structure in ("kvm_dirty_log", "kvm_clear_dirty_log"):
            return self._dirty_log(step, structure, values)
        if structure in ("kvm_cpuid2", "kvm_msrs"):
            raise CannotExpressError(f"the list that {step.call} ({step.id}) takes")
        kind = ffi.typeof(f"struct {structure}")
        fields = {name: self._field(name, value) for name, value in values.items()}
        return f"ioctl({step.on}, {step.call}, &{initialiser(kind, fields)})"

    def _field(self, name: str, value: Any) -> Any:
        if name in ("userspace_addr",) and isinstance(value, str):
            return f"(uint64_t){operand(pointer(value))}"
        if name == "guest_memfd" and isinstance(value, int):
            return f"(uint32_t){value}" if value < 0 else str(value)
        return value

    def _dirty_log(self, step: Step, structure: str, values: dict[str, Any]) -> str:
        packed = step.out.get("bitmap") or values.pop("bitmap", "hex:")
        size = max(len(decode.unpack(packed)), 8)
        name = f"bitmap{step.id.replace('.', '_')}"
        if structure == "kvm_clear_dirty_log":
            self.data[name] = c_array(name, decode.unpack(packed), writable=True)
        else:
            self.data[name] = f"static unsigned char {name}[{size}];"
        fields = {**values, "dirty_bitmap": f"(uint64_t){name}"}
        return f"ioctl({step.on}, {step.call}, &{initialiser(ffi.typeof(f'struct {structure}'), fields)})"


def pointer(value: str | int) -> str:
    """An address as C writes it: `map0 + 0x1000`, or a number that no range covers."""
    if isinstance(value, int):
        return f"(void *){value:#x}"
    region, _, offset = value.partition("+")
    return f"{region} + {offset}" if offset else region
