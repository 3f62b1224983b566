"""Building: first errors, lost options, missing tools, Ctrl-C. The "kernels" here are trees of a few lines of make."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.kernel import kbuild, kernels
from kvmgmem.lab.kernel import source as kernel_source
from kvmgmem.lab.kernel.flavours import Flavour, Option
from kvmgmem.lab.kernel.kbuild import BuildError, BuildRequest
from kvmgmem.lab.progress import Progress

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("make", "gcc", "flex", "bison", "bc", "lz4")),
    reason="needs the tools that build kernels",
)

# Seconds that anything here may take on a machine that is busy with something else; it all takes a moment on its own.
PATIENCE = 240

# What the kernel's own Makefile does, as far as kbuild.py can see: O=, three targets, quiet step lines, results.
MAKEFILE = """\
VERSION = 7
PATCHLEVEL = 3
out := $(if $(O),$(O),.)
allnoconfig:
	@echo '# nothing' > $(out)/.config
olddefconfig:
	@sed -i '/LOSE_ME/d' $(out)/.config
bzImage:
	@echo '  CC      one.o'
	{action}
	@echo '  LD      vmlinux'
	@mkdir -p $(out)/arch/x86/boot $(out)/include/config
	@echo image > $(out)/arch/x86/boot/bzImage
	@echo elf > $(out)/vmlinux
	@echo 7.3.0-test > $(out)/include/config/kernel.release
"""
MERGE = '#!/bin/sh\n# called as: merge_config.sh -m -O DIR CONFIG FRAGMENT\ncat "$5" >> "$4"\n'


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("KVMGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree(folder: Path, action: str = "@true") -> Path:
    """A source tree whose build does `action` in the middle."""
    (folder / "scripts/kconfig").mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE.replace("{action}", action))
    (folder / "Kconfig").touch()
    (folder / "scripts/kconfig/merge_config.sh").write_text(MERGE)
    return folder


def request(tree: Path, *options: Option) -> BuildRequest:
    """A build of that tree beside it."""
    return BuildRequest(tree, tree.parent / "objects", Flavour("base", options), tree.parent / "build.log", 1)


def run(tree: Path, *options: Option) -> kbuild.BuildResult:
    """Build, with the progress thrown away by pytest's capture."""
    return kbuild.build(request(tree, *options), Progress("test"))


def test_a_build_leaves_its_results_and_a_log(tmp_path: Path) -> None:
    """Out of tree: the source folder stays as it was."""
    tree = make_tree(tmp_path / "tree")
    before = sorted(tree.rglob("*"))
    result = run(tree, Option("CONFIG_KVM", "y"))
    assert result.image.read_text() == "image\n"
    assert result.release == "7.3.0-test"
    assert "CONFIG_KVM=y" in result.config.read_text()
    assert "  CC      one.o" in (tmp_path / "build.log").read_text()
    assert sorted(tree.rglob("*")) == before


def test_a_lost_option_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Before anything is built."""
    tree = make_tree(tmp_path / "tree")
    with pytest.raises(BuildError, match=r"7\.3 lost options of flavour base: CONFIG_LOSE_ME=y \(is absent\)"):
        run(tree, Option("CONFIG_KVM", "y"), Option("CONFIG_LOSE_ME", "y"))
    assert not (tmp_path / "objects" / "vmlinux").exists()


def test_an_option_that_this_release_need_not_have_is_no_error(tmp_path: Path) -> None:
    """It is reported with the result."""
    result = run(make_tree(tmp_path / "tree"), Option("CONFIG_LOSE_ME", "y", since=(7, 4)))
    assert [lost.option.name for lost in result.comparison.excused] == ["CONFIG_LOSE_ME"]


def test_a_failed_build_shows_the_first_error_and_the_log(tmp_path: Path) -> None:
    """Not the last one, and not make's echo of it."""
    action = "@echo 'mm/gup.c:10:2: error: no such thing' >&2; echo '   10 |  nonsense'; exit 2"
    with pytest.raises(BuildError) as caught:
        run(make_tree(tmp_path / "tree", action))
    head, first, second = caught.value.message.splitlines()
    assert head == "kernel build failed (exit status 2), first error:"
    assert first.strip() == "mm/gup.c:10:2: error: no such thing"
    assert second.strip() == "10 |  nonsense"
    assert caught.value.hint == f"log: {tmp_path}/build.log"


