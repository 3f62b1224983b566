"""Guest kernels: building them once, keeping them in the cache, and finding the one that somebody means."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.apt import AptArchive
from kvmgmem.lab.kernel.flavours import BASE, Flavour, config_hash, load_flavour
from kvmgmem.lab.kernel.image import image_release, is_elf
from kvmgmem.lab.kernel.kbuild import BuildRequest, BuildResult
from kvmgmem.lab.kernel.kbuild import build as run_build
from kvmgmem.lab.kernel.source import (
    Origin,
    choose_source,
    is_release,
    package_origin,
    source_tree,
    tarball_origin,
    tree_origin,
)
from kvmgmem.lab.progress import Progress, duration_text

# What a build takes while it runs, measured on 7.3 and rounded up; debug information makes the difference.
_OBJECT_BYTES = {"base": 700_000_000, "debug": 5_000_000_000}
_OBJECT_BYTES_GUESS = 1_500_000_000

# Options worth a line after a build: what the contract's areas stand and fall with.
_TOLD = (
    "KVM_AMD",
    "KVM_INTEL",
    "KVM_SW_PROTECTED_VM",
    "KVM_AMD_SEV",
    "KVM_SMM",
    "KVM_IOAPIC",
    "MEMORY_FAILURE",
    "NUMA",
    "MEMCG",
    "IO_URING",
    "USERFAULTFD",
    "HUGETLBFS",
    "DEBUG_FS",
    "KASAN",
    "PROVE_LOCKING",
    "FAULT_INJECTION",
    "GCOV_KERNEL",
)

DISTRIBUTION = "distribution"
"""What stands for the flavour of a kernel that somebody else has configured."""

_REMAKABLE = ("sources", "objects", "downloads")


@dataclass(frozen=True)
class Kernel:
    """A kernel that a guest can boot.

    `name` is what the command line calls it ("7.3.4-1~bpo13+1/base"), `release` is its `uname -r`, `modules` are the
    files to load, in that order, before KVM and the guest's devices work. A kernel given by path has no flavour, and a
    configuration only where one lies beside it.
    """

    name: str
    image: Path
    release: str
    vmlinux: Path | None = None
    config: Path | None = None
    config_hash: str | None = None
    flavour: str | None = None
    source: str = ""
    modules: tuple[Path, ...] = ()
    built: float = 0.0

    @property
    def version(self) -> str:
        """The release without what a flavour or distribution added: "7.3.4"."""
        return re.split(r"[-+]", self.release)[0]


@dataclass(frozen=True)
class BuildOptions:
    """How to build, apart from what.

    `refresh` looks in the archive for a newer package even though a kernel of that release is there already.
    """

    flavour: str = BASE
    jobs: int = os.cpu_count() or 1
    in_place: bool = False
    refresh: bool = False


def build(
    release: str | None = None,
    *,
    source: Path | None = None,
    tarball: Path | None = None,
    options: BuildOptions | None = None,
) -> Kernel:
    """A kernel of the distribution's newest source package (of that release), of a tree, or of a tarball.

    What was built before from a package or tarball, in the same flavour, comes from the cache at once; a tree is always
    handed to make, which redoes only what changed.
    Raises HarnessError when package, tools or room are missing, BuildError when the kernel itself does not build.
    """
    options = options or BuildOptions()
    flavour = load_flavour(options.flavour)
    if sum(given is not None for given in (release, source, tarball)) > 1:
        raise HarnessError("a release, a tree and a tarball exclude each other", "give one of them", ExitCode.USAGE)
    from_archive = source is None and tarball is None
    if from_archive and not options.refresh and (known := _built_before(release, flavour)):
        return _used(known)
    with Progress(f"{flavour.name} kernel of {source or tarball or release or 'the newest release'}") as progress:
        if source is not None:
            origin = tree_origin(source)
        elif tarball is not None:
            origin = tarball_origin(tarball)
        else:
            origin = package_origin(choose_source(AptArchive(progress), release, options.refresh))
        return _build_origin(origin, flavour, options, progress)


def list_kernels() -> list[Kernel]:
    """The kernels in the cache, the one last built or asked for first; entries that are damaged are left out."""
    found = [kernel for record in _folder("kernels").glob("[!.]*/kernel.json") if (kernel := load(record.parent))]
    return sorted(found, key=lambda kernel: _record_path(kernel.image.parent).stat().st_mtime, reverse=True)


def resolve(spec: str | None) -> Kernel:
    """The kernel that somebody means: a path to an image, or a name such as `7.3`, `7.3.4`, `7.3/debug` or `debug`.

    A release is that of a package; a tree or tarball of that release is meant only where there is no package's kernel. None
    means the kernel last built or asked for, one of the slow flavours only if there is no other. Raises HarnessError
    for a path that holds no kernel, and for a name that nothing in the cache answers to.
    """
    if spec is None:
        if kernels := list_kernels():
            return next((kernel for kernel in kernels if kernel.flavour in (None, BASE)), kernels[0])
        raise HarnessError("no kernel has been built yet", "make one: kvmgmem kernel build")
    path = Path(spec).expanduser()
    if path.is_file() or ("/" in spec and path.exists()):
        return kernel_from_path(path)
    kernels = list_kernels()
    if answering := [kernel for kernel in kernels if matches(kernel, spec)]:
        exact = [kernel for kernel in answering if spec in (kernel.name, kernel.release)]
        # A tree may be of that release, too, and is somebody's work: it has a name of its own.
        released = [kernel for kernel in answering if is_release(kernel.name, spec.partition("/")[0])]
        return (exact or released or answering)[0]
    if spec.startswith(("/", "./", "../", "~")):
        raise HarnessError(f"no such kernel image: {spec}", "give the path of a bzImage or vmlinux")
    raise HarnessError(
        f"no kernel in the cache is called {spec} (there: {', '.join(kernel.name for kernel in kernels) or 'none'})",
        _how_to_make(spec),
    )


def _how_to_make(spec: str) -> str:
    """What to do about a name that nothing in the cache answers to: the command that makes such a kernel, if any."""
    release, _, flavour = spec.partition("/")
    if not re.fullmatch(r"\d+\.\d+[^/]*", release):
        return "give a path, a name as `kvmgmem kernel list` prints it, or a release such as 7.3, 7.3/debug"
    if flavour == DISTRIBUTION:
        return f"get it: kvmgmem kernel fetch {release}"
    return f"make it: kvmgmem kernel build {release}" + (f" --flavour {flavour}" if flavour else "")


def matches(kernel: Kernel, spec: str) -> bool:
    """Whether a cached kernel answers to a name: its own, its release or source (either with a flavour), or a flavour.

    Where the name says no flavour, `base` is meant, not a distribution's ready-made kernel (`7.3/distribution`).
    """
    if spec in (kernel.name, kernel.flavour):
        return True
    wanted, _, flavour = spec.partition("/")
    if (flavour and flavour != kernel.flavour) or (not flavour and kernel.flavour not in (None, BASE)):
        return False
    label = kernel.name.split("/")[0]
    return wanted in (label, label.split("@")[0]) or is_release(kernel.release, wanted)


def kernel_from_path(path: Path) -> Kernel:
    """A kernel image somewhere on the disk, or a build tree that holds one. Raises HarnessError when it is neither."""
    path = path.absolute()
    if path.is_dir():
        image = path / "arch/x86/boot/bzImage"
        if not image.is_file():
            raise HarnessError(f"{path} holds no built kernel", f"build it: kvmgmem kernel build --source {path}")
        path = image
    if known := next((kernel for kernel in list_kernels() if path in (kernel.image, kernel.vmlinux)), None):
        return known
    release = image_release(path)
    # In a build tree the image lies three folders below what goes with it.
    tree = path.parents[3] if path.parent.name == "boot" and len(path.parents) > 3 else path.parent
    vmlinux = path if is_elf(path) else tree / "vmlinux"
    config = next((file for file in (tree / ".config", tree / "config") if file.is_file()), None)
    return Kernel(
        name=str(path),
        image=path,
        release=release,
        vmlinux=vmlinux if vmlinux.is_file() else None,
        config=config,
        config_hash=config_hash(config.read_text(encoding="utf-8", errors="replace")) if config else None,
        source=str(path),
    )


def remove(names: list[str]) -> list[tuple[str, int]]:
    """Remove kernels by name from the cache; what was removed, each with the bytes that it freed.

    Raises HarnessError, and removes nothing, if one of the names is unknown.
    """
    chosen: dict[Path, str] = {}
    for name in names:
        answering = [kernel for kernel in list_kernels() if matches(kernel, name)]
        if not answering:
            raise HarnessError(f"no kernel in the cache is called {name}", "see: kvmgmem kernel list")
        chosen |= {kernel.image.parent: kernel.name for kernel in answering}
    return [(name, _remove_locked(entry)) for entry, name in chosen.items()]


def remove_leftovers() -> Iterator[tuple[str, int]]:
    """Remove unpacked sources, downloads, and the objects of tree builds and of builds that did not end, one by one.

    Raises HarnessError at the first that a running build uses.
    """
    for entry in leftovers():
        yield f"{entry.parent.name}/{entry.name}", _remove_locked(entry)


def remove_kept_guests() -> int:
    """Remove every guest that was kept when it had booted; the bytes that it freed.

    A state names its kernel by digest alone, so that those of one kernel cannot be told; each costs a boot to make again.
    """
    return sum(cache.remove(entry) for entry in _folder("snapshots").glob("*"))


def leftovers() -> list[Path]:
    """What `remove_leftovers` would remove: folders with tens of thousands of files, so that their sizes are not told."""
    return [entry for kind in _REMAKABLE for entry in sorted(_folder(kind).glob("[!.]*"))]


def load(entry: Path) -> Kernel | None:
    """The kernel in a cache entry; None when the entry is damaged. Paths in its record are relative to it."""
    try:
        record: dict[str, Any] = json.loads(_record_path(entry).read_text(encoding="utf-8"))
        kernel = Kernel(
            name=record["name"],
            image=entry / record["image"],
            release=record["release"],
            vmlinux=entry / record["vmlinux"] if record["vmlinux"] else None,
            config=entry / record["config"] if record["config"] else None,
            config_hash=record["config_hash"],
            flavour=record["flavour"],
            source=record["source"],
            modules=tuple(entry / module for module in record["modules"]),
            built=record["built"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kernel if kernel.image.is_file() else None


def save(kernel: Kernel, folder: Path, details: dict[str, object]) -> None:
    """Write a kernel's record into a folder that becomes, or is, its cache entry `kernel.image.parent`."""
    entry = kernel.image.parent
    record = {
        "name": kernel.name,
        "image": kernel.image.name,
        "release": kernel.release,
        "vmlinux": kernel.vmlinux.name if kernel.vmlinux else None,
        "config": kernel.config.name if kernel.config else None,
        "config_hash": kernel.config_hash,
        "flavour": kernel.flavour,
        "source": kernel.source,
        "modules": [str(module.relative_to(entry)) for module in kernel.modules],
        "built": kernel.built,
    }
    cache.write_file(_record_path(folder), json.dumps(record | details, indent=1).encode())


