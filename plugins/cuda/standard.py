"""The operators of ONNX itself that stand in a lowered graph, on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.plugins.cuda.binding import Binding, Context, Kernel, Run, required_names
from slipstream.plugins.rms_norm.cuda import rms_norm


def _norm(node: ir.Node, context: Context) -> Kernel:
    x, weight = required_names(node)
    eps = node.attributes["epsilon"].as_float()

    def kernel(run: Run) -> Sequence[Tensor]:
        y = rms_norm(run.values[x], run.values[weight], eps, pdl=run.pdl)
        assert isinstance(y, Tensor)
        return (y,)

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
    of its rows, how much of a shared expert a token takes."""
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


def _order(node: ir.Node, context: Context) -> Kernel:
    """Columns of x in another order (act-order)."""
    x, order = required_names(node)
    assert node.attributes["axis"].as_int() == 1, "rows are gathered between the halves"
    return lambda run: (torch.index_select(run.values[x], 1, run.values[order]),)


BINDINGS: dict[str, Binding] = {
    "RMSNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "Add": _add,
    "Concat": _concat,
    "Mul": _scale,
    "Sigmoid": _sigmoid,
    "Clip": _clip,
    "Gather": _order,
}
