"""The guest's init, as far as it can be looked at outside a guest."""

from pathlib import Path

import pytest

from kvmgmem.lab.guest.init import module_name, module_parameters


@pytest.mark.parametrize(
    ("command_line", "parameters"),
    [
        ("console=ttyS0 panic=-1 nokaslr\n", {}),
        ("kvm_amd.npt=0", {"kvm_amd": "npt=0"}),
        # Dashes are underscores in a module's name; in a parameter's the kernel itself sees to it.
        ("kvm-amd.npt=0 kvm_amd.avic=1 kvm.tdp_mmu=N", {"kvm_amd": "npt=0 avic=1", "kvm": "tdp_mmu=N"}),
        # A switch without a value; a value with dots and equals signs.
        ("kvm.ignore_msrs usbcore.quirks=a.b:c=d", {"kvm": "ignore_msrs", "usbcore": "quirks=a.b:c=d"}),
        ('dyndbg="x.y=1 z" kvm.dyndbg="file x.c +p" kvm.a=1', {"kvm": 'dyndbg="file x.c +p" a=1'}),
        ("root=/dev/x.y .z=1 kvm.=1 kvm.a=1 -- kvm.b=2", {"kvm": "a=1"}),
        # Of two settings the kernel takes the last, so the order stays.
        ("kvm_amd.npt=0 kvm_amd.npt=1", {"kvm_amd": "npt=0 npt=1"}),
    ],
)
def test_words_for_modules_reach_them(command_line: str, parameters: dict[str, str]) -> None:
    """As modprobe reads the kernel's command line, and nothing else of it."""
    assert module_parameters(command_line) == parameters


@pytest.mark.parametrize(
    ("file", "name"), [("007-kvm-amd.ko", "kvm_amd"), ("000-kvm.ko", "kvm"), ("012-virtio_console.ko", "virtio_console")]
)
def test_a_module_has_the_name_that_the_kernel_gives_it(file: str, name: str) -> None:
    """The number in front is the image's, for the order."""
    assert module_name(Path("/lib/kvmgmem-modules") / file) == name
