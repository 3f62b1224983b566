"""The ladder of fixtures, each one step further: `kvm`, `vm`, `gmem`, `bound`, `running`.

    kvm      an open /dev/kvm
    vm       a VM of the parameter `vm_type`
    gmem     a 2 MiB guest_memfd of the parameter `gmem_kind`, made by `vm`
    bound    `gmem` bound whole to slot 0 at `GPA`, without a host mapping
    running  `bound`, and a vCPU that loads and stores where it is told to

A test that takes `vm` and `gmem` gets the same VM. Which types and kinds there are is asked of the kernel under test; what
it lacks is a skip that says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kvmgmem import host as host_facts
from kvmgmem.abi import GiB, GmemFlag, MiB, VmType
from kvmgmem.guest_memfd import KIND_NAMES, GuestMemfd
from kvmgmem.host import Host
from kvmgmem.kvm import Kvm
from kvmgmem.memory import MemoryRegion
from kvmgmem.testing.requirements import need
from kvmgmem.vm import Vm

if TYPE_CHECKING:
    from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine

GPA = 1 * GiB
SIZE = 2 * MiB
PLAIN_TYPES = (VmType.DEFAULT, VmType.SW_PROTECTED)


@dataclass(frozen=True)
class Bound:
    """A gmem bound whole to slot 0 at `gpa`."""

    vm: Vm
    gmem: GuestMemfd
    region: MemoryRegion

    @property
    def gpa(self) -> int:
        """Where the guest sees the gmem, in bytes."""
        return self.region.gpa


@dataclass(frozen=True)
class Running:
    """A bound gmem and a vCPU to touch it with."""

    vm: Vm
    gmem: GuestMemfd
    region: MemoryRegion
    machine: "GuestMachine"
    cpu: "GuestCpu"

    @property
    def gpa(self) -> int:
        """Where the guest sees the gmem, in bytes."""
        return self.region.gpa


@pytest.fixture
def host() -> Host:
    """What this kernel's KVM offers."""
    return host_facts.probe()


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm."""
    with Kvm.open() as kvm:
        yield kvm


@pytest.fixture
def vm_type() -> VmType:
    """The type of `vm`; a parameter where the plugin knows more than one."""
    return VmType.DEFAULT


@pytest.fixture
def vm(kvm: Kvm, vm_type: VmType) -> Iterator[Vm]:
    """A VM of the parameter `vm_type`."""
    with kvm.create_vm(vm_type) as vm:
        yield vm


@pytest.fixture
def gmem_kind() -> GmemFlag:
    """The creation flags of `gmem`; a parameter."""
    return GmemFlag(0)


@pytest.fixture
def gmem(vm: Vm, gmem_kind: GmemFlag) -> Iterator[GuestMemfd]:
    """A 2 MiB guest_memfd of the parameter `gmem_kind`."""
    with vm.create_guest_memfd(SIZE, gmem_kind) as gmem:
        yield gmem


@pytest.fixture
def bound(vm: Vm, gmem: GuestMemfd) -> Bound:
    """The gmem bound whole to slot 0 at `GPA`."""
    return Bound(vm, gmem, vm.bind(gmem, gpa=GPA))


@pytest.fixture
def machine(vm: Vm) -> Iterator["GuestMachine"]:
    """Page tables and programs for guests of `vm`, in a plain slot of their own."""
    need("x86")
    from kvmgmem.arch.x86_64 import GuestMachine

    machine = GuestMachine(vm)
    yield machine
    machine.close()


@pytest.fixture
def cpu(machine: "GuestMachine") -> Iterator["GuestCpu"]:
    """A vCPU of `vm` that runs one guest program at a time."""
    cpu = machine.cpu()
    yield cpu
    cpu.close()


@pytest.fixture
def running(bound: Bound, machine: "GuestMachine", cpu: "GuestCpu") -> Running:
    """The bound gmem, and a vCPU to touch it with."""
    return Running(bound.vm, bound.gmem, bound.region, machine, cpu)


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> float:
    """The factor on the volume of long tests (--effort)."""
    return float(request.config.getoption("--effort"))


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give `vm_type` and `gmem_kind` their values for one test function."""
    names = metafunc.fixturenames
    wants_kind = "gmem_kind" in names
    if "vm_type" not in names:
        return
    types = [vm_type for vm_type in PLAIN_TYPES if vm_type.label in _chosen(metafunc, "vm_types", vm_type.label)]
    if wants_kind:
        metafunc.parametrize(("vm_type", "gmem_kind"), [param for vm_type in types for param in _kinds(metafunc, vm_type)])
    else:
        wants_gmem = metafunc.definition.get_closest_marker("makes_gmem") is not None
        metafunc.parametrize("vm_type", [_type_param(vm_type, wants_gmem) for vm_type in types])


def _chosen(metafunc: pytest.Metafunc, marker: str, default: str) -> tuple[str, ...]:
    found = metafunc.definition.get_closest_marker(marker)
    return found.args if found else (default,)


def _requirement(vm_type: VmType, wants_gmem: bool) -> list[str]:
    if vm_type is VmType.DEFAULT:
        return ["default-vm"] if wants_gmem else []
    return [vm_type.label]


def _type_param(vm_type: VmType, wants_gmem: bool) -> object:
    return pytest.param(vm_type, id=vm_type.label, marks=_marks(_requirement(vm_type, wants_gmem)))


def _kinds(metafunc: pytest.Metafunc, vm_type: VmType) -> list[object]:
    """One parameter for each kind that is legal for the type, and for any more that this kernel offers."""
    scope = host_facts.probe().scope(vm_type)
    offered = scope.gmem_flags if scope else 0
    legal = GmemFlag.MMAP if vm_type.has_private_memory else GmemFlag.MMAP | GmemFlag.INIT_SHARED
    params: list[object] = []
    for flags in range(4):
        name = KIND_NAMES[flags]
        if name not in _chosen(metafunc, "gmem_kinds", name) or flags & ~(offered | legal):
            continue
        wanted = _requirement(vm_type, True)
        if scope and flags & ~offered:
            wanted = ["cap:GUEST_MEMFD_FLAGS"]
        params.append(pytest.param(vm_type, GmemFlag(flags), id=f"{vm_type.label}-{name}", marks=_marks(wanted)))
    return params


def _marks(names: list[str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.requires(*names)] if names else []
