"""Llama 2 and 3, SmolLM, and what shares their shape."""

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.decoder import Decoder

ARCHITECTURE = Architecture(
    "llama",
    Decoder,
    {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    attention_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)
