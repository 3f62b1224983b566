"""Building a kernel from a source tree: configure, check the configuration, make, and say what went wrong first."""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel.flavours import Comparison, Flavour, Version, compare, parse_config
from kvmgmem.lab.progress import Progress
from kvmgmem.lab.termination import terminable

IMAGE = Path("arch/x86/boot/bzImage")

# Commands that every build runs, and the Debian package of each.
_TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "awk": "mawk",
    "lz4": "lz4",
}
# Host headers, what in the configuration needs them, and the Debian package of each.
_HEADERS = (
    ("stdlib.h", None, "libc6-dev"),
    # objtool, which x86's unwinder tables and static calls need.
    ("libelf.h", "CONFIG_OBJTOOL", "libelf-dev"),
    # scripts/sign-file and certs/extract-cert.
    ("openssl/opensslv.h", "CONFIG_SYSTEM_TRUSTED_KEYRING", "libssl-dev"),
)

# Lines of make's quiet output that stand for one finished step: "  CC      mm/gup.o".
_STEP = re.compile(r"  [A-Z][A-Z0-9_+-]* +(\[M\] +)?\S")

# Steps of a whole build, measured on 7.3; a guess is enough, this only feeds the percentage.
_STEPS = {"base": 2270, "debug": 2230, "coverage": 2290}
_STEPS_GUESS = 2300

# What an error looks like in a kernel build's log, whoever reports it: compiler, linker, objtool, Kconfig, shell, make.
_ERROR = re.compile(
    r"(: (fatal )?error: |: error \d|undefined reference to|^ld: |: not found$|command not found"
    r"|No space left on device|^Killed|internal compiler error|\*\*\* |cannot stat|No such file or directory"
    r"|Permission denied|Error \d+$)"
)
# Where make's own complaints or its next command begin, nothing more is to be learnt about what failed above them.
_ECHO = re.compile(r"^make(\[\d+\])?: \*\*\* |^\s*\*\*\* *$|^gcc ")
_LINES_SHOWN = 6

# A compile can legitimately be slow, a whole build is never this slow.
BUILD_TIMEOUT = 2 * 3600.0
CONFIGURE_TIMEOUT = 600.0


class BuildError(HarnessError):
    """The kernel could not be configured or built: the source's fault or the configuration's, not the harness's."""


@dataclass(frozen=True)
class BuildRequest:
    """One build: from which tree, into which folder (the tree itself for a build in place), as what."""

    tree: Path
    objects: Path
    flavour: Flavour
    log: Path
    jobs: int


@dataclass(frozen=True)
class BuildResult:
    """What a build left behind, all inside its object folder, and what the configuration made of the request."""

    image: Path
    vmlinux: Path
    config: Path
    release: str
    comparison: Comparison


def tree_version(tree: Path) -> Version:
    """The series of a kernel source tree, by its Makefile. Raises HarnessError when it is no kernel source tree."""
    try:
        head = (tree / "Makefile").read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        head = ""
    version = re.search(r"^VERSION = (\d+)$", head, re.MULTILINE)
    level = re.search(r"^PATCHLEVEL = (\d+)$", head, re.MULTILINE)
    if not version or not level or not (tree / "Kconfig").is_file():
        raise HarnessError(f"{tree} is not a kernel source tree", "give the folder that holds the kernel's top Makefile")
    return int(version[1]), int(level[1])


def build(request: BuildRequest, progress: Progress) -> BuildResult:
    """Configure and build; a second build with the same object folder redoes only what changed.

    The whole output goes to `request.log`. Raises BuildError with the first error and the log's path, HarnessError
    when tools are missing or the disk is full.
    """
    version = tree_version(request.tree)
    _refuse_unclean_tree(request)
    with cache.disk_errors(request.objects):
        request.objects.mkdir(parents=True, exist_ok=True)
        request.log.parent.mkdir(parents=True, exist_ok=True)
        request.log.write_bytes(b"")
    require_tools(_TOOLS, ["stdlib.h"])
    progress.update("configuring")
    comparison = configure(request, version)
    config = parse_config(_config_path(request).read_text(encoding="utf-8"))
    require_tools({}, [header for header, option, _ in _HEADERS if option is None or config.get(option) == "y"])
    _make_image(request, progress)
    release = (request.objects / "include/config/kernel.release").read_text(encoding="utf-8").strip()
    return BuildResult(request.objects / IMAGE, request.objects / "vmlinux", _config_path(request), release, comparison)


