"""How many guests fit, and when the tests are shared between them."""

import argparse
import os
from pathlib import Path

import pytest

from kvmgmem.cli import build_parser
from kvmgmem.lab import vm_cli
from kvmgmem.lab.guest.capacity import QEMU_MEMORY_MIB, guests_that_fit


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with four cores, and a /proc/meminfo of its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    return tmp_path / "meminfo"


@pytest.mark.parametrize(("available", "guests"), [(64 * 1024, 4), (10 * 1024, 2), (5 * 1024, 1), (512, 1)])
def test_guests_take_half_of_the_memory_and_a_core_each(meminfo: Path, available: int, guests: int) -> None:
    """`available` in MiB; one guest is always tried."""
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable: {available * 1024} kB\n")
    assert guests_that_fit(2048 - QEMU_MEMORY_MIB, meminfo) == guests


def test_a_kernel_that_does_not_say_what_is_available_gets_one_guest(meminfo: Path) -> None:
    """MemAvailable is as old as Linux 3.14; containers may hide it."""
    meminfo.write_text("MemTotal: 99999999 kB\n")
    assert guests_that_fit(512, meminfo) == 1


def vm_args(*words: str, pytest_args: tuple[str, ...] = ()) -> argparse.Namespace:
    """What `kvmgmem vm WORDS -- PYTEST_ARGS` parses to."""
    args = build_parser().parse_args(["vm", *words])
    args.pytest_args = list(pytest_args)
    return args


def test_only_the_whole_set_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second boot costs more than a few tests, and a debugger follows one guest; what is asked for is done."""
    monkeypatch.setattr(vm_cli, "guests_that_fit", lambda _: 3)
    assert vm_cli._guests(vm_args()) == 3
    assert vm_cli._guests(vm_args("--gdb")) == 1
    assert vm_cli._guests(vm_args(pytest_args=("-k", "overlap"))) == 1
    assert vm_cli._guests(vm_args("--jobs", "2", pytest_args=("-k", "overlap"))) == 2
