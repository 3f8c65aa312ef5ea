"""Mixtures of experts: their rows of a table, their configuration, and their part of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import onnx_ir as ir

from slipstream.builder.graph.ops import Attributes, Routes
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import GATE_OF, Decoder
from slipstream.builder.models.module import LAYER, Extent, Module, hidden
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.router import MAX_EXPERTS
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor, stack_rows

# Of ``ModelConfig.extras``.
EXPERTS, TOP_K, WIDTH, RENORMALIZE = "experts", "experts_per_token", "expert_width", "renormalize"


def experts(config: ModelConfig) -> Extent:
    """The experts of a layer."""
    return Extent(config.extras[EXPERTS])


def expert_inner(config: ModelConfig) -> Extent:
    """Between the matrices of an expert."""
    return Extent(config.extras[WIDTH])


def expert_modules(
    block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Module, ...]:
    """The router and the experts of every layer, in a block of the layer such as ``mlp``.

    Names are those of the checkpoint. Nothing folds a scale through the choice of experts.
    """
    prefix = f"{LAYER}.{block}"

    def expert(name: str, gguf: str, rows: Any, columns: Any, shard: Any) -> Module:  # noqa: ANN401
        return Module(
            f"{prefix}.experts.{{e}}.{name}",
            "expert",
            (rows,),
            columns,
            experts=experts,
            stream=LAYER if name == down else None,
            shard=shard,
            gguf=f"blk.{{i}}.ffn_{gguf}.{{e}}",
        )

    return (
        Module(f"{prefix}.gate", "router", (experts,), hidden, gguf="blk.{i}.ffn_gate_inp"),
        expert(gate, "gate", expert_inner, hidden, "column"),
        expert(up, "up", expert_inner, hidden, "column"),
        expert(down, "down", hidden, expert_inner, "row"),
    )


def read_experts(keys: Fields, count: str, width: str) -> dict[str, Any]:
    """What ``extras`` say of experts: ``count`` and ``width`` name the keys of config.json.

    Raises CheckpointError for more experts a token than there are.
    """
    number = keys.integer(count, minimum=1, maximum=MAX_EXPERTS)
    return {
        EXPERTS: number,
        TOP_K: keys.integer("num_experts_per_tok", minimum=1, maximum=number),
        WIDTH: keys.integer(width, minimum=1),
    }


class ExpertDecoder(Decoder):
    """A decoder in which the MLP of a layer may be a choice of experts."""

    block: ClassVar[str] = "mlp"
    parts: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """The experts that the router chooses for each token, weighted; or a plain MLP where the
        table has no experts."""
        prefix = prefix.removesuffix("mlp.") + self.block + "."
        if not self.architecture.has(self.config, f"{prefix}gate"):
            return super().mlp(x, prefix)
        routes = self.ops.router(self.linear(x, f"{prefix}gate"), self.routing())
        return self.chosen(x, prefix, routes)

    def chosen(self, x: ir.Value, prefix: str, routes: Routes) -> ir.Value:
        """What the experts that were chosen make of x, weighted."""
        *opening, closing = self.parts
        gate: Attributes = {"gated": 1, "gate": GATES[GATE_OF[self.config.hidden_act]]}
        with self.ops.scope("experts"):
            opened = self.experts(x, prefix, opening, routes, gate)
            return self.experts(opened, prefix, [closing], routes, {"reduce": 1})

    def routing(self) -> Attributes:
        """How experts are chosen: attributes of ``plugins/router``."""
        extras = self.config.extras
        return {"top_k": extras[TOP_K], "renormalize": int(extras[RENORMALIZE])}

    def experts(
        self,
        x: ir.Value,
        prefix: str,
        names: Sequence[str],
        routes: Routes,
        attributes: Mapping[str, int | float | list[int]],
    ) -> ir.Value:
        """x times the linears ``names`` of its experts, their rows one after the other."""
        number = self.config.extras[EXPERTS]
        parts = [
            self.tensor(f"{prefix}experts.{expert}.{name}.weight")
            for expert in range(number)
            for name in names
        ]
        weight = stack_rows(_alike(parts), f"{prefix}experts.{'+'.join(names)}.weight")
        with self.ops.scope("+".join(names)):
            return self.ops.expert_linear(x, weight, routes, {**attributes, "experts": number})


def _alike(tensors: Sequence[LazyTensor]) -> Sequence[LazyTensor]:
    """The weights if they are all of one format and take x as it is, else all dense."""
    formats = {replace(tensor.format, shape=()) for tensor in tensors}
    whole = all(tensor.format.shape[0] % tensor.format.rows == 0 for tensor in tensors)
    if len(formats) == 1 and whole and all(tensor.input is None for tensor in tensors):
        return tensors
    return [as_dense(tensor, "float32") for tensor in tensors]
