"""`kvmgmem kselftest`: the kernel's own KVM selftests in the same supervised guest, into the same records."""

import argparse
import contextlib
import shlex
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import cache
from kvmgmem.lab.guest.initramfs import PROJECT_DIRECTORY
from kvmgmem.lab.guest.machine import choose_accelerator, require_qemu
from kvmgmem.lab.kernel.kbuild import tree_version
from kvmgmem.lab.kernel.kernels import Kernel, resolve
from kvmgmem.lab.kernel.source import Origin
from kvmgmem.lab.kselftest import DEFAULT_TESTS, Programs, build_tests, find_source, list_tests
from kvmgmem.lab.progress import Progress
from kvmgmem.lab.vm_cli import add_machine_options, machine_words, run_vm
from kvmgmem.results.outputs import add_output_options

TEST_SECONDS = 120.0
"""What the kernel's own runner gives one of these tests (tools/testing/selftests/kvm/settings)."""


def add_kselftest_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("kselftest", help="build the kernel's own KVM selftests, and run them in a QEMU guest")
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"default: {' '.join(DEFAULT_TESTS)}")
    parser.add_argument("--source", required=True, metavar="DIR|RELEASE", help="the kernel tree with the tests, or 7.3")
    parser.add_argument(
        "--kernel", metavar="IMAGE|NAME", help="what to boot (default: a kernel built from that source, else the last one)"
    )
    parser.add_argument("--all", action="store_true", help="every compiled test that the tree has")
    parser.add_argument("--list", action="store_true", help="only list the tests; * marks those that run by default")
    add_machine_options(parser)
    add_output_options(parser)


def run_kselftest(args: argparse.Namespace) -> int:
    """Build, boot, run, report; returns the exit code. Raises HarnessError."""
    if args.all and args.tests:
        raise HarnessError("--all and named tests exclude each other", "give one of them", ExitCode.USAGE)
    if args.list:
        return _list(args)
    require_qemu()
    choose_accelerator(args.accel)
    with Progress(f"KVM selftests of {args.source}") as progress:
        origin = find_source(args.source, progress)
        kernel = _kernel(args.kernel, origin, progress)
        progress.note(f"kernel: {kernel.name}")
        programs = build_tests(origin, args.tests, progress, every=args.all)
        if programs.lacking and not args.tests and not args.all:
            progress.note(f"this source has no {', '.join(programs.lacking)}")
    return run_vm(_vm_args(args, kernel, programs))


def _list(args: argparse.Namespace) -> int:
    with Progress(f"KVM selftests of {args.source}") as progress:
        tests = list_tests(find_source(args.source, progress), progress)
    for name in tests:
        print(f"{'*' if name in DEFAULT_TESTS else ' '} {name}")
    return ExitCode.OK


def _kernel(wanted: str | None, origin: Origin, progress: Progress) -> Kernel:
    """The kernel asked for, else one of the tests' own source, else of the same release, else the one last used."""
    if wanted is not None:
        return resolve(wanted)
    specs = [origin.label]
    if origin.tree is not None:
        major, minor = tree_version(origin.tree)
        specs = [str(origin.tree), origin.label, f"{major}.{minor}"]
    for spec in specs:
        with contextlib.suppress(HarnessError):
            return resolve(spec)
    kernel = resolve(None)
    progress.note(f"no kernel of this release is in the cache, so the tests run on {kernel.name} (--kernel names another)")
    return kernel


def _vm_args(args: argparse.Namespace, kernel: Kernel, programs: Programs) -> argparse.Namespace:
    """What `kvmgmem vm` would have to be told to run these programs instead of the selftests."""
    from kvmgmem.cli import build_parser
    from kvmgmem.testing import kselftest

    directory = _empty_directory(kselftest.DIRECTORY)
    repeat = ["kvmgmem", "kselftest", "--source", args.source, "--kernel", kernel.name]
    repeat += ["--variant", args.variant] if args.variant != "plain" else []
    settings = {
        "kernel": kernel.name,
        "selftests": str(directory),
        "extra": tuple((f"{PROJECT_DIRECTORY}/{directory.name}/{name}", file) for name, file in programs.files.items()),
        "repeat": f"{shlex.join([*repeat, *machine_words(args)])} {{test}}",
        "timeout": TEST_SECONDS if args.timeout is None else args.timeout,
        "pytest_args": ["-p", kselftest.__name__, f"--kselftest-of={programs.label}", str(directory)],
    }
    plain = build_parser().parse_args(["vm"])
    return argparse.Namespace(**{**vars(plain), **vars(args), "source": None, **settings})


def _empty_directory(name: str) -> Path:
    """The directory of selftests in the image, by its name: what it holds are the programs, file by file."""
    directory = cache.cache_root() / "images" / name
    with cache.disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory
