"""The config.json of a checkpoint: the source's own, or one made of what a GGUF file says."""

from __future__ import annotations

from typing import Any

from slipstream.builder.checkpoints.base import Checkpoint, read_json
from slipstream.builder.models.huggingface_config import describe

_REPLACED = ("quantization_config", "compression_config", "torch_dtype", "dtype")


def source_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """A config.json without quantization; ``dtype`` is that of the dense weights."""
    path = checkpoint.path / "config.json"
    config = read_json(path) if path.is_file() else describe(checkpoint.config)
    config = {key: value for key, value in config.items() if key not in _REPLACED}
    return {**config, "dtype": dtype}
