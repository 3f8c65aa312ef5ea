"""A Python-based backend of the Triton Inference Server, and the model repository that uses it."""
