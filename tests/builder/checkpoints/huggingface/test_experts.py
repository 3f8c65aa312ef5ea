"""Tensors that hold a module of all experts, served expert by expert."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.tiny_models import LLAMA

from slipstream.builder.checkpoints.huggingface.experts import by_expert
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import LAYER, Extent, Module, Stack, hidden, inner
from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import StoredTensor, read_header, write_arrays

EXPERTS, ROWS, COLUMNS = 3, 4, 5
CONFIG = ModelConfig.from_huggingface(LLAMA)
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def module(stack: Stack, name: str = "up_proj") -> Module:
    def experts(config: ModelConfig) -> Extent:
        return Extent(EXPERTS)

    place = f"{LAYER}.mlp.experts.{{e}}.{name}"
    return Module(place, "expert", (inner,), hidden, experts=experts, stack=stack)


def served(
    directory: Path, name: str, array: NDArray[np.generic], *stacks: Stack
) -> dict[str, StoredTensor]:
    """What is made of a file with this tensor, and one of another module."""
    write_arrays(directory / "a.safetensors", {name: array, "model.norm.weight": array})
    modules = [module(stack, f"part{i}") for i, stack in enumerate(stacks)]
    return by_expert(read_header(directory / "a.safetensors"), modules, CONFIG)


def counted(*shape: int, dtype: type = np.float32) -> NDArray[np.generic]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_expert_has_its_rows(
    tmp_path: Path, interleaved: bool, transposed: bool, dtype: type
) -> None:
    array = counted(EXPERTS, 2 * ROWS, COLUMNS, dtype=dtype)
    stored = array.transpose(0, 2, 1) if transposed else array
    stacks = [
        Stack(f"{LAYER}.mlp.experts.gate_up_proj", part, 2, interleaved, transposed)
        for part in (0, 1)
    ]
    tensors = served(tmp_path, STACK, stored, *stacks)

    assert len(tensors) == 2 * EXPERTS + 1
    assert tensors["model.norm.weight"].shape == stored.shape
    for expert in range(EXPERTS):
        for part in (0, 1):
            rows = slice(part, None, 2) if interleaved else slice(part * ROWS, (part + 1) * ROWS)
            name = f"model.layers.1.mlp.experts.{expert}.part{part}.weight"
            np.testing.assert_array_equal(tensors[name].map(), array[expert, rows])
            assert tensors[name].dense().format.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("ending", "shape", "part"),
    [
        ("", (8, 5), "weight"),
        (".weight", (8, 5), "weight"),
        ("_bias", (8,), "bias"),
        ("_blocks", (8, 2, 16), "blocks"),
        (".weight_scale", (8, 1), "weight_scale"),
    ],
)
def test_what_belongs_to_a_weight_is_served_with_it(
    tmp_path: Path, ending: str, shape: tuple[int, ...], part: str
) -> None:
    """Rows of these come first, also where those of weights do not."""
    array = counted(EXPERTS, *shape, dtype=np.float32)
    stack = Stack(f"{LAYER}.mlp.experts.gate_up_proj", 1, 2, interleaved=True)
    tensors = served(tmp_path, STACK + ending, array, stack)

    for expert in range(EXPERTS):
        found = tensors[f"model.layers.1.mlp.experts.{expert}.part0.{part}"]
        np.testing.assert_array_equal(found.map(), array[expert, 1::2])


def test_a_bias_of_transposed_weights_is_no_matrix(tmp_path: Path) -> None:
    stack = Stack(f"{LAYER}.mlp.experts.gate_up_proj", transposed=True)
    tensors = served(tmp_path, f"{STACK}_bias", counted(EXPERTS, ROWS), stack)

    assert tensors["model.layers.1.mlp.experts.2.part0.bias"].map().tolist() == [8, 9, 10, 11]


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    stack = Stack(f"{LAYER}.mlp.experts.gate_up_proj")
    tensors = served(tmp_path, f"{STACK}s.weight", counted(EXPERTS, ROWS, COLUMNS), stack)

    assert set(tensors) == {f"{STACK}s.weight", "model.norm.weight"}


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 5, 4), (3,), ()])
def test_tensors_of_other_experts_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stack = Stack(f"{LAYER}.mlp.experts.gate_up_proj", 0, 2)
    with pytest.raises(CheckpointError, match=r"gate_up_proj has shape .* 3 experts with 2 mod"):
        served(tmp_path, STACK, counted(*shape), stack)
