"""gpt-oss as it ships: experts in MXFP4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tests.integration.test_architectures import run_in_chunks
from tests.mxfp4_models import SHAPE, save_mxfp4
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from slipstream.builder.build import build, plan
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.gated_mlp.reference import gated
from slipstream.plugins.linear import WEIGHT_TYPES
from slipstream.plugins.linear.cuda.packing import format_of, unpack

MXFP4 = "float4_e2m1, groups of 32"
_INT8_ACTIVATIONS = 0.03  # what rounding x costs here, relative to the size of the logits


def test_an_engine_has_the_logits_of_transformers(tmp_path: Path) -> None:
    """Twice the numbers of float4 are whole, so a CPU loses only what rounding x to int8 does."""
    packed, dense = save_mxfp4(tmp_path)
    build(packed, tmp_path / "engine", BuildOptions(target="cpu", kv_cache_dtype="float32"))
    prompts = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 75))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor(prompts)).logits.numpy()
    got = run_in_chunks(tmp_path / "engine", prompts)
    assert np.linalg.norm(got - want) < _INT8_ACTIVATIONS * np.linalg.norm(want)
    assert MXFP4 in open_engine(tmp_path / "engine").manifest.formats


@pytest.mark.parametrize(("plugin", "kind"), [("auto", "float4_e2m1"), ("disable", "int")])
def test_a_cpu_holds_four_bits_where_its_own_kernel_runs(
    tmp_path: Path, plugin: str, kind: str
) -> None:
    options = BuildOptions(target="cpu", gemm_plugin=plugin)  # type: ignore[arg-type]
    nodes = plan(save_mxfp4(tmp_path)[0], options).program.nodes("ExpertLinear")
    assert {node.attributes["weight_type"].as_int() for node in nodes} == {WEIGHT_TYPES[kind]}


def test_a_gpu_holds_the_experts_as_they_are_stored(tmp_path: Path) -> None:
    kinds = ("float4_e2m1", "dense")
    packed, dense = (experts(path, k) for path, k in zip(save_mxfp4(tmp_path), kinds, strict=True))
    assert len(packed) == 2 * SHAPE["num_hidden_layers"]
    for name, weight in packed.items():
        np.testing.assert_array_equal(weight, dense[name])


def test_sinks_are_float32_on_a_gpu(tmp_path: Path) -> None:
    attention = plan(save_mxfp4(tmp_path)[0], BuildOptions(target="cuda")).program.nodes(
        "PagedAttention"
    )
    assert [node.inputs[11].dtype for node in attention if node.inputs[11]] == [
        ir.DataType.FLOAT
    ] * SHAPE["num_hidden_layers"]


def experts(checkpoint: Path, kind: str) -> dict[str, NDArray[np.float32]]:
    """What the blobs of a GPU's engine hold of every layer's experts, all of this kind."""
    program, found = plan(checkpoint, BuildOptions(target="cuda")).program, {}
    for node in program.nodes("ExpertLinear"):
        values = {a.name: a.value for a in node.attributes.values()}
        rows = values["experts"] * values["out_features"]
        form = format_of({"zero_kind": 0, "scale_bytes": 4, **values, "out_features": rows})
        assert form.kind == kind
        weight = node.inputs[1]
        assert weight is not None and weight.name is not None
        (blob,) = program.stored[weight.name].load()
        found[weight.name] = unpack(blob.view(np.uint8), form).dequantize()
    return found


def test_the_gate_is_that_of_transformers() -> None:
    """Beyond its limits on every side."""
    theirs = GptOssExperts.__new__(GptOssExperts)
    torch.nn.Module.__init__(theirs)
    theirs.alpha, theirs.limit = 1.702, 7.0
    values = np.random.default_rng(0).normal(0, 8, (64, 32))
    want = theirs._apply_gate(torch.tensor(values)).numpy()
    got = gated(values[:, 0::2], values[:, 1::2], GATES["clamped"])
    np.testing.assert_allclose(got, want, rtol=1e-12)
