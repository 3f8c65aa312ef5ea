"""Mistral: Llama with a sliding window in every layer."""

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.decoder import Decoder

ARCHITECTURE = Architecture(
    "mistral",
    Decoder,
    {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    sliding="every_layer",
)
