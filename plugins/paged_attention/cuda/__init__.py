"""PagedAttention in Triton."""
