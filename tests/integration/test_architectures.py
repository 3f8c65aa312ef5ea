"""Logits of tiny random models of every architecture equal those of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
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

from slipstream.builder.build import build
from slipstream.builder.contract import LOGITS
from slipstream.builder.options import BuildOptions
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.loading import load
from slipstream.runtime.sampling.params import SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Granite 3's, each of its own.
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.03,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
BY_KIND: dict[str, Any] = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# GLM's token of padding is beyond a small vocabulary.
GLM = {**TINY_SHAPE, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1}
MINISTRAL = {**TINY_SHAPE, "head_dim": 16}
# Temperatures of four lengths within a prompt.
TEMPERATURE: dict[str, Any] = {
    **YARN,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
SMOLLM3 = {**TINY_SHAPE, "num_hidden_layers": 4, "pad_token_id": 0}
PHI3 = {**TINY_SHAPE, "pad_token_id": 0}
# Of a head of 16 elements; an engine for more than the original length has the long factors.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.3, 1.7, 2.5, 4.0, 6.0, 9.0, 14.0],
}
EXPERTS: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 16,
}
QWEN2_EXPERTS: dict[str, Any] = {
    **QWEN_EXPERTS,
    "head_dim": 24,
    "shared_expert_intermediate_size": 40,
}
OLMOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None}
GLM_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "head_dim": 24,
}
ERNIE_EXPERTS: dict[str, Any] = {
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
}
ATTENTION_ONLY: dict[str, Any] = {"layer_types": ["full_attention"] * 3, "mamba_n_heads": 4}
# With a window of less than a page and, by default, YaRN without truncation.
GPT_OSS: dict[str, Any] = {
    **TINY_SHAPE,
    **EXPERTS,
    "intermediate_size": 96,
    "head_dim": 16,
    "sliding_window": 17,
}
GEMMA: dict[str, Any] = {**TINY_SHAPE, "head_dim": 24, "pad_token_id": 0}
GEMMA2: dict[str, Any] = {**GEMMA, "query_pre_attn_scalar": 40, "sliding_window": 17}
# Layers of both kinds, with heads of a size and number of their own, and before those that share.
GEMMA4: dict[str, Any] = {
    **TINY_SHAPE,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 17,
    "head_dim": 16,
    "global_head_dim": 32,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 16,
}
GEMMA4_31B: dict[str, Any] = {
    **GEMMA4,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
GEMMA4_EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
COHERE2 = {**TINY_SHAPE, "num_hidden_layers": 4, "eos_token_id": 1}
CONFIGS: dict[str, Any] = {
    "cohere2": Cohere2Config(**COHERE2, sliding_window=17),
    "cohere2-untied-biases": Cohere2Config(
        **COHERE2, tie_word_embeddings=False, attention_bias=True, logit_scale=0.5
    ),
    "cohere2-layers": Cohere2Config(
        **COHERE2, sliding_window=9, layer_types=["full_attention", "sliding_attention"] * 2
    ),
    "glm": GlmConfig(**GLM),
    "glm-tied": GlmConfig(**GLM, tie_word_embeddings=True),
    "glm4": Glm4Config(**GLM),
    "glm4-no-biases": Glm4Config(**GLM, attention_bias=False),
    "glm4-head-dim": Glm4Config(**{**GLM, "head_dim": 24}),
    "glm4-rotary": Glm4Config(**GLM | {"partial_rotary_factor": 1.0}),
    "glm4-rope-yarn": Glm4Config(**GLM, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "granite": GraniteConfig(**TINY_SHAPE),
    "granite-multipliers": GraniteConfig(**TINY_SHAPE, **MULTIPLIERS),
    "granite-tied-biases": GraniteConfig(
        **TINY_SHAPE,
        **MULTIPLIERS,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama": LlamaConfig(**TINY_SHAPE),
    "llama-tied": LlamaConfig(**TINY_SHAPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**TINY_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**TINY_SHAPE, head_dim=24),
    "llama-rope-linear": LlamaConfig(
        **TINY_SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama-rope-llama3": LlamaConfig(**TINY_SHAPE, rope_parameters=LLAMA3),
    "llama-rope-yarn": LlamaConfig(**TINY_SHAPE, rope_parameters=YARN),
    "mistral-window": MistralConfig(**TINY_SHAPE, sliding_window=17),
    "mistral-full": MistralConfig(**TINY_SHAPE, sliding_window=None),
    "ministral-window": MinistralConfig(**MINISTRAL, sliding_window=17),
    "ministral-full": MinistralConfig(
        **MINISTRAL, sliding_window=9, layer_types=["full_attention"] * 3
    ),
    "ministral-both": MinistralConfig(
        **MINISTRAL,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "ministral3": Ministral3Config(**MINISTRAL, rope_parameters={**TEMPERATURE}),
    "ministral3-window": Ministral3Config(
        **MINISTRAL, rope_parameters={**TEMPERATURE}, sliding_window=17
    ),
    "ministral3-cold": Ministral3Config(**MINISTRAL, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**TINY_SHAPE),
    "olmo2-tied-biases": Olmo2Config(**TINY_SHAPE, tie_word_embeddings=True, attention_bias=True),
    "olmo2-head-dim": Olmo2Config(**TINY_SHAPE | {"head_dim": 24}),
    "olmo3": Olmo3Config(**TINY_SHAPE | {"num_hidden_layers": 4}, sliding_window=17),
    "olmo3-full": Olmo3Config(**TINY_SHAPE, sliding_window=17, layer_types=["full_attention"] * 3),
    "olmo3-rope-yarn": Olmo3Config(
        **TINY_SHAPE | {"num_hidden_layers": 4}, sliding_window=9, rope_parameters=BY_KIND
    ),
    "phi3": Phi3Config(**PHI3),
    "phi3-tied-window": Phi3Config(**PHI3, tie_word_embeddings=True, sliding_window=17),
    "phi3-rotary": Phi3Config(**PHI3 | {"partial_rotary_factor": 0.75}),
    "phi3-longrope-short": Phi3Config(
        **PHI3, original_max_position_embeddings=512, rope_parameters={**LONGROPE}
    ),
    "phi3-longrope-long": Phi3Config(
        **PHI3, original_max_position_embeddings=64, rope_parameters={**LONGROPE}
    ),
    "phi3-longrope-factors": Phi3Config(
        **PHI3,
        original_max_position_embeddings=64,
        rope_parameters={**LONGROPE, "attention_factor": 1.3, "factor": 2.0},
    ),
    "phi3-longrope-rotary": Phi3Config(
        **PHI3,
        original_max_position_embeddings=64,
        rope_parameters={
            **LONGROPE,
            "partial_rotary_factor": 0.75,
            "short_factor": LONGROPE["short_factor"][:6],
            "long_factor": LONGROPE["long_factor"][:6],
        },
    ),
    "qwen2": Qwen2Config(**TINY_SHAPE),
    "qwen2-window": Qwen2Config(
        **TINY_SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**TINY_SHAPE, head_dim=16),
    "mixtral": MixtralConfig(**TINY_SHAPE, **EXPERTS),
    "mixtral-window": MixtralConfig(**TINY_SHAPE, **EXPERTS, sliding_window=17),
    "mixtral-all": MixtralConfig(**TINY_SHAPE, num_local_experts=3, num_experts_per_tok=3),
    "mixtral-one": MixtralConfig(**TINY_SHAPE, num_local_experts=1, num_experts_per_tok=1),
    "qwen3-moe": Qwen3MoeConfig(**TINY_SHAPE, **QWEN_EXPERTS),
    "qwen3-moe-renormalized": Qwen3MoeConfig(
        **TINY_SHAPE, **QWEN_EXPERTS, norm_topk_prob=True, attention_bias=True
    ),
    "qwen3-moe-dense-layers": Qwen3MoeConfig(
        **TINY_SHAPE, **QWEN_EXPERTS, mlp_only_layers=[0], tie_word_embeddings=True
    ),
    "qwen2-moe": Qwen2MoeConfig(**TINY_SHAPE, **QWEN2_EXPERTS),
    "qwen2-moe-renormalized": Qwen2MoeConfig(
        **TINY_SHAPE, **QWEN2_EXPERTS, norm_topk_prob=True, qkv_bias=False, tie_word_embeddings=True
    ),
    "qwen2-moe-dense-layers": Qwen2MoeConfig(
        **TINY_SHAPE, **QWEN2_EXPERTS, decoder_sparse_step=2, mlp_only_layers=[0]
    ),
    "qwen2-moe-window": Qwen2MoeConfig(
        **TINY_SHAPE,
        **QWEN2_EXPERTS,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=2,
    ),
    "olmoe": OlmoeConfig(**TINY_SHAPE, **OLMOE),
    "olmoe-tied-biases": OlmoeConfig(
        **TINY_SHAPE, **OLMOE, tie_word_embeddings=True, attention_bias=True, norm_topk_prob=True
    ),
    # A bound that many elements reach.
    "olmoe-clipped": OlmoeConfig(**TINY_SHAPE, **OLMOE, clip_qkv=0.7),
    "flex-olmo": FlexOlmoConfig(**TINY_SHAPE, **OLMOE),
    "flex-olmo-tied-biases": FlexOlmoConfig(
        **TINY_SHAPE, **OLMOE, tie_word_embeddings=True, attention_bias=True, norm_topk_prob=True
    ),
    "flex-olmo-head-dim-all": FlexOlmoConfig(
        **TINY_SHAPE | OLMOE | {"head_dim": 24, "num_experts_per_tok": 6}
    ),
    "flex-olmo-rope-yarn": FlexOlmoConfig(**TINY_SHAPE, **OLMOE, rope_parameters=YARN),
    "granitemoe": GraniteMoeConfig(**TINY_SHAPE, **EXPERTS, **MULTIPLIERS),
    "granitemoe-tied-biases": GraniteMoeConfig(
        **TINY_SHAPE, **EXPERTS, tie_word_embeddings=True, attention_bias=True
    ),
    "granitemoe-head-dim": GraniteMoeConfig(
        **TINY_SHAPE | {"head_dim": 24}, num_local_experts=3, num_experts_per_tok=3
    ),
    "granitemoe-one": GraniteMoeConfig(**TINY_SHAPE, num_local_experts=1, num_experts_per_tok=1),
    "granitemoeshared": GraniteMoeSharedConfig(
        **TINY_SHAPE, **EXPERTS, **MULTIPLIERS, shared_intermediate_size=40
    ),
    "granitemoeshared-none": GraniteMoeSharedConfig(**TINY_SHAPE, **EXPERTS),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **TINY_SHAPE, **EXPERTS, **MULTIPLIERS, **ATTENTION_ONLY, shared_intermediate_size=40
    ),
    "granitemoehybrid-rotary-dense": GraniteMoeHybridConfig(
        **TINY_SHAPE,
        **MULTIPLIERS,
        **ATTENTION_ONLY,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=40,
        position_embedding_type="rope",
        tie_word_embeddings=True,
    ),
    "glm4-moe": Glm4MoeConfig(**TINY_SHAPE, **GLM_EXPERTS, routed_scaling_factor=1.5),
    "glm4-moe-groups": Glm4MoeConfig(
        **TINY_SHAPE,
        **GLM_EXPERTS,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        n_shared_experts=2,
    ),
    "glm4-moe-qk-norm-biases": Glm4MoeConfig(
        **TINY_SHAPE,
        **GLM_EXPERTS,
        use_qk_norm=True,
        attention_bias=True,
        first_k_dense_replace=2,
        tie_word_embeddings=True,
    ),
    "glm4-moe-rotary": Glm4MoeConfig(
        **TINY_SHAPE | GLM_EXPERTS | {"n_routed_experts": 3, "partial_rotary_factor": 1.0},
        first_k_dense_replace=0,
    ),
    "ernie4-5-moe": Ernie4_5_MoeConfig(**TINY_SHAPE | ERNIE_EXPERTS),
    "ernie4-5-moe-untied": Ernie4_5_MoeConfig(
        **TINY_SHAPE | ERNIE_EXPERTS, tie_word_embeddings=False
    ),
    "ernie4-5-moe-none-shared": Ernie4_5_MoeConfig(
        **TINY_SHAPE | ERNIE_EXPERTS | {"moe_k": 6}, moe_num_shared_experts=0
    ),
    "ernie4-5-moe-some-layers": Ernie4_5_MoeConfig(
        **TINY_SHAPE | ERNIE_EXPERTS | {"num_hidden_layers": 5, "head_dim": 24},
        moe_layer_start_index=0,
        moe_layer_end_index=3,
        moe_layer_interval=2,
    ),
    "gpt-oss": GptOssConfig(**GPT_OSS),
    "gpt-oss-tied-no-biases": GptOssConfig(
        **GPT_OSS, tie_word_embeddings=True, attention_bias=False
    ),
    "gpt-oss-all-experts": GptOssConfig(**{**GPT_OSS, "num_experts_per_tok": 6, "head_dim": 64}),
    "gpt-oss-layers": GptOssConfig(
        **GPT_OSS,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={**YARN, "truncate": False},
    ),
    "gpt-oss-full": GptOssConfig(**GPT_OSS, layer_types=["full_attention"] * 3),
    "qwen3-tied": Qwen3Config(**TINY_SHAPE, head_dim=32, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SMOLLM3),
    "smollm3-untied-biases": SmolLM3Config(
        **SMOLLM3, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "smollm3-interval": SmolLM3Config(**SMOLLM3, no_rope_layer_interval=2),
    "smollm3-layers": SmolLM3Config(**SMOLLM3, no_rope_layers=[0, 1, 1, 0]),
    "smollm3-window": SmolLM3Config(**SMOLLM3, use_sliding_window=True, sliding_window=17),
    "gemma": GemmaConfig(**GEMMA),
    "gemma-untied-biases": GemmaConfig(**GEMMA, tie_word_embeddings=False, attention_bias=True),
    # Caps that the scores and logits of a tiny model reach.
    "gemma2": Gemma2Config(**GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    "gemma2-no-caps": Gemma2Config(
        **GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma2-untied-biases": Gemma2Config(**GEMMA2, tie_word_embeddings=False, attention_bias=True),
    "gemma2-layer-types": Gemma2Config(
        **GEMMA2, layer_types=["full_attention", "full_attention", "sliding_attention"]
    ),
    "gemma2-rope-linear": Gemma2Config(
        **GEMMA2, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
    ),
    "gemma3": Gemma3TextConfig(
        **GEMMA2, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
    "gemma3-windows-only": Gemma3TextConfig(**GEMMA2),
    "gemma3-final-cap": Gemma3TextConfig(**GEMMA2, final_logit_softcapping=1.5),
    "gemma3-untied-biases": Gemma3TextConfig(
        **GEMMA2, tie_word_embeddings=False, attention_bias=True
    ),
    "gemma3-ropes": Gemma3TextConfig(
        **GEMMA2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma4": Gemma4TextConfig(**GEMMA4),
    "gemma4-shared": Gemma4TextConfig(**GEMMA4, num_kv_shared_layers=3),
    "gemma4-shared-wide-cap": Gemma4TextConfig(
        **GEMMA4,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        final_logit_softcapping=1.5,
    ),
    "gemma4-keys-are-values": Gemma4TextConfig(**GEMMA4_31B),
    "gemma4-keys-are-values-shared": Gemma4TextConfig(
        **GEMMA4_31B | {"hidden_size_per_layer_input": 16}, num_kv_shared_layers=3
    ),
    "gemma4-no-inputs": Gemma4TextConfig(**GEMMA4 | {"hidden_size_per_layer_input": 0}),
    "gemma4-wide-heads": Gemma4TextConfig(
        # One layer: scores of so many elements, not scaled, multiply every error.
        **GEMMA4
        | {"global_head_dim": 512, "num_attention_heads": 2}
        | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    ),
    "gemma4-heads-alike": Gemma4TextConfig(**GEMMA4 | {"global_head_dim": 16}),
    "gemma4-untied-biases": Gemma4TextConfig(
        **GEMMA4_31B, tie_word_embeddings=False, attention_bias=True
    ),
    "gemma4-layers-by-number": Gemma4TextConfig(
        **GEMMA4 | {"layer_types": None, "num_hidden_layers": 7}, num_kv_shared_layers=1
    ),
    "gemma4-full": Gemma4TextConfig(**GEMMA4 | {"layer_types": ["full_attention"] * 6}),
    "gemma4-ropes": Gemma4TextConfig(
        **GEMMA4,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.6,
            },
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0},
        },
    ),
    "gemma4-experts": Gemma4TextConfig(**GEMMA4_31B, **GEMMA4_EXPERTS),
    "gemma4-experts-and-all": Gemma4TextConfig(
        **GEMMA4, **GEMMA4_EXPERTS, num_kv_shared_layers=3, use_double_wide_mlp=True
    ),
}
PROMPT_TOKENS, CHUNKS = 75, (40, 1, 33, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Every position of a prompt computed in ragged chunks, beside a second sequence in the same
    steps."""
    checkpoint = save_tiny(CONFIGS[name], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions())
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-moe"])
def test_narrow_weights_are_read_as_they_are(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits are those of the same numbers in float32, from half the bytes."""
    whole = save_tiny(CONFIGS[name], tmp_path / "float32")
    checkpoint = tmp_path / "narrow"
    shutil.copytree(whole, checkpoint)
    AutoModelForCausalLM.from_pretrained(whole, dtype=dtype).save_pretrained(checkpoint)
    sizes = []
    for source in (whole, checkpoint):
        build(source, tmp_path / "engine", BuildOptions())
        sizes.append((tmp_path / "engine" / "weights.safetensors").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]
    prompts = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = exact(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def test_longrope_of_an_engine_within_the_original_length_has_its_short_factors(
    tmp_path: Path,
) -> None:
    config = Phi3Config(**PHI3, original_max_position_embeddings=128, rope_parameters={**LONGROPE})
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(max_seq_len=128))
    prompts = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def run_in_chunks(engine: Path, prompts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits ``[2, T, vocab]`` of two sequences that advance together in steps of ``CHUNKS``
    tokens."""
    loaded = load(engine, {})
    executor = loaded.executor
    assert executor.reserve_kv(64 << 20) > 8
    page = loaded.config.page_size
    # The sequences' pages interleave and run backwards, so that a page table is really needed.
    table = np.array([[7, 5, 3], [6, 4, 2]], np.int32)
    out: list[NDArray[np.float32]] = []
    start = 0
    for size in CHUNKS:
        positions = np.tile(np.arange(start, start + size, dtype=np.int32), 2)
        rows = np.repeat([0, 1], size)
        slots = table[rows, positions // page] * page + positions % page
        batch = StepBatch(
            token_ids=prompts[:, start : start + size].reshape(-1).astype(np.int32),
            positions=positions,
            query_start=np.array([0, size, 2 * size], np.int32),
            context_len=np.array([start + size] * 2, np.int32),
            logits_rows=np.arange(2 * size, dtype=np.int32),
            sampling=[SamplingRow(SamplingParams(temperature=0), [0], [], 0, target=0)]
            * (2 * size),
            slots=np.array([0, 1], np.int32),
            sampling_slots=np.full(2 * size, -1, np.int32),
            pages={
                cache.name: PagedInputs(table, slots.astype(np.int32)) for cache in loaded.caches
            },
        )
        pending: Any = executor.submit(batch)
        pending.result()
        out.append(pending.binding.outputs[LOGITS].reshape(2, size, -1).copy())
        start += size
    executor.shutdown()
    return np.concatenate(out, axis=1)
