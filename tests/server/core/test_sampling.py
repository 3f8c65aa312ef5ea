from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.sampling import FIELDS, sampling_params

DEFAULTS = SamplingParams(temperature=0.5, top_k=7, max_tokens=9)


def test_what_is_given_stands_on_the_models_defaults() -> None:
    params = sampling_params(DEFAULTS, {"temperature": 0.0, "stop": ["x"], "seed": 3})
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 7, 9)
    assert (list(params.stop), params.seed) == (["x"], 3)
    assert FIELDS.issuperset({"n", "logit_bias", "prompt_logprobs"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 129}, "n=129 is more than this server gives; at most 128"),
        ({"logprobs": 21}, "logprobs=21 is more than this server gives; at most 20"),
        ({"logprobs": -1}, "logprobs=-1 is more than this server gives"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21 is more than this server gives"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids has 129 entries"),
        ({"stop": [str(i) for i in range(65)]}, "stop has 65 entries; this server takes 64"),
        ({"bad_words": ["a" * 1001]}, "bad_words has a text of 1001 characters"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids has 1025 entries"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_more_than_a_server_gives_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        sampling_params(DEFAULTS, given)
