"""Ready-made kernels: which package is meant, which modules a guest needs, and in which order."""

import gzip
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel import fetch as kernel_fetch
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.kernel import source as kernel_source
from kvmgmem.lab.kernel.apt import AptArchive, Package
from kvmgmem.lab.kernel.modules import dependencies, load_order, module_name, read_module
from kvmgmem.lab.progress import Progress

RELEASE = "7.3.4+deb13-amd64"


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("KVMGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def module(depends: str = "", softdep: str = "") -> bytes:
    """A module as far as its .modinfo section goes: words that end in zero bytes, among other data."""
    words = ["license=GPL", *([f"softdep={softdep}"] if softdep else []), f"depends={depends}", "name=x"]
    return b"\x7fELF" + b"\1" * 60 + b"\0" + b"".join(word.encode() + b"\0" for word in words) + b"\2" * 60


def write_modules(folder: Path, **modules: bytes) -> Path:
    """Module files, xz as Debian ships them; underscores in names become dashes in files."""
    for name, content in modules.items():
        path = folder / "kernel/drivers" / f"{name.replace('_', '-')}.ko.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(content))
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/char/virtio_console.ko\n")
    return folder


def names(paths: list[Path]) -> list[str]:
    """Module names in order."""
    return [module_name(path) for path in paths]


def test_a_module_comes_after_what_it_depends_on(tmp_path: Path) -> None:
    """Through several levels, each module once, soft dependencies only where they exist."""
    folder = write_modules(
        tmp_path,
        kvm=module("irqbypass", "pre: absent_one nice_one post: never"),
        kvm_amd=module("kvm,ccp"),
        kvm_intel=module("kvm"),
        ccp=module("rng-core"),
        rng_core=module(),
        irqbypass=module(),
        nice_one=module(),
        never=module(),
        unrelated=module(),
    )
    assert names(load_order(folder)) == ["irqbypass", "nice_one", "kvm", "rng_core", "ccp", "kvm_amd", "kvm_intel"]


def test_a_module_that_is_neither_a_file_nor_built_in_is_named(tmp_path: Path) -> None:
    """Whether it is wanted for itself or by another module; one that is merely welcome is left out in silence."""
    folder = write_modules(tmp_path, kvm=module("irqbypass"))
    with pytest.raises(HarnessError, match="no module irqbypass"):
        load_order(folder)
    write_modules(tmp_path, irqbypass=module())
    assert names(load_order(folder)) == ["irqbypass", "kvm"]
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    with pytest.raises(HarnessError, match="no module virtio_console"):
        load_order(folder)


def test_what_is_built_in_needs_no_file(tmp_path: Path) -> None:
    """A dependency too."""
    folder = write_modules(tmp_path, kvm=module("irqbypass"))
    with (folder / "modules.builtin").open("a") as builtin:
        builtin.write("kernel/virt/lib/irqbypass.ko\n")
    assert names(load_order(folder)) == ["kvm"]


def test_dependencies_are_read_from_modinfo() -> None:
    """Dashes become underscores; `post` soft dependencies load later and are none of ours."""
    assert dependencies(module("a,b-c", "pre: d e-f post: g")) == (["a", "b_c"], ["d", "e_f"])
    assert dependencies(module()) == ([], [])
    assert dependencies(module("", "post: g")) == ([], [])
    assert dependencies(b"xdepends=a\0") == ([], [])


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_modules_are_decompressed(tmp_path: Path, suffix: str) -> None:
    """A guest loads plain files: not every kernel can decompress them itself."""
    if suffix == ".zst" and shutil.which("zstd") is None:
        pytest.skip("needs zstd")
    content = module("a") * 100
    path = tmp_path / f"m.ko{suffix}"
    match suffix:
        case ".xz":
            path.write_bytes(lzma.compress(content))
        case ".gz":
            path.write_bytes(gzip.compress(content))
        case ".zst":
            path.write_bytes(subprocess.run(["zstd", "-c"], input=content, capture_output=True, check=True).stdout)
        case _:
            path.write_bytes(content)
    assert read_module(path) == content
    if suffix:
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(HarnessError, match=f"cannot unpack the module {path.name}"):
            read_module(path)


def test_only_plain_images_are_kernels_to_fetch() -> None:
    """Not the realtime, cloud, debug-symbol, unsigned and meta packages that lie beside them."""
    offered = [
        "linux-image-7.3.4+deb13-amd64",
        "linux-image-6.1.0-50-amd64",
        "linux-image-6.8.0-31-generic",
        "linux-image-7.3-amd64",
        "linux-image-amd64",
        "linux-image-7.3.4+deb13-amd64-dbg",
        "linux-image-7.3.4+deb13-rt-amd64",
        "linux-image-7.3.4+deb13-cloud-amd64",
        "linux-image-6.12.94+deb13-amd64-unsigned",
        "linux-image-amd64-signed-template",
    ]
    pattern = kernel_fetch._IMAGE.pattern
    assert [name for name in offered if re.fullmatch(pattern, name)] == offered[:4]


class FakeArchive(AptArchive):
    """An archive on disk: packages by name, each with its .deb and what it depends on."""

    packages: dict[str, tuple[Path, list[str]]]

    def __init__(self, progress: Progress, root: Path | None = None) -> None:
        pass

    def find(self, pattern: str, refresh: bool = False) -> list[Package]:
        """Every image there is."""
        return [Package(name, "7.3.4-1", "sid/main") for name in self.packages if name.startswith("linux-image-")]

    def depends(self, package: Package) -> list[str]:
        """As the control data would say."""
        return self.packages[package.name][1]

    def download(self, package: Package, folder: Path) -> Path:
        """A copy of the file."""
        return Path(shutil.copy(self.packages[package.name][0], folder / f"{package.name}.deb"))


def make_deb(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A package that holds these files."""
    tree = folder / name
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 7.3.4-1\nArchitecture: all\nMaintainer: a <a@example.invalid>\nDescription: a test\n"
    )
    deb = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(deb)], check=True, capture_output=True, timeout=60)
    return deb


def image() -> bytes:
    """A bzImage that says its release."""
    content = bytearray(0x1000)
    content[0x202:0x206] = b"HdrS"
    content[0x20E:0x210] = (0x600).to_bytes(2, "little")
    content[0x800 : 0x800 + len(RELEASE) + 2] = f"{RELEASE} \0".encode()
    return bytes(content)


def module_files(prefix: str) -> dict[str, bytes]:
    """KVM's modules and what they need, in a package's folder."""
    return {
        f"{prefix}/kernel/kvm.ko.xz": lzma.compress(module("irqbypass")),
        f"{prefix}/kernel/irqbypass.ko.xz": lzma.compress(module()),
        f"{prefix}/kernel/other.ko.xz": lzma.compress(module()),
        f"{prefix}/modules.builtin": b"kernel/virtio_pci.ko\nkernel/virtio_console.ko\n",
    }


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
@pytest.mark.parametrize("layout", ["one package", "several packages"])
def test_a_ready_made_kernel_is_fetched_with_its_modules(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """From both layouts: all in one package, or a package that depends on those with image, config and modules."""
    name = f"linux-image-{RELEASE}"
    modules = f"usr/lib/modules/{RELEASE}"
    if layout == "one package":
        boot = {f"boot/vmlinuz-{RELEASE}": image(), f"boot/config-{RELEASE}": b"CONFIG_KVM=m\n"}
        files = boot | module_files(modules.removeprefix("usr/"))
        FakeArchive.packages = {name: (make_deb(tmp_path, name, files), ["kmod", "linux-base"])}
    else:
        contents = {
            name: {},
            f"linux-base-{RELEASE}": {f"{modules}/config": b"CONFIG_KVM=m\n"},
            f"linux-binary-{RELEASE}": {f"{modules}/vmlinuz": image()},
            f"linux-modules-{RELEASE}": module_files(modules),
        }
        FakeArchive.packages = {
            part: (make_deb(tmp_path, part, files), [*contents, "dracut"] if part == name else [])
            for part, files in contents.items()
        }
    monkeypatch.setattr(kernel_fetch, "AptArchive", FakeArchive)
    monkeypatch.setattr(kernel_source, "AptArchive", FakeArchive)
    kernel = kernel_fetch.fetch("7.3")
    assert kernel.release == RELEASE
    assert names(list(kernel.modules)) == ["irqbypass", "kvm"]
    assert dependencies(kernel.modules[1].read_bytes()) == (["irqbypass"], [])
    assert kernel.config is not None
    assert kernel.config.read_text() == "CONFIG_KVM=m\n"
    assert kernels.resolve("7.3/distribution") == kernel
    kept = sorted(file.name for file in kernel.image.parent.iterdir())
    assert kept == ["bzImage", "config", "kernel.json", "modules"]
    assert not list((cache_folder / "downloads").glob("[!.]*"))

    FakeArchive.packages = {}
    assert kernel_fetch.fetch("7.3") == kernel
    with pytest.raises(HarnessError, match=r"has a linux-image package for 5\.10"):
        kernel_fetch.fetch("5.10")
