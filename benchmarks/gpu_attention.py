"""Times PagedAttention by itself, as an 8B Llama's layer has it, on the GPU that is there.

    python benchmarks/gpu_attention.py --only prefill --pages bfloat16 float8_e4m3fn

Calls are replayed from a graph, each on pages of its own, which together exceed the L2 cache. A
prefill, with the writing of its keys, is shown in TFLOP/s of what causality leaves, beside cuDNN's
attention where nothing was before the prompt and beside cuBLAS; a decode in TB/s of the keys and
values that it reads, beside the read bandwidth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpu import product_rate, read_bandwidth
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from slipstream.plugins.cuda.launch import PDL_TOKENS
from slipstream.plugins.paged_attention.cuda.attention import (
    DecodeWorkspace,
    StepTensors,
    paged_attention,
    query_block,
)
from slipstream.plugins.paged_attention.reference import Attributes

LAYER = Attributes(0, 32, 8, 128, 64, 128**-0.5, k_row_major=1, k_scale=0.05, v_scale=0.05)
# Sequences, new tokens of each, and tokens before them.
PREFILLS = (
    (1, 512, 0),
    (1, 2048, 0),
    (1, 8192, 0),
    (1, 32768, 0),
    (1, 2048, 6144),
    (1, 512, 7680),
    (8, 512, 0),
    (64, 64, 0),
    (32, 32, 2000),
)
DECODES = ((1, 128), (16, 300), (1, 8192), (16, 8192), (8, 32768), (64, 1000), (256, 640))
_COLD_BYTES = 160 << 20  # three times the L2 cache of an H100
_SECONDS = 0.01  # of a graph, about


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one shape."""

    sequences: int
    new: int
    past: int

    @property
    def context(self) -> int:
        """Tokens of a sequence after the step."""
        return self.new + self.past

    @property
    def flops(self) -> float:
        """Of the products that causality leaves."""
        pairs = self.new * self.past + self.new * (self.new + 1) / 2
        return 4 * self.sequences * LAYER.num_heads * LAYER.head_dim * pairs

    def step(self) -> StepTensors:
        """The step, in shuffled pages."""
        columns = -(-self.context // LAYER.page_size)
        table = np.random.default_rng(0).permutation(self.sequences * columns)
        positions = np.arange(self.past, self.context)
        table = table.reshape(self.sequences, columns)
        slots = table[:, positions // LAYER.page_size] * LAYER.page_size
        slots += positions % LAYER.page_size
        decodes = self.sequences if self.new == 1 else 0
        block = query_block(LAYER)
        starts = np.arange(0, 0 if decodes else self.new, block)[::-1]

        def on_gpu(values: Any) -> torch.Tensor:  # noqa: ANN401
            return torch.tensor(np.ascontiguousarray(values), dtype=torch.int32, device="cuda")

        return StepTensors(
            query_start=on_gpu(np.arange(self.sequences + 1) * self.new),
            context_len=on_gpu(np.full(self.sequences, self.context)),
            page_table=on_gpu(table),
            slot_mapping=on_gpu(slots.ravel()),
            block_sequence=on_gpu(np.tile(np.arange(self.sequences), len(starts))),
            block_start=on_gpu(np.repeat(starts, self.sequences)),
            num_decodes=decodes,
            query_block=block,
        )


def seconds(call: Callable[[int], object], guess: float) -> float:
    """Of one call, the median of several replays of a graph of calls 0, 1, 2 and so on."""
    calls = min(max(round(_SECONDS / guess), 1), 100)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)  # compiles
        with torch.cuda.graph(graph, stream=stream):
            for number in range(calls):
                call(number)
        graph.replay()
        times: list[float] = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
    return sorted(times)[len(times) // 2]


def attention(batch: Batch, pages: torch.dtype) -> float:
    """Seconds of ``paged_attention``."""
    a, step = LAYER, batch.step()
    shape = (step.page_table.numel(), 2, a.num_kv_heads, a.page_size * a.head_dim)
    layers = -(-_COLD_BYTES // (math.prod(shape) * pages.itemsize))
    kv_cache = torch.randn(layers, *shape, dtype=torch.bfloat16, device="cuda").to(pages)
    tokens = batch.sequences * batch.new
    width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    qkv = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(tokens, a.head_dim // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    workspace = DecodeWorkspace.allocate(
        batch.sequences, a.num_heads, a.head_dim, batch.context, "cuda"
    )

    plans: dict[tuple[int, ...], torch.Tensor] = {}

    def call(number: int) -> torch.Tensor:
        of_layer = replace(a, layer=number % layers)
        pdl = tokens <= PDL_TOKENS
        return paged_attention(
            qkv, cos, sin, kv_cache, step, of_layer, workspace=workspace, pdl=pdl, plans=plans
        )

    return seconds(call, max(batch.flops / 5e14, math.prod(shape) * pages.itemsize / 3e12, 5e-6))


def cudnn(batch: Batch) -> float:
    """Seconds of cuDNN's attention over keys and values that lie in one piece."""
    q, k, v = (
        torch.randn(
            batch.sequences, heads, batch.new, LAYER.head_dim, dtype=torch.bfloat16, device="cuda"
        )
        for heads in (LAYER.num_heads, LAYER.num_kv_heads, LAYER.num_kv_heads)
    )

    def call(_: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return seconds(call, max(batch.flops / 5e14, 5e-6))


def prefill(pages: list[torch.dtype]) -> None:
    """Print a line for every batch of PREFILLS."""
    print(f"prefill, TFLOP/s; cuBLAS in bf16: {product_rate(torch.bfloat16) / 1e12:.0f}")
    for batch in (Batch(*sizes) for sizes in PREFILLS):
        times = {str(dtype).removeprefix("torch."): attention(batch, dtype) for dtype in pages}
        if not batch.past:
            times["cudnn"] = cudnn(batch)
        rates = [
            f"{name} {t * 1e6:.1f} us {batch.flops / t / 1e12:.0f}" for name, t in times.items()
        ]
        print(f"{batch.sequences} x {batch.new} behind {batch.past}:", *rates, sep="  ", flush=True)


def decode(pages: list[torch.dtype]) -> None:
    """Print a line for every batch of DECODES."""
    print(f"decode, TB/s; the read bandwidth is {read_bandwidth() / 1e12:.2f}")
    for batch in (Batch(count, 1, context - 1) for count, context in DECODES):
        rates = []
        for dtype in pages:
            read = 2 * batch.sequences * batch.context * LAYER.num_kv_heads * LAYER.head_dim
            t = attention(batch, dtype)
            name = str(dtype).removeprefix("torch.")
            rates.append(f"{name} {t * 1e6:.1f} us {read * dtype.itemsize / t / 1e12:.2f}")
        print(f"{batch.sequences} x {batch.context}:", *rates, sep="  ", flush=True)


MEASURES = {"prefill": prefill, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--pages", nargs="+", default=["bfloat16", "float8_e4m3fn"])
    arguments = parser.parse_args()
    with torch.no_grad():
        for name in arguments.only:
            MEASURES[name]([getattr(torch, dtype) for dtype in arguments.pages])


if __name__ == "__main__":
    main()
