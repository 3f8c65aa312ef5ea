"""gpt-oss: experts with biases and a clamped gate in every layer, attention with sinks, a window in
every other layer, and YaRN whose ramp begins and ends between two elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    gguf_keys,
    read_experts,
    with_experts,
    write_experts,
)
from slipstream.builder.models.huggingface_config import layer_kinds, read_decoder, with_window
from slipstream.builder.models.module import LAYER, Module, Stack, one_a_head
from slipstream.weights.json import Fields

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# Those of the gate, which our kernels know as numbers of their own.
_GATE = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


class GptOssDecoder(ExpertDecoder):
    """A router of another name, and a gate that no name of an activation says."""

    router = "router"

    def gate(self) -> str:
        """Clamped, whatever ``hidden_act`` says."""
        return "clamped"


def _read(keys: Fields) -> ModelConfig:
    """Weights of the chosen experts are softmaxed among them, which is renormalizing."""
    if not (keys.values.get("rope_parameters") or keys.values.get("rope_scaling")):
        keys = replace(keys, values={**keys.values, "rope_parameters": _YARN})
    for name, value in _GATE.items():
        if keys.number(name) != value:
            raise keys.refusal(name, f"{value}, the only one that kernels have")
    config, biased = read_decoder(keys), keys.flag("attention_bias")
    kinds = [FULL if i % 2 else SLIDING for i in range(config.num_layers)]
    return replace(
        with_window(config, keys, layer_kinds(keys, kinds)),
        attention_bias=biased,
        o_bias=biased,
        extras={
            **read_experts(keys, "num_local_experts", "intermediate_size"),
            RENORMALIZE: True,
        },
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_kinds),
        "attention_bias": config.attention_bias,
        **write_experts(config, "num_local_experts", "intermediate_size"),
    }


def _concluded(found: Mapping[str, Any]) -> dict[str, Any]:
    """No metadata says whether the ramp of YaRN ends at whole elements."""
    return {"rope_parameters": {**found["rope_parameters"], "truncate": False}}


def _in_stacks(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """Experts of a layer in two tensors, in which gate and up take turns."""
    name = f"{LAYER}.mlp.experts."

    def half(part: int) -> Stack:
        return Stack(f"{name}gate_up_proj", part, 2, interleaved=True, transposed=True)

    return differing(
        modules,
        router={"bias": True},
        gate_proj={"bias": True, "stack": half(0)},
        up_proj={"bias": True, "stack": half(1)},
        # Scales do not pass a clamped gate.
        down_proj={
            "bias": True,
            "stack": Stack(f"{name}down_proj", transposed=True),
            "reads": None,
        },
    )


_SINKS = Module(
    f"{LAYER}.self_attn.sinks",
    "vector",
    (one_a_head,),
    bare=True,
    shard="column",
    gguf="blk.{i}.attn_sinks.weight",
)
ARCHITECTURE = Architecture(
    "gpt_oss",
    GptOssDecoder,
    (
        *differing(
            with_experts(DECODER, _in_stacks(expert_modules("mlp", router="router"))),
            post_attention_layernorm={"gguf": "blk.{i}.post_attention_norm"},
        ),
        _SINKS,
    ),
    {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        **_GATE,
    },
    _read,
    _write,
    GGUFFamily(
        "gpt-oss",
        keys={
            **gguf_keys("num_local_experts", "intermediate_size"),
            "sliding_window": "attention.sliding_window",
        },
        concluded=_concluded,
    ),
)
