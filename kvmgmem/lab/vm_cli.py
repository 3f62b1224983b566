"""`kvmgmem vm`: the selftests in a QEMU guest, supervised, with the same summary and exit code as on a host."""

import argparse
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab.bisection import in_terms_of_bisect
from kvmgmem.lab.cache import cache_root
from kvmgmem.lab.guest.capacity import guests_that_fit
from kvmgmem.lab.guest.initramfs import Image, ImageRequest, build_image, find_busybox
from kvmgmem.lab.guest.machine import (
    QEMU,
    Accelerator,
    Machine,
    choose_accelerator,
    command_line,
    require_kernel_image,
    require_qemu,
)
from kvmgmem.lab.guest.variants import lookup
from kvmgmem.lab.kernel.kernels import Kernel, build, list_kernels, resolve
from kvmgmem.lab.progress import Progress
from kvmgmem.lab.supervision.counters import CounterFiles
from kvmgmem.lab.supervision.limits import Limits
from kvmgmem.lab.supervision.supervisor import Request, Supervisor
from kvmgmem.results.outputs import add_output_options, report
from kvmgmem.run import results_path, selftests_directory
from kvmgmem.trace.file import write_traces

QUIET = ("-q", "--no-header", "--no-summary", "--tb=no", "-p", "no:cacheprovider")
GDB_PORT = 1234
DEFAULT_TEST_SECONDS = 30.0
"""What the pytest plugin allows a test unless told otherwise, before scaling."""

# What debugging costs a kernel under test, as a factor on every limit. Seen of 7.3.4 under TCG: debug takes 71 s to the
# first test where base takes 12.5 s, and its tests take eight times as long or more.
FLAVOUR_SLOWNESS = {"debug": 6.0, "coverage": 1.5}


def add_vm_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("vm", help="run the selftests in a QEMU guest")
    parser.add_argument("--kernel", metavar="IMAGE|NAME", help="what to boot (default: the base kernel last built)")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="build this kernel tree and boot it, with exit codes for `git bisect run`: 125 if it does not build or boot or "
        "has nothing to test, 255 if it is not the kernel's fault",
    )
    add_machine_options(parser)
    parser.add_argument("--selftests", metavar="DIR", help="the tests to run (default: those of kvmgmem)")
    parser.add_argument("--require", default="", metavar="NAMES", help="requirements whose lack is a failure, not a skip")
    parser.add_argument("--trace", metavar="DIR", help="record every call of each test in a file of its own there")
    # What `matrix` says on standard input when a core has become free: any byte is for a second guest.
    parser.add_argument("--second-guest-on-demand", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shell", action="store_true", help="a shell in the guest instead of the selftests")
    parser.add_argument("--gdb", action="store_true", help="stop before the first instruction, for a debugger")
    add_output_options(parser)
    # For verbs that have a guest of this one run something else: more files in it, another command that repeats one test.
    parser.set_defaults(extra=(), repeat=None)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add what describes the guest, and what its tests may take."""
    parser.add_argument(
        "--variant",
        default="plain",
        metavar="NAME",
        help="a machine by name (see `matrix`): npt0, numa2, ..., or qemu=PROGRAM",
    )
    parser.set_defaults(qemu=None)  # the variant may name one
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="how QEMU executes the guest")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="guests that share the tests (default: as memory and cores allow for the whole set, else 1)",
    )
    parser.add_argument(
        "--boots", type=int, default=25, metavar="N", help="how often a dying guest is started at most (default 25)"
    )
    parser.add_argument("--fresh", action="store_true", help="boot, even where a guest of this kind was kept earlier")
    parser.add_argument("--memory", type=int, default=1536, metavar="MiB", help="the guest's memory (default 1536)")
    parser.add_argument("--smp", type=int, default=2, metavar="N", help="its CPUs (default 2)")
    parser.add_argument("--numa", type=int, default=1, metavar="N", help="its NUMA nodes (default 1)")
    parser.add_argument("--append", default="", metavar="OPTIONS", help="more of the kernel's command line")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="what one test may take, before scaling")
    parser.add_argument(
        "--counters", type=Path, metavar="DIR", help="keep what a coverage kernel counted, a folder of .gcda files per boot"
    )


def run_vm(args: argparse.Namespace) -> int:
    """Boot, run, report; returns the exit code, with --source in the terms of `git bisect run`. Raises HarnessError."""
    return in_terms_of_bisect(partial(_run_vm, args)) if args.source else _run_vm(args)


def _run_vm(args: argparse.Namespace) -> int:
    _apply_variant(args)
    _check_numbers(args)
    qemu = require_qemu(args.qemu or QEMU)
    accelerator = choose_accelerator(args.accel)
    kernel = build(source=args.source) if args.source else _kernel(args.kernel)
    image_request = _image_request(args, kernel)
    results = None if args.shell else results_path(args.results)
    if args.counters is not None:
        CounterFiles(args.counters).require_none()
    with Progress(f"kvmgmem: {kernel.release} in QEMU, {accelerator.name}") as progress:
        if args.accel == "auto":
            progress.note(f"kvmgmem: {accelerator.name}, because {accelerator.why}")
        image = build_image(image_request, cache_root() / "images", progress.note)
        machine = _machine(args, kernel, image, accelerator, qemu)
        if args.gdb:
            progress.note(_gdb_line(kernel))
        supervisor = _supervise(args, kernel, machine, accelerator, results, progress) if results else None
    if results is None or supervisor is None:
        return _shell(machine, _preparation(kernel, accelerator), image_request.busybox is not None)
    if args.trace:
        write_traces(supervisor.records, Path(args.trace))
    if not supervisor.records:
        print(supervisor.runner_output.rstrip())  # pytest was to list tests, not to run any
        return ExitCode.OK
    status = report(results, args)
    booted = supervisor.first_test_after is not None
    return status if booted or not args.source else ExitCode.BISECT_SKIP


def _apply_variant(args: argparse.Namespace) -> None:
    """Put the variant's numbers where the command line said nothing of its own."""
    variant = lookup(args.variant)
    args.append = f"{variant.append} {args.append}".strip()
    args.qemu = variant.qemu
    for name, plain in (("numa", 1), ("smp", 2), ("memory", 1536)):
        wanted = getattr(variant, name)
        if wanted is not None and getattr(args, name) == plain:
            setattr(args, name, wanted)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("memory", 256), ("smp", 1), ("numa", 1), ("jobs", 1), ("boots", 1)):
        number = getattr(args, name)
        if number is not None and number < least:
            raise HarnessError(f"--{name} {getattr(args, name)} is too small", f"give at least {least}", ExitCode.USAGE)
    if args.numa > args.smp:
        raise HarnessError(f"--numa {args.numa} needs as many CPUs", f"give --smp {args.numa}", ExitCode.USAGE)


