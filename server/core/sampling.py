"""Sampling parameters of a request, on top of the model's own defaults and within the limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.limits import check_limits

# What a completion (not a chat) generates when neither request nor model says.
DEFAULT_COMPLETION_TOKENS = 16
# What a request can say.
FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams) if field.init)


# What ``describe_sampling`` names, if it is not what changes nothing.
_DESCRIBED = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def sampling_params(defaults: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """``defaults`` with the fields that are ``given``.

    Raises ``InvalidRequestError`` for a value that makes no sense, or is more than a server gives.
    """
    values = {name: getattr(defaults, name) for name in FIELDS}
    params = SamplingParams.from_dict({**values, **given})
    check_limits(params)
    return params


def describe_sampling(params: SamplingParams) -> str:
    """How tokens are chosen, in one line: ``temperature 0.7, top_p 0.95, min_p 0.05``."""
    neutral = SamplingParams()
    values = {name: getattr(params, name) for name in _DESCRIBED}
    if params.greedy:  # these choose among several
        values = {name: value for name, value in values.items() if name.endswith("penalty")}
    changed = {name: value for name, value in values.items() if value != getattr(neutral, name)}
    shown = {"temperature": params.temperature, **changed}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
