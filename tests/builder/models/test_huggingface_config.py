"""ModelConfig against the configuration classes of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.builder.models.configurations import LLAMA3, LONGROPE, SLIDING, SMALL, YARN, huggingface
from transformers import (
    Cohere2Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from slipstream.builder.models.config import ModelConfig

EXPERT_CLASSES: dict[str, Any] = {
    "MixtralForCausalLM": MixtralConfig,
    "Qwen2MoeForCausalLM": Qwen2MoeConfig,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "OlmoeForCausalLM": OlmoeConfig,
    "FlexOlmoForCausalLM": FlexOlmoConfig,
    "Ernie4_5_MoeForCausalLM": Ernie4_5_MoeConfig,
    "GraniteMoeForCausalLM": GraniteMoeConfig,
    "GraniteMoeSharedForCausalLM": GraniteMoeSharedConfig,
    "Glm4MoeForCausalLM": Glm4MoeConfig,
    "GptOssForCausalLM": GptOssConfig,
}
CLASSES: dict[str, Any] = {
    **EXPERT_CLASSES,
    "GemmaForCausalLM": GemmaConfig,
    "Gemma2ForCausalLM": Gemma2Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "MinistralForCausalLM": MinistralConfig,
    "Ministral3ForCausalLM": Ministral3Config,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "Cohere2ForCausalLM": Cohere2Config,
    "GlmForCausalLM": GlmConfig,
    "Glm4ForCausalLM": Glm4Config,
    "GraniteForCausalLM": GraniteConfig,
    "Olmo2ForCausalLM": Olmo2Config,
    "Olmo3ForCausalLM": Olmo3Config,
    "Phi3ForCausalLM": Phi3Config,
    "SmolLM3ForCausalLM": SmolLM3Config,
}


def by_kind(raw: dict[str, Any]) -> dict[str, Any]:
    """With rotary parameters, if there are any, of full attention."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling")
    if given is None:
        return raw
    full = {"rope_theta": SMALL["rope_theta"], "rope_type": given.get("type"), **given}
    others = {key: value for key, value in raw.items() if key != "rope_scaling"}
    return others | {"rope_parameters": {"full_attention": full}}


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize(
    "raw",
    [
        {},
        SMALL,
        SMALL | {"attention_bias": True, "mlp_bias": True},
        SMALL | {"head_dim": 20},
        SMALL | {"sliding_window": None},
        SMALL | SLIDING,
        SMALL | SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        SMALL | {"rope_scaling": LLAMA3},
        SMALL | {"rope_parameters": YARN | {"rope_theta": 20000.0}},
    ],
)
def test_every_value_is_that_of_transformers(architecture: str, raw: dict[str, Any]) -> None:
    if architecture == "Olmo3ForCausalLM":
        raw = by_kind(raw)
    if architecture == "Phi3ForCausalLM" and raw.keys() & {"rope_scaling", "rope_parameters"}:
        raw = {**SMALL, "rope_scaling": LONGROPE, "partial_rotary_factor": 1.0}
    if architecture == "Gemma3ForCausalLM" and "rope_parameters" in raw:
        raw = {**raw, "rope_parameters": {"full_attention": raw["rope_parameters"]}}
    if architecture == "Gemma3ForCausalLM":  # which has no older name of the kind
        raw = json.loads(json.dumps(raw).replace('"type"', '"rope_type"'))
    if architecture == "Glm4MoeForCausalLM":  # whose heads by default cannot be halved
        raw = {"head_dim": 16, **raw}
    ours = ModelConfig.from_huggingface({"architectures": [architecture], **raw})
    theirs = CLASSES[architecture](**json.loads(json.dumps(raw)))

    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    default = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or default)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    name = "layer_norm_eps" if hasattr(theirs, "layer_norm_eps") else "rms_norm_eps"
    assert ours.rms_norm_eps == getattr(theirs, name)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (
        [] if eos is None else eos if isinstance(eos, list) else [eos]
    )
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.rotary_dim == int(ours.head_dim * rope.get("partial_rotary_factor", 1))
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.rope_scaling.kind == rope["rope_type"]
    others = {"partial_rotary_factor", "max_position_embeddings", "llama_4_scaling_beta"}
    for key in set(rope) - {"rope_theta", "rope_type", "type"} - others:
        value = getattr(ours.rope_scaling, key)
        assert (list(value) if isinstance(value, tuple) else value) == rope[key]


@pytest.mark.parametrize("architecture", [*EXPERT_CLASSES, "GraniteMoeHybridForCausalLM"])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 3}, {"norm_topk_prob": True}])
def test_experts_are_those_of_transformers(architecture: str, changes: dict[str, Any]) -> None:
    if architecture == "GraniteMoeHybridForCausalLM":
        changes = {**changes, "layer_types": ["full_attention"] * 32, "mamba_d_head": 64}
    if architecture == "Glm4MoeForCausalLM":
        changes = {**changes, "head_dim": 16}
    config = ModelConfig.from_huggingface({"architectures": [architecture], **changes})
    classes = {**EXPERT_CLASSES, "GraniteMoeHybridForCausalLM": GraniteMoeHybridConfig}
    theirs, ours = classes[architecture](**changes), config.extras
    extras = {
        "experts": ("num_local_experts", "num_experts"),
        "experts_per_token": ("num_experts_per_tok",),
        "expert_width": ("moe_intermediate_size", "intermediate_size"),
        # Where there is no such key, the weights of the best experts always add up to 1.
        "renormalize": ("norm_topk_prob",),
    }
    for name, keys in extras.items():
        values = [getattr(theirs, key) for key in keys if hasattr(theirs, key)]
        assert ours[name] == (values or [True])[0], name
    assert all(ours[key] == getattr(theirs, key) for key in ours if hasattr(theirs, key))
    dense = ours.get("dense_layers", [])
    first = getattr(theirs, "moe_layer_start_index", 0)
    assert len(dense) == getattr(theirs, "first_k_dense_replace", first)


