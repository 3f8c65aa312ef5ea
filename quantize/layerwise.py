"""Quantizes a model layer by layer: memory is that of one layer and the hidden states.

    hidden states ─▶ layer, dense ─▶ inputs of its linears ─▶ scales folded ─▶ linears rounded
          └────────▶ layer, rounded ─▶ hidden states of the next layer

Every layer is calibrated on what the rounded layers before it give, as it will meet it in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.checkpoints import Checkpoint
from slipstream.builder.checkpoints.names import layer_of
from slipstream.quantize.activations import round_activations
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.layer import LayerResult, LayerWork, lazy, linears_of
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import Plan
from slipstream.quantize.sites import Site, layer_sites
from slipstream.quantize.skeleton import linears, watch_kv
from slipstream.quantize.statistics import Collector, Inputs
from slipstream.weights.fp8 import FP8_MAX
from slipstream.weights.tensor import QuantTensor

Tokens = NDArray[np.int32]


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
        sites = layer_sites(self.plan.config, index, linears_of(source))
        work = LayerWork(prefix, source, schemes, sites, calibrated=self.model is not None)
        if self.model is not None:
            work.inputs = self._inputs(index, work.weights, sites)
        work.scale()
        tensors, stats = work.quantize()
        kv = self.advance(index, tensors) if self.model is not None else None
        return LayerResult(index, tensors, stats, kv)

    def _inputs(
        self, index: int, weights: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> dict[str, Inputs | None]:
        """What the linears of each site read, by the site's key."""
        assert self.model is not None
        skeleton, expected = self.model.skeleton, sum(h.shape[1] for h in self.hidden)
        collectors = {site.key: Collector(expected) for site in sites}
        with skeleton.filled(index, weights) as layer:
            seen: dict[str, Tensor] = {}
            watched = {site.key for site in sites} | {site.stream for site in sites if site.stream}
            handles = [
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: seen.__setitem__(name, _rows(inputs[0]))
                )
                for name, module in layer.named_modules()
                if name in watched
            ]
            for states in self.hidden:
                seen[""] = _rows(skeleton.run(layer, states))
                for site in sites:
                    if site.key in seen:
                        stream = None if site.stream is None else seen[site.stream]
                        collectors[site.key].add(seen[site.key], stream)
            for handle in handles:
                handle.remove()
        return {key: collector.result() for key, collector in collectors.items()}

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
                round_activations(linear, lazy(tensors[f"{prefix}{name}.weight"]))
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


def _rows(x: Tensor) -> Tensor:
    """``[T, K]`` of all tokens."""
    return x.reshape(-1, x.shape[-1])
