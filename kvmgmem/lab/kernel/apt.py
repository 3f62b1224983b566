"""Finding and downloading packages through apt, in a private root: the system's own apt state is never touched.

The private root takes over the system's configuration (proxies, credentials, mirrors, keys) and its sources, and adds
further suites of the same Debian archives. apt itself checks signatures and hashes; nothing here weakens that.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.lab import cache
from kvmgmem.lab.progress import Progress

# Debian's releases in their order, from the oldest that kvmgmem runs on. Aliases such as "stable" are not enough:
# caches between here and the archive are known to hold an alias and its codename in different states.
CODENAMES = ("bookworm", "trixie", "forky", "duke")
_ALIASES = ("oldstable", "stable", "testing", "unstable", "sid", "experimental", "rc-buggy")
_POCKETS = ("-updates", "-backports", "-proposed-updates", "-security", "/updates")

LISTS_MAX_AGE = 24 * 3600.0
# Lists younger than this are not fetched again in the hope that something missing has turned up.
LISTS_MIN_AGE = 600.0
# Measured: lists of nine suites 84 MB, apt's index of them 95 MB.
LISTS_BYTES = 300_000_000
UPDATE_TIMEOUT = 900.0
DOWNLOAD_TIMEOUT = 3600.0
QUERY_TIMEOUT = 180.0


@dataclass(frozen=True)
class Source:
    """One entry of the system's sources, as deb822 fields other than Types, Suites and Components."""

    suites: tuple[str, ...]
    components: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Package:
    """One version of a package that a configured archive offers; `suite` as apt names it, with component."""

    name: str
    version: str
    suite: str


def parse_deb822(text: str) -> list[Source]:
    """The binary-package entries of a `.sources` file (sources.list(5)); disabled ones are left out."""
    sources = []
    for stanza in re.split(r"\n[ \t]*\n", _without_comments(text)):
        fields = _stanza_fields(stanza)
        if "deb" not in fields.pop("types", "").split():
            continue
        if fields.pop("enabled", "yes").strip().lower() in {"no", "false", "without", "off", "disable", "0"}:
            continue
        suites = tuple(fields.pop("suites", "").split())
        components = tuple(fields.pop("components", "").split())
        # Only package indices are wanted, whatever else the system fetches.
        fields.pop("targets", None)
        if "uris" in fields:
            sources.append(Source(suites, components, tuple(fields.items())))
    return sources


def parse_one_line(text: str) -> list[Source]:
    """The `deb` lines of a `.list` file, options in brackets included, as the same fields that deb822 would have."""
    sources = []
    for line in _without_comments(text).splitlines():
        match = re.fullmatch(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)", line.strip())
        if match is None:
            continue
        fields = {"uris": match["uri"]}
        for option in (match["options"] or "").split():
            fields |= _one_line_option(option)
        fields.pop("targets", None)
        sources.append(Source((match["suite"],), tuple(match["rest"].split("#")[0].split()), tuple(fields.items())))
    return sources


def further_suites(suites: Iterable[str]) -> list[str]:
    """The suites to ask for: those configured, and if they are Debian's also its later and less stable ones.

    Not all of them exist at all times; the archive's answer decides. A security archive has its own names.
    """
    asked = list(suites)
    for suite in list(asked):
        base = _base_suite(suite)
        if base not in CODENAMES and base not in _ALIASES:
            continue
        start = CODENAMES.index(base) if base in CODENAMES else 0
        if suite.endswith("-security"):
            asked += [f"{codename}-security" for codename in CODENAMES[start:]]
            continue
        for codename in CODENAMES[start:]:
            asked += [codename, f"{codename}-updates", f"{codename}-backports"]
        asked += ["sid", "experimental"]
    return list(dict.fromkeys(asked))


def render(sources: Iterable[Source]) -> str:
    """Sources as deb822 text, for package indices only."""
    stanzas = []
    for source in sources:
        lines = ["Types: deb", f"Suites: {' '.join(source.suites)}", f"Components: {' '.join(source.components)}"]
        lines += [f"{name.title()}: {value}" for name, value in source.fields]
        stanzas.append("\n".join([*lines, "Targets: Packages", ""]))
    return "\n".join(stanzas)


