"""The guest's root: an initramfs made of this interpreter, the harness and the selftests, cached by content.

Two layers, both uncompressed newc archives, one after the other in one file:

* the base: Python, its standard library, the third-party packages, shared libraries; rebuilt when one of these changes;
* the project: kvmgmem itself, the selftests, /init, kernel modules; rebuilt in a fraction of a second after an edit.

Uncompressed, because under emulation inflating costs more than it saves. Byte-compiled with hash-based, unchecked
bytecode (PEP 552), because a guest under emulation compiles at a hundredth of the host's speed.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import marshal
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import translate
from pathlib import Path, PurePosixPath

import kvmgmem
from kvmgmem.errors import HarnessError
from kvmgmem.lab.cache import disk_errors, write_file
from kvmgmem.lab.guest import rewritten_tests
from kvmgmem.lab.guest.rewritten_tests import rewritten_test

PROJECT_DIRECTORY = "/kvmgmem"
"""Where the guest's runner starts: the selftests directory lies in it under its own name: node ids as on a host."""

MODULES_DIRECTORY = "/lib/kvmgmem-modules"
"""Kernel modules, named so that sorting them by name gives the order in which to load them."""

GUEST_PYTHON = "/usr/bin/python3"

GUEST_DISTRIBUTIONS = ("pytest", "psutil", "pyroute2", "cffi")
"""What the guest imports; what these require (by their metadata, on this interpreter) comes along."""

# What a selftest run in a guest never imports. Patterns match the path below the standard library's directory.
STDLIB_PRUNED = (
    "test/*",
    "*/test/*",
    "*/tests/*",
    "site-packages/*",
    "dist-packages/*",
    "config-*",
    "idlelib/*",
    "tkinter/*",
    "turtledemo/*",
    "turtle.py",
    "ensurepip/*",
    "venv/*",
    "lib2to3/*",
    "distutils/*",
    "pydoc_data/*",
    "wsgiref/*",
    "xmlrpc/*",
    "curses/*",
    "dbm/*",
    "sqlite3/*",
    "msilib/*",
    "__phello__*",
    "_sysconfigdata_*_test*",
    "lib-dynload/_test*",
    "lib-dynload/_xxtest*",
    "lib-dynload/xxlimited*",
    "lib-dynload/_tkinter*",
    "lib-dynload/_sqlite3*",
    "lib-dynload/_curses*",
    "lib-dynload/_dbm*",
    "lib-dynload/_gdbm*",
    "lib-dynload/_crypt*",
    "lib-dynload/nis.*",
    "lib-dynload/ossaudiodev*",
    "lib-dynload/_codecs_*",
    # libssl and libcrypto are 5 MiB; hashlib has its own implementations, and asyncio does without ssl.
    "lib-dynload/_ssl*",
    "lib-dynload/_hashlib*",
)

# Third-party files that are never imported: foreign platforms, lexers and formatters for anything but a terminal.
PACKAGES_PRUNED = (
    "*/tests/*",
    "pygments/lexers/[!_dp]*",
    "pygments/lexers/_[!_m]*",
    "pygments/lexers/d[!i]*",
    "pygments/lexers/p[!y]*",
    "pygments/lexers/pyr*",
    "pygments/formatters/[!_t]*",
    "pygments/styles/[!_d]*",
    "psutil/_psaix*",
    "psutil/_psbsd*",
    "psutil/_psosx*",
    "psutil/_pssunos*",
    "psutil/_pswindows*",
    "cffi/*",  # an extension in API mode needs _cffi_backend alone
    "pyroute2/__init__.py",  # see EMPTY_PACKAGES
    "pycparser/*",
)

# Packages whose __init__ is left out in the guest, because it imports all of the package: of pyroute2 the guest needs one
# socket class, and the rest is 40 times its size, with libssl behind it. Their modules import as they do on a host.
EMPTY_PACKAGES = ("pyroute2",)

# A distribution that another one requires, but only for work that is done when something is built.
BUILD_ONLY_DISTRIBUTIONS = frozenset({"pycparser"})

KEPT_IMAGES = 4
KEPT_SECONDS = 3600.0

_KEPT_METADATA = ("METADATA", "entry_points.txt")


