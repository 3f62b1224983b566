"""`kvmgmem selftest`: the selftests wherever this machine can run them; what `make selftest` and `make test` call."""

import argparse
import shutil

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode, gravest


def add_selftest_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("selftest", help="run the selftests on this machine's KVM, or in a guest if it has none")
    parser.add_argument("--both", action="store_true", help="here if there is KVM, and in a guest as well")
    parser.add_argument("--which", action="store_true", help="only say where: `host` or `guest`, and why")


def run_selftest(args: argparse.Namespace) -> int:
    """Run them; the gravest exit code counts. Raises `HarnessError` if neither place can be used."""
    reason = why_not_here()
    if args.which:
        print(f"guest: {reason}" if reason else "host: its KVM has guest_memfd")
        return ExitCode.OK
    codes: list[int] = []
    if not reason:
        _say("running on this machine's KVM, because it has guest_memfd")
        codes.append(_on_host(args))
    if reason or args.both:
        _say(f"running in a QEMU guest, because {reason or 'both were asked for'}")
        codes.append(_in_guest(args))
    return gravest(codes)


def why_not_here() -> str:
    """Why this machine's KVM cannot run the selftests; "" if it can."""
    from kvmgmem import host as host_facts

    try:
        host = host_facts.probe()
    except HarnessError as error:
        return error.message
    if any(host_facts.gmem_kinds(scope) for scope in host.vms):
        return ""
    return f"the KVM of {host.release} has no guest_memfd for any VM type it offers"


def _say(text: str) -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    print(f"kvmgmem: {text}"[: max(width, 60) * 3], flush=True)


def _on_host(args: argparse.Namespace) -> int:
    from kvmgmem.cli import build_parser
    from kvmgmem.run import run_run

    run_args = build_parser().parse_args(["run"])
    run_args.pytest_args = args.pytest_args
    return run_run(run_args)


def _in_guest(args: argparse.Namespace) -> int:
    from kvmgmem.cli import build_parser
    from kvmgmem.lab.kernel.kernels import build
    from kvmgmem.lab.vm_cli import run_vm

    # The newest release in the plain flavour, whatever else has been built or fetched since.
    vm_args = build_parser().parse_args(["vm", f"--kernel={build().name}"])
    vm_args.pytest_args = args.pytest_args
    return run_vm(vm_args)
