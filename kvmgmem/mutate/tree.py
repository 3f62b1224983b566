"""A private source tree for mutants: links to somebody's tree, but for the files that mutants change, which are copies.

The kernel's build writes nothing into a source tree when it is told to build elsewhere, so links suffice; they are made in
no time and take no room. What is built lies in a folder right below, for then the kernel's Makefile names its sources
relative to it (`srctree` is `..`), and a copy of the whole is as good as built.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab.cache import disk_errors
from kvmgmem.lab.kernel.kbuild import tree_version

OBJECTS: Final = "kvmgmem-objects"
"""The folder of what is built, below the private tree."""


def make_tree(source: Path, tree: Path, files: Iterable[str]) -> None:
    """Make or repair a private tree in which `files` are copies, as they are in `source` now.

    Raises HarnessError when `source` is no kernel tree, or was configured in place.
    """
    source = source.resolve()
    tree_version(source)
    if (source / ".config").exists() or (source / "include/config").exists():
        raise HarnessError(
            f"{source} was configured in place, so the kernel's Makefile cannot build it elsewhere",
            f"clean it: make -C {source} mrproper",
        )
    wanted = [file for file in files if (source / file).is_file()]
    with disk_errors(tree):
        tree.mkdir(parents=True, exist_ok=True)
        for folder in sorted(_folders(wanted), key=lambda path: len(path.parts)):
            _link_folder(source / folder, tree / folder)
        for file in wanted:
            if (tree / file).is_symlink() or not (tree / file).exists():
                _copy(source / file, tree / file)
            else:
                restore(source, tree, file)


def restore(source: Path, tree: Path, file: str) -> None:
    """Give a file of the private tree its original text back; one that has it keeps its time, so that make does nothing."""
    original = (source / file).read_bytes()
    if (tree / file).read_bytes() != original:
        write(tree, file, original)


def _copy(source: Path, target: Path) -> None:
    """With its time: it is no newer than what was built from it."""
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


def write(tree: Path, file: str, content: bytes) -> None:
    """Replace a file of the private tree, never what a link of that name points to."""
    target = tree / file
    with disk_errors(target):
        target.unlink(missing_ok=True)
        target.write_bytes(content)


def copy_tree(tree: Path, target: Path) -> None:
    """A second private tree with everything that is built in the first: times and links as they are."""
    with disk_errors(target.parent):
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(tree, target, symlinks=True)


def _folders(files: Iterable[str]) -> set[PurePosixPath]:
    """The folders that must be real ones: those on the way to a file that is a copy."""
    return {parent for file in files for parent in PurePosixPath(file).parents}


def _link_folder(source: Path, target: Path) -> None:
    """Make a real folder whose entries are links to those of another; entries that are real already stay."""
    if target.is_symlink():
        target.unlink()
    target.mkdir(exist_ok=True)
    for name in os.listdir(source):
        link = target / name
        if not link.is_symlink() and not link.exists():
            link.symlink_to(source / name)
