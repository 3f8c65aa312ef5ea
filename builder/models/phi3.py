"""Phi-3 and Phi-4: Llama whose q/k/v and gate/up weights are stacked in the checkpoint, with
LongRoPE in those of a long context."""

from collections.abc import Mapping
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, stacked
from slipstream.builder.models.config import SLIDING, ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import read_decoder, with_window
from slipstream.weights.json import Fields

_ORIGINAL = "original_max_position_embeddings"


def read(keys: Fields) -> ModelConfig:
    """A window, if there is one, is that of every layer; the first names of LongRoPE were su and
    yarn."""
    named = Fields({key: _renamed(value) for key, value in keys.values.items()}, keys.origin)
    config = read_decoder(named)
    return with_window(config, keys, (SLIDING,) * config.num_layers)


def write(config: ModelConfig) -> dict[str, Any]:
    """The window; the length before LongRoPE; the token of padding, whose default is beyond a small
    vocabulary."""
    scaling = config.rope_scaling
    original = {_ORIGINAL: scaling.original_max_position_embeddings}
    return {
        **(original if scaling.kind == "longrope" else {}),
        "sliding_window": config.sliding_window,
        "pad_token_id": None,
    }


def _renamed(value: object) -> object:
    """Rotary parameters whose type, if it has an old name, has its new one."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("rope_type", value.get("type"))
    return {**value, "rope_type": "longrope"} if kind in ("su", "yarn") else value


def _no_window(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A window of 0 tokens is how llama.cpp tells Phi-4 from Phi-3."""
    return {"sliding_window": raw.get("sliding_window") or None}


_QKV = stacked(DECODER, "qkv_proj", ("q_proj", "k_proj", "v_proj"), gguf="blk.{i}.attn_qkv")

ARCHITECTURE = Architecture(
    "phi3",
    Decoder,
    stacked(_QKV, "gate_up_proj", ("gate_proj", "up_proj"), gguf="blk.{i}.ffn_up"),
    {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        _ORIGINAL: 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    read,
    write,
    GGUFFamily(
        "phi3",
        keys={
            "sliding_window": "attention.sliding_window",
            _ORIGINAL: "rope.scaling.original_context_length",
        },
        concluded=_no_window,
    ),
)
