"""Cohere 2 (Command R7B, Command A): attention and the MLP side by side behind one LayerNorm, and
rotary embeddings, neighbour with neighbour, only in layers with a window."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.decoder import DECODER, Decoder, Rotary
from slipstream.builder.models.huggingface_config import (
    layer_kinds,
    read_decoder,
    with_window,
    write_window,
)
from slipstream.builder.models.module import LAYER
from slipstream.builder.models.rope import unrotated
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor

_SCALE, _EPS = "logit_scale", "layer_norm_eps"


class Cohere2Decoder(Decoder):
    """One norm, which takes the mean away, for both halves of a layer."""

    def rope(self, layer: int) -> Rope:
        """The rotary angles of a layer, 0 where it has no window."""
        rope = self.config.rope(layer)
        return rope if self.config.window(layer) else unrotated(rope)

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + attention(norm(x)) + mlp(norm(x))."""
        ops, prefix = self.ops, f"model.layers.{layer}."
        normed = self.norm(x, prefix + "input_layernorm")
        with ops.scope("attn"):
            x = ops.add(x, self.attention(normed, rotary, layer, prefix + "self_attn."))
        with ops.scope("mlp"):
            return ops.add(x, self.mlp(normed, prefix + "mlp."))

    def normed(self, x: ir.Value, weight: LazyTensor) -> ir.Value:
        """A LayerNorm without bias."""
        return self.ops.layer_norm(x, weight, self.eps())


def read(keys: Fields) -> ModelConfig:
    """Kinds of layers by name or, in older files, by how often one sees everything."""
    named = Fields({**keys.values, "rms_norm_eps": keys.number(_EPS)}, keys.origin)
    config, biased = read_decoder(named), keys.flag("attention_bias")
    every = keys.integer("sliding_window_pattern", minimum=1)
    kinds = [SLIDING if (i + 1) % every else FULL for i in range(config.num_layers)]
    config = with_window(config, keys, layer_kinds(keys, kinds))
    extras = {_SCALE: keys.number(_SCALE, positive=True)}
    return replace(config, attention_bias=biased, o_bias=biased, extras=extras)


def write(config: ModelConfig) -> dict[str, Any]:
    """All of it."""
    return {
        "sliding_window": None,
        **write_window(config),
        **config.extras,
        _EPS: config.rms_norm_eps,
        "attention_bias": config.attention_bias,
    }


def _logits_scale(config: ModelConfig) -> float:
    return float(config.extras[_SCALE])


_BEFORE = f"{LAYER}.input_layernorm"
_ROTATED: dict[str, Any] = {"neighbours": True}

ARCHITECTURE = Architecture(
    "cohere2",
    Cohere2Decoder,
    tuple(
        module
        for module in differing(
            DECODER,
            q_proj=_ROTATED,
            k_proj=_ROTATED,
            o_proj={"stream": LAYER},
            gate_proj={"reads": _BEFORE},
            up_proj={"reads": _BEFORE},
            lm_head={"scale": _logits_scale},
        )
        if module.name != f"{LAYER}.post_attention_layernorm"
    ),
    {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 4,
        _EPS: 1e-5,
        _SCALE: 0.0625,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    read,
    write,
    GGUFFamily(
        "cohere2",
        keys={
            "sliding_window": "attention.sliding_window",
            _SCALE: "logit_scale",
            _EPS: "attention.layer_norm_epsilon",
        },
    ),
)
