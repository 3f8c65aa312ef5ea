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


def sampling_params(defaults: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """``defaults`` with the fields that are ``given``.

    Raises ``InvalidRequestError`` for a value that makes no sense, or is more than a server gives.
    """
    values = {name: getattr(defaults, name) for name in FIELDS}
    params = SamplingParams.from_dict({**values, **given})
    check_limits(params)
    return params
