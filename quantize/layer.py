"""One layer on its way to its codes: scales folded, linears rounded, figures of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slipstream.quantize.algorithms.awq import (
    Scaling,
    Weighted,
    conditional_importance,
    search_scales,
)
from slipstream.quantize.algorithms.clip import search_range
from slipstream.quantize.algorithms.gptq import Compensation, compensated_codes, compensation
from slipstream.quantize.algorithms.grid import quantized, range_grid, weight_range
from slipstream.quantize.algorithms.smoothquant import smoothing_scales
from slipstream.quantize.folding import Folding
from slipstream.quantize.options import Scheme
from slipstream.quantize.sites import Site, Source
from slipstream.quantize.statistics import LEAST_TOKENS, Inputs
from slipstream.weights.fp8 import quantize_fp8, quantize_fp8_block
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, numpy_dtype

_UNSEEN = "rounded to nearest: no finite input reached it"
_FEW = f"rounded to nearest: fewer than {LEAST_TOKENS} tokens reached it"
_SINGULAR = "rounded without compensation: the Gram matrix of its inputs is singular"
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LinearStats:
    """What happened to one linear; the fields of ``report.LinearRow`` say what they are."""

    name: str
    scheme: str
    group: int
    weight_error: float
    output_error: float | None
    clip: float | None
    alpha: float | None
    damping: float | None
    fallback: str | None
    tokens_seen: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer: every tensor by name, its linears' figures, and the scales of its fp8 keys and
    values."""

    index: int
    tensors: Mapping[str, QuantTensor]
    stats: tuple[LinearStats, ...]
    kv: tuple[float, float] | None


