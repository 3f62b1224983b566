"""The kernel's own KVM selftests of the same tree, asked about the same mutants, for comparison."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.guest.initramfs import PROJECT_DIRECTORY, ImageRequest, build_image
from kvmgmem.lab.kernel.source import Origin
from kvmgmem.lab.kselftest import NODE_PREFIX, build_tests
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate.catalogue import Mutant
from kvmgmem.mutate.guest import Guest, Trial, run_tests
from kvmgmem.mutate.judge import ALL, first_notice, load_baseline, save_baseline
from kvmgmem.mutate.modules import Kernel
from kvmgmem.mutate.state import Result

PROGRAM_SECONDS: Final = 24.0
"""What one program may take, before scaling: under emulation the 120 s that the kernel's own runner gives it."""

SURVIVED: Final = "survived"


class KernelTests:
    """The programs in an image of their own, and what they answer on the unmutated kernel."""

    def __init__(self, source: Origin, work: Path, guest: Guest, base: Kernel, key: str, progress: Progress) -> None:
        """Build programs and image; `base` is the unmutated kernel, which is tried when it is first needed, if it has to be.

        `key` names that kernel. Raises HarnessError where the tree has no KVM selftests, or they do not build.
        """
        from kvmgmem.testing import kselftest

        programs = build_tests(source, [], progress)
        directory = work / kselftest.DIRECTORY
        directory.mkdir(exist_ok=True)
        extra = tuple((f"{PROJECT_DIRECTORY}/{directory.name}/{name}", file) for name, file in programs.files.items())
        image = build_image(ImageRequest(directory, extra=extra), cache.cache_root() / "images", progress.note)
        for old in work.glob("kselftest-*.cpio"):
            old.unlink()
        kept = Path(shutil.copy2(image.path, work / f"kselftest-{image.path.name}"))
        self._guest = replace(guest, image=kept)
        self._arguments = ("-p", kselftest.__name__, f"--kselftest-of={programs.label}")
        self._directory = directory.name
        self._names = list(programs.files)
        self._base = base
        self._work = work
        self._key = f"{key} {programs.label} {' '.join(programs.files)}"
        self._baseline = load_baseline(self._baseline_path, self._key)
        self._lock = threading.Lock()

    @property
    def _baseline_path(self) -> Path:
        return self._work / "kselftest.json"

    def __call__(self, mutant: Mutant, result: Result, kernel: Kernel, records: Path) -> Result:
        """Add to a mutant's result what they made of it."""
        return replace(result, kselftest=self.answer(kernel, records.with_suffix(".kselftest.jsonl")))

    def answer(self, kernel: Kernel, records: Path) -> str:
        """Which program noticed the mutant in this kernel, and how; or that it survived."""
        with self._lock:
            if self._baseline.lacks([ALL]):
                self._baseline.add([ALL], self._run(self._base, self._work / "kselftest.jsonl", stop=False))
                save_baseline(self._baseline, self._baseline_path, self._key)
        try:
            notice = first_notice(self._run(kernel, records, stop=True), self._baseline, [ALL])
        except HarnessError as error:
            return f"error: {error.message}"
        return SURVIVED if notice is None else f"{notice.how.value} in {notice.test or 'none of them'}"

    def _run(self, kernel: Kernel, records: Path, *, stop: bool) -> Trial:
        guest = self._guest if kernel.image == self._base.image else replace(self._guest, snapshots=None)
        tests = (*self._arguments, f"--kselftest-first={','.join(self._quick_ones_first())}", self._directory)
        return run_tests(guest, kernel, tests, records, stop_at_failure=stop, test_seconds=PROGRAM_SECONDS)

    def _quick_ones_first(self) -> list[str]:
        """The programs in the order that costs least where one of them fails."""
        answers = {test.removeprefix(NODE_PREFIX): answer for test, answer in self._baseline.answers.items()}
        return sorted(self._names, key=lambda name: answers[name].seconds if name in answers else 0.0)
