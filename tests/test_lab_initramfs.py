"""The guest's image: the archive format, what goes in, what is left out, and that an unchanged one costs nothing."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.guest import rewritten_tests
from kvmgmem.lab.guest.initramfs import (
    Entry,
    Image,
    ImageRequest,
    Item,
    Treatment,
    archive,
    base_items,
    build_image,
    guest_site_packages,
    guest_stdlib,
    parse_ldd,
    project_items,
    pytest_ini,
    remove_unused,
    render,
    required_distributions,
    trim_elf,
)
from kvmgmem.lab.guest.rewritten_tests import rewritten_test


def members(data: bytes) -> Iterator[Entry]:
    """Read a newc archive, all its parts, independently of the writer."""
    position = 0
    while position < len(data):
        if data[position : position + 6] != b"070701":
            assert data[position] == 0, "between archives there are only zeroes"
            position += 1
            continue
        field = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        _, mode, _, _, _, mtime, size, _, _, major, minor, name_size, check = field
        assert check == 0
        name_end = position + 110 + name_size
        name = data[position + 110 : name_end - 1].decode()
        assert data[name_end - 1] == 0
        start = -(-name_end // 4) * 4
        position = -(-(start + size) // 4) * 4
        if name != "TRAILER!!!":
            yield Entry(f"/{name}", mode, data[start : start + size], mtime, (major, minor))


@pytest.fixture
def selftests(tmp_path: Path) -> Path:
    """A small directory of tests, in a project with a pytest configuration."""
    directory = tmp_path / "project/selftests"
    (directory / "deeper").mkdir(parents=True)
    (directory / "test_one.py").write_text("def test_one():\n    assert 1 + 1 == 2\n")
    (directory / "deeper/data.txt").write_text("data")
    (directory / "__pycache__").mkdir()
    (directory / "__pycache__/test_one.pyc").write_bytes(b"stale")
    (tmp_path / "project/pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "--strict-markers"\nxfail_strict = true\n'
        'filterwarnings = ["error", "default::X"]\n'
    )
    return directory


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    """The kernel's own rule book is the format's; busybox or GNU cpio must agree with our writer."""
    data = archive(
        [
            Entry("/a/b/file", stat.S_IFREG | 0o755, b"12345", mtime=1_600_000_000),
            Entry("/a/link", stat.S_IFLNK | 0o777, b"b/file"),
            Entry("/empty", stat.S_IFREG | 0o600),
        ]
    )
    assert len(data) % 512 == 0
    for tool in (["cpio", "-idm", "--quiet"], ["busybox", "cpio", "-idm"]):
        directory = tmp_path / tool[0]
        directory.mkdir()
        try:
            subprocess.run(tool, input=data, cwd=directory, check=True, capture_output=True)
        except FileNotFoundError:
            continue
        assert (directory / "a/b/file").read_bytes() == b"12345"
        assert (directory / "a/b/file").stat().st_mode & 0o777 == 0o755
        assert (directory / "a/b/file").stat().st_mtime == 1_600_000_000
        assert (directory / "a/link").readlink() == Path("b/file")
        return
    pytest.skip("neither cpio nor busybox is installed")


def test_an_archive_is_the_same_every_time_and_parents_come_first() -> None:
    """Order of entries does not matter; the kernel makes no directory that it was not told of."""
    entries = [Entry("/z/y/x", stat.S_IFREG | 0o644, b"x"), Entry("/a", stat.S_IFREG | 0o644, b"a")]
    assert archive(entries) == archive(reversed(entries))
    assert [entry.path for entry in members(archive(entries))] == ["/a", "/z", "/z/y", "/z/y/x"]


def test_a_device_keeps_its_numbers() -> None:
    """Without /dev/console init has no standard streams."""
    (dev, console) = members(archive([Entry("/dev/console", stat.S_IFCHR | 0o600, device=(5, 1))]))
    assert stat.S_ISDIR(dev.mode)
    assert (stat.S_ISCHR(console.mode), console.device) == (True, (5, 1))


def test_a_trimmed_program_still_runs(tmp_path: Path) -> None:
    """The loader does not miss what trimming removes; `true` with its sections cut off still succeeds."""
    original = Path("/bin/true").resolve().read_bytes()
    trimmed = trim_elf(original)
    assert len(trimmed) < len(original)
    program = tmp_path / "true"
    program.write_bytes(trimmed)
    program.chmod(0o755)
    assert subprocess.run([program], check=False).returncode == 0
    assert trim_elf(b"#!/bin/sh\n") == b"#!/bin/sh\n"


def test_ldd_is_read() -> None:
    """Found libraries, the loader, the vDSO, and a file for which something is missing."""
    found = parse_ldd(
        "/usr/bin/python3:\n"
        "\tlinux-vdso.so.1 (0x00007ffd)\n"
        "\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f01)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n"
        "/x/_gdbm.so:\n"
        "\tlibgdbm.so.6 => not found\n"
        "/x/static:\n"
        "\tstatically linked\n"
    )
    assert found.by_name == (("libm.so.6", Path("/lib/x86_64-linux-gnu/libm.so.6")),)
    assert found.interpreter == Path("/lib64/ld-linux-x86-64.so.2")
    assert found.broken == {Path("/x/_gdbm.so")}


def test_the_base_has_what_is_used_and_leaves_out_what_is_not() -> None:
    """pytest and its requirements, psutil and the rest are in; test suites, GUI, pip and compilers are not."""
    targets = {item.target for item in base_items()}
    site = guest_site_packages()
    for wanted in (
        "/usr/bin/python3",
        f"{guest_stdlib()}/os.py",
        f"{site}/pytest/__init__.py",
        f"{site}/_pytest/main.py",
        f"{site}/pluggy/__init__.py",
        f"{site}/psutil/__init__.py",
        f"{site}/pyroute2/netlink/uevent/__init__.py",
    ):
        assert wanted in targets
    assert any("/_cffi_backend" in target for target in targets)
    for unwanted in ("/idlelib/", "/tkinter/", "/test/", "/ensurepip/", "/pip/", "/setuptools/", "/mypy/", "__pycache__"):
        assert not [target for target in targets if unwanted in target]


def test_requirements_are_followed() -> None:
    """What a distribution requires on this interpreter comes along; extras and build tools do not."""
    found = required_distributions(["pytest", "cffi"])
    assert {"pytest", "pluggy", "iniconfig", "packaging", "cffi"} <= set(found)
    assert not {"hypothesis", "colorama", "pycparser"} & set(found)
    with pytest.raises(HarnessError, match="no-such-distribution"):
        required_distributions(["no-such-distribution"])


def test_tests_keep_their_times_and_bring_rewritten_bytecode(selftests: Path) -> None:
    """Some versions of pytest take their cache only if the source's time is what the cache says."""
    source = selftests / "test_one.py"
    os.utime(source, (1_650_000_000, 1_650_000_000))
    script, bytecode = render(Item("/kvmgmem/selftests/test_one.py", source, Treatment.TEST))
    assert script.mtime == 1_650_000_000
    assert bytecode.path.startswith("/kvmgmem/selftests/__pycache__/test_one.cpython-")
    assert "-pytest-" in bytecode.path
    assert "/__pycache__/" in bytecode.path


