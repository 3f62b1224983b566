"""`kvmgmem caps`: what this KVM offers, and what will be skipped for the lack of what."""

import argparse
import json
from collections.abc import Iterator

from kvmgmem.guest_memfd import KIND_NAMES
from kvmgmem.host import Host, gmem_kinds, probe
from kvmgmem.roadmap import FEATURES, survey


def add_caps_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("caps", help="what this KVM offers, and what will be skipped and why")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run_caps(args: argparse.Namespace) -> int:
    """Print it; raises `HarnessError` if there is no KVM to ask."""
    host = probe()
    print(json.dumps(as_json(host), indent=2) if args.json else "\n".join(lines(host)))
    return 0


def as_json(host: Host) -> dict[str, object]:
    """All facts, the requirements with what is missing ("" if met), and the features to come with their answers."""
    features = {name: {"state": found.state, "why": found.sentence} for name, found in survey().items()}
    return {**host.as_dict(), "requirements": dict(_requirements(host)), "features_to_come": features}


def _requirements(host: Host) -> Iterator[tuple[str, str]]:
    from kvmgmem.testing.requirements import REQUIREMENTS

    for name, requirement in REQUIREMENTS.items():
        yield name, "" if requirement.met(host) else requirement.missing


def lines(host: Host) -> Iterator[str]:
    """The same for people."""
    yield f"kernel    {host.release} ({host.machine}), config {host.config_hash or 'not readable'}"
    yield f"backend   {host.backend}, {'two-dimensional' if host.paging == 'tdp' else 'shadow'} paging"
    yield f"machine   {host.cpu_model}, {host.cpu_count} CPUs, {host.memory_mib} MiB, {host.nodes} memory node(s)"
    yield f"VM types  {', '.join(host.vm_types)}"
    for scope in host.vms:
        kinds = ", ".join(KIND_NAMES[int(kind)] for kind in gmem_kinds(scope)) or "none"
        yield f"gmem      {scope.type}: {kinds} (flags {scope.gmem_flags:#x})"
    yield ""
    labels = [scope.type for scope in host.vms]
    width = max(len(name) for name in host.caps)
    yield "  ".join(["capability".ljust(width), "system".rjust(8), *(label.rjust(max(8, len(label))) for label in labels)])
    for name, value in host.caps.items():
        cells = [str(scope.caps[name]).rjust(max(8, len(scope.type))) for scope in host.vms]
        yield "  ".join([name.ljust(width), str(value).rjust(8), *cells])
    missing = [(name, why) for name, why in _requirements(host) if why]
    if missing:
        yield ""
        yield "Tests that need one of these will be skipped (--require NAME makes that a failure):"
        width = max(len(name) for name, _ in missing)
        yield from (f"  {name.ljust(width)}  {why}" for name, why in missing)
    yield ""
    yield "Features to come, by what this kernel answers:"
    width = max(len(feature.name) for feature in FEATURES)
    yield from (f"  {name.ljust(width)}  {found.state.ljust(9)}  {found.sentence}" for name, found in survey().items())
