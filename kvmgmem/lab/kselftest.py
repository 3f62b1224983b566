"""The kernel's own KVM selftests: built from a kernel tree, statically, without a trace in that tree."""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.apt import AptArchive, Package
from kvmgmem.lab.kernel.kbuild import BUILD_TIMEOUT, CONFIGURE_TIMEOUT, build_environment, logged_output
from kvmgmem.lab.kernel.kernels import refuse_odd_path
from kvmgmem.lab.kernel.source import Origin, choose_source, is_release, package_origin, source_tree, tree_origin
from kvmgmem.lab.progress import Progress

FOLDER = Path("tools/testing/selftests/kvm")

DEFAULT_TESTS = (
    "guest_memfd_test",
    "set_memory_region_test",
    "pre_fault_memory_test",
    "private_mem_conversions_test",
    "private_mem_kvm_exits_test",
    "vm_types_test",
    "memslot_modification_stress_test",
)
"""What is run where nothing is named: the programs about guest_memfd and memory slots."""

NODE_PREFIX = "kselftest::"

# Objects and programs of all tests of 7.3, measured and rounded up; a few tests take a tenth.
_OBJECT_BYTES = 300_000_000

# Static, because the guest has no libc but Python's; stripped, because the guest reads them from its memory.
_LINK = "-static -s"

_TOOLS = {"gcc": "gcc", "make": "make", "ld": "binutils"}
# Static libraries, what in the tests' Makefile asks for them, and the Debian package of each.
_LIBRARIES = (("libc.a", None, "libc6-dev"), ("libuuid.a", "libvfio", "uuid-dev"))


@dataclass(frozen=True)
class Programs:
    """Built selftests: what their source is called, their names with their files, and which of the usual ones it lacks."""

    label: str
    files: Mapping[str, Path]
    lacking: tuple[str, ...] = ()


def find_source(source: str, progress: Progress, refresh: bool = False) -> Origin:
    """The origin that a kernel tree's folder is, or that a release (7.3) of the distribution's source packages is.

    A release whose selftests have been built before is answered from the cache. Raises HarnessError for what is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir() or not re.match(r"\d+\.\d", source) or "/" in source:
        return tree_origin(path)
    known = None if refresh else next((origin for origin in _packages_built() if is_release(origin.label, source)), None)
    return known or package_origin(choose_source(AptArchive(progress), source, refresh))


def list_tests(origin: Origin, progress: Progress) -> Mapping[str, str]:
    """The compiled KVM selftests that this source has for this machine: name to make's target, sorted by name.

    Raises HarnessError when the source has no KVM selftests.
    """
    entry = _entry(origin)
    with cache.locked(entry, progress.note):
        if known := _recorded(origin, entry):
            return known
        with source_tree(origin, progress) as tree:
            return _targets(tree, origin, entry)


def choose(tests: Mapping[str, str], wanted: Sequence[str], every: bool = False) -> list[str]:
    """The names that somebody means: as listed, or with a folder before it (x86/...), or a node id; by default the usual.

    Raises HarnessError (USAGE) for a name that is none, with those that are near, and where there is nothing to choose.
    """
    if every:
        return list(tests)
    if not wanted:
        if usual := [name for name in DEFAULT_TESTS if name in tests]:
            return usual
        raise HarnessError("this kernel tree has none of the usual tests", "name some (--list), or --all", ExitCode.USAGE)
    return list(dict.fromkeys(_named(word, tests) for word in wanted))


def _named(word: str, tests: Mapping[str, str]) -> str:
    # A subtest cannot be run alone: its program can.
    name = word.removeprefix(NODE_PREFIX).partition("::")[0].rpartition("/")[2]
    if name in tests:
        return name
    near = difflib.get_close_matches(name, tests, n=5, cutoff=0.5) or [test for test in tests if name and name in test][:5]
    meant = f"did you mean {', '.join(near)}? " if near else ""
    raise HarnessError(
        f"this kernel tree has no KVM selftest {word!r}", f"{meant}--list shows all {len(tests)}", ExitCode.USAGE
    )


def build_tests(origin: Origin, wanted: Sequence[str], progress: Progress, every: bool = False) -> Programs:
    """Build the selftests that are meant, or take what is there; see `choose` for `wanted` and `every`.

    Of a tree, make decides what is up to date; a package never changes. Raises HarnessError when tools or room are
    missing or a name is none, BuildError with the first error when a test does not compile.
    """
    entry = _entry(origin)
    with cache.locked(entry, progress.note):
        if targets := _recorded(origin, entry):
            programs = _programs(origin, entry, targets, choose(targets, wanted, every))
            if all(file.is_file() for file in programs.files.values()):
                return programs
        with source_tree(origin, progress) as tree:
            targets = _targets(tree, origin, entry)
            programs = _programs(origin, entry, targets, choose(targets, wanted, every))
            _make(tree, entry, [str(file) for file in programs.files.values()], progress)
            return programs


def _programs(origin: Origin, entry: Path, targets: Mapping[str, str], names: Sequence[str]) -> Programs:
    lacking = tuple(name for name in DEFAULT_TESTS if name not in targets)
    return Programs(origin.label, {name: _output(entry) / targets[name] for name in names}, lacking)


def require_tools(makefile: str) -> None:
    """Raise HarnessError naming every command and static library that is missing, and the packages that hold them.

    `makefile` is the text of the tests' own, which says what more than libc they are linked with.
    """
    missing = {tool: package for tool, package in _TOOLS.items() if shutil.which(tool) is None}
    if "gcc" not in missing:
        asked = [(name, package) for name, reason, package in _LIBRARIES if reason is None or reason in makefile]
        missing |= {name: package for name, package in asked if not _has_library(name)}
    if missing:
        raise HarnessError(
            f"building the kernel's selftests needs {', '.join(missing)}",
            f"apt-get install {' '.join(sorted(set(missing.values())))} (as root; names are Debian's)",
        )


def _has_library(name: str) -> bool:
    # gcc gives a name back as it is when it finds no such file.
    return "/" in _gcc(f"-print-file-name={name}")


def _gcc(option: str) -> str:
    return subprocess.run(["gcc", option], capture_output=True, text=True, check=False, timeout=60).stdout.strip()


def _entry(origin: Origin) -> Path:
    """The cache entry, by source and compiler; with the objects of kernels, so that `kernel rm --sources` removes it."""
    compiler = hashlib.sha256(f"{_gcc('--version') if shutil.which('gcc') else ''} {_LINK}".encode()).hexdigest()[:8]
    return cache.cache_root() / "objects" / f"kselftest-{origin.key}-{compiler}"


def _output(entry: Path) -> Path:
    return entry / "kvm"


def _targets(tree: Path, origin: Origin, entry: Path) -> Mapping[str, str]:
    """Ask the tests' own Makefile what it builds on this architecture; the answer is kept beside what is built."""
    makefile = next((file for name in ("Makefile.kvm", "Makefile") if (file := tree / FOLDER / name).is_file()), None)
    if makefile is None:
        raise HarnessError(f"{tree} has no KVM selftests ({FOLDER})", "give a whole kernel tree")
    refuse_odd_path(tree)
    refuse_odd_path(entry)
    require_tools(makefile.read_text(encoding="utf-8", errors="replace"))
    output = _output(entry)
    with cache.disk_errors(entry):
        output.mkdir(parents=True, exist_ok=True)
    show = ["--eval=kvmgmem-list: ; @printf '%s\\n' $(TEST_GEN_PROGS)", "kvmgmem-list"]
    answer = subprocess.run(
        ["make", "-s", *_variables(tree, entry), *show],
        capture_output=True,
        text=True,
        env=build_environment(),
        timeout=CONFIGURE_TIMEOUT,
        check=False,
    )
    found = [line.removeprefix(f"{output}/") for line in answer.stdout.splitlines() if line.startswith(f"{output}/")]
    if not found:
        said = next((line for line in answer.stderr.splitlines() if line.strip()), f"exit status {answer.returncode}")
        raise HarnessError(f"the Makefile of {tree / FOLDER} names no tests: {said}", "does `make` work there?")
    targets = dict(sorted((Path(target).name, target) for target in found))
    record = {"package": asdict(origin.package) if origin.package else None, "targets": targets}
    cache.write_file(_record(entry), json.dumps(record).encode())
    return targets


