"""Arcee (AFM): Llama whose MLP has no gate; what goes up is squared where it is positive."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.llama import MODULES, write
from slipstream.weights.json import Fields

_RELU2 = "relu2"


class ArceeDecoder(Decoder):
    """An MLP without a gate."""

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """down_proj(max(up_proj(x), 0)²)."""
        up = self.linear(x, f"{prefix}up_proj")
        return self.linear(self.ops.operator("SquaredRelu", [up]), f"{prefix}down_proj")


def read(keys: Fields) -> ModelConfig:
    """One flag for the four biases of attention, one for those of the MLP."""
    attention, mlp = keys.flag("attention_bias"), keys.flag("mlp_bias")
    config = read_decoder(keys, activations=(_RELU2,))
    return replace(config, attention_bias=attention, o_bias=attention, mlp_bias=mlp)


ARCHITECTURE = Architecture(
    name="arcee",
    decoder=ArceeDecoder,
    # A scale of up's channels does not commute with a square.
    modules=tuple(
        replace(m, reads=None) if m.name.endswith("down_proj") else m
        for m in MODULES
        if not m.name.endswith("gate_proj")
    ),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "num_key_value_heads": None,
        "hidden_act": _RELU2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    read=read,
    write=write,
    gguf=GGUFFamily("arcee"),
)
