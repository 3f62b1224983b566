"""What QEMU's monitor says of a silent guest's CPUs, in a line each: where they stand, and what waits for them.

It knows where no NMI is answered: a CPU that runs without paging, one that waits with an interrupt pending, one whose guest
is never left.
"""

import re
from collections.abc import Iterator

REGISTERS = "info registers -a"
"""The monitor's command for all CPUs' registers."""

_CPU = re.compile(r"^CPU#(\d+)\s*$", re.MULTILINE)
_SHOWN = ("RIP", "EIP", "RFL", "EFL", "CPL", "HLT", "CR0", "CR3", "CR4", "EFER")
_APIC = re.compile(r"local APIC state for CPU (\d+)")


def questions(cpus: int) -> list[str]:
    """The commands of the human monitor to ask, for a machine with so many CPUs."""
    return [REGISTERS, *(f"info lapic {cpu}" for cpu in range(cpus))]


class CpuStates:
    """Takes the monitor's answers in any order, and sums them up."""

    def __init__(self) -> None:
        self._registers: dict[int, str] = {}
        self._interrupts: dict[int, str] = {}

    def take(self, text: str) -> None:
        """Take what the monitor answered; anything but registers and local APICs is left aside."""
        if apic := _APIC.search(text):
            self._interrupts[int(apic[1])] = "; ".join(_interrupts(text))
            return
        _, *parts = _CPU.split(text)
        for cpu, registers in zip(parts[::2], parts[1::2], strict=True):
            self._registers[int(cpu)] = " ".join(_registers(registers))

    def lines(self) -> list[str]:
        """A line for each CPU that QEMU told of."""
        cpus = sorted({*self._registers, *self._interrupts})
        return [
            f"QEMU: CPU {cpu}: " + "; ".join(filter(None, (self._registers.get(cpu), self._interrupts.get(cpu))))
            for cpu in cpus
        ]


def _registers(text: str) -> Iterator[str]:
    for name in _SHOWN:
        if found := re.search(rf"\b{name}=([0-9a-f]+)", text):
            yield f"{name.lower()}={found[1]}"


def _interrupts(text: str) -> Iterator[str]:
    for name, meaning in (("IRR", "pending"), ("ISR", "in service")):
        found = re.search(rf"^{name}[ \t]+(.*?)\s*$", text, re.MULTILINE)
        if found and found[1] != "(none)":
            yield f"interrupts {meaning}: {found[1]}"
