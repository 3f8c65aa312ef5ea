"""The executor of NVIDIA GPUs; the only part of the runtime that needs torch and triton."""
