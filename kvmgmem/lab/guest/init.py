"""PID 1 of the guest: mounts, says hello, runs pytest in a child, shows signs of life, says goodbye, powers off.

Two virtio-serial ports, because the kernel lets one process at a time open a port (port_fops_open in
drivers/char/virtio_console.c, EBUSY): *control*, held by PID 1, for hello, job, heartbeats and goodbye; *results*,
opened by the runner alone, on which each record has reached the host before the write returns. Nothing relays records, so a
kernel that dies right after a test's start record cannot take that record with it.

Whatever goes wrong here is said on the console and on the control port, and ends in power-off: never in a hang.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from kvmgmem._native import ffi
from kvmgmem.entry import address_of, syscall
from kvmgmem.errors import Answer, Errno

CONTROL_PORT = "org.kvmgmem.control"
RESULTS_PORT = "org.kvmgmem.results"
PROTOCOL = 3

HEARTBEAT_SECONDS = 5.0
PROJECT_DIRECTORY = "/kvmgmem"
MODULES_DIRECTORY = Path("/lib/kvmgmem-modules")
BROUGHT_MODULES = Path("/run/kvmgmem-modules")
RUNNER_OUTPUT = Path("/run/runner-output")
OUTPUT_TAIL = 64 * 1024
COLLECTED = signal.SIGUSR1
"""By what the runner tells PID 1 that it knows its tests; blocked from the start, so that none is lost."""
PORT_DEADLINE = 60.0
"""Seconds until a port that has not appeared is taken for missing; modules and slow emulation included."""

SPARE_CPU = "kvmgmem.spare_cpu"
"""On the kernel's command line: the first CPU is not to be used (kvmgmem.lab.guest.machine says why)."""

RNDRESEEDCRNG = 0x5207
"""_IO('R', 0x07), include/uapi/linux/random.h."""

WARM_MODULES = (
    "kvmgmem.arch.x86_64",
    "kvmgmem.caps",
    "kvmgmem.catalogue.known_bugs",
    "kvmgmem.io_uring",
    "kvmgmem.processes",
    "kvmgmem.testing.fixtures",
    "kvmgmem.testing.session",
    "kvmgmem.testing.storm",
)
"""What nearly every run imports, whatever its tests."""

# System calls that neither Python nor its os module has; the numbers of arm64 are those of the generic table.
NUMBERS = {
    "x86_64": {"mount": 165, "reboot": 169, "finit_module": 313},
    "aarch64": {"mount": 40, "reboot": 142, "finit_module": 273},
}[os.uname().machine]

# reboot(2): the two magic numbers, and LINUX_REBOOT_CMD_POWER_OFF.
POWER_OFF = (0xFEE1DEAD, 0x28121969, 0x4321FEDC)

# MS_NOSUID | MS_NODEV | MS_NOEXEC; debugfs and cgroup2 may be missing from a kernel, the rest may not.
MOUNTS = (
    ("proc", "/proc", "proc", 0xE, "", True),
    ("sysfs", "/sys", "sysfs", 0xE, "", True),
    ("devtmpfs", "/dev", "devtmpfs", 0x2, "mode=755", True),
    ("devpts", "/dev/pts", "devpts", 0xA, "mode=620", False),
    ("tmpfs", "/dev/shm", "tmpfs", 0x6, "mode=1777", True),
    ("tmpfs", "/tmp", "tmpfs", 0x6, "mode=1777", True),
    ("tmpfs", "/run", "tmpfs", 0x6, "mode=755", True),
    ("debugfs", "/sys/kernel/debug", "debugfs", 0xE, "", False),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", 0xE, "", False),
)

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": "/root",
    "TERM": "linux",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "KVMGMEM_WHERE": "guest",
}


class Control:
    """The line to the supervisor: JSON objects, one a line."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def send(self, record: str, **fields: object) -> None:
        data = json.dumps({"record": record, **fields}).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    def receive(self) -> dict[str, Any]:
        """Wait for one line. An end of file means that nobody listens yet on the host's side."""
        parts = [b""]
        while not parts[-1].endswith(b"\n"):
            part = os.read(self._fd, 65536)
            if part:
                parts.append(part)
            else:
                time.sleep(0.01)
        message = json.loads(b"".join(parts))
        if not isinstance(message, dict):
            raise ValueError("what the supervisor says is not a JSON object")
        return message


