"""The kernel's own KVM selftests of the same tree, asked about the same mutants, for comparison."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.initramfs import PROJECT_DIRECTORY, ImageRequest, build_image
from kvmgmem.lab.kernel_source import tree_origin
from kvmgmem.lab.kselftest import build_tests
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate.guest import Guest, Trial, run_tests
from kvmgmem.mutate.judge import ALL, Baseline, first_notice

PROGRAM_SECONDS: Final = 24.0
"""What one program may take, before scaling: under emulation the 120 s that the kernel's own runner gives it."""

SURVIVED: Final = "survived"


class KernelTests:
    """The programs in an image of their own, and what they answer on the unmutated kernel."""

    def __init__(self, source: Path, work: Path, guest: Guest, base: Path, progress: Progress) -> None:
        """Build programs and image; `base` is the unmutated kernel, which is tried when it is first needed.

        Raises HarnessError where the tree has no KVM selftests, or they do not build.
        """
        from kvmgmem.testing import kselftest

        programs = build_tests(tree_origin(source), [], progress)
        directory = work / kselftest.DIRECTORY
        directory.mkdir(exist_ok=True)
        extra = tuple((f"{PROJECT_DIRECTORY}/{directory.name}/{name}", file) for name, file in programs.files.items())
        image = build_image(ImageRequest(directory, extra=extra), cache.cache_root() / "images", progress.note)
        kept = work / "kselftest.cpio"
        shutil.copy2(image.path, kept)
        self._guest = replace(guest, image=kept)
        self._arguments = ("-p", kselftest.__name__, f"--kselftest-of={programs.label}", directory.name)
        self._base = base
        self._work = work
        self._baseline = Baseline()
        self._lock = threading.Lock()

    def __call__(self, kernel: Path, records: Path) -> str:
        """Which program noticed the mutant in this kernel, and how; or that it survived."""
        with self._lock:
            if self._baseline.lacks([ALL]):
                self._baseline.add([ALL], self._run(self._base, self._work / "kselftest.jsonl", stop=False))
        try:
            notice = first_notice(self._run(kernel, records, stop=True), self._baseline, [ALL])
        except HarnessError as error:
            return f"error: {error.message}"
        return SURVIVED if notice is None else f"{notice.how.value} in {notice.test or 'none of them'}"

    def _run(self, kernel: Path, records: Path, *, stop: bool) -> Trial:
        return run_tests(self._guest, kernel, self._arguments, records, stop_at_failure=stop, test_seconds=PROGRAM_SECONDS)
