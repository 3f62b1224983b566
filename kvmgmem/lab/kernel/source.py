"""Kernel sources: choosing a distribution's source package, and unpacking it or a tarball into the cache once."""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.apt import AptArchive, Package
from kvmgmem.lab.kernel.kbuild import tree_version
from kvmgmem.lab.progress import Progress

# Measured on 7.3: 1.9 GB unpacked.
SOURCE_BYTES = 2_200_000_000

_UNPACKERS = {".xz": "xz", ".zst": "zstd", ".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2"}
_UNPACKER_PACKAGES = {"xz": "xz-utils"}


@dataclass(frozen=True)
class Origin:
    """Where a kernel's source comes from: a package's version, a tarball, or a tree, which may change at any time.

    `label` is for people, `key` is a file name that tells any two origins apart.
    """

    label: str
    key: str
    package: Package | None = None
    tarball: Path | None = None
    tree: Path | None = None

    @property
    def text(self) -> str:
        """What a record says of it: the package and its version, or the path."""
        if self.package is not None:
            return f"{self.package.name} {self.package.version}"
        return str(self.tree or self.tarball)


def package_origin(package: Package) -> Origin:
    """The origin that a version of a source package is."""
    return Origin(package.version, slug(package.version), package=package)


def tarball_origin(tarball: Path) -> Origin:
    """The origin that a tarball is, by its content. Raises HarnessError when it cannot be read."""
    try:
        with tarball.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    except OSError as error:
        raise HarnessError(f"cannot read {tarball}: {error.strerror}", "give a kernel source tarball") from error
    stem = tarball.name.split(".tar")[0].removesuffix(".tgz")
    return Origin(f"{stem}@{digest}", slug(f"{stem}-{digest}"), tarball=tarball.absolute())


def tree_origin(tree: Path) -> Origin:
    """The origin that a source tree is, by its path. Raises HarnessError when it is no kernel source tree."""
    tree = tree.resolve()
    tree_version(tree)
    digest = hashlib.sha256(str(tree).encode()).hexdigest()[:8]
    return Origin(f"{tree.name}@{digest}", slug(f"tree-{tree.name}-{digest}"), tree=tree)


def choose_source(archive: AptArchive, release: str | None, refresh: bool = False) -> Package:
    """The newest source package of that release ("7.3", "7.3.4"), of any where None; release candidates come last.

    Raises HarnessError naming the releases that there are.
    """
    packages = archive.find(r"linux-source-\d+\.\d+", refresh)
    finished = [package for package in packages if "~rc" not in package.version]
    for package in [*finished, *packages]:
        if release is None or is_release(package.version, release):
            return package
    series = list(dict.fromkeys(package.name.removeprefix("linux-source-") for package in packages))
    raise HarnessError(
        f"no suite of the configured archive has a linux-source package for {release or 'any release'}",
        f"there is {', '.join(series) or 'none at all'}; or give a tree: kvmgmem kernel build --source DIR",
    )


def is_release(version: str, wanted: str) -> bool:
    """Whether a version ("7.3.4-1~bpo13+1", "7.3.4-kvmgmem-base") is of that release ("7.3", "7.3.4"), or just it."""
    # "7" alone would mean too many.
    named = re.match(r"\d+\.\d", wanted) and re.match(rf"{re.escape(wanted)}(?!\d)", version)
    return version == wanted or named is not None


@contextmanager
def source_tree(origin: Origin, progress: Progress) -> Iterator[Path]:
    """The folder with the kernel's source, unpacked into the cache if it is not there yet; not removed meanwhile."""
    if origin.tree is not None:
        yield origin.tree
        return
    entry = cache.cache_root() / "sources" / origin.key
    # An entry that is there is whole: whoever only reads it need not wait for others who do, a build of an hour, say.
    if not entry.exists():
        with cache.locked(entry, progress.note):
            if not entry.exists():
                _unpack_origin(origin, entry, progress)
    with cache.locked(entry, progress.note, shared=True):
        yield entry


