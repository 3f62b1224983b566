"""A stand-in for pytest inside a guest, each of whose tests does something that a supervisor must survive.

The image carries it as /kvmgmem/pytest.py, where the guest's init imports it in place of the real one: it starts in no
time, and it depends on no kernel feature but what it breaks.
"""

import ctypes
import json
import mmap
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmgmem.lab.guest.selection import Selection

LIBC = ctypes.CDLL(None, use_errno=True)
RB_POWER_OFF = 0x4321FEDC
RB_AUTOBOOT = 0x01234567
MADV_POPULATE_WRITE = 23
PTRACE_POKEUSER, PTRACE_ATTACH, PTRACE_DETACH = 6, 16, 17
WALL = 0x40000000
RIP = 16 * 8
"""Offset of the instruction pointer in x86-64's struct user_regs_struct."""

CIRCUMSTANCES = {
    "release": os.uname().release,
    "backend": "none",
    "paging": "none",
    "accelerator": "tcg",
    "cpu_model": "none",
    "vm_types": [],
    "where": "guest",
    "kvmgmem": "0",
    "python": "3",
    "pytest": "none",
}


class Channel:
    """The result port."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def raw(self, data: bytes) -> None:
        """Write all of it."""
        while data:
            data = data[os.write(self.fd, data) :]

    def record(self, kind: str, **fields: object) -> None:
        """Write one record."""
        self.raw(json.dumps({"record": kind, "time": time.time(), **fields}).encode() + b"\n")

    def start(self, test: str) -> None:
        """Begin a test."""
        self.record("test-start", test=test)

    def end(self, test: str, verdict: str = "passed", reason: str = "") -> None:
        """End a test."""
        self.record("test-end", test=test, verdict=verdict, reason=reason)


def passes(_: Channel) -> None:
    """Do nothing, well."""


def panics(_: Channel) -> None:
    """Crash the kernel."""
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(60)


def kills_init(_: Channel) -> None:
    """Send PID 1 to address 0; SIGKILL does not touch it."""
    LIBC.ptrace(PTRACE_ATTACH, 1, 0, 0)
    os.waitpid(1, WALL)
    LIBC.ptrace(PTRACE_POKEUSER, 1, RIP, 0)
    LIBC.ptrace(PTRACE_DETACH, 1, 0, 0)
    time.sleep(60)


def spins(_: Channel) -> None:
    """Keep every CPU busy at a priority that leaves nobody else a moment, the fair server of Linux 6.12 included."""
    Path("/proc/sys/kernel/sched_rt_runtime_us").write_text("-1")
    for runtime in Path("/sys/kernel/debug/sched/fair_server").glob("*/runtime"):
        runtime.write_text("0")
    cpus = sorted(os.sched_getaffinity(0))
    mine = cpus[0] if os.fork() == 0 else cpus[-1]
    os.sched_setaffinity(0, {mine})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
    while True:
        pass


def stops_itself(_: Channel) -> None:
    """Stop the runner, while the guest lives on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def takes_all_memory(_: Channel) -> None:
    """Touch more memory than the guest has."""
    areas = []
    while True:
        area = mmap.mmap(-1, 64 << 20)
        areas.append(area)
        area.madvise(mmap.MADV_HUGEPAGE)
        area.madvise(MADV_POPULATE_WRITE)


def powers_off(_: Channel) -> None:
    """Power the guest off."""
    LIBC.reboot(RB_POWER_OFF)


def reboots(_: Channel) -> None:
    """Reboot it in an orderly way."""
    LIBC.reboot(RB_AUTOBOOT)


def triple_faults(_: Channel) -> None:
    """Reset it at once; with reboot=t on the command line by a triple fault."""
    Path("/proc/sysrq-trigger").write_text("b")


def complains(_: Channel) -> None:
    """Put on the console what a WARN() looks like; there is no honest way to provoke one."""
    for line in ("------------[ cut here ]------------", "WARNING: virt/kvm/fake.c:12 at fake_bind+0x1/0x2, CPU#0: x/1"):
        Path("/dev/kmsg").write_text(f"<4>{line}\n")
    for line in ("Call Trace:", " <TASK>", " fake_ioctl+0x3/0x4", " </TASK>", "---[ end trace 0000000000000000 ]---"):
        Path("/dev/kmsg").write_text(f"<4>{line}\n")
    stays_a_while()


def stays_a_while() -> None:
    """Go on for a second, as a test does that makes the kernel complain half-way.

    The console is printed by a thread of its own (7.3), so what the kernel says in the very last instant of a test may come
    out after the test's end; the plugin's own look at /dev/kmsg charges that, and these stand-ins have no plugin.
    """
    time.sleep(1)


def oopses(_: Channel) -> None:
    """Put on the console what an oops looks like, and go on, as a kernel that oopsed may."""
    for line in (
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "Oops: Oops: 0002 [#1] SMP NOPTI",
        "RIP: 0010:fake_fault+0x17/0x20",
        "Call Trace:",
        " fake_handler+0x1/0x2",
        "---[ end trace 0000000000000000 ]---",
    ):
        Path("/dev/kmsg").write_text(f"<1>{line}\n")
    stays_a_while()


def writes_garbage(channel: Channel) -> None:
    """Write what is no record, newlines included."""
    channel.raw(b"\xff\x00 { not a record\n\n[1, 2]\n" + bytes(range(256)))


def floods(channel: Channel) -> None:
    """Write garbage without an end."""
    while True:
        channel.raw(b"nonsense " * 4096)


def exits(_: Channel) -> None:
    """End the runner in the middle of things."""
    os._exit(7)


def waits(_: Channel) -> None:
    """Wait for what the host has in mind."""
    time.sleep(60)


TESTS: dict[str, Callable[[Channel], None]] = {
    "passes_first": passes,
    "panics": panics,
    "complains": complains,
    "writes_garbage": writes_garbage,
    "spins": spins,
    "stops_itself": stops_itself,
    "kills_init": kills_init,
    "takes_all_memory": takes_all_memory,
    "powers_off": powers_off,
    "reboots": reboots,
    "triple_faults": triple_faults,
    "oopses": oopses,
    "cuts_its_record": passes,
    "passes_after_cut": passes,
    "exits": exits,
    "floods": floods,
    "host_kills_qemu": waits,
    "host_stops_the_cpus": waits,
    "passes_last": passes,
}


def hookimpl(**_: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """What marks a hook for the real pytest, which this is not."""
    return lambda function: function


Session = object


def main(args: Sequence[str], plugins: Sequence["Selection"] = ()) -> int:
    """Run as pytest.main would; `args` name the tests, none means all. The runner's warm-up has nothing to do here."""
    if "--collect-only" in args:
        return 5
    path = next(word.removeprefix("--results=") for word in args if word.startswith("--results="))
    wanted = [word for word in args if word in TESTS] or list(TESTS)
    done = plugins[0].wait()["done"]
    channel = Channel(path)
    channel.record("run-start", schema=1, run="0" * 32, circumstances=CIRCUMSTANCES)
    tests = [name for name in wanted if name not in done]
    channel.record("plan", tests=tests)
    for name in tests:
        channel.start(name)
        TESTS[name](channel)
        if name == "cuts_its_record":
            channel.raw(b'{"record": "test-end", "test": "cuts_its_rec')
        else:
            channel.end(name)
    channel.record("run-end", exit=0, counts={})
    return 0
