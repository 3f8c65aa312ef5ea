"""Quantizes a model layer by layer: memory is that of one layer and the states between layers.

    states ─▶ layer, dense ─▶ inputs of its linears ─▶ scales folded ─▶ linears rounded
       └────▶ layer, rounded ─▶ states of the next layer

Of a layer's experts, one after the other gets the tokens that were routed to it. Every layer is
calibrated on what the rounded layers before it give, as it will meet it in use.
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
from slipstream.quantize.collect import collect
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.layer import LayerResult, LayerWork, LinearStats, lazy, linears_of
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import Plan
from slipstream.quantize.sites import by_expert, layer_sites
from slipstream.quantize.skeleton import States, linears, watch_kv
from slipstream.weights.fp8 import FP8_MAX
from slipstream.weights.tensor import LazyTensor, QuantTensor

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
    """The calibration text, on its way through the layers."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.options = options
        self.model = CheckpointModel(checkpoint) if plan.calibrated else None
        self.states: list[States] = []

    @torch.inference_mode()
    def begin(self, tokens: Sequence[Tokens]) -> None:
        """Embed the text."""
        assert self.model is not None
        self.states = self.model.embed(tokens)

    @torch.inference_mode()
    def layer(self, index: int) -> LayerResult:
        """Quantize a layer and run the text through the result."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.checkpoint.names() if layer_of(name) == index]
        source = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        tensors: dict[str, QuantTensor] = {}
        stats: list[LinearStats] = []
        for work in self._works(index, source):
            work.scale()
            made, figures = work.quantize()
            tensors |= made
            stats += figures
        kv = self.advance(index, tensors) if self.model is not None else None
        return LayerResult(index, {name: tensors[name] for name in names}, tuple(stats), kv)

    def _works(self, index: int, source: Mapping[str, LazyTensor]) -> Iterator[LayerWork]:
        """What is no expert of a layer, and then its experts, with their inputs: those of one are
        there at a time."""
        parts = by_expert(self.plan.config, index, source)
        works = (self._work(index, {n: source[n] for n in names}) for names in parts.values())
        if self.model is None:
            yield from works
            return
        common, *experts = works
        weights = common.weights | {k: w for expert in experts for k, w in expert.weights.items()}
        skeleton = self.model.skeleton
        with skeleton.filled(index, weights) as layer:
            streams = {s.stream for expert in experts for s in expert.sites if s.stream is not None}
            sites = [s for s in common.sites if not common.schemes.keys().isdisjoint(s.linears)]
            common.inputs, routed = collect(skeleton, layer, self.states, sites, streams)
            yield common
            for number in list(parts)[1:]:
                assert routed is not None and number is not None
                expert = experts.pop(0)
                expert.inputs = routed.collect(layer, number, expert.sites)
                yield expert

    def _work(self, index: int, source: Mapping[str, LazyTensor]) -> LayerWork:
        """A part of a layer that shares no scales with the rest."""
        prefix = f"model.layers.{index}."
        planned = self.plan.layers[index].linears
        named = {name: planned.get(prefix + name) for name in linears_of(source)}
        schemes = {name: scheme for name, scheme in named.items() if scheme is not None}
        sites = layer_sites(self.plan.config, index, named)
        return LayerWork(prefix, source, schemes, sites, calibrated=self.model is not None)

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
            self.states = [skeleton.run(layer, states) for states in self.states]
            watch_kv(layer, None)
            for handle in handles:
                if handle is not None:
                    handle.remove()
        if not wanted:
            return None
        k, v = (number / FP8_MAX if number > 0 else 1.0 for number in largest)
        return k, v
