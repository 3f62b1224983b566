"""kvmgmem: a VMM-side test harness for the contract of Linux guest_memfd."""

__version__ = "0.1.0"
