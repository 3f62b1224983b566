"""Guest kernels: where they come from, how they are built, and which one is meant."""
