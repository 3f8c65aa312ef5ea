"""Experts of GGUF files, in every layout that llama.cpp has written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import (
    HIDDEN,
    QUANTIZABLE,
    TinyModel,
    random_blocks,
    tiny,
)
from tests.builder.checkpoints.test_malformed import METADATA, Case, check

from slipstream.builder.build import plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError

EXPERTS, WIDTH = 4, 32
STACKS = {f"blk.0.ffn_{part}_exps.weight": part for part in ("gate", "up", "down")}
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def mixtral(**kinds: Type) -> TinyModel:
    """A Mixtral of one layer; its experts are of these types, or float32."""
    model, rng = tiny(tied=False), np.random.default_rng(4)
    for part in NAMES:
        del model.tensors[f"blk.0.ffn_{part}.weight"]
    model.metadata |= {
        "feed_forward_length": WIDTH, "expert_count": EXPERTS, "expert_used_count": 2
    }  # fmt: skip
    model.tensors["blk.0.ffn_gate_inp.weight"] = numbers(rng, EXPERTS, HIDDEN)
    for name, part in STACKS.items():
        rows, columns = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
        model.tensors[name] = numbers(rng, EXPERTS, rows, columns)
        if kind := kinds.get(part):
            model.kinds[name] = kind
            if kind not in QUANTIZABLE:
                blocks = random_blocks(kind, EXPERTS * rows, columns)
                model.tensors[name] = blocks.reshape(EXPERTS, rows, -1)
    return model


def numbers(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def one_by_one(model: TinyModel) -> TinyModel:
    """As files of 2023 have them."""
    for name, part in STACKS.items():
        stack = model.tensors.pop(name)
        model.tensors |= {f"blk.0.ffn_{part}.{e}.weight": stack[e] for e in range(len(stack))}
    return model


def fused(model: TinyModel) -> TinyModel:
    """The rows of gate and up in one tensor."""
    both = [model.tensors.pop(f"blk.0.ffn_{part}_exps.weight") for part in ("gate", "up")]
    model.tensors["blk.0.ffn_gate_up_exps.weight"] = np.concatenate(both, axis=1)
    return model


def experts_of(path: Path) -> dict[str, NDArray[Any]]:
    checkpoint = open_checkpoint(path)
    return {
        name: checkpoint.tensor(name).load().dequantize()
        for name in checkpoint.names()
        if "experts" in name
    }


@pytest.mark.parametrize("layout", [lambda model: model, one_by_one, fused])
def test_every_layout_has_the_same_experts(layout: Any, tmp_path: Path) -> None:  # noqa: ANN401
    model = mixtral()
    stacks = {part: model.tensors[name] for name, part in STACKS.items()}
    found = experts_of(layout(model).write(tmp_path / "m.gguf"))
    assert len(found) == 3 * EXPERTS
    for part, stack in stacks.items():
        for expert in range(EXPERTS):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{NAMES[part]}.weight"
            np.testing.assert_array_equal(found[name], stack[expert])


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4])
def test_an_expert_is_a_slice_of_the_codes(kind: Type, tmp_path: Path) -> None:
    model = mixtral(down=kind)
    stack = model.tensors["blk.0.ffn_down_exps.weight"]
    blocks = gguf.quants.quantize(stack, kind) if kind in QUANTIZABLE else stack
    stored = gguf.quants.dequantize(blocks, kind)
    checkpoint = open_checkpoint(model.write(tmp_path / "m.gguf"))
    for expert in range(EXPERTS):
        tensor = checkpoint.tensor(f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight")
        assert (tensor.format.shape, tensor.format.kind != "dense") == ((HIDDEN, WIDTH), True)
        np.testing.assert_array_equal(tensor.load().dequantize(), stored[expert])


def cut(model: TinyModel, name: str, rows: int) -> TinyModel:
    model.tensors[name] = np.ascontiguousarray(model.tensors[name][:rows])
    return model


def without(model: TinyModel, name: str) -> TinyModel:
    del model.tensors[name]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (cut(mixtral(), "blk.0.ffn_up_exps.weight", 3), r"ffn_up_exps.weight has .* of 4 experts"),
        (cut(mixtral(), "blk.0.ffn_gate_inp.weight", 3), r"block_sparse_moe.gate.weight has shape"),
        (without(one_by_one(mixtral()), "blk.0.ffn_up.2.weight"), r"no tensor .*experts.2.w3.weig"),
        (without(mixtral(), "blk.0.ffn_gate_inp.weight"), r"no tensor .*block_sparse_moe.gate.wei"),
        (without(mixtral(), "blk.0.ffn_down_exps.weight"), r"no tensor .*experts.0.w2.weight"),
    ],
)
def test_what_is_missing_or_contradicts_the_metadata_is_named(
    model: TinyModel, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(model.write(tmp_path / "m.gguf"), BuildOptions())


def test_layers_that_predict_further_tokens_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixtral()
    for name in [name for name in model.tensors if name.startswith("blk.0.")]:
        model.tensors[name.replace("blk.0.", "blk.1.")] = model.tensors[name]
    model.tensors["blk.1.nextn.eh_proj.weight"] = np.zeros((HIDDEN, 2 * HIDDEN), np.float32)
    model.metadata |= {"block_count": 2, "nextn_predict_layers": 1}
    file = model.write(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(file)
    assert checkpoint.config.num_layers == 1
    assert not [name for name in checkpoint.names() if "layers.1." in name]
    assert "tensors that its text model has no use for are left out, such as blk.1." in caplog.text
    with pytest.raises(CheckpointError, match=r"such as blk\.1\..*--strict-tensors"):
        open_checkpoint(file, strict=True)


def test_any_number_of_layers_may_be_said_to_predict_further_tokens(tmp_path: Path) -> None:
    model = mixtral()
    model.metadata |= {"block_count": 2_000_001, "nextn_predict_layers": 2_000_000}
    file = model.write(tmp_path / "m.gguf")
    tracemalloc.start()
    try:
        assert open_checkpoint(file).config.num_layers == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


def granite(*kinds: Type) -> TinyModel:
    """Mixtral's tensors, and gate and up of an MLP beside them, each of a type."""
    model, rng = mixtral(), np.random.default_rng(5)
    model.architecture = "granitemoe"
    model.metadata["expert_shared_feed_forward_length"] = WIDTH
    for part, kind in zip(("gate", "up"), kinds, strict=True):
        model.tensors[f"blk.0.ffn_{part}_shexp.weight"] = numbers(rng, WIDTH, HIDDEN)
        model.kinds[f"blk.0.ffn_{part}_shexp.weight"] = kind
    model.tensors["blk.0.ffn_down_shexp.weight"] = numbers(rng, HIDDEN, WIDTH)
    return model


