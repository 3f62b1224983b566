"""Guest kernels: what counts as an image, which kernel a name means, and what the cache keeps."""

import argparse
import json
import os
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.kernel.apt import AptArchive, Package
from kvmgmem.lab.kernel.image import image_release
from kvmgmem.lab.kernel.kernel_cli import add_kernel_parser, run_kernel
from kvmgmem.lab.kernel.kernels import Kernel
from kvmgmem.lab.kernel.source import choose_source, is_release, tarball_origin, tree_origin


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVMGMEM_CACHE", str(folder))
    return folder


def bzimage(release: str) -> bytes:
    """The parts of a bzImage that identify it: magic at 0x202, offset of the version string less 0x200 at 0x20e."""
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x600).to_bytes(2, "little")
    version = f"{release} (someone@example.invalid) #1 SMP\0".encode()
    image[0x800 : 0x800 + len(version)] = version
    return bytes(image)


def elf(kind: int, machine: int, content: bytes = b"") -> bytes:
    """An ELF header of that e_type and e_machine, with some content after it."""
    head = bytearray(64)
    head[0:4] = b"\x7fELF"
    head[16:18] = kind.to_bytes(2, "little")
    head[18:20] = machine.to_bytes(2, "little")
    return bytes(head) + content


def cached(folder: Path, name: str, release: str, *, flavour: str | None, used: float) -> Kernel:
    """A kernel in the cache, as a build leaves it, last asked for at time `used`."""
    entry = folder / "kernels" / name.replace("/", "-")
    entry.mkdir(parents=True)
    (entry / "bzImage").write_bytes(bzimage(release))
    kernel = Kernel(name, entry / "bzImage", release, flavour=flavour, built=used)
    kernels.save(kernel, entry, {})
    os.utime(entry / "kernel.json", (used, used))
    return kernel


def test_a_bzimage_tells_its_release(tmp_path: Path) -> None:
    """The boot header says where the version string is."""
    (tmp_path / "image").write_bytes(bzimage("7.3.4-kvmgmem-base"))
    assert image_release(tmp_path / "image") == "7.3.4-kvmgmem-base"


def test_a_vmlinux_tells_its_release_wherever_its_banner_is(tmp_path: Path) -> None:
    """Also when the banner lies across the boundary of what is read at a time."""
    for padding in (10, (1 << 20) - 64 - 5, 3 << 20):
        content = b"\0" * padding + b"Linux version 7.3.4-x (me) #1\0"
        (tmp_path / "vmlinux").write_bytes(elf(2, 62, content))
        assert image_release(tmp_path / "vmlinux") == "7.3.4-x", padding
    (tmp_path / "vmlinux").write_bytes(elf(2, 62))
    assert image_release(tmp_path / "vmlinux") == "unknown"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a kernel image"),
        (b"#!/bin/sh\n", "is not a kernel image"),
        (b"\0" * 0x202 + b"HdrX" + b"\0" * 100, "is not a kernel image"),
        (elf(1, 62), "is an ELF file, but not an x86-64 kernel"),
        (elf(2, 183), "is an ELF file, but not an x86-64 kernel"),
    ],
    ids=["empty", "script", "almost", "module", "arm64"],
)
def test_what_is_no_kernel_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    """The path and what it lacks, in one line."""
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(HarnessError, match=message) as caught:
        kernels.resolve(str(path))
    assert str(path) in caught.value.message


def test_a_path_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """A path is recognised as one although nothing is there."""
    with pytest.raises(HarnessError, match="no such kernel image"):
        kernels.resolve(str(tmp_path / "missing"))
    with pytest.raises(HarnessError, match="holds no built kernel") as caught:
        kernels.resolve(str(tmp_path))
    assert f"--source {tmp_path}" in caught.value.hint


def test_an_image_in_a_build_tree_brings_its_vmlinux_and_configuration(tmp_path: Path) -> None:
    """By the image's path and by the tree's alike."""
    boot = tmp_path / "arch/x86/boot"
    boot.mkdir(parents=True)
    (boot / "bzImage").write_bytes(bzimage("7.3.4"))
    (tmp_path / "vmlinux").write_bytes(elf(2, 62))
    (tmp_path / ".config").write_text("CONFIG_KVM=y\n")
    for spec in (tmp_path, boot / "bzImage"):
        kernel = kernels.resolve(str(spec))
        assert kernel.image == boot / "bzImage"
        assert kernel.vmlinux == tmp_path / "vmlinux"
        assert kernel.config == tmp_path / ".config"
        assert kernel.release == "7.3.4"
        assert kernel.flavour is None