@dataclass(slots=True)
class LayerWork:
    """One layer in float32 on its way to its codes; names are those in the layer.

    ``sites`` are in the order in which data flows, ``inputs`` by the key of the site.
    """

    prefix: str
    source: Mapping[str, LazyTensor]
    schemes: Mapping[str, Scheme]
    sites: Sequence[Site]
    calibrated: bool
    inputs: dict[str, Inputs | None] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(init=False)
    scalings: dict[str, Scaling] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.weights = {name: _float32(tensor) for name, tensor in self.source.items()}

    def scale(self) -> None:
        """Find and fold the scales of channels, sites first whose scales reach into the weights of
        others."""
        kept = {
            name: _TORCH[tensor.format.dtype]
            for name, tensor in self.source.items()
            if name.removesuffix(".weight") not in self.schemes
        }
        folding = Folding(self.weights, kept)
        for site in reversed(self.sites):
            if site.source is not None:
                self._scale(site, site.source, folding)

    def _scale(self, site: Site, source: Source, folding: Folding) -> None:
        inputs = self.inputs.get(site.key)
        if inputs is None or not inputs.suffice or f"{source.name}.weight" not in self.weights:
            return
        find = self._scaling_of(site)
        scaling = find(inputs, partial(folding.tied, source)) if find else None
        if scaling is None or not scaling.alpha:
            return
        scales = folding.possible(site, source, scaling.scales)
        folding.fold(site, source, scales)
        self.inputs[site.key] = inputs.rescaled(scales)
        self.scalings[site.key] = scaling
        self.touched |= {f"{name}.weight" for name in site.linears}
        self.touched |= {f"{source.name}.weight", f"{source.name}.bias"}

    def _scaling_of(
        self, site: Site
    ) -> Callable[[Inputs, Callable[[Tensor], Tensor]], Scaling] | None:
        """How the scales of a site are found, if any of its linears asks for it."""
        schemes = {name: self.schemes[name] for name in site.linears if name in self.schemes}
        algorithms = {scheme.algorithm for scheme in schemes.values()}
        if "smoothquant" in algorithms:
            weights = [self.weights[f"{name}.weight"] for name in schemes]
            return lambda inputs, tied: smoothing_scales(weights, inputs, tied)
        if "awq" not in algorithms:
            return None
        rounded = [
            Weighted(self.prefix + name, self.weights[f"{name}.weight"], scheme)
            for name, scheme in schemes.items()
            if scheme.kind == "int"
        ]

        def search(inputs: Inputs, tied: Callable[[Tensor], Tensor]) -> Scaling:
            gram = inputs.regularized()
            return search_scales(rounded, conditional_importance(gram, compensation(gram)), tied)

        return search

    def quantize(self) -> tuple[dict[str, QuantTensor], tuple[LinearStats, ...]]:
        """All tensors by their full name, and the figures of the linears."""
        tensors: dict[str, QuantTensor] = {}
        stats = []
        for site in self.sites:
            inputs = self.inputs.get(site.key)
            gram = inputs.regularized() if inputs is not None and inputs.suffice else None
            way = self._compensation(site, gram)
            lack = _UNSEEN if inputs is None else _FEW if gram is None else None
            for name in site.linears:
                if name not in self.schemes:
                    continue
                made = self._round(name, gram, way, lack)
                tensors[f"{self.prefix}{name}.weight"] = made.tensor
                stats.append(self._stats(site, name, made, inputs))
        for name, tensor in self.source.items():
            if name.removesuffix(".weight") not in self.schemes:
                tensors[self.prefix + name] = self._dense(name, tensor)
        return {self.prefix + name: tensors[self.prefix + name] for name in self.source}, (*stats,)

    def _compensation(self, site: Site, gram: Tensor | None) -> Compensation | None:
        """One for all linears of a site that compensate."""
        wanted = {self.schemes[name].algorithm for name in site.linears if name in self.schemes}
        return compensation(gram) if gram is not None and wanted & {"awq", "gptq"} else None

    def _round(
        self, name: str, gram: Tensor | None, way: Compensation | None, lack: str | None
    ) -> _Rounded:
        """``lack`` says why there is no ``gram``."""
        scheme, weight = self.schemes[name], self.weights[f"{name}.weight"]
        full = f"{self.prefix}{name}.weight"
        if scheme.kind == "float8_e4m3":
            dense = lazy(_dense_tensor(full, weight))
            block = scheme.grouping == "block"
            made = (
                quantize_fp8_block(dense, scheme.group)
                if block
                else quantize_fp8(dense, search=True)
            )
            return _Rounded(made)
        asked = scheme.algorithm in ("awq", "gptq")
        if gram is None or not asked:
            grid = range_grid(*weight_range(weight, scheme.group), scheme, full)
            fallback = lack if self.calibrated and scheme.algorithm != "rtn" else None
            return _Rounded(quantized(full, grid.codes(weight), grid, scheme), fallback=fallback)
        clipped = search_range(weight, gram.diagonal(), scheme, full)
        if way is None:
            codes = clipped.grid.codes(weight)
            tensor = quantized(full, codes, clipped.grid, scheme)
            return _Rounded(tensor, clipped.kept, None, _SINGULAR)
        codes = compensated_codes(weight, clipped.grid, way)
        tensor = quantized(full, codes, clipped.grid, scheme)
        return _Rounded(tensor, clipped.kept, way.damping)

    def _stats(self, site: Site, name: str, made: _Rounded, inputs: Inputs | None) -> LinearStats:
        scheme, weight = self.schemes[name], self.weights[f"{name}.weight"]
        error = torch.from_numpy(made.tensor.dequantize()) - weight
        scaling = self.scalings.get(site.key)
        scales = scheme.algorithm in ("awq", "smoothquant")
        return LinearStats(
            name=self.prefix + name,
            scheme=scheme.name,
            group=scheme.group,
            weight_error=_ratio(error.square().sum(), weight.square().sum()),
            output_error=None if inputs is None else _output_error(error, weight, inputs.gram),
            clip=made.clip,
            alpha=(scaling.alpha if scaling else 0.0) if scales else None,
            damping=made.damping,
            fallback=made.fallback,
            tokens_seen=0 if inputs is None else inputs.tokens,
            bytes=scheme.nbytes((weight.shape[0], weight.shape[1])),
        )

    def _dense(self, name: str, tensor: LazyTensor) -> QuantTensor:
        """A tensor that is not rounded, in its own type; bit for bit if nothing was folded in."""
        if name not in self.touched:
            return tensor.load()
        values = self.weights[name].numpy().astype(numpy_dtype(tensor.format.dtype))
        return QuantTensor(tensor.name, replace(tensor.format, kind="dense"), values)


@dataclass(frozen=True, slots=True)
class _Rounded:
    tensor: QuantTensor
    clip: float | None = None
    damping: float | None = None
    fallback: str | None = None


def linears_of(tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """The linears of a layer, by the tensors' names in it."""
    weights = (name for name, tensor in tensors.items() if len(tensor.format.shape) == 2)
    return tuple(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))


def _float32(tensor: LazyTensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tensor.load().dequantize()))


def _dense_tensor(name: str, weight: Tensor) -> QuantTensor:
    return QuantTensor(name, WeightFormat(tuple(weight.shape), "dense", "float32"), weight.numpy())


def lazy(tensor: QuantTensor) -> LazyTensor:
    """A tensor that is there."""
    return LazyTensor(tensor.name, tensor.format, lambda: tensor, tensor.input)


def _output_error(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    return _ratio(((error @ gram) * error).sum(), ((weight @ gram) * weight).sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
