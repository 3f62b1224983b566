"""Requirements: named facts about a kernel that some tests need, each with the sentence that says what is missing."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from _pytest.outcomes import Skipped

from kvmgmem import host as host_facts
from kvmgmem import roadmap
from kvmgmem.abi import Cap, VmType
from kvmgmem.entry import syscall
from kvmgmem.errors import Errno, HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.host import Host
from kvmgmem.syscalls import NUMBER
from kvmgmem.testing import memory_cgroup, selinux
from kvmgmem.testing.emulated_cpus import emulated
from kvmgmem.testing.numa_policy import policy_belongs_to_the_file
from kvmgmem.testing.slot_metadata import metadata_bytes


@dataclass(frozen=True)
class Requirement:
    """A name, the test of a host, and the skip reason if the host lacks it."""

    name: str
    met: Callable[[Host], bool]
    missing: str
    for_root: bool = False
    """Whether root alone can meet it, so that an ordinary user's run is told what it left out."""


def _offers(vm_type: VmType) -> Callable[[Host], bool]:
    return lambda host: host.offers(vm_type)


def _cap(cap: Cap) -> Callable[[Host], bool]:
    return lambda host: bool(host.caps[cap.name])


def _vm_cap(cap: Cap) -> Callable[[Host], bool]:
    def met(host: Host) -> bool:
        scope = host.scope(VmType.DEFAULT)
        return scope is not None and bool(scope.caps[cap.name])

    return met


def _memory_failure(_: Host) -> bool:
    return Path("/proc/sys/vm/memory_failure_early_kill").exists()


def _cgroup(_: Host) -> bool:
    return memory_cgroup.memory_root() is not None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _modular(host: Host) -> bool:
    return (host_facts.MODULES / host.backend / "refcnt").exists()


def _gpa_bits(host: Host) -> int:
    if host.machine != "x86_64":
        return 0
    from kvmgmem.arch.x86_64 import max_gpa_bits

    return max_gpa_bits(host.paging)


def _memory_available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _switched_on(host: Host, *parameters: str) -> bool:
    return any(host.parameters.get(parameter) in ("Y", "1") for parameter in parameters)


def _has_sev_code(host: Host) -> bool:
    from kvmgmem.kvm import Kvm
    from kvmgmem.testing.encryption import looks_at_descriptors

    if host.machine != "x86_64":
        return False
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        return looks_at_descriptors(vm)


