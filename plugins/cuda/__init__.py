"""What the Triton kernels of all plugins share."""
