"""apt's sources as people write them, and what is asked of the archives in them."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel import apt
from kvmgmem.lab.kernel.apt import Package, Source
from kvmgmem.lab.progress import Progress

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt: its own parser is the judge")

DEB822 = """\
# The archive.
Types: deb deb-src
URIs: http://archive.example.invalid/debian
Suites: bookworm bookworm-updates
Components: main contrib
# a comment inside a stanza is legal
Signed-By: /usr/share/keyrings/example.gpg

Types: deb-src
URIs: http://sources.example.invalid/debian
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://disabled.example.invalid/debian
Suites: bookworm
Components: main
\t
types: deb
uris: http://key.example.invalid/debian
suites: trixie
components: main
Check-Valid-Until: no
Targets: Packages Contents-deb
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEexample
 -----END PGP PUBLIC KEY BLOCK-----
"""

ONE_LINE = """\
# deb http://commented.example.invalid/debian bookworm main
deb http://plain.example.invalid/debian bookworm main contrib # trailing
deb-src http://plain.example.invalid/debian bookworm main
  deb [arch=amd64,arm64 signed-by=/etc/keys/a.gpg check-valid-until=no] http://opt.example.invalid/debian trixie main

deb [ arch+=i386 trusted=yes ] http://spaced.example.invalid/debian trixie main
deb http://flat.example.invalid/packages ./
debris http://nonsense.example.invalid/debian bookworm main
"""


def test_deb822_sources_are_read() -> None:
    """Enabled binary entries only; comments, case and an embedded key are as sources.list(5) has them."""
    first, second = apt.parse_deb822(DEB822)
    assert first == Source(
        ("bookworm", "bookworm-updates"),
        ("main", "contrib"),
        (("uris", "http://archive.example.invalid/debian"), ("signed-by", "/usr/share/keyrings/example.gpg")),
    )
    assert second.suites == ("trixie",)
    fields = dict(second.fields)
    assert fields["check-valid-until"] == "no"
    assert fields["signed-by"].splitlines()[1:] == [
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " mDMEexample",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]
    assert "targets" not in fields


def test_one_line_sources_are_read() -> None:
    """Options in brackets become the fields that deb822 has for them."""
    plain, options, spaced, flat = apt.parse_one_line(ONE_LINE)
    assert plain == Source(("bookworm",), ("main", "contrib"), (("uris", "http://plain.example.invalid/debian"),))
    assert options == Source(
        ("trixie",),
        ("main",),
        (
            ("uris", "http://opt.example.invalid/debian"),
            ("architectures", "amd64 arm64"),
            ("signed-by", "/etc/keys/a.gpg"),
            ("check-valid-until", "no"),
        ),
    )
    assert dict(spaced.fields) == {
        "uris": "http://spaced.example.invalid/debian",
        "architectures-add": "i386",
        "trusted": "yes",
    }
    assert flat.suites == ("./",)
    assert flat.components == ()


def test_files_are_read_by_their_suffix(tmp_path: Path) -> None:
    """What apt ignores (a backup, a disabled file) is ignored here too."""
    for name in ("a.list", "a.list.save", "a.sources.disabled", "README"):
        (tmp_path / name).write_text(ONE_LINE)
    (tmp_path / "a.sources").write_text(DEB822)
    counts = {file.name: len(apt.read_sources(file)) for file in tmp_path.iterdir()}
    assert counts == {"a.list": 4, "a.list.save": 0, "a.sources.disabled": 0, "README": 0, "a.sources": 2}


def test_entries_of_one_archive_are_merged_and_only_main_is_kept() -> None:
    """Same fields, same archive; another key is another archive; a flat repository has no kernels."""
    sources = [
        Source(("bookworm",), ("main",), (("uris", "u"),)),
        Source(("bookworm", "trixie"), ("contrib", "main"), (("uris", "u"),)),
        Source(("bookworm",), ("main",), (("uris", "u"), ("signed-by", "k"))),
        Source(("bookworm",), ("contrib",), (("uris", "u"),)),
        Source(("./",), (), (("uris", "flat"),)),
    ]
    assert apt.merge_sources(sources) == [
        Source(("bookworm", "trixie"), ("main",), (("uris", "u"),)),
        Source(("bookworm",), ("main",), (("uris", "u"), ("signed-by", "k"))),
    ]


def test_a_debian_archive_is_asked_for_its_later_suites() -> None:
    """The configured ones first, nothing twice, nothing older."""
    asked = apt.further_suites(["trixie", "trixie-updates"])
    assert asked[:2] == ["trixie", "trixie-updates"]
    assert {"trixie-backports", "forky", "forky-backports", "sid", "experimental"} <= set(asked)
    assert not any(suite.startswith("bookworm") for suite in asked)
    assert len(asked) == len(set(asked))


def test_a_security_archive_is_asked_for_security_suites_only() -> None:
    """It has no others, and asking costs time."""
    asked = apt.further_suites(["bookworm-security"])
    assert asked[:2] == ["bookworm-security", "trixie-security"]
    assert all(suite.endswith("-security") for suite in asked)


@pytest.mark.parametrize("suite", ["noble-updates", "cloud-sdk-bookworm", "nodistro", "bookworm-pgdg"])
def test_other_archives_are_asked_for_what_is_configured(suite: str) -> None:
    """Another distribution's suites are not guessed at."""
    assert apt.further_suites([suite]) == [suite]


