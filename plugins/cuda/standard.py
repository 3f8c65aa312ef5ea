"""The operators of ONNX itself that stand in a lowered graph, on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.plugins.cuda.binding import Binding, Context, Kernel, Run, required_names
from slipstream.plugins.rms_norm.cuda import rms_norm


def _numbers(node: ir.Node, index: int) -> list[int]:
    """What an input holds that is known when a graph is built; a device may be one that is only
    planned, where tensors hold nothing."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None, node.name
    numbers: list[int] = value.const_value.numpy().reshape(-1).tolist()
    return numbers


def _norm(node: ir.Node, context: Context) -> Kernel:
    x, weight = required_names(node)
    eps = node.attributes["epsilon"].as_float()

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens, factors = run.values[x], run.values[weight]
        y = rms_norm(tokens.reshape(-1, len(factors)), factors, eps, pdl=run.pdl)
        assert isinstance(y, Tensor)
        return (y.view(tokens.shape),)

    return kernel


def _layer_norm(node: ir.Node, context: Context) -> Kernel:
    x, weight = required_names(node)
    eps = node.attributes["epsilon"].as_float()

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens, factors = run.values[x], run.values[weight]
        return (torch.nn.functional.layer_norm(tokens, factors.shape, factors, eps=eps),)

    return kernel


def _add(node: ir.Node, context: Context) -> Kernel:
    a, b = required_names(node)
    return lambda run: (run.values[a] + run.values[b],)


def _concat(node: ir.Node, context: Context) -> Kernel:
    names = required_names(node)
    return lambda run: (torch.cat([run.values[name] for name in names], dim=-1),)


def _scale(node: ir.Node, context: Context) -> Kernel:
    """x times numbers: of its columns, float32, what a weight wants done to x (AWQ, SmoothQuant);
    of its rows, how much of a shared expert a token takes; of all."""
    x, scale = required_names(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        return (torch.mul(tokens, run.values[scale], out=torch.empty_like(tokens)),)

    return kernel


def _sigmoid(node: ir.Node, context: Context) -> Kernel:
    (x,) = required_names(node)
    return lambda run: (torch.sigmoid(run.values[x]),)


def _clip(node: ir.Node, context: Context) -> Kernel:
    x, lowest, highest = required_names(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        return (torch.clamp(tokens, run.values[lowest], run.values[highest]).to(tokens.dtype),)

    return kernel


def _gather(node: ir.Node, context: Context) -> Kernel:
    """Columns of x in another order (act-order), or the numbers of some of a list."""
    x, order = required_names(node)
    axis = node.attributes.get_int("axis", 0)

    def kernel(run: Run) -> Sequence[Tensor]:
        given, indices = run.values[x], run.values[order].reshape(-1)
        picked = torch.index_select(given, axis, indices)
        return (picked if axis else picked.view(*run.values[order].shape, *given.shape[1:]),)

    return kernel


def _slice(node: ir.Node, context: Context) -> Kernel:
    """Some columns of x, where they are."""
    x = required_names(node)[0]
    first, end, axis = (_numbers(node, index)[0] for index in (1, 2, 3))
    return lambda run: (run.values[x].narrow(axis, first, end - first),)


def _reshape(node: ir.Node, context: Context) -> Kernel:
    """The same numbers in another shape, whose rows (0) are those of x."""
    x = required_names(node)[0]
    _, *sizes = _numbers(node, 1)
    return lambda run: (run.values[x].reshape(-1, *sizes),)


def _equal(node: ir.Node, context: Context) -> Kernel:
    a, b = required_names(node)
    return lambda run: (run.values[a] == run.values[b],)


def _unsqueeze(node: ir.Node, context: Context) -> Kernel:
    x = required_names(node)[0]
    (axis,) = _numbers(node, 1)
    return lambda run: (run.values[x].unsqueeze(axis),)


def _where(node: ir.Node, context: Context) -> Kernel:
    found, a, b = required_names(node)
    return lambda run: (torch.where(run.values[found], run.values[a], run.values[b]),)


def _mean(node: ir.Node, context: Context) -> Kernel:
    """The mean of every row, ``[T, 1]``, in float32."""
    x = required_names(node)[0]
    return lambda run: (run.values[x].mean(-1, keepdim=True, dtype=torch.float32),)


def _root(node: ir.Node, context: Context) -> Kernel:
    (x,) = required_names(node)
    return lambda run: (torch.sqrt(run.values[x]),)


def _quotient(node: ir.Node, context: Context) -> Kernel:
    """Rows over a number each, in the type of the rows."""
    x, divisor = required_names(node)
    return lambda run: ((run.values[x] / run.values[divisor]).to(run.values[x].dtype),)


BINDINGS: dict[str, Binding] = {
    "RMSNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "Add": _add,
    "Concat": _concat,
    "Mul": _scale,
    "Sigmoid": _sigmoid,
    "Clip": _clip,
    "Gather": _gather,
    "Slice": _slice,
    "Reshape": _reshape,
    "Equal": _equal,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "ReduceMean": _mean,
    "Sqrt": _root,
    "Div": _quotient,
}