def main() -> NoReturn:
    """Run as PID 1; does not return."""
    if os.getpid() != 1:
        sys.exit("kvmgmem.lab.guest.init is the guest's init, nothing to run by hand")
    control: Control | None = None
    try:
        started = time.clock_gettime(time.CLOCK_BOOTTIME)
        _mount_all()
        words = Path("/proc/cmdline").read_text().split()
        if SPARE_CPU in words:
            os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
        _load_modules()
        _raise_loglevel()
        if "kvmgmem.shell" in words:
            _shell()
            _power_off()
        control = Control(_port_device(CONTROL_PORT))
        control.send("hello", protocol=PROTOCOL, init_started=started)
        _serve(control)
    except BaseException as error:  # PID 1 has nobody above it
        _report(control, error)
    finally:
        _power_off()


def _serve(control: Control) -> None:
    """Prepare a runner, say so, wait for its job, and see it through.

    At `ready` and at `collected` the supervisor may keep this machine, and go on from there another day. Nothing up to the
    one may depend on the tests; nothing up to the other may make objects of KVM that stay, or write records; and what comes
    after either must not trust the clock.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, COLLECTED})
    runner = Runner(control.receive())
    control.send("ready")
    job = control.receive()
    _catch_up(job)
    if job.get("modules"):
        _take_modules(job)
    runner.tell({key: value for key, value in job.items() if key != "modules"})
    status = _watch(control, runner, float(job.get("heartbeat", HEARTBEAT_SECONDS)))
    if job.get("counters"):
        from kvmgmem.lab.guest.gcov import messages

        for record, fields in messages():
            control.send(record, **fields)
    code = os.waitstatus_to_exitcode(status)
    control.send(
        "goodbye",
        exit=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        output=_output_tail(),
    )


class Runner:
    """The process that runs pytest: it loads what every run needs, waits for its job, and again before its first test."""

    def __init__(self, preparation: dict[str, Any]) -> None:
        """Fork it, and return when it is ready or dead."""
        job_reader, self._job_writer = os.pipe()
        ready_reader, ready_writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._job_writer)
            os.close(ready_reader)
            _become_runner(preparation, job_reader, ready_writer)
        os.close(job_reader)
        os.close(ready_writer)
        os.read(ready_reader, 1)
        os.close(ready_reader)

    def tell(self, message: dict[str, Any]) -> None:
        """Hand it a message, its job or the word to begin; how it ended, if it is dead, is for `_watch` to find."""
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._job_writer, data) :]


def _catch_up(message: dict[str, Any]) -> None:
    """Put the clock right and stir the entropy pool: this machine may have been kept since it booted."""
    import fcntl

    if "time" in message:
        time.clock_settime(time.CLOCK_REALTIME, float(message["time"]))
    if "entropy" in message:
        with Path("/dev/urandom").open("wb", buffering=0) as pool:
            pool.write(bytes.fromhex(message["entropy"]))
            fcntl.ioctl(pool, RNDRESEEDCRNG)


# --- the machine ------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments: int | str) -> Answer:
    kept = [ffi.new("char[]", argument.encode()) for argument in arguments if isinstance(argument, str)]
    texts = iter(kept)
    numbers = [address_of(next(texts)) if isinstance(argument, str) else argument for argument in arguments]
    return syscall(NUMBERS[name], *numbers)


def _mount_all() -> None:
    for source, target, kind, flags, options, needed in MOUNTS:
        with contextlib.suppress(OSError):  # below /sys a directory is there, or the kernel lacks the feature
            Path(target).mkdir(parents=True, exist_ok=True)
        answer = _call("mount", source, target, kind, flags, options)
        if isinstance(answer, Errno) and needed:
            raise OSError(-answer, f"mount {kind} on {target}: {answer.name}")
    with contextlib.suppress(OSError):
        Path("/proc/sys/kernel/hostname").write_text("kvmgmem-guest")
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        with contextlib.suppress(OSError):
            Path("/dev", link).symlink_to(target)


def _load_modules(directory: Path = MODULES_DIRECTORY) -> None:
    """Load what the image carries, or the job brought, in order; one that does not load is named on the console."""
    if not directory.is_dir():
        return
    parameters = module_parameters(Path("/proc/cmdline").read_text())
    for path in sorted(directory.iterdir()):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        answer = _call("finit_module", fd, parameters.get(module_name(path), ""), 0)
        if isinstance(answer, Errno) and answer != Errno.EEXIST:  # built in, or loaded already
            print(f"kvmgmem: module {path.name} does not load: {answer.name}", flush=True)
        os.close(fd)


def _take_modules(job: dict[str, Any]) -> None:
    """Load the modules that came with the job: base64 of zlib, by file name, in this order."""
    import base64
    import zlib

    BROUGHT_MODULES.mkdir()
    for name, data in dict(job["modules"]).items():
        (BROUGHT_MODULES / name).write_bytes(zlib.decompress(base64.b64decode(data)))
    _load_modules(BROUGHT_MODULES)


def module_name(path: Path) -> str:
    """The name of a module by that of its file in the image, "007-kvm-amd.ko": dashes are underscores to the kernel."""
    return path.name.partition("-")[2].removesuffix(".ko").replace("-", "_")


def module_parameters(command_line: str) -> dict[str, str]:
    """What the kernel's command line says for modules, by name: "kvm_amd.npt=0" gives {"kvm_amd": "npt=0"}.

    The kernel hands such words to what is built in; for a module, whoever loads it has to, as modprobe(8) does. Quotes
    keep a value with spaces together, and what stands behind "--" is for init (next_arg and parse_args, Linux 7.3). In a
    parameter's name the kernel itself takes dashes and underscores for one.
    """
    found: dict[str, list[str]] = {}
    for word in re.findall(r'(?:[^\s"]|"[^"]*"?)+', command_line):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        module, dot, parameter = name.partition(".")
        if dot and module and parameter:
            found.setdefault(module.replace("-", "_"), []).append(f"{parameter}{equals}{value}")
    return {module: " ".join(words) for module, words in found.items()}


def _raise_loglevel() -> None:
    """Put everything but debug messages on the console from here on: booting quietly was only faster."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/kernel/printk").write_text("7")


