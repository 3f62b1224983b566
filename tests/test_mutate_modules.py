"""KVM in modules: which of them are built, kept and booted."""

from pathlib import Path

import pytest

from kvmgmem.lab.kernel.flavours import parse_config
from kvmgmem.mutate.build import mutate_flavour
from kvmgmem.mutate.modules import Kernel, are_the_same, goals_for, keep, module_goals

KVM = ("virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko")


def test_the_flavour_has_kvm_in_modules() -> None:
    """And what it does not ask for by name, Kconfig selects as a module, too."""
    config = parse_config(mutate_flavour().fragment) | {"CONFIG_IRQ_BYPASS_MANAGER": "m"}
    assert module_goals(config, "tcg") == KVM
    assert module_goals(config, "kvm") == (*KVM, "arch/x86/kvm/kvm-intel.ko")


def test_a_kernel_with_kvm_built_in_has_none() -> None:
    config = {"CONFIG_KVM": "y", "CONFIG_KVM_AMD": "y", "CONFIG_IRQ_BYPASS_MANAGER": "m"}
    assert module_goals(config, "tcg") == ()
    assert goals_for("virt/kvm/guest_memfd.c", ()) == ("bzImage",)


@pytest.mark.parametrize("file", ["virt/kvm/kvm_main.c", "arch/x86/kvm/mmu/mmu_internal.h"])
def test_kvms_own_files_reach_its_modules_only(file: str) -> None:
    assert goals_for(file, KVM) == KVM


@pytest.mark.parametrize("file", ["include/linux/kvm_host.h", "mm/truncate.c", "arch/x86/kernel/kvm.c", "virt/lib/x.c"])
def test_other_files_reach_the_kernel(file: str) -> None:
    assert goals_for(file, KVM) == ("bzImage", *KVM)


def built(folder: Path, text: str = "") -> Path:
    for module in KVM:
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_text(f"{module}{text}")
    (folder / "bzImage").write_text("image")
    return folder


def test_what_was_built_is_kept_from_the_next_build(tmp_path: Path) -> None:
    objects = built(tmp_path / "objects")
    whole = keep(objects, KVM, objects / "bzImage", tmp_path / "whole")
    elsewhere = keep(objects, KVM, tmp_path / "elsewhere", tmp_path / "modules")
    built(objects, "again")
    (objects / "bzImage").write_text("again")
    assert whole.image.read_text() == "image"
    assert [path.read_text() for path in whole.modules] == list(KVM)
    assert elsewhere.image == tmp_path / "elsewhere"
    assert elsewhere.modules == tuple(
        tmp_path / "modules" / name for name in ("000-irqbypass.ko", "001-kvm.ko", "002-kvm-amd.ko")
    )


def test_the_same_code_is_the_same_modules_on_the_same_image(tmp_path: Path) -> None:
    """Of two whole kernels nothing is known, for an image tells when it was built."""
    objects = built(tmp_path / "objects")
    image = tmp_path / "image"
    first, second = (keep(objects, KVM, image, tmp_path / name) for name in ("first", "second"))
    other = keep(built(tmp_path / "others", "mutated"), KVM, image, tmp_path / "third")
    assert are_the_same(first, second)
    assert not are_the_same(first, other)
    assert not are_the_same(first, keep(objects, KVM, objects / "bzImage", tmp_path / "fourth"))
    assert not are_the_same(Kernel(image), Kernel(image))
