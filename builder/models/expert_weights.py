"""The weights of a layer's experts in one format, as the product by expert wants them.

Experts are quantized one by one, so that what is said of them may differ where their numbers do not
want it: then one of them is written in the other's way, which changes no number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.describe import describe_format
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.passes.fit_groups import refit
from slipstream.weights.tensor import (
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    stack_rows,
)


def stack_experts(tensors: Sequence[LazyTensor], name: str) -> tuple[LazyTensor, str]:
    """The weights of all experts ``[experts * N, K]``, and why they had to become float32, if they
    had to.

    They stay what they are where all are of one format, up to the rounding of x, midpoints and the
    rows of a block, and want the same done to x.
    """
    first, form = tensors[0].input, _common([tensor.format for tensor in tensors])
    reason = ""
    if form is None:
        reason = _difference([tensor.format for tensor in tensors])
    elif not all(_same(tensor.input, first) for tensor in tensors):
        reason = "they do not want x ordered or scaled alike (act-order or pre-scale)"
    if form is None or reason:
        return stack_rows([as_dense(tensor, "float32") for tensor in tensors], name), reason
    whole = stack_rows([_written(tensor, form) for tensor in tensors], name)
    return with_input(whole, first), ""


def order_of(tensor: LazyTensor) -> NDArray[np.int32] | None:
    """In which order the columns of a weight are, if nothing else is done to its x: who makes x can
    make it in that order."""
    done = tensor.input
    return None if done is None or done.scale is not None else done.perm


def with_input(tensor: LazyTensor, transform: InputTransform | None) -> LazyTensor:
    """The weight of the same codes with another ``input``."""

    def load() -> QuantTensor:
        return replace(tensor.load(), input=transform)

    return LazyTensor(tensor.name, tensor.format, load, transform)


def _same(one: InputTransform | None, other: InputTransform | None) -> bool:
    return other is None if one is None else one.equals(other)


def _common(formats: Sequence[WeightFormat]) -> WeightFormat | None:
    """A format without a shape that holds what all of these do; None if there is none."""
    activations = {form.activation for form in formats}
    zeros = {form.zero for form in formats}
    rows = math.gcd(*(form.rows for form in formats))
    if any(form.shape[0] % rows for form in formats):
        rows = math.gcd(rows, *(form.shape[0] for form in formats))
    form = replace(
        formats[0],
        shape=(),
        activation=formats[0].activation if len(activations) == 1 else "none",
        zero="zero" if zeros == {"midpoint", "zero"} else formats[0].zero,
        rows=rows,
    )
    return form if all(_holds(form, other) for other in formats) else None


def _difference(formats: Sequence[WeightFormat]) -> str:
    """Of formats that no other holds."""
    kinds = dict.fromkeys(describe_format(form) for form in formats)
    if len(kinds) > 1:
        return f"their formats differ ({'; '.join(kinds)})"
    return (
        f"the types of their scales differ ({'; '.join(dict.fromkeys(f.dtype for f in formats))})"
    )


def _holds(form: WeightFormat, other: WeightFormat) -> bool:
    zero = form.zero if other.zero == "midpoint" and form.zero == "zero" else other.zero
    return form == replace(other, shape=(), activation=form.activation, zero=zero, rows=form.rows)


def _written(tensor: LazyTensor, form: WeightFormat) -> LazyTensor:
    """A weight in a format that holds what its own does, without its ``input``."""
    form = replace(form, shape=tensor.format.shape)

    def load() -> QuantTensor:
        loaded = replace(tensor.load(), input=None)
        if form.rows != loaded.format.rows:
            loaded = refit(loaded, replace(loaded.format, rows=form.rows))
        zero = loaded.zero
        if form.zero == "zero" and zero is None:
            zero = _midpoints(loaded)
        scale = loaded.input_scale if form.activation == "static" else None
        return replace(loaded, format=form, zero=zero, input_scale=scale)

    return LazyTensor(tensor.name, form, load)


def _midpoints(tensor: QuantTensor) -> NDArray[Any]:
    n, k = tensor.format.shape
    cells = (n, math.ceil(k / tensor.format.group))
    return np.full(cells, 2 ** (tensor.format.bits - 1), np.uint8)