def _port_device(wanted: str) -> str:
    """Find a virtio-serial port by its name; the driver makes ports some time after it has found the device."""
    deadline = time.monotonic() + PORT_DEADLINE
    while time.monotonic() < deadline:
        for device, name in _ports():
            if name == wanted:
                return f"/dev/{device}"
        time.sleep(0.01)
    raise FileNotFoundError(
        f"no virtio-serial port named {wanted}: the kernel lacks VIRTIO_CONSOLE or VIRTIO_PCI, or the host gave none"
    )


def _ports() -> Iterator[tuple[str, str]]:
    root = Path("/sys/class/virtio-ports")
    if not root.is_dir():
        return
    for port in root.iterdir():
        with contextlib.suppress(OSError):
            yield port.name, (port / "name").read_text().strip()


def _power_off() -> NoReturn:
    _call("reboot", *POWER_OFF, 0)
    # Only a kernel without a way to power off gets here; init must not return (that would read as a panic).
    while True:
        time.sleep(1)


def _report(control: Control | None, error: BaseException) -> None:
    import traceback

    text = "".join(traceback.format_exception(error))
    print(f"kvmgmem: init failed\n{text}", flush=True)
    if control is not None:
        with contextlib.suppress(OSError):
            control.send("goodbye", exit=None, signal=None, error=f"{type(error).__name__}: {error}", output=text)


# --- the runner -------------------------------------------------------------------------------------------------------


