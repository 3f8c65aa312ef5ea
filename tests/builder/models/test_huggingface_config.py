"""ModelConfig against the configuration classes of transformers, and its refusals."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
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

from slipstream.builder.models.config import ModelConfig, RopeScaling
from slipstream.builder.models.huggingface_config import describe, rotary_fraction
from slipstream.builder.models.rope import rotary_frequencies
from slipstream.errors import CheckpointError, EngineMismatchError

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
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0, 11.0, 12.0],
}
SMALL = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.5,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "truncate": False,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}


def huggingface(architecture: str, **changes: Any) -> ModelConfig:  # noqa: ANN401
    return ModelConfig.from_huggingface({"architectures": [architecture], **SMALL, **changes})


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


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"type": "linear", "factor": 2.0}])
def test_both_spellings_of_rope_mean_the_same(scaling: dict[str, Any]) -> None:
    old = huggingface("LlamaForCausalLM", rope_scaling=scaling, rope_theta=7e4)
    new = huggingface(
        "LlamaForCausalLM", rope_theta=1.0, rope_parameters=scaling | {"rope_theta": 7e4}
    )

    assert old == new
    assert old.rope_theta == 7e4


def test_yarn_without_lengths_takes_them_from_the_model() -> None:
    bare = huggingface("Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": None})
    outer = huggingface(
        "Qwen2ForCausalLM", rope_scaling={"type": "yarn"}, original_max_position_embeddings=128
    )

    assert bare.rope_scaling == RopeScaling("yarn", 1.0, 512)
    assert outer.rope_scaling == RopeScaling("yarn", 4.0, 128)


def test_without_key_value_heads_every_head_has_its_own() -> None:
    for changes in ({"num_key_value_heads": None}, {"num_key_value_heads": 6}):
        assert huggingface("LlamaForCausalLM", **changes).num_kv_heads == 6


def test_part_of_a_head_can_be_rotated() -> None:
    assert huggingface("LlamaForCausalLM", partial_rotary_factor=0.5).rotary_dim == 8


def test_the_model_type_stands_in_for_missing_architectures() -> None:
    assert ModelConfig.from_huggingface({"model_type": "qwen3"}).architecture == "qwen3"


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


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_has_three_names_and_the_length_beside_it_counts(kind: str) -> None:
    scaling = LONGROPE | {"type": kind}
    bare = huggingface("Phi3ForCausalLM", rope_scaling=scaling).rope_scaling
    outer = huggingface(
        "Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=128
    ).rope_scaling

    assert bare.original_max_position_embeddings == 4096
    assert (bare.kind, bare.factor, bare.long_factor[-1]) == ("longrope", 512 / 4096, 12.0)
    assert (outer.original_max_position_embeddings, outer.factor) == (128, 4.0)


@pytest.mark.parametrize(("length", "divisor"), [(127, 4.5), (128, 4.5), (129, 12.0)])
def test_longrope_has_its_long_factors_beyond_the_original_length(
    length: int, divisor: float
) -> None:
    config = huggingface(
        "Phi3ForCausalLM", rope_scaling=LONGROPE, original_max_position_embeddings=128
    )
    frequencies, factor = rotary_frequencies(config.rope(0), length)
    assert frequencies[-1] == pytest.approx(500000.0 ** (-14 / 16) / divisor)
    assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, LONGROPE])
def test_json_brings_back_the_same_configuration(scaling: dict[str, Any] | None) -> None:
    config = huggingface("MistralForCausalLM", rope_scaling=scaling)

    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_foreign_json_names_the_keys_that_differ() -> None:
    data = huggingface("LlamaForCausalLM").to_json()
    renamed = {("layers" if key == "num_layers" else key): data[key] for key in data}
    no_scaling = data | {"rope_scaling": None}

    with pytest.raises(EngineMismatchError, match="num_layers is missing"):
        ModelConfig.from_json(renamed)
    with pytest.raises(EngineMismatchError, match="rope_scaling is None, not an object"):
        ModelConfig.from_json(no_scaling)


@pytest.mark.parametrize("wrong", [None, "x", True, 10**400, math.nan, [[]], {"a": 1}])
def test_values_of_foreign_json_have_their_types(wrong: object) -> None:
    """``extras`` are an architecture's own, and none of these is a key of it."""
    data = huggingface("MistralForCausalLM", rope_scaling=YARN).to_json()
    nullable = {"bos_token_id", "sliding_window", "rope_scaling.attention_factor"}
    nullable |= {"rope_scaling.mscale", "rope_scaling.mscale_all_dim"}
    for key in data.keys() - {"extras"}:
        fits = isinstance(wrong, type(data[key])) or (wrong is None and key in nullable)
        if fits and key not in ("vocab_size", "rope_scaling", "ropes"):
            continue
        with pytest.raises(EngineMismatchError, match=rf"\({key}"):
            ModelConfig.from_json(data | {key: wrong})


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
    ("scaling", "length"),
    [
        (None, 512),
        (LLAMA3, 512),
        ({"type": "linear", "factor": 2.5}, 1280),
        (YARN, 512),
        (YARN | {"factor": 8.0}, 1024),
        ({"type": "yarn", "factor": 4.0}, 2048),
        ({"type": "yarn"}, 512),
        ({"type": "linear", "factor": 0.001}, 1),
        ({"type": "linear", "factor": 1e300}, 2**31 - 1),
    ],
)
def test_yarn_and_linear_factors_lengthen_the_context(
    scaling: dict[str, Any] | None, length: int
) -> None:
    config = huggingface("Qwen2ForCausalLM", rope_scaling=scaling)
    assert config.context_length == length
    assert config.max_position_embeddings == 512
    assert ModelConfig.from_huggingface(describe(config)) == config


