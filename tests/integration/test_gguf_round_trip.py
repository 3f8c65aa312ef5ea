"""Tiny models written as llama.cpp's converter writes them give the logits of their Hugging Face
form. Names are those of the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.integration.test_architectures import GEMMA, PROMPT_TOKENS, run_in_chunks
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions

Array = NDArray[Any]


def nothing_more(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401
    """No keys but those of every decoder."""


def as_it_is(name: str, array: Array, config: Any) -> Array:  # noqa: ANN401
    return array


@dataclass(frozen=True)
class Layout:
    """What the converter does for an architecture: its keys, and how it changes tensors."""

    architecture: MODEL_ARCH
    keys: Callable[[GGUFWriter, Any], None] = nothing_more
    changed: Callable[[str, Array, Any], Array] = as_it_is


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


LLAMA = Layout(MODEL_ARCH.LLAMA, changed=permuted)
GEMMA3 = Layout(MODEL_ARCH.GEMMA3, gemma3, one_more)
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
WINDOWS: dict[str, Any] = {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 17}
MODELS: dict[str, tuple[PreTrainedConfig, Layout]] = {
    "llama": (LlamaConfig(**TINY_SHAPE, attention_bias=True), LLAMA),
    "llama-linear": (LlamaConfig(**TINY_SHAPE, rope_parameters=LINEAR), LLAMA),
    "mistral": (
        MistralConfig(**TINY_SHAPE, sliding_window=17),
        Layout(MODEL_ARCH.LLAMA, window, permuted),
    ),
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
    "gemma3-no-window": (
        Gemma3TextConfig(**WINDOWS, layer_types=["full_attention"] * 3),
        GEMMA3,
    ),
}


def write(checkpoint: Path, config: Any, layout: Layout, path: Path) -> None:  # noqa: ANN401
    """A GGUF file of a checkpoint."""
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
    for name, array in load_file(checkpoint / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        values = np.ascontiguousarray(layout.changed(name, array, config))
        writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
