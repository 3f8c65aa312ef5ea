"""The configuration of a model in an engine's JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tests.builder.models.configurations import LLAMA3, LONGROPE, YARN, huggingface

from slipstream.builder.models.config import ModelConfig
from slipstream.errors import EngineMismatchError


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, LONGROPE])
def test_json_brings_back_the_same_configuration(scaling: dict[str, Any] | None) -> None:
    config = huggingface("MistralForCausalLM", rope_scaling=scaling)

    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_foreign_json_names_the_keys_that_differ() -> None:
    data = huggingface("LlamaForCausalLM").to_json()
    renamed = {("layers" if key == "num_layers" else key): data[key] for key in data}
    no_scaling = data | {"rope_scaling": None}

    with pytest.raises(EngineMismatchError, match="num_layers is missing"):
        ModelConfig.from_json(renamed)
    with pytest.raises(EngineMismatchError, match="rope_scaling is None, not an object"):
        ModelConfig.from_json(no_scaling)


@pytest.mark.parametrize("wrong", [None, "x", True, 10**400, math.nan, [[]], {"a": 1}])
def test_values_of_foreign_json_have_their_types(wrong: object) -> None:
    """``extras`` are an architecture's own, and none of these is a key of it."""
    data = huggingface("MistralForCausalLM", rope_scaling=YARN).to_json()
    nullable = {"bos_token_id", "sliding_window", "rope_scaling.attention_factor"}
    nullable |= {"rope_scaling.mscale", "rope_scaling.mscale_all_dim"}
    for key in data.keys() - {"extras"}:
        fits = isinstance(wrong, type(data[key])) or (wrong is None and key in nullable)
        if fits and key not in ("vocab_size", "rope_scaling", "ropes"):
            continue
        with pytest.raises(EngineMismatchError, match=rf"\({key}"):
            ModelConfig.from_json(data | {key: wrong})