def summary(kernel: Kernel) -> list[str]:
    """A few lines for people on what a cached kernel is, and which of the options that matter it really has."""
    lines = [f"kernel {kernel.name} is {kernel.release}", f"  image    {kernel.image}"]
    details = _details(kernel.image.parent)
    if told := details.get("told"):
        lines.append(f"  has      {' '.join(told)}")
    if excused := details.get("excused"):
        lines.append(f"  without  {' '.join(excused)} (not in this release)")
    if kernel.modules:
        lines.append(f"  modules  {' '.join(module.name.split('.')[0] for module in kernel.modules)}")
    if seconds := details.get("seconds"):
        lines.append(f"  built    from {kernel.source} in {duration_text(seconds)}")
    return lines


def _build_origin(origin: Origin, flavour: Flavour, options: BuildOptions, progress: Progress) -> Kernel:
    entry = _folder("kernels") / f"{origin.key}-{flavour.name}-{flavour.digest}"
    with cache.locked(entry, progress.note):
        if origin.tree is None and (known := load(entry)):
            return _used(known)
        with source_tree(origin, progress) as tree:
            return _build_tree(tree, entry, origin, flavour, options, progress)


def _build_tree(
    tree: Path, entry: Path, origin: Origin, flavour: Flavour, options: BuildOptions, progress: Progress
) -> Kernel:
    cached_objects = _folder("objects") / f"{origin.key}-{flavour.name}"
    objects = tree if options.in_place and origin.tree is not None else cached_objects
    refuse_odd_path(tree)
    refuse_odd_path(objects)
    cache.require_room(objects, _OBJECT_BYTES.get(flavour.name, _OBJECT_BYTES_GUESS))
    log = _folder("logs") / f"{entry.name}.log"
    started = time.time()
    with cache.locked(cached_objects, progress.note):
        result = run_build(BuildRequest(tree, objects, flavour, log, options.jobs), progress)
        kernel = _store(entry, origin, flavour, result, time.time() - started)
        if origin.tree is None:
            # A package's source does not change: what make could reuse is never needed again.
            shutil.rmtree(objects, ignore_errors=True)
    return kernel


