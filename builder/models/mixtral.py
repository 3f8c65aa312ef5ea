"""Mixtral: Mistral whose MLPs are eight experts, of which each token takes two."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.experts import (
    EXPERTS,
    RENORMALIZE,
    TOP_K,
    ExpertDecoder,
    expert_modules,
    read_experts,
)
from slipstream.builder.models.llama import MODULES
from slipstream.builder.models.mistral import read as read_mistral
from slipstream.builder.models.mistral import write as write_mistral
from slipstream.builder.models.module import LAYER
from slipstream.weights.json import Fields

_BLOCK, _PARTS = "block_sparse_moe", ("w1", "w3", "w2")


class MixtralDecoder(ExpertDecoder):
    """Experts with names of their own."""

    block, parts = _BLOCK, _PARTS


def _read(keys: Fields) -> ModelConfig:
    routing = {**read_experts(keys, "num_local_experts", "intermediate_size"), RENORMALIZE: True}
    return replace(read_mistral(keys), extras=routing)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_mistral(config),
        "num_local_experts": config.extras[EXPERTS],
        "num_experts_per_tok": config.extras[TOP_K],
    }


_MLP = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURE = Architecture(
    "mixtral",
    MixtralDecoder,
    (
        *differing(
            tuple(m for m in MODULES if m.name.rpartition(".")[2] not in _MLP),
            o_proj={"stream": f"{LAYER}.post_attention_layernorm"},
        ),
        *expert_modules(_BLOCK, *_PARTS),
    ),
    {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    _read,
    _write,
    # As Mistral, under the name of Llama; what says so is that there are experts.
    GGUFFamily(
        "llama",
        keys={
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "sliding_window": "attention.sliding_window",
        },
    ),
)
