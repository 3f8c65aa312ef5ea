"""Keys of float8 multiplied as they are, by queries in codes: of any size, and of no size."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tests.plugins.paged_attention.cuda.test_attention import (
    CASES,
    HOPPER,
    HOPPER_PREFILLS,
    Case,
    run,
)

from slipstream.plugins.paged_attention.reference import Attributes

pytestmark = pytest.mark.kernel

ON_HOPPER = (
    "decode_llama_float8",
    "decode_heads_of_64_float8",
    "drafts_llama_of_every_number",
    "float8",
    "float8_heads_of_64",
)


@dataclass(frozen=True)
class Sized(Case):
    """A case whose scores are those of queries so many times as large."""

    size: float = 1.0

    def attributes(self) -> Attributes:
        usual = super().attributes()
        return replace(usual, scale=usual.scale / self.size)


@pytest.mark.parametrize("power", [-40, 9])
@pytest.mark.parametrize(
    "name",
    [
        "decode_float8",
        "prefill_float8",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_HOPPER),
    ],
)
def test_only_what_queries_are_to_each_other_counts(name: str, power: int, device: str) -> None:
    """Times a power of two they have the same codes."""
    case = replace((CASES | HOPPER | HOPPER_PREFILLS)[name], dtype="bfloat16")
    inputs = case.inputs()
    output, _ = run(case, deepcopy(inputs), device)
    inputs.qkv[:, : case.heads * case.head_dim] *= 2.0**power
    sized = Sized(**vars(case), size=2.0**power)
    np.testing.assert_array_equal(run(sized, inputs, device)[0], output)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float8", "decode_llama_float8"])
def test_an_infinite_query_is_nan_in_its_head_alone(name: str, device: str) -> None:
    case = replace((HOPPER | HOPPER_PREFILLS)[name], rotary=16)
    inputs = case.inputs()
    want, _ = run(case, deepcopy(inputs), device)
    token, head = 2, slice(3 * case.head_dim, 4 * case.head_dim)
    inputs.qkv[token, head.start + 100] = np.inf  # where nothing turns
    want[token, head] = np.nan
    np.testing.assert_array_equal(run(case, inputs, device)[0], want)
