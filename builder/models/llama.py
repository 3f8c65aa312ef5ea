"""Llama 2 and 3, SmolLM, and what shares their shape."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.weights.json import Fields

MODULES = differing(DECODER, q_proj={"gguf_permuted": True}, k_proj={"gguf_permuted": True})


def read(keys: Fields) -> ModelConfig:
    """One flag for the four biases of attention, one for those of the MLP."""
    attention, mlp = keys.flag("attention_bias"), keys.flag("mlp_bias")
    return replace(read_decoder(keys), attention_bias=attention, o_bias=attention, mlp_bias=mlp)


def write(config: ModelConfig) -> dict[str, Any]:
    """Both flags."""
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


ARCHITECTURE = Architecture(
    "llama",
    Decoder,
    MODULES,
    {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read,
    write,
    GGUFFamily("llama"),
)
