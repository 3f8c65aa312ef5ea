"""Products and attention of a GPU's executor in torch, where a test is of what is around them: in
Triton's interpreter they take nearly all of its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from slipstream.plugins.linear.cuda import linear as linear_kernels
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.paged_attention.cuda import attention
from slipstream.plugins.paged_attention.cuda.attention import StepTensors
from slipstream.plugins.paged_attention.reference import Attributes


def linear(x: Tensor, weight: DeviceWeight, **options: Any) -> Tensor:  # noqa: ANN401
    """A product with a dense weight, with what is fused."""
    wide = x.float()
    if (norm := options.get("norm_weight")) is not None:
        root = (wide.square().mean(-1, keepdim=True) + options["norm_eps"]).rsqrt()
        wide = (wide * root * norm.float()).to(x.dtype).float()
    y = wide @ weight.typed_codes.float().view(weight.format.shape).T
    if options.get("gated"):
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    if (residual := options.get("residual")) is not None:
        y = y + residual.float()
    y = y.to(options["out_dtype"] or x.dtype)
    out = options.get("out")
    return y if out is None else out.copy_(y)


def paged_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    step: StepTensors,
    a: Attributes,
    **options: Any,  # noqa: ANN401 - norms, sinks, the workspace
) -> Tensor:
    """Attention of every sequence by itself; pages hold what this function puts there."""
    assert step.slot_mapping.shape[0] == qkv.shape[0] == cos.shape[0]
    size = a.head_dim
    q, k, v = (
        part.unflatten(-1, (-1, size)).float()
        for part in qkv.split([a.num_heads * size, *[a.num_kv_heads * size] * 2], dim=-1)
    )
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    pages = kv_cache[a.layer].view(-1, 2, a.num_kv_heads, a.page_size, size)
    for row, slot in enumerate(step.slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, a.page_size)
            pages[page, 0, :, offset], pages[page, 1, :, offset] = k[row], v[row]
    made = torch.zeros(qkv.shape[0], a.num_heads, size)
    starts, group = step.query_start.tolist(), a.num_heads // a.num_kv_heads
    for sequence, length in enumerate(step.context_len.tolist()):
        first, end = starts[sequence], starts[sequence + 1]
        if length <= 0 or end <= first:
            continue
        decoded = sequence < step.num_decodes and int(step.decoded[sequence]) == length
        assert decoded != (sequence in step.block_sequence.tolist()), "by one kernel, not by both"
        assert not decoded or end - first <= step.queries
        table = step.page_table[sequence, : -(-length // a.page_size)].long()
        keys, values = (
            pages[table, part].float().transpose(1, 2).flatten(0, 1)[:length] for part in (0, 1)
        )
        for row in range(first, end):
            seen = length - (end - row) + 1
            lowest = max(0, seen - a.sliding_window) if a.sliding_window else 0
            heads = keys[lowest:seen].repeat_interleave(group, 1)
            scores = torch.einsum("hd,khd->hk", q[row], heads) * a.scale
            weights = scores.softmax(-1)
            heads = values[lowest:seen].repeat_interleave(group, 1)
            made[row] = torch.einsum("hk,khd->hd", weights, heads)
    return made.flatten(1).to(qkv.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


@contextmanager
def in_torch() -> Iterator[None]:
    """For engines with dense weights and plain gates."""
    with (
        patch.object(linear_kernels, "linear", linear),
        patch.object(attention, "paged_attention", paged_attention),
    ):
        yield
