"""Building for mutants: when the unmutated kernel is configured, and what make is told."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmgmem.lab import cache
from kvmgmem.lab.kernel.kbuild import IMAGE, BuildRequest
from kvmgmem.lab.progress import Progress
from kvmgmem.mutate import build as build_module
from kvmgmem.mutate.build import FRAGMENT, Built, build_again, build_base, mutate_flavour
from kvmgmem.mutate.tree import OBJECTS


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[BuildRequest]:
    """Every build that began with a configuration; each leaves an image."""
    requests: list[BuildRequest] = []

    def build(request: BuildRequest, progress: Progress) -> SimpleNamespace:
        requests.append(request)
        image = request.objects / IMAGE
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text("image")
        (request.objects / FRAGMENT).write_text(request.flavour.fragment)
        return SimpleNamespace(image=image)

    monkeypatch.setattr(build_module, "build", build)
    monkeypatch.setattr(cache, "require_room", lambda *_: None)
    return requests


def base(tree: Path) -> Path:
    return build_base(tree, tree / "log", 1, Progress("mutants"))


def test_a_kernel_that_was_configured_alike_is_only_brought_up_to_date(
    tmp_path: Path, configured: list[BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(tree: Path, *_: object) -> Built:
        made.append(tree)
        return Built("", 1.0)

    monkeypatch.setattr(build_module, "build_again", make)
    first = base(tmp_path)
    assert (len(configured), made) == (1, [])
    assert base(tmp_path) == first
    assert (len(configured), made) == (1, [tmp_path])
    (tmp_path / OBJECTS / FRAGMENT).write_text("CONFIG_KVM=y\n")
    base(tmp_path)
    assert (len(configured), made) == (2, [tmp_path])


def test_a_kernel_that_make_complains_about_is_configured_anew(
    tmp_path: Path, configured: list[BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source may have new options, which make will not choose by itself."""
    monkeypatch.setattr(build_module, "build_again", lambda *_: Built("Restart config... aborted", 1.0))
    base(tmp_path)
    base(tmp_path)
    assert [request.flavour for request in configured] == [mutate_flavour()] * 2


def make_is(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the shell script `text` stand in for make."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "make").write_text(f"#!/bin/sh\n{text}\n")
    (programs / "make").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_make_is_told_its_goals_and_what_it_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_is('echo "$@"; case "$*" in *broken*) echo "x.c:1: error: no"; exit 2;; esac', tmp_path, monkeypatch)
    log = tmp_path / "log"
    built = build_again(tmp_path, log, 2, goals=("virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko"))
    assert built.error == ""
    assert log.read_text() == f"-C {tmp_path} O={tmp_path / OBJECTS} -j2 virt/lib/irqbypass.ko arch/x86/kvm/kvm.ko\n"
    assert build_again(tmp_path, log, 2, goals=("broken.ko",)).error == "x.c:1: error: no"


def test_a_build_tells_what_its_compilers_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not make alone, which hardly does anything itself."""
    burn = f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.3: pass'"
    make_is(f"{burn}\ntrue", tmp_path, monkeypatch)
    built = build_again(tmp_path, tmp_path / "log", 1)
    assert built.error == ""
    assert 0.29 <= built.cpu_seconds < 5


def test_a_build_that_is_told_to_stop_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_is("sleep 60", tmp_path, monkeypatch)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    built = build_again(tmp_path, tmp_path / "log", 1, stop)
    assert built.error.startswith("make was not done after")
    assert built.seconds < 30
