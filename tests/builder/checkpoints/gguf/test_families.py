"""Tiny models of many families, laid out as llama.cpp's converters do, are read as their Hugging
Face form is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import TinyModel
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import save_tiny

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.models import architecture_of
from slipstream.builder.models.rope import rotary_frequencies

_MULTIPLIERS = {
    "embedding_scale": 12.0,
    "attention.scale": 0.03,
    "residual_scale": 0.22,
    "logit_scale": 3.0,
}
_LONGROPE = {"rope.scaling.original_context_length": 64, "attention.sliding_window": 0}
# What a file says beyond the shape of a decoder, by llama.cpp's names: its architecture's first.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": (
        "cohere2",
        {
            "attention.sliding_window": 17,
            "logit_scale": 0.0625,
            "attention.layer_norm_epsilon": 1e-5,
            "rope.scaling.type": "none",
        },
    ),
    "glm4": ("glm4", {}),
    "glm4-no-biases": ("glm4", {}),
    "granite-multipliers": ("granite", _MULTIPLIERS),
    "granite-tied-biases": ("granite", _MULTIPLIERS),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo2",
        {
            "attention.sliding_window": 17,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
    ),
    "olmo3-rope-yarn": (
        "olmo2",
        {
            "attention.sliding_window": 9,
            "attention.sliding_window_pattern": [True, True, True, False],
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "ministral3": (
        "mistral3",
        {
            "attention.temperature_scale": 0.5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
    ),
    "phi3": ("phi3", {"rope.scaling.original_context_length": 4096, "attention.sliding_window": 0}),
    "phi3-tied-window": ("phi3", {"attention.sliding_window": 17}),
    "phi3-longrope-long": ("phi3", _LONGROPE),
    "phi3-longrope-rotary": ("phi3", _LONGROPE),
    "smollm3": ("smollm3", {}),
    "smollm3-untied-biases": ("smollm3", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_is_read_as_its_hugging_face_form(name: str, tmp_path: Path) -> None:
    theirs = open_checkpoint(save_tiny(CONFIGS[name], tmp_path / "model"))
    ours = open_checkpoint(in_gguf(theirs, *FAMILIES[name]).write(tmp_path / "m.gguf"))

    assert comparable(ours) == comparable(theirs)
    for layer in range(theirs.config.num_layers):
        ropes = (rotary_frequencies(c.config.rope(layer), 512) for c in (ours, theirs))
        (found, factor), (frequencies, theirs_factor) = ropes
        np.testing.assert_allclose(found, frequencies, rtol=1e-6)
        assert factor == pytest.approx(theirs_factor)
    assert set(ours.names()) == set(theirs.names())
    for tensor in ours.names():
        expected = theirs.tensor(tensor).load().dequantize()
        np.testing.assert_array_equal(ours.tensor(tensor).load().dequantize(), expected)


def comparable(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a configuration but its rotary scaling and special tokens; numbers as float32, which
    files hold."""
    values = dataclasses.asdict(checkpoint.config)
    for key in ("rope_scaling", "ropes", "bos_token_id", "eos_token_ids"):
        del values[key]
    extras = values.pop("extras").items()
    numbers = {k: np.float32(v) if isinstance(v, float) else v for k, v in extras}
    return {**values, "rms_norm_eps": np.float32(values["rms_norm_eps"]), **numbers}


def in_gguf(checkpoint: Checkpoint, architecture: str, metadata: dict[str, Any]) -> TinyModel:
    """The tensors of a checkpoint by their names there, its shape and more metadata."""
    config, table = checkpoint.config, architecture_of(checkpoint.config.architecture)
    tensors: dict[str, NDArray[Any]] = {}
    for name in checkpoint.names():
        module = table.module(name.rpartition(".")[0])
        assert module is not None
        values = checkpoint.tensor(name).load().dequantize()
        if module.gguf_permuted:
            heads = module.rows[0](config).units
            values = interleaved(values, heads)
        parts = table.to_gguf(name)
        tensors |= dict(zip(parts, np.split(values, len(parts)), strict=True))
    scaling = config.rope_scaling
    if scaling.kind == "longrope":
        tensors["rope_factors_short.weight"] = np.array(scaling.short_factor, np.float32)
        tensors["rope_factors_long.weight"] = np.array(scaling.long_factor, np.float32)
        factor = rotary_frequencies(config.rope(0))[1]
        metadata = {**metadata, "rope.scaling.attn_factor": factor}
    return TinyModel(architecture, {**shape(checkpoint), **metadata}, tensors)


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The halves of every head, row by row in turn."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """What every decoder's file says."""
    config = checkpoint.config
    return {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotary_dim,
    }
