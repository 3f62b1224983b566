"""How a boot of a guest ended: the causes, the words for them, and what a run without a single test died of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvmgmem.errors import ERROR_PREFIX, HarnessError
from kvmgmem.exit_codes import ExitCode, code_of_part
from kvmgmem.results.records import Verdict
from kvmgmem.splats import message_of


class Cause(Enum):
    """How a boot ended; the value is the verdict for the test that was open."""

    FINISHED = ("finished", Verdict.ERROR)
    PANIC = ("panic", Verdict.PANICKED)
    OOPS = ("oops", Verdict.PANICKED)
    HANG = ("hang", Verdict.PANICKED)
    RESET = ("reset", Verdict.PANICKED)
    REBOOT = ("reboot", Verdict.ERROR)
    POWER_OFF = ("power-off", Verdict.ERROR)
    QEMU_DIED = ("qemu-died", Verdict.ERROR)
    RUNNER_DIED = ("runner-died", Verdict.CRASHED)
    STUCK = ("stuck", Verdict.TIMEOUT)
    NO_BOOT = ("no-boot", Verdict.PANICKED)
    FLOOD = ("flood", Verdict.ERROR)

    @property
    def verdict(self) -> Verdict:
        return self.value[1]

    @property
    def of_kernel(self) -> bool:
        """Whether it is the kernel that is to blame, so that it counts even with no test open."""
        return self.verdict is Verdict.PANICKED


@dataclass(frozen=True)
class Ending:
    """The end of one boot: its cause, one line that says so, and the console lines that show it."""

    cause: Cause
    reason: str
    excerpt: tuple[str, ...] = ()
    runner_output: str = ""
    runner_exit: int | None = None


def silence_text(silent: float, used: float) -> str:
    """Say whether a silent guest hangs busily, hangs idly, or may merely be slow; both in seconds, `used` of CPU time."""
    share = used / silent if silent > 0 else 0.0
    facts = f"no sign of life for {silent:.0f} s, in which QEMU used {used:.1f} s of CPU time"
    if share > 0.7:
        return f"hang: {facts}: something spins"
    if share < 0.1:
        return f"hang: {facts}: all CPUs wait"
    return f"hang, or very slow: {facts}"


def init_failure(console: Iterable[str]) -> str:
    """What the guest's init said it died of: the last line of its traceback; "" if it did not."""
    lines = iter(console)
    for line in lines:
        if message_of(line).startswith("kvmgmem: init failed"):
            rest = [message_of(text) for text in lines]
            return next(
                (text for text in reversed(rest) if re.match(r"\w+(Error|Exception|Interrupt)?: ", text)), "see the console"
            )
    return ""


def internal_error(output: str) -> str:
    """What ended pytest in the middle of a test, by what it printed: the error, and the line of code; "" if it did not."""
    traceback = [line.removeprefix("INTERNALERROR>").rstrip() for line in output.splitlines() if "INTERNALERROR>" in line]
    if not traceback:
        return ""
    place = next((line.strip() for line in reversed(traceback) if line.startswith('   File "')), "")
    return f"the runner failed: {traceback[-1].strip()}" + (f" ({place})" if place else "")


def worth_another_boot(ending: Ending) -> bool:
    """Whether a boot that came to nothing may fare better the next time."""
    return ending.cause in (Cause.NO_BOOT, Cause.HANG)


def usage_error(output: Iterable[str]) -> str:
    """What pytest does not like about its arguments: argparse's line, or a line that begins with ERROR."""
    lines = list(output)
    found = [line.partition("error: ")[2] for line in lines if ": error: " in line]
    found += [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return found[0] if found else ""


# What stands on the console when a kernel cannot start this guest, and what is missing then.
_BOOT_HINTS = (
    (r"Initramfs unpacking failed|System is deadlocked on memory", "give the guest more memory: --memory MiB"),
    (r"Unable to mount root fs|VFS: Cannot open root", "the kernel needs CONFIG_BLK_DEV_INITRD"),
    (r"Failed to execute /init|No working init found", "the kernel needs CONFIG_BINFMT_SCRIPT and CONFIG_BINFMT_ELF"),
    (r"no virtio-serial port", "the kernel needs CONFIG_VIRTIO_PCI and CONFIG_VIRTIO_CONSOLE"),
)


class NoTestStartedError(HarnessError):
    """A guest did not come to its first test; `cause` is how its last boot ended."""

    def __init__(self, cause: Cause, message: str, hint: str = "", code: ExitCode = ExitCode.HARNESS) -> None:
        super().__init__(message, hint, code)
        self.cause = cause


def no_test_started(ending: Ending, console_file: Path | None) -> NoTestStartedError:
    """The error for a guest in which not one test began: what happened, and the likeliest remedy."""
    cause = ending.cause
    words = [line.strip() for line in ending.runner_output.splitlines()]
    told = next((line for line in words if line.startswith(ERROR_PREFIX)), "")
    if told:
        hint = next((line.removeprefix("hint: ") for line in words if line.startswith("hint: ")), "")
        return NoTestStartedError(
            cause, f"in the guest: {told.removeprefix(ERROR_PREFIX)}", hint, code_of_part(ending.runner_exit or 4)
        )
    if cause is Cause.RUNNER_DIED and ending.runner_exit == 4 and (usage := usage_error(words)):
        return NoTestStartedError(cause, f"pytest: {usage}", "see pytest --help", ExitCode.USAGE)
    if cause is Cause.RUNNER_DIED and ending.runner_exit in (3, 5):
        return NoTestStartedError(
            cause, "no selftest was selected", "see what there is: kvmgmem run -- --collect-only -q", ExitCode.NOTHING_RAN
        )
    console = "\n".join(ending.excerpt) + "\n" + ending.reason
    hint = next((text for pattern, text in _BOOT_HINTS if re.search(pattern, console)), "")
    kept = f"the console is in {console_file}" if console_file else ""
    code = ExitCode.KERNEL if cause in (Cause.PANIC, Cause.OOPS, Cause.RESET, Cause.HANG) else ExitCode.HARNESS
    last = next((line for line in reversed(words) if line), "")
    detail = f": {last}" if cause is Cause.RUNNER_DIED and last else ""
    return NoTestStartedError(
        cause, f"no test was started: {ending.reason}{detail}", "; ".join(filter(None, (hint, kept))), code
    )
