"""MXFP4 of gpt-oss against what transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.mxfp4_models import SHAPE, save_mxfp4

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import WeightFormat

BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_mxfp4(tmp_path_factory.mktemp("mxfp4"))


def test_every_expert_has_the_weights_of_transformers(
    checkpoints: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    packed, dense = map(open_checkpoint, checkpoints)
    assert packed.names() and set(packed.names()) == set(dense.names())
    quantized = 0
    for name in packed.names():
        ours, theirs = packed.tensor(name), dense.tensor(name)
        np.testing.assert_array_equal(ours.load().dequantize(), theirs.load().dequantize())
        if ours.format.kind != "dense":
            shape = theirs.format.shape
            assert ours.format == WeightFormat(shape, "float4_e2m1", "float8_e8m0fnu", 4, 32)
            quantized += 1
    assert quantized == SHAPE["num_hidden_layers"] * SHAPE["num_local_experts"] * 3
    assert not caplog.text


def test_experts_that_stayed_dense_are_told(
    checkpoints: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed, dense = checkpoints
    changed(packed, tmp_path, {}, load_file(dense / "model.safetensors"))
    open_checkpoint(tmp_path)
    assert "30 modules of experts are not quantized, such as" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({BLOCKS: torch.zeros(5, 64, 3, 8, dtype=torch.uint8)}, "blocks of 16 bytes belong"),
        ({BLOCKS: torch.zeros(5, 64, 2, 16, dtype=torch.uint8)}, r"should be \[64, 2\]"),
        ({BLOCKS: torch.zeros(5, 64, 3, 16)}, "has type F32"),
        ({BLOCKS: torch.zeros(4, 64, 3, 16, dtype=torch.uint8)}, "it is of 5 experts"),
    ],
)
def test_blocks_that_fit_nothing_are_refused(
    checkpoints: tuple[Path, Path],
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    message: str,
) -> None:
    changed(checkpoints[0], tmp_path, load_file(checkpoints[0] / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def changed(packed: Path, directory: Path, *tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint with other tensors."""
    both = {name: tensor for part in tensors for name, tensor in part.items()}
    save_file(both, directory / "model.safetensors")
    (directory / "config.json").write_bytes((packed / "config.json").read_bytes())
