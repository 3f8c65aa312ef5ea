"""Engines of target onnxruntime on the CUDA provider, against our CPU engine in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests.integration.test_smollm2 import PROMPTS as TEXTS
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import LlamaConfig, Qwen3Config

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions, Dtype, OrtAttention, Quantization
from slipstream.runtime.loading import load
from slipstream.runtime.scoring import window_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="the onnxruntime installed has no CUDA provider",
    ),
]
SHAPE: dict[str, Any] = {**TINY_SHAPE, "hidden_size": 256, "intermediate_size": 512}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, head_dim=64, attention_bias=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=128),
}
# What rounding to a type costs, relative to the size of the logits.
LOSS: dict[Dtype, float] = {"float16": 0.01, "bfloat16": 0.08}
WINDOW = np.random.default_rng(0).integers(2, 320, 300).astype(np.int32)
PROMPTS = [[3 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate((1, 300, 5, 17, 90, 2))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def logits(engine: Path) -> NDArray[np.float32]:
    """Of a window in chunks of 64 tokens."""
    return np.concatenate(list(window_logits(load(engine, {"max_num_tokens": 64}), [WINDOW])))


@pytest.mark.parametrize("attention", ["slots", "pages"])
@pytest.mark.parametrize("quantization", ["none", "int4_wo", "int8_wo"])
@pytest.mark.parametrize("dtype", LOSS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_float32_but_for_rounding(
    model: str,
    dtype: Dtype,
    quantization: Quantization,
    attention: OrtAttention,
    tmp_path: Path,
) -> None:
    checkpoint = save_tiny(MODELS[model], tmp_path / "checkpoint")
    options = BuildOptions(
        target="onnxruntime", dtype=dtype, quantization=quantization, ort_attention=attention
    )
    build(checkpoint, tmp_path / "engine", options)
    exact = BuildOptions(target="cpu", kv_cache_dtype="float32", quantization=quantization)
    build(checkpoint, tmp_path / "exact", exact)
    got, want = logits(tmp_path / "engine"), logits(tmp_path / "exact")
    rounding = 0.0 if quantization == "none" else 0.03  # of x, by our kernels
    assert np.linalg.norm(got - want) < (LOSS[dtype] + rounding) * np.linalg.norm(want)


@pytest.mark.parametrize("attention", ["slots", "pages"])
def test_company_changes_no_token(attention: OrtAttention, tmp_path: Path) -> None:
    """Captured graphs of padded slots, chunks beside decodes, siblings, slots taken again."""
    checkpoint = save_tiny(MODELS["llama"], tmp_path / "checkpoint")
    build(
        checkpoint,
        tmp_path / "engine",
        BuildOptions(target="onnxruntime", dtype="float16", ort_attention=attention),
    )
    found = []
    choices: list[dict[str, Any]] = [
        {"max_batch_size": 1}, {"max_batch_size": 4, "max_num_tokens": 64},
    ]  # fmt: skip
    for options in choices:
        with LLM(tmp_path / "engine", **options) as llm:
            outputs = llm.generate(PROMPTS, GREEDY)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
    alike = sum(a == b for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True))
    assert alike > 0.9 * len(PROMPTS) * 24, "sums of another order may turn a near tie"


def test_siblings_share_a_prompt(tmp_path: Path) -> None:
    """Slots are copied on the device."""
    checkpoint = save_tiny(MODELS["llama"], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="onnxruntime", dtype="float16"))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=3)
    with LLM(tmp_path / "engine", max_batch_size=4) as llm:
        (output,) = llm.generate([PROMPTS[4]], params)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 1


@pytest.mark.real_model
@pytest.mark.parametrize("attention", ["slots", "pages"])
@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.75), ("bfloat16", 0.5)])
def test_smollm2_in_four_bits(
    dtype: Dtype, least: float, attention: OrtAttention, smollm2_gguf: Path, tmp_path: Path
) -> None:
    """Its tokens are those of the CPU provider in float32, until rounding turns a near tie."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = []
    for name in (dtype, "float32"):
        options = BuildOptions(
            target="onnxruntime", dtype=name, max_seq_len=512,
            ort_attention=attention if name == dtype else "auto",
        )  # fmt: skip
        build(smollm2_gguf, tmp_path / name, options)
        with LLM(tmp_path / name, max_batch_size=4, max_num_tokens=32) as llm:
            outputs = llm.generate(TEXTS[:4], params)
        found.append([output.outputs[0].token_ids for output in outputs])
    alike = sum(a == b for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True))
    assert alike > least * 4 * 8
