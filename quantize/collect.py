"""What the linears of a layer read when the calibration text runs through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slipstream.quantize.experts import Experts
from slipstream.quantize.sites import Site
from slipstream.quantize.skeleton import Skeleton, States
from slipstream.quantize.statistics import Collector, Inputs, stream_factors

Collected = dict[str, Inputs | None]


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What the experts of a layer were given: tokens ``[T, hidden]``, their experts ``[T, top_k]``
    and as many weights, and what tokens count by in the residual stream after the experts, ``[T]``,
    by the name of what reads it there."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    factors: Mapping[str, Tensor]

    def collect(self, layer: nn.Module, expert: int, sites: Sequence[Site]) -> Collected:
        """What the linears of one expert read, by the key of their site, of the tokens that it was
        chosen for; ``layer`` is filled."""
        tokens, places = torch.where(self.ids == expert)
        collectors = {site.key: Collector(len(tokens)) for site in sites}
        module = _experts(layer)
        if len(tokens) and module is not None:
            with _watched(layer, collectors) as seen:
                module.get_submodule(str(expert))(self.x[tokens])
            for site in sites:
                factors = None
                if site.stream is not None:
                    factors = self.factors[site.stream][tokens] * self.weights[tokens, places]
                collectors[site.key].add(seen[site.key], factors)
        return _results(collectors)


def collect(
    skeleton: Skeleton,
    layer: nn.Module,
    texts: Sequence[States],
    sites: Sequence[Site],
    streams: Collection[str] = (),
) -> tuple[Collected, Routed | None]:
    """What the linears of each site read, by its key, and what the experts were given, if there are
    some. ``streams`` are those that experts' sites name; ``layer`` is filled."""
    expected = sum(states.hidden.shape[1] for states in texts)
    collectors = {site.key: Collector(expected) for site in sites}
    names = {*collectors, *streams, *(site.stream for site in sites if site.stream)}
    given: list[tuple[Tensor, ...]] = []
    factors: dict[str, list[Tensor]] = {name: [] for name in streams}
    with _watched(layer, names) as seen, _watched_experts(layer, given):
        for states in texts:
            seen[""] = _rows(skeleton.run(layer, states).hidden)
            for site in sites:
                if site.key in seen:
                    stream = None if site.stream is None else stream_factors(seen[site.stream])
                    collectors[site.key].add(seen[site.key], stream)
            for name, parts in factors.items():
                parts.append(stream_factors(seen[name]))
    if not given:
        return _results(collectors), None
    x, ids, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
    joined = {name: torch.cat(parts) for name, parts in factors.items()}
    return _results(collectors), Routed(x, ids, weights, joined)


def _results(collectors: Mapping[str, Collector]) -> Collected:
    return {key: collector.result() for key, collector in collectors.items()}


@contextmanager
def _watched(layer: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """The last x of some modules of a layer, by name, as ``[T, K]``."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, _rows(inputs[0]))
        )
        for name, module in layer.named_modules()
        if name and name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_experts(layer: nn.Module, given: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Adds to ``given`` what a layer's experts are called with."""
    experts = _experts(layer)
    if experts is None:
        yield
        return
    handle = experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    try:
        yield
    finally:
        handle.remove()


def _experts(layer: nn.Module) -> Experts | None:
    return next((module for module in layer.modules() if isinstance(module, Experts)), None)


def _rows(x: Tensor) -> Tensor:
    """``[T, K]`` of all tokens."""
    return x.reshape(-1, x.shape[-1])
