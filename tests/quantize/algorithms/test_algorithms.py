"""The pure functions of AWQ, GPTQ, clipping and SmoothQuant on weights made for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.quantize.activations import round_int8
from slipstream.quantize.algorithms.awq import Weighted, conditional_importance, search_scales
from slipstream.quantize.algorithms.clip import search_range
from slipstream.quantize.algorithms.gptq import compensated_codes, compensation
from slipstream.quantize.algorithms.grid import Grid, quantized, range_grid, weight_range
from slipstream.quantize.algorithms.smoothquant import smoothing_scales
from slipstream.quantize.options import SCHEMES, Scheme
from slipstream.quantize.statistics import Collector, Inputs

N, K, TOKENS = 48, 128, 1024
INT4 = replace(SCHEMES["int4_awq"], group=32, symmetric=False)
SYMMETRIC = replace(INT4, symmetric=True)


def inputs(outliers: float = 30.0) -> Tensor:
    """Correlated activations ``[TOKENS, K]`` of which a few channels are large."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, K // 4, generator=generator) @ torch.randn(
        K // 4, K, generator=generator
    )
    x = mixed / 6 + 0.3 * torch.randn(TOKENS, K, generator=generator)
    x[:, ::29] *= outliers
    return x


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(N, K, generator=generator) * 0.1
    w[:, 5::37] *= 4
    return w


def collected(x: Tensor) -> Inputs:
    collector = Collector(len(x))
    collector.add(x, None)
    found = collector.result()
    assert found is not None
    return found


def error(made: Tensor, w: Tensor, gram: Tensor) -> float:
    d = made - w
    return float(((d @ gram) * d).sum() / ((w @ gram) * w).sum())


def nearest(w: Tensor, scheme: Scheme) -> Grid:
    return range_grid(*weight_range(w, scheme.group), scheme, "w")


@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC], ids=["asymmetric", "symmetric"])
class TestAgainstRoundingToNearest:
    def test_clipping_wins(self, scheme: Scheme) -> None:
        w, gram = weight(), collected(inputs()).gram
        diagonal = torch.diag(gram.diagonal())
        grid = nearest(w, scheme)
        clipped = search_range(w, gram.diagonal(), scheme, "w")
        best = error(clipped.grid.decode(clipped.grid.codes(w)), w, diagonal)
        assert best < error(grid.decode(grid.codes(w)), w, diagonal)
        assert 0.5 < clipped.kept <= 1

    def test_gptq_wins_by_far(self, scheme: Scheme) -> None:
        w, gram = weight(), collected(inputs()).gram
        grid, way = nearest(w, scheme), compensation(gram)
        assert way is not None
        compensated = grid.decode(compensated_codes(w, grid, way))
        assert error(compensated, w, gram) < 0.5 * error(grid.decode(grid.codes(w)), w, gram)

    def test_awq_wins(self, scheme: Scheme) -> None:
        w, found = weight(), collected(inputs())
        importance = conditional_importance(found.gram, None)
        scaling = search_scales([Weighted("w", w, scheme)], importance, lambda values: values)
        scaled, grid = w * scaling.scales, nearest(w, scheme)
        made = nearest(scaled, scheme)
        awq = made.decode(made.codes(scaled)) / scaling.scales
        assert scaling.alpha > 0
        assert error(awq, w, found.gram) < 0.8 * error(grid.decode(grid.codes(w)), w, found.gram)


def test_gptq_is_the_textbook_one() -> None:
    """Column by column with the inverse of what is left of the Hessian, written out plainly."""
    w, gram = weight().double(), collected(inputs()).gram
    grid, way = nearest(w.float(), INT4), compensation(gram)
    assert way is not None
    found = compensated_codes(w.float(), grid, way)
    damped = gram.double().clone()
    damped.diagonal().add_(way.damping * gram.double().diagonal().mean())
    scale, zero = (part.double() for part in grid.spread())
    expected, left, rest = torch.empty_like(w), w.clone(), way.order.tolist()
    while rest:
        column = rest.pop(0)
        inverse = torch.linalg.inv(damped[[column, *rest]][:, [column, *rest]])
        code = (left[:, column] / scale[:, column]).round() + zero[:, column]
        expected[:, column] = code.clamp(0, 15)
        decoded = (expected[:, column] - zero[:, column]) * scale[:, column]
        step = (left[:, column] - decoded) / inverse[0, 0]
        left[:, rest] -= step[:, None] * inverse[0, 1:]
    # A tie decided by the last bits of float32 changes a code, and those after it.
    assert (found == expected).double().mean() > 0.97


def test_a_singular_matrix_is_damped_and_a_broken_one_given_up() -> None:
    few = collected(inputs()[:4])
    way = compensation(few.gram)
    assert way is not None and way.damping >= 0.01
    assert compensation(torch.full((K, K), torch.nan)) is None
    assert compensation(torch.zeros(K, K)) is None


def test_a_dead_channel_is_rounded_like_any_other() -> None:
    x, w = inputs(), weight()
    x[:, 7] = 0
    found = collected(x)
    grid, way = nearest(w, INT4), compensation(found.gram)
    assert way is not None
    codes = compensated_codes(w, grid, way)
    assert codes.isfinite().all()
    assert torch.equal(codes[:, 7], grid.codes(w)[:, 7])


def test_tokens_that_are_not_finite_are_dropped_and_counted() -> None:
    x = inputs()
    x[3, 0], x[10, 4] = torch.nan, torch.inf
    found = collected(x)
    assert (found.tokens, found.dropped) == (TOKENS - 2, 2)
    assert found.gram.isfinite().all()
    collector = Collector(4)
    collector.add(torch.full((4, K), torch.nan), None)
    assert collector.result() is None


def test_a_weight_of_zeros_stays_zero() -> None:
    w = torch.zeros(N, K)
    clipped = search_range(w, torch.ones(K), INT4, "w")
    assert not clipped.grid.decode(clipped.grid.codes(w)).any()


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    w = weight()
    w[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"w needs a scale of inf.*--exclude"):
        range_grid(*weight_range(w, 32), INT4, "w")


@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_what_is_stored_is_what_was_meant(scheme: Scheme) -> None:
    w = weight()
    grid = nearest(w, scheme)
    codes = grid.codes(w)
    stored = quantized("w", codes, grid, scheme)
    assert torch.equal(torch.from_numpy(stored.dequantize()), grid.decode(codes))


def test_smoothing_serves_both_roundings() -> None:
    x, w = inputs(), weight()
    scaling = smoothing_scales([w], collected(x), lambda values: values)

    def product(scales: Tensor) -> Tensor:
        def rounded(values: Tensor) -> Tensor:
            return round_int8(values, values.abs().amax(dim=-1, keepdim=True))

        return rounded(x / scales) @ rounded(w * scales).t()

    exact = x @ w.t()
    before = (product(torch.ones(K)) - exact).square().sum()
    after = (product(scaling.scales) - exact).square().sum()
    assert scaling.alpha > 0 and after < 0.5 * before


@pytest.mark.parametrize(
    "find",
    [
        lambda found: smoothing_scales([weight()], found, lambda v: v),
        lambda found: search_scales([Weighted("w", weight(), INT4)], found.largest, lambda v: v),
    ],
    ids=["smoothquant", "awq"],
)
def test_inputs_of_zero_change_nothing(find: Callable[[Inputs], object]) -> None:
    scaling = find(collected(torch.zeros(8, K)))
    assert getattr(scaling, "alpha") == 0  # noqa: B009 - both kinds have it
