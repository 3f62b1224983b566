"""The command line: arguments in, one function call, an exit code out."""

import argparse
import sys
from collections.abc import Sequence

import kvmgmem
from kvmgmem.errors import ERROR_PREFIX, HarnessError, KvmError
from kvmgmem.exit_codes import ExitCode


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from kvmgmem.caps import add_caps_parser
    from kvmgmem.contract_report import add_contract_parser
    from kvmgmem.coverage.coverage_cli import add_coverage_parser
    from kvmgmem.fuzz import add_fuzz_parser
    from kvmgmem.lab.kernel.kernel_cli import add_kernel_parser
    from kvmgmem.lab.kselftest_cli import add_kselftest_parser
    from kvmgmem.lab.matrix import add_matrix_parser
    from kvmgmem.lab.vm_cli import add_vm_parser
    from kvmgmem.mutate.mutate_cli import add_mutate_parser
    from kvmgmem.report import add_report_parser
    from kvmgmem.run import add_run_parser
    from kvmgmem.selftest import add_selftest_parser
    from kvmgmem.trace.replay import add_replay_parser
    from kvmgmem.trace.repro import add_repro_parser
    from kvmgmem.trace.text import add_trace_parser

    parser = argparse.ArgumentParser(
        prog="kvmgmem",
        description="Check the contract of guest_memfd on a real kernel: this one, or one in a QEMU guest.",
        epilog="Exit codes: 0 all as expected, 1 a test failed, 2 usage, 3 nothing ran, 4 the harness or its guest failed, "
        "5 the kernel reported a splat or died, 6 (repro) it cannot be said in C. Everything after -- goes to pytest.",
    )
    parser.add_argument("--version", action="version", version=f"kvmgmem {kvmgmem.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    add_selftest_parser(subparsers)
    add_caps_parser(subparsers)
    add_run_parser(subparsers)
    add_vm_parser(subparsers)
    add_kselftest_parser(subparsers)
    add_matrix_parser(subparsers)
    add_kernel_parser(subparsers)
    add_mutate_parser(subparsers)
    add_coverage_parser(subparsers)
    add_contract_parser(subparsers)
    add_fuzz_parser(subparsers)
    add_report_parser(subparsers)
    add_trace_parser(subparsers)
    add_replay_parser(subparsers)
    add_repro_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; every failure is one line that says what was wrong and what to do."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours, pytest_args = split_at_dashes(words)
    args = _parse(ours)
    args.pytest_args = pytest_args
    try:
        return dispatch(args)
    except HarnessError as error:
        return complain(error.message, error.hint, error.code)
    except KvmError as error:
        return complain(f"the kernel refused what every run needs: {error}", "see `kvmgmem caps`", ExitCode.HARNESS)
    except KeyboardInterrupt:
        return complain("interrupted; what had been written is kept", "", ExitCode.HARNESS)
    except BrokenPipeError:
        return ExitCode.OK


def _parse(words: list[str]) -> argparse.Namespace:
    """What the words mean; argparse ends the process where they mean nothing, under `git bisect run` with git's code."""
    try:
        return build_parser().parse_args(words)
    except SystemExit as end:
        if end.code and words[:1] == ["vm"] and any(word.partition("=")[0] == "--source" for word in words):
            raise SystemExit(ExitCode.BISECT_STOP) from None
        raise


def dispatch(args: argparse.Namespace) -> int:
    """Call the verb's function."""
    from kvmgmem.caps import run_caps
    from kvmgmem.contract_report import run_contract
    from kvmgmem.coverage.coverage_cli import run_coverage
    from kvmgmem.fuzz import run_fuzz
    from kvmgmem.lab.kernel.kernel_cli import run_kernel
    from kvmgmem.lab.kselftest_cli import run_kselftest
    from kvmgmem.lab.matrix import run_matrix
    from kvmgmem.lab.vm_cli import run_vm
    from kvmgmem.mutate.mutate_cli import run_mutate
    from kvmgmem.report import run_report
    from kvmgmem.run import run_run
    from kvmgmem.selftest import run_selftest
    from kvmgmem.trace.replay import run_replay
    from kvmgmem.trace.repro import run_repro
    from kvmgmem.trace.text import run_trace

    verbs = {
        "caps": run_caps,
        "contract": run_contract,
        "coverage": run_coverage,
        "fuzz": run_fuzz,
        "kernel": run_kernel,
        "kselftest": run_kselftest,
        "matrix": run_matrix,
        "mutate": run_mutate,
        "replay": run_replay,
        "report": run_report,
        "repro": run_repro,
        "run": run_run,
        "selftest": run_selftest,
        "trace": run_trace,
        "vm": run_vm,
    }
    return int(verbs[args.verb](args))


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what stands after it."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def complain(message: str, hint: str, code: int) -> int:
    """One line on standard error, its remedy on the next; returns the exit code."""
    sys.stdout.flush()
    sys.stderr.write(f"{ERROR_PREFIX}{message}\n")
    if hint:
        sys.stderr.write(f"  hint: {hint}\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