def test_madison_is_read() -> None:
    """Name, version and suite, from lines that apt pads with spaces; source entries are none of ours."""
    text = (
        " linux-source-7.3 | 7.3~rc7-1~exp1 | http://a.example.invalid/debian experimental/main amd64 Packages\n"
        "linux-source-7.3 |    7.3.4-1 | mirror+file:/etc/mirrors trixie-backports/main amd64 Packages\n"
        "linux-source-7.3 |    7.3.4-1 | http://a.example.invalid/debian trixie-backports/main Sources\n"
    )
    assert apt.parse_madison(text) == [
        Package("linux-source-7.3", "7.3~rc7-1~exp1", "experimental/main"),
        Package("linux-source-7.3", "7.3.4-1", "trixie-backports/main"),
    ]


@needs_apt
def test_versions_are_in_dpkgs_order() -> None:
    """A release candidate is older than its release, ten newer than nine, and one version counts once."""
    versions = ["7.3~rc7-1", "7.3.4-1", "7.3.10-1", "6.12.9-1", "7.3.4-1~bpo13+1", "7.3.4-1"]
    ordered = apt.newest_first(Package("p", version, "s") for version in versions)
    assert [package.version for package in ordered] == [
        "7.3.10-1",
        "7.3.4-1",
        "7.3.4-1~bpo13+1",
        "7.3~rc7-1",
        "6.12.9-1",
    ]


