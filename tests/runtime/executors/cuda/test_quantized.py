"""A micro model of many schemes on the executor of GPUs: act-order, pre-scales, bits by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.integration import test_architectures, test_cuda_models
from tests.quantized_models import (
    MemoryCheckpoint,
    Scheme,
    float4,
    float8,
    integers,
    nf4,
    quantized_llama,
    with_input,
)
from tests.tiny_models import LLAMA, save_llama

from slipstream import LLM, SamplingParams
from slipstream.builder import build as builder
from slipstream.builder.engine import GRAPH
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.executors.cuda import buckets
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.weights.tensor import KVScales

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Logits = NDArray[np.float32]
CHUNKS = (19, 1, 3)
PROMPTS = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (2, sum(CHUNKS)))
MIXED: dict[str, Scheme] = {
    "layers.0.self_attn.q": with_input(integers(4, 32, "zero"), order=1, scale=1),
    "layers.0.self_attn.k": with_input(integers(4, 32, "zero"), order=1, scale=1),
    "layers.0.self_attn.v": with_input(integers(8, 64), scale=1),
    "layers.0.self_attn.o": with_input(integers(4, 64), order=2),
    "layers.0.mlp.gate": float8(activation="none"),
    "layers.0.mlp.up": integers(4, 0),
    "layers.0.mlp.down": with_input(integers(8, 64), scale=4),
    "layers.1.self_attn.v": nf4,
    "layers.1.mlp.down": float4,
    "layers.1.mlp": with_input(integers(4, 64, "offset"), order=5),
    "proj": integers(8, 16),
}


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return quantized_llama(MIXED, **SHAPE, kv_scales=KVScales((0.02, 0.03), (0.01, 0.02)))


@pytest.fixture(scope="module")
def engine(checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "open_checkpoint", lambda _, strict: checkpoint)
        options = BuildOptions(target="cuda", kv_cache_dtype="bfloat16", max_seq_len=128)
        builder.build("memory", directory, options)
    return directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(buckets, "MIXED_TOKENS", (16,))
    if interpreting():
        monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
    yield


def test_transforms_are_nodes_of_their_own(engine: Path) -> None:
    operators = Counter(node.op_type for node in ir.load(engine / GRAPH).graph)
    # Layer 0: a scale for q, k, v and an order of it for q and k; o; down. Layer 1: gate and up.
    assert (operators["Mul"], operators["Gather"]) == (2, 3 + 1)


@pytest.fixture(scope="module")
def exact(checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Logits:
    """Logits of a float32 engine of the effective weights."""
    directory = tmp_path_factory.mktemp("exact")
    dense = save_llama(directory / "dense", checkpoint.effective(), **SHAPE)
    builder.build(dense, directory / "engine", BuildOptions(target="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_architectures, "CHUNKS", CHUNKS)
        return test_architectures.run_in_chunks(directory / "engine", PROMPTS)


@pytest.mark.slow
def test_logits_are_those_of_the_effective_weights(
    engine: Path, exact: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepRunner, "capture", lambda *_: None)
    got = test_cuda_models.logits_in_chunks(engine, PROMPTS, CHUNKS)
    assert test_cuda_models.distance(got, exact) < 0.015


@pytest.mark.slow
def test_captured_steps_say_the_same(engine: Path, exact: Logits) -> None:
    """A prefill and a decode; the decode's prompt is what the prefill said."""
    limits = {"max_batch_size": 1, "max_num_tokens": 16, "max_seq_len": 64}
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=1)
    with LLM(engine, kv_cache_bytes=1 << 17, enable_prefix_caching=False, **limits) as llm:
        answer = llm.generate([PROMPTS[0, :6].tolist()], params)[0].outputs[0]
    assert answer.logprobs is not None and len(answer.token_ids) == 2
    row = exact[0, 5] - np.log(np.exp(exact[0, 5]).sum())
    assert answer.logprobs[0].logprob == pytest.approx(row[answer.token_ids[0]], abs=0.03)
    assert row.max() - row[answer.token_ids[0]] < 0.03
