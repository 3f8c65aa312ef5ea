"""GLM-4 of 2024: half of each head is rotated, neighbour with neighbour; gate and up are stacked,
and q, k and v have biases."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing, stacked
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.weights.json import Fields

_NEIGHBOURS: dict[str, Any] = {"neighbours": True}
MODULES = stacked(
    differing(DECODER, q_proj=_NEIGHBOURS, k_proj=_NEIGHBOURS),
    "gate_up_proj",
    ("gate_proj", "up_proj"),
    gguf="blk.{i}.ffn_up",
)
DEFAULTS = {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}


def read(keys: Fields) -> ModelConfig:
    """One flag for the biases of q, k and v."""
    return replace(read_decoder(keys), attention_bias=keys.flag("attention_bias"))


def write(config: ModelConfig) -> dict[str, Any]:
    """The flag; the part of a head that is rotated, whose default is not all of it; the token of
    padding, whose default is beyond a small vocabulary."""
    return {
        "attention_bias": config.attention_bias,
        "partial_rotary_factor": 1.0,
        "pad_token_id": None,
    }


ARCHITECTURE = Architecture("glm", Decoder, MODULES, DEFAULTS, read, write, GGUFFamily("chatglm"))
