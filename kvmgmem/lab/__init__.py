"""The lab: guest kernels, the guest that boots them, its supervision, and the verbs that put these together."""