def test_a_lone_image_has_no_companions(tmp_path: Path) -> None:
    """Nothing is made up."""
    (tmp_path / "bzImage").write_bytes(bzimage("7.3.4"))
    kernel = kernels.resolve(str(tmp_path / "bzImage"))
    assert (kernel.vmlinux, kernel.config, kernel.config_hash, kernel.modules) == (None, None, None, ())


def test_names_mean_what_they_say(cache_folder: Path) -> None:
    """Release, patch release, package version, flavour; without a flavour it is base, also if another is newer."""
    cached(cache_folder, "7.3.4-1~bpo13+1/base", "7.3.4-kvmgmem-base", flavour="base", used=100)
    cached(cache_folder, "7.3.4-1~bpo13+1/debug", "7.3.4-kvmgmem-debug", flavour="debug", used=400)
    cached(cache_folder, "6.12.94-1/base", "6.12.94-kvmgmem-base", flavour="base", used=300)
    cached(cache_folder, "linux@0123abcd/base", "7.4.0-rc1-kvmgmem-base", flavour="base", used=200)
    cached(cache_folder, "mine@4567cdef/base", "7.3.4-kvmgmem-base+", flavour="base", used=250)
    for spec, name in {
        "7.3": "7.3.4-1~bpo13+1/base",
        "7.3.4": "7.3.4-1~bpo13+1/base",
        "7.3.4-1~bpo13+1": "7.3.4-1~bpo13+1/base",
        "7.3.4-kvmgmem-base": "7.3.4-1~bpo13+1/base",
        "7.3/debug": "7.3.4-1~bpo13+1/debug",
        "debug": "7.3.4-1~bpo13+1/debug",
        "base": "6.12.94-1/base",
        "6.12": "6.12.94-1/base",
        "linux": "linux@0123abcd/base",
        "mine": "mine@4567cdef/base",
        "7.3.4-kvmgmem-base+": "mine@4567cdef/base",
        "linux/base": "linux@0123abcd/base",
        "7.4": "linux@0123abcd/base",
    }.items():
        assert kernels.resolve(spec).name == name, spec
    assert kernels.resolve(None).name == "6.12.94-1/base", "the debug kernel is newer, and nobody asked for a slow one"
    for spec in ("6.1", "7", "7.3.40", "6.12/debug", "4"):
        with pytest.raises(HarnessError, match=f"no kernel in the cache is called {spec} "):
            kernels.resolve(spec)


def test_an_unknown_name_says_how_to_make_it() -> None:
    """The hint is the command."""
    for spec, hint in {
        "7.9": "make it: kvmgmem kernel build 7.9",
        "7.9/debug": "make it: kvmgmem kernel build 7.9 --flavour debug",
        "7.9/distribution": "get it: kvmgmem kernel fetch 7.9",
        "linux": "give a path, a name as `kvmgmem kernel list` prints it, or a release such as 7.3, 7.3/debug",
    }.items():
        with pytest.raises(HarnessError) as caught:
            kernels.resolve(spec)
        assert caught.value.hint == hint
    with pytest.raises(HarnessError, match="no kernel has been built yet"):
        kernels.resolve(None)


@pytest.mark.parametrize(
    ("version", "release", "expected"),
    [
        ("7.3.4-1~bpo13+1", "7.3", True),
        ("7.3.4-1", "7.3.4", True),
        ("7.3~rc7-1", "7.3", True),
        ("7.3.40-1", "7.3.4", False),
        ("7.30.1-1", "7.3", False),
        ("7.3.4-1", "7.3.4-1", True),
        ("17.3.4", "7.3", False),
        ("7.3.4-1", "7", False),
    ],
)
def test_a_release_is_not_a_prefix(version: str, release: str, expected: bool) -> None:
    """7.3 is not 7.30."""
    assert is_release(version, release) is expected


