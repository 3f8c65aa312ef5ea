"""The lowered graph of a CUDA engine, as a list of kernel calls on torch tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import (
    HEAD_GRAPH,
    HIDDEN,
    LOGITS,
    NEXT_HIDDEN,
    STATES,
    TARGET_GRAPH,
    GraphSpec,
    states,
)
from slipstream.builder.engine import Manifest
from slipstream.errors import EngineMismatchError
from slipstream.plugins.cuda.binding import (
    Binding,
    Context,
    Environment,
    Kernel,
    Memory,
    Run,
    Step,
    bind,
    dtype_of,
    name_of,
)
from slipstream.plugins.cuda.precompile import recording
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.node import node_problem
from slipstream.plugins.paged_attention.cuda.bind import attention_attributes

if TYPE_CHECKING:  # engines of one rank start without it
    from slipstream.plugins.collectives.cuda.communicator import Communicator

_ALIGNED = 16  # bytes: a pointer to such a place has a kernel of its own


@dataclass(frozen=True, slots=True)
class _Call:
    kernel: Kernel
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    form: str  # that of calls of the same kernels, in other layers


class CUDAProgram:
    """Runs the graph in two halves: all layers (``hidden``), then norm and head (``logits``), or
    what is pooled in their place (``pools``).

    Between them, at the seam of the graph's contract ``spec``, stand the rows whose logits are
    wanted, which the executor gathers. ``attention`` has the attributes of every PagedAttention.
    ``calls`` says how calls of the graph's own functions are run, ``communicator`` speaks to other
    ranks. The states that a head takes are made where the graph has such an output and it
    ``gives_states``.
    EngineMismatchError for a graph that its manifest or the specs of operators contradict.
    """

    def __init__(
        self,
        graph: ir.Graph,
        spec: GraphSpec,
        weights: Mapping[str, Tensor],
        tactics: Tactics,
        device: torch.device,
        calls: Mapping[str, Binding],
        communicator: Communicator | None = None,
        gives_states: bool = False,
    ) -> None:
        nodes = list(graph)
        _check(graph, spec)
        self._constants = _constants(graph, weights, device)
        assert spec.seam is not None
        self._seam, self._rows = spec.seam
        split = next(i for i, node in enumerate(nodes) if self._rows == name_of(node.outputs[0]))
        self.inputs = spec.inputs
        self.pools = spec.output(STATES) is not None
        self.dtype = dtype_of(nodes[split])
        self.hidden_size = _width(nodes[split].outputs[0])
        self.attention = [
            attention_attributes(node) for node in nodes if node.op_type == "PagedAttention"
        ]
        states = [HIDDEN] if gives_states else []
        body = _wanted(nodes[:split], {self._seam, *states})
        made = {name_of(value): value for node in body for value in node.outputs}
        self.states_size = _width(made[HIDDEN]) if states else 0
        tail = nodes[split + 1 :]
        ends = next((node for node in tail if node.op_type == "ArgMax"), None)
        result = graph.outputs[-1] if ends is None else ends.inputs[0]
        assert result is not None
        self._result, self.vocab_size = name_of(result), _width(result)
        # Whoever wants the best token of each row asks for the logits, and finds it by himself.
        tail = _wanted(tail, {self._result, *(name for name in (NEXT_HIDDEN,) if ends)})
        context = Context(self._constants, tactics, calls, communicator)
        kept = {*self._constants, self._seam, self._rows, self._result, HIDDEN, NEXT_HIDDEN}
        self._body = _compile(body, context, kept)
        tail, gather = _parted(tail)
        # What there is of a rank's part of the vocabulary.
        self._part = gather[0].inputs[0] if gather else None
        if self._part is not None:
            kept.add(name_of(self._part))
        self._tail = _compile(tail, context, kept)
        self._gather = _compile(gather, context, kept)

    def hidden(
        self, step: Step, memory: Memory, out: Tensor | None = None, states: Tensor | None = None
    ) -> Tensor:
        """The residual stream ``[T, hidden]`` after the last layer, in ``out`` if given; in
        ``states`` those that a head takes, if it gives some."""
        run = Run({**self._constants, **step.inputs}, step.pdl, step, memory)
        _execute(self._body, run, {self._seam: out, HIDDEN: states})
        return run.values[self._seam]

    def logits(self, rows: Tensor, out: Tensor, pdl: bool = False) -> Tensor:
        """float32 logits, or states, of rows ``[L, hidden]`` into ``out [L, vocab]``.

        Returns what a head takes beside the next token, of a graph that is one's; else the rows.
        """
        run = Run({**self._constants, self._rows: rows}, pdl)
        _execute(self._tail, run, {self._result: out})
        _execute(self._gather, run, {self._result: out})
        return run.values.get(NEXT_HIDDEN, rows)

    @property
    def part_size(self) -> int:
        """Of how many tokens a rank computes the logits; 0 where it is all."""
        return 0 if self._part is None else _width(self._part)

    def part(self, rows: Tensor, pdl: bool = False) -> Tensor:
        """float32 logits ``[L, part_size]`` of rows ``[L, hidden]``, those of this rank."""
        assert self._part is not None
        run = Run({**self._constants, self._rows: rows}, pdl)
        _execute(self._tail, run, {})
        return run.values[name_of(self._part)]


def _width(value: ir.Value) -> int:
    """Columns of a value."""
    assert value.shape is not None
    return int(value.shape[1])  # type: ignore[arg-type]


def _parted(tail: list[ir.Node]) -> tuple[list[ir.Node], list[ir.Node]]:
    """A head without what gathers its columns from all ranks at the end, and that."""
    last = len(tail)
    while last and tail[last - 1].op_type == "Slice":
        last -= 1
    if last and tail[last - 1].op_type == "AllGather":
        return tail[: last - 1], tail[last - 1 :]
    return tail, []


def _wanted(nodes: Sequence[ir.Node], results: Collection[str]) -> list[ir.Node]:
    """The nodes that some results are made by, in their order."""
    needed, found = set(results), list[ir.Node]()
    for node in reversed(nodes):
        if needed & {name_of(value) for value in node.outputs}:
            needed |= {name_of(value) for value in node.inputs if value is not None}
            found.append(node)
    return found[::-1]


def _check(graph: ir.Graph, spec: GraphSpec) -> None:
    """EngineMismatchError for a graph that does not take what its manifest says, or whose nodes do
    not fit the specs of their operators: kernels trust both."""
    wanted = {port.name: port.shape for port in spec.inputs}
    for value in graph.inputs:
        shape = () if value.shape is None else value.shape.dims
        found = tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
        if wanted.pop(value.name or "", None) != found:
            raise EngineMismatchError(
                f"input {value.name} of {spec.file} has shape {list(found)}, which is not that of "
                "the manifest; build the engine again"
            )
    if wanted:
        raise EngineMismatchError(
            f"{spec.file} lacks the inputs {', '.join(wanted)}; build the engine again"
        )
    for node in graph:
        if problem := node_problem(node):
            raise EngineMismatchError(f"{spec.file}: {problem}; build the engine again")


def _execute(calls: Sequence[_Call], run: Run, outs: Mapping[str, Tensor | None]) -> None:
    """Put what calls make into the values of a run; of some names, into places that are given."""
    made: dict[str, Sequence[Tensor]] | None = {} if recording() else None
    for call in calls:
        out = outs.get(call.outputs[0])
        own = run if out is None else replace(run, out=out)
        results = call.kernel(own) if made is None else _once(call, own, made)
        if out is not None:
            # A Linear fills a given output; where another operator makes it, a copy does.
            first, *others = results
            results = [first if first is out else out.copy_(first), *others]
        run.values.update(zip(call.outputs, results, strict=True))
        for name in call.dead:  # so that a long prefill holds one layer's tensors, not all
            del run.values[name]


def _once(call: _Call, run: Run, made: dict[str, Sequence[Tensor]]) -> Sequence[Tensor]:
    """What a call of this form has made in the step already, whose kernels are recorded."""
    if call.form not in made:
        made[call.form] = call.kernel(run)
    return made[call.form]


def _form(node: ir.Node, constants: Mapping[str, Tensor]) -> str:
    """All that kernels of a node are chosen and compiled by, but the number of tokens."""
    inputs: list[object] = []
    for value in node.inputs:
        weight = None if value is None else constants.get(name_of(value))
        if weight is None:
            inputs.append(None if value is None else (value.type, value.shape))
        else:
            inputs.append((weight.dtype, weight.shape, weight.data_ptr() % _ALIGNED))
    outputs = [(value.type, value.shape) for value in node.outputs]
    attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
    return f"{node.domain} {node.op_type} {inputs} {outputs} {attributes}"


def _compile(nodes: Sequence[ir.Node], context: Context, kept: set[str]) -> list[_Call]:
    last_use = {name_of(v): i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
    dead: dict[int, list[str]] = {}
    made = {name_of(value) for node in nodes for value in node.outputs}
    for name, index in last_use.items():
        if name in made and name not in kept:
            dead.setdefault(index, []).append(name)
    return [
        _Call(
            bind(node, context),
            tuple(name_of(value) for value in node.outputs),
            tuple(dead.get(index, ())),
            _form(node, context.constants),
        )
        for index, node in enumerate(nodes)
    ]


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


def target_spec(manifest: Manifest) -> GraphSpec:
    """The target's graph of an engine that has what this executor runs."""
    spec, caches = manifest.graphs[TARGET_GRAPH], manifest.caches
    outputs = [output.name for output in spec.outputs if output.name != HIDDEN]
    known = manifest.graphs.keys() <= {TARGET_GRAPH, HEAD_GRAPH}
    simple = known and not states(caches) and outputs in ([LOGITS], [STATES])
    if not simple or spec.seam is None or any(len(cache.arrays) != 1 for cache in caches):
        raise EngineMismatchError(
            f"the engine has graphs {', '.join(manifest.graphs)}, caches "
            f"{', '.join(cache.name for cache in manifest.caches)} and outputs "
            f"{', '.join(outputs)}; a GPU runs a graph in two halves, and one of a head, on pages "
            "of one array, for its logits or states: build it with --target cpu"
        )
    return spec
