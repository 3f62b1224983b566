"""Which lines of the kernel's guest_memfd code the selftests reach, and why they reach no others."""