class Treatment(StrEnum):
    """What becomes of a file of the host on its way into the image."""

    COPY = "copy"
    TRIM_ELF = "trim-elf"
    BYTECODE = "bytecode"
    """Bytecode in place of the source: for code whose source no traceback or assertion needs."""
    SOURCE_AND_BYTECODE = "source-and-bytecode"
    TEST = "test"
    """Source, with its real modification time, and the bytecode pytest's assertion rewriting would make of it."""
    MODULE = "module"
    """A kernel module, decompressed."""


@dataclass(frozen=True)
class Item:
    """One file of the host, where it goes, and how."""

    target: str
    source: Path
    treatment: Treatment = Treatment.COPY


@dataclass(frozen=True)
class Entry:
    """One member of the archive; `mode` holds type and permissions, `device` is (major, minor)."""

    path: str
    mode: int
    data: bytes = b""
    mtime: int = 0
    device: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ImageRequest:
    """What the guest is to hold besides Python and kvmgmem.

    `modules` are kernel modules in the order in which they must be loaded. `busybox`, a static one, gives `--shell` its
    tools. `extra` are (path in the guest, file of the host). `distributions` are further installed packages.
    """

    selftests: Path
    modules: tuple[Path, ...] = ()
    busybox: Path | None = None
    extra: tuple[tuple[str, Path], ...] = ()
    distributions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """An initramfs on disk: size in bytes, seconds spent, and whether either layer had to be built."""

    path: Path
    size: int
    seconds: float
    built_base: bool
    built_project: bool


def build_image(request: ImageRequest, cache: Path, progress: Callable[[str], None] = lambda _: None) -> Image:
    """Give the image for a request, building only what changed since the last time.

    Raises HarnessError if a package is not installed, a shared library is missing, or the cache cannot be written.
    """
    started = time.monotonic()
    if not request.selftests.is_dir():
        raise HarnessError(f"no directory of selftests at {request.selftests}", hint="give an existing directory")
    with disk_errors(cache):
        base, built_base = _base_layer(request, cache, progress)
        items = project_items(request)
        key = _key(items, base.name, _project_texts(request))
        path = cache / f"initramfs-{key}.cpio"
        built_project = not path.exists()
        if built_project:
            tests = cache / "tests"
            write_file(path, base.read_bytes() + archive(_project_entries(request, items, tests)))
            remove_unused(cache)
            rewritten_tests.remove_unused(tests)
        else:
            os.utime(path)  # what has not been used for long is removed first
    return Image(path, path.stat().st_size, time.monotonic() - started, built_base, built_project)


# --- the base layer ---------------------------------------------------------------------------------------------------


def _base_layer(request: ImageRequest, cache: Path, progress: Callable[[str], None]) -> tuple[Path, bool]:
    items = base_items(request.distributions)
    key = _key(items, sys.version, "")
    path = cache / f"base-{key}.cpio"
    libraries = path.with_suffix(".json")
    if path.exists() and _unchanged(libraries):
        os.utime(path)
        return path, False
    progress(f"building the guest's base image ({len(items)} files)")
    elf = [item.source for item in items if item.treatment is Treatment.TRIM_ELF]
    found = shared_libraries(elf)
    complete = [item for item in items if item.source not in found.broken]
    entries = [*(entry for item in complete for entry in render(item)), *_library_entries(found), *_fixed_entries()]
    write_file(path, archive(entries))
    manifest = [_fingerprint(library) for library in found.paths]
    write_file(libraries, json.dumps(manifest).encode())
    return path, True


def base_items(extra_distributions: Iterable[str] = ()) -> list[Item]:
    """List the interpreter, its standard library and the third-party packages, with their places in the image."""
    executable = Path(sys.executable or "")
    if not executable.is_file():
        raise HarnessError("cannot tell which file this Python interpreter is", hint="run kvmgmem with python3 -m kvmgmem")
    items = [Item(GUEST_PYTHON, executable.resolve(), Treatment.TRIM_ELF)]
    items += _stdlib_items()
    for name in required_distributions((*GUEST_DISTRIBUTIONS, *extra_distributions)):
        items += _distribution_items(name)
    return items


def guest_stdlib() -> str:
    """Where the standard library lies in the image: where this interpreter looks below the prefix /usr."""
    return f"/usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"