_ALL = [
    Requirement(
        "guest-memfd",
        lambda host: bool(host.caps[Cap.GUEST_MEMFD.name]),
        "this kernel has no guest_memfd (KVM_CAP_GUEST_MEMFD is 0; Linux 6.8 with CONFIG_KVM_GUEST_MEMFD has it)",
    ),
    Requirement(
        "default-vm",
        _vm_cap(Cap.GUEST_MEMFD),
        "VMs of the default type have no guest_memfd on this kernel (KVM_CAP_GUEST_MEMFD is 0 for them; 1 since 6.18)",
    ),
    Requirement(
        "sw-protected",
        _offers(VmType.SW_PROTECTED),
        "this KVM offers no software-protected VM (bit 1 of KVM_CAP_VM_TYPES: CONFIG_KVM_SW_PROTECTED_VM and the TDP MMU)",
    ),
    Requirement(
        "sev-code",
        _has_sev_code,
        "this KVM has no SEV code: it refuses to mirror and move without looking (not kvm_amd, or no CONFIG_KVM_AMD_SEV)",
    ),
    Requirement(
        "no-sev-code",
        lambda host: host.machine == "x86_64" and not _has_sev_code(host),
        "this KVM has SEV code (CONFIG_KVM_AMD_SEV), the row is about those without",
    ),
    Requirement(
        "no-encryption",
        lambda host: not (host.offers(VmType.SEV) or host.offers(VmType.TDX)),
        "this KVM offers encrypted VMs, the row is about those that do not",
    ),
    Requirement("sev", _offers(VmType.SEV), "this KVM offers no SEV VM (bit 2 of KVM_CAP_VM_TYPES)"),
    Requirement("sev-es", _offers(VmType.SEV_ES), "this KVM offers no SEV-ES VM (bit 3 of KVM_CAP_VM_TYPES)"),
    Requirement("snp", _offers(VmType.SNP), "this KVM offers no SEV-SNP VM (bit 4 of KVM_CAP_VM_TYPES)"),
    Requirement("tdx", _offers(VmType.TDX), "this KVM offers no TDX VM (bit 5 of KVM_CAP_VM_TYPES)"),
    Requirement("tdp", lambda host: host.paging == "tdp", "this KVM uses shadow paging, not EPT or NPT"),
    Requirement("shadow", lambda host: host.paging == "shadow", "this KVM uses EPT or NPT, not shadow paging"),
    Requirement("smm", _cap(Cap.X86_SMM), "this KVM has no system management mode (KVM_CAP_X86_SMM is 0: CONFIG_KVM_SMM)"),
    Requirement(
        "attributes",
        _cap(Cap.MEMORY_ATTRIBUTES),
        "this KVM has no memory attributes (KVM_CAP_MEMORY_ATTRIBUTES is 0: CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES)",
    ),
    Requirement(
        "no-attributes",
        lambda host: not host.caps[Cap.MEMORY_ATTRIBUTES.name],
        "this KVM has memory attributes, the row is about kernels without",
    ),
    Requirement("prefault", _vm_cap(Cap.PRE_FAULT_MEMORY), "this KVM cannot prefault (KVM_CAP_PRE_FAULT_MEMORY is 0)"),
    Requirement(
        "in-place-conversion",
        lambda _: roadmap.has("in-place-conversion"),
        "a gmem file does not convert its memory on this kernel (KVM_SET_MEMORY_ATTRIBUTES2 is not an ioctl of it)",
    ),
    Requirement(
        "second-file",
        lambda _: roadmap.has("second-file"),
        "this kernel makes no second file of a gmem's inode (KVM_LINK_GUEST_MEMFD is not an ioctl of VMs)",
    ),
    Requirement("dirty-ring", _cap(Cap.DIRTY_LOG_RING), "this KVM has no dirty ring (KVM_CAP_DIRTY_LOG_RING is 0)"),
    Requirement("x86", lambda host: host.machine == "x86_64", "the row is about x86-64"),
    Requirement("amd", lambda host: host.backend == "kvm_amd", "the row is about kvm_amd"),
    Requirement("intel", lambda host: host.backend == "kvm_intel", "the row is about kvm_intel"),
    Requirement(
        "hardware-mode",
        lambda host: host.backend != "kvm_pvm",
        "kvm_pvm emulates guest code above CPL 3, the row needs it to run natively",
    ),
    Requirement(
        "slot-of-8-tib",
        lambda host: _gpa_bits(host) >= 43,
        "guest physical addresses have fewer than 43 bits here, so no slot of 2^31 pages fits",
    ),
    Requirement(
        "memory-for-8-tib-slot",
        lambda host: _memory_available() > 2 * metadata_bytes(host, 1 << 31),
        "KVM's tables for a slot of 2^31-1 pages (16 GiB without the TDP MMU) need more than half of the available memory",
    ),
    Requirement(
        "apic-access-slot",
        lambda host: _switched_on(host, "kvm_amd.avic", "kvm_intel.flexpriority"),
        "KVM makes no slot of its own for the APIC here (kvm_amd.avic or kvm_intel.flexpriority is off)",
    ),
    Requirement(
        "tss-slot",
        lambda host: host.parameters.get("kvm_intel.unrestricted_guest") in ("N", "0"),
        "KVM makes no slot of its own for a TSS here (only kvm_intel with unrestricted_guest off does)",
    ),
    Requirement(
        "nested-svm",
        lambda host: (
            host.backend == "kvm_amd" and bool(host.caps[Cap.NESTED_STATE.name]) and _switched_on(host, "kvm_amd.nested")
        ),
        "needs nested SVM, whose state the test builds (kvm_amd with kvm_amd.nested=1)",
    ),
    Requirement("root", lambda host: host.root, "needs root (CAP_SYS_ADMIN)", for_root=True),
    Requirement(
        "debugfs",
        lambda _: (host_facts.DEBUGFS / "kvm").is_dir() and os.access(host_facts.DEBUGFS / "kvm", os.R_OK),
        "debugfs is not mounted or not readable (it needs root and CONFIG_DEBUG_FS)",
        for_root=True,
    ),
    Requirement("two-nodes", lambda host: host.nodes > 1, "needs two NUMA nodes with memory"),
    Requirement(
        "file-policy",
        lambda _: policy_belongs_to_the_file(),
        "this kernel allocates gmem without regard to policies set by mbind (a policy belongs to the file since 6.19)",
    ),
    Requirement(
        "memory-failure",
        _memory_failure,
        "this kernel cannot poison memory (CONFIG_MEMORY_FAILURE, which needs CONFIG_X86_MCE)",
    ),
    Requirement(
        "no-memory-failure",
        lambda host: not _memory_failure(host),
        "this kernel can poison memory, the row is about kernels that cannot",
    ),
    Requirement(
        "memcg",
        _cgroup,
        "no memory cgroup can be made here (it needs root, CONFIG_MEMCG, and the hierarchy mounted)",
        for_root=True,
    ),
    Requirement(
        "gmem-inode-cache",
        lambda host: not host.root or "\nkvm_gmem_inode_cache " in _text("/proc/slabinfo"),
        "this kernel takes the inodes of gmems from no cache of their own (kvm_gmem_inode_cache, since 6.19)",
    ),
    Requirement(
        "policy-cache",
        lambda host: not host.root or "\nnuma_policy " in _text("/proc/slabinfo"),
        "this kernel does not tell how many memory policies there are (the cache numa_policy in /proc/slabinfo)",
    ),
    Requirement(
        "failing-allocations",
        lambda host: (
            Path("/proc/self/fail-nth").exists()
            and all((host_facts.DEBUGFS / injector).is_dir() for injector in ("failslab", "fail_page_alloc"))
        ),
        "this kernel cannot let allocations fail (CONFIG_FAULT_INJECTION_DEBUG_FS, CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC)",
    ),
    Requirement(
        "lock-checks",
        lambda _: Path("/proc/lockdep").exists(),
        "this kernel does not check its locks (/proc/lockdep: CONFIG_PROVE_LOCKING)",
    ),
    Requirement(
        "no-quarantine",
        # Up to a 32nd of all memory (mm/kasan/quarantine.c); seen on 7.3.4: it does not come back within 150 s.
        lambda _: "\nCONFIG_KASAN_GENERIC=y" not in (host_facts.kernel_config() or ""),
        "this kernel keeps freed memory in quarantine (CONFIG_KASAN_GENERIC), so that what was given back cannot be counted",
    ),
    Requirement(
        "kmemleak",
        lambda _: (host_facts.DEBUGFS / "kmemleak").exists(),
        "this kernel does not look for leaks (debugfs has no kmemleak: CONFIG_DEBUG_KMEMLEAK)",
    ),
    Requirement(
        "selinux-enforcing",
        lambda _: selinux.judges_anon_inodes(),
        "needs SELinux in enforcing mode with a policy on anonymous inodes (/sys/fs/selinux/class/anon_inode)",
    ),
    Requirement("modules", _modular, "KVM's vendor module is built in, the row is about modules"),
    Requirement(
        "io-uring",
        # Without parameters to read, a working io_uring_setup(2) answers EFAULT.
        lambda _: syscall(NUMBER["io_uring_setup"], 0, 0) == Errno.EFAULT,
        "this kernel has no io_uring, or it is switched off (CONFIG_IO_URING, kernel.io_uring_disabled)",
    ),
    Requirement(
        "kcmp",
        lambda _: syscall(NUMBER["kcmp"], os.getpid(), os.getpid(), 0, 0, 0) != Errno.ENOSYS,
        "this kernel cannot compare descriptors of processes (CONFIG_KCMP)",
    ),
    Requirement(
        "trace-events",
        lambda host: host.root and "tracefs" in _text("/proc/filesystems").split(),
        "needs root and trace events (CONFIG_FTRACE and CONFIG_ENABLE_DEFAULT_TRACERS or another tracer)",
        for_root=True,
    ),
    Requirement(
        "text-patching",
        # Seen with QEMU 7.2 and Linux 7.3.4: while the kernel switches a trace point on, another CPU oopses on the int3
        # that covers the change (arch/x86/kernel/alternative.c, smp_text_poke_batch_finish).
        lambda host: not emulated() or host.cpu_count == 1,
        "QEMU's TCG breaks kernels that patch their own code while other CPUs run it; give the guest one CPU (--smp 1)",
    ),
    Requirement(
        "direct-io",
        lambda _: _opens_for_direct_io(),
        "the filesystem of the temporary directory refuses O_DIRECT (TMPDIR may name a directory on another one)",
    ),
    Requirement(
        "huge-pages",
        # With less than 512 MiB of memory the kernel sets it to never by itself (hugepage_init, mm/huge_memory.c).
        lambda _: "[never]" not in (_text("/sys/kernel/mm/transparent_hugepage/enabled") or "[never]"),
        "this kernel gives no transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled is not there or never)",
    ),
    Requirement(
        "userfaultfd", lambda _: _has_symbol_of_userfaultfd(), "this kernel has no userfaultfd (CONFIG_USERFAULTFD)"
    ),
]


