"""GM-RUN: where KVM itself reads and writes guest memory, it uses userspace_addr, also for slots that gmem alone backs."""

from pathlib import Path

from kvmgmem.abi import OK, PAGE_SIZE
from kvmgmem.arch.x86_64 import GuestCpu, GuestMachine, identity_tables, is_report, programs
from kvmgmem.exits import SHUTDOWN, InternalErrorExit, IoExit, MmioExit, RunResult
from kvmgmem.guest_memfd import GuestMemfd
from kvmgmem.host import Host
from kvmgmem.memory import Mapping
from kvmgmem.testing import contract, gmem_kinds, vm_types
from kvmgmem.testing.fixtures import GPA, SIZE
from kvmgmem.vm import Vm

STAMP = 0x5EED_0000
IN_GMEM = 0x22
IN_HVA = 0x77
NOWHERE = 0x9000_0000  # no slot
OUTPUT_PORT = 0x11
SET = 1  # KVM_SET_MSRS: one register was set

# arch/x86/include/uapi/asm/kvm_para.h
MSR_SYSTEM_TIME = 0x4B56_4D01
MSR_STEAL_TIME = 0x4B56_4D03
MSR_PV_EOI = 0x4B56_4D04
MSR_ENABLED = 1
CLOCK_AT, STEAL_AT, EOI_AT = 3 * PAGE_SIZE, 4 * PAGE_SIZE, 5 * PAGE_SIZE
AREA_SIZE = 64


def put_out(cpu: GuestCpu, gpa: int) -> RunResult:
    """Let the guest output the byte at `gpa` with OUTSB, which KVM emulates everywhere."""
    return cpu.attempt("outs", rsi=gpa, rcx=1, rdx=OUTPUT_PORT)


def output(byte: int) -> RunResult:
    """The exit of an OUTSB that read this byte."""
    return RunResult(OK, IoExit(OUTPUT_PORT, True, 1, 1, bytes([byte])))


@contract("GM-RUN-024")
@vm_types("default")
@gmem_kinds("gMS")
def test_guest_page_tables_in_gmem(vm: Vm, gmem: GuestMemfd, machine: GuestMachine, host: Host) -> None:
    """Guest page tables may lie in gmem with EPT and NPT; shadow paging reads them by userspace_addr, and not the gmem."""
    with gmem.map() as own, Mapping.anonymous(SIZE) as zeros:
        own.write(0, identity_tables(GPA))
        found: dict[str, object] = {}
        for vcpu_id, (name, hva) in enumerate({"own mapping": own.address, "none": 0, "zeros": zeros.address}.items()):
            vm.bind(gmem, gpa=GPA, hva=hva)
            cpu = machine.cpu(vcpu_id)
            cpu.set_page_tables(GPA)
            result = cpu.attempt("load8", rdi=GPA)
            found[name] = "runs" if is_report(result) else result
            cpu.close()
            vm.delete_region(0)
        otherwise: object = "runs" if host.paging == "tdp" else RunResult(OK, SHUTDOWN)
        assert found == {"own mapping": "runs", "none": otherwise, "zeros": otherwise}