def _kernel(spec: str | None) -> Kernel:
    """The kernel asked for; without one the last one built, and on a fresh machine a newly built one."""
    kernel = resolve(spec) if spec is not None or list_kernels() else build()
    return replace(kernel, image=require_kernel_image(kernel.image))


def _image_request(args: argparse.Namespace, kernel: Kernel) -> ImageRequest:
    directory = Path(args.selftests) if args.selftests else selftests_directory()
    busybox = find_busybox() if args.shell else None
    return ImageRequest(directory, modules=tuple(kernel.modules), busybox=busybox, extra=args.extra)


def _machine(args: argparse.Namespace, kernel: Kernel, image: Image, accelerator: Accelerator, qemu: str) -> Machine:
    return Machine(
        kernel=kernel.image,
        initrd=image.path,
        accelerator=accelerator.name,
        memory_mib=args.memory,
        cpus=args.smp,
        numa_nodes=args.numa,
        append=args.append,
        gdb=args.gdb,
        verbose=args.shell or args.gdb,
        qemu=qemu,
    )


def _supervise(
    args: argparse.Namespace,
    kernel: Kernel,
    machine: Machine,
    accelerator: Accelerator,
    results: Path,
    progress: Progress,
) -> Supervisor:
    """Run the selftests in the guest; the supervisor knows what came of it."""
    time_scale = _time_scale(kernel, accelerator)
    # Twice what the runner in the guest allows itself.
    limits = Limits(test=2 * (args.timeout or DEFAULT_TEST_SECONDS)).scaled(time_scale)
    request = Request(
        machine=machine,
        results=results,
        pytest_args=_pytest_args(args),
        flavour=kernel.flavour,
        time_scale=time_scale,
        limits=Limits.unlimited() if args.gdb else limits,
        boots=args.boots,
        guests=_guests(args),
        snapshots=cache_root() / "snapshots" if _may_resume(args, accelerator) else None,
        keep_collected=not args.pytest_args,
        counters=args.counters,
        repeat=args.repeat or repeat_command(args, kernel),
        console=results.with_suffix(".console"),
        environment={} if args.variant == "plain" else {"KVMGMEM_VARIANT": args.variant},
    )
    supervisor = Supervisor(request, progress)
    if args.second_guest_on_demand:
        threading.Thread(target=_await_demand, args=(supervisor,), name="demand", daemon=True).start()
    supervisor.run()
    if supervisor.first_test_after is not None:
        guests = f"{request.guests} guests, " if request.guests > 1 else ""
        boots = "1 boot" if supervisor.boots == 1 else f"{supervisor.boots} boots"
        progress.note(f"first test after {supervisor.first_test_after:.1f} s, {guests}{boots}")
    return supervisor