def guest_site_packages() -> str:
    """The one directory of the image for everything installed."""
    return f"{guest_stdlib()}/site-packages"


def _stdlib_items() -> Iterator[Item]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in _walk(root, STDLIB_PRUNED):
        yield from _python_item(f"{guest_stdlib()}/{name}", root / name, Treatment.BYTECODE)


def required_distributions(names: Iterable[str]) -> list[str]:
    """Close a set of distributions under what their metadata require on this interpreter, without extras."""
    from packaging.requirements import Requirement

    found: dict[str, None] = {}
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop(0)).lower()
        if name in found or name in BUILD_ONLY_DISTRIBUTIONS:
            continue
        found[name] = None
        for text in _distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return sorted(found)


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise HarnessError(
            f"the guest needs the Python package {name}, and this interpreter does not have it",
            hint="install kvmgmem with its dependencies: pip install kvmgmem",
        ) from None


def _distribution_items(name: str) -> Iterator[Item]:
    """A distribution's importable files by its record, or, where a packager left that out, by its top-level names."""
    distribution = _distribution(name)
    recorded = [PurePosixPath(str(file)) for file in distribution.files or []]
    is_pruned = _matcher(PACKAGES_PRUNED)
    if not any(file.suffix in {".py", ".so"} for file in recorded):
        yield from _top_level_items(name, distribution)
        return
    for file in recorded:
        if file.is_absolute() or ".." in file.parts or "__pycache__" in file.parts:
            continue
        if file.parts[0].endswith(".dist-info") and file.name not in _KEPT_METADATA:
            continue
        path = Path(str(distribution.locate_file(file)))
        if not is_pruned(str(file)) and path.is_file():
            yield from _python_item(f"{guest_site_packages()}/{file}", path, Treatment.BYTECODE)


def _top_level_items(name: str, distribution: importlib.metadata.Distribution) -> Iterator[Item]:
    listed = (distribution.read_text("top_level.txt") or name.replace("-", "_")).split()
    for module in listed:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        is_package = spec.submodule_search_locations is not None
        below = [f"{module}/{name}" for name in _walk(origin.parent)] if is_package else [origin.name]
        root = origin.parent.parent if is_package else origin.parent
        is_pruned = _matcher(PACKAGES_PRUNED)
        for file in below:
            if not is_pruned(file):
                yield from _python_item(f"{guest_site_packages()}/{file}", root / file, Treatment.BYTECODE)


def _python_item(target: str, path: Path, python: Treatment) -> Iterator[Item]:
    if path.suffix == ".py":
        yield Item(target, path, python)
    elif path.suffix == ".so" or ".so." in path.name:
        yield Item(target, path, Treatment.TRIM_ELF)
    elif path.suffix not in {".a", ".h", ".c", ".o", ".exe", ".pyi", ".pyc", ".bat", ".sh"}:
        yield Item(target, path)


