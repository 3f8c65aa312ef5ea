"""Mixtral: Mistral whose MLPs are eight experts, of which each token takes two."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    read_experts,
    with_experts,
    write_experts,
)
from slipstream.builder.models.mistral import read as read_mistral
from slipstream.builder.models.mistral import write as write_mistral
from slipstream.weights.json import Fields

BLOCK, PARTS = "block_sparse_moe", ("w1", "w3", "w2")
_COUNT, _WIDTH = "num_local_experts", "intermediate_size"


class MixtralDecoder(ExpertDecoder):
    """Experts with names of their own."""

    block, parts = BLOCK, PARTS


def _read(keys: Fields) -> ModelConfig:
    routing = {**read_experts(keys, _COUNT, _WIDTH), RENORMALIZE: True}
    return replace(read_mistral(keys), extras=routing)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_mistral(config), **write_experts(config, _COUNT, _WIDTH)}


ARCHITECTURE = Architecture(
    "mixtral",
    MixtralDecoder,
    with_experts(DECODER, expert_modules(BLOCK, *PARTS)),
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
)
