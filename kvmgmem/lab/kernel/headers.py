"""The kernel's own uAPI headers, newest that the archive has: what our header is compared with."""

import platform
import re
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.apt import AptArchive
from kvmgmem.lab.kernel.source import deb_files, downloaded, slug
from kvmgmem.lab.progress import Progress

# Debian keeps an architecture's asm/ below its triplet, since linux-libc-dev is one package for all below lib/linux/uapi.
_ARCHITECTURES = {"x86_64": ("x86_64-linux-gnu", "x86"), "aarch64": ("aarch64-linux-gnu", "arm64")}
_TRIPLET, _KERNEL_ARCH = _ARCHITECTURES.get(platform.machine(), ("", ""))
_PLACES = rf"(?:usr/include/(?:{_TRIPLET}/)?|usr/lib/linux/uapi/{_KERNEL_ARCH}/)"
_HEADER = re.compile(rf"\./{_PLACES}((?:linux|asm|asm-generic)/.*\.h)")


def fetch_headers(refresh: bool = False) -> Path:
    """A directory to give to the compiler with -isystem; what was fetched before comes from the cache at once.

    Raises HarnessError when the archive has no linux-libc-dev, or the network or the disk fails.
    """
    if not refresh and (known := cached_headers()):
        return known
    with Progress("uAPI headers of the newest kernel") as progress:
        packages = AptArchive(progress).find(r"linux-libc-dev", refresh)
        finished = [package for package in packages if "~rc" not in package.version] or packages
        if not finished:
            raise HarnessError("no suite of the configured archive has linux-libc-dev", "set KVMGMEM_KERNEL_HEADERS instead")
        entry = _folder() / slug(finished[0].version)
        with cache.locked(entry, progress.note), cache.new_entry(entry) as fresh, downloaded(finished[0], progress) as deb:
            _extract(deb, fresh)
    return _include(entry)


def cached_headers() -> Path | None:
    """The newest headers in the cache; None if there are none."""
    entries = sorted(_folder().glob("[!.]*/include/linux/kvm.h"), key=lambda path: path.stat().st_mtime)
    return entries[-1].parent.parent if entries else None


def _folder() -> Path:
    return cache.cache_root() / "headers"


def _include(entry: Path) -> Path:
    return entry / "include"


def _extract(deb: Path, folder: Path) -> None:
    """Put linux/, asm/ and asm-generic/ into one include directory, wherever the package had them."""
    with deb_files(deb) as archive:
        for member in archive:
            match = _HEADER.fullmatch(member.name)
            source = archive.extractfile(member) if match and member.isfile() else None
            if match and source:
                cache.write_file(_include(folder) / match[1], source.read())
