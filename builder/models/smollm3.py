"""SmolLM3: Llama whose every fourth layer has no rotary embedding."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models import llama
from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.huggingface_config import layer_kinds, with_window, write_window
from slipstream.builder.models.rope import unrotated
from slipstream.weights.json import Fields

_ROTATED = "no_rope_layers"  # 1 for a layer that is rotated: the name says the opposite


class SmolLM3Decoder(Decoder):
    """Turns no heads in some layers."""

    def rope(self, layer: int) -> Rope:
        """The rotary angles of a layer, 0 where it has none."""
        rope = self.config.rope(layer)
        return rope if self.config.extras[_ROTATED][layer] else unrotated(rope)


def read(keys: Fields) -> ModelConfig:
    """Which layers are rotated and, where windows are used, that those that are not have one."""
    config = llama.read(keys)
    rotated = _rotated(keys, config.num_layers)
    windowed = keys.flag("use_sliding_window")
    by_number = [SLIDING if windowed and not each else FULL for each in rotated]
    config = with_window(config, keys, layer_kinds(keys, by_number))
    return replace(config, extras={_ROTATED: rotated})


def write(config: ModelConfig) -> dict[str, Any]:
    """All of it; the token of padding, whose default is beyond a small vocabulary."""
    return {
        **llama.write(config),
        **write_window(config),
        **config.extras,
        "use_sliding_window": config.sliding_window is not None,
        "pad_token_id": None,
    }


def _rotated(keys: Fields, num_layers: int) -> list[int]:
    """0 or 1 for every layer."""
    if not keys.has(_ROTATED):
        every = keys.integer("no_rope_layer_interval", minimum=1)
        return [int((layer + 1) % every != 0) for layer in range(num_layers)]
    given = keys.integers(_ROTATED)
    if len(given) < num_layers or not set(given) <= {0, 1}:
        raise keys.refusal(_ROTATED, f"{num_layers} entries, each 0 or 1")
    return list(given[:num_layers])


ARCHITECTURE = Architecture(
    "smollm3",
    SmolLM3Decoder,
    llama.MODULES,
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    read,
    write,
    GGUFFamily("smollm3"),
)