def _opens_for_direct_io() -> bool:
    with tempfile.TemporaryFile() as file:
        try:
            os.close(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


def _has_symbol_of_userfaultfd() -> bool:
    return Path("/proc/sys/vm/unprivileged_userfaultfd").exists()


REQUIREMENTS = {requirement.name: requirement for requirement in _ALL}


@cache
def lookup(name: str) -> Requirement:
    """The requirement with this name, `cap:NAME` or `config:OPTION`; raises `HarnessError` (USAGE) if there is none."""
    kind, _, value = name.partition(":")
    if kind == "cap" and value in Cap.__members__:
        cap = Cap[value]
        return Requirement(name, _cap(cap), f"KVM_CAP_{value} ({int(cap)}) is 0")
    if kind == "config" and value:
        return Requirement(name, lambda _: _config_has(value), f"this kernel is built without CONFIG_{value}")
    if name not in REQUIREMENTS:
        raise HarnessError(
            f"{name!r} is not a requirement",
            f"one of: {', '.join(REQUIREMENTS)}, cap:NAME, config:OPTION",
            ExitCode.USAGE,
        )
    return REQUIREMENTS[name]


def _config_has(option: str) -> bool:
    # Without a readable configuration the test runs and shows by behaviour what is there.
    text = host_facts.kernel_config()
    return text is None or f"\nCONFIG_{option}=y" in text or f"\nCONFIG_{option}=m" in text


def first_missing(names: Sequence[str]) -> Requirement | None:
    """The first requirement of the list that this kernel does not meet."""
    return next((lookup(name) for name in names if not lookup(name).met(host_facts.probe())), None)


class Missing(Skipped):
    """A skip because of a requirement, by name, so that `--require` can turn it into a failure."""

    def __init__(self, requirement: Requirement) -> None:
        super().__init__(requirement.missing, _use_item_location=True)
        self.requirement = requirement


def need(*names: str) -> None:
    """Skip the test from within, with the reason, unless this kernel meets all requirements."""
    missing = first_missing(list(names))
    if missing is not None:
        raise Missing(missing)
