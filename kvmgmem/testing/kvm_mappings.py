"""Which objects of KVM a process has mapped, by /proc/PID/maps.

PROCMAP_QUERY (Linux 6.11) can hand out the shared ones alone, but a vCPU's kvm_run page can be mapped privately as well
(kvm_vcpu_mmap); and to be asked for all that have a file it takes 1.4 ms, where the text of a runner's 288 takes 0.6.
"""

from kvmgmem.testing.proc_files import read_whole

KVM_FILES = (b"kvm-vcpu", b"kvm-vm", b"kvm-gmem")
"""What the names of KVM's files begin with."""


def kvm_mappings(process: str) -> tuple[str, ...]:
    """The names of the KVM objects that a process (a PID, or `self`) has mapped, one for each mapping. Raises OSError."""
    maps = read_whole(f"/proc/{process}/maps")
    # Hundreds of lines that are of no interest; they are only taken apart where one is. (Our own library's path has "kvm".)
    if not any(name in maps for name in KVM_FILES):
        return ()
    lines = [line for line in maps.splitlines() if any(name in line for name in KVM_FILES)]
    return tuple(line.split(maxsplit=5)[5].decode(errors="replace") for line in lines)
