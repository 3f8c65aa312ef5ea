"""Quantizes a model layer by layer: memory is that of one layer and the hidden states.

    hidden states ─▶ layer, dense ─▶ inputs of its linears ─▶ scales folded ─▶ linears rounded
          └────────▶ layer, rounded ─▶ hidden states of the next layer

Every layer is calibrated on what the rounded layers before it give, as it will meet it in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.checkpoints import Checkpoint
from slipstream.builder.checkpoints.names import layer_of
from slipstream.quantize.activations import round_activations
from slipstream.quantize.awq import Scaling, Weighted, conditional_importance, search_scales
from slipstream.quantize.clip import search_range
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.gptq import Compensation, compensated_codes, compensation
from slipstream.quantize.grid import quantized, range_grid, weight_range
from slipstream.quantize.options import QuantizeOptions, Scheme
from slipstream.quantize.plan import Plan
from slipstream.quantize.sites import SITES, Folding, Site
from slipstream.quantize.skeleton import linears, watch_kv
from slipstream.quantize.smoothquant import smoothing_scales
from slipstream.quantize.statistics import Collector, Inputs
from slipstream.weights.fp8 import FP8_MAX, quantize_fp8, quantize_fp8_block
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, numpy_dtype

log = logging.getLogger(__name__)
Tokens = NDArray[np.int32]
_UNSEEN = "rounded to nearest: no finite input reached it"
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


def quantize_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    tokens: Sequence[Tokens],
    options: QuantizeOptions,
    resume_from: int = 0,
    load_done: Callable[[int], Mapping[str, QuantTensor]] | None = None,
) -> Iterator[LayerResult]:
    """Every layer from ``resume_from`` on; those before it are taken from ``load_done``.

    ``tokens`` are the calibration windows, none for a plan that needs none. Raises CheckpointError
    for a weight that is not finite.
    """
    run = _Run(checkpoint, plan, options)
    if plan.calibrated:
        run.begin(tokens)
        for index in range(resume_from):
            assert load_done is not None
            run.advance(index, load_done(index))
    for index in range(resume_from, plan.config.num_layers):
        yield run.layer(index)


class _Run:
    """The hidden states of the calibration text, on their way through the layers."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.options = options
        self.model = CheckpointModel(checkpoint) if plan.calibrated else None
        self.hidden: list[Tensor] = []

    @torch.inference_mode()
    def begin(self, tokens: Sequence[Tokens]) -> None:
        """Embed the text."""
        assert self.model is not None
        self.hidden = self.model.embed(tokens)

    @torch.inference_mode()
    def layer(self, index: int) -> LayerResult:
        """Quantize a layer and run the text through the result."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.checkpoint.names() if layer_of(name) == index]
        source = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        schemes = {
            name.removeprefix(prefix): scheme
            for name, scheme in self.plan.layers[index].linears.items()
        }
        work = _Layer(prefix, source, schemes, self.plan)
        if self.model is not None:
            work.inputs = self._inputs(index, work.weights)
        work.scale()
        tensors, stats = work.quantize()
        kv = self.advance(index, tensors) if self.model is not None else None
        return LayerResult(index, tensors, stats, kv)

    def _inputs(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Inputs | None]:
        """What the linears of each site read, by the site's source."""
        assert self.model is not None
        skeleton, expected = self.model.skeleton, sum(h.shape[1] for h in self.hidden)
        collectors = {site.source: Collector(expected) for site in SITES}
        with skeleton.filled(index, weights) as layer:
            seen: dict[str, Tensor] = {}
            watched = [site.linears[0] for site in SITES] + ["post_attention_layernorm"]
            modules = dict(layer.named_modules())
            handles = [
                modules[name].register_forward_pre_hook(
                    lambda _, inputs, name=name: seen.__setitem__(name, inputs[0][0])
                )
                for name in watched
            ]
            for states in self.hidden:
                out = skeleton.run(layer, states)
                streams = {
                    "self_attn.v_proj": seen["post_attention_layernorm"],
                    "mlp.up_proj": out[0],
                }
                for site in SITES:
                    stream = streams[site.source] if site.residual else None
                    collectors[site.source].add(seen[site.linears[0]], stream)
            for handle in handles:
                handle.remove()
        return {source: collector.result() for source, collector in collectors.items()}

    @torch.inference_mode()
    def advance(self, index: int, tensors: Mapping[str, QuantTensor]) -> tuple[float, float] | None:
        """Run the text through a quantized layer; scales of keys and values where fp8 pages are
        wanted."""
        assert self.model is not None
        skeleton, prefix = self.model.skeleton, f"model.layers.{index}."
        decoded = {
            name.removeprefix(prefix): torch.from_numpy(np.ascontiguousarray(t.dequantize()))
            for name, t in tensors.items()
        }
        largest = [0.0, 0.0]

        def watch(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for i, numbers in enumerate((key, value)):
                finite = numbers.abs().nan_to_num(0.0, posinf=0.0)
                largest[i] = max(largest[i], float(finite.amax()))
            return key, value

        with skeleton.filled(index, decoded) as layer:
            handles = [
                round_activations(linear, _lazy(tensors[f"{prefix}{name}.weight"]))
                for name, linear in linears(layer).items()
            ]
            wanted = self.options.kv_cache_dtype == "fp8"
            watch_kv(layer, watch if wanted else None)
            self.hidden = [skeleton.run(layer, states) for states in self.hidden]
            watch_kv(layer, None)
            for handle in handles:
                if handle is not None:
                    handle.remove()
        if not wanted:
            return None
        k, v = (number / FP8_MAX if number > 0 else 1.0 for number in largest)
        return k, v


@dataclass(slots=True)
class _Layer:
    """One layer in float32 on its way to its codes; names are those in the layer."""

    prefix: str
    source: Mapping[str, LazyTensor]
    schemes: Mapping[str, Scheme]
    plan: Plan
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
        folding = Folding(self.plan.config, self.weights, kept)
        for site in reversed(SITES):
            self._scale(site, folding)

    def _scale(self, site: Site, folding: Folding) -> None:
        inputs = self.inputs.get(site.source)
        if inputs is None:
            return
        find = self._scaling_of(site)
        scaling = find(inputs, partial(folding.tied, site)) if find else None
        if scaling is None or not scaling.alpha:
            return
        scales = folding.possible(site, scaling.scales)
        folding.fold(site, scales)
        self.inputs[site.source] = inputs.rescaled(scales)
        self.scalings[site.source] = scaling
        self.touched |= {f"{name}.weight" for name in site.linears}
        self.touched |= {f"{site.source}.weight", f"{site.source}.bias"}

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
        for site in SITES:
            inputs = self.inputs.get(site.source)
            gram = None if inputs is None else inputs.regularized()
            way = self._compensation(site, gram)
            for name in site.linears:
                if name not in self.schemes:
                    continue
                made = self._round(name, gram, way, inputs is not None)
                tensors[f"{self.prefix}{name}.weight"] = made.tensor
                stats.append(self._stats(site, name, made, inputs))
        for name, lazy in self.source.items():
            if name.removesuffix(".weight") not in self.schemes:
                tensors[self.prefix + name] = self._dense(name, lazy)
        return {self.prefix + name: tensors[self.prefix + name] for name in self.source}, (*stats,)

    def _compensation(self, site: Site, gram: Tensor | None) -> Compensation | None:
        """One for all linears of a site that compensate."""
        wanted = {self.schemes[name].algorithm for name in site.linears if name in self.schemes}
        return compensation(gram) if gram is not None and wanted & {"awq", "gptq"} else None

    def _round(
        self, name: str, gram: Tensor | None, way: Compensation | None, seen: bool
    ) -> _Rounded:
        scheme, weight = self.schemes[name], self.weights[f"{name}.weight"]
        full = f"{self.prefix}{name}.weight"
        if scheme.kind == "float8_e4m3":
            lazy = _lazy(_dense_tensor(full, weight))
            block = scheme.grouping == "block"
            return _Rounded(quantize_fp8_block(lazy) if block else quantize_fp8(lazy, search=True))
        asked = scheme.algorithm in ("awq", "gptq")
        if gram is None or not asked:
            grid = range_grid(*weight_range(weight, scheme.group), scheme, full)
            fallback = _UNSEEN if self.plan.calibrated and scheme.algorithm != "rtn" else None
            unseen = None if seen else fallback
            return _Rounded(quantized(full, grid.codes(weight), grid, scheme), fallback=unseen)
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
        if made.fallback is not None:
            log.warning("%s%s is %s", self.prefix, name, made.fallback)
        scaling = self.scalings.get(site.source)
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

    def _dense(self, name: str, lazy: LazyTensor) -> QuantTensor:
        """A tensor that is not rounded, in its own type; bit for bit if nothing was folded in."""
        if name not in self.touched:
            return lazy.load()
        values = self.weights[name].numpy().astype(numpy_dtype(lazy.format.dtype))
        return QuantTensor(lazy.name, replace(lazy.format, kind="dense"), values)


@dataclass(frozen=True, slots=True)
class _Rounded:
    tensor: QuantTensor
    clip: float | None = None
    damping: float | None = None
    fallback: str | None = None


def _float32(tensor: LazyTensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tensor.load().dequantize()))


def _dense_tensor(name: str, weight: Tensor) -> QuantTensor:
    return QuantTensor(name, WeightFormat(tuple(weight.shape), "dense", "float32"), weight.numpy())


def _lazy(tensor: QuantTensor) -> LazyTensor:
    return LazyTensor(tensor.name, tensor.format, lambda: tensor, tensor.input)


def _output_error(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    return _ratio(((error @ gram) * error).sum(), ((weight @ gram) * weight).sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