def _await_demand(supervisor: Supervisor) -> None:
    """Give the run a second guest when whoever started us says that there is room for one."""
    if os.read(0, 1):
        supervisor.add_guest()


def _may_resume(args: argparse.Namespace, accelerator: Accelerator) -> bool:
    """Whether to go on from a guest that has booted: for a kernel that will be tried again."""
    return accelerator.name == "tcg" and not (args.fresh or args.source)


def _guests(args: argparse.Namespace) -> int:
    """How many guests share the tests: a few tests are not worth a second boot, and a debugger follows one."""
    if args.jobs is not None:
        return int(args.jobs)
    return 1 if args.pytest_args or args.gdb else guests_that_fit(args.memory)


def _pytest_args(args: argparse.Namespace) -> tuple[str, ...]:
    words = [*QUIET, f"--require={args.require}"]
    if args.timeout is not None:
        words.append(f"--test-timeout={args.timeout:g}")
    if args.trace:
        words.append("--trace-to=-")  # through the results: what stays in the guest dies with its kernel
    directory = Path(args.selftests) if args.selftests else selftests_directory()
    return (*words, *(_as_in_guest(word, directory) for word in args.pytest_args))


def _as_in_guest(word: str, selftests: Path) -> str:
    """A path below the selftests directory, maybe with a node id behind it, as the guest's runner sees it."""
    path, colons, rest = word.partition("::")
    if word.startswith("-") or not _exists(path):
        return word
    try:
        below = Path(path).resolve().relative_to(selftests.resolve().parent)
    except ValueError:
        raise HarnessError(
            f"{path} is not among the selftests of the guest, {selftests}",
            "name their directory with --selftests",
            ExitCode.USAGE,
        ) from None
    return f"{below}{colons}{rest}"


def _exists(path: str) -> bool:
    """Whether there is such a file; a long expression behind -k is no name of one (ENAMETOOLONG)."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def repeat_command(args: argparse.Namespace, kernel: Kernel) -> str:
    """The command that runs just one test on just this kernel and machine; `{test}` stands for the node id."""
    words = ["kvmgmem", "vm", "--kernel", kernel.name, *machine_words(args)]
    if args.selftests is not None:
        words += ["--selftests", str(args.selftests)]
    return f"{shlex.join(words)} -- {{test}}"


def machine_words(args: argparse.Namespace) -> list[str]:
    """The options that make this machine, where they are not the defaults."""
    words: list[str] = []
    for name, default in (("accel", "auto"), ("memory", 1536), ("smp", 2), ("numa", 1), ("append", "")):
        if getattr(args, name) != default:
            words += [f"--{name}", str(getattr(args, name))]
    return words + (["--variant", f"qemu={args.qemu}"] if args.qemu else [])


def _gdb_line(kernel: Kernel) -> str:
    vmlinux = shlex.quote(str(kernel.vmlinux)) if kernel.vmlinux else "VMLINUX"
    return f"waiting for a debugger: gdb {vmlinux} -ex 'target remote :{GDB_PORT}' -ex continue"


def _time_scale(kernel: Kernel, accelerator: Accelerator) -> float:
    return accelerator.time_scale * FLAVOUR_SLOWNESS.get(kernel.flavour or "", 1.0)


def _preparation(kernel: Kernel, accelerator: Accelerator) -> dict[str, str]:
    """What tests in the shell's guest are told of it, as those are that a runner of ours runs there."""
    return {
        "KVMGMEM_ACCELERATOR": accelerator.name,
        "KVMGMEM_FLAVOUR": kernel.flavour or "",
        "KVMGMEM_TIME_SCALE": f"{_time_scale(kernel, accelerator):g}",
    }


def _shell(machine: Machine, environment: Mapping[str, str], busybox: bool) -> int:
    """Hand the terminal to the guest's serial console; returns when the shell ends or QEMU is told to quit."""
    what = "a shell" if busybox else "Python, for want of a shell (apt install busybox-static),"
    print(f"kvmgmem: {what} in the guest; its end powers it off, Ctrl-A x ends QEMU at once", flush=True)
    # What the kernel does not know, and has no dot in its name, becomes init's environment (unknown_bootoption, 7.3).
    words = [machine.append, "kvmgmem.shell", *(f"{name}={value}" for name, value in environment.items() if value)]
    arguments: Sequence[str] = command_line(replace(machine, append=" ".join(words).strip()), {})
    started = time.monotonic()
    status = subprocess.run(arguments, check=False).returncode
    if status != 0:
        raise HarnessError(f"QEMU ended with status {status} after {time.monotonic() - started:.0f} s")
    return ExitCode.OK