def test_a_full_disk_during_a_build_is_not_the_kernels_fault(tmp_path: Path) -> None:
    """The compiler's words are recognised: this is HarnessError, never BuildError."""
    action = "@echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1"
    with pytest.raises(HarnessError, match="no room left") as caught:
        run(make_tree(tmp_path / "tree", action))
    assert not isinstance(caught.value, BuildError)


def test_a_tree_that_was_configured_in_place_is_refused_with_both_remedies(tmp_path: Path) -> None:
    """The kernel's own complaint names only mrproper, which would cost the user's configuration."""
    tree = make_tree(tmp_path / "tree")
    (tree / ".config").touch()
    with pytest.raises(HarnessError, match="was configured in place") as caught:
        run(tree)
    assert "--in-place" in caught.value.hint
    assert f"make -C {tree} mrproper" in caught.value.hint
    in_place = BuildRequest(tree, tree, Flavour("base", ()), tmp_path / "log", 1)
    assert kbuild.build(in_place, Progress("test")).image == tree / "arch/x86/boot/bzImage"


def test_missing_tools_are_named_in_one_line_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once, so that one apt-get suffices."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("make", "ld", "awk", "bc"):
        path = shutil.which(tool)
        assert path is not None
        (folder / tool).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(HarnessError, match="building a kernel needs gcc, flex, bison, lz4") as caught:
        run(make_tree(tmp_path / "tree"))
    assert caught.value.hint.startswith("apt-get install bison flex gcc lz4 ")


def test_a_missing_header_is_found_before_the_build() -> None:
    """One that is there is not reported."""
    kbuild.require_tools({}, ["stdlib.h"])
    with pytest.raises(HarnessError, match="needs no-such-tool"):
        kbuild.require_tools({"no-such-tool": "nothing"}, ["stdlib.h"])


def test_the_callers_make_does_not_reach_into_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make selftest` exports flags and a job server; KBUILD_ and friends would build something else."""
    monkeypatch.setenv("MAKEFLAGS", " -n")
    monkeypatch.setenv("KBUILD_OUTPUT", "/nonexistent")
    monkeypatch.setenv("ARCH", "arm64")
    action = "@test -z \"$$KBUILD_OUTPUT$$ARCH\" || { echo 'x: error: leaked'; exit 1; }"
    assert run(make_tree(tmp_path / "tree", action)).image.exists()


def log_lines(*lines: str) -> str:
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            log_lines(
                "  CC      mm/a.o",
                "In file included from mm/a.c:3:",
                "include/x.h:7:1: error: unknown type name 'foo'",
                "    7 | foo bar;",
                "      | ^~~",
                "  CC      mm/b.o",
                "mm/b.c:1:1: error: later",
                "make[3]: *** [scripts/Makefile.build:243: mm/a.o] Error 1",
            ),
            ["include/x.h:7:1: error: unknown type name 'foo'", "    7 | foo bar;", "      | ^~~"],
        ),
        (
            log_lines("  LD      vmlinux.o", "ld: mm/a.o: in function `f':", "a.c:(.text+0x1): undefined reference to `g'"),
            ["ld: mm/a.o: in function `f':", "a.c:(.text+0x1): undefined reference to `g'"],
        ),
        (
            log_lines("  HOSTCC  scripts/x", "/bin/sh: 1: flex: not found", "make[1]: *** [x] Error 127"),
            ["/bin/sh: 1: flex: not found"],
        ),
        (
            log_lines("  CC      a.o", "make[1]: *** [Makefile:5: a.o] Killed", "make: *** [Makefile:9: all] Error 2"),
            ["make[1]: *** [Makefile:5: a.o] Killed"],
        ),
        (
            log_lines("ld: warning: x.o: missing .note.GNU-stack", "ld: cannot find -lelf", "make: *** [x] Error 1"),
            ["ld: cannot find -lelf"],
        ),
        (log_lines("  CC      a.o", "  CC      fs/error.o", "warning: implicit"), []),
    ],
    ids=["compiler", "linker", "shell", "only make's echo", "after a warning", "no error"],
)
def test_the_first_error_is_found(log: str, expected: list[str]) -> None:
    """Whoever reports it; what make repeats counts only where there is nothing else."""
    assert kbuild.first_error(log) == expected


