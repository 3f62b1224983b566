"""The compiler's side of coverage: its .gcno files, the source they speak of, and the gcov that reads them."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.kernel.flavours import parse_config
from kvmgmem.lab.kernel.kernels import Kernel

KVM = Path("virt/kvm/kvm_main.c")
"""A file that every kernel with KVM has."""

GCOV_SECONDS = 60.0


@dataclass(frozen=True)
class Notes:
    """Where a kernel's .gcno files and its sources are, each below a folder laid out like the kernel's tree."""

    folder: Path
    source: Path

    def source_of(self, file: str) -> Path:
        """A source file by its place in the tree."""
        return self.source / file


@dataclass(frozen=True)
class Gcov:
    """The program, and the compiler that it belongs to ("12.2")."""

    path: str
    version: str


def find_notes(kernel: Kernel) -> Notes:
    """What the compiler noted when it built this kernel. Raises HarnessError (USAGE) for a kernel that counts nothing."""
    require_counting(kernel)
    beside = kernel.image.parent / "gcno"
    if (beside / KVM).with_suffix(".gcno").is_file():
        return Notes(beside, beside)
    # In a build tree the image lies three folders below the top, and `source` leads to the tree it was built from.
    objects = kernel.image.parents[3] if len(kernel.image.parents) > 3 else kernel.image.parent
    if (objects / KVM).with_suffix(".gcno").is_file():
        return Notes(objects, objects / "source" if (objects / "source").is_dir() else objects)
    raise HarnessError(
        f"the compiler's notes of {kernel.name} are not there: neither {beside} nor {objects} holds virt/kvm/kvm_main.gcno",
        "build it again: kvmgmem kernel build --flavour coverage",
        ExitCode.USAGE,
    )


def require_counting(kernel: Kernel) -> None:
    """Raise HarnessError (USAGE) for a kernel whose configuration says that it counts nothing, or was made by clang."""
    config = _config(kernel)
    if config and config.get("CONFIG_GCOV_KERNEL", "n") != "y":
        raise HarnessError(
            f"kernel {kernel.name} counts no lines: it is built without CONFIG_GCOV_KERNEL",
            "build one that does: kvmgmem kernel build --flavour coverage",
            ExitCode.USAGE,
        )
    if config.get("CONFIG_CC_IS_CLANG") == "y":
        raise HarnessError(
            f"kernel {kernel.name} was built by clang, whose counters gcov cannot read",
            "build it with gcc: kvmgmem kernel build --flavour coverage",
            ExitCode.USAGE,
        )


def lets_allocations_fail(kernel: Kernel) -> bool:
    """Whether tests can let this kernel's allocations fail, which many error paths take."""
    return _config(kernel).get("CONFIG_FAILSLAB") == "y"


def _config(kernel: Kernel) -> dict[str, str]:
    return parse_config(kernel.config.read_text(encoding="utf-8", errors="replace")) if kernel.config else {}


def find_gcov(kernel: Kernel) -> Gcov:
    """The gcov of the compiler that built this kernel. Raises HarnessError that says which is there and which is needed.

    Files of another version of gcc are not read but guessed at: their format changes with it (gcov-io.h of gcc).
    """
    needed = compiler_version(_config(kernel))
    candidates = [f"gcov-{needed.partition('.')[0]}", "gcov"] if needed else ["gcov"]
    found = [gcov for name in candidates if (gcov := probe(name)) is not None]
    for gcov in found:
        if not needed or gcov.version == needed:
            return gcov
    package = f"gcc-{needed.partition('.')[0]}" if needed else "gcc"
    there = f"this machine's gcov is of gcc {found[0].version}" if found else "there is no gcov on this machine"
    by = f"kernel {kernel.name} was built by gcc {needed}, and " if needed else ""
    raise HarnessError(f"{by}{there}", f"apt-get install {package}, or build the kernel again with the gcc that is here")


def compiler_version(config: dict[str, str]) -> str:
    """The gcc that a configuration was made for, as "12.2"; "" where it does not say. CONFIG_GCC_VERSION is 120200."""
    number = config.get("CONFIG_GCC_VERSION", "0")
    return f"{int(number) // 10000}.{int(number) // 100 % 100}" if number.isdigit() and number != "0" else ""


def probe(name: str) -> Gcov | None:
    """The gcov of that name; None if there is none, or it is not gcc's."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=GCOV_SECONDS)
    except OSError:
        return None
    version = re.match(r"gcov .*?(\d+)\.(\d+)\.\d+$", done.stdout.partition("\n")[0])
    return Gcov(path, f"{version[1]}.{version[2]}") if version else None
