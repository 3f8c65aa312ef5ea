"""The executor of plans: in Triton's interpreter with functions in place of plans, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from tests.tensorrt_segments import evaluated, without_tensorrt
from tests.tiny_models import llama_tensors, save_llama

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.engine import CONSTANT, GRAPH, WEIGHTS, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import EngineMismatchError
from slipstream.runtime import executors, loading
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.weights import load_weights
from slipstream.runtime.executors.tensorrt.calls import bindings, drop_constants
from slipstream.runtime.executors.tensorrt.executor import TensorRTExecutor
from slipstream.weights.safetensors import read_header

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LIMITS: dict[str, Any] = {
    "max_batch_size": 2, "max_num_tokens": 16, "max_seq_len": 96, "kv_cache_bytes": 1 << 18,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10], list(range(40, 60))]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("micro"), llama_tensors(**SHAPE), **SHAPE)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def made(checkpoint: Path, engine: Path, **options: Any) -> Path:  # noqa: ANN401
    build(checkpoint, engine, BuildOptions(target="tensorrt", **options))
    return engine


def tokens(engine: Path, **options: Any) -> list[list[int]]:  # noqa: ANN401
    with LLM(engine, **options) as llm:
        return [list(found.outputs[0].token_ids) for found in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what padding computes is undefined
def test_functions_between_attention_give_the_tokens_of_a_cpu(
    checkpoint: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """The cut, the order of calls, which weights go where, rows that are picked, ids that only the
    device knows: all but TensorRT."""
    if torch.cuda.is_available():
        pytest.skip("the functions are computed on the CPU")
    without_tensorrt(patch)
    options: dict[str, Any] = {"quantization": "int4_wo", "group_size": 32, "symmetric": True}
    engine = made(checkpoint, tmp_path / "engine", dtype="float16", **options)
    with patch.context() as here:
        here.setattr(executors, "_CHECKS", {})
        here.setattr(
            loading, "create_executor", lambda e, config: TensorRTExecutor(e, config, evaluated)
        )
        found = tokens(engine, **LIMITS)
        with pytest.raises(EngineMismatchError, match="verifies no drafts"):
            tokens(engine, **LIMITS, speculative="ngram")
    build(checkpoint, tmp_path / "cpu", BuildOptions(target="cpu", **options))
    assert found == tokens(tmp_path / "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16"}, {"quantization": "int8_wo"}, {"quantization": "fp8"},
     {"quantization": "int4_wo", "group_size": 32}],
)  # fmt: skip
def test_plans_give_the_tokens_of_our_own_kernels(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    engine = made(checkpoint, tmp_path / "engine", **options)
    try:
        executors.check_device(open_engine(engine))
    except EngineMismatchError as error:
        pytest.skip(str(error))
    build(checkpoint, tmp_path / "cuda", BuildOptions(target="cuda", **options))
    assert tokens(engine, **LIMITS) == tokens(tmp_path / "cuda", **LIMITS)


def test_what_plans_hold_is_not_loaded(
    checkpoint: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    without_tensorrt(patch)
    engine = made(checkpoint, tmp_path / "engine", quantization="int4_wo", group_size=32)
    graph = ir.load(engine / GRAPH).graph
    stored = read_header(engine / WEIGHTS)
    held = {name for name in stored if name.endswith(CONSTANT)}
    assert len(held) == 16  # codes and scales of four products in two layers
    drop_constants(graph)
    assert graph.initializers.keys() == stored.keys() - held
    if torch.cuda.is_available():
        pytest.skip("weights are compared on the CPU")
    loaded = load_weights(engine / WEIGHTS, Device(), graph.initializers)
    assert loaded.keys() == graph.initializers.keys()
    data = (engine / WEIGHTS).read_bytes()
    for name, tensor in loaded.items():
        place = stored[name]
        found = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found == data[place.offset : place.offset + place.size], name
        assert tensor.data_ptr() % 16 == 0


def test_a_call_that_no_plan_computes_is_refused(
    checkpoint: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    without_tensorrt(patch)
    graph = ir.load(made(checkpoint, tmp_path / "engine") / GRAPH).graph
    with pytest.raises(EngineMismatchError, match=r"no plan computes layer\.1, a call of layer"):
        bindings(graph, {"head.0": lambda *_: None})
