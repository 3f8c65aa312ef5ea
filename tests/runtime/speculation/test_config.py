"""vLLM's spelling of speculation."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.speculation.config import spelled_out

WHOLE = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5}


@pytest.mark.parametrize(
    "config",
    [WHOLE, '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5}'],
)
def test_an_object_or_its_json_is_spelled_out(config: object) -> None:
    options = spelled_out({"speculative_config": config, "max_batch_size": 3})
    assert options == {
        "speculative": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 5,
        "max_batch_size": 3,
    }
    assert RuntimeConfig(**options).prompt_lookup_min == 2


def test_other_options_are_left_as_they_are() -> None:
    options = {"speculative": "ngram", "speculative_config": None}
    assert spelled_out(options) == {"speculative": "ngram"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"speculative_config": {"num_speculative_tokens": 4}}, "method is None"),
        (
            {"speculative_config": {**WHOLE, "draft_tensor_parallel_size": 1}},
            "known keys are method",
        ),
        ({"speculative_config": {**WHOLE, "prompt_lookup_max": 0}}, "an integer of at least 1"),
        ({"speculative_config": "{"}, "speculative_config"),
        ({"speculative_config": 3}, "is a int; it must be an object"),
        ({"speculative_config": WHOLE, "speculative": "off"}, "says what speculative is"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        spelled_out(options)


def test_a_draft_model_has_its_names() -> None:
    config = {"method": "draft_model", "model": "small", "num_speculative_tokens": 3}
    assert spelled_out({"speculative_config": config}) == {
        "speculative": "draft",
        "speculative_model": "small",
        "num_speculative_tokens": 3,
    }
    with pytest.raises(InvalidRequestError, match="does nothing where"):
        RuntimeConfig(speculative="ngram", speculative_model="small")


@pytest.mark.parametrize("low, high", [(0, 3), (4, 3)])
def test_bounds_of_runs_are_checked(low: int, high: int) -> None:
    with pytest.raises(InvalidRequestError, match="prompt_lookup_min"):
        RuntimeConfig(prompt_lookup_min=low, prompt_lookup_max=high)
