"""The weights of a layer's experts as one: which differences go, and what becomes dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.quantized_models import Scheme, dense, float8, integers, with_input

from slipstream.builder.models.expert_weights import order_of, stack_experts
from slipstream.builder.models.expert_weights import with_input as given
from slipstream.weights.tensor import LazyTensor, QuantTensor

ROWS, COLUMNS = 96, 128


def experts(*schemes: Scheme) -> list[LazyTensor]:
    """A weight of each scheme."""
    rng = np.random.default_rng(0)
    loaded = [
        scheme(f"experts.{e}", rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32))
        for e, scheme in enumerate(schemes)
    ]
    return [LazyTensor(t.name, t.format, lambda t=t: t, t.input) for t in loaded]  # type: ignore[misc]


def numbers(tensors: list[LazyTensor]) -> NDArray[np.float32]:
    return np.concatenate([tensor.load().dequantize() for tensor in tensors])


@pytest.mark.parametrize(
    ("schemes", "form"),
    [
        ((integers(4, 32), integers(4, 32, "zero")), {"zero": "zero", "group": 32}),
        ((integers(8, 0, activation="token"), integers(8, 0)), {"activation": "none"}),
        ((float8(activation="static"), float8()), {"activation": "none", "rows": 1}),
        ((float8(activation="static"),) * 2, {"activation": "static"}),
        ((float8(64, 64, activation="group"),) * 2, {"rows": 32, "group": 64}),
        ((float8(48, 64, activation="group"),) * 2, {"rows": 48, "group": 64}),
        ((with_input(integers(4, 32), order=1, scale=2),) * 3, {"bits": 4}),
    ],
)
def test_what_says_the_same_stays_in_its_codes(
    schemes: tuple[Scheme, ...], form: dict[str, Any]
) -> None:
    tensors = experts(*schemes)
    whole, reason = stack_experts(tensors, "all")
    assert not reason and whole.format.kind == tensors[0].format.kind
    assert {key: getattr(whole.format, key) for key in form} == form
    loaded = whole.load()
    assert loaded.format == whole.format and loaded.input is whole.input
    assert (whole.input is None) == (tensors[0].input is None)
    assert loaded.format.shape == (len(schemes) * ROWS, COLUMNS)
    np.testing.assert_array_equal(loaded.dequantize(), numbers(tensors))


@pytest.mark.parametrize(
    ("schemes", "why"),
    [
        ((integers(4, 32), integers(8, 32)), "formats differ (int4, groups of 32; int8, groups of"),
        ((integers(4, 32), dense), "formats differ (int4, groups of 32; float32)"),
        ((integers(4, 32, "offset"), integers(4, 32, "zero")), "formats differ"),
        (
            (integers(4, 32), integers(4, 32, dtype="float32")),
            "types of their scales differ (float16; float32)",
        ),
        ((with_input(integers(4, 32), order=1), with_input(integers(4, 32), order=2)), "act-order"),
        ((with_input(integers(4, 32), order=1), integers(4, 32)), "act-order"),
    ],
)
def test_what_does_not_becomes_dense_and_says_why(schemes: tuple[Scheme, ...], why: str) -> None:
    tensors = experts(*schemes)
    whole, reason = stack_experts(tensors, "all")
    assert why in reason
    assert (whole.format.kind, whole.format.dtype, whole.input) == ("dense", "float32", None)
    np.testing.assert_array_equal(whole.load().dequantize(), numbers(tensors))


def test_an_order_of_columns_is_told_if_it_is_all_that_x_wants() -> None:
    ordered, both = experts(
        with_input(integers(4, 32), order=1), with_input(integers(4, 32), order=1, scale=1)
    )
    order = order_of(ordered)
    assert order is not None and order_of(both) is None
    assert order_of(given(ordered, None)) is None
    plain: QuantTensor = given(ordered, None).load()
    np.testing.assert_array_equal(plain.dequantize(), ordered.load().dequantize()[:, order])
