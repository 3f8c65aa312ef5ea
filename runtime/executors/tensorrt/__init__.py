"""NVIDIA GPUs through TensorRT."""
