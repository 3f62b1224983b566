"""Starting from a kernel that somebody has built already: its objects, made to fit a private tree.

What make compares before it leaves an object alone is the command that made it and the times of what that was made of, both
in a file beside it (.NAME.cmd, by scripts/basic/fixdep). With the source's path in there replaced by the private tree's, the
objects count as up to date.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.cache import disk_errors
from kvmgmem.mutate.tree import OBJECTS


def seed_objects(source: Path, objects: Path, tree: Path) -> None:
    """Copy what was built from `source` (make O=`objects`) into a private tree of it, whose objects lie right below it.

    Raises HarnessError when the folder holds no finished build, or one of another source.
    """
    built_from = source_of(objects)
    if built_from.resolve() != source.resolve():
        raise HarnessError(
            f"{objects} was built from {built_from}, not from {source}", "give the source that belongs to it", ExitCode.USAGE
        )
    target = tree / OBJECTS
    with disk_errors(tree):
        shutil.rmtree(target, ignore_errors=True)
        copied = subprocess.run(["cp", "-a", "--reflink=auto", str(objects), str(target)], capture_output=True, check=False)
        if copied.returncode != 0:
            raise HarnessError(
                f"cannot copy {objects}: {copied.stderr.decode(errors='replace').strip()}",
                "make room, or see its permissions",
            )
        for folder, _, names in os.walk(target):
            for name in names:
                if name.endswith(".cmd"):
                    _rewrite(Path(folder, name), str(built_from))


def source_of(objects: Path) -> Path:
    """The source that a folder was built from, by the Makefile that the kernel's own leaves there.

    Raises HarnessError (USAGE) when there is none, or the build was not finished.
    """
    try:
        found = re.search(r"^include (/.+)/Makefile$", (objects / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found is None or not (objects / "vmlinux").is_file() or not (objects / ".config").is_file():
        raise HarnessError(
            f"{objects} holds no kernel that was built there",
            "give the folder of a finished `make -C SOURCE O=FOLDER bzImage`, or leave out --objects",
            ExitCode.USAGE,
        )
    return Path(found[1])


def _rewrite(path: Path, source: str) -> None:
    """Name the sources as they are named from a folder right below them; the file's times stay."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if source in text:
        times = path.stat()
        path.write_text(text.replace(source, ".."), encoding="utf-8", errors="surrogateescape")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
