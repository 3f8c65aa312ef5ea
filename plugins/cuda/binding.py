"""How a node of a lowered graph becomes a call on a GPU.

An operator's spec names its binding in ``cuda``: a function of a node and a ``Context`` that
returns a ``Kernel``, in which everything that is known before a step is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.errors import EngineMismatchError
from slipstream.extensions import load
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.operators import GROUP, OPERATORS, SEGMENTS
from slipstream.plugins.paged_attention.cuda.attention import DecodeWorkspace, StepTensors

if TYPE_CHECKING:  # whose fallback is made of kernels that are bound with this module's types
    from slipstream.plugins.collectives.cuda.communicator import Communicator

Environment = dict[str, Tensor]
# In what calls of a step share, once a kernel has let no other begin before all in front of it had
# ended: of what comes behind, each may read before it waits what is older than the one in front.
SETTLED = "settled"
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT16: torch.float16,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step's inputs on the device, by name; ``attention`` has what only attention reads, by
    the name of the page table.

    int32, as ``token_slots [T]`` (the slot whose last token stands for an id of -1). ``pdl`` lets
    kernels begin before those in front of them have ended.
    """

    inputs: Mapping[str, Tensor]
    token_slots: Tensor
    attention: Mapping[str, StepTensors]
    pdl: bool


@dataclass(slots=True)
class Memory:
    """What all steps share on the device; ``pages`` are the arrays of caches, by name."""

    pages: Mapping[str, Tensor]
    last_tokens: Tensor
    workspace: DecodeWorkspace


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a call can reach: tensors by name, the step, where the result must go, and
    what calls of a step make once for each other."""

    values: Environment
    pdl: bool
    step: Step | None = None
    memory: Memory | None = None
    out: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str | None) -> Tensor | None:
        """A tensor, or None for an input left out."""
        return None if name is None else self.values[name]

    def kv(self) -> tuple[Step, Memory]:
        """The step and the memory of a call among the layers."""
        assert self.step is not None and self.memory is not None
        return self.step, self.memory


@dataclass(frozen=True, slots=True)
class Context:
    """What is known when a graph is loaded: weights and small arrays by name, the tactics, how
    calls of the graph's functions are run, by the name of the node, and who speaks to the other
    ranks, if there are any."""

    constants: Mapping[str, Tensor]
    tactics: Tactics
    calls: Mapping[str, Binding] = field(default_factory=dict)
    communicator: Communicator | None = None


Kernel = Callable[[Run], Sequence[Tensor]]
Binding = Callable[[ir.Node, Context], Kernel]


def bind(node: ir.Node, context: Context) -> Kernel:
    """The call that a node is; EngineMismatchError where its operator has no GPU kernel."""
    if node.domain == SEGMENTS:
        target = context.calls.get(node.name or "")
    else:
        target = _standard(node.op_type) if node.domain == "" else _custom(node.op_type)
    if target is None:
        raise EngineMismatchError(f"operator {node.domain}.{node.op_type} has no kernel for a GPU")
    return target(node, context)


def _standard(op_type: str) -> Binding | None:
    # Imported late: it binds with this module's types.
    from slipstream.plugins.cuda.standard import BINDINGS

    return BINDINGS.get(op_type)


def _custom(op_type: str) -> Binding | None:
    spec = OPERATORS.get(op_type)
    if spec is None or spec.cuda is None:
        return None
    binding: Binding = load(spec.cuda, "bind", GROUP)
    return binding


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """All attributes of one of the table's operators, in the types of its spec.

    EngineMismatchError for one of another type or out of range.
    """
    try:
        return {**OPERATORS[node.op_type].complete({a.name: a.value for a in _given(node)})}
    except (TypeError, ValueError) as error:
        raise EngineMismatchError(f"{node.name}: {error}") from error


def _given(node: ir.Node) -> list[ir.Attr]:
    return [a for a in node.attributes.values() if isinstance(a, ir.Attr)]


def input_names(node: ir.Node, count: int) -> list[str | None]:
    """Names of a node's first ``count`` inputs, None for those left out."""
    names = [None if value is None else name_of(value) for value in node.inputs[:count]]
    return names + [None] * (count - len(names))


def required_names(node: ir.Node) -> list[str]:
    """Names of a node's inputs, all of which are there."""
    return [name_of(value) for value in node.inputs]


def name_of(value: ir.Value | None) -> str:
    """The name of a value."""
    assert value is not None and value.name is not None
    return value.name


def dtype_of(node: ir.Node) -> torch.dtype:
    """The type of what a node makes."""
    return dtype_of_value(node.outputs[0])


def dtype_of_value(value: ir.Value) -> torch.dtype:
    """The type of a value."""
    assert value.dtype is not None
    return _TORCH[value.dtype]