def _fixed_entries() -> list[Entry]:
    """What the kernel needs before PID 1 has mounted anything, and the mount points themselves."""
    directories = ("proc", "sys", "dev", "tmp", "run", "root", "etc")
    return [
        *(Entry(f"/{name}", stat.S_IFDIR | 0o755) for name in directories),
        *(Entry(f"{guest_site_packages()}/{name}/__init__.py", stat.S_IFREG | 0o644) for name in EMPTY_PACKAGES),
        # The kernel opens it as init's standard streams (init/main.c, console_on_rootfs).
        Entry("/dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("/usr/bin/python", stat.S_IFLNK | 0o777, b"python3"),
        Entry(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}", stat.S_IFLNK | 0o777, b"python3"),
        # Debian's own Python looks here instead (its site.py knows site-packages in virtual environments only).
        Entry("/usr/lib/python3/dist-packages", stat.S_IFLNK | 0o777, guest_site_packages().encode()),
        Entry("/etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"),
        Entry("/etc/group", stat.S_IFREG | 0o644, b"root:x:0:\nnogroup:x:65534:\n"),
    ]


# --- shared libraries -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Libraries:
    """Shared objects that a set of files needs: by the name they are looked up under, and the program interpreter.

    `broken` are the files of the set for which something is missing on this machine, and which it cannot load either.
    """

    by_name: tuple[tuple[str, Path], ...]
    interpreter: Path
    broken: frozenset[Path]

    @property
    def paths(self) -> list[Path]:
        return [*(path for _, path in self.by_name), self.interpreter]


_LDD_FOUND = re.compile(r"^\s+(?P<name>\S+) => (?P<path>/\S+) \(0x[0-9a-f]+\)$")
_LDD_INTERPRETER = re.compile(r"^\s+(?P<path>/\S+) \(0x[0-9a-f]+\)$")
_LDD_MISSING = re.compile(r"^\s+(?P<name>\S+) => not found$")


def shared_libraries(files: Sequence[Path]) -> Libraries:
    """Ask the dynamic loader, through ldd, what these files load, transitively.

    Raises HarnessError if ldd is missing or the first file, the interpreter, lacks something.
    """
    try:
        # The interpreter once more at the front: ldd prints no headings for a single file.
        done = subprocess.run(
            ["ldd", str(files[0]), *map(str, files)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise HarnessError("ldd is missing", hint="install libc-bin") from None
    found = parse_ldd(done.stdout)
    if files[0] in found.broken:
        raise HarnessError(f"{files[0]} needs a shared library that is not on this machine", hint=f"see ldd {files[0]}")
    return found


def parse_ldd(output: str) -> Libraries:
    """Read ldd's report on several files."""
    current = Path()
    by_name: dict[str, Path] = {}
    interpreter = Path()
    broken = set()
    for line in output.splitlines():
        if not line[:1].isspace():
            current = Path(line.removesuffix(":"))
        elif match := _LDD_FOUND.match(line):
            by_name.setdefault(match["name"], Path(match["path"]))
        elif match := _LDD_INTERPRETER.match(line):
            interpreter = Path(match["path"])
        elif _LDD_MISSING.match(line):
            broken.add(current)
    return Libraries(tuple(sorted(by_name.items())), interpreter, frozenset(broken))


def _library_entries(found: Libraries) -> Iterator[Entry]:
    """Put every library beside libc: that directory is one the program's loader searches without being told."""
    libc = next((path for name, path in found.by_name if name.startswith("libc.")), None)
    if libc is None:
        return  # a static interpreter
    for name, path in found.by_name:
        yield Entry(str(libc.parent / name), stat.S_IFREG | 0o755, trim_elf(path.read_bytes()))
    yield Entry(str(found.interpreter), stat.S_IFREG | 0o755, trim_elf(found.interpreter.read_bytes()))


def trim_elf(data: bytes) -> bytes:
    """Cut an ELF file after the last byte that a program header names: sections, symbols, debug data go.

    The loader works from program headers alone (elf(5)). Anything but 64-bit little-endian ELF is left as it is.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    end = offset + size * count
    for index in range(count):
        start, length = struct.unpack_from("<Q16xQ", data, offset + index * size + 8)
        end = max(end, start + length)
    trimmed = bytearray(data[:end])
    struct.pack_into("<Q", trimmed, 40, 0)  # e_shoff
    struct.pack_into("<HH", trimmed, 60, 0, 0)  # e_shnum, e_shstrndx
    return bytes(trimmed)


# --- the project layer ------------------------------------------------------------------------------------------------


def project_items(request: ImageRequest) -> list[Item]:
    """List kvmgmem, the selftests, modules and extras, with their places in the image."""
    package = Path(kvmgmem.__file__).parent
    items: list[Item] = []
    for name in _walk(package):
        target = f"{guest_site_packages()}/kvmgmem/{name}"
        items += _python_item(target, package / name, Treatment.SOURCE_AND_BYTECODE)
    for name in _walk(request.selftests):
        items += _python_item(f"{guest_selftests(request)}/{name}", request.selftests / name, Treatment.TEST)
    for index, module in enumerate(request.modules):
        name = module.name.split(".ko", maxsplit=1)[0]
        items.append(Item(f"{MODULES_DIRECTORY}/{index:03}-{name}.ko", module, Treatment.MODULE))
    items += [Item(target, source) for target, source in request.extra]
    if request.busybox is not None:
        items.append(Item("/bin/busybox", request.busybox))
    return items


def guest_selftests(request: ImageRequest) -> str:
    """The selftests' directory in the image; its last part is that of the host, so that node ids are the same."""
    return f"{PROJECT_DIRECTORY}/{request.selftests.resolve().name}"


def _project_entries(request: ImageRequest, items: Sequence[Item], kept: Path) -> Iterator[Entry]:
    for item in items:
        yield from render(item, kept)
    metadata = f"{guest_site_packages()}/kvmgmem-{kvmgmem.__version__}.dist-info"
    yield Entry(
        f"{metadata}/METADATA",
        stat.S_IFREG | 0o644,
        f"Metadata-Version: 2.1\nName: kvmgmem\nVersion: {kvmgmem.__version__}\n".encode(),
    )
    if any(item.target.endswith("/kvmgmem/testing/plugin.py") for item in items):
        yield Entry(f"{metadata}/entry_points.txt", stat.S_IFREG | 0o644, b"[pytest11]\nkvmgmem = kvmgmem.testing.plugin\n")
    yield Entry(f"{PROJECT_DIRECTORY}/pytest.ini", stat.S_IFREG | 0o644, pytest_ini(request.selftests).encode())
    yield Entry("/init", stat.S_IFREG | 0o755, _init_script().encode())


def _project_texts(request: ImageRequest) -> str:
    return pytest_ini(request.selftests) + _init_script() + kvmgmem.__version__ + guest_selftests(request)


def _init_script() -> str:
    """/init itself: a script is compiled at each start, so it only fetches compiled code.

    -S leaves out `site`, which PID 1 does not need; -I ignores environment and user directories.
    """
    return (
        f"#!{GUEST_PYTHON} -IS\n"
        "import sys\n"
        f"sys.path.append({guest_site_packages()!r})\n"
        "from kvmgmem.lab.guest.init import main\n"
        "main()\n"
    )


def pytest_ini(selftests: Path) -> str:
    """The guest's pytest configuration: that of the project around the selftests, as an ini file.

    Taken from the `pyproject.toml` beside the selftests directory, if it configures pytest; parsing it happens here, on
    the host. `testpaths` is the selftests directory, and the cache plugin is off: nothing outlives the guest.
    """
    options = _project_pytest_options(selftests.resolve().parent / "pyproject.toml")
    options["testpaths"] = selftests.resolve().name
    options["addopts"] = f"{_ini_value(options.get('addopts', ''))} -p no:cacheprovider".strip()
    lines = [f"{name} = {_ini_value(value)}" for name, value in sorted(options.items())]
    return "\n".join(["[pytest]", *lines, ""])


def _project_pytest_options(project: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(project.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise HarnessError(
            f"{project} is not TOML: {error}", hint="repair it: the guest's pytest takes its options there"
        ) from None
    return dict(content.get("tool", {}).get("pytest", {}).get("ini_options", {}))


def _ini_value(value: object) -> str:
    if isinstance(value, list):
        return "".join(f"\n    {element}" for element in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- files into entries -----------------------------------------------------------------------------------------------


def render(item: Item, kept: Path | None = None) -> Iterator[Entry]:
    """Turn one file into its archive members; `kept` is the folder of what was made of tests before."""
    data = item.source.read_bytes()
    mode = stat.S_IFREG | (0o755 if os.access(item.source, os.X_OK) else 0o644)
    match item.treatment:
        case Treatment.COPY:
            yield Entry(item.target, mode, data)
        case Treatment.TRIM_ELF:
            yield Entry(item.target, mode, trim_elf(data))
        case Treatment.MODULE:
            yield Entry(item.target, mode, _decompressed(item.source, data))
        case Treatment.BYTECODE:
            bytecode = _bytecode(data, item.target)
            # A file that does not compile (templates, other Python versions) cannot be imported here either.
            yield Entry(f"{item.target}c", mode, bytecode) if bytecode else Entry(item.target, mode, data)
        case Treatment.SOURCE_AND_BYTECODE:
            yield Entry(item.target, mode, data)
            if bytecode := _bytecode(data, item.target):
                yield Entry(importlib.util.cache_from_source(item.target), mode, bytecode)
        case Treatment.TEST:
            mtime = int(item.source.stat().st_mtime)
            yield Entry(item.target, mode, data, mtime)
            if rewritten := rewritten_test(item.target, item.source, kept):
                path, code = rewritten
                yield Entry(path, stat.S_IFREG | 0o644, code)


def _bytecode(source: bytes, target: str) -> bytes | None:
    """Compile to an unchecked, hash-based .pyc (PEP 552): flags 0b01, the source's hash, the marshalled code."""
    try:
        code = compile(source, target, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    header = importlib.util.MAGIC_NUMBER + struct.pack("<I", 0b01) + importlib.util.source_hash(source)
    return header + marshal.dumps(code)


def _decompressed(path: Path, data: bytes) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        done = subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=False, timeout=60)
        if done.returncode != 0:
            raise HarnessError(f"cannot decompress {path}", hint="install zstd")
        return done.stdout
    return data


# --- the archive ------------------------------------------------------------------------------------------------------


def archive(entries: Iterable[Entry]) -> bytes:
    """Write entries as one newc archive, sorted by path, with the directories they need, ended by its trailer.

    The format is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst: fields of eight hex
    digits, name and data padded to four bytes. A later entry for a path replaces an earlier one.
    """
    by_path = {entry.path: entry for entry in entries}
    for path in list(by_path):
        for parent in PurePosixPath(path).parents:
            by_path.setdefault(str(parent), Entry(str(parent), stat.S_IFDIR | 0o755))
    by_path.pop("/", None)
    parts = bytearray()
    for inode, path in enumerate(sorted(by_path), start=1):
        _append(parts, by_path[path], inode)
    _append(parts, Entry("/TRAILER!!!", 0), 0)
    return bytes(parts.ljust(-(-len(parts) // 512) * 512, b"\0"))


def _append(parts: bytearray, entry: Entry, inode: int) -> None:
    name = entry.path.removeprefix("/").encode() + b"\0"
    fields = (inode, entry.mode, 0, 0, 1, entry.mtime & 0xFFFFFFFF, len(entry.data), 0, 0, *entry.device, len(name), 0)
    parts += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    parts += b"\0" * (-len(parts) % 4)
    parts += entry.data
    parts += b"\0" * (-len(parts) % 4)


# --- keys and files ---------------------------------------------------------------------------------------------------


def _walk(root: Path, pruned: Iterable[str] = ()) -> list[str]:
    """Every regular file below a directory, by its path from there, sorted, without caches, hidden and pruned ones.

    Directories are pruned before they are entered: an interpreter's site-packages may hold tens of thousands of files.
    """
    is_pruned = _matcher(pruned)
    found = []
    for directory, names, files in os.walk(root):
        below = os.path.relpath(directory, root)
        prefix = "" if below == "." else f"{below}/"
        names[:] = [
            name
            for name in names
            if name != "__pycache__" and not name.startswith(".") and not is_pruned(f"{prefix}{name}/")
        ]
        found += [prefix + name for name in files if not name.startswith(".") and not is_pruned(prefix + name)]
    return sorted(found)


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """One function for a list of shell patterns, of which `*` also matches slashes."""
    combined = re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
    return lambda name: combined.match(name) is not None


def _fingerprint(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _unchanged(manifest: Path) -> bool:
    """Whether the libraries a base image was built from are still what they were."""
    try:
        recorded = json.loads(manifest.read_text())
        return all(list(_fingerprint(Path(path))) == [path, size, mtime] for path, size, mtime in recorded)
    except (OSError, ValueError):
        return False


def _key(items: Iterable[Item], *texts: str) -> str:
    """Hash what an image depends on: sources by path, size and time; the treatment; and this builder's own text."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for item in items:
        digest.update(repr((item.target, item.treatment.value, _fingerprint(item.source))).encode())
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()[:20]


def remove_unused(cache: Path, keep: int = KEPT_IMAGES, age: float = KEPT_SECONDS) -> None:
    """Remove the images that were not asked for in the last `age` seconds, but for the newest `keep` of each layer.

    The age is a guard for guests of another process, which may be about to open what it was just given.
    """
    for pattern in ("initramfs-*.cpio", "base-*.cpio"):
        images = sorted(cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in images[keep:]:
            if time.time() - path.stat().st_mtime > age:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)


def find_busybox() -> Path | None:
    """A busybox of this machine, for a guest's shell; None if there is none."""
    found = shutil.which("busybox")
    return Path(found) if found else None