@pytest.mark.parametrize(
    ("architecture", "changes", "window", "layers"),
    [
        ("LlamaForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("GemmaForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("Gemma2ForCausalLM", {}, 4096, [4096, 0, 4096, 0]),
        ("Gemma2ForCausalLM", {"sliding_window": None}, None, [0, 0, 0, 0]),
        ("Gemma3ForCausalLM", {"sliding_window": 64}, 64, [64] * 4),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 2}, 4096, [4096, 0, 4096, 0]),
        (
            "Gemma3ForCausalLM",
            {"layer_types": ["sliding_attention"] + ["full_attention"] * 3},
            4096,
            [4096, 0, 0, 0],
        ),
        ("MistralForCausalLM", {}, 4096, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": 64}, 64, [64] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, None, [0, 0, 0, 0]),
        ("MinistralForCausalLM", {}, 4096, [4096] * 4),
        ("MinistralForCausalLM", {"sliding_window": None}, None, [0, 0, 0, 0]),
        (
            "MinistralForCausalLM",
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 2},
            64,
            [0, 64, 0, 64],
        ),
        ("Olmo3ForCausalLM", {}, 4096, [4096, 4096, 4096, 0]),
        ("Olmo3ForCausalLM", {"sliding_window": None}, None, [0, 0, 0, 0]),
        ("SmolLM3ForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("SmolLM3ForCausalLM", SLIDING, 64, [0, 0, 0, 64]),
        ("SmolLM3ForCausalLM", SLIDING | {"no_rope_layers": [1, 0, 1, 0]}, 64, [0, 64, 0, 64]),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("Qwen2ForCausalLM", SLIDING, 64, [0, 0, 64, 64]),
        ("Qwen2MoeForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("Qwen2MoeForCausalLM", SLIDING, 64, [64, 0, 0, 0]),
        ("Qwen2MoeForCausalLM", SLIDING | {"max_window_layers": 4}, 64, [64, 0, 64, 0]),
        ("OlmoeForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("FlexOlmoForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("Ernie4_5_MoeForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("GraniteMoeForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("Glm4MoeForCausalLM", {"sliding_window": 64}, None, [0, 0, 0, 0]),
        ("GptOssForCausalLM", {}, 128, [128, 0, 128, 0]),
        ("GptOssForCausalLM", {"sliding_window": None}, None, [0, 0, 0, 0]),
        ("Qwen3ForCausalLM", SLIDING | {"max_window_layers": 4}, None, [0, 0, 0, 0]),
        ("Qwen3ForCausalLM", SLIDING | {"max_window_layers": 0}, 64, [64] * 4),
        (
            "Qwen3ForCausalLM",
            SLIDING | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            64,
            [0, 0, 0, 64],
        ),
    ],
)
def test_windows_layer_by_layer(
    architecture: str, changes: dict[str, Any], window: int | None, layers: list[int]
) -> None:
    config = huggingface(architecture, **changes)

    assert config.sliding_window == window
    assert [config.window(layer) for layer in range(4)] == layers


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Cohere2ForCausalLM", (True, True, False, False)),
        ("GlmForCausalLM", (True, False, False, False)),
        ("Glm4ForCausalLM", (True, False, False, False)),
        ("GraniteForCausalLM", (True, True, True, False)),
        ("Olmo2ForCausalLM", (True, True, False, False)),
        ("Olmo3ForCausalLM", (True, True, False, False)),
        ("Phi3ForCausalLM", (False, False, False, False)),
        ("SmolLM3ForCausalLM", (True, True, True, False)),
        ("LlamaForCausalLM", (True, True, True, False)),
        ("GemmaForCausalLM", (True, True, False, False)),
        ("Gemma2ForCausalLM", (True, True, False, False)),
        ("Gemma3ForCausalLM", (True, True, False, True)),
        ("MistralForCausalLM", (False, False, False, False)),
        ("Qwen2ForCausalLM", (True, False, False, False)),
        ("Qwen2MoeForCausalLM", (True, False, False, False)),
        ("OlmoeForCausalLM", (True, True, False, False)),
        ("FlexOlmoForCausalLM", (True, True, False, False)),
        ("Ernie4_5_MoeForCausalLM", (False, False, False, False)),
        ("GraniteMoeForCausalLM", (True, True, True, False)),
        ("Glm4MoeForCausalLM", (True, False, False, False)),
        ("GptOssForCausalLM", (True, True, False, False)),
        ("Qwen3ForCausalLM", (True, True, False, True)),
    ],
)
def test_who_has_biases_and_head_norms(architecture: str, expected: tuple[bool, ...]) -> None:
    config = huggingface(architecture, attention_bias=True, mlp_bias=True)

    found = (config.attention_bias, config.o_bias, config.mlp_bias, config.qk_norm)
    assert found == expected


def test_without_key_value_heads_every_head_has_its_own() -> None:
    for changes in ({"num_key_value_heads": None}, {"num_key_value_heads": 6}):
        assert huggingface("LlamaForCausalLM", **changes).num_kv_heads == 6


def test_the_model_type_stands_in_for_missing_architectures() -> None:
    assert ModelConfig.from_huggingface({"model_type": "qwen3"}).architecture == "qwen3"
