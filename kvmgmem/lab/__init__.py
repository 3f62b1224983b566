"""The lab: kernels, guest images, the QEMU machine and its supervisor."""