def test_every_even_part_of_a_head_survives_being_a_fraction() -> None:
    """Among them head 88 with 30 elements, whose quotient times 88 is below 30."""
    for head in range(8, 264, 8):
        for dim in range(2, head + 1, 2):
            fraction = rotary_fraction(dim, head)
            assert int(head * fraction) == dim, (head, dim)
            for given in (fraction, dim / head, float(f"{dim / head:.6f}")):
                read = huggingface("LlamaForCausalLM", head_dim=head, partial_rotary_factor=given)
                assert read.rotary_dim == dim, (head, dim)


@pytest.mark.parametrize("factor", [1.0001, 2.0, 1e9, 1e308, 0.06, 0.1, 5 / 16])
def test_only_pairs_within_a_head_are_rotated(factor: float) -> None:
    for place in ({"partial_rotary_factor": factor},
                  {"rope_parameters": {"partial_rotary_factor": factor}}):  # fmt: skip
        with pytest.raises(CheckpointError, match=re.escape(f"factor is {factor}; expected")):
            huggingface("LlamaForCausalLM", **place)


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_llama3_needs_a_band_between_its_frequencies(low: float) -> None:
    with pytest.raises(CheckpointError, match=rf"high_freq_factor is 4.0; .* above .* {low}"):
        huggingface("LlamaForCausalLM", rope_scaling=LLAMA3 | {"low_freq_factor": low})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e-300},
        {"rope_scaling": {"type": "linear", "factor": 1e-300}},
        {"rope_scaling": LLAMA3 | {"factor": 1e-300}},
        {"rope_scaling": YARN, "rope_theta": 1.0},
        {"rope_scaling": YARN | {"beta_fast": 1e308}},
        {"rope_scaling": YARN | {"factor": 1e-300}},
        {"rope_scaling": YARN | {"attention_factor": 1e300}},
        {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}},
        {"rope_scaling": YARN | {"attention_factor": None, "mscale_all_dim": -7.213475204444817}},
    ],
)
def test_numbers_that_give_no_angles_are_refused(changes: dict[str, Any]) -> None:
    """The last one divides by a scale of 0."""
    config = huggingface("LlamaForCausalLM", **changes)
    with pytest.raises(CheckpointError, match=r"^config\.json: rope_theta .* not finite; correct"):
        rotary_frequencies(config.rope(0))


def test_a_token_chooses_within_groups_that_have_its_experts() -> None:
    groups = {"n_group": 32, "topk_group": 1}
    with pytest.raises(CheckpointError, match="topk_group is 1; expected groups that have 8 exp"):
        huggingface("Glm4MoeForCausalLM", **groups)
    assert huggingface("Glm4MoeForCausalLM", **groups | {"topk_group": 2}).extras["n_group"] == 32


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
