"""Tiny models written as llama.cpp's converter writes them give the logits of their Hugging Face
form. Names are those of the gguf package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.builder.checkpoints.gguf.models import random_blocks
from tests.integration.test_architectures import (
    ERNIE_EXPERTS,
    EXPERTS,
    GEMMA,
    GEMMA4,
    GEMMA4_31B,
    GEMMA4_EXPERTS,
    GLM_EXPERTS,
    GPT_OSS,
    MULTIPLIERS,
    OLMOE,
    PROMPT_TOKENS,
    QWEN2_EXPERTS,
    QWEN_EXPERTS,
    run_in_chunks,
)
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from slipstream.builder.build import build, plan
from slipstream.builder.options import BuildOptions

Array = NDArray[Any]


def nothing_more(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    """No keys but those of every decoder."""


def as_it_is(name: str, array: Array, config: Any) -> Array:  # noqa: ANN401
    return array


def whole(name: str, array: Array) -> dict[str, Array]:
    return {name: array}


@dataclass(frozen=True)
class Layout:
    """What the converter does for an architecture: its keys, how it changes tensors, and what it
    makes of one."""

    architecture: MODEL_ARCH
    keys: Callable[[GGUFWriter, Any], None] = nothing_more
    changed: Callable[[str, Array, Any], Array] = as_it_is
    parts: Callable[[str, Array], dict[str, Array]] = whole


def of_granite(name: str, array: Array) -> dict[str, Array]:
    """Gate and up apart, by names of Qwen's."""
    if "input_linear" not in name:
        return {name: array}
    place = name.replace("block_sparse_moe.input_linear", "mlp.experts.{}_proj")
    place = place.replace("shared_mlp.input_linear", "mlp.shared_expert.{}_proj")
    return dict(zip(map(place.format, ("gate", "up")), np.split(array, 2, axis=-2), strict=True))


def of_glm(name: str, array: Array) -> dict[str, Array]:
    return {name.replace("_correction_bias", "_correction.bias"): array}


def of_ernie(name: str, array: Array) -> dict[str, Array]:
    return {name.replace("_correction_bias", "_correction.bias"): array}


def of_gpt_oss(name: str, array: Array) -> dict[str, Array]:
    """Rows of gate and up, which take turns, apart, and all with rows first."""
    name = re.sub(r"(sinks|_proj)$", r"\1.weight", name.replace("_proj_bias", "_proj.bias"))
    if ".experts." not in name:
        return {name: array}
    rows = array.swapaxes(1, 2) if array.ndim == 3 else array
    if "gate_up" not in name:
        return {name: rows}
    return {name.replace("gate_up", part): rows[:, i::2] for i, part in enumerate(("gate", "up"))}


