"""What no graph can be made of is refused with the key and what stands there."""

from __future__ import annotations

from typing import Any

import pytest
from tests.builder.models.configurations import LLAMA3, LONGROPE, SLIDING, SMALL, huggingface

from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; expected one of LlamaForCausalLM, Gemma",
        ),
        ({}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3, yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "same for every layer"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "x"}}, "low_freq_factor is 'x'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"hidden_size": "96"}, "hidden_size is '96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"eos_token_id": ["<end>"]}, "eos_token_id is .'<end>'.; expected token ids"),
    ],
)
def test_what_cannot_be_run_is_refused(raw: dict[str, Any], message: str) -> None:
    supported = {"architectures": ["LlamaForCausalLM"], **SMALL} if raw else {}
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_huggingface(supported | raw)


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention"] * 3 + ["chunked"]])
def test_layer_types_must_be_known_and_complete(kinds: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"layer_types is .* expected 4 entries"):
        huggingface("Qwen3ForCausalLM", **SLIDING, layer_types=kinds)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [["LlamaForCausalLM"]]),
        ("architectures", {"LlamaForCausalLM": 1}),
        ("rope_parameters", [1, 2]),
        ("rope_parameters", "default"),
        ("rope_parameters", {"rope_type": ["yarn"]}),
        ("rope_parameters", {"rope_type": "yarn", "factor": float("nan")}),
        ("rope_parameters", {"rope_type": "yarn", "truncate": "no"}),
        ("rope_parameters", {"rope_type": "yarn", "original_max_position_embeddings": "64"}),
        ("rope_parameters", {"rope_type": "yarn", "attention_factor": "1"}),
        ("rope_parameters", {"rope_theta": 10**400}),
        ("rope_scaling", {"type": "linear", "factor": True}),
        ("rope_theta", float("inf")),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 1e-9),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", None),
        ("num_hidden_layers", 10**18),
        ("num_attention_heads", 4.0),
        ("num_key_value_heads", 0),
        ("hidden_size", 10**4000),
        ("hidden_size", 3),
        ("head_dim", -1),
        ("head_dim", [16]),
        ("hidden_act", ["silu"]),
        ("attention_bias", "false"),
        ("mlp_bias", 0),
        ("tie_word_embeddings", None),
        ("bos_token_id", True),
        ("bos_token_id", -2),
        ("eos_token_id", {"id": 1}),
        ("eos_token_id", [2**70]),
        ("vocab_size", "100"),
        ("max_position_embeddings", {}),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    raw = {"architectures": ["LlamaForCausalLM"], **SMALL, key: value}
    with pytest.raises(CheckpointError, match=r"^config\.json: .{1,400}$"):
        ModelConfig.from_huggingface(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", 5),
        ("layer_types", "full_attention"),
        ("layer_types", [["full_attention"]] * 4),
        ("use_sliding_window", 1),
        ("sliding_window", "64"),
        ("sliding_window", 0),
        ("max_window_layers", None),
    ],
)
def test_a_window_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: {key} is"):
        huggingface("Qwen3ForCausalLM", **{**SLIDING, key: value})


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("GraniteForCausalLM", "residual_multiplier", 0),
        ("GraniteForCausalLM", "logits_scaling", "8"),
        ("GraniteForCausalLM", "attention_multiplier", -0.1),
        ("Phi3ForCausalLM", "rope_scaling", LONGROPE | {"short_factor": [1.0] * 7}),
        ("Phi3ForCausalLM", "rope_scaling", LONGROPE | {"long_factor": [0.0] * 8}),
        ("Phi3ForCausalLM", "rope_scaling", LONGROPE | {"long_factor": None}),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1, 1, 1]),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1, 1, 1, 2]),
        ("SmolLM3ForCausalLM", "no_rope_layer_interval", 0),
        ("Olmo3ForCausalLM", "rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}),
        ("OlmoeForCausalLM", "clip_qkv", 0),
        ("OlmoeForCausalLM", "num_experts_per_tok", 65),
        ("FlexOlmoForCausalLM", "num_experts_per_tok", 8),
        ("Ernie4_5_MoeForCausalLM", "moe_k", 65),
        ("Ernie4_5_MoeForCausalLM", "use_bias", True),
        ("Ernie4_5_MoeForCausalLM", "moe_norm_min", 1e-3),
        ("Ernie4_5_MoeForCausalLM", "moe_layer_interval", 0),
        ("Ernie4_5_MoeForCausalLM", "moe_layer_end_index", -2),
        ("Qwen2MoeForCausalLM", "decoder_sparse_step", 0),
        ("Qwen2MoeForCausalLM", "shared_expert_intermediate_size", 0),
        ("GraniteMoeForCausalLM", "num_local_experts", 0),
        ("GraniteMoeHybridForCausalLM", "layer_types has layers of the kind mamba", None),
        ("GraniteMoeHybridForCausalLM", "layers_block_type", ["attention", "mamba"]),
        ("GptOssForCausalLM", "swiglu_alpha", 1.0),
        ("GptOssForCausalLM", "swiglu_limit", 5.0),
        ("Glm4MoeForCausalLM", "n_group", 3),
        ("Glm4MoeForCausalLM", "n_group", 128),
        ("Glm4MoeForCausalLM", "topk_group", 2),
        ("Glm4MoeForCausalLM", "n_shared_experts", 0),
    ],
)
def test_a_value_that_a_family_cannot_have_is_refused(
    architecture: str, key: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=rf"^config.json: {key}"):
        huggingface(architecture, **{key: value})


def test_a_token_chooses_within_groups_that_have_its_experts() -> None:
    groups = {"n_group": 32, "topk_group": 1}
    with pytest.raises(CheckpointError, match="topk_group is 1; expected groups that have 8 exp"):
        huggingface("Glm4MoeForCausalLM", **groups)
    assert huggingface("Glm4MoeForCausalLM", **groups | {"topk_group": 2}).extras["n_group"] == 32


@pytest.mark.parametrize(
    "name", ["Qwen3MoeForCausalLM", "Gemma4ForCausalLM", "Ernie4_5_MoeForCausalLM"]
)
def test_experts_of_all_layers_are_bounded(name: str) -> None:
    raw = {
        "architectures": [name],
        "num_hidden_layers": 5000,
        "num_experts": 4096,
        "enable_moe_block": True,
        "top_k_experts": 1,
        "moe_intermediate_size": 8,
    }
    with pytest.raises(CheckpointError, match="num_experts is 4096; expected at most 65536 exp"):
        ModelConfig.from_huggingface(raw)
