"""What KVM allocates beside a slot on x86, by the kind of paging (arch/x86/kvm/x86.c:kvm_alloc_memslot_metadata)."""

from kvmgmem.host import Host


def metadata_bytes(host: Host, pages: int) -> int:
    """Bytes for a slot of so many pages: 4 a large page, without the TDP MMU a reverse map of 8, shadowing 2 a page."""
    large = (pages >> 9) + (pages >> 18)
    reverse_maps = 0 if host.tdp_mmu else 8 * (pages + large)
    return 4 * large + reverse_maps + (2 * pages if host.paging == "shadow" else 0)
