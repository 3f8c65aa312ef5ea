"""A model taken off the grid of the quantization that it came from, its function unchanged.

The weights of a quantized file look lossless to a quantizer of the same kind. Multiplying a norm's
weight by random factors and dividing by them the columns of the linears that it feeds (likewise the
rows of up_proj and v_proj and the columns of down_proj and o_proj) leaves the model's function as
it was and no group of weights on a grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from slipstream.builder.checkpoints import Checkpoint
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe
from slipstream.weights.tensor import KVScales, LazyTensor, QuantTensor, WeightFormat

_SPREAD = 0.3


@dataclass(frozen=True, slots=True)
class OffGridCheckpoint:
    """``source`` with dense float32 weights, rescaled by factors ``exp(U(-0.3, 0.3))``."""

    source: Checkpoint
    seed: int = 0
    kv_scales: KVScales | None = field(default=None)
    pooling: None = None

    @property
    def path(self) -> Path:
        """That of the source."""
        return self.source.path

    @property
    def config(self) -> ModelConfig:
        """That of the source."""
        return self.source.config

    def names(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.names()

    def write_tokenizer(self, directory: Path) -> None:
        """That of the source."""
        self.source.write_tokenizer(directory)

    def tensor(self, name: str) -> LazyTensor:
        """One weight, rescaled when it is loaded."""
        form = WeightFormat(self.source.tensor(name).format.shape, "dense", "float32")
        return LazyTensor(name, form, lambda: QuantTensor(name, form, self._values(name)))

    def _values(self, name: str) -> NDArray[np.float32]:
        values = self.source.tensor(name).load().dequantize()
        if not name.startswith("model.layers."):
            return values
        _, _, layer, *_, module, kind = name.split(".")
        factors = self._factors(int(layer))
        rows, columns = _MODULES.get(module, (None, None))
        if rows is not None:
            scale = factors[rows]
            values = values * (scale[:, None] if values.ndim == 2 else scale)
        if columns is not None and kind == "weight":
            values = values / factors[columns]
        return np.asarray(values, np.float32)

    def _factors(self, layer: int) -> dict[str, NDArray[np.float32]]:
        config = self.config
        rng = np.random.default_rng((self.seed, layer))

        def draw(size: int) -> NDArray[np.float32]:
            return np.exp(rng.uniform(-_SPREAD, _SPREAD, size)).astype(np.float32)

        hidden, inner = config.hidden_size, config.intermediate_size
        v = draw(config.num_kv_heads * config.head_dim).reshape(config.num_kv_heads, -1)
        o = np.repeat(v, config.num_heads // config.num_kv_heads, axis=0).ravel()
        return {
            **{"attention": draw(hidden), "mlp": draw(hidden), "up": draw(inner)},
            **{"v": v.ravel(), "o": o},
        }


# Which factors multiply a module's rows (or its only axis) and which divide its columns.
_MODULES: Mapping[str, tuple[str | None, str | None]] = {
    "input_layernorm": ("attention", None),
    "q_proj": (None, "attention"),
    "k_proj": (None, "attention"),
    "v_proj": ("v", "attention"),
    "o_proj": (None, "o"),
    "post_attention_layernorm": ("mlp", None),
    "gate_proj": (None, "mlp"),
    "up_proj": ("up", "mlp"),
    "down_proj": (None, "up"),
}


def write_directory(checkpoint: Checkpoint, directory: Path) -> Path:
    """The dense checkpoint as a Hugging Face directory of float32 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(checkpoint.tensor(name).load().dequantize())
        for name in checkpoint.names()
    }
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
    described = describe(checkpoint.config) | {"dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(described))
    checkpoint.write_tokenizer(directory)
    return directory
