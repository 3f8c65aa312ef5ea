"""What a config.json says of rotary embeddings, in all its spellings."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from tests.builder.models.configurations import LLAMA3, LONGROPE, YARN, huggingface

from slipstream.builder.models.config import ModelConfig, RopeScaling
from slipstream.builder.models.huggingface_config import describe, rotary_fraction
from slipstream.builder.models.rope import rotary_frequencies
from slipstream.errors import CheckpointError


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"type": "linear", "factor": 2.0}])
def test_both_spellings_of_rope_mean_the_same(scaling: dict[str, Any]) -> None:
    old = huggingface("LlamaForCausalLM", rope_scaling=scaling, rope_theta=7e4)
    new = huggingface(
        "LlamaForCausalLM", rope_theta=1.0, rope_parameters=scaling | {"rope_theta": 7e4}
    )

    assert old == new
    assert old.rope_theta == 7e4


def test_yarn_without_lengths_takes_them_from_the_model() -> None:
    bare = huggingface("Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": None})
    outer = huggingface(
        "Qwen2ForCausalLM", rope_scaling={"type": "yarn"}, original_max_position_embeddings=128
    )

    assert bare.rope_scaling == RopeScaling("yarn", 1.0, 512)
    assert outer.rope_scaling == RopeScaling("yarn", 4.0, 128)


def test_part_of_a_head_can_be_rotated() -> None:
    assert huggingface("LlamaForCausalLM", partial_rotary_factor=0.5).rotary_dim == 8


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_has_three_names_and_the_length_beside_it_counts(kind: str) -> None:
    scaling = LONGROPE | {"type": kind}
    bare = huggingface("Phi3ForCausalLM", rope_scaling=scaling).rope_scaling
    outer = huggingface(
        "Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=128
    ).rope_scaling

    assert bare.original_max_position_embeddings == 4096
    assert (bare.kind, bare.factor, bare.long_factor[-1]) == ("longrope", 512 / 4096, 12.0)
    assert (outer.original_max_position_embeddings, outer.factor) == (128, 4.0)


@pytest.mark.parametrize(("length", "divisor"), [(127, 4.5), (128, 4.5), (129, 12.0)])
def test_longrope_has_its_long_factors_beyond_the_original_length(
    length: int, divisor: float
) -> None:
    config = huggingface(
        "Phi3ForCausalLM", rope_scaling=LONGROPE, original_max_position_embeddings=128
    )
    frequencies, factor = rotary_frequencies(config.rope(0), length)
    assert frequencies[-1] == pytest.approx(500000.0 ** (-14 / 16) / divisor)
    assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 512),
        (LLAMA3, 512),
        ({"type": "linear", "factor": 2.5}, 1280),
        (YARN, 512),
        (YARN | {"factor": 8.0}, 1024),
        ({"type": "yarn", "factor": 4.0}, 2048),
        ({"type": "yarn"}, 512),
        ({"type": "linear", "factor": 0.001}, 1),
        ({"type": "linear", "factor": 1e300}, 2**31 - 1),
    ],
)
def test_yarn_and_linear_factors_lengthen_the_context(
    scaling: dict[str, Any] | None, length: int
) -> None:
    config = huggingface("Qwen2ForCausalLM", rope_scaling=scaling)
    assert config.context_length == length
    assert config.max_position_embeddings == 512
    assert ModelConfig.from_huggingface(describe(config)) == config


def test_every_even_part_of_a_head_survives_being_a_fraction() -> None:
    """Among them head 88 with 30 elements, whose quotient times 88 is below 30."""
    for head in range(8, 264, 8):
        for dim in range(2, head + 1, 2):
            fraction = rotary_fraction(dim, head)
            assert int(head * fraction) == dim, (head, dim)
            for given in (fraction, dim / head, float(f"{dim / head:.6f}")):
                read = huggingface("LlamaForCausalLM", head_dim=head, partial_rotary_factor=given)
                assert read.rotary_dim == dim, (head, dim)


@pytest.mark.parametrize("factor", [1.0001, 2.0, 1e9, 1e308, 0.06, 0.1, 5 / 16])
def test_only_pairs_within_a_head_are_rotated(factor: float) -> None:
    for place in ({"partial_rotary_factor": factor},
                  {"rope_parameters": {"partial_rotary_factor": factor}}):  # fmt: skip
        with pytest.raises(CheckpointError, match=re.escape(f"factor is {factor}; expected")):
            huggingface("LlamaForCausalLM", **place)


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_llama3_needs_a_band_between_its_frequencies(low: float) -> None:
    with pytest.raises(CheckpointError, match=rf"high_freq_factor is 4.0; .* above .* {low}"):
        huggingface("LlamaForCausalLM", rope_scaling=LLAMA3 | {"low_freq_factor": low})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e-300},
        {"rope_scaling": {"type": "linear", "factor": 1e-300}},
        {"rope_scaling": LLAMA3 | {"factor": 1e-300}},
        {"rope_scaling": YARN, "rope_theta": 1.0},
        {"rope_scaling": YARN | {"beta_fast": 1e308}},
        {"rope_scaling": YARN | {"factor": 1e-300}},
        {"rope_scaling": YARN | {"attention_factor": 1e300}},
        {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}},
        {"rope_scaling": YARN | {"attention_factor": None, "mscale_all_dim": -7.213475204444817}},
    ],
)
def test_numbers_that_give_no_angles_are_refused(changes: dict[str, Any]) -> None:
    """The last one divides by a scale of 0."""
    config = huggingface("LlamaForCausalLM", **changes)
    with pytest.raises(CheckpointError, match=r"^config\.json: rope_theta .* not finite; correct"):
        rotary_frequencies(config.rope(0))