def _watch(control: Control, runner: Runner, interval: float) -> int:
    """Reap every orphan, send heartbeats, have the runner begin when it may; its wait status once it has ended.

    SIGCHLD and `COLLECTED` are blocked.
    """
    next_beat = time.monotonic() + interval
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                raise RuntimeError("the runner vanished without a wait status") from None
            if pid == runner.pid:
                return status
            if pid == 0:
                break
        if time.monotonic() >= next_beat:
            control.send("heartbeat", time=time.time())
            next_beat += interval
        sign = signal.sigtimedwait({signal.SIGCHLD, COLLECTED}, max(0.0, next_beat - time.monotonic()))
        if sign is not None and sign.si_signo == COLLECTED:
            control.send("collected")
            word = control.receive()
            _catch_up(word)
            runner.tell(word)


def _become_runner(preparation: dict[str, Any], job_reader: int, ready_writer: int) -> NoReturn:
    """Run pytest in this child and leave without any clean-up of PID 1's."""
    code = 4
    try:
        _runner_process(preparation)
        _warm_up()
        os.close(ready_writer)
        with os.fdopen(job_reader, "rb") as messages:
            code = _run_pytest(json.loads(messages.readline()), messages)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 4
    except BaseException:  # the child must not return into PID 1's code
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _runner_process(preparation: dict[str, Any]) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.environ["KVMGMEM_ACCELERATOR"] = str(preparation.get("accelerator", ""))
    if preparation.get("flavour"):
        os.environ["KVMGMEM_FLAVOUR"] = str(preparation["flavour"])
    os.environ.update({str(name): str(value) for name, value in dict(preparation.get("environment", {})).items()})
    os.chdir(PROJECT_DIRECTORY)
    sys.dont_write_bytecode = True
    # PID 1 started in isolated mode; children that run sys.executable see the image's packages by its prefix.
    sys.argv = ["pytest"]
    sys.path.insert(0, PROJECT_DIRECTORY)


def _warm_up() -> None:
    """Load what pytest and its plugins are, by a run over nothing; what goes wrong here goes wrong again with the job."""
    import gc

    # Imports and collection make objects that all stay: looking for garbage among them would only cost time.
    gc.disable()
    with contextlib.suppress(BaseException):
        import importlib

        import pytest

        empty = Path("/run/nothing")
        empty.mkdir(exist_ok=True)
        quiet = ["-qq", "--no-summary", "-p", "no:cacheprovider", f"--rootdir={empty}", "-c", "/dev/null"]
        pytest.main(["--collect-only", *quiet, str(empty)])
        for name in WARM_MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _run_pytest(job: dict[str, Any], messages: IO[bytes]) -> int:
    output = os.open(RUNNER_OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update({str(name): str(value) for name, value in dict(job.get("environment", {})).items()})

    import pytest

    from kvmgmem.lab.guest.selection import Selection

    def await_word() -> dict[str, Any]:
        os.kill(1, COLLECTED)
        return dict(json.loads(messages.readline()))

    arguments = [
        *(str(argument) for argument in job["pytest_args"]),
        f"--rootdir={PROJECT_DIRECTORY}",
        f"--results={_port_device(RESULTS_PORT)}",
    ]
    return int(pytest.main(arguments, plugins=[Selection(await_word)]))


def _output_tail() -> str:
    """What the runner printed, its last part: pytest's own words about a usage error or a failed collection."""
    try:
        with RUNNER_OUTPUT.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - OUTPUT_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _shell() -> None:
    """A shell on the serial console, with job control; its end powers the guest off."""
    shell = ["/bin/busybox", "sh", "-l"] if Path("/bin/busybox").exists() else ["/usr/bin/python3", "-q"]
    if shell[0].endswith("busybox"):
        os.spawnv(os.P_WAIT, shell[0], ["busybox", "--install", "-s", "/bin"])
    pid = os.fork()
    if pid == 0:
        import fcntl
        import termios

        os.setsid()
        terminal = os.open("/dev/ttyS0", os.O_RDWR)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(terminal, fd)
        os.chdir(PROJECT_DIRECTORY)
        told = {name: value for name, value in os.environ.items() if name.startswith("KVMGMEM_")}
        os.execve(shell[0], shell, {**ENVIRONMENT, **told, "PS1": "guest:\\w# "})
    while os.waitpid(-1, 0)[0] != pid:
        pass