@needs_apt
def test_apt_itself_accepts_what_is_written_for_it(tmp_path: Path) -> None:
    """apt reads the rendered sources and the private configuration, and finds every archive and suite in them."""
    (tmp_path / "sources.d").mkdir()
    (tmp_path / "apt.conf").write_text(apt.private_configuration(tmp_path))
    sources = [*apt.parse_deb822(DEB822), *apt.merge_sources(apt.parse_one_line(ONE_LINE))]
    (tmp_path / "sources.d" / "kvmgmem.sources").write_text(apt.render(sources))
    # Nothing has been fetched yet, hence the option; it also adds targets that would be chosen only with what it lacks.
    command = ["apt-get", "-c", str(tmp_path / "apt.conf"), "indextargets", "--no-release-info"]
    answer = subprocess.run(
        [*command, "--format", "$(SITE) $(RELEASE) $(FILENAME)"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert {(site.split("//")[1].split(".")[0], suite) for site, suite, _ in rows} == {
        ("archive", "bookworm"),
        ("archive", "bookworm-updates"),
        ("key", "trixie"),
        ("plain", "bookworm"),
        ("opt", "trixie"),
        ("spaced", "trixie"),
    }
    assert all(filename.startswith(f"{tmp_path}/lists/") for _, _, filename in rows)


@needs_apt
def test_the_private_root_keeps_the_systems_hooks_and_folders_out(tmp_path: Path) -> None:
    """Systems hang commands on apt's update that clean the system's caches; they must not run for us."""
    (tmp_path / "hook.conf").write_text('APT::Update::Post-Invoke { "touch /nonexistent"; };\nAcquire::Retries "9";\n')
    (tmp_path / "apt.conf").write_text(apt.private_configuration(tmp_path))
    answer = subprocess.run(
        ["apt-config", "-c", str(tmp_path / "hook.conf"), "-c", str(tmp_path / "apt.conf"), "dump"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    settings = dict(line.rstrip(";").split(" ", 1) for line in answer.stdout.splitlines() if line.endswith(";"))
    assert not any("Invoke::" in name for name in settings)
    assert settings["Dir::State::lists"] == f'"{tmp_path}/lists"'
    assert settings["Dir::State::status"] == '"/dev/null"'
    assert settings["Dir::Cache"] == f'"{tmp_path}/cache"'
    assert settings["Acquire::AllowInsecureRepositories"] == '"false"'


def test_a_machine_without_apt_is_told_what_else_it_can_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fedora and the like have no apt; a source tree works everywhere."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HarnessError, match="has no apt-get") as caught:
        apt.AptArchive(Progress("test"), tmp_path)
    assert "--source DIR" in caught.value.hint


@needs_apt
def test_an_archive_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is found, nothing is invented: apt's first complaint is in the message."""
    nowhere = Source(("bookworm",), ("main",), (("uris", f"file:{tmp_path}/nowhere"),))
    monkeypatch.setattr(apt, "system_sources", lambda: [nowhere])
    archive = apt.AptArchive(Progress("test"), tmp_path / "root")
    with pytest.raises(HarnessError, match=r"apt could not read any package list: .*bookworm") as caught:
        archive.find("linux-source-.*")
    assert "apt-get update" in caught.value.hint


def local_archive(folder: Path) -> Path:
    """A flat little archive on disk with one package in suite `bookworm`, not signed."""
    index = folder / "dists" / "bookworm" / "main" / "binary-amd64"
    index.mkdir(parents=True)
    control = folder / "tree" / "DEBIAN"
    control.mkdir(parents=True)
    (control / "control").write_text(
        "Package: linux-source-9.9\nVersion: 9.9.1-1\nArchitecture: all\nMaintainer: a <a@example.invalid>\n"
        "Description: a test\n"
    )
    subprocess.run(["dpkg-deb", "-b", str(folder / "tree"), str(folder / "p.deb")], check=True, capture_output=True)
    deb = (folder / "p.deb").read_bytes()
    (index / "Packages").write_text(
        (control / "control").read_text()
        + f"Filename: p.deb\nSize: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n\n"
    )
    packages = (index / "Packages").read_bytes()
    (folder / "dists" / "bookworm" / "Release").write_text(
        "Origin: Test\nSuite: bookworm\nCodename: bookworm\nArchitectures: amd64\nComponents: main\n"
        "Date: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n"
        f" {hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages\n"
    )
    return folder


@needs_apt
@pytest.mark.parametrize("trusted", [True, False])
def test_only_a_signed_or_expressly_trusted_archive_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool
) -> None:
    """An unsigned archive is refused, unless its entry says trusted=yes; then its package arrives intact."""
    archive_folder = local_archive(tmp_path / "archive")
    fields = [("uris", f"file:{archive_folder}"), ("architectures", "amd64"), ("check-valid-until", "no")]
    fields += [("trusted", "yes")] if trusted else []
    monkeypatch.setattr(apt, "system_sources", lambda: [Source(("bookworm",), ("main",), tuple(fields))])
    archive = apt.AptArchive(Progress("test"), tmp_path / "root")
    if not trusted:
        with pytest.raises(HarnessError, match=r"not signed|could not read"):
            archive.find("linux-source-.*")
        return
    (package,) = archive.find(r"linux-source-[\d.]+")
    assert package == Package("linux-source-9.9", "9.9.1-1", "bookworm/main")
    (tmp_path / "here").mkdir()
    deb = archive.download(package, tmp_path / "here")
    assert deb.read_bytes() == (archive_folder / "p.deb").read_bytes()

    with (archive_folder / "p.deb").open("ab") as file:
        file.write(b"tampered")
    (tmp_path / "again").mkdir()
    with pytest.raises(HarnessError, match=r"cannot download linux-source-9\.9 9\.9\.1-1"):
        archive.download(package, tmp_path / "again")