def _store(entry: Path, origin: Origin, flavour: Flavour, result: BuildResult, seconds: float) -> Kernel:
    config = result.config.read_text(encoding="utf-8")
    kernel = Kernel(
        name=f"{origin.label}/{flavour.name}",
        image=entry / "bzImage",
        release=result.release,
        vmlinux=entry / "vmlinux",
        config=entry / "config",
        config_hash=config_hash(config),
        flavour=flavour.name,
        source=origin.text,
        built=time.time(),
    )
    with cache.new_entry(entry) as fresh:
        shutil.copy2(result.image, fresh / "bzImage")
        shutil.copy2(result.vmlinux, fresh / "vmlinux")
        cache.write_file(fresh / "config", config.encode())
        keep_coverage_notes(result.image.parents[3], fresh / "gcno")
        details: dict[str, object] = {
            "flavour_digest": flavour.digest,
            "from_archive": origin.package is not None,
            "seconds": round(seconds, 1),
            "told": [name for name in _TOLD if f"CONFIG_{name}=y\n" in config],
            # What became part of something else, or always there, is no loss that anybody needs to hear of.
            "excused": [lost.option.name for lost in result.comparison.excused if lost.option.since is not None],
        }
        save(kernel, fresh, details)
    # The same kernel as the flavour was before it changed: nothing asks for that one any more.
    for old in entry.parent.glob(f"{origin.key}-{flavour.name}-*"):
        if old != entry:
            cache.remove(old)
    return kernel