def require_tools(tools: Mapping[str, str], headers: Sequence[str]) -> None:
    """Raise HarnessError naming every command and header that is missing, and the packages that hold them."""
    missing = {tool: package for tool, package in tools.items() if shutil.which(tool) is None}
    if "gcc" not in missing:
        packages = {header: package for header, _, package in _HEADERS}
        missing |= {header: packages[header] for header in headers if not _compiles(header)}
    if missing:
        raise HarnessError(
            f"building a kernel needs {', '.join(missing)}",
            f"apt-get install {' '.join(sorted(set(missing.values())))} (as root; names are Debian's)",
        )


def configure(request: BuildRequest, version: Version) -> Comparison:
    """Write the object folder's .config: nothing but what the flavour asks for and what that needs.

    Raises BuildError naming every requested option that the result lost.
    """
    fragment = request.objects / ".kvmgmem.config"
    cache.write_file(fragment, request.flavour.fragment.encode())
    config = _config_path(request)
    _run(request, [*_make(request), "allnoconfig"], CONFIGURE_TIMEOUT)
    merge = ["sh", str(request.tree / "scripts/kconfig/merge_config.sh"), "-m", "-O", str(request.objects)]
    _run(request, [*merge, str(config), str(fragment)], CONFIGURE_TIMEOUT)
    _run(request, [*_make(request), "olddefconfig"], CONFIGURE_TIMEOUT)
    comparison = compare(request.flavour.options, parse_config(config.read_text(encoding="utf-8")), version)
    if comparison.lost:
        lost = ", ".join(str(difference) for difference in comparison.lost)
        raise BuildError(
            f"kernel {version[0]}.{version[1]} lost options of flavour {request.flavour.name}: {lost}",
            "something they depend on is off, or this kernel has them under another name; the fragment must say so",
        )
    return comparison


def first_error(log: str) -> list[str]:
    """The lines of a build log that say what failed first, at most six; empty when no line looks like an error."""
    lines = log.splitlines()
    first = next((number for number, line in enumerate(lines) if _ERROR.search(line) and "warning: " not in line), None)
    if first is None:
        return []
    shown = [lines[first]]
    for line in lines[first + 1 : first + _LINES_SHOWN]:
        if _STEP.match(line) or _ECHO.search(line):
            break
        shown.append(line)
    return [line.rstrip() for line in shown]


def _refuse_unclean_tree(request: BuildRequest) -> None:
    """The kernel's Makefile refuses to build elsewhere from a tree that was ever configured in place."""
    unclean = (request.tree / ".config").exists() or (request.tree / "include/config").exists()
    if request.objects != request.tree and unclean:
        raise HarnessError(
            f"{request.tree} was configured in place, so the kernel's Makefile cannot build it elsewhere",
            f"add --in-place (it replaces that .config), or clean it: make -C {request.tree} mrproper",
        )


def _make_image(request: BuildRequest, progress: Progress) -> None:
    total = _STEPS.get(request.flavour.name, _STEPS_GUESS)
    steps = 0
    command = [*_make(request), f"-j{request.jobs}", *_MAKE_ARGUMENTS.get(request.flavour.name, []), "bzImage"]
    for line in _output(request, command, BUILD_TIMEOUT):
        if _STEP.match(line):
            steps += 1
            progress.update(" ".join(line.split()[-1:]), min(steps / total, 0.99))


