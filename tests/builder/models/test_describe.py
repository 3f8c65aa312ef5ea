"""A configuration written as config.json and read again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny_models import LLAMA

from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "head_dim": 32},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "eos_token_id": [1, 2], "bos_token_id": 0},
        {
            "architectures": ["Qwen3ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        {"architectures": ["Cohere2ForCausalLM"], "layer_norm_eps": 1e-4, "logit_scale": 0.5},
        {"architectures": ["GlmForCausalLM"], "attention_bias": False},
        {"architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 1.0},
        {
            "architectures": ["GraniteForCausalLM"],
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.015625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "mlp_bias": True,
        },
        {
            "architectures": ["MinistralForCausalLM"],
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"architectures": ["Ministral3ForCausalLM"], "sliding_window": 32},
        {"architectures": ["Olmo2ForCausalLM"], "attention_bias": True},
        {
            "architectures": ["Olmo3ForCausalLM"],
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"architectures": ["Olmo3ForCausalLM"], "sliding_window": None},
        {"architectures": ["Phi3ForCausalLM"], "sliding_window": 32},
        {
            "architectures": ["Phi3ForCausalLM"],
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.25,
            "rope_scaling": {
                "type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        },
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [0, 1]},
        {
            "architectures": ["SmolLM3ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 32,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
        },
        {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "attention_bias": True},
        {
            "architectures": ["Gemma2ForCausalLM"],
            "hidden_act": None,
            "final_logit_softcapping": None,
            "sliding_window": None,
        },
        {
            "architectures": ["Gemma3ForCausalLM"],
            "hidden_act": None,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 12.5,
        },
        {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
        },
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 32,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 32,
        },
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
        {"architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0, "norm_topk_prob": True},
        {"architectures": ["OlmoeForCausalLM"], "num_experts": 5, "num_experts_per_tok": 3},
        {"architectures": ["FlexOlmoForCausalLM"], "norm_topk_prob": True, "attention_bias": True},
        {"architectures": ["FlexOlmoForCausalLM"], "num_experts": 5, "num_experts_per_tok": 3},
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "moe_num_experts": 5,
            "moe_k": 3,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
        },
        {
            "architectures": ["GraniteMoeForCausalLM"],
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "residual_multiplier": 0.22,
            "attention_bias": True,
        },
        {"architectures": ["GraniteMoeSharedForCausalLM"], "shared_intermediate_size": 32},
        {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "layers_block_type": ["attention", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope",
        },
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["full_attention"] * 2},
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 1.0,
        },
        {"architectures": ["Glm4MoeForCausalLM"]},
        {"architectures": ["GptOssForCausalLM"], "attention_bias": False, "sliding_window": 9},
        {
            "architectures": ["GptOssForCausalLM"],
            "layer_types": ["full_attention"] * 2,
            "num_local_experts": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ],
)  # fmt: skip
def test_a_config_made_of_a_model_configuration_says_the_same(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_huggingface({**LLAMA, "model_type": None, **raw})
    assert ModelConfig.from_huggingface(describe(config)) == config
