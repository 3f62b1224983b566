"""The cache: one writer at a time, whole entries or none, and a clear word when the disk is full."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a snippet in a process of its own, as limits and locks belong to processes."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVMGMEM_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/kvmgmem"),
        ({"XDG_CACHE_HOME": "relative"}, "/h/.cache/kvmgmem"),
        ({}, "/h/.cache/kvmgmem"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    """Our own variable, then XDG's, then the home folder."""
    for name in ("KVMGMEM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"HOME": "/h"}).items():
        monkeypatch.setenv(name, value)
    assert cache.cache_root() == Path(expected)


def test_a_lock_excludes_another_process(tmp_path: Path) -> None:
    """While one process holds an entry's lock, another waits, says so, and in the end gives up with the path."""
    entry = tmp_path / "entry"
    code = """
        import sys
        from pathlib import Path
        from kvmgmem.errors import HarnessError
        from kvmgmem.lab import cache
        try:
            with cache.locked(Path(sys.argv[1]), print, timeout=0.3):
                print("got it")
        except HarnessError as error:
            print(error.message)
    """
    with cache.locked(entry):
        waiting = run_python(code, str(entry)).stdout.splitlines()
        other = run_python(code, str(tmp_path / "other")).stdout.splitlines()
    assert len(waiting) == 2
    assert "entry, waiting" in waiting[0]
    assert str(entry) in waiting[1]
    assert other == ["got it"]
    assert run_python(code, str(entry)).stdout.splitlines() == ["got it"]


def test_shared_holders_exclude_only_a_writer(tmp_path: Path) -> None:
    """Two builds may read one source; nobody may remove it meanwhile."""
    entry = tmp_path / "entry"
    with cache.locked(entry, shared=True):
        with cache.locked(entry, shared=True, timeout=0):
            pass
        with pytest.raises(HarnessError, match="in use by another process"), cache.locked(entry, timeout=0):
            pass
    with cache.locked(entry, timeout=0), pytest.raises(HarnessError), cache.locked(entry, shared=True, timeout=0):
        pass


def test_a_lock_excludes_another_thread(tmp_path: Path) -> None:
    """Two builds in one process exclude each other too."""
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait(10)
        with cache.locked(tmp_path / "entry"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with cache.locked(tmp_path / "entry"):
        inside.set()
        thread.join(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """The kernel drops the lock with the process, so nothing ever has to be cleaned up by hand."""
    entry = tmp_path / "entry"
    code = """
        import sys, time
        from pathlib import Path
        from kvmgmem.lab import cache
        with cache.locked(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(entry)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HarnessError), cache.locked(entry, timeout=0.1):
            pass
        holder.kill()
        holder.wait(10)
        with cache.locked(entry, timeout=5):
            pass


def test_a_new_entry_appears_whole(tmp_path: Path) -> None:
    """Nobody sees the entry before the block has ended, and an older one is replaced as a whole."""
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "old").touch()
    with cache.new_entry(entry) as fresh:
        (fresh / "new").touch()
        assert [file.name for file in entry.iterdir()] == ["old"]
    assert [file.name for file in entry.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [entry]


def test_a_failed_new_entry_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    """An exception in the block, Ctrl-C included, undoes all of it."""
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "old").touch()

    def interrupted() -> None:
        with cache.new_entry(entry) as fresh:
            (fresh / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in entry.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [entry]


def test_what_a_killed_writer_left_is_swept_up(tmp_path: Path) -> None:
    """The next holder of the lock removes the half-made folders of this entry, and of no other."""
    stale = tmp_path / ".entry.new-0badcafe"
    foreign = tmp_path / ".other.new-0badcafe"
    stale.mkdir()
    foreign.mkdir()
    with cache.new_entry(tmp_path / "entry"):
        assert not stale.exists()
    assert foreign.exists()


def test_a_file_that_does_not_fit_is_a_harness_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A write that the kernel cuts short (here by RLIMIT_FSIZE) names the place and the remedy; the old file stays."""
    target = tmp_path / "file"
    target.write_bytes(b"old")
    code = """
        import resource, sys
        from pathlib import Path
        from kvmgmem.errors import HarnessError
        from kvmgmem.lab import cache
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        cache.write_file(Path(sys.argv[1]), b"x" * 65536)
        print("fits")
        try:
            cache.write_file(Path(sys.argv[1]), b"y" * 65537)
        except HarnessError as error:
            print(error.message)
            print(error.hint)
            print(int(error.code))
    """
    answer = run_python(code, str(target))
    fits, message, hint, exit_code = answer.stdout.splitlines()
    assert fits == "fits"
    assert message.startswith(f"no room left at {tmp_path}: ")
    assert "KVMGMEM_CACHE" in hint
    assert exit_code == "4"
    assert target.read_bytes() == b"x" * 65536
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_device_without_room_is_recognised() -> None:
    """/dev/full answers ENOSPC to every write."""
    with pytest.raises(HarnessError, match="no room left"), cache.disk_errors(Path("/dev")):
        Path("/dev/full").write_bytes(b"x")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a tmpfs of its own")
def test_a_full_filesystem_keeps_no_half_entry(tmp_path: Path) -> None:
    """An entry that outgrows its disk is removed again, so that the room it took comes back."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "kvmgmem-test", str(tmp_path)], timeout=30, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this root may not mount a tmpfs")
    try:
        before = cache.free_bytes(tmp_path)
        with pytest.raises(HarnessError, match="no room left"), cache.new_entry(tmp_path / "entry") as fresh:
            (fresh / "big").write_bytes(b"x" * (2 << 20))
        assert list(tmp_path.iterdir()) == []
        assert cache.free_bytes(tmp_path) == before
    finally:
        subprocess.run(["umount", str(tmp_path)], timeout=30, check=True)


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    """The message has what is free and what is needed, in words for people."""
    cache.require_room(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(HarnessError, match=r"no room left at .*: .* free, and this needs about 1000000\.0 GB"):
        cache.require_room(tmp_path, 10**15)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_is_said_so(tmp_path: Path) -> None:
    """The remedy is another folder."""
    tmp_path.chmod(0o500)
    with pytest.raises(HarnessError, match="cannot write to") as caught:
        cache.write_file(tmp_path / "file", b"")
    assert "KVMGMEM_CACHE" in caught.value.hint


def test_other_errors_of_the_system_are_left_alone(tmp_path: Path) -> None:
    """Only a full or forbidden disk is translated; a bug of ours stays one."""
    with pytest.raises(FileNotFoundError), cache.disk_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


def test_remove_says_what_it_freed(tmp_path: Path) -> None:
    """Files and folders alike, and a missing one frees nothing."""
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "file").write_bytes(b"x" * 100_000)
    assert cache.remove(tmp_path / "entry") >= 100_000
    assert not (tmp_path / "entry").exists()
    assert cache.remove(tmp_path / "entry") == 0


def test_sizes_are_for_people() -> None:
    """Gigabytes with one digit, megabytes without."""
    assert cache.size_text(1_450_000_000) == "1.4 GB"
    assert cache.size_text(73_000_000) == "73 MB"