@contract("GM-RUN-025")
@gmem_kinds("gM", "gMS")
def test_emulated_reads_show_what_lies_at_userspace_addr(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """An instruction that KVM emulates reads userspace_addr where the guest itself reads gmem: a divergence it can see."""
    with Mapping.anonymous(SIZE) as unrelated:
        unrelated.fill(IN_HVA)
        vm.bind(gmem, gpa=GPA, hva=unrelated.address)
        cpu.store(GPA, IN_GMEM, 1)
        assert put_out(cpu, GPA) == output(IN_HVA)
        assert is_report(cpu.run())
        assert cpu.load(GPA, 1) == IN_GMEM
        vm.delete_region(0)
        if gmem.kind == "gMS":
            with gmem.map() as own:  # the control: the gmem's own mapping shows no difference
                vm.bind(gmem, gpa=GPA, hva=own.address)
                assert put_out(cpu, GPA) == output(IN_GMEM)
                assert is_report(cpu.run())


@contract("GM-RUN-026")
@vm_types("default")
@gmem_kinds("gMS")
def test_emulated_access_without_userspace_addr_is_mmio(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Emulated accesses to gmem in a slot without a usable userspace_addr come out as MMIO, although this is memory."""
    with gmem.map() as own:
        own.store(STAMP, 8)
        own.fill(IN_GMEM, PAGE_SIZE, 1)
        vm.bind(gmem, gpa=GPA, hva=own.address)  # the control: only userspace_addr differs
        stored = RunResult(OK, MmioExit(NOWHERE, 8, True, STAMP.to_bytes(8, "little")))
        assert cpu.attempt("movs8", rsi=GPA + 8, rdi=NOWHERE) == stored
        assert is_report(cpu.run())
        assert put_out(cpu, GPA + PAGE_SIZE) == output(IN_GMEM)
        assert is_report(cpu.run())
        vm.delete_region(0)
        vm.bind(gmem, gpa=GPA)
        assert cpu.load(GPA + 8) == STAMP

        read = cpu.attempt("movs8", rsi=GPA + 8, rdi=NOWHERE)
        assert read.answer == OK
        assert isinstance(read.exit, MmioExit)
        assert (read.exit.gpa, read.exit.length, read.exit.write) == (GPA + 8, 8, False)
        answered = cpu.answer_mmio(STAMP + 1)
        assert answered == RunResult(OK, MmioExit(NOWHERE, 8, True, (STAMP + 1).to_bytes(8, "little")))
        assert is_report(cpu.run())

        byte = put_out(cpu, GPA + PAGE_SIZE)
        assert byte.answer == OK
        assert isinstance(byte.exit, MmioExit)
        assert (byte.exit.gpa, byte.exit.length, byte.exit.write) == (GPA + PAGE_SIZE, 1, False)
        assert cpu.answer_mmio(IN_HVA) == output(IN_HVA)
        assert is_report(cpu.run())
        assert own.load(8) == STAMP


def hardware_hands_over_instructions(host: Host) -> bool:
    """Whether the processor tells KVM the bytes of the instruction that faulted (AMD's decode assists)."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return host.backend == "kvm_amd" and "decodeassists" in flags.split()


@contract("GM-RUN-027")
@vm_types("default")
@gmem_kinds("gMS")
def test_an_emulated_instruction_cannot_be_fetched_from_gmem(
    vm: Vm, gmem: GuestMemfd, machine: GuestMachine, host: Host
) -> None:
    """KVM fetches an instruction that it must emulate by userspace_addr; without one the guest gets no further.

    The failed fetch is an internal error or, at CPL 3, an invalid opcode for which this guest has no handler.
    """
    with gmem.map() as own:
        own.write(0, programs()["load4"])
        read = RunResult(OK, MmioExit(NOWHERE, 4, False, b""))
        found: list[object] = []
        for vcpu_id, hva in enumerate((own.address, 0)):
            vm.bind(gmem, gpa=GPA, hva=hva)
            cpu = machine.cpu(vcpu_id)
            result = cpu.attempt(GPA, rdi=NOWHERE)
            found.append(without_data(result))
            cpu.close()
            vm.delete_region(0)
        assert found[0] == read  # the control: only userspace_addr differs
        if hardware_hands_over_instructions(host):
            assert found[1] == read
        else:
            assert found[1] in ("internal error", RunResult(OK, SHUTDOWN))


def without_data(result: RunResult) -> object:
    """A result without the parts that carry no meaning: the bytes of an MMIO read, the numbers of an internal error."""
    if isinstance(result.exit, MmioExit) and not result.exit.write:
        return RunResult(result.answer, MmioExit(result.exit.gpa, result.exit.length, False, b""))
    return "internal error" if isinstance(result.exit, InternalErrorExit) else result


@contract("GM-RUN-028")
@vm_types("default")
@gmem_kinds("gMS")
def test_translate_walks_page_tables_by_userspace_addr(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """KVM_TRANSLATE reads guest page tables at userspace_addr: without one every address is invalid, but no error."""
    gva = GPA + SIZE + 0x123
    with gmem.map() as own, Mapping.anonymous(SIZE) as zeros:
        own.write(0, identity_tables(GPA))
        for hva, valid in ((own.address, True), (0, False), (zeros.address, False)):
            vm.bind(gmem, gpa=GPA, hva=hva)
            cpu.set_page_tables(GPA)
            answer, gpa, is_valid = cpu.vcpu.raw.translate(gva)
            assert (answer, is_valid) == (OK, valid)
            assert not valid or gpa == gva
            vm.delete_region(0)


@contract("GM-RUN-029")
@vm_types("default")
@gmem_kinds("gMS")
def test_paravirtual_areas_are_written_by_userspace_addr(vm: Vm, gmem: GuestMemfd, machine: GuestMachine) -> None:
    """The clock and steal time of a guest are written at userspace_addr; without one never, and nobody is told."""
    with gmem.map() as own, Mapping.anonymous(SIZE) as unrelated:
        seen: dict[str, tuple[list[int], list[bool]]] = {}
        backings = {"own mapping": (own.address, own), "none": (0, own), "unrelated": (unrelated.address, unrelated)}
        for vcpu_id, (name, (hva, memory)) in enumerate(backings.items()):
            vm.bind(gmem, gpa=GPA, hva=hva)
            own.fill(0, 0, 8 * PAGE_SIZE)
            cpu = machine.cpu(vcpu_id)
            areas = {MSR_SYSTEM_TIME: CLOCK_AT, MSR_STEAL_TIME: STEAL_AT, MSR_PV_EOI: EOI_AT}
            accepted = [int(cpu.set_msr(msr, GPA + at | MSR_ENABLED)) for msr, at in areas.items()]
            cpu.load(GPA)
            written = [not memory.is_filled_with(0, at, AREA_SIZE) for at in (CLOCK_AT, STEAL_AT)]
            seen[name] = (accepted, written)
            if memory is not own:
                assert own.is_filled_with(0, 0, 8 * PAGE_SIZE)
            cpu.close()
            vm.delete_region(0)
        # The kernel keeps steal time with CONFIG_SCHED_INFO only; the control says whether this one does.
        steal = seen["own mapping"][0][1]
        accepted = [SET, steal, SET]
        assert seen["own mapping"] == (accepted, [True, steal == SET])
        assert seen["none"] == (accepted, [False, False])
        assert seen["unrelated"] == seen["own mapping"]


@contract("GM-RUN-017", "GM-RUN-018", "GM-RUN-025")
@vm_types("default")
@gmem_kinds("gMS")
def test_an_emulated_access_finds_memory_where_mmio_was(vm: Vm, gmem: GuestMemfd, cpu: GuestCpu) -> None:
    """Once a slot is made where the guest has met MMIO, instructions that KVM emulates find memory there, as all others do.

    KVM remembers the last page of MMIO for its emulator as long as the slots are the same ones (vcpu_match_mmio_gen).
    """
    with gmem.map() as own:
        own.fill(IN_GMEM, 0, 8)
        for _ in range(2):
            assert without_data(cpu.try_load(GPA)) == RunResult(OK, MmioExit(GPA, 8, False, b""))
            cpu.finish(cpu.answer_mmio(0))
            vm.bind(gmem, gpa=GPA, hva=own.address)
            assert put_out(cpu, GPA) == output(IN_GMEM)
            assert is_report(cpu.run())
            assert cpu.load(GPA, 1) == IN_GMEM
            vm.delete_region(0)
