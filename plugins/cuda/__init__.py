"""What the Triton kernels of all plugins share, and how nodes become calls of them."""
