"""Ranks on NVIDIA GPUs: sums and columns over memory that all of them reach."""
