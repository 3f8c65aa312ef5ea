"""The lowered graph of a CUDA engine, as a list of kernel calls on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import GraphSpec
from slipstream.plugins.gated_mlp.cuda import gated_activation
from slipstream.plugins.linear.cuda.host import DeviceWeight, embedding, linear
from slipstream.plugins.linear.cuda.packing import format_of
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.paged_attention.cuda import (
    DecodeWorkspace,
    StepTensors,
    paged_attention,
)
from slipstream.plugins.paged_attention.reference import Attributes
from slipstream.plugins.rms_norm.cuda import rms_norm
from slipstream.plugins.rotary.cuda import rotary_angles

Environment = dict[str, Tensor]
_FORMAT_DEFAULTS = {"zero_kind": 0, "scale_bytes": 4}
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT16: torch.float16,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step's inputs on the device, by name; ``attention`` has what only attention reads.

    int32, as ``token_slots [T]`` (the slot whose last token stands for an id of -1). ``pdl`` lets
    kernels begin before those in front of them have ended.
    """

    inputs: Mapping[str, Tensor]
    token_slots: Tensor
    attention: StepTensors
    pdl: bool


@dataclass(slots=True)
class Memory:
    """What all steps share on the device."""

    kv_cache: Tensor
    last_tokens: Tensor
    workspace: DecodeWorkspace


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything that a call can reach: tensors by name, the step, and where the result must go."""

    values: Environment
    pdl: bool
    step: Step | None = None
    memory: Memory | None = None
    out: Tensor | None = None

    def get(self, name: str | None) -> Tensor | None:
        return None if name is None else self.values[name]

    def kv(self) -> tuple[Step, Memory]:
        assert self.step is not None and self.memory is not None
        return self.step, self.memory


Kernel = Callable[[_Run], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class _Call:
    kernel: Kernel
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


class CUDAProgram:
    """Runs the graph in two halves: all layers (``hidden``), then norm and head (``logits``).

    Between them, at the seam of the graph's contract ``spec``, stand the rows whose logits are
    wanted, which the executor gathers. ``attention`` has the attributes of every PagedAttention.
    """

    def __init__(
        self,
        graph: ir.Graph,
        spec: GraphSpec,
        weights: Mapping[str, Tensor],
        tactics: Tactics,
        device: torch.device,
    ) -> None:
        self._constants = _constants(graph, weights, device)
        nodes = list(graph)
        assert spec.seam is not None
        hidden, self._rows = spec.seam
        split = next(i for i, node in enumerate(nodes) if self._rows == _name(node.outputs[0]))
        self.inputs = spec.inputs
        self.dtype = node_dtype(nodes[split])
        self.hidden_size, self.vocab_size = (
            int(value.shape[1])  # type: ignore[index,arg-type]
            for value in (nodes[split].outputs[0], graph.outputs[0])
        )
        self.attention = [
            _attention_attributes(node) for node in nodes if node.op_type == "PagedAttention"
        ]
        kept = {*self._constants, hidden}
        self._body = _compile(nodes[:split], self._constants, tactics, kept)
        self._tail = _compile(nodes[split + 1 :], self._constants, tactics, kept)

    def hidden(self, step: Step, memory: Memory, out: Tensor | None = None) -> Tensor:
        """The residual stream ``[T, hidden]`` after the last layer, in ``out`` if given."""
        run = _Run({**self._constants, **step.inputs}, step.pdl, step, memory)
        return _execute(self._body, run, out)

    def logits(self, rows: Tensor, out: Tensor, pdl: bool = False) -> None:
        """float32 logits of rows ``[L, hidden]`` into ``out [L, vocab]``."""
        _execute(self._tail, _Run({**self._constants, self._rows: rows}, pdl), out)


def _execute(calls: Sequence[_Call], run: _Run, out: Tensor | None) -> Tensor:
    """The first output of the last call, which goes to ``out``."""
    *others, last = calls
    for call in others:
        run.values.update(zip(call.outputs, call.kernel(run), strict=True))
        for name in call.dead:  # so that a long prefill holds one layer's tensors, not all
            del run.values[name]
    result = last.kernel(replace(run, out=out))[0]
    assert out is None or result is out, "only a Linear fills a given output"
    return result


def _compile(
    nodes: Sequence[ir.Node], constants: Environment, tactics: Tactics, kept: set[str]
) -> list[_Call]:
    last_use = {_name(v): i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
    dead: dict[int, list[str]] = {}
    made = {_name(value) for node in nodes for value in node.outputs}
    for name, index in last_use.items():
        if name in made and name not in kept:
            dead.setdefault(index, []).append(name)
    return [
        _Call(
            _KERNELS[node.op_type](node, constants, tactics),
            tuple(_name(value) for value in node.outputs),
            tuple(dead.get(index, ())),
        )
        for index, node in enumerate(nodes)
    ]


def _embedding(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    ids = _name(node.inputs[0])
    weight = node_weight(node, constants)
    dtype = node_dtype(node)

    def kernel(run: _Run) -> Sequence[Tensor]:
        step, memory = run.kv()
        found = embedding(
            run.values[ids],
            weight,
            dtype,
            last_tokens=memory.last_tokens,
            slots=step.token_slots,
            pdl=run.pdl,
        )
        return (found,)

    return kernel


def _linear(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    x, _, bias, residual, norm = (*_names(node), None, None, None)[:5]
    assert x is not None
    weight = node_weight(node, constants)
    attributes = node.attributes
    gated = bool(attributes.get_int("gated", 0))
    eps = attributes.get_float("norm_eps", 0.0)
    dtype = node_dtype(node)

    def kernel(run: _Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        y = linear(
            tokens,
            weight,
            bias=run.get(bias),
            residual=run.get(residual),
            norm_weight=run.get(norm),
            norm_eps=eps,
            gated=gated,
            out_dtype=dtype,
            tactic=tactics.find(weight.format, gated, tokens.shape[0]),
            out=run.out,
            pdl=run.pdl,
        )
        return (y,)

    return kernel


def _rotary(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    positions, frequencies = _names(node)
    factor = node.attributes.get_float("factor", 1.0)

    def kernel(run: _Run) -> Sequence[Tensor]:
        inputs = (run.values[positions], run.values[frequencies])
        return rotary_angles(*inputs, factor=factor, pdl=run.pdl)

    return kernel


def _attention(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    qkv, cos, sin = _names(node)[:3]
    q_norm, k_norm, sinks = (*_names(node)[9:], None, None, None)[:3]
    attributes = _attention_attributes(node)

    def kernel(run: _Run) -> Sequence[Tensor]:
        step, memory = run.kv()
        attended = paged_attention(
            run.values[qkv],
            run.values[cos],
            run.values[sin],
            memory.kv_cache,
            step.attention,
            attributes,
            q_norm=run.get(q_norm),
            k_norm=run.get(k_norm),
            sinks=run.get(sinks),
            workspace=memory.workspace,
            pdl=run.pdl,
        )
        return (attended,)

    return kernel


def _attention_attributes(node: ir.Node) -> Attributes:
    names = Attributes.__dataclass_fields__
    return Attributes(**{a.name: a.value for a in node.attributes.values() if a.name in names})


def _gate(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    (gate_up,) = _names(node)
    return lambda run: (gated_activation(run.values[gate_up], pdl=run.pdl),)


def _norm(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    x, weight = _names(node)
    eps = node.attributes["epsilon"].as_float()

    def kernel(run: _Run) -> Sequence[Tensor]:
        y = rms_norm(run.values[x], run.values[weight], eps, pdl=run.pdl)
        assert isinstance(y, Tensor)
        return (y,)

    return kernel


def _add_norm(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    x, residual, weight = _names(node)
    eps = node.attributes["norm_eps"].as_float()

    def kernel(run: _Run) -> Sequence[Tensor]:
        values = run.values
        both = rms_norm(values[x], values[weight], eps, residual=values[residual], pdl=run.pdl)
        assert isinstance(both, tuple)
        return both

    return kernel


def _add(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    a, b = _names(node)
    return lambda run: (run.values[a] + run.values[b],)


def _concat(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    names = _names(node)
    return lambda run: (torch.cat([run.values[name] for name in names], dim=-1),)


def _scale(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    """Columns of x times a float32 vector: what a weight wants done to x (AWQ, SmoothQuant)."""
    x, scale = _names(node)

    def kernel(run: _Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        return (torch.mul(tokens, run.values[scale], out=torch.empty_like(tokens)),)

    return kernel


def _order(node: ir.Node, constants: Environment, tactics: Tactics) -> Kernel:
    """Columns of x in another order (act-order)."""
    x, order = _names(node)
    assert node.attributes["axis"].as_int() == 1, "rows are gathered between the halves"
    return lambda run: (torch.index_select(run.values[x], 1, run.values[order]),)


_KERNELS: dict[str, Callable[[ir.Node, Environment, Tactics], Kernel]] = {
    "Embedding": _embedding,
    "Linear": _linear,
    "RotaryAngles": _rotary,
    "PagedAttention": _attention,
    "GatedActivation": _gate,
    "RMSNormalization": _norm,
    "FusedAddRMSNorm": _add_norm,
    "Add": _add,
    "Concat": _concat,
    "Mul": _scale,
    "Gather": _order,
}


def _constants(graph: ir.Graph, weights: Mapping[str, Tensor], device: torch.device) -> Environment:
    """Weights by name, and the small arrays that live in the graph."""
    found: Environment = {}
    for name, value in graph.initializers.items():
        if name in weights:
            found[name] = weights[name]
        else:
            assert value.const_value is not None, name
            found[name] = torch.from_numpy(value.const_value.numpy().copy()).to(device)
    return found


def node_weight(node: ir.Node, weights: Mapping[str, Tensor]) -> DeviceWeight:
    """The weight of a Linear or an Embedding, in its blob."""
    values = {a.name: a.value for a in node.attributes.values() if a.type == ir.AttributeType.INT}
    blob = weights[_name(node.inputs[1])]
    return DeviceWeight.from_blob(blob, format_of({**_FORMAT_DEFAULTS, **values}))


def node_dtype(node: ir.Node) -> torch.dtype:
    """The type of what a node makes."""
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return _TORCH[dtype]


def _names(node: ir.Node) -> list[Any]:
    """Names of a node's inputs, None for those left out."""
    return [None if value is None else _name(value) for value in node.inputs]


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name
