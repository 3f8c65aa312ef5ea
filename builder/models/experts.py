"""Mixtures of experts: their rows of a table, their configuration, and their part of the graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.ops import Attributes, Routes
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.models.architecture import differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import GATE_OF, Decoder
from slipstream.builder.models.expert_weights import order_of, stack_experts, with_input
from slipstream.builder.models.module import LAYER, Extent, Measure, Module, hidden
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.router import MAX_EXPERTS
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor, reorder_rows, stack_rows

log = logging.getLogger(__name__)

# Of ``ModelConfig.extras``; only a table of ``in_some_layers`` asks for the dense ones.
EXPERTS, TOP_K, WIDTH, RENORMALIZE = "experts", "experts_per_token", "expert_width", "renormalize"
DENSE_LAYERS = "dense_layers"
_MLP = ("gate_proj", "up_proj", "down_proj")
_CHOSEN = "num_experts_per_tok"  # the key of config.json that most families have
_MOST = 1 << 16  # experts of all layers; each has modules of its own, and no model has a third
# What is added to the scores of experts to choose them, beside the router.
CORRECTION = "e_score_correction_bias"


def experts(config: ModelConfig) -> Extent:
    """The experts of a layer."""
    return Extent(config.extras[EXPERTS])


def expert_inner(config: ModelConfig) -> Extent:
    """Between the matrices of an expert."""
    return Extent(config.extras[WIDTH])


def expert_modules(
    block: str,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    router: str = "gate",
) -> tuple[Module, ...]:
    """The router and the experts of every layer, in a block of the layer such as ``mlp``.

    Names are those of the checkpoint. Nothing folds a scale through the choice of experts; within
    one, those of ``down`` go into ``up``.
    """
    prefix = f"{LAYER}.{block}"

    def expert(name: str, gguf: str, rows: Any, columns: Any, shard: Any) -> Module:  # noqa: ANN401
        return Module(
            f"{prefix}.experts.{{e}}.{name}",
            "expert",
            (rows,),
            columns,
            experts=experts,
            reads=f"{prefix}.experts.{{e}}" + (f".{up}" if name == down else ""),
            stream=LAYER if name == down else None,
            shard=shard,
            gguf=f"blk.{{i}}.ffn_{gguf}.{{e}}",
        )

    return (
        Module(f"{prefix}.{router}", "router", (experts,), hidden, gguf="blk.{i}.ffn_gate_inp"),
        expert(gate, "gate", expert_inner, hidden, "column"),
        expert(up, "up", expert_inner, hidden, "column"),
        expert(down, "down", hidden, expert_inner, "row"),
    )


def shared_modules(block: str, width: Measure) -> tuple[Module, ...]:
    """The MLP of this width that every token takes beside its experts, in every layer.

    The norm before it is read by the router, too, so only ``down_proj`` has scales folded.
    """
    prefix = f"{LAYER}.{block}"

    def linear(which: str, rows: Measure, columns: Measure, **more: Any) -> Module:  # noqa: ANN401
        gguf = f"blk.{{i}}.ffn_{which}_shexp"
        name = f"{prefix}.{which}_proj"
        return Module(name, "linear", (rows,), columns, adapter=True, gguf=gguf, **more)

    return (
        linear("gate", width, hidden, shard="column"),
        linear("up", width, hidden, shard="column"),
        linear("down", hidden, width, shard="row", reads=f"{prefix}.up_proj", stream=LAYER),
    )


def correction_module(block: str) -> Module:
    """What is added to the scores of the experts to choose them."""
    name = f"{LAYER}.{block}.gate.{CORRECTION}"
    return Module(name, "router", (experts,), bare=True, gguf="blk.{i}.exp_probs_b.bias")


def with_experts(modules: tuple[Module, ...], added: tuple[Module, ...]) -> tuple[Module, ...]:
    """A table with these rows in the place of the MLP, in every layer."""
    kept = tuple(m for m in modules if m.name.rpartition(".")[2] not in _MLP)
    return (*kept, *added)


def in_some_layers(modules: tuple[Module, ...], added: tuple[Module, ...]) -> tuple[Module, ...]:
    """A table with these rows in the layers that are not dense, and its MLP in those."""
    dense = differing(modules, **{name: {"present": _is_dense} for name in _MLP})
    return (*dense, *(replace(module, present=_is_sparse) for module in added))


def _is_dense(config: ModelConfig, layer: int) -> bool:
    return layer in config.extras[DENSE_LAYERS]


def _is_sparse(config: ModelConfig, layer: int) -> bool:
    return layer not in config.extras[DENSE_LAYERS]


def read_experts(keys: Fields, count: str, width: str, chosen: str = _CHOSEN) -> dict[str, Any]:
    """What ``extras`` say of experts: ``count``, ``width`` and ``chosen`` name the keys of
    config.json.

    Raises CheckpointError for more experts than routers or readers of names take, and for more
    experts a token than there are.
    """
    number = keys.integer(count, minimum=1, maximum=MAX_EXPERTS)
    layers = keys.integer("num_hidden_layers", minimum=1)
    if number * layers > _MOST:
        raise keys.refusal(count, f"at most {_MOST} experts in the {layers} layers together")
    return {
        EXPERTS: number,
        TOP_K: keys.integer(chosen, minimum=1, maximum=number),
        WIDTH: keys.integer(width, minimum=1),
    }


def gguf_keys(count: str, width: str | None = None, chosen: str = _CHOSEN) -> dict[str, str]:
    """The keys of config.json that ``read_experts`` reads, in GGUF files; without ``width`` it is
    that of every MLP."""
    keys = {count: "expert_count", chosen: "expert_used_count"}
    return keys if width is None else {**keys, width: "expert_feed_forward_length"}


def write_experts(
    config: ModelConfig, count: str, width: str, chosen: str = _CHOSEN
) -> dict[str, Any]:
    """The keys of config.json that ``read_experts`` reads."""
    extras = config.extras
    return {count: extras[EXPERTS], chosen: extras[TOP_K], width: extras[WIDTH]}


@dataclass
class ExpertDecoder(Decoder):
    """A decoder in which the MLP of a layer may be a choice of experts.

    Names are those of checkpoints: in a layer the ``block`` of the experts and the ``shared`` MLP,
    which every token takes if the table has it; in the block the ``router`` and the ``parts`` of an
    expert. ``made_dense`` are the weights that are not kept as they are stored, by why.
    """

    block: ClassVar[str] = "mlp"
    router: ClassVar[str] = "gate"
    parts: ClassVar[tuple[str, str, str]] = _MLP
    shared: ClassVar[str] = "mlp.shared_expert"

    made_dense: dict[str, list[str]] = field(default_factory=dict, init=False)

    def layers(self) -> ir.Value:
        """The layers, and a warning for experts that could not be kept as they are stored."""
        x = super().layers()
        for reason, names in self.made_dense.items():
            log.warning(
                "%d weights of experts (%s%s) become dense: %s",
                len(names), names[0], ", …" * (len(names) > 1), reason,
            )  # fmt: skip
        return x

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """The experts that the router chooses for each token, weighted, and what all tokens take;
        or a plain MLP where the table has no experts."""
        layer = prefix.removesuffix("mlp.")
        block = f"{layer}{self.block}."
        if not self.architecture.has(self.config, block + self.router):
            return super().mlp(x, prefix)
        chosen = self.chosen(x, block, self.routes(x, block + self.router))
        with self.ops.scope("shared"):
            shared = self.shared_mlp(x, layer + self.shared)
            return chosen if shared is None else self.ops.add(chosen, shared)

    def chosen(self, x: ir.Value, block: str, routes: Routes) -> ir.Value:
        """What the experts of a block that were chosen make of x, weighted."""
        *opening, closing = self.parts
        gate: Attributes = {"gated": 1, "gate": GATES[self.gate()]}
        with self.ops.scope("experts"):
            opened = self.experts(x, block, opening, routes, gate)
            closed = self.experts(opened, block, [closing], routes, {"reduce": 1})
            return self.reduced(closed, f"{block}experts.0.{closing}")

    def routes(self, x: ir.Value, router: str) -> Routes:
        """The experts of each token, by the router of this name."""
        name = f"{router}.{CORRECTION}"
        corrected = self.architecture.has(self.config, name)
        correction = self.tensor(name) if corrected else None
        return self.ops.router(self.linear(x, router), self.routing(), correction)

    def routing(self) -> Attributes:
        """How experts are chosen: attributes of ``plugins/router``."""
        extras = self.config.extras
        return {"top_k": extras[TOP_K], "renormalize": int(extras[RENORMALIZE])}

    def gate(self) -> str:
        """How the gate and the up of an expert meet: a key of ``GATES``."""
        return GATE_OF[self.config.hidden_act]

    def shared_mlp(self, x: ir.Value, name: str) -> ir.Value | None:
        """A plain MLP, times the sigmoid of its gate if the table has one; None if it has no such
        MLP."""
        if not self.architecture.has(self.config, f"{name}.down_proj"):
            return None
        y, gate = Decoder.mlp(self, x, f"{name}."), f"{name}_gate"
        if not self.architecture.has(self.config, gate):
            return y
        return self.ops.scale_rows(y, self.ops.sigmoid(self.linear(x, gate)))

    def experts(
        self,
        x: ir.Value,
        prefix: str,
        names: Sequence[str],
        routes: Routes,
        attributes: Mapping[str, int | float | list[int]],
    ) -> ir.Value:
        """x times the linears ``names`` of its experts, their rows one after the other."""
        number, joint = self.config.extras[EXPERTS], f"{prefix}experts.{'+'.join(names)}"
        places = [f"{prefix}experts.{expert}.{name}" for expert in range(number) for name in names]
        weight, reason = stack_experts([self.part(p, "weight") for p in places], f"{joint}.weight")
        if reason:
            self.made_dense.setdefault(reason, []).append(weight.name)
        bias = None
        if self.architecture.has_bias(self.config, places[0]):
            bias = stack_rows([self.part(p, "bias") for p in places], f"{joint}.bias")
        attributes = {**attributes, "experts": number}
        with self.ops.scope("+".join(names)):
            return self.ops.expert_linear(x, weight, routes, attributes, bias)

    def part(self, place: str, part: str) -> LazyTensor:
        """A weight or bias of an expert, by its module.

        Where the columns of the last weight are ordered (act-order), the rows of those before it
        are made in that order, so that none has to be chosen again.
        """
        expert, _, name = place.rpartition(".")
        shards, closing = self.shards, self.parts[2]
        tensor = shards.whole(f"{place}.{part}")
        order = order_of(shards.whole(f"{expert}.{closing}.weight"))
        if order is not None and name != closing:
            tensor = reorder_rows(tensor, order.astype(np.intp))
        elif order is not None and part == "weight":
            tensor = with_input(tensor, None)
        elif shards.ranks > 1 and name == closing and tensor.input is not None:
            tensor = as_dense(tensor, "float32")  # its columns may apply to x of other ranks
        return shards.of(f"{place}.{part}", tensor)
