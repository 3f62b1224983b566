"""From finding to C: recording what the binding asks of the kernel, reading it, repeating it, making a C program of it."""