def permuted(name: str, array: Array, config: Any) -> Array:  # noqa: ANN401
    """Halves of each q and k head interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return array
    halves = array.reshape(count, 2, len(array) // count // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def one_more(name: str, array: Array, config: Any) -> Array:  # noqa: ANN401
    """What a norm multiplies by."""
    return array + 1 if name.endswith("norm.weight") else array


def window(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    writer.add_sliding_window(config.sliding_window)


def caps(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def gemma3(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in config.layer_types:
        writer.add_sliding_window(config.sliding_window)


def experts(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    writer.add_expert_count(next(getattr(config, name) for name in counts if hasattr(config, name)))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def qwen2_moe(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    experts(writer, config)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def granite_moe(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    experts(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    if shared := getattr(config, "shared_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(shared)


def gpt_oss(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    experts(writer, config)
    window(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    original = config.rope_parameters["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)


def gemma4(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    """Heads, widths and windows by layer; the other keys that differ are of layers with a
    window."""
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    first_shared = len(windowed) - config.num_kv_shared_layers
    layers = [config.per_layer_config[i] for i in range(len(windowed))]
    size = next(
        layer.head_dim for layer, window in zip(layers, windowed, strict=True) if not window
    )
    if config.attention_k_eq_v:
        writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    if config.use_double_wide_mlp:
        width = config.intermediate_size
        writer.add_feed_forward_length([width << (i >= first_shared) for i in range(len(windowed))])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(windowed)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    full_rope = config.rope_parameters["full_attention"]
    turning = int(size * full_rope["partial_rotary_factor"] / 2)
    still = size // 2 - turning
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turning + [1e30] * still, np.float32))


def of_gemma4(name: str, array: Array) -> dict[str, Array]:
    """Numbers of a router and of a layer, by names of tensors."""
    name = re.sub(r"(layer_scalar|experts\.\w+_proj)$", r"\1.weight", name)
    name = name.replace("router.scale", "router.proj.scale")
    return {name.replace("router.per_expert_scale", "experts.down_proj.scale"): array}


def glm4_moe(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    experts(writer, config)
    writer.add_rope_dimension_count(config.head_dim // 2)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def ernie4_5_moe(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    experts(writer, config)
    writer.add_interleave_moe_layer_step(config.moe_layer_interval)
    writer.add_leading_dense_block_count(config.moe_layer_start_index)
    writer.add_expert_shared_count(config.moe_num_shared_experts)


LLAMA = Layout(MODEL_ARCH.LLAMA, changed=permuted)
MIXTRAL = Layout(MODEL_ARCH.LLAMA, experts, permuted)
QWEN3_MOE = Layout(MODEL_ARCH.QWEN3MOE, experts)
GRANITE_MOE = Layout(MODEL_ARCH.GRANITE_MOE, granite_moe, permuted, of_granite)
GLM4_MOE = Layout(MODEL_ARCH.GLM4_MOE, glm4_moe, parts=of_glm)
GPT_OSS_LAYOUT = Layout(MODEL_ARCH.GPT_OSS, gpt_oss, parts=of_gpt_oss)
GEMMA3 = Layout(MODEL_ARCH.GEMMA3, gemma3, one_more)
GEMMA4_LAYOUT = Layout(MODEL_ARCH.GEMMA4, gemma4, parts=of_gemma4)
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
WINDOWS: dict[str, Any] = {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 17}


def gemma4_config(**keys: Any) -> Gemma4TextConfig:  # noqa: ANN401
    """One that says what is the same in all layers, too."""
    config = Gemma4TextConfig(**keys)
    config.allow_global_per_layer_attribute_access = True
    return config


MODELS: dict[str, tuple[PreTrainedConfig, Layout]] = {
    "llama": (LlamaConfig(**TINY_SHAPE, attention_bias=True), LLAMA),
    "llama-linear": (LlamaConfig(**TINY_SHAPE, rope_parameters=LINEAR), LLAMA),
    "mistral": (
        MistralConfig(**TINY_SHAPE, sliding_window=17),
        Layout(MODEL_ARCH.LLAMA, window, permuted),
    ),
    "mixtral": (MixtralConfig(**TINY_SHAPE, **EXPERTS), MIXTRAL),
    "mixtral-one": (
        MixtralConfig(**TINY_SHAPE, num_local_experts=1, num_experts_per_tok=1),
        MIXTRAL,
    ),
    "qwen3-moe": (Qwen3MoeConfig(**TINY_SHAPE, **QWEN_EXPERTS, norm_topk_prob=True), QWEN3_MOE),
    "qwen2-moe": (
        Qwen2MoeConfig(**TINY_SHAPE, **QWEN2_EXPERTS),
        Layout(MODEL_ARCH.QWEN2MOE, qwen2_moe),
    ),
    "olmoe": (OlmoeConfig(**TINY_SHAPE, **OLMOE), Layout(MODEL_ARCH.OLMOE, experts)),
    "granitemoe": (GraniteMoeConfig(**TINY_SHAPE, **EXPERTS, **MULTIPLIERS), GRANITE_MOE),
    "granitemoeshared": (
        GraniteMoeSharedConfig(**TINY_SHAPE, **EXPERTS, **MULTIPLIERS, shared_intermediate_size=40),
        GRANITE_MOE,
    ),
    "glm4-moe": (
        Glm4MoeConfig(
            **TINY_SHAPE,
            **GLM_EXPERTS,
            use_qk_norm=True,
            attention_bias=True,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            routed_scaling_factor=1.5,
        ),
        GLM4_MOE,
    ),
    "ernie4-5-moe": (
        Ernie4_5_MoeConfig(**TINY_SHAPE | ERNIE_EXPERTS, moe_layer_interval=2),
        Layout(MODEL_ARCH.ERNIE4_5_MOE, ernie4_5_moe, parts=of_ernie),
    ),
    "gpt-oss": (GptOssConfig(**GPT_OSS), GPT_OSS_LAYOUT),
    "qwen2": (Qwen2Config(**TINY_SHAPE), Layout(MODEL_ARCH.QWEN2)),
    "qwen3": (Qwen3Config(**TINY_SHAPE, head_dim=32), Layout(MODEL_ARCH.QWEN3)),
    "gemma": (GemmaConfig(**GEMMA), Layout(MODEL_ARCH.GEMMA, changed=one_more)),
    "gemma2": (
        Gemma2Config(**WINDOWS, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
        Layout(MODEL_ARCH.GEMMA2, caps, one_more),
    ),
    # As many layers as have a full one, whose rotary angles are others.
    "gemma3": (Gemma3TextConfig(**{**WINDOWS, "num_hidden_layers": 7}), GEMMA3),
    "gemma3-linear-cap": (
        Gemma3TextConfig(
            **{**WINDOWS, "num_hidden_layers": 7},
            final_logit_softcapping=1.5,
            rope_parameters={
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        GEMMA3,
    ),
    "gemma4": (gemma4_config(**GEMMA4), GEMMA4_LAYOUT),
    "gemma4-shared-wide-cap": (
        gemma4_config(
            **GEMMA4,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            final_logit_softcapping=1.5,
        ),
        GEMMA4_LAYOUT,
    ),
    "gemma4-keys-are-values": (gemma4_config(**GEMMA4_31B), GEMMA4_LAYOUT),
    "gemma4-experts": (gemma4_config(**GEMMA4_31B, **GEMMA4_EXPERTS), GEMMA4_LAYOUT),
    "gemma3-no-window": (
        Gemma3TextConfig(**WINDOWS, layer_types=["full_attention"] * 3),
        GEMMA3,
    ),
}


def stacked(arrays: dict[str, Array]) -> dict[str, Array]:
    """The experts of a layer as one array, and without the axes of one element."""
    found: dict[str, list[Array]] = {}
    for name in sorted(arrays, key=lambda name: [int(n) for n in re.findall(r"\.(\d+)\.", name)]):
        found.setdefault(re.sub(r"(experts)\.\d+", r"\1", name), []).append(arrays[name])
    return {name: np.squeeze(np.stack(parts)) for name, parts in found.items()}


def write(
    checkpoint: Path,
    config: Any,  # noqa: ANN401
    layout: Layout,
    path: Path,
    blocks: Mapping[str, tuple[Array, Type]] = MappingProxyType({}),
) -> Path:
    """A GGUF file of a checkpoint; ``blocks`` are tensors by GGUF name that it has otherwise."""
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture])
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    layout.keys(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(layout.architecture, config.num_hidden_layers)
    arrays = load_file(checkpoint / "model.safetensors")
    changed = {name: layout.changed(name, array, config) for name, array in arrays.items()}
    made = [layout.parts(name, array) for name, array in stacked(changed).items()]
    for name, array in (item for parts in made for item in parts.items()):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
        assert theirs is not None, name
        values, kind = blocks.get(theirs, (array, Type.F32))
        writer.add_tensor(theirs, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_hugging_face_form(name: str, tmp_path: Path) -> None:
    config, layout = MODELS[name]
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    write(checkpoint, config, layout, tmp_path / "m.gguf")
    build(tmp_path / "m.gguf", tmp_path / "engine", BuildOptions())
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (2, PROMPT_TOKENS))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


# Where the float16 numbers of a block are, and what to write there for weights of about 0.1.
HALVES = {
    Type.Q4_0: {0: 0.02},
    Type.Q8_0: {0: 0.001},
    Type.Q4_K: {0: 5e-4, 2: 37e-4},
    Type.Q6_K: {208: 1e-4},
}


def blocks_of(kind: Type, experts: int, rows: int, columns: int) -> Array:
    """Random codes of a type, as experts are stored."""
    data = random_blocks(kind, experts * rows, columns)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    for place, number in HALVES.get(kind, {}).items():
        blocks[:, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] = 127 - 5 + blocks[:, 0] % 2
    return blocks.reshape(experts, rows, -1)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [(Type.Q4_0, Type.Q8_0), (Type.Q4_K, Type.Q6_K), (Type.MXFP4, Type.MXFP4)],
)
def test_experts_stay_in_their_codes(opening: Type, closing: Type, tmp_path: Path) -> None:
    """Gate and up are of one type, down is of another, as llama.cpp mixes them."""
    width = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 3}
    shape = {**TINY_SHAPE, **QWEN_EXPERTS, **width, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**shape, norm_topk_prob=True)
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    coded = {
        f"blk.0.ffn_{part}_exps.weight": (blocks_of(kind, 3, 256, 256), kind)
        for part, kind in (("gate", opening), ("up", opening), ("down", closing))
    }
    plain = {
        name: (gguf.quants.dequantize(stored, kind), Type.F32)
        for name, (stored, kind) in coded.items()
    }
    files = {
        part: write(checkpoint, config, QWEN3_MOE, tmp_path / f"{part}.gguf", blocks)
        for part, blocks in (("coded", coded), ("plain", plain))
    }

    products = plan(files["coded"], BuildOptions()).program.nodes("ExpertLinear")
    assert len(products) == 2
    assert all("bits" in node.attributes for node in products), "all are integers"

    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (2, PROMPT_TOKENS))
    logits = []
    for part, file in files.items():
        build(file, tmp_path / part, BuildOptions(kv_cache_dtype="float32"))
        logits.append(run_in_chunks(tmp_path / part, prompts))
    got, want = logits
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
