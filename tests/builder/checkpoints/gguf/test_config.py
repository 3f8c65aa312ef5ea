"""The configuration that a file's metadata says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import (
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    TinyModel,
    tiny,
)

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.models.config import RopeScaling
from slipstream.errors import CheckpointError


def config_of(tmp_path: Path, model: TinyModel) -> Any:  # noqa: ANN401
    return open_checkpoint(model.write(tmp_path / "m.gguf")).config


def test_hyper_parameters_come_from_the_metadata(tmp_path: Path) -> None:
    model = tiny()
    model.metadata |= {"rope.dimension_count": 8, "tokenizer.ggml.eot_token_id": 7}

    config = config_of(tmp_path, model)

    assert (config.architecture, config.vocab_size) == ("llama", VOCABULARY)
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, FEED_FORWARD)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (1, HEADS, KV_HEADS)
    assert (config.head_dim, config.rotary_dim) == (16, 8)
    assert (config.max_position_embeddings, config.rope_theta) == (256, 5000.0)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, RopeScaling()),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"type": "linear"}, RopeScaling()),
        ({"factor": 0.0}, RopeScaling()),
        ({"type": "none", "factor": 2.0}, RopeScaling()),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 256)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 8.0},
            RopeScaling("yarn", 4.0, 64, beta_fast=8.0),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: RopeScaling) -> None:
    model = tiny()
    model.metadata |= {f"rope.scaling.{key}": value for key, value in metadata.items()}

    assert config_of(tmp_path, model).rope_scaling == expected


def test_the_first_name_of_the_rope_factor_counts(tmp_path: Path) -> None:
    model = tiny()
    model.metadata["rope.scale_linear"] = 4.0
    assert config_of(tmp_path, model).rope_scaling == RopeScaling("linear", 4.0)

    model.metadata["rope.scaling.factor"] = 2.0
    assert config_of(tmp_path, model).rope_scaling == RopeScaling("linear", 2.0)


def llama3_factors(factor: float, theta: float, dim: int) -> NDArray[np.float32]:
    """The divisors of Llama 3.1's frequencies, one by one as its paper's code gives them."""
    result = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192:
            result.append(factor)
        else:
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequency_factors_of_llama_3_are_recognised(tmp_path: Path, factor: float) -> None:
    model = tiny()
    model.metadata["rope.freq_base"] = 500000.0
    factors = llama3_factors(factor, 500000.0, 16)
    model.tensors["rope_freqs.weight"] = factors

    expected = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert config_of(tmp_path, model).rope_scaling == expected
    assert "rope_freqs.weight" not in open_checkpoint(tmp_path / "m.gguf").names()

    model.tensors["rope_freqs.weight"] = factors[::-1]
    with pytest.raises(CheckpointError, match="not the frequency scaling of a Llama 3 model"):
        config_of(tmp_path, model)


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    model = tiny()
    model.metadata["attention.sliding_window"] = 128

    config = config_of(tmp_path, model)

    assert (config.architecture, config.window(0)) == ("mistral", 128)