def test_a_record_survives_the_cache_being_moved(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in it are relative; modules keep their order."""
    entry = cache_folder / "kernels" / "k"
    entry.mkdir(parents=True)
    (entry / "bzImage").write_bytes(bzimage("7.3.4"))
    modules = (entry / "modules" / "kvm.ko", entry / "modules" / "kvm-amd.ko")
    kernels.save(Kernel("n", entry / "bzImage", "7.3.4", vmlinux=entry / "vmlinux", modules=modules), entry, {})
    moved = cache_folder.rename(cache_folder.with_name("moved"))
    monkeypatch.setenv("KVMGMEM_CACHE", str(moved))
    (kernel,) = kernels.list_kernels()
    assert kernel.image == moved / "kernels/k/bzImage"
    assert kernel.vmlinux == moved / "kernels/k/vmlinux"
    assert [module.relative_to(moved) for module in kernel.modules] == [
        Path("kernels/k/modules/kvm.ko"),
        Path("kernels/k/modules/kvm-amd.ko"),
    ]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "x"}'])
def test_a_damaged_entry_is_left_out(cache_folder: Path, damage: str) -> None:
    """One bad record does not take the list with it."""
    good = cached(cache_folder, "7.3.4-1/base", "7.3.4", flavour="base", used=1)
    bad = cached(cache_folder, "7.2.0-1/base", "7.2.0", flavour="base", used=2)
    (bad.image.parent / "kernel.json").write_text(damage)
    assert [kernel.name for kernel in kernels.list_kernels()] == [good.name]


def test_remove_takes_only_what_is_named(cache_folder: Path) -> None:
    """One unknown name among them, and nothing is removed."""
    cached(cache_folder, "7.3.4-1/base", "7.3.4", flavour="base", used=1)
    cached(cache_folder, "6.12.94-1/base", "6.12.94", flavour="base", used=2)
    with pytest.raises(HarnessError, match=r"no kernel in the cache is called 5\.9"):
        kernels.remove(["7.3", "5.9"])
    assert len(kernels.list_kernels()) == 2
    ((name, freed),) = kernels.remove(["7.3"])
    assert name == "7.3.4-1/base"
    assert freed > 0
    assert [kernel.name for kernel in kernels.list_kernels()] == ["6.12.94-1/base"]


class FakeArchive(AptArchive):
    """An archive that offers what it is told to, newest first."""

    def __init__(self, *packages: Package) -> None:
        self.packages = list(packages)

    def find(self, pattern: str, refresh: bool = False) -> list[Package]:
        """Everything there is."""
        return self.packages


RC = Package("linux-source-7.4", "7.4~rc1-1~exp1", "experimental/main")
NEW = Package("linux-source-7.3", "7.3.4-1", "sid/main")
NEW_RC = Package("linux-source-7.3", "7.3~rc7-1", "experimental/main")
OLD = Package("linux-source-6.12", "6.12.94-1", "trixie/main")


@pytest.mark.parametrize(
    ("release", "expected"), [(None, NEW), ("7.3", NEW), ("7.4", RC), ("6.12", OLD), ("7.3~rc7", NEW_RC)]
)
def test_a_finished_release_is_preferred_to_a_candidate(release: str | None, expected: Package) -> None:
    """A release candidate is taken only when there is nothing else of that name."""
    assert choose_source(FakeArchive(RC, NEW, NEW_RC, OLD), release) == expected


def test_a_release_that_no_suite_has_is_refused_with_those_there_are() -> None:
    """So that the next command can be typed without a search."""
    with pytest.raises(HarnessError, match=r"linux-source package for 5\.10") as caught:
        choose_source(FakeArchive(NEW, NEW_RC, OLD), "5.10")
    assert "there is 7.3, 6.12;" in caught.value.hint


def test_trees_and_tarballs_are_told_apart(tmp_path: Path) -> None:
    """Two trees of one name have two keys, and a tarball's key follows its content, not its path."""
    keys = set()
    for parent in ("a", "b"):
        tree = tmp_path / parent / "linux"
        tree.mkdir(parents=True)
        (tree / "Makefile").write_text("VERSION = 7\nPATCHLEVEL = 3\n")
        (tree / "Kconfig").touch()
        keys.add(tree_origin(tree).key)
    assert len(keys) == 2
    first, second = tmp_path / "linux-7.3.tar.xz", tmp_path / "b" / "linux-7.3.tar.xz"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    assert tarball_origin(first).key == tarball_origin(second).key
    second.write_bytes(b"2")
    assert tarball_origin(first).key != tarball_origin(second).key
    with pytest.raises(HarnessError, match="is not a kernel source tree"):
        tree_origin(tmp_path)
    with pytest.raises(HarnessError, match=r"cannot read .*missing"):
        tarball_origin(tmp_path / "missing")


def command_line(*arguments: str) -> int:
    """Run the `kernel` verb as the command line does."""
    parser = argparse.ArgumentParser()
    add_kernel_parser(parser.add_subparsers(dest="verb"))
    return run_kernel(parser.parse_args(["kernel", *arguments]))


def test_list_shows_every_kernel(cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each for people, an object each for programs."""
    assert command_line("list") == 0
    assert "kvmgmem kernel build" in capsys.readouterr().out
    cached(cache_folder, "7.3.4-1/base", "7.3.4-kvmgmem-base", flavour="base", used=1)
    command_line("list")
    assert "7.3.4-1/base  7.3.4-kvmgmem-base" in capsys.readouterr().out
    command_line("list", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["name"] == "7.3.4-1/base"
    assert record["image"] == str(cache_folder / "kernels/7.3.4-1-base/bzImage")


def test_rm_without_a_name_removes_nothing(cache_folder: Path) -> None:
    """It is a usage error, not "everything"."""
    cached(cache_folder, "7.3.4-1/base", "7.3.4", flavour="base", used=1)
    with pytest.raises(HarnessError, match="nothing to remove") as caught:
        command_line("rm")
    assert caught.value.code == 2
    assert len(kernels.list_kernels()) == 1


def test_rm_sources_keeps_the_kernels(cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can be made again goes, what was made stays."""
    cached(cache_folder, "7.3.4-1/base", "7.3.4", flavour="base", used=1)
    for folder in ("sources/7.3.4-1", "objects/7.3.4-1-base"):
        (cache_folder / folder).mkdir(parents=True)
        (cache_folder / folder / "file").write_bytes(b"x" * 5_000_000)
    assert [entry.parent.name for entry in kernels.leftovers()] == ["sources", "objects"]
    command_line("list")
    assert "kept for further builds: sources/7.3.4-1, objects/7.3.4-1-base" in capsys.readouterr().out
    assert command_line("rm", "--sources") == 0
    assert "removed sources/7.3.4-1 (5 MB)" in capsys.readouterr().out
    assert not list(cache_folder.glob("sources/[!.]*"))
    assert len(kernels.list_kernels()) == 1


@pytest.mark.parametrize("jobs", ["0", "-1", "many", "1.5"])
def test_jobs_that_are_no_number_are_a_usage_error(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse says which argument, and exits with 2."""
    with pytest.raises(SystemExit) as caught:
        command_line("build", f"--jobs={jobs}")
    assert caught.value.code == 2
    assert "is not a number of jobs" in capsys.readouterr().err


def test_sources_of_a_build_exclude_each_other(tmp_path: Path) -> None:
    """Not silently one of them."""
    with pytest.raises(HarnessError, match="exclude each other") as caught:
        kernels.build("7.3", source=tmp_path)
    assert caught.value.code == 2


def test_rm_takes_the_kept_guests_along(cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest kept of a kernel that is gone is of no use; sources and other kernels stay."""
    cached(cache_folder, "7.3.4-1/base", "7.3.4", flavour="base", used=1)
    cached(cache_folder, "7.2.1-1/base", "7.2.1", flavour="base", used=1)
    (cache_folder / "snapshots/0123").mkdir(parents=True)
    (cache_folder / "snapshots/0123/state").write_bytes(b"x" * 5_000_000)
    assert command_line("rm", "7.3") == 0
    assert "removed the guests kept since they had booted (5 MB)" in capsys.readouterr().out
    assert not list(cache_folder.glob("snapshots/*"))
    assert [kernel.name for kernel in kernels.list_kernels()] == ["7.2.1-1/base"]
