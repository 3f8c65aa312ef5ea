"""Rounding of activations and of keys and values, as kernels and caches do it, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slipstream.errors import BuildError
from slipstream.quantize.skeleton import KVHook
from slipstream.weights.fp8 import FP8_MAX
from slipstream.weights.tensor import KVScales, LazyTensor

_INT8_MAX = 127.0


@dataclass(frozen=True, slots=True)
class KVQuant:
    """How a cache rounds keys and values.

    int8 has one scale a token and head, ``max|x| / 127``; fp8 (e4m3) has ``scales``, one a layer,
    by which they are divided, and 1 without.
    """

    dtype: Literal["int8", "fp8"]
    scales: KVScales | None = None

    def hook(self, layer: int) -> KVHook:
        """The rounding of one layer's keys and values."""
        if self.dtype == "int8":
            return lambda k, v: (round_int8(k, _largest(k)), round_int8(v, _largest(v)))
        scales = self.scales
        k_scale, v_scale = (scales.k[layer], scales.v[layer]) if scales else (1.0, 1.0)
        return lambda k, v: (round_fp8(k, k_scale), round_fp8(v, v_scale))


def round_int8(x: Tensor, largest: Tensor | float) -> Tensor:
    """``x`` on 255 levels of which the outermost is ``largest``, half to even."""
    scale = torch.as_tensor(largest, dtype=x.dtype) / _INT8_MAX
    codes = torch.round(x / torch.where(scale > 0, scale, 1))
    return codes.clamp_(-128, _INT8_MAX).mul_(scale)


def round_fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x / scale`` in e4m3, saturated to ±448, times ``scale``."""
    scale = torch.as_tensor(scale, dtype=x.dtype)
    codes = (x / torch.where(scale > 0, scale, 1)).clamp_(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)


def round_activations(linear: nn.Linear, weight: LazyTensor) -> RemovableHandle | None:
    """Makes ``linear`` round its input as a kernel of ``weight``'s format does."""
    form = weight.format
    if form.activation == "none":
        return None
    before = None if weight.input is None else weight.input.scale
    pre_scale = None if before is None else torch.from_numpy(before)
    static = None
    if form.activation == "static":
        stored = weight.load().input_scale
        if stored is None:
            raise BuildError(f"{weight.name} has static activations and no input_scale")
        static = float(stored[0])
    group = form.group if form.activation == "group" else None

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0] if pre_scale is None else inputs[0] * pre_scale
        x = _rounded(x, form.kind, static, group)
        # The weight was decoded with the pre-scale in it.
        return x if pre_scale is None else x / pre_scale

    return linear.register_forward_pre_hook(rounded)


def _rounded(x: Tensor, kind: str, static: float | None, group: int | None) -> Tensor:
    if group is not None:
        parts = torch.split(x, group, dim=-1)
        return torch.cat([_rounded(part, kind, None, None) for part in parts], dim=-1)
    if kind == "float8_e4m3":
        return round_fp8(x, _largest(x) / FP8_MAX if static is None else static)
    return round_int8(x, _largest(x) if static is None else static * _INT8_MAX)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=-1, keepdim=True)
