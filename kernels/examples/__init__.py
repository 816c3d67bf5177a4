"""What the kernels can be used for, on their own."""
