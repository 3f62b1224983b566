"""What QEMU's monitor says of the CPUs of a silent guest, summed up."""

from kvmgmem.lab.supervision.cpu_states import CpuStates, questions

REGISTERS = """\r
CPU#0\r
RAX=000000000429c000 RBX=0000000000000000 RCX=0000000000000000 RDX=0000000000000000\r
RIP=ffffffff82d0c8d2 RFL=00000202 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\r
CS =0010 0000000000000000 ffffffff 00a09b00 DPL=0 CS64 [-RA]\r
CR0=00000031 CR2=0000000000000000 CR3=0000000005df6000 CR4=00750ef0\r
DR6=00000000ffff0ff0 DR7=0000000000000400\r
EFER=0000000000001d01\r
\r
CPU#1\r
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000\r
EFER=0000000000000000\r
"""
LAPIC = """dumping local APIC state for CPU 0 \r
\r
LVT0\t 0x00010700 active-hi edge  masked                      ExtINT (vec 0)\r
ISR\t (none)\r
IRR\t 236 251\r
\r
APR 0x00 TPR 0x10 DFR 0x0f LDR 0x00 PPR 0x10\r
"""


def test_a_line_says_where_a_cpu_stands_and_what_waits_for_it() -> None:
    """In 64-bit code or not; a CPU without interrupts says nothing of them, and other answers nothing at all."""
    cpus = CpuStates()
    for answer in (LAPIC, REGISTERS, "", "unknown command: 'info lapic'"):
        cpus.take(answer)
    assert cpus.lines() == [
        "QEMU: CPU 0: rip=ffffffff82d0c8d2 rfl=00000202 cpl=0 hlt=0 cr0=00000031 cr3=0000000005df6000 cr4=00750ef0 "
        "efer=0000000000001d01; interrupts pending: 236 251",
        "QEMU: CPU 1: eip=0000fff0 efl=00000002 cpl=0 hlt=1 cr0=60000010 cr3=00000000 cr4=00000000 efer=0000000000000000",
    ]


def test_a_monitor_that_does_not_answer_adds_nothing() -> None:
    """QEMU itself may be what hangs."""
    assert CpuStates().lines() == []


def test_every_cpu_has_a_local_apic_to_ask_for() -> None:
    """All registers come with one answer."""
    assert questions(2) == ["info registers -a", "info lapic 0", "info lapic 1"]