def keep_coverage_notes(objects: Path, folder: Path) -> None:
    """Keep the compiler's .gcno files, without which a coverage kernel's counters say nothing, and what they speak of.

    The source is kept beside them, because a tree changes, and one that was unpacked into the cache may be removed.
    """
    # Kbuild makes this link where it builds outside of the source.
    tree = objects / "source" if (objects / "source").is_dir() else objects
    for notes in objects.rglob("*.gcno"):
        target = folder / notes.relative_to(objects)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(notes, target)
        with contextlib.suppress(FileNotFoundError):  # what was generated has no source of its own
            shutil.copy2(tree / notes.relative_to(objects).with_suffix(".c"), target.with_suffix(".c"))


def _built_before(release: str | None, flavour: Flavour) -> Kernel | None:
    """The newest kernel of that release that was built from a package in this very flavour."""
    for kernel in sorted(list_kernels(), key=_release_order, reverse=True):
        details = _details(kernel.image.parent)
        same = details.get("from_archive") and details.get("flavour_digest") == flavour.digest
        if same and (release is None or is_release(kernel.name, release) or is_release(kernel.release, release)):
            return kernel
    return None


def _release_order(kernel: Kernel) -> tuple[list[int], float]:
    return [int(number) for number in re.findall(r"\d+", kernel.version)], kernel.built


def _used(kernel: Kernel) -> Kernel:
    """Mark a kernel as the one last asked for; a cache that may not be written is still good to read."""
    with contextlib.suppress(OSError):
        os.utime(_record_path(kernel.image.parent))
    return kernel


def _details(entry: Path) -> dict[str, Any]:
    try:
        record = json.loads(_record_path(entry).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def refuse_odd_path(path: Path) -> None:
    """Raise HarnessError for a path that make would take apart."""
    if re.search(r"[\s:]", str(path)):
        raise HarnessError(
            f"the kernel's Makefile takes no path with a space or colon: {path}",
            "use another folder (KVMGMEM_CACHE sets where kvmgmem builds)",
        )


def _remove_locked(entry: Path) -> int:
    with cache.locked(entry, timeout=1.0):
        return cache.remove(entry)


def _record_path(entry: Path) -> Path:
    return entry / "kernel.json"


def _folder(kind: str) -> Path:
    return cache.cache_root() / kind
