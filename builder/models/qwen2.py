"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in some layers."""

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.decoder import Decoder

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
ARCHITECTURE = Architecture(
    "qwen2", Decoder, DEFAULTS, sliding="by_layer_type", attention_bias=True
)