INTERRUPTED = """
import signal
import sys
from pathlib import Path
from kvmgmem.lab.kernel import kbuild
from kvmgmem.lab.kernel.flavours import Flavour
from kvmgmem.lab.progress import Progress
# A shell's background job is started with Ctrl-C ignored, and so would be this.
signal.signal(signal.SIGINT, signal.default_int_handler)
tree = Path(sys.argv[1])
request = kbuild.BuildRequest(tree, tree.parent / "objects", Flavour("base", ()), tree.parent / "log", 1)
try:
    kbuild.build(request, Progress("test"))
except KeyboardInterrupt:
    sys.exit(77)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 77), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_an_interrupted_build_takes_its_children_along(tmp_path: Path, number: int, status: int) -> None:
    """Ctrl-C and SIGTERM end make and what it started, which are in a process group of their own."""
    tree = make_tree(tmp_path / "tree", "@echo $$$$ > $(out)/pid; sleep 900")
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tree)], stderr=subprocess.DEVNULL)
    try:
        pid_file = tmp_path / "objects" / "pid"
        deadline = time.monotonic() + PATIENCE
        while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(pid_file.read_text())
        os.kill(child, 0)
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
    finally:
        process.kill()
        process.wait(10)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every build has an end."""
    monkeypatch.setattr(kbuild, "BUILD_TIMEOUT", 0.5)
    started = time.monotonic()
    with pytest.raises(BuildError, match="was stopped"):
        run(make_tree(tmp_path / "tree", "@sleep 900"))
    assert time.monotonic() - started < 2 * PATIENCE


def tarball(tmp_path: Path, action: str) -> Path:
    """A source tarball as release tarballs are: one top folder."""
    tree = make_tree(tmp_path / "linux-7.3", action)
    path = tmp_path / "linux-7.3.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tree, "linux-7.3")
    return path


@pytest.fixture
def small_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy trees have no Kconfig that knows the real flavours' options, but pass all of them through."""
    monkeypatch.setattr(kernels, "load_flavour", lambda name: Flavour(name, (Option("CONFIG_KVM", "y"),)))


@pytest.mark.usefixtures("small_flavour")
def test_a_tarball_is_built_once(tmp_path: Path, cache_folder: Path) -> None:
    """The second time it comes from the cache, without make; objects are gone, image, vmlinux and config are kept."""
    counter = tmp_path / "counter"
    path = tarball(tmp_path, f"@echo built >> {counter}")
    first = kernels.build(tarball=path)
    second = kernels.build(tarball=path)
    assert first == second
    assert counter.read_text() == "built\n"
    assert sorted(file.name for file in first.image.parent.iterdir()) == ["bzImage", "config", "kernel.json", "vmlinux"]
    assert first.name.startswith("linux-7.3@")
    assert kernels.resolve("linux-7.3") == first
    assert not list((cache_folder / "objects").glob("[!.]*"))


@pytest.mark.usefixtures("small_flavour")
def test_a_tree_is_handed_to_make_every_time(tmp_path: Path) -> None:
    """What changed in it only make can tell; its objects stay for that."""
    counter = tmp_path / "counter"
    tree = make_tree(tmp_path / "linux", f"@echo built >> {counter}")
    assert kernels.build(source=tree).name == kernels.build(source=tree).name
    assert counter.read_text() == "built\nbuilt\n"
    assert len(kernels.list_kernels()) == 1


@pytest.mark.usefixtures("small_flavour")
def test_two_builds_of_one_kernel_do_the_work_once(tmp_path: Path) -> None:
    """The second process waits for the first one's lock, and finds the kernel done."""
    counter = tmp_path / "counter"
    path = tarball(tmp_path, f"@echo built >> {counter}; sleep 1")
    code = """
import sys
from pathlib import Path
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.kernel.flavours import Flavour, Option
kernels.load_flavour = lambda name: Flavour(name, (Option("CONFIG_KVM", "y"),))
print(kernels.build(tarball=Path(sys.argv[1])).image)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    assert counter.read_text() == "built\n"
    assert sum("waiting for it" in errors for _, errors in answers) == 1


@pytest.mark.usefixtures("small_flavour")
def test_a_changed_flavour_replaces_the_kernel_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built anew, and the old one does not stay behind under the same name; other flavours do."""
    path = tarball(tmp_path, "@true")
    before = kernels.build(tarball=path)
    other = kernels.build(tarball=path, options=kernels.BuildOptions("debug"))
    monkeypatch.setattr(kernels, "load_flavour", lambda name: Flavour(name, (Option("CONFIG_KVM", "m"),)))
    after = kernels.build(tarball=path)
    assert after.name == before.name
    assert after.image != before.image
    assert {kernel.image for kernel in kernels.list_kernels()} == {after.image, other.image}


