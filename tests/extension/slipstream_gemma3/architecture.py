"""Gemma 3: norms before and after each block, norms of 1 + w, an embedding times the root of its
width, a rotary for each kind of layer, a GELU gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.graph.ops import Attributes
from slipstream.builder.models.architecture import Architecture, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.decoder import DECODER, Decoder, Rotary
from slipstream.builder.models.huggingface_config import (
    head_size,
    layer_kinds,
    read_decoder,
    read_rope,
    read_ropes,
    write_window,
)
from slipstream.builder.models.module import LAYER, Module, hidden
from slipstream.weights.json import Fields

_SCALE, _GELU = "query_pre_attn_scalar", "gelu_pytorch_tanh"
# What other models of the family have.
_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


class GemmaDecoder(Decoder):
    """Norms both sides of attention and of the MLP, whose gate is a GELU."""

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + norm(attention(norm(x))), then + norm(mlp(norm(·)))."""
        ops, prefix = self.ops, f"model.layers.{layer}."
        with ops.scope("attn"):
            normed = self.norm(x, prefix + "input_layernorm")
            attended = self.attention(normed, rotary, layer, prefix + "self_attn.")
            x = ops.add(x, self.norm(attended, prefix + "post_attention_layernorm"))
        with ops.scope("mlp"):
            normed = self.norm(x, prefix + "pre_feedforward_layernorm")
            fed = self.mlp(normed, prefix + "mlp.")
            return ops.add(x, self.norm(fed, prefix + "post_feedforward_layernorm"))

    def attention_attributes(self, layer: int) -> Attributes:
        """With a scale that is not that of the heads' width."""
        scale = self.config.extras[_SCALE] ** -0.5
        return {**super().attention_attributes(layer), "scale": scale}

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """down_proj(gelu(gate_proj(x)) * up_proj(x))."""
        gate_up = self.ops.concat([self.linear(x, f"{prefix}{n}_proj") for n in ("gate", "up")])
        return self.linear(self.ops.operator("GatedGELU", [gate_up]), f"{prefix}down_proj")


def read(keys: Fields) -> ModelConfig:
    """Kinds of layers by name or, in older files, by how often one sees everything."""
    for key in _REFUSED:
        if keys.values.get(key):
            raise keys.refusal(key, "none, as in Gemma 3")
    activation = keys.choice("hidden_activation", (_GELU,))
    named = Fields({**keys.values, "hidden_act": activation}, keys.origin)
    config = read_decoder(named, ropes=_ropes(keys), activations=(_GELU,))
    every, biased = keys.integer("sliding_window_pattern", minimum=1), keys.flag("attention_bias")
    kinds = [SLIDING if (i + 1) % every else FULL for i in range(config.num_layers)]
    return replace(
        config,
        attention_bias=biased,
        o_bias=biased,
        qk_norm=True,
        layer_kinds=layer_kinds(keys, kinds),
        sliding_window=keys.integer("sliding_window", minimum=1),
        extras={_SCALE: keys.integer(_SCALE, minimum=1)},
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Windows, biases, the scale, the gate; the token of padding, which its default is beyond a
    small vocabulary."""
    return {
        **write_window(config),
        **config.extras,
        "attention_bias": config.attention_bias,
        "hidden_activation": config.hidden_act,
        "pad_token_id": None,
    }


def _ropes(keys: Fields) -> Mapping[str, Rope]:
    """By kind of layer; older files have one for full attention and a base for windows."""
    if keys.has("rope_parameters"):
        return read_ropes(keys, head_size(keys))
    local = Rope(keys.number("rope_local_base_freq", positive=True), head_size(keys))
    return {FULL: read_rope(keys, head_size(keys)), SLIDING: local}


def _root(config: ModelConfig) -> float:
    return float(config.hidden_size**0.5)


_BEFORE, _AFTER = f"{LAYER}.pre_feedforward_layernorm", f"{LAYER}.post_feedforward_layernorm"
_NORMS = ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm", "norm")

ARCHITECTURE = Architecture(
    name="gemma3_text",
    decoder=GemmaDecoder,
    modules=(
        *differing(
            DECODER,
            embed_tokens={"scale": _root},
            o_proj={"stream": f"{LAYER}.post_attention_layernorm"},
            gate_proj={"reads": _BEFORE},
            up_proj={"reads": _BEFORE},
            down_proj={"stream": _AFTER},
            **{norm: {"offset": 1.0} for norm in _NORMS},
        ),
        Module(_BEFORE, "norm", (hidden,), offset=1.0),
        Module(_AFTER, "norm", (hidden,), offset=1.0),
    ),
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": _GELU,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        _SCALE: 256,
    },
    read=read,
    write=write,
)
