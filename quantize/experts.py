"""Mixtures of experts in transformers' layers: each expert with linears of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import LAYER
from slipstream.errors import CheckpointError

_EXPERTS, _EXPERT = "experts", "experts.{e}."
Shapes = Mapping[str, tuple[int, ...]]


class Expert(nn.Module):
    """One expert, without weights until it is filled.

    ``shapes`` has its linears by the names of checkpoints: gate, up and down, or gate and up as one
    and down. ``stacked`` is transformers' module of all experts.
    """

    def __init__(self, stacked: Any, shapes: Shapes) -> None:  # noqa: ANN401
        super().__init__()
        self._gated: Callable[[Tensor], Tensor] = stacked._apply_gate
        self._interleaved = not stacked.is_concatenated
        with torch.device("meta"):
            for name, (rows, columns) in shapes.items():
                self.add_module(name, nn.Linear(columns, rows, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[T, hidden]`` to ``[T, hidden]``, not yet weighted."""
        *opening, closing = self.children()
        opened = [linear(x) for linear in opening]
        if self._interleaved and len(opened) > 1:
            return cast("Tensor", closing(self._gated(torch.stack(opened, -1).flatten(-2))))
        return cast("Tensor", closing(self._gated(torch.cat(opened, -1))))


class Experts(nn.Module):
    """The experts of a layer, its children by number, in the place of transformers' module, which
    stacks their weights."""

    def __init__(self, stacked: Any, shapes: Shapes) -> None:  # noqa: ANN401
        super().__init__()
        for number in range(stacked.num_experts):
            self.add_module(str(number), Expert(stacked, shapes))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Tokens ``[T, hidden]`` through their experts ``[T, top_k]``, weighted by as many."""
        out = torch.zeros_like(x)
        for number, expert in self.named_children():
            tokens, places = torch.where(ids == int(number))
            if len(tokens):
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        return out


def split_experts(layer: nn.Module, config: ModelConfig, index: int) -> dict[str, str]:
    """Gives each expert of a decoder layer linears of its own, under the names of checkpoints.

    Returns transformers' names of the modules whose names are still others, by those of
    checkpoints. Raises CheckpointError for a layer without the experts that the table has.
    """
    modules = architecture_of(config.architecture).modules
    rows = [m for m in modules if _EXPERT in m.name and m.present(config, index)]
    if not rows:
        return {}
    block = rows[0].name.partition(_EXPERT)[0].removeprefix(f"{LAYER}.").removesuffix(".")
    place = next((n for n, m in layer.named_modules() if hasattr(m, "is_concatenated")), "")
    called, _, last = place.rpartition(".")
    if last != _EXPERTS:
        raise CheckpointError(
            f"transformers' layers of type {config.architecture} have no experts that can be "
            "calibrated and measured; build an engine of the dense checkpoint instead"
        )
    parent = layer.get_submodule(called)
    shapes = {row.name.rpartition(".")[2]: row.shape(config) for row in rows}
    parent.experts = Experts(parent.experts, shapes)
    if called != block:
        # The layer calls it by the one name, and has it among its parts by the other.
        delattr(layer, called)
        layer.add_module(block, parent)
        object.__setattr__(layer, called, parent)
    if not block:
        return {}  # they are no part of a block, and what is beside them has its own name
    parts = dict(parent.named_children())
    routers = [m.name for m in modules if m.role == "router" and not m.bare]
    ours = [name.removeprefix(f"{LAYER}.{block}.") for name in routers]
    theirs = [name for name, part in parts.items() if type(part).__name__.endswith("Router")]
    others = (f"{block}.{name}" for name in ours if name not in parts)
    renamed = dict(zip(others, (f"{block}.{name}" for name in theirs), strict=False))
    return renamed | _elsewhere(parent, block, [m.name for m in modules if m.bare])


def _elsewhere(parent: nn.Module, block: str, vectors: Sequence[str]) -> dict[str, str]:
    """Of modules of a block that hold one vector each, those that transformers has deeper."""
    prefix, names = f"{LAYER}.{block}.", [name for name, _ in parent.named_modules()]
    holders = {v.removeprefix(prefix).rpartition(".")[0] for v in vectors if v.startswith(prefix)}
    found = {h: [n for n in names if n.endswith(f".{h}")] for h in holders if h not in names}
    return {f"{block}.{h}": f"{block}.{deeper[0]}" for h, deeper in found.items() if deeper}
