"""How fast the harness is: ratios from one run on one machine, printed for people; never a verdict.

make bench-harness            the binding, the overhead of a test, and the guest's start if QEMU and a kernel are there
"""

import ctypes
import fcntl
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvmgmem import entry
from kvmgmem._native import lib
from kvmgmem.kvm import Kvm
from kvmgmem.results.records import TestEnd, Verdict
from kvmgmem.results.run import read_run

CALLS = 200_000
ROUNDS = 7


def per_call(function: Callable[[int], object]) -> float:
    """Nanoseconds per call: the median of several rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        function(CALLS)
        rounds.append((time.perf_counter_ns() - start) / CALLS)
    return statistics.median(rounds)


def bench_ioctl() -> None:
    """One ioctl (KVM_GET_API_VERSION) in a C loop, through the binding, and through what Python offers."""
    request = lib.KVM_GET_API_VERSION
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    with Kvm.open() as kvm:
        fd = kvm.fileno()
        native = lib.kvmgmem_ioctl

        def loop(call: Callable[..., object]) -> Callable[[int], None]:
            def run(count: int) -> None:
                for _ in range(count):
                    call(fd, request, 0)

            return run

        base = per_call(lambda count: lib.kvmgmem_bench_ioctl(fd, request, 0, count))
        rows = {
            "C loop": base,
            "binding (lib.kvmgmem_ioctl)": per_call(loop(native)),
            "binding (entry.ioctl, answer as Errno)": per_call(loop(entry.ioctl)),
            "fcntl.ioctl": per_call(loop(fcntl.ioctl)),
            "ctypes": per_call(loop(libc.ioctl)),
        }
    print("ioctl(KVM_GET_API_VERSION)                  ns/call   times C")
    for name, value in rows.items():
        print(f"  {name:40} {value:8.0f} {value / base:9.2f}")


def bench_overhead() -> None:
    """What isolation, leak check and watches cost a test that does nothing, on this host."""
    with tempfile.TemporaryDirectory() as directory:
        test = Path(directory) / "test_nothing.py"
        test.write_text(
            "import pytest\n@pytest.mark.parametrize('n', range(100))\ndef test_nothing(kvm, n):\n    '''Nothing.'''\n"
        )
        results = Path(directory) / "results.jsonl"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--results={results}", str(test)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
        )
        report_overhead("host", results)


def report_overhead(where: str, results: Path) -> None:
    """Print the median and the largest overhead of the passed tests of a run."""
    ends = [outcome.end for outcome in read_run([results]).tests]
    values = [end.overhead for end in ends if isinstance(end, TestEnd) and end.verdict is Verdict.PASSED and end.overhead]
    if values:
        milliseconds = [1000 * value for value in values]
        print(
            f"per test, {where}: isolation, leak check and watches: median {statistics.median(milliseconds):.1f} ms, "
            f"largest {max(milliseconds):.1f} ms, over {len(values)} tests"
        )


def bench_guest() -> None:
    """QEMU's start to the first test's start record, and the overhead per test in the guest."""
    with tempfile.TemporaryDirectory() as directory:
        test = Path(directory) / "selftests" / "test_nothing.py"
        test.parent.mkdir()
        test.write_text(
            "import pytest\n@pytest.mark.parametrize('n', range(50))\ndef test_nothing(kvm, n):\n    '''Nothing.'''\n"
        )
        results = Path(directory) / "results.jsonl"
        command = [sys.executable, "-m", "kvmgmem.cli", "vm", "--selftests", str(test.parent), f"--results={results}"]
        # The second run finds the image in the cache; that is what is measured.
        for _ in range(2):
            results.unlink(missing_ok=True)
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"no guest to measure: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
            return
        print("guest:", next((line for line in (done.stdout + done.stderr).splitlines() if "first test after" in line), "?"))
        report_overhead("guest", results)


def main() -> None:
    """Measure what this machine can."""
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; ratios of one run")
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        bench_ioctl()
        bench_overhead()
    else:
        print("no usable /dev/kvm: the binding and the host's overhead are left out")
    bench_guest()


if __name__ == "__main__":
    main()