@pytest.mark.parametrize(
    ("kinds", "form"),
    [((Type.Q8_0, Type.Q8_0), "int"), ((Type.Q8_0, Type.F16), "dense")],
)
def test_rows_that_are_apart_are_one_weight(
    kinds: tuple[Type, Type], form: str, tmp_path: Path
) -> None:
    model = granite(*kinds)
    parts = [model.tensors[f"blk.0.ffn_{part}_shexp.weight"] for part in ("gate", "up")]
    checkpoint = open_checkpoint(model.write(tmp_path / "m.gguf"))
    tensor = checkpoint.tensor("model.layers.0.shared_mlp.input_linear.weight")
    assert (tensor.format.kind, tensor.format.shape) == (form, (2 * WIDTH, HIDDEN))
    found = tensor.load().dequantize()
    assert np.abs(found - np.concatenate(parts)).max() < 0.02


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    model = without(granite(Type.F32, Type.F32), "blk.0.ffn_up_shexp.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'blk\.0\.ffn_up_shexp\.weight'"):
        open_checkpoint(model.write(tmp_path / "m.gguf"))


def test_experts_that_are_chosen_in_another_way_are_refused(tmp_path: Path) -> None:
    model = mixtral()
    model.architecture = "glm4moe"
    model.metadata["expert_gating_func"] = 1
    with pytest.raises(CheckpointError, match=r"expert_gating_func is 1, and only 2"):
        open_checkpoint(model.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
def test_malformed_counts_of_experts_are_typed_errors(key: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    case = Case(lambda _: None, lambda _: experts_of(path), path.name)
    for value in METADATA[::2]:
        model = mixtral()
        model.metadata[key] = value
        model.write(path)
        try:
            check(case, tmp_path)
        except Exception as error:
            error.add_note(f"{key}: {value!r}")
            raise
