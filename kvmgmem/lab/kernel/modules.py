"""Kernel modules: which files a guest needs for KVM and its own devices, in the order in which they load."""

import lzma
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

from kvmgmem.errors import HarnessError

# What a guest cannot do without: the bus and the port that its results go through. It may be built in.
NEEDED = ("virtio_pci", "virtio_console", "kvm")
# One of the two vendors loads, on its own CPU; the rest is good to have.
WELCOME = ("kvm_amd", "kvm_intel", "virtio_rng")

_SUFFIX = re.compile(r"\.ko(\.(xz|zst|gz))?$")
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
# "softdep=pre: a b post: c", as modules name what they can use but do not link with.
_SOFT_DEPENDS = re.compile(rb"(?:^|\0)softdep=pre: ([^\0]*?)(?: post:[^\0]*)?\0")


def module_name(path: Path) -> str:
    """A module's name as the kernel has it: without suffixes, and with underscores where the file has dashes."""
    return _SUFFIX.sub("", path.name).replace("-", "_")


def load_order(folder: Path, needed: Iterable[str] = NEEDED, welcome: Iterable[str] = WELCOME) -> list[Path]:
    """The module files below `folder` to load, each after those that it depends on.

    What the kernel has built in (modules.builtin, beside the modules) needs no file. Dependencies are read from the
    modules themselves: packages leave modules.dep to be made on the machine that installs them.
    Raises HarnessError when something needed is neither a file nor built in.
    """
    files = {module_name(path): path for path in sorted(folder.rglob("*.ko*")) if _SUFFIX.search(path.name)}
    built_in = {module_name(Path(line)) for file in folder.rglob("modules.builtin") for line in _lines(file)}
    order: list[Path] = []
    for name in needed:
        _append(name, True, files, built_in, order)
    for name in welcome:
        _append(name, False, files, built_in, order)
    return order


def _append(name: str, needed: bool, files: dict[str, Path], built_in: set[str], order: list[Path]) -> None:
    """Add a module behind its dependencies; the kernel allows no cycles among them, and `order` ends any other."""
    if name not in files:
        if needed and name not in built_in:
            raise HarnessError(f"this kernel has no module {name}, and not built in either", "choose another kernel")
        return
    if files[name] in order:
        return
    hard, soft = dependencies(read_module(files[name]))
    for dependency in hard:
        _append(dependency, True, files, built_in, order)
    for dependency in soft:
        _append(dependency, False, files, built_in, order)
    order.append(files[name])


def dependencies(module: bytes) -> tuple[list[str], list[str]]:
    """What a module (uncompressed) says that must, and that may, be loaded before it: its .modinfo section's words."""
    hard = _DEPENDS.search(module)
    names = hard[1].decode("ascii", "replace").split(",") if hard else []
    soft = [name for match in _SOFT_DEPENDS.finditer(module) for name in match[1].decode("ascii", "replace").split()]
    return [_kernel_name(name) for name in names if name], [_kernel_name(name) for name in soft]


def read_module(path: Path) -> bytes:
    """A module's file, decompressed. Raises HarnessError when it is damaged, or zstd is needed and missing."""
    data = path.read_bytes()
    try:
        match path.suffix:
            case ".xz":
                return lzma.decompress(data)
            case ".gz":
                return zlib.decompress(data, wbits=31)
            case ".zst":
                return _unzstd(data)
    except (lzma.LZMAError, zlib.error, subprocess.CalledProcessError) as error:
        raise HarnessError(f"cannot unpack the module {path.name}: {error}", "is the package whole?") from error
    return data


def _unzstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        raise HarnessError("unpacking this kernel's modules needs zstd", "apt-get install zstd")
    return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, timeout=60, check=True).stdout


def _kernel_name(name: str) -> str:
    return name.replace("-", "_")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").split()
