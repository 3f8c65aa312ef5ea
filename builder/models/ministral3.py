"""Ministral 3 and Devstral 2: Mistral with YaRN, whose queries grow with their position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import Source
from slipstream.builder.models import mistral
from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import ModelConfig, Rope
from slipstream.builder.models.decoder import Decoder, Rotary
from slipstream.builder.models.huggingface_config import described_ropes
from slipstream.builder.models.llama import MODULES
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

_ROPE, _BETA, _LOG = "rope_parameters", "llama_4_scaling_beta", "mscale_all_dim"


class Ministral3Decoder(Decoder):
    """Multiplies q by 1 + beta · log(1 + ⌊position / original length⌋), as long as a sequence of
    the engine can be longer than that."""

    temperature: ir.Value | None = None

    def rotaries(self) -> Mapping[Rope, Rotary]:
        """The angles and, beside them, what queries are multiplied by, once a step."""
        original = self.config.rope_scaling.original_max_position_embeddings
        if self.config.extras[_BETA] and self.max_seq_len > original > 0:
            positions = self.ops.input(Source.POSITIONS)
            self.temperature = self.ops.embedding(positions, self._temperatures(original))
        return Decoder.rotaries(self)

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """q_proj(x) times its temperature | k_proj(x) | v_proj(x)."""
        if self.temperature is None:
            return Decoder.qkv(self, x, prefix)
        q, k, v = (self.linear(x, f"{prefix}{name}_proj") for name in "qkv")
        return self.ops.concat([self.ops.scale_rows(q, self.temperature), k, v])

    def _temperatures(self, original: int) -> LazyTensor:
        """Of every position, float32 ``[max_seq_len, 1]``."""
        name, form = "temperatures", WeightFormat((self.max_seq_len, 1))
        lengths = np.arange(self.max_seq_len, dtype=np.float32)[:, None] // original
        factors = 1 + np.float32(self.config.extras[_BETA]) * np.log1p(lengths)
        return LazyTensor(name, form, lambda: QuantTensor(name, form, factors))


def read(keys: Fields) -> ModelConfig:
    """What Mistral has, and the beta among the rotary parameters."""
    beta = keys.fields(_ROPE, {}).number(_BETA, 0.0)
    return replace(mistral.read(keys), extras={_BETA: beta})


def write(config: ModelConfig) -> dict[str, Any]:
    """The same."""
    ropes = {**described_ropes(config), _BETA: config.extras[_BETA]}
    return {**mistral.write(config), _ROPE: ropes, "pad_token_id": None}


def _yarn(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Its rotary parameters in one place; llama.cpp takes mscale for 1."""
    found = {key: raw[key] for key in (_BETA, _LOG) if key in raw}
    return {_ROPE: {**raw[_ROPE], "mscale": 1.0, **found}}


ARCHITECTURE = Architecture(
    "ministral3",
    Ministral3Decoder,
    MODULES,
    {
        **mistral.ARCHITECTURE.defaults,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        _ROPE: {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            _LOG: 1.0,
            _BETA: 0.1,
        },
    },
    read,
    write,
    GGUFFamily(
        "mistral3",
        keys={
            "sliding_window": "attention.sliding_window",
            _BETA: "attention.temperature_scale",
            _LOG: "rope.scaling.yarn_log_multiplier",
        },
        concluded=_yarn,
    ),
)