def _variables(tree: Path, entry: Path) -> list[str]:
    """What keeps the tests' Makefile out of the tree, and our headers before any that lie there.

    TMPOUT is where it tries compiler options (tools/build/Build.include), which is the working directory otherwise.
    """
    headers = _headers(entry) / "usr"
    return [
        "-C",
        str(tree / FOLDER),
        f"OUTPUT={_output(entry)}",
        f"INSTALL_HDR_PATH={headers}",
        f"KHDR_INCLUDES=-isystem {headers}/include",
        f"TMPOUT={_output(entry)}/try",
        f"USERLDFLAGS={_LINK}",
    ]


def _headers(entry: Path) -> Path:
    return entry / "headers"


def _make(tree: Path, entry: Path, targets: Sequence[str], progress: Progress) -> None:
    cache.require_room(entry, _OBJECT_BYTES)
    log = cache.cache_root() / "logs" / f"{entry.name}.log"
    with cache.disk_errors(entry):
        _headers(entry).mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    # `headers` and not `headers_install`, which would want rsync for copying what lies here already.
    jobs = f"-j{os.cpu_count() or 1}"
    headers = ["make", "-C", str(tree), f"O={_headers(entry)}", jobs, "headers"]
    _follow(logged_output("installing the kernel's headers", headers, log, entry, CONFIGURE_TIMEOUT), progress)
    programs = ["make", jobs, *_variables(tree, entry), *targets]
    _follow(logged_output("building the kernel's selftests", programs, log, entry, BUILD_TIMEOUT), progress)


def _follow(lines: Iterator[str], progress: Progress) -> None:
    for line in lines:
        if line.startswith(("gcc ", "  ")):
            progress.update(line.split()[-1])


def _record(entry: Path) -> Path:
    return entry / "tests.json"


def _recorded(origin: Origin, entry: Path) -> Mapping[str, str] | None:
    """What a package's Makefile answered the last time; None if it was not asked, and for a tree, which may change."""
    if origin.tree is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads(_record(entry).read_text(encoding="utf-8"))["targets"])
    return None


def _packages_built() -> Iterator[Origin]:
    """The packages whose selftests this compiler has built before, the one last built first."""
    records = (cache.cache_root() / "objects").glob("kselftest-*/tests.json")
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            origin = package_origin(Package(**json.loads(path.read_text(encoding="utf-8"))["package"]))
            if _entry(origin) == path.parent:
                yield origin
