"""A checkpoint directory, written a shard at a time: config.json, safetensors, their index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import Checkpoint, write_json
from slipstream.builder.checkpoints.huggingface.text_model import text_config
from slipstream.builder.checkpoints.names import linears
from slipstream.builder.checkpoints.quantized.layout import Layout, Settings
from slipstream.builder.checkpoints.sentence_transformers import write_sentence_transformers
from slipstream.builder.models.huggingface_config import describe
from slipstream.weights.json import read_fields
from slipstream.weights.safetensors import (
    ArraySpec,
    read_header,
    write_arrays,
    write_safetensors,
)
from slipstream.weights.tensor import LazyTensor, QuantTensor, numpy_dtype

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
EMBEDDING = "model.embed_tokens.weight"
# Keys of the source's config.json that are said anew.
_REPLACED = ("quantization_config", "compression_config", "torch_dtype", "dtype")
Arrays = dict[str, NDArray[np.generic]]


@dataclass(slots=True)
class DirectoryWriter:
    """Writes shards of a checkpoint into ``directory``, and then what describes them.

    ``shards`` is their number; ``modules`` has what the layout said of each quantized module,
    which a resumed run brings along.
    """

    directory: Path
    layout: Layout
    shards: int
    modules: dict[str, Settings] = field(default_factory=dict)
    _places: dict[str, str] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shard(self, index: int) -> str:
        """The file name of a shard, counted from 0."""
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(
        self, index: int, tensors: Iterable[QuantTensor], more: Arrays | None = None
    ) -> dict[str, Settings]:
        """Writes a shard of weights; ``more`` are arrays that are stored as they are.

        Returns what the layout says of the shard's modules.
        """
        arrays: Arrays = {}
        modules: dict[str, Settings] = {}
        for tensor in tensors:
            if tensor.format.kind == "dense":
                arrays[tensor.name] = tensor.codes
                continue
            module = tensor.name.removesuffix(".weight")
            encoded = self.layout.encode(tensor)
            modules[module] = encoded.settings
            arrays |= {f"{module}.{suffix}": array for suffix, array in encoded.arrays.items()}
        write_arrays(self.directory / self.shard(index), arrays | (more or {}))
        self.modules |= modules
        self.keep(index)
        return modules

    def stream(self, index: int, tensors: Sequence[LazyTensor]) -> None:
        """Writes a shard of dense weights, of which one at a time is read."""
        specs = [ArraySpec(t.name, numpy_dtype(t.format.dtype), t.format.shape) for t in tensors]
        arrays = (tensor.load().codes for tensor in tensors)
        write_safetensors(self.directory / self.shard(index), specs, arrays)
        self.keep(index)

    def keep(self, index: int) -> None:
        """Takes a shard into the index that is written already."""
        for name, stored in read_header(self.directory / self.shard(index)).items():
            self._places[name] = self.shard(index)
            self._sizes[name] = stored.size
            self._shapes[name] = stored.shape

    def describe(self, checkpoint: Checkpoint, *, kv_scales: bool) -> None:
        """Writes the index and config.json for the shards that are there."""
        embedding = checkpoint.tensor(EMBEDDING).format
        dtype = embedding.dtype if embedding.kind == "dense" else "float16"
        config = _source_config(checkpoint, dtype)
        if self.modules:
            dense = [module for module in linears(self._shapes) if module not in self.modules]
            config["quantization_config"] = self.layout.config(self.modules, dense, kv_scales)
        write_json(self.directory / CONFIG, config)
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(self._sizes.values())},
            "weight_map": dict(sorted(self._places.items())),
        }
        write_json(self.directory / INDEX, index)
        if checkpoint.pooling is not None:
            width = checkpoint.config.hidden_size
            write_sentence_transformers(self.directory, checkpoint.pooling, width)

    @property
    def nbytes(self) -> int:
        """Size of the tensors written so far."""
        return sum(self._sizes.values())


def kv_arrays(scales: tuple[float, float], layer: int) -> Arrays:
    """The scales of one layer's fp8 KV cache, as compressed-tensors names them."""
    prefix = f"model.layers.{layer}.self_attn"
    k, v = scales
    return {
        f"{prefix}.k_scale": np.array([k], np.float32),
        f"{prefix}.v_scale": np.array([v], np.float32),
    }


def _source_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """A config.json without quantization: the source's own, or one made of what a GGUF file says.

    ``dtype`` is that of the dense weights.
    """
    path = checkpoint.path / "config.json"
    config = _text_alone(path, checkpoint) if path.is_file() else describe(checkpoint.config)
    config = {key: value for key, value in config.items() if key not in _REPLACED}
    return {**config, "dtype": dtype}


def _text_alone(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own keys, without those of models that see or hear."""
    raw = read_fields(path)
    tied = checkpoint.config.tie_word_embeddings
    return dict((text_config(raw, has_head=not tied) or raw).values)
