"""What only one architecture has: vCPU set-up, guest programs, register names."""
