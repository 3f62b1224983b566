"""Fetching a distribution's ready-made kernel: its image, its configuration, and the modules that a guest needs."""

import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.apt import AptArchive, Package
from kvmgmem.lab.kernel.flavours import config_hash
from kvmgmem.lab.kernel.image import image_release
from kvmgmem.lab.kernel.kernels import DISTRIBUTION, Kernel, list_kernels, load, save
from kvmgmem.lab.kernel.modules import load_order, module_name, read_module
from kvmgmem.lab.kernel.source import deb_files, downloaded, is_release, slug
from kvmgmem.lab.progress import Progress

# "linux-image-7.3.4+deb13-amd64" and "linux-image-6.8.0-31-generic", not the -rt, -cloud, -dbg and -unsigned ones.
_IMAGE = re.compile(r"linux-image-(?P<release>\d[\w.+~]*(-\d+)?-(amd64|generic))")
# Debian's linux-image packages of 7.2 and later only list those with the image, the configuration and the modules.
_PARTS = ("linux-binary-", "linux-base-", "linux-modules-", "linux-modules-extra-")
# The files of interest, where older and newer packages have them.
_WANTED = re.compile(
    r"\./(boot/(vmlinuz|config)-[^/]+"
    r"|(usr/)?lib/modules/[^/]+/(vmlinuz|config|modules\.builtin|(kernel|updates)/.*\.ko(\.\w+)?))"
)

# Measured on Debian's 7.3: packages 150 MB, modules unpacked but compressed 140 MB; what is kept is a tenth of it.
_FETCH_BYTES = 600_000_000


@dataclass(frozen=True)
class _Parts:
    """What of a kernel's packages is wanted, in a folder of its own."""

    image: Path
    config: Path | None
    modules: Path


def fetch(release: str | None = None, refresh: bool = False) -> Kernel:
    """The newest ready-made kernel (of that release) of the configured archive, with the modules KVM needs.

    What was fetched before comes from the cache at once, unless `refresh` is asked for.
    Raises HarnessError when there is none, or the network, the disk or a package fails.
    """
    if not refresh and (known := _fetched_before(release)):
        return known
    with Progress(f"ready-made kernel {release or '(newest)'}") as progress:
        archive = AptArchive(progress)
        package = choose_image(archive, release, refresh)
        entry = cache.cache_root() / "kernels" / slug(f"{package.version}-{package.name}")
        with cache.locked(entry, progress.note):
            return load(entry) or _fetch(archive, package, entry, progress)


def choose_image(archive: AptArchive, release: str | None, refresh: bool = False) -> Package:
    """The newest kernel package of that release, of any where None. Raises HarnessError naming what there is."""
    packages = archive.find(_IMAGE.pattern, refresh)
    finished = [package for package in packages if "~rc" not in package.version]
    for package in [*finished, *packages]:
        if release is None or is_release(package.version, release) or is_release(_release(package), release):
            return package
    series = dict.fromkeys(".".join(re.findall(r"\d+", package.version)[:2]) for package in packages)
    raise HarnessError(
        f"no suite of the configured archive has a linux-image package for {release or 'any release'}",
        f"there is {', '.join(series) or 'none at all'}",
    )


def parts(archive: AptArchive, package: Package) -> list[Package]:
    """The packages that together hold that kernel: itself, and those of the same release that it depends on."""
    release = _release(package)
    names = [f"{prefix}{release}" for prefix in _PARTS]
    depended = [name for name in archive.depends(package) if name in names]
    return [package, *(Package(name, package.version, package.suite) for name in dict.fromkeys(depended))]


def _fetch(archive: AptArchive, package: Package, entry: Path, progress: Progress) -> Kernel:
    cache.require_room(entry, _FETCH_BYTES)
    with cache.new_entry(entry) as fresh:
        unpacked = fresh / "unpacked"
        for part in parts(archive, package):
            with downloaded(part, progress) as deb:
                progress.update(f"unpacking {part.name}")
                _extract(deb, unpacked)
        found = _find_parts(unpacked, package)
        shutil.copy2(found.image, fresh / "bzImage")
        modules = _keep_modules(found.modules, fresh / "modules")
        config = found.config.read_text(encoding="utf-8", errors="replace") if found.config else None
        if config is not None:
            cache.write_file(fresh / "config", config.encode())
        kernel = Kernel(
            name=f"{package.version}/{DISTRIBUTION}",
            image=entry / "bzImage",
            release=image_release(fresh / "bzImage"),
            config=entry / "config" if config is not None else None,
            config_hash=config_hash(config) if config is not None else None,
            flavour=DISTRIBUTION,
            source=f"{package.name} {package.version}",
            modules=tuple(entry / "modules" / name for name in modules),
            built=time.time(),
        )
        save(kernel, fresh, {"from_archive": True})
        shutil.rmtree(unpacked)
    return kernel


def _extract(deb: Path, folder: Path) -> None:
    with deb_files(deb) as archive:
        # Where Python can (3.11.4, 3.12), only plain files below the folder; the names are matched in full in any case.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder, members=_wanted(archive))


def _wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if _WANTED.fullmatch(member.name):
            yield member


def _find_parts(unpacked: Path, package: Package) -> _Parts:
    """Where the image is: in /boot, or since Debian's 7.2 beside the modules."""
    images = sorted([*unpacked.glob("boot/vmlinuz-*"), *unpacked.glob("**/lib/modules/*/vmlinuz")])
    if not images:
        raise HarnessError(f"{package.name} {package.version} holds no kernel image", "choose another release")
    configs = sorted([*unpacked.glob("boot/config-*"), *unpacked.glob("**/lib/modules/*/config")])
    return _Parts(images[0], configs[0] if configs else None, unpacked)


def _keep_modules(folder: Path, target: Path) -> list[str]:
    """Copy the modules that a guest needs, decompressed, and give their file names in load order."""
    target.mkdir()
    names = []
    for path in load_order(folder):
        names.append(f"{module_name(path)}.ko")
        (target / names[-1]).write_bytes(read_module(path))
    return names


def _fetched_before(release: str | None) -> Kernel | None:
    for kernel in list_kernels():
        if kernel.flavour == DISTRIBUTION and (release is None or is_release(kernel.name, release)):
            return kernel
    return None


def _release(package: Package) -> str:
    match = _IMAGE.fullmatch(package.name)
    return match["release"] if match else package.version
