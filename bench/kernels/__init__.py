"""GPU kernels read from their machine code, on a machine with no GPU."""
