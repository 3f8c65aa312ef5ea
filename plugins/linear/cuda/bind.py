"""Linear and Embedding nodes as calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.plugins.collectives.cuda.bind import sent_name
from slipstream.plugins.cuda.binding import (
    Context,
    Kernel,
    Run,
    attributes_of,
    dtype_of,
    input_names,
    name_of,
)
from slipstream.plugins.linear.cuda import linear as kernels
from slipstream.plugins.linear.cuda.blas import Rounding, rounds_to
from slipstream.plugins.linear.cuda.packing import format_of
from slipstream.plugins.linear.cuda.tactics import Tactics, multiplies_in
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.rms_norm.cuda import empty_codes

_MAKERS = ("Linear", "Embedding")


def weight_of(node: ir.Node, weights: Mapping[str, Tensor]) -> DeviceWeight:
    """The weight of a Linear or an Embedding, in its blob."""
    return DeviceWeight.from_blob(weights[name_of(node.inputs[1])], format_of(attributes_of(node)))


@dataclass(frozen=True, slots=True)
class _Reader:
    """A Linear that reads what another one makes; ``name`` is that of its own result."""

    name: str
    weight: DeviceWeight
    gated: bool
    norm: str | None
    eps: float
    dtype: torch.dtype

    def rounding(self, tokens: int, run: Run, tactics: Tactics) -> Rounding | None:
        """Room for its x of so many tokens, if it takes that in the type of its codes."""
        fmt, device = self.weight.format, self.weight.codes.device
        dtype = rounds_to(fmt, tokens, device, self.dtype)
        tactic = tactics.find(fmt, self.gated, tokens)
        if dtype is None or not (tactic.rounds or tactic.kernel == "blas"):
            return None
        codes, scales = empty_codes(tokens, fmt.shape[1], dtype, device)
        return Rounding(codes, scales, self.weight.input_scale, run.get(self.norm), self.eps)


def _reader_of(node: ir.Node, context: Context) -> _Reader | None:
    """Who may read the result of a Linear rounded: that of a gate without a norm, and alone; the
    sum of a float8 product and a residual after its norm."""
    value = node.outputs[0]
    uses = [use.node for use in value.uses()]
    _, _, bias, residual, _ = input_names(node, 5)
    gated = attributes_of(node)["gated"]
    sums = residual and not bias and not gated
    if multiplies_in(weight_of(node, context.constants).format) != "float8":
        sums = False
    for reader in uses:
        if reader.op_type != "Linear" or reader.inputs[0] is not value:
            continue
        norm = input_names(reader, 5)[4]
        if (sums and norm) or (gated and not residual and not norm and len(uses) == 1):
            own, weight = attributes_of(reader), weight_of(reader, context.constants)
            name, dtype = name_of(reader.outputs[0]), dtype_of(reader)
            return _Reader(name, weight, bool(own["gated"]), norm, own["norm_eps"], dtype)
    return None


def _ends_residual(node: ir.Node) -> bool:
    """Whether a Linear is the last to read its residual, which is the result of a Linear or the
    rows of an Embedding, and no part of anything else: the sum may then take its place."""
    residual = node.inputs[3] if len(node.inputs) > 3 else None
    maker = None if residual is None else residual.producer()
    if residual is None or maker is None or residual.is_graph_output() or node.graph is None:
        return False
    readers = [use.node for use in residual.uses()]
    whole = maker.op_type in _MAKERS and all(reader.op_type in _MAKERS for reader in readers)
    return whole and node is next(n for n in reversed(node.graph) if n in readers)


def _is_added_up(node: ir.Node) -> bool:
    """Whether all that becomes of a Linear is a sum over all ranks."""
    value = node.outputs[0]
    readers = [use.node.op_type for use in value.uses()]
    sums = readers in (["AllReduce"], ["AllReduceAddRMSNorm"])
    return sums and not value.is_graph_output()


def _in_pieces(node: ir.Node, context: Context, whole: Kernel) -> Kernel:
    """A Linear that is added up: of many tokens some go to the other ranks while more are computed.

    ``whole`` is its kernel at once.
    """
    communicator, attributes = context.communicator, attributes_of(node)
    x, result = name_of(node.inputs[0]), name_of(node.outputs[0])
    weight, dtype = weight_of(node, context.constants), dtype_of(node)
    fmt, gated = weight.format, bool(attributes["gated"])
    _, _, bias, residual, norm = input_names(node, 5)
    plain = not (gated or residual or norm)
    if communicator is None or not plain:
        return whole

    def kernel(run: Run) -> Sequence[Tensor]:
        values = run.values[x]
        tactic, tokens = context.tactics.find(fmt, gated, len(values)), len(values)
        # A weight that is written out in the type of x would be so for every piece.
        codes = rounds_to(fmt, tokens, values.device, dtype)
        read_as_it_is = fmt.kind == "dense" or codes == torch.float8_e4m3fn
        sending = None
        if tactic.kernel == "blas" and read_as_it_is and run.out is None:
            sending = communicator.sending(tokens, fmt.shape[0], dtype)
        if sending is None:
            return whole(run)
        rounded = run.shared.pop(f"x of {result}", None)
        for part in sending.filling():
            kernels.linear(
                values[part],
                weight,
                bias=run.get(bias),
                out_dtype=dtype,
                tactic=tactic,
                out=sending.x[part],
                pdl=run.pdl,
                rounded=None if rounded is None else rounded.rows(part),
            )
        run.shared[sent_name(result)] = sending
        return (sending.x,)

    return kernel


def linear(node: ir.Node, context: Context) -> Kernel:
    """The kernel of a step is that of the tactic for its tokens."""
    whole = _linear(node, context)
    return _in_pieces(node, context, whole) if _is_added_up(node) else whole


def _linear(node: ir.Node, context: Context) -> Kernel:
    _, _, bias, residual, norm = input_names(node, 5)
    x = name_of(node.inputs[0])
    weight = weight_of(node, context.constants)
    attributes = attributes_of(node)
    gated, gate, eps = bool(attributes["gated"]), attributes["gate"], attributes["norm_eps"]
    dtype, result = dtype_of(node), name_of(node.outputs[0])
    next_linear, in_place = _reader_of(node, context), _ends_residual(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        tactic = context.tactics.find(weight.format, gated, tokens.shape[0])
        reader = None
        if next_linear is not None and tactic.kernel == "blas":
            reader = next_linear.rounding(tokens.shape[0], run, context.tactics)
        out = run.out
        if in_place and tactic.kernel == "blas" and out is None:
            old = run.get(residual)
            out = old if old is not None and old.dtype == dtype else None
        y = kernels.linear(
            tokens,
            weight,
            bias=run.get(bias),
            residual=run.get(residual),
            norm_weight=run.get(norm),
            norm_eps=eps,
            gated=gated,
            gate=gate,
            out_dtype=dtype,
            tactic=tactic,
            out=out,
            pdl=run.pdl,
            rounded=run.shared.pop(f"x of {result}", None),
            reader=reader,
        )
        if next_linear is not None and reader is not None:
            run.shared[f"x of {next_linear.name}"] = reader
        return (y,)

    return kernel


def embedding(node: ir.Node, context: Context) -> Kernel:
    """Ids that the host does not know come from the last tokens of their slots."""
    return _embedding(node, context, None)


def embedding_shard(node: ir.Node, context: Context) -> Kernel:
    """The same of a part of a table."""
    return _embedding(node, context, name_of(node.inputs[2]))


def _embedding(node: ir.Node, context: Context, first: str | None) -> Kernel:
    ids = name_of(node.inputs[0])
    weight = weight_of(node, context.constants)
    dtype = dtype_of(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        step, memory = run.kv()
        found = kernels.embedding(
            run.values[ids],
            weight,
            dtype,
            last_tokens=memory.last_tokens,
            slots=step.token_slots,
            first=run.get(first),
            pdl=run.pdl,
        )
        return (found,)

    return kernel