COUNTED_FOLDERS = "GCOV_PROFILE=$(if $(filter arch/x86/kvm% virt/kvm%,$(obj)),y,n)"
"""What tells make to let gcov count in KVM's own folders, and nowhere else, without a change to the tree.

GCOV_PROFILE is what a folder's Makefile sets for that (scripts/Makefile.lib, Linux 7.3). On the command line it overrides
those Makefiles, and as make expands it for each object, the folder being built decides.
"""

_MAKE_ARGUMENTS = {"coverage": [COUNTED_FOLDERS]}


def _make(request: BuildRequest) -> list[str]:
    command = ["make", "-C", str(request.tree)]
    return command if request.objects == request.tree else [*command, f"O={request.objects}"]


def _config_path(request: BuildRequest) -> Path:
    return request.objects / ".config"


def _run(request: BuildRequest, command: list[str], timeout: float) -> None:
    for _ in _output(request, command, timeout):
        pass


def _output(request: BuildRequest, command: list[str], timeout: float) -> Iterator[str]:
    what = "build" if command[-1] == "bzImage" else command[-1] if command[0] == "make" else "merge_config.sh"
    return logged_output(f"kernel {what}", command, request.log, request.objects, timeout)


def logged_output(what: str, command: list[str], log: Path, objects: Path, timeout: float) -> Iterator[str]:
    """Run a command that writes below `objects`, in a process group of its own; log its output, and yield it line by line.

    Raises BuildError ("`what` failed", with the first error) when it fails or takes too long, HarnessError when the disk
    is full. Whatever ends the iteration early, the whole group is killed.
    """
    with (
        cache.disk_errors(objects),
        log.open("a", encoding="utf-8") as file,
        terminable(),
        _process_group(command, timeout) as (process, timed_out),
    ):
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            yield line.rstrip("\n")
        status = process.wait()
    if timed_out.is_set():
        raise BuildError(f"`make` was not done after {timeout / 60:.0f} min, and was stopped", f"log: {log}")
    if status != 0:
        raise _failure(what, log, objects, status)


def _failure(what: str, log: Path, objects: Path, status: int) -> HarnessError:
    text = log.read_text(encoding="utf-8", errors="replace")
    if cache.looks_full(objects, text):
        return cache.no_room(objects)
    shown = first_error(text)
    cause = "\n".join([f"{what} failed (exit status {status}), first error:", *(f"    {line}" for line in shown)])
    return BuildError(cause if shown else f"{what} failed (exit status {status})", f"log: {log}")


@contextmanager
def _process_group(command: list[str], timeout: float) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=build_environment(),
        start_new_session=True,
    )
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        _kill_group(process)

    timer = threading.Timer(timeout, stop)
    timer.daemon = True
    timer.start()
    try:
        yield process, timed_out
    finally:
        timer.cancel()
        if process.poll() is None:
            _kill_group(process)
        assert process.stdout is not None
        process.stdout.close()


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End make and all its children; make removes half-written targets when it is asked politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        # The leader is gone; stragglers of its group get the next signal, where there are any.


def build_environment() -> dict[str, str]:
    """This process's environment without what would reach into the kernel's build.

    That is: our caller's make (`make selftest` exports MAKEFLAGS and its job server), and variables by which the
    kernel's Makefile takes another compiler, architecture or configuration than the cache's key says.
    """
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "GNUMAKEFLAGS", "MAKEFILES"}
    steering = {"ARCH", "CROSS_COMPILE", "CC", "LLVM", "O", "V", "W", "C", "CFLAGS", "KCFLAGS", "LOCALVERSION"}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in inherited | steering and not name.startswith(("KBUILD_", "KCONFIG_"))
    } | {"LC_ALL": "C"}


def _compiles(header: str) -> bool:
    answer = subprocess.run(
        ["gcc", "-E", "-include", header, "-x", "c", "/dev/null"], capture_output=True, timeout=60, check=False
    )
    return answer.returncode == 0