def _unpack_origin(origin: Origin, entry: Path, progress: Progress) -> None:
    cache.require_room(entry, SOURCE_BYTES)
    with cache.new_entry(entry) as fresh:
        if origin.tarball is not None:
            with origin.tarball.open("rb") as stream:
                unpack(stream, origin.tarball.name, origin.tarball.stat().st_size, fresh, progress)
        elif origin.package is not None:
            _unpack_package(origin.package, fresh, progress)
        tree_version(fresh)


def unpack(stream: IO[bytes], name: str, size: int, folder: Path, progress: Progress) -> None:
    """Unpack a tarball of `size` bytes without its top folder; `name` says how it is compressed.

    Raises HarnessError when it is none, when tar does not like it, or when the disk is full.
    """
    program = _UNPACKERS.get(Path(name).suffix)
    if program is None and not name.endswith(".tar"):
        raise HarnessError(f"{name} is not a tarball", "give a .tar, .tar.xz, .tar.gz, .tar.zst or .tar.bz2")
    for tool in ("tar", *([program] if program else [])):
        if shutil.which(tool) is None:
            raise HarnessError(f"unpacking {name} needs {tool}", f"apt-get install {_UNPACKER_PACKAGES.get(tool, tool)}")
    command = ["tar", "-x", "-C", str(folder), "--strip-components=1", "--no-same-owner"]
    command += ["-I", program] if program else []
    environment = os.environ | {"LC_ALL": "C"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as tar:
        try:
            _feed(stream, tar, name, size, progress)
        except BaseException:
            tar.kill()
            raise
        assert tar.stderr is not None
        errors = tar.stderr.read().decode(errors="replace")
    if tar.returncode != 0:
        if cache.looks_full(folder, errors):
            raise cache.no_room(folder, SOURCE_BYTES)
        first = errors.splitlines()[0] if errors else f"exit status {tar.returncode}"
        raise HarnessError(f"cannot unpack {name}: {first}", "is the file whole?")


def _feed(stream: IO[bytes], tar: subprocess.Popen[bytes], name: str, size: int, progress: Progress) -> None:
    assert tar.stdin is not None
    done = 0
    try:
        while block := stream.read(1 << 20):
            tar.stdin.write(block)
            done += len(block)
            progress.update(f"unpacking {name}", done / size if size else None)
        tar.stdin.close()
    except BrokenPipeError:
        # tar has given up before the end, and says why on its stderr.
        return


def _unpack_package(package: Package, folder: Path, progress: Progress) -> None:
    with downloaded(package, progress) as deb, deb_files(deb) as archive:
        for member in archive:
            if re.fullmatch(r"\./usr/src/linux-source-[\d.]+\.tar(\.\w+)?", member.name):
                stream = archive.extractfile(member)
                assert stream is not None
                unpack(stream, Path(member.name).name, member.size, folder, progress)
                return
    raise HarnessError(f"{package.name} {package.version} holds no source tarball", "try another release")


@contextmanager
def downloaded(package: Package, progress: Progress) -> Iterator[Path]:
    """A package's .deb, there for as long as the block runs: whatever is wanted of it is kept elsewhere."""
    folder = cache.cache_root() / "downloads" / slug(f"{package.name}-{package.version}")
    with cache.locked(folder, progress.note):
        try:
            with cache.disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            progress.note(f"downloading {package.name} {package.version} from {package.suite}")
            yield AptArchive(progress).download(package, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def deb_files(deb: Path) -> Iterator[tarfile.TarFile]:
    """The files of a .deb, as a stream of tar members to be read in their order."""
    if shutil.which("dpkg-deb") is None:
        raise HarnessError("unpacking a package needs dpkg-deb", "apt-get install dpkg")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                yield archive
        except tarfile.TarError as error:
            raise HarnessError(f"{deb.name} is not a whole package: {error}", "download it again") from error
        finally:
            # Whoever has found what he looked for does not read to the end.
            process.kill()


def slug(text: str) -> str:
    """Text as a file name: make takes no colons and no spaces in paths, and a tilde has a meaning to shells."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)
