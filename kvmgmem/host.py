"""What this kernel's KVM is and offers: facts only, found by asking; what a test expects is not decided here."""

import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvmgmem.abi import Cap, GmemFlag, VmType
from kvmgmem.errors import Errno
from kvmgmem.kvm import Kvm

MODULES = Path("/sys/module")
DEBUGFS = Path("/sys/kernel/debug")


@dataclass(frozen=True)
class VmScope:
    """What VMs of one type offer: capabilities by name and the gmem creation flags."""

    type: str
    caps: dict[str, int]
    gmem_flags: int


@dataclass(frozen=True)
class Host:
    """The kernel under test. `paging` is `tdp` or `shadow`; `nodes` counts NUMA nodes with memory."""

    release: str
    version: str
    machine: str
    backend: str
    paging: str
    cpu_model: str
    cpu_count: int
    memory_mib: int
    nodes: int
    vm_types: tuple[str, ...]
    caps: dict[str, int]
    vms: tuple[VmScope, ...]
    parameters: dict[str, str]
    config_hash: str | None
    debugfs: bool
    root: bool

    @property
    def tdp_mmu(self) -> bool:
        """Whether guests' pages are mapped by the TDP MMU (arch/x86/kvm/mmu/tdp_mmu.c), not by the shadow MMU's code."""
        return self.paging == "tdp" and self.parameters.get("kvm.tdp_mmu") != "N"

    def offers(self, vm_type: VmType) -> bool:
        """Whether VMs of this type can be created."""
        return vm_type.label in self.vm_types

    def scope(self, vm_type: VmType) -> VmScope | None:
        """What VMs of this type offer; None if there are none, or none can be created."""
        return next((scope for scope in self.vms if scope.type == vm_type.label), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


@cache
def probe() -> Host:
    """Ask this kernel; raises `HarnessError` if there is no KVM to ask. Asked once in a process."""
    with Kvm.open() as kvm:
        types = kvm.vm_types()
        caps = {cap.name: kvm.check_extension(cap) for cap in Cap}
        scopes = tuple(filter(None, (_scope(kvm, vm_type) for vm_type in types)))
    backend = _backend()
    return Host(
        release=platform.release(),
        version=platform.version(),
        machine=platform.machine(),
        backend=backend,
        paging=_paging(backend, caps),
        cpu_model=_cpu_model(),
        cpu_count=os.cpu_count() or 1,
        memory_mib=_memory_mib(),
        nodes=_memory_nodes(),
        vm_types=tuple(vm_type.label for vm_type in types),
        caps=caps,
        vms=scopes,
        parameters=_parameters(backend),
        config_hash=_config_hash(),
        debugfs=(DEBUGFS / "kvm").is_dir(),
        root=os.geteuid() == 0,
    )


def _scope(kvm: Kvm, vm_type: VmType) -> VmScope | None:
    vm = kvm.raw.create_vm(vm_type)
    if isinstance(vm, Errno):
        return None
    with vm:
        caps = {cap.name: vm.check_extension(cap) for cap in Cap}
    return VmScope(vm_type.label, caps, caps[Cap.GUEST_MEMFD_FLAGS.name])


def gmem_kinds(scope: VmScope) -> list[GmemFlag]:
    """The gmem kinds that a VM scope offers: every combination of its flags; none at all without KVM_CAP_GUEST_MEMFD."""
    if not scope.caps[Cap.GUEST_MEMFD.name]:
        return []
    return [GmemFlag(flags) for flags in range(4) if flags & ~scope.gmem_flags == 0]


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _backend() -> str:
    # A built-in vendor module has its directory in /sys/module even if it found no hardware, so the CPU's flag decides.
    flags = _cpu_flags()
    found: list[tuple[str, Callable[[], bool]]] = [
        ("kvm_amd", lambda: "svm" in flags),
        ("kvm_intel", lambda: "vmx" in flags),
        ("kvm_pvm", lambda: True),
    ]
    for name, plausible in found:
        if (MODULES / name).is_dir() and plausible():
            return name
    return "kvm_arm" if platform.machine() == "aarch64" else "unknown"


def _paging(backend: str, caps: dict[str, int]) -> str:
    # KVM_CAP_PRE_FAULT_MEMORY is tdp_enabled by definition (x86: kvm_vm_ioctl_check_extension); before 6.11 the vendor
    # module's parameter says it.
    if caps[Cap.PRE_FAULT_MEMORY.name] or platform.machine() == "aarch64":
        return "tdp"
    parameter = {"kvm_amd": "npt", "kvm_intel": "ept"}.get(backend)
    value = _read(MODULES / backend / "parameters" / parameter) if parameter else ""
    return "tdp" if value in ("Y", "1") and not _at_least_611() else "shadow"


def _at_least_611() -> bool:
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    return (major, minor) >= (6, 11)


def _parameters(backend: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for module in ("kvm", backend):
        directory = MODULES / module / "parameters"
        if directory.is_dir():
            found |= {f"{module}.{path.name}": _read(path) for path in sorted(directory.iterdir())}
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)


def _memory_nodes() -> int:
    text = _read(Path("/sys/devices/system/node/has_memory"))
    count = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count or 1


def kernel_config() -> str | None:
    """The running kernel's configuration as text (/proc/config.gz, else /boot/config-RELEASE); None if neither is there."""
    import gzip

    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return None


def _config_hash() -> str | None:
    text = kernel_config()
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None
