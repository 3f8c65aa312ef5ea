"""Tensors that no graph reads: refused, or else named, and then refused on request."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import llama_tensors, save_llama, save_tiny

from slipstream.builder.build import build, plan
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError


def check(checkpoint: Path, first: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        planned = plan(checkpoint, BuildOptions())
    assert not any(name.startswith(first) for name in planned.program.stored)
    assert f"{count} tensors that its text model has no use for are left out, such as " in (
        caplog.text
    )
    with pytest.raises(CheckpointError, match=rf"{count} tensors .* such as {first}.*--strict"):
        plan(checkpoint, BuildOptions(strict_tensors=True))


def test_predictors_of_further_tokens_by_names_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save_tiny(CONFIGS["ernie4-5-moe"], tmp_path)
    file = checkpoint / "model.safetensors"
    names = ("mtp_emb_norm.0", "mtp_linear_proj.0", "mtp_block.0.mlp.up_proj")
    more = {f"model.{name}.weight": np.ones((4, 4), np.float32) for name in names}
    save_file({**load_file(file), **more}, file)
    check(checkpoint, "model.mtp_block.0.mlp.up_proj.weight", 3, caplog)


def test_tensors_that_repeat_the_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    arrays = {**llama_tensors(), name: np.ones(16, np.float32)}
    check(save_llama(tmp_path, arrays), name, 1, caplog)


def test_a_head_beside_a_tied_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = save_llama(tmp_path, llama_tensors(), tie_word_embeddings=True)
    check(checkpoint, "lm_head.weight", 1, caplog)


def test_nothing_is_said_where_all_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plan(save_llama(tmp_path, llama_tensors()), BuildOptions(strict_tensors=True))
    assert not caplog.records


def test_a_tensor_that_no_such_model_has(tmp_path: Path) -> None:
    more = {"model.layers.0.mlp.router.weight": np.ones((2, 2), np.float32)}
    checkpoint = save_llama(tmp_path / "checkpoint", {**llama_tensors(), **more})
    with pytest.raises(CheckpointError, match=r"holds 1 tensors .* model\.layers\.0\.mlp\.router"):
        build(checkpoint, tmp_path / "engine", BuildOptions())
    assert list(tmp_path.iterdir()) == [checkpoint]
