"""Logits computed layer by layer against transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.test_architectures import CONFIGS as ALL
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.quantize.activations import KVQuant
from slipstream.quantize.forward import CheckpointModel
from slipstream.weights.tensor import KVScales

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY_SHAPE),
    "llama-biases": LlamaConfig(**TINY_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**TINY_SHAPE, tie_word_embeddings=True),
    "llama-yarn": LlamaConfig(**TINY_SHAPE, rope_parameters={"rope_theta": 1e4, **ROPE}),
    "mistral-window": MistralConfig(**TINY_SHAPE, sliding_window=16),
    "qwen2": Qwen2Config(**TINY_SHAPE),
    "qwen3": Qwen3Config(**TINY_SHAPE, head_dim=32),
    **{
        name: ALL[name]
        for name in (
            "cohere2",
            "gemma4-experts-and-all",
            "gemma4-full",
            "gemma4-keys-are-values-shared",
            "gemma4-ropes",
            "glm4",
            "granite-multipliers",
            "ministral-both",
            "ministral3",
            "olmo3-full",
            "olmo3-rope-yarn",
            "phi3-longrope-long",
            "smollm3-window",
        )
    },
    **{
        config.model_type: config
        for config in reversed(ALL.values())
        if hasattr(config, "num_experts_per_tok")
    },
    "gemma2": Gemma2Config(
        **TINY_SHAPE,
        head_dim=16,
        pad_token_id=0,
        query_pre_attn_scalar=24,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
    "gemma3": Gemma3TextConfig(
        **TINY_SHAPE,
        head_dim=16,
        pad_token_id=0,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
WINDOWS = [np.arange(5, 45, dtype=np.int32), np.arange(100, 180, dtype=np.int32)]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = save_tiny(CONFIGS[name], tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = CheckpointModel(open_checkpoint(path)).logits(WINDOWS)
    for window, logits in zip(WINDOWS, found, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(window.astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kv",
    [
        KVQuant("int8"),
        KVQuant("fp8"),
        KVQuant("fp8", KVScales((0.01,) * 3, (0.01,) * 3)),
    ],
    ids=["int8", "fp8", "fp8-scaled"],
)
def test_rounding_of_keys_and_values_is_felt(kv: KVQuant, tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    exact = next(CheckpointModel(checkpoint).logits(WINDOWS[:1]))
    rounded = next(CheckpointModel(checkpoint, kv=kv).logits(WINDOWS[:1]))
    distance = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < distance < 0.2
