"""The CUDA kernels of norms, gates, rotary angles and soft caps against their references."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from slipstream.plugins.cuda.standard import BINDINGS
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.gated_mlp import cuda as gated
from slipstream.plugins.gated_mlp import reference as gated_reference
from slipstream.plugins.rms_norm import cuda as norm
from slipstream.plugins.rms_norm import reference as norm_reference
from slipstream.plugins.rotary import cuda as rotary
from slipstream.plugins.rotary import reference as rotary_reference
from slipstream.plugins.soft_cap import cuda as cap
from slipstream.plugins.soft_cap import reference as cap_reference

pytestmark = pytest.mark.kernel

Rows = NDArray[np.float32]
DTYPES = [torch.bfloat16, torch.float16]
CODES = [torch.float8_e4m3fn, torch.int8]
WIDTHS = [64, 576, 4096]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
EPS = 1e-5


def rows(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)
    return torch.from_numpy(values).to(dtype).to(device)


def numpy(x: torch.Tensor) -> Rows:
    return np.asarray(x.float().cpu().numpy())


def assert_close(got: torch.Tensor, want: Rows) -> None:
    """Equal but for the rounding to the dtype of ``got``."""
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    np.testing.assert_allclose(numpy(got), want, rtol=1.01 * rtol, atol=1e-6)


def assert_codes(
    codes: torch.Tensor, scales: torch.Tensor, want: Rows, input_scale: float | None
) -> None:
    """Codes of ``want``, which may differ by a unit where a quotient is next to a tie."""
    assert scales.shape == (len(want), 1)
    largest = LARGEST[codes.dtype]
    if input_scale is None:
        units = np.maximum(np.abs(want).max(axis=-1, keepdims=True) / largest, 1e-12)
    else:
        units = np.full((len(want), 1), input_scale, np.float32)
    np.testing.assert_allclose(numpy(scales), units, rtol=1e-5)
    quotients = np.clip(want / units, -largest, largest)
    if codes.dtype == torch.int8:
        bits = np.rint(quotients).astype(np.int64)
    else:
        bits = quotients.astype(ml_dtypes.float8_e4m3fn).view(np.int8).astype(np.int64)
    difference = np.abs(codes.view(torch.int8).cpu().numpy().astype(np.int64) - bits)
    assert ((difference <= 1) | (quotients == 0)).all()
    assert (difference > 0).mean() < 2e-3


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, width: int, weight_dtype: torch.dtype, device: str) -> None:
    x = rows(3, width, dtype=dtype, device=device)
    weight = rows(width, dtype=weight_dtype, device=device, seed=1)
    y = norm.rms_norm(x, weight, EPS)
    assert isinstance(y, torch.Tensor) and y.dtype == dtype
    assert_close(y, norm_reference.rms_norm(numpy(x), numpy(weight), EPS))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_sum(dtype: torch.dtype, width: int, device: str) -> None:
    x, residual = (rows(3, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = rows(width, dtype=dtype, device=device, seed=2)
    y, total = norm.rms_norm(x, weight, EPS, residual=residual)
    assert torch.equal(total, x + residual)
    assert_close(y, norm_reference.rms_norm(numpy(total), numpy(weight), EPS))


@pytest.mark.parametrize("input_scale", [None, 0.01])
@pytest.mark.parametrize("dtype", CODES)
def test_quantized_norm(dtype: torch.dtype, input_scale: float | None, device: str) -> None:
    x, residual = (rows(3, 576, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    weight = rows(576, dtype=torch.bfloat16, device=device, seed=2)
    static = None if input_scale is None else torch.tensor([input_scale], device=device)
    codes, scales = norm.rms_norm_quantized(x, weight, EPS, dtype, input_scale=static)
    assert_codes(codes, scales, norm_reference.rms_norm(numpy(x), numpy(weight), EPS), input_scale)
    codes, scales, total = norm.rms_norm_quantized(
        x, weight, EPS, dtype, residual=residual, input_scale=static
    )
    assert torch.equal(total, x + residual)
    want = norm_reference.rms_norm(numpy(total), numpy(weight), EPS)
    assert_codes(codes, scales, want, input_scale)


@pytest.mark.parametrize("input_scale", [None, 0.005])
@pytest.mark.parametrize("dtype", CODES)
def test_quantize_rows(dtype: torch.dtype, input_scale: float | None, device: str) -> None:
    x = rows(4, 576, dtype=torch.float16, device=device)
    x[2] = 0
    static = None if input_scale is None else torch.tensor([input_scale], device=device)
    codes, scales = norm.quantize_rows(x, dtype, static)
    assert not codes.float()[2].any()
    assert_codes(codes, scales, numpy(x), input_scale)


@pytest.mark.parametrize("gate", GATES.values())
@pytest.mark.parametrize("width", [24, 1536, 2050])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(dtype: torch.dtype, width: int, gate: int, device: str) -> None:
    gate_up = rows(3, 2 * width, dtype=dtype, device=device)
    y = gated.gated_activation(gate_up, gate)
    assert y.shape == (3, width)
    assert_close(y, gated_reference.gated_activation(numpy(gate_up), gate))


@pytest.mark.parametrize("half", [64, 20])
def test_rotary_angles(half: int, device: str) -> None:
    positions = np.array([0, 1, 77, 4095, 131071], np.int32)
    inv_freq = (5e5 ** -(np.arange(half) / half)).astype(np.float32)
    got = rotary.rotary_angles(
        torch.from_numpy(positions).to(device), torch.from_numpy(inv_freq).to(device), 1.25
    )
    want = rotary_reference.rotary_angles(positions, inv_freq, 1.25)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(numpy(ours), theirs, rtol=0, atol=1e-6)


def test_no_rows(device: str) -> None:
    nothing = torch.empty((0, 64), dtype=torch.bfloat16, device=device)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    y = norm.rms_norm(nothing, weight, EPS)
    assert isinstance(y, torch.Tensor) and y.shape == (0, 64)
    assert gated.gated_activation(nothing).shape == (0, 32)
    assert norm.quantize_rows(nothing, torch.int8)[1].shape == (0, 1)


@pytest.mark.parametrize("width", [7, 1100])
@pytest.mark.parametrize("cap_value", [0.5, 30.0])
def test_soft_cap(width: int, cap_value: float, device: str) -> None:
    """Far beyond the cap on both sides, too, and into a given place."""
    x = rows(3, width, dtype=torch.float32, device=device)
    x[0] *= 1e4
    out = torch.empty_like(x)
    assert cap.soft_cap(x, cap_value, out=out) is out
    want = cap_reference.soft_cap(numpy(x), cap_value)
    np.testing.assert_allclose(numpy(out), want, rtol=1e-5, atol=1e-6 * max(cap_value, 1))
    assert cap.soft_cap(x, cap_value, torch.bfloat16).dtype == torch.bfloat16


def test_a_layer_norm_takes_the_mean_away(device: str) -> None:
    x, w = ir.Value(name="x"), ir.Value(name="w")
    node = ir.node("LayerNormalization", [x, w], {"axis": -1, "epsilon": EPS}, num_outputs=1)
    values = {
        "x": rows(5, 64, dtype=torch.bfloat16, device=device) + 3,
        "w": rows(64, dtype=torch.bfloat16, device=device, seed=1),
    }
    kernel = BINDINGS["LayerNormalization"](node, SimpleNamespace())  # type: ignore[arg-type]
    (got,) = kernel(SimpleNamespace(values=values))  # type: ignore[arg-type]
    centred = numpy(values["x"]) - numpy(values["x"]).mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
    assert_close(got, centred / deviation * numpy(values["w"]))
