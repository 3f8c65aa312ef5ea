"""How many numbers a model has, by the tensors that a checkpoint of it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.parameters import chosen_share, count_parameters

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": 100,
}
GEMMA4 = {
    **SHAPE,
    "architectures": ["Gemma4ForCausalLM"],
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
WITHOUT_EXPERTS = {
    "Gemma 4, whose layers differ": GEMMA4,
    "Granite 4": {
        **SHAPE,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "num_local_experts": 0,
        "layer_types": ["attention"] * 6,
    },
    "tied": {**SHAPE, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
}
MIXTURE = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
}


def elements(config: ModelConfig) -> int:
    return sum(map(math.prod, architecture_of(config.architecture).shapes(config).values()))


@pytest.mark.parametrize("raw", WITHOUT_EXPERTS.values(), ids=WITHOUT_EXPERTS)
def test_a_token_takes_all_where_there_are_no_experts(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_huggingface(raw)
    counted = count_parameters(config)
    assert counted.total == counted.active == elements(config)
    assert chosen_share(config) == 1


def test_a_token_takes_the_experts_that_it_chooses() -> None:
    config = ModelConfig.from_huggingface(MIXTURE)
    counted = count_parameters(config)
    others = 5 * (8 - 2) * 3 * 64 * 16
    assert (counted.total, counted.active) == (elements(config), elements(config) - others)
    assert chosen_share(config) == 0.25
