"""Engines of target onnxruntime on its CPU provider, against transformers and against the weights
that quantized checkpoints stand for."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.integration.test_architectures import CONFIGS
from tests.integration.test_quantized_engines import INT8_ACTIVATIONS, SCHEMES, exact
from tests.quantized_models import quantized_llama
from tests.tiny_models import TINY_SHAPE, save_tiny, write_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from slipstream.builder import build as builder
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.runtime.engine.step import PagedInputs, StepBatch
from slipstream.runtime.executors import create_executor
from slipstream.runtime.loading import runtime_config

Logits = NDArray[np.float32]
MODELOPT = Path(__file__).parents[1] / "fixtures" / "modelopt"
CHUNKS = (40, 1, 33, 1)
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, 75))
SHAPE: dict[str, Any] = {**TINY_SHAPE, "num_hidden_layers": 2}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=20),
    "qwen2, biases": Qwen2Config(**SHAPE),
    "qwen3, norms of heads": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "gemma2, caps": Gemma2Config(**SHAPE, head_dim=32, sliding_window=20, pad_token_id=0),
    "gemma3, two kinds of angles": Gemma3TextConfig(
        **SHAPE, head_dim=32, sliding_window=20, pad_token_id=0, layer_types=[
            "sliding_attention", "full_attention",
        ],
    ),
    "phi3, fused": Phi3Config(**SHAPE, pad_token_id=0),
    "olmo2": Olmo2Config(**SHAPE, pad_token_id=0),
    "granite": GraniteConfig(**SHAPE, residual_multiplier=0.5, logits_scaling=2.0),
    "cohere2, layer norms": Cohere2Config(**SHAPE, sliding_window=20, pad_token_id=0),
    "smollm3, no angles": SmolLM3Config(**SHAPE, pad_token_id=0, no_rope_layers=[1, 0]),
}  # fmt: skip
# Those that are lowered in a way of their own.
DAILY = (
    *("llama", "qwen3, norms of heads", "gemma2, caps", "gemma3, two kinds of angles"),
    *("cohere2, layer norms", "smollm3, no angles"),
)


def run_in_chunks(engine: Path, prompts: NDArray[np.int64] = PROMPTS) -> Logits:
    """Logits ``[2, T, vocab]`` of two sequences that advance together: in slots 2 and 0, or in
    pages that interleave."""
    opened = open_engine(engine)
    config = runtime_config(opened, {"max_batch_size": 4})
    executor: Any = create_executor(opened, config)
    executor.reserve_kv(None)
    slots = config.page_size > prompts.shape[1]
    table = np.array([[2], [0]] if slots else [[7, 5, 3], [6, 4, 2]], np.int32)
    start = 0
    out: list[Logits] = []
    while start < prompts.shape[1]:
        end = start + CHUNKS[len(out)]
        chunk = prompts[:, start:end].astype(np.int32)
        size = chunk.shape[1]
        positions = np.tile(np.arange(start, start + size, dtype=np.int32), 2)
        page, offset = np.divmod(positions, np.int32(config.page_size))
        pages = table[np.repeat([0, 1], size), page]
        inputs = PagedInputs(table, pages * np.int32(config.page_size) + offset)
        batch = StepBatch(
            token_ids=chunk.reshape(-1),
            positions=positions,
            query_start=np.array([0, size, 2 * size], np.int32),
            context_len=np.array([start + size] * 2, np.int32),
            logits_rows=np.arange(2 * size, dtype=np.int32),
            sampling=[],
            slots=np.array([0, 1], np.int32),
            sampling_slots=np.empty(0, np.int32),
            pages={cache.name: inputs for cache in opened.manifest.caches},
        )
        out.append(executor.logits(batch).reshape(2, size, -1))
        start += size
    executor.shutdown()
    return np.concatenate(out, axis=1)


def distance(got: Logits, want: Logits) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def run_on_cpu(
    source: Path,
    engine: Path,
    prompts: NDArray[np.int64] = PROMPTS,
    **options: Any,  # noqa: ANN401
) -> Logits:
    """Logits of our kernels."""
    builder.build(source, engine, BuildOptions(target="cpu", kv_cache_dtype="float32", **options))
    return run_in_chunks(engine, prompts)


def build(source: Path, engine: Path, **options: Any) -> Path:  # noqa: ANN401
    builder.build(source, engine, BuildOptions(target="onnxruntime", **options))
    return engine


def some(names: Collection[str], daily: Collection[str]) -> list[Any]:
    """Parameters, of which only some are worth their time every day."""
    assert set(daily) <= set(names)
    return [pytest.param(n, marks=[] if n in daily else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(FAMILIES, DAILY))
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Every position of a prompt computed in ragged chunks, beside a second sequence."""
    checkpoint = save_tiny(FAMILIES[name], tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor(PROMPTS)).logits.numpy()
    got = run_in_chunks(build(checkpoint, tmp_path / "engine", dtype="float32"))
    assert np.abs(got - want).max() < 1e-4 * max(1.0, float(np.abs(want).max()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), r"operator Router \("),
        (
            CONFIGS["gemma4-shared"],
            r"operator PagedAttention \(.*those of another layer",
        ),
        (LlamaConfig(**SHAPE, head_dim=24), r"operator PagedAttention \(.*heads of 24 elements"),
    ],
    ids=["experts", "shared keys", "ragged heads"],
)
def test_what_cannot_be_lowered_is_refused_by_its_operator(
    config: Any,  # noqa: ANN401 - a configuration of transformers
    message: str,
    tmp_path: Path,
) -> None:
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    with pytest.raises(BuildError, match=message + ".*use --target cpu or cuda"):
        build(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_float16_is_float32_but_for_rounding(tmp_path: Path) -> None:
    """Also the type that both providers run, and so the default."""
    checkpoint = save_tiny(FAMILIES["gemma2, caps"], tmp_path / "checkpoint")
    want = run_in_chunks(build(checkpoint, tmp_path / "float32", dtype="float32"))
    got = run_in_chunks(build(checkpoint, tmp_path / "float16"))
    assert 0 < distance(got, want) < 0.01


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantized_at_build_time_with_biases(bits: int, tmp_path: Path) -> None:
    checkpoint = save_tiny(FAMILIES["llama"], tmp_path / "checkpoint")
    options: dict[str, Any] = {"quantization": f"int{bits}_wo", "group_size": 32}
    want = run_on_cpu(checkpoint, tmp_path / "cpu", **options)
    got = run_in_chunks(build(checkpoint, tmp_path / "engine", dtype="float32", **options))
    assert 0 < distance(got, want) < INT8_ACTIVATIONS


def test_activations_rounded_to_int8(tmp_path: Path) -> None:
    """As near to exact ones as those of our kernels, and not the same."""
    checkpoint = save_tiny(FAMILIES["llama"], tmp_path / "checkpoint")
    options: dict[str, Any] = {"quantization": "int4_wo", "group_size": 32, "dtype": "float32"}
    want = run_in_chunks(build(checkpoint, tmp_path / "exact", **options))
    got = run_in_chunks(build(checkpoint, tmp_path / "int8", **options, ort_activations="int8"))
    assert 0 < distance(got, want) < INT8_ACTIVATIONS


# How much of a format is lost on the way to integers.
LOSS = {"float8 rows": 0.02, "float8 blocks": 0.02, "nf4": 0.02}


@pytest.mark.parametrize(
    "name",
    some(
        (
            *("int4 ragged groups", "int4 zero points", "int4 offsets", "int8 rows", "float8 rows"),
            *("float8 blocks", "nvfp4", "nf4", "act-order", "pre-scale"),
        ),
        ("int4 ragged groups", "int4 zero points", "float8 blocks", "act-order"),
    ),
)
def test_a_quantized_checkpoint_computes_what_its_weights_say(name: str, tmp_path: Path) -> None:
    checkpoint = quantized_llama(SCHEMES[name])
    want = exact(checkpoint, tmp_path / "exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "open_checkpoint", lambda _, strict: checkpoint)
        engine = build(Path("memory"), tmp_path / "engine", dtype="float32")
    assert distance(run_in_chunks(engine), want) < LOSS.get(name, 1e-5)


@pytest.mark.parametrize("name", some(("fp8", "int4_awq", "nvfp4", "mixed"), ("int4_awq", "mixed")))
def test_exports_of_modelopt(name: str, tmp_path: Path) -> None:
    """FP8, INT4 AWQ and NVFP4 become the integers that they do on a CPU."""
    checkpoint, prompts = tmp_path / "export", PROMPTS[:, :60] % 32
    shutil.copytree(MODELOPT / name, checkpoint)
    (checkpoint / "expected.safetensors").unlink()
    write_tiny_tokenizer(checkpoint)
    want = run_on_cpu(checkpoint, tmp_path / "cpu", prompts)
    got = run_in_chunks(build(checkpoint, tmp_path / "engine", dtype="float32"), prompts)
    assert 0 < distance(got, want) < INT8_ACTIVATIONS