class AptArchive:
    """The archives that this machine is configured for, seen through a private apt root below the cache."""

    def __init__(self, progress: Progress, root: Path | None = None) -> None:
        """Raises HarnessError on a machine that has no apt or no sources."""
        if missing := [tool for tool in ("apt-get", "apt-cache", "apt-config", "dpkg") if shutil.which(tool) is None]:
            raise HarnessError(
                f"this machine has no {missing[0]}, so no kernel can be had from its distribution",
                "give a kernel source tree instead: kvmgmem kernel build --source DIR",
            )
        self._progress = progress
        self._root = cache.cache_root() / "apt" if root is None else root
        self._conf = self._root / "apt.conf"
        self._sources = self._root / "sources.d" / "kvmgmem.sources"
        self._state = self._root / "state.json"
        wanted = [
            Source(tuple(further_suites(source.suites)), source.components, source.fields)
            for source in merge_sources(system_sources())
        ]
        if not wanted:
            raise HarnessError(
                "apt has no package sources configured on this machine",
                "add its distribution's archive to /etc/apt, or build from a tree: kvmgmem kernel build --source DIR",
            )
        self._wanted = wanted

    def find(self, pattern: str, refresh: bool = False) -> list[Package]:
        """Every version of every package whose name fully matches the pattern, the newest first.

        Fetches the lists when they are older than a day, when nothing matches, or when asked to.
        """
        with cache.locked(self._root, self._progress.note):
            self._prepare(LISTS_MIN_AGE if refresh else LISTS_MAX_AGE)
            found = self._query(pattern)
            if not found and self._age() > LISTS_MIN_AGE:
                self._prepare(LISTS_MIN_AGE)
                found = self._query(pattern)
            return found

    def download(self, package: Package, folder: Path) -> Path:
        """Download a package's .deb into an existing folder; its hash is checked against the signed lists.

        Raises HarnessError when the archive does not have it (any more), the disk is full, or the network fails.
        """
        with cache.locked(self._root, self._progress.note):
            self._prepare(LISTS_MAX_AGE)
            cache.require_room(folder, self._size(package) + 50 * cache.MiB)
            command = ["apt-get", "-c", str(self._conf), "-o", "APT::Status-Fd=1", "-qq", "download"]
            command.append(f"{package.name}={package.version}")
            with cache.disk_errors(folder):
                errors = self._download(command, folder)
        debs = list(folder.glob(f"{package.name}_*.deb"))
        if len(debs) != 1:
            raise _apt_error(f"cannot download {package.name} {package.version}", errors, folder)
        return debs[0]

    def depends(self, package: Package) -> list[str]:
        """The names that a package depends on, alternatives flattened, as its control data says."""
        show = self._run(["apt-cache", "-c", str(self._conf), "show", f"{package.name}={package.version}"], QUERY_TIMEOUT)
        names: list[str] = []
        for line in show.stdout.splitlines():
            if line.startswith(("Depends:", "Pre-Depends:")):
                names += [re.split(r"[ (:]", part.strip())[0] for part in re.split(r"[,|]", line.partition(":")[2])]
        return names

    def _prepare(self, max_age: float) -> None:
        digest = hashlib.sha256(render(self._wanted).encode()).hexdigest()
        known = self._read_state()
        if known.get("sources") == digest and self._age() <= max_age and self._conf.exists():
            return
        cache.require_room(self._root, LISTS_BYTES)
        with cache.disk_errors(self._root):
            for folder in ("sources.d", "lists/partial", "cache/archives/partial"):
                (self._root / folder).mkdir(parents=True, exist_ok=True)
        cache.write_file(self._conf, private_configuration(self._root).encode())
        cache.write_file(self._sources, render(self._wanted).encode())
        self._progress.update("reading the distribution's package lists")
        answer = self._run(["apt-get", "-c", str(self._conf), "-q", "update"], UPDATE_TIMEOUT)
        self._keep_what_answered(answer.stderr)
        cache.write_file(self._state, json.dumps({"sources": digest, "updated": time.time()}).encode())

    def _keep_what_answered(self, errors: str) -> None:
        """Rewrite the private sources to the suites whose lists are there, and note why others are not.

        A suite that does not exist is no news. apt 2.6 says "does not have a Release file" for it, and names the
        missing key where it is the keyring that is too old.
        """
        present = self._suites_present()
        if not present:
            raise _apt_error("apt could not read any package list", errors, self._root)
        kept = []
        for source in self._wanted:
            suites = tuple(suite for suite in source.suites if (_uri(source), suite) in present)
            if suites:
                kept.append(Source(suites, source.components, source.fields))
        cache.write_file(self._sources, render(kept).encode())
        for line in errors.splitlines():
            if "NO_PUBKEY" in line or "EXPKEYSIG" in line or "is not signed" in line:
                self._progress.note(f"left out a suite whose signature cannot be checked: {line[2:].strip()}")

    def _suites_present(self) -> set[tuple[str, str]]:
        """Pairs of archive URI and suite whose package lists apt has accepted."""
        form = "$(SITE)|$(RELEASE)|$(FILENAME)"
        answer = self._run(["apt-get", "-c", str(self._conf), "indextargets", "--format", form], QUERY_TIMEOUT)
        rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2]
        return {(site.rstrip("/"), suite) for site, suite, filename in rows if Path(filename).exists()}

    def _query(self, pattern: str) -> list[Package]:
        names = self._run(["apt-cache", "-c", str(self._conf), "pkgnames"], QUERY_TIMEOUT).stdout.split()
        wanted = sorted(name for name in names if re.fullmatch(pattern, name))
        if not wanted:
            return []
        answer = self._run(["apt-cache", "-c", str(self._conf), "madison", *wanted], QUERY_TIMEOUT)
        return newest_first(parse_madison(answer.stdout))

    def _size(self, package: Package) -> int:
        show = self._run(["apt-cache", "-c", str(self._conf), "show", f"{package.name}={package.version}"], QUERY_TIMEOUT)
        size = re.search(r"^Size: (\d+)$", show.stdout, re.MULTILINE)
        return int(size[1]) if size else 0

    def _download(self, command: list[str], folder: Path) -> str:
        """Run apt-get in `folder`, turn its status lines into progress, and give back what it said on stderr.

        Lines are "dlstatus:1:42.0:words" (apt's README.progress-reporting).
        """
        with subprocess.Popen(
            command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            deadline = time.monotonic() + DOWNLOAD_TIMEOUT
            try:
                for line in process.stdout:
                    if status := re.match(r"dlstatus:\d+:([\d.]+):", line):
                        self._progress.update("downloading", float(status[1]) / 100)
                    if time.monotonic() > deadline:
                        process.kill()
                return process.stderr.read()
            except BaseException:
                process.kill()
                raise

    def _run(self, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise HarnessError(
                f"`{' '.join(command[:1] + command[3:])}` was not done after {timeout:.0f} s",
                "check the network and the archive that apt is configured for",
            ) from error

    def _age(self) -> float:
        updated = self._read_state().get("updated")
        return time.time() - updated if isinstance(updated, float) else float("inf")

    def _read_state(self) -> dict[str, object]:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


def system_sources() -> list[Source]:
    """The sources of the system's own apt, from the files that its configuration points at."""
    shell = subprocess.run(
        ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=QUERY_TIMEOUT,
        check=False,
    )
    paths = dict(re.findall(r"^(LIST|PARTS)='(.*)'$", shell.stdout, re.MULTILINE))
    files = [Path(paths["LIST"])] if "LIST" in paths else []
    if "PARTS" in paths and Path(paths["PARTS"]).is_dir():
        files += sorted(Path(paths["PARTS"]).iterdir())
    sources: list[Source] = []
    for file in files:
        sources += read_sources(file)
    return sources


def read_sources(file: Path) -> list[Source]:
    """The entries of one file, by its suffix; files that apt would ignore or this user cannot read have none."""
    parsers = {".sources": parse_deb822, ".list": parse_one_line}
    if file.suffix not in parsers or not file.is_file():
        return []
    try:
        return parsers[file.suffix](file.read_text(encoding="utf-8", errors="replace"))
    except PermissionError:
        return []


def merge_sources(sources: Iterable[Source]) -> list[Source]:
    """Entries of the same archive as one; only archives with a `main`, where distributions keep their kernels.

    Flat repositories (a suite that ends in a slash) have no components and are left out with the rest.
    """
    merged: dict[tuple[tuple[str, str], ...], Source] = {}
    for source in sources:
        if "main" not in source.components:
            continue
        known = merged.get(source.fields, Source((), (), source.fields))
        suites = tuple(dict.fromkeys([*known.suites, *source.suites]))
        merged[source.fields] = Source(suites, ("main",), source.fields)
    return list(merged.values())


def private_configuration(root: Path) -> str:
    """An apt.conf(5) that is read after the system's, and moves all state below `root`.

    The hooks are cleared because systems hang commands on them that clean the *system's* caches.
    """
    return f"""\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{root}";
Dir::State::lists "{root}/lists";
Dir::State::status "/dev/null";
Dir::Cache "{root}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
// Downloads land in the user's cache, which apt's own unprivileged user may not enter.
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "2";
"""


def parse_madison(text: str) -> list[Package]:
    """What `apt-cache madison` prints: `name | version | uri suite/component architecture Packages`."""
    packages = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 3 and len(parts[2].split()) >= 2 and parts[2].endswith("Packages"):
            packages.append(Package(parts[0], parts[1], parts[2].split()[1]))
    return packages


def newest_first(packages: Iterable[Package]) -> list[Package]:
    """Packages by version, newest first, the same version of the same package once.

    dpkg decides, and so "7.3~rc7" comes after "7.3.4".
    """
    unique = {(package.name, package.version): package for package in packages}
    return sorted(unique.values(), key=functools.cmp_to_key(_compare_versions), reverse=True)


def _compare_versions(left: Package, right: Package) -> int:
    if left.version == right.version:
        return 0
    newer = subprocess.run(
        ["dpkg", "--compare-versions", left.version, "gt", right.version], timeout=QUERY_TIMEOUT, check=False
    )
    return 1 if newer.returncode == 0 else -1


def _uri(source: Source) -> str:
    return dict(source.fields)["uris"].split()[0].rstrip("/")


def _base_suite(suite: str) -> str:
    for pocket in _POCKETS:
        suite = suite.removesuffix(pocket)
    return suite


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _stanza_fields(stanza: str) -> dict[str, str]:
    """Fields by lower-case name; continuation lines (an embedded key, say) stay with theirs, as they were."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in {" ", "\t"} and name:
            fields[name] += f"\n{line}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


# Where the one-line format's option names differ from the field names of deb822 (sources.list(5)).
_OPTION_FIELDS = {"arch": "architectures", "lang": "languages", "target": "targets"}


def _one_line_option(option: str) -> dict[str, str]:
    match = re.fullmatch(r"([A-Za-z-]+?)([+-]?)=(.*)", option)
    if match is None:
        return {}
    name = _OPTION_FIELDS.get(match[1].lower(), match[1].lower())
    suffix = {"": "", "+": "-add", "-": "-remove"}[match[2]]
    return {name + suffix: match[3].replace(",", " ")}


def _apt_error(what: str, errors: str, place: Path) -> HarnessError:
    if cache.looks_full(place, errors) or "have enough free space" in errors:
        return cache.no_room(place)
    said = [line for line in errors.splitlines() if line.startswith(("E:", "W:"))]
    why = f": {said[0][2:].strip()}" if said else ""
    return HarnessError(f"{what}{why}", "check the network and apt's configuration (`apt-get update` must work)")


def _environment() -> dict[str, str]:
    # Messages and prompts in the language that is parsed here.
    return os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