def test_pytest_itself_takes_the_rewritten_bytecode(selftests: Path, tmp_path: Path) -> None:
    """The reader of that cache in this very pytest finds nothing wrong with it."""
    from _pytest.assertion.rewrite import _read_pyc

    _, bytecode = render(Item(str(selftests / "test_one.py"), selftests / "test_one.py", Treatment.TEST))
    cache = tmp_path / "cache.pyc"
    cache.write_bytes(bytecode.data)
    complaints: list[str] = []
    assert _read_pyc(selftests / "test_one.py", cache, complaints.append) is not None, complaints


def test_what_was_rewritten_is_kept_until_the_test_changes(
    selftests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing is rewritten, and the result is the same; another text is another file's business."""
    source, kept = selftests / "test_one.py", tmp_path / "kept"
    first = rewritten_test("/kvmgmem/selftests/test_one.py", source, kept)
    assert first is not None
    monkeypatch.setattr(rewritten_tests, "_code", lambda text, target: b"made anew")
    assert rewritten_test("/kvmgmem/selftests/test_one.py", source, kept) == first
    for other in ("/kvmgmem/selftests/test_two.py", "/kvmgmem/selftests/test_one.py"):
        if other.endswith("test_one.py"):
            source.write_text("def test_one():\n    assert 1 + 1 == 3\n")
        rewritten_test(other, source, kept)
    assert sum(path.read_bytes() == b"made anew" for path in kept.iterdir()) == 2
    rewritten_tests.remove_unused(kept)
    assert len(list(kept.iterdir())) == 3
    os.utime(next(kept.iterdir()), (1, 1))
    rewritten_tests.remove_unused(kept)
    assert len(list(kept.iterdir())) == 2


def test_the_project_layer_holds_the_tests_under_their_own_name(selftests: Path) -> None:
    """Node ids in the guest are those of a host; caches and hidden files stay behind."""
    targets = [item.target for item in project_items(ImageRequest(selftests))]
    assert "/kvmgmem/selftests/test_one.py" in targets
    assert "/kvmgmem/selftests/deeper/data.txt" in targets
    assert not [target for target in targets if "__pycache__" in target]
    assert f"{guest_site_packages()}/kvmgmem/lab/guest/init.py" in targets


def test_modules_are_named_in_their_order(selftests: Path, tmp_path: Path) -> None:
    """The guest loads them by name, so the names carry the order."""
    modules = [tmp_path / name for name in ("virtio.ko", "kvm-amd.ko.xz")]
    targets = [item.target for item in project_items(ImageRequest(selftests, modules=tuple(modules)))]
    assert targets[-2:] == ["/lib/kvmgmem-modules/000-virtio.ko", "/lib/kvmgmem-modules/001-kvm-amd.ko"]


def test_the_guests_pytest_has_the_projects_options(selftests: Path) -> None:
    """Strictness is the same in a guest as on a host; only the cache is off there."""
    assert pytest_ini(selftests) == (
        "[pytest]\n"
        "addopts = --strict-markers -p no:cacheprovider\n"
        "filterwarnings = \n    error\n    default::X\n"
        "testpaths = selftests\n"
        "xfail_strict = true\n"
    )


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the tests that build, so that the base is built once."""
    return tmp_path_factory.mktemp("cache")


def build(selftests: Path, cache: Path) -> Image:
    """An image of these tests."""
    return build_image(ImageRequest(selftests), cache)


def test_only_what_changed_is_built(selftests: Path, shared_cache: Path) -> None:
    """An unchanged image is found again; an edited test costs the small layer only; going back costs nothing."""
    first = build(selftests, shared_cache)
    assert first.built_project
    again = build(selftests, shared_cache)
    assert (again.path, again.built_base, again.built_project) == (first.path, False, False)
    before = (selftests / "test_one.py").stat()
    (selftests / "test_one.py").write_text("def test_one():\n    assert True\n")
    edited = build(selftests, shared_cache)
    assert (edited.built_base, edited.built_project) == (False, True)
    assert edited.path != first.path
    (selftests / "test_one.py").write_text("def test_one():\n    assert 1 + 1 == 2\n")
    os.utime(selftests / "test_one.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build(selftests, shared_cache).built_project is False


def test_a_library_that_changed_makes_a_new_base(selftests: Path, shared_cache: Path) -> None:
    """Libraries are found by the loader, not listed: the base remembers what they were."""
    build(selftests, shared_cache)
    (manifest,) = shared_cache.glob("base-*.json")
    manifest.write_text(manifest.read_text().replace("libc.so.6", "libc.so.7"))
    assert build(selftests, shared_cache).built_base


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can chroot into the image")
def test_the_images_python_imports_what_a_guest_needs(selftests: Path, shared_cache: Path, tmp_path: Path) -> None:
    """Unpacked and entered, the image's interpreter stands on its own."""
    for entry in members(build(selftests, shared_cache).path.read_bytes()):
        path = tmp_path / "root" / entry.path.removeprefix("/")
        if stat.S_ISDIR(entry.mode):
            path.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.unlink(missing_ok=True)
            path.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
            path.chmod(stat.S_IMODE(entry.mode))
    program = (
        "import sys, pytest, psutil, _cffi_backend, ctypes, asyncio, multiprocessing, hashlib, random, socket\n"
        "from pyroute2.netlink.uevent import UeventSocket\n"
        "import kvmgmem.lab.guest.init, kvmgmem.results.records, kvmgmem.catalogue.contract\n"
        "print(sys.version_info[:2], sys.prefix, hashlib.sha256(b'').hexdigest()[:8])\n"
    )
    done = subprocess.run(
        ["chroot", str(tmp_path / "root"), "/usr/bin/python3", "-I", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout == f"{sys.version_info[:2]} /usr e3b0c442\n"


def test_images_that_nobody_asks_for_are_removed(tmp_path: Path) -> None:
    """Every edit of a test makes an image; the newest stay, and so does what somebody may be about to boot."""
    now = time.time()
    for number in range(6):
        (tmp_path / f"initramfs-{number}.cpio").touch()
        os.utime(tmp_path / f"initramfs-{number}.cpio", (now - 1000 * number, now - 1000 * number))
    for name in ("base-old", "base-new"):
        (tmp_path / f"{name}.cpio").touch()
        (tmp_path / f"{name}.json").touch()
    os.utime(tmp_path / "base-old.cpio", (now - 9999, now - 9999))
    remove_unused(tmp_path, keep=1, age=3500)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*(f"initramfs-{number}.cpio" for number in range(4)), "base-new.cpio", "base-new.json"}


def test_no_directory_of_tests_is_an_error(tmp_path: Path) -> None:
    """The message names the directory."""
    with pytest.raises(HarnessError, match="nowhere"):
        build_image(ImageRequest(tmp_path / "nowhere"), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_an_error(selftests: Path, tmp_path: Path) -> None:
    """A file where the cache should be, as an example that root cannot override."""
    (tmp_path / "file").touch()
    with pytest.raises((HarnessError, NotADirectoryError)):
        build_image(ImageRequest(selftests), tmp_path / "file" / "cache")
