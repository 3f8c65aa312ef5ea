"""What ranks do together as calls on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import Tensor

from slipstream.plugins.cuda.binding import Context, Kernel, Run, attributes_of, required_names

if TYPE_CHECKING:
    from slipstream.plugins.collectives.cuda.communicator import Communicator


def sent_name(x: str) -> str:
    """Under which a ``Sending`` of a tensor stands in what calls of a step share."""
    return f"sent {x}"


def all_reduce(node: ir.Node, context: Context) -> Kernel:
    """An AllReduce node."""
    (x,) = required_names(node)
    communicator = _of(context)

    def kernel(run: Run) -> Sequence[Tensor]:
        sent = run.shared.pop(sent_name(x), None)
        return (communicator.all_reduce(run.values[x], sent=sent, pdl=run.pdl),)

    return kernel


def all_reduce_add_rms_norm(node: ir.Node, context: Context) -> Kernel:
    """An AllReduceAddRMSNorm node."""
    x, residual, weight = required_names(node)
    eps, communicator = attributes_of(node)["norm_eps"], _of(context)

    def kernel(run: Run) -> Sequence[Tensor]:
        values, stream = run.values[x], run.values[residual]
        factors, sent = run.values[weight], run.shared.pop(sent_name(x), None)
        return communicator.all_reduce_add_norm(
            values, stream, factors, eps, sent=sent, pdl=run.pdl
        )

    return kernel


def all_gather(node: ir.Node, context: Context) -> Kernel:
    """An AllGather node, which puts what it makes where it is wanted."""
    (x,) = required_names(node)
    communicator = _of(context)

    def kernel(run: Run) -> Sequence[Tensor]:
        return (communicator.all_gather(run.values[x], out=run.out, pdl=run.pdl),)

    return kernel


def _of(context: Context) -> Communicator:
    assert context.communicator is not None, "a graph of several ranks runs among them"
    return context.communicator
