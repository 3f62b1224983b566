"""KVM as modules: which of them a mutant is built into. The kernel itself stays, and so does a guest that has booted it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KVM_FOLDERS: Final = ("virt/kvm/", "arch/x86/kvm/")
"""Nothing outside these folders includes a header of theirs, and nothing in vmlinux is made of their sources (7.3)."""

_MODULES: Final = {
    "CONFIG_IRQ_BYPASS_MANAGER": "virt/lib/irqbypass.ko",
    "CONFIG_KVM": "arch/x86/kvm/kvm.ko",
    "CONFIG_KVM_AMD": "arch/x86/kvm/kvm-amd.ko",
    "CONFIG_KVM_INTEL": "arch/x86/kvm/kvm-intel.ko",
}
"""Options of the configuration, and the modules of a build, each after those that it depends on."""

_NOT_EMULATED: Final = {"tcg": "CONFIG_KVM_INTEL"}
"""What cannot load in a guest of that accelerator: TCG emulates SVM and no VMX (QEMU 7.2 to 10.0)."""


@dataclass(frozen=True)
class Kernel:
    """What a guest boots, and the modules that it loads then, in their order."""

    image: Path
    modules: tuple[Path, ...] = ()


def module_goals(config: Mapping[str, str], accelerator: str) -> tuple[str, ...]:
    """KVM's modules in a configuration (name to value), below the folder of objects; none where KVM is built in."""
    if config.get("CONFIG_KVM") != "m":
        return ()
    left_out = _NOT_EMULATED.get(accelerator)
    return tuple(path for option, path in _MODULES.items() if config.get(option) == "m" and option != left_out)


def goals_for(file: str, modules: Sequence[str]) -> tuple[str, ...]:
    """What make has to bring up to date when this file of the source has changed."""
    return tuple(modules) if modules and file.startswith(KVM_FOLDERS) else ("bzImage", *modules)


def keep(objects: Path, modules: Sequence[str], image: Path, folder: Path) -> Kernel:
    """Copy what was built out of the way of the next build. `image` stays where it is, if it is no part of `objects`."""
    folder.mkdir(parents=True, exist_ok=True)
    if image.is_relative_to(objects):
        image = _copy(image, folder / "bzImage")
    # Sorted by name they are in the order in which they load.
    names = [f"{number:03}-{Path(module).name}" for number, module in enumerate(modules)]
    return Kernel(image, tuple(_copy(objects / module, folder / name) for module, name in zip(modules, names, strict=True)))


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copy2(source, target))


def are_the_same(one: Kernel, other: Kernel) -> bool:
    """Whether two kernels are the same machine code; without modules, nobody knows (an image holds its time of build)."""
    if one.image != other.image or not one.modules:
        return False
    return [path.read_bytes() for path in one.modules] == [path.read_bytes() for path in other.modules]
