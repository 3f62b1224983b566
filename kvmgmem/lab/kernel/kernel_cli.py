"""The `kernel` verb: arguments in, one function call, a few lines out."""

import argparse
import itertools
import json
import time
from pathlib import Path

from kvmgmem.errors import HarnessError
from kvmgmem.exit_codes import ExitCode
from kvmgmem.lab import cache
from kvmgmem.lab.kernel import kernels
from kvmgmem.lab.kernel.flavours import BASE, flavour_names


def add_kernel_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `kernel` with its own verbs to the command line; its namespace goes to `run_kernel`."""
    parser = subparsers.add_parser("kernel", help="build, fetch, list and remove guest kernels")
    verbs = parser.add_subparsers(dest="kernel_verb", metavar="VERB", required=True)
    build = verbs.add_parser("build", help="build a kernel from the distribution's source package, a tree or a tarball")
    build.add_argument("release", nargs="?", help="a release such as 7.3 (default: the newest that the archive has)")
    build.add_argument("--source", type=Path, metavar="DIR", help="build this source tree, out of tree")
    build.add_argument("--in-place", action="store_true", help="with --source: build inside the tree")
    build.add_argument("--tarball", type=Path, metavar="FILE", help="build this source tarball")
    build.add_argument("--flavour", default=BASE, choices=flavour_names(), help="default: %(default)s")
    build.add_argument("--jobs", "-j", type=_jobs, default=kernels.BuildOptions.jobs, help="default: %(default)s")
    build.add_argument("--refresh", action="store_true", help="look for a newer package than the one built before")
    fetch = verbs.add_parser("fetch", help="fetch a ready-made kernel of the distribution, with the modules KVM needs")
    fetch.add_argument("release", nargs="?", help="a release such as 6.12 (default: the newest that the archive has)")
    fetch.add_argument("--refresh", action="store_true", help="look for a newer package than the one fetched before")
    headers = verbs.add_parser("headers", help="fetch the newest kernel's uAPI headers, for `make check`")
    headers.add_argument("--refresh", action="store_true", help="look for newer ones than those fetched before")
    listing = verbs.add_parser("list", help="list the kernels in the cache")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    removal = verbs.add_parser("rm", help="remove kernels, or what building them left behind")
    removal.add_argument("names", nargs="*", metavar="KERNEL", help="a name as `list` prints it, or 7.3, 7.3/debug")
    removal.add_argument("--all", action="store_true", help="remove every kernel")
    removal.add_argument("--sources", action="store_true", help="remove unpacked sources and build objects")


def run_kernel(args: argparse.Namespace) -> int:
    """Do what the `kernel` verb was asked for. Raises HarnessError like everything below it."""
    verbs = {"build": _build, "fetch": _fetch, "headers": _headers, "list": _list, "rm": _remove}
    verbs[args.kernel_verb](args)
    return ExitCode.OK


def _build(args: argparse.Namespace) -> None:
    options = kernels.BuildOptions(args.flavour, args.jobs, args.in_place, args.refresh)
    kernel = kernels.build(args.release, source=args.source, tarball=args.tarball, options=options)
    print("\n".join(kernels.summary(kernel)))


def _fetch(args: argparse.Namespace) -> None:
    from kvmgmem.lab.kernel.fetch import fetch

    print("\n".join(kernels.summary(fetch(args.release, args.refresh))))


def _headers(args: argparse.Namespace) -> None:
    from kvmgmem.lab.kernel.headers import fetch_headers

    print(fetch_headers(args.refresh))


def _list(args: argparse.Namespace) -> None:
    found = kernels.list_kernels()
    if args.json:
        for kernel in found:
            print(json.dumps(_as_json(kernel)))
        return
    if not found:
        print("no kernels yet; make one: kvmgmem kernel build")
    width = max((len(kernel.name) for kernel in found), default=0)
    for kernel in found:
        size = cache.size_text(cache.tree_bytes(kernel.image.parent))
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(kernel.built))
        print(f"{kernel.name:{width}}  {kernel.release}  {size}  {built}  {kernel.image}")
    if left := kernels.leftovers():
        names = ", ".join(f"{entry.parent.name}/{entry.name}" for entry in left)
        print(f"kept for further builds: {names} (remove them: kvmgmem kernel rm --sources)")


def _remove(args: argparse.Namespace) -> None:
    names = [kernel.name for kernel in kernels.list_kernels()] if args.all else args.names
    if not names and not args.sources and not args.all:
        raise HarnessError("nothing to remove", "name kernels, or give --all or --sources", ExitCode.USAGE)
    leftovers = kernels.remove_leftovers() if args.sources else iter(())
    for name, size in itertools.chain(kernels.remove(names), leftovers):
        print(f"removed {name} ({cache.size_text(size)})")
    if names and (freed := kernels.remove_kept_guests()):
        print(f"removed the guests kept since they had booted ({cache.size_text(freed)})")


def _as_json(kernel: kernels.Kernel) -> dict[str, object]:
    return {
        "name": kernel.name,
        "release": kernel.release,
        "flavour": kernel.flavour,
        "image": str(kernel.image),
        "vmlinux": str(kernel.vmlinux) if kernel.vmlinux else None,
        "config": str(kernel.config) if kernel.config else None,
        "config_hash": kernel.config_hash,
        "source": kernel.source,
        "built": kernel.built,
    }


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of jobs")
    return int(text)
