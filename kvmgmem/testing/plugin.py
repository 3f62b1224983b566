"""The pytest plugin: options, markers, fixtures, and one process for each selftest.

Registered as an entry point, and inert for tests that use none of it: a test is ours if it takes one of our fixtures or
carries one of our markers.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmgmem.errors import ERROR_PREFIX, HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.results.records import Verdict
from kvmgmem.testing import fixtures, requirements
from kvmgmem.testing.fixtures import (
    bound,
    cpu,
    effort,
    gmem,
    gmem_kind,
    host,
    kvm,
    machine,
    running,
    vm,
    vm_type,
)
from kvmgmem.testing.lifetime import LifetimeWatch
from kvmgmem.testing.requirements import Missing
from kvmgmem.testing.session import DEFAULT_TIMEOUT, Session, Settings
from kvmgmem.testing.waiting import TIME_SCALE

if TYPE_CHECKING:
    from kvmgmem.trace.pytest_plugin import TracePlugin  # noqa: F401 - ruff overlooks the quoted subscript

__all__ = ["bound", "cpu", "effort", "gmem", "gmem_kind", "host", "kvm", "machine", "running", "vm", "vm_type"]

OUR_FIXTURES = frozenset(__all__)
OUR_MARKERS = ("contract", "requires", "disruptive")
SESSION = pytest.StashKey[Session]()
RESULTS = pytest.StashKey[Path]()
WATCH = pytest.StashKey[LifetimeWatch | None]()
TRACER = pytest.StashKey["TracePlugin"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line of a run."""
    group = parser.getgroup("kvmgmem", "kvmgmem: guest_memfd selftests")
    group.addoption("--results", metavar="FILE", help="append one JSON record a line here, as things happen")
    group.addoption(
        "--require",
        metavar="NAMES",
        default="",
        help="comma-separated requirements whose lack fails a test instead of skipping it (kvmgmem caps lists them)",
    )
    group.addoption("--disruptive", action="store_true", help="also run tests that could take this host down")
    group.addoption(
        "--test-timeout",
        metavar="SECONDS",
        type=float,
        default=DEFAULT_TIMEOUT,
        help=f"what one test may take, scaled under emulation (default {DEFAULT_TIMEOUT:g})",
    )
    group.addoption("--no-isolation", action="store_true", help="run tests in pytest's own process, for a debugger")
    group.addoption("--trace-to", metavar="DIR", help="record every call of each selftest in a file of its own there")
    group.addoption("--shuffle", metavar="SEED", type=int, help="run the tests in an order that depends on this number")
    group.addoption("--effort", metavar="X", type=float, default=1.0, help="scale the volume of long tests (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers and check what can be checked before anything runs."""
    for line in (
        "contract(*rows): the rows of the contract that the test asserts",
        "requires(*names): what the test needs of the kernel under test",
        "vm_types(*labels): the VM types it runs on",
        "gmem_kinds(*names): the gmem kinds it runs on",
        "makes_gmem: it makes gmems without the fixture, so VM types that have none are skipped",
        "would_show(*bugs): known bugs that would make the kernel complain, hang or die under the test",
        "disruptive: it can take a kernel with known bugs down; a host runs it only with --disruptive",
        "test_timeout(seconds): its own budget",
    ):
        config.addinivalue_line("markers", line)
    if config.getoption("--results") and not config.option.collectonly:
        # At work while the tests are being collected: it takes a second to get ready under emulation.
        config.stash[WATCH] = LifetimeWatch()
    if config.getoption("--trace-to"):
        from kvmgmem.trace.pytest_plugin import TracePlugin

        config.stash[TRACER] = TracePlugin(config.getoption("--trace-to"), is_ours)
        config.pluginmanager.register(config.stash[TRACER])
    for name in _required(config):
        try:
            requirements.lookup(name)
        except HarnessError as error:
            raise pytest.UsageError(f"--require: {error.message}; {error.hint}") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the watcher if no run did."""
    watch = config.stash.get(WATCH, None)
    if watch is not None:
        watch.close()


def _required(config: pytest.Config) -> frozenset[str]:
    return frozenset(filter(None, (name.strip() for name in config.getoption("--require").split(","))))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `vm_type` and `gmem_kind` what the kernel under test offers."""
    try:
        fixtures.parametrize(metafunc)
    except HarnessError as error:
        _stop(error)


def _stop(error: HarnessError) -> None:
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    pytest.exit(f"{ERROR_PREFIX}{error.message}{hint}", returncode=int(error.code))


def is_ours(item: pytest.Item) -> bool:
    """Whether a test is a selftest of a kernel, by its fixtures and markers."""
    return any(item.get_closest_marker(name) for name in OUR_MARKERS) or _takes_our_fixture(item)


def _takes_our_fixture(item: pytest.Item) -> bool:
    """Whether a fixture of the test is this plugin's own, and not another one of the same name."""
    found = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    wanted = OUR_FIXTURES.intersection(found)
    return any(definition.func.__module__ == fixtures.__name__ for name in wanted for definition in found[name][-1:])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An empty parameter list would be a silent skip: it is a failure. The order is that of the files, or shuffled."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        # By each test's own name: the order of some is the same whichever others run, in this guest or the next.
        items.sort(key=lambda item: hashlib.sha256(f"{seed}:{item.nodeid}".encode()).digest())
    for item in items:
        for mark in item.iter_markers("skip"):
            if str(mark.kwargs.get("reason", "")).startswith("got empty parameter set"):
                raise pytest.UsageError(f"{item.nodeid}: its parameter list is empty, so it would test nothing")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the run once it is known which of our tests it holds."""
    config = session.config
    ours = [item for item in session.items if is_ours(item)]
    if not ours or config.option.collectonly or config.getoption("--no-isolation"):
        return
    try:
        from kvmgmem import host as host_facts

        host_facts.probe()
        run = Session(_settings(config), config.stash.setdefault(WATCH, None) or LifetimeWatch())
    except HarnessError as error:
        _stop(error)
        return
    config.stash[SESSION] = run
    config.stash[RESULTS] = run.settings.results
    run.begin(ours)
    tracer = config.stash.get(TRACER, None)
    if tracer is not None:
        tracer.stream, tracer.circumstances = run.stream, run.circumstances()
        run.trace_of, run.tell_outlived = tracer.path_of, tracer.outlived


def _settings(config: pytest.Config) -> Settings:
    results = config.getoption("--results")
    if not results:
        handle, results = tempfile.mkstemp(prefix="kvmgmem-", suffix=".jsonl")
        os.close(handle)
    return Settings(
        results=Path(results),
        required=_required(config),
        disruptive=config.getoption("--disruptive"),
        timeout=config.getoption("--test-timeout"),
        seed=config.getoption("--shuffle"),
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Run a selftest in its own process; other tests go pytest's usual way."""
    run = item.config.stash.get(SESSION, None)
    if run is None or not is_ours(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports, _ = _run_or_skip(run, item)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_or_skip(run: Session, item: pytest.Item) -> tuple[list[pytest.TestReport], object]:
    if item.get_closest_marker("disruptive") and not (run.settings.disruptive or run.where == "guest"):
        return run.skip(item, "it could take this host down: give --disruptive, or run it in a guest", None)
    missing = requirements.first_missing(_requirements_of(item))
    if missing is not None:
        return run.skip(item, missing.missing, missing)
    mark = item.get_closest_marker("test_timeout")
    return run.run(item, (mark.args[0] if mark else run.settings.timeout) * TIME_SCALE)


def _requirements_of(item: pytest.Item) -> list[str]:
    # A program among the tests (the kernel's own selftests) says itself what it needs.
    always = ["guest-memfd"] if isinstance(item, pytest.Function) else []
    return list(dict.fromkeys([*always, *(name for mark in item.iter_markers("requires") for name in mark.args)]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without isolation, requirements are checked here."""
    if item.config.getoption("--no-isolation") and is_ours(item):
        requirements.need(*_requirements_of(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the requirement's name on the report of a skip from within a test."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, pytest.skip.Exception):
        report.__dict__["skip_reason"] = str(call.excinfo.value)
    if call.excinfo is not None and isinstance(call.excinfo.value, Missing):
        # An attribute of ours: it survives pytest's serialisation between processes.
        report.__dict__["requirement"] = call.excinfo.value.requirement.name
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the end of the run; its exit status is the harness's, not pytest's."""
    run = session.config.stash.get(SESSION, None)
    if run is None:
        if session.config.getoption("--results"):
            session.exitstatus = PYTEST_CODES.get(exitstatus, exitstatus)
        return
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        run.left_out.append("the rest of the tests: the run was interrupted")
        code: int = ExitCode.HARNESS
    else:
        code = _exit_code(run, exitstatus)
    session.exitstatus = code
    run.end(code)


# Pytest's own numbers mean other things than ours: its internal error, for one, is our "nothing ran".
PYTEST_CODES: dict[int, ExitCode] = {
    pytest.ExitCode.INTERRUPTED: ExitCode.HARNESS,
    pytest.ExitCode.INTERNAL_ERROR: ExitCode.HARNESS,
    pytest.ExitCode.USAGE_ERROR: ExitCode.USAGE,
    pytest.ExitCode.NO_TESTS_COLLECTED: ExitCode.NOTHING_RAN,
}


def _exit_code(run: Session, exitstatus: int) -> int:
    counts = run.counts
    if counts.get(Verdict.SPLAT) or counts.get(Verdict.PANICKED):
        return ExitCode.KERNEL
    if counts.get(Verdict.ERROR):
        return ExitCode.HARNESS
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return PYTEST_CODES.get(exitstatus, exitstatus)
    if any(counts.get(verdict) for verdict in (Verdict.FAILED, Verdict.CRASHED, Verdict.TIMEOUT)):
        return ExitCode.TEST_FAILED
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        return ExitCode.TEST_FAILED
    ran = sum(number for verdict, number in counts.items() if verdict != Verdict.SKIPPED)
    return ExitCode.OK if ran else ExitCode.NOTHING_RAN


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    """The summary by contract area, unless the command line tool writes its own."""
    # The annotation is a string because pytest has that name only from 8.4 on (seen: 8.0.0 to 8.3.5 do not).
    results = config.stash.get(RESULTS, None)
    if results is None or os.environ.get("KVMGMEM_NO_SUMMARY"):
        return
    from kvmgmem.results.run import read_run
    from kvmgmem.results.summary import write_summary
    from kvmgmem.results.text import wants_colour

    terminalreporter.ensure_newline()
    terminalreporter.write_line("")
    write_summary(read_run([results]), sys.stdout, wants_colour(sys.stdout))
