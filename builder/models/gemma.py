"""Gemma: Llama with norms of 1 + w, an embedding times the root of its width and a GELU gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import ModelConfig, Rope
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import Module
from slipstream.weights.json import Fields

GELU = "gelu_pytorch_tanh"
# What all Gemmas have in common where it is not common to all decoders.
DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def root(config: ModelConfig) -> float:
    """Of the width of the residual stream."""
    return float(config.hidden_size**0.5)


def gemma(modules: Iterable[Module]) -> tuple[Module, ...]:
    """A table whose norms multiply by 1 + w, and whose embedding is multiplied by the root of its
    width."""

    def changed(module: Module) -> Module:
        if module.role == "norm":
            return dataclasses.replace(module, offset=1.0)
        return dataclasses.replace(module, scale=root) if module.role == "embedding" else module

    return tuple(map(changed, modules))


def read_gemma(keys: Fields, gate: object, ropes: Mapping[str, Rope] | None = None) -> ModelConfig:
    """One flag for the four biases of attention; a model that looks ahead is refused.

    ``gate`` is the activation that config.json names.
    """
    if keys.values.get("use_bidirectional_attention"):
        raise keys.refusal("use_bidirectional_attention", "false, a model that generates")
    named = Fields({**keys.values, "hidden_act": gate}, keys.origin)
    config = read_decoder(named, ropes=ropes, activations=(GELU,))
    biased = keys.flag("attention_bias")
    return dataclasses.replace(config, attention_bias=biased, o_bias=biased)


def read(keys: Fields) -> ModelConfig:
    """The gate is a GELU in its tanh form, also where older files name the other."""
    given = keys.values["hidden_act"]
    return read_gemma(keys, GELU if given == "gelu" else given)


def write(config: ModelConfig) -> dict[str, Any]:
    """The biases; the token of padding, whose default may be beyond a small vocabulary."""
    return {"attention_bias": config.attention_bias, "pad_token_id": None}


ARCHITECTURE = Architecture(
    name="gemma",
    decoder=Decoder,
    modules=gemma(DECODER),
    defaults={
        **DEFAULTS,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": GELU,
    },
    read=read,
    write=write,
    gguf=GGUFFamily("gemma"),
)