@pytest.mark.usefixtures("small_flavour")
def test_what_a_running_build_uses_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernel rm --sources` beside a build says what is in use; after the build it removes it."""
    path = tarball(tmp_path, "@true")
    seen: list[str] = []

    def build_and_try_to_remove(request: BuildRequest, progress: Progress) -> kbuild.BuildResult:
        for entry in (request.tree, request.objects):
            entry.mkdir(parents=True, exist_ok=True)
            with pytest.raises(HarnessError, match="in use by another process") as caught:
                kernels._remove_locked(entry)
            seen.append(caught.value.message.split(" ")[0])
        return kbuild.build(request, progress)

    monkeypatch.setattr(kernels, "run_build", build_and_try_to_remove)
    kernels.build(tarball=path)
    assert [Path(entry).parent.name for entry in seen] == ["sources", "objects"]
    assert [name.split("/")[0] for name, _ in kernels.remove_leftovers()] == ["sources"]


@pytest.mark.usefixtures("small_flavour")
def test_a_failed_build_leaves_no_kernel(tmp_path: Path) -> None:
    """Nothing half-made is ever listed; the log is kept where the error says."""
    with pytest.raises(BuildError) as caught:
        kernels.build(tarball=tarball(tmp_path, "@exit 1"))
    assert kernels.list_kernels() == []
    assert Path(caught.value.hint.removeprefix("log: ")).read_text()


def test_a_broken_tarball_is_one_clear_error(tmp_path: Path, cache_folder: Path) -> None:
    """tar's first complaint, and no half-unpacked source that the next build would trust."""
    path = tmp_path / "linux-7.3.tar.gz"
    path.write_bytes(tarball(tmp_path / "w", "@true").read_bytes()[:300])
    with pytest.raises(HarnessError, match=r"cannot unpack linux-7\.3\.tar\.gz: "):
        kernels.build(tarball=path)
    assert not list((cache_folder / "sources").glob("[!.]*"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(HarnessError, match=r"notes\.txt is not a tarball"):
        kernels.build(tarball=tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("suffix", "program"), [(".tar", None), (".tar.gz", "gzip"), (".tar.xz", "xz"), (".tar.zst", "zstd")]
)
def test_a_tarball_is_unpacked_whole(tmp_path: Path, suffix: str, program: str | None) -> None:
    """However it is compressed, and also when it is larger than what is read at a time."""
    if program is not None and shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    content = os.urandom(3 << 20)
    (tmp_path / "big").write_bytes(content)
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        archive.add(tmp_path / "big", "linux-7.3/mm/big")
    path = tmp_path / f"linux{suffix}"
    data = (tmp_path / "plain.tar").read_bytes()
    path.write_bytes(
        data if program is None else subprocess.run([program, "-c"], input=data, capture_output=True, check=True).stdout
    )
    (tmp_path / "out").mkdir()
    with path.open("rb") as stream:
        kernel_source.unpack(stream, path.name, path.stat().st_size, tmp_path / "out", Progress("test"))
    assert (tmp_path / "out/mm/big").read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a tmpfs of its own")
def test_a_disk_that_fills_up_while_unpacking_is_said_so_and_left_empty(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tar's own words for it differ from the kernel's; nothing half-unpacked stays behind."""
    path = tarball(tmp_path, "@true")
    with tarfile.open(path, "w:gz") as archive:
        (tmp_path / "big").write_bytes(b"x" * (4 << 20))
        archive.add(tmp_path / "big", "linux-7.3/big")
    cache_folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "kvmgmem-test", str(cache_folder)]
    if subprocess.run(mount, timeout=30, check=False).returncode != 0:
        pytest.skip("this root may not mount a tmpfs")
    try:
        before = cache.free_bytes(cache_folder)
        monkeypatch.setattr(kernel_source, "SOURCE_BYTES", 1)
        with pytest.raises(HarnessError, match="no room left"):
            kernels.build(tarball=path)
        assert not list((cache_folder / "sources").glob("[!.]*"))
        assert cache.free_bytes(cache_folder) >= before - 65536
    finally:
        subprocess.run(["umount", str(cache_folder)], timeout=30, check=True)
