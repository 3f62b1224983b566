"""The watch on VM lifetimes where it is hard: events that do not reach it, and a watcher that is gone."""

import os
import signal
import socket
from collections.abc import Callable

import pytest

from kvmgmem.host import DEBUGFS
from kvmgmem.kvm import Kvm
from kvmgmem.processes import Channel, ChildProcess
from kvmgmem.testing import debugfs, lifetime
from kvmgmem.testing.lifetime import LifetimeWatch, WatchError

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm on this machine"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debugfs is root's"),
]


def in_child(function: Callable[[], object]) -> object:
    """What a function returns in a process that has debugfs, which this one's tests do without."""

    def run(_: Channel) -> object:
        assert debugfs.mount_privately() == ""
        return function()

    with ChildProcess(run) as child:
        return child.result(60)


def deaf() -> LifetimeWatch:
    """A watch that has missed the ends of many VMs, because there is room for a handful of events only."""

    def make_small(fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as uevents:
            uevents.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    lifetime._enlarge = make_small
    watch = LifetimeWatch()
    watch.wait_ready()
    os.kill(watch.pid, signal.SIGSTOP)
    with Kvm.open() as kvm:
        for _ in range(50):
            kvm.create_vm().close()
    os.kill(watch.pid, signal.SIGCONT)
    return watch


def test_where_events_were_lost_debugfs_tells_who_lives() -> None:
    """Neither is a VM taken for alive whose end was not heard of, nor one overlooked that is there."""

    def counted() -> tuple[int, int, int]:
        watch, me = deaf(), os.getpid()
        none = watch.alive().get(me, 0)
        with Kvm.open() as kvm, kvm.create_vm(), kvm.create_vm():
            two = watch.alive().get(me, 0)
        return none, two, watch.alive().get(me, 0)

    assert in_child(counted) == (0, 2, 0)


def test_without_debugfs_lost_events_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that cannot tell says so."""

    def asked() -> str:
        watch = deaf()
        monkeypatch.setattr(lifetime, "DEBUGFS", DEBUGFS / "nowhere")
        with pytest.raises(WatchError) as raised:
            watch.alive()
        return str(raised.value)

    assert "an event of KVM's was lost" in str(in_child(asked))


def test_a_watcher_that_died_is_an_error() -> None:
    """Whatever ended it: to ask it is no reason for the runner to end, too."""
    watch = LifetimeWatch()
    watch.wait_ready()
    os.kill(watch.pid, signal.SIGKILL)
    os.waitid(os.P_PID, watch.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WatchError, match="died"):
        watch.alive()
    watch.close()
