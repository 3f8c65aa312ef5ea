"""Gemma 2: Gemma with norms on both sides of every block, a window in every other layer, a scale of
queries of its own, and attention scores and logits within soft caps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slipstream.builder.graph.ops import Attributes
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.gemma import DEFAULTS, GELU, gemma, read_gemma
from slipstream.builder.models.huggingface_config import layer_kinds
from slipstream.builder.models.norms import LayerNorms, with_norms
from slipstream.weights.json import Fields

SCALE, ATTENTION_CAP, LOGITS_CAP = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
NORMS = LayerNorms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
GGUF_KEYS = {"sliding_window": "attention.sliding_window", LOGITS_CAP: LOGITS_CAP}


class GemmaDecoder(Decoder):
    """Norms on both sides; scores with a scale and, if the configuration has one, a soft cap."""

    norms = NORMS

    def attention_attributes(self, layer: int) -> Attributes:
        """With a scale that is not that of the heads' width."""
        extras = self.config.extras
        scale, cap = extras[SCALE] ** -0.5, extras[ATTENTION_CAP]
        return {**super().attention_attributes(layer), "scale": scale, "soft_cap": cap}


def read_sandwich(
    keys: Fields, every: int, ropes: Mapping[str, Rope] | None = None, *, qk_norm: bool = False
) -> ModelConfig:
    """Kinds of layers by name or, where none are named, full attention in one of ``every``; caps
    that are null are 0."""
    config = read_gemma(keys, keys.choice("hidden_activation", (GELU,)), ropes)
    by_number = [SLIDING if (i + 1) % every else FULL for i in range(config.num_layers)]
    caps = {key: read_cap(keys, key) for key in (ATTENTION_CAP, LOGITS_CAP)}
    return dataclasses.replace(
        config,
        layer_kinds=layer_kinds(keys, by_number),
        sliding_window=keys.optional_integer("sliding_window", minimum=1),
        qk_norm=qk_norm,
        extras={SCALE: keys.number(SCALE, positive=True), **caps},
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Kinds, window, biases, scale, caps, the gate; the token of padding, whose default may be
    beyond a small vocabulary."""
    scale = config.extras[SCALE]
    return {
        "layer_types": list(config.layer_kinds),
        "sliding_window": config.sliding_window,
        SCALE: int(scale) if scale == int(scale) else scale,
        **{key: config.extras[key] or None for key in (ATTENTION_CAP, LOGITS_CAP)},
        "attention_bias": config.attention_bias,
        "hidden_activation": config.hidden_act,
        "pad_token_id": None,
    }


def query_scale(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """llama.cpp knows the scale by the number of layers: ``layers`` are those of the model whose
    scale is not that of its heads' width."""
    wide = raw["hidden_size"] // raw["num_attention_heads"]
    return {SCALE: wide if raw["num_hidden_layers"] == layers else raw["head_dim"]}


def read_cap(keys: Fields, key: str) -> float:
    """The c of a soft cap, 0 for null."""
    return keys.number(key, positive=True) if keys.has(key) else 0.0


def logits_cap(config: ModelConfig) -> float:
    """The c of the head."""
    return float(config.extras[LOGITS_CAP])


def _read(keys: Fields) -> ModelConfig:
    return read_sandwich(keys, every=2)


MODULES = differing(gemma(with_norms(DECODER, NORMS)), lm_head={"cap": logits_cap})
ARCHITECTURE = Architecture(
    name="gemma2",
    decoder=GemmaDecoder,
    modules=MODULES,
    defaults={
        **DEFAULTS,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": GELU,
        SCALE: 256,
        ATTENTION_CAP: 50.0,
        LOGITS_CAP: 30.0,
    },
    read=_read,
    write=write,
    gguf=GGUFFamily(
        "gemma2",
        keys={**GGUF_KEYS, ATTENTION_CAP: ATTENTION_CAP},
        concluded=lambda raw: query_scale(raw, layers=46),
    ),
)
