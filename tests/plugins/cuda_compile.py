"""Compiles every kernel that a host function launches, for GPUs that are not there.

Run as a program, without Triton's interpreter: it calls the host functions on CPU tensors, with
launching replaced by compiling, and prints a line for every kernel: for every form in which it
is launched, or for the first alone.

    python -m tests.plugins.cuda_compile 90
    python -m tests.plugins.cuda_compile 90 first
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from slipstream.plugins.collectives.cuda import exchange
from slipstream.plugins.collectives.cuda.copies import Copies, Pieces
from slipstream.plugins.collectives.cuda.layout import Layout
from slipstream.plugins.drafting.cuda import (
    DraftBuffers,
    Pages,
    Table,
    Tokens,
    advance,
    follow,
    guess,
    mask,
    move_rows,
)
from slipstream.plugins.expert_linear.cuda import tactics as expert_tactics
from slipstream.plugins.expert_linear.cuda.experts import Experts, expert_linear
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.gated_mlp.cuda import gated_activation
from slipstream.plugins.linear.cuda.blas import dequantize
from slipstream.plugins.linear.cuda.fixed import fixed_tactic
from slipstream.plugins.linear.cuda.linear import embedding, linear
from slipstream.plugins.linear.cuda.packing import packed_size
from slipstream.plugins.linear.cuda.tactics import Tactics, default_tactic
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.normed_router.cuda import NormedRouter, Routing, normed_router
from slipstream.plugins.paged_attention.cuda.attention import (
    DecodeWorkspace,
    StepTensors,
    paged_attention,
)
from slipstream.plugins.paged_attention.reference import Attributes
from slipstream.plugins.rms_norm.cuda import quantize_rows, rms_norm, rms_norm_quantized
from slipstream.plugins.rotary.cuda import rotary_angles
from slipstream.plugins.router.cuda import router
from slipstream.plugins.sampling import Field, Kind
from slipstream.plugins.sampling.cuda import SamplerBuffers, best_of_part, sample, sample_best
from slipstream.plugins.soft_cap.cuda import soft_cap
from slipstream.weights.tensor import WeightFormat

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


class Compiler:
    """Stands in for ``JITFunction.run``: compiles for an architecture and launches nothing.

    Of each kernel every form, or only the first.
    """

    def __init__(self, architecture: int, *, first: bool) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.first = first
        self.done: set[tuple[object, ...]] = set()

    def __call__(self, fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ANN401
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        names = [parameter.name for parameter in fn.params]
        values = dict(zip(names, args, strict=False)) | kwargs
        constant = {p.name for p in fn.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values.get(name, _default(fn, name))
            kind = "constexpr" if name in constant or value is None else _type(value)
            signature[name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        form = (*signature.values(), *constants.values(), *options.values())
        key = (fn.__name__,) if self.first else (fn.__name__, *form)
        if key in self.done:
            return
        self.done.add(key)
        language = GluonASTSource if fn.is_gluon() else ASTSource
        source = language(fn, signature, constants, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        sys.stdout.write(f"{fn.__name__} {compiled.metadata.shared} bytes shared {options}\n")


def _default(fn: Any, name: str) -> Any:  # noqa: ANN401
    return next(p.default for p in fn.params if p.name == name)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        dtype = _TYPES[value.base.dtype].removeprefix("*")
        return f"tensordesc<{dtype}{value.block_shape},{value.layout!r}>"
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32"


def blob(fmt: WeightFormat) -> DeviceWeight:
    return DeviceWeight.from_blob(torch.zeros(packed_size(fmt), dtype=torch.uint8), fmt)


def linears(capability: tuple[int, int], pdl: bool) -> None:
    """Every format at one token and at sixteen, integers at more, between a norm and a residual,
    and gated."""
    n, k = 512, 1024
    for fmt in (
        WeightFormat((n, k), "dense", "bfloat16"),
        WeightFormat((n, k), "int", "float16", 4, 128, "zero"),
        WeightFormat((n, k), "int", "float16", 8, 64, "midpoint"),
        WeightFormat((n, k), "float4_e2m1", "float8_e8m0fnu", 4, 32),
        WeightFormat((n, k), "float8_e4m3", "float32", 8, k, activation="token"),
        WeightFormat((n, k), "float8_e4m3", "float32", 8, 128, rows=128, activation="group"),
    ):
        if fmt.kind == "float8_e4m3" and capability < (8, 9):
            continue  # such engines ask for sm_89
        for tokens in (1, 16, 128) if fmt.kind == "int" else (1, 16):
            x = torch.zeros(tokens, k, dtype=torch.bfloat16)
            tactic = default_tactic(fmt, False, tokens, capability)
            norm = torch.ones(k, dtype=torch.bfloat16)
            residual = torch.zeros(tokens, n, dtype=torch.bfloat16)
            weight = blob(fmt)
            linear(
                x,
                weight,
                norm_weight=norm,
                norm_eps=1e-5,
                residual=residual,
                tactic=tactic,
                pdl=pdl,
            )
            gate = default_tactic(fmt, True, tokens, capability)
            linear(x, weight, norm_weight=norm, gated=True, tactic=gate, pdl=pdl)
        for tokens in (1, 300):  # the latter adds up the parts of K in one program
            x = torch.zeros(tokens, k, dtype=torch.bfloat16)
            tactic = fixed_tactic(fmt, False, tokens, capability)
            linear(x, weight, tactic=tactic, pdl=pdl and tokens == 1)
        embedding(torch.zeros(4, dtype=torch.int32), blob(fmt), torch.bfloat16, pdl=pdl)
        dequantize(blob(fmt), torch.bfloat16, pdl=pdl)


def experts(capability: tuple[int, int], pdl: bool) -> None:
    """Routing, and a format of each sort at one token, some and many: gated, and summed up."""
    number, top_k = 8, 2
    for fmt in (
        WeightFormat((number * 256, 512), "dense", "bfloat16"),
        WeightFormat((number * 256, 512), "int", "float16", 4, 128, "midpoint"),
        WeightFormat((number * 256, 512), "float8_e4m3", "float32", 8, 512),
    ):
        if fmt.kind == "float8_e4m3" and capability < (8, 9):
            continue
        for reduce in (True, False):
            layer = Experts(blob(fmt), number, reduce=reduce, gated=not reduce)
            for tokens in (1, 16, 512):
                x = torch.zeros(tokens * (top_k if reduce else 1), 512, dtype=torch.bfloat16)
                logits = torch.zeros(tokens, number, dtype=torch.bfloat16)
                ids, factors = router(logits, top_k=top_k, pdl=pdl)
                tactic = expert_tactics.default_tactic(layer.shape(top_k), tokens, capability)
                sums = (factors, torch.zeros(tokens, 256, dtype=torch.bfloat16)) if reduce else ()
                expert_linear(x, layer, ids, *sums, tactic=tactic, pdl=pdl, early=reduce)
                if reduce and tactic.kernel == "gemv":
                    expert_linear(x, layer, ids, *sums, tactic=tactic, pdl=pdl)


def normed_routers(capability: tuple[int, int], pdl: bool) -> None:
    """One launch of few tokens, for routers like those of Qwen3, gpt-oss and DeepSeek-V3, and for
    so many experts that a program has two rows."""
    width, softmax = 2048, Routing(8, renormalize=1)
    sigmoid = Routing(8, scoring=1, renormalize=1, scale=2.5, groups=8, top_groups=4)
    for number, routing, biased, corrected in (
        (128, softmax, False, False),
        (32, Routing(4, renormalize=1), True, False),
        (256, sigmoid, False, True),
        (512, softmax, False, False),
    ):
        layer = NormedRouter.of(
            blob(WeightFormat((number, width), "dense", "bfloat16")),
            torch.ones(width, dtype=torch.bfloat16),
            1e-5,
            torch.zeros(number, dtype=torch.bfloat16) if biased else None,
            torch.zeros(number) if corrected else None,
            routing=routing,
        )
        x = torch.zeros(4, width, dtype=torch.bfloat16)
        normed_router(x, layer, Tactics(capability), pdl=pdl)


def experts_of_gpt_oss(capability: tuple[int, int], pdl: bool) -> None:
    """For one token and for many; the last chunk of a row is not whole."""
    number, n, k = 8, 256, 2880
    fmt = WeightFormat((number * n, k), "float4_e2m1", "float8_e8m0fnu", 4, 32)
    bias = torch.zeros(number * n, dtype=torch.bfloat16)
    opening = Experts(blob(fmt), number, bias, gated=True, gate=GATES["clamped"])
    for tokens in (1, 16):
        x, ids = torch.zeros(tokens, k, dtype=torch.bfloat16), torch.zeros(tokens, 4)
        tactic = expert_tactics.default_tactic(opening.shape(4), tokens, capability)
        expert_linear(x, opening, ids.to(torch.int32), tactic=tactic, pdl=pdl)


def attention(capability: tuple[int, int], pdl: bool) -> None:
    """A decode and a prefill in one step, and decodes of drafts, over pages of both kinds, of heads
    of a usual size and of the largest, and so many that each multiprocessor has hardly one."""
    usual = Attributes(0, 8, 2, 128, 64, 0.1, k_row_major=1)
    largest = Attributes(0, 8, 1, 512, 64, 1.0, kv_parts=1, v_norm=1, k_row_major=1)
    for a in (usual, largest):
        for queries, decodes in ((1, 4), (4, 4), (8, 4), (1, 64), (8, 64)):
            attention_of(a, queries, decodes, capability, pdl)


def attention_of(
    a: Attributes, queries: int, decodes: int, capability: tuple[int, int], pdl: bool
) -> None:
    rows = 2 * decodes
    row, table = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, 8, dtype=torch.int32)
    blocks = row if queries == 1 else row[:0]
    step = StepTensors(
        row, row, table, row, blocks, blocks, decodes, query_block=1, queries=queries
    )
    width, kv_heads = a.head_dim, a.num_kv_heads
    qkv = torch.zeros(rows, (a.num_heads + a.kv_parts * kv_heads) * width, dtype=torch.bfloat16)
    angles = torch.zeros(rows, width // 2)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        if dtype != torch.bfloat16 and capability < (8, 9):
            continue
        pages = torch.zeros(1, 4, 2, kv_heads, 64 * width, dtype=dtype)
        workspace = DecodeWorkspace.allocate(rows, 8, width, 512, "cpu")
        sinks = torch.zeros(8) if dtype == torch.bfloat16 else None
        plans: dict[tuple[int, ...], torch.Tensor] = {}
        for early in (False, True):
            paged_attention(
                qkv,
                angles,
                angles,
                pages,
                step,
                a,
                sinks=sinks,
                workspace=workspace,
                pdl=pdl,
                early=early,
                plans=plans,
            )


def elementwise(capability: tuple[int, int], pdl: bool) -> None:
    """Norms, gates and angles."""
    x, weight = torch.zeros(4, 1024, dtype=torch.bfloat16), torch.ones(1024, dtype=torch.bfloat16)
    rms_norm(x, weight, 1e-5, pdl=pdl)
    rms_norm(x, weight, 1e-5, residual=x, pdl=pdl)
    gated_activation(x, pdl=pdl)
    soft_cap(x.float(), 30.0, pdl=pdl)
    rotary_angles(torch.zeros(4, dtype=torch.int32), torch.ones(64), pdl=pdl)
    if capability >= (8, 9):
        rms_norm_quantized(x, weight, 1e-5, torch.float8_e4m3fn, pdl=pdl)
        quantize_rows(x, torch.float8_e4m3fn, pdl=pdl)


def collectives(capability: tuple[int, int], pdl: bool) -> None:
    """Sums of two and of four ranks, with and without the norm after them."""
    for ranks in (2, 4):
        room = exchange.Room(
            1,
            Layout(ranks, 1 << 16, 1 << 20, exchange.PROGRAMS, exchange.MEETINGS, 1 << 16),
            torch.zeros(ranks, dtype=torch.int64),
            torch.zeros(exchange.PROGRAMS, dtype=torch.int32),
        )
        x = torch.zeros(4, 4096, dtype=torch.bfloat16)
        wide = torch.zeros(4, ranks * 4096, dtype=torch.bfloat16)
        for way in exchange.Way:
            for norm in (None, exchange.Norm(x, x[0], 1e-5)):
                exchange.reduce(way, room, x, norm, pdl=pdl)
            exchange.reduce(way, room, x.float(), pdl=pdl)
            if way is not exchange.Way.PARTS:
                exchange.gather(way, room, x, wide, pdl=pdl)
        copies = Copies(room, (), Pieces(least=0))
        for norm in (None, exchange.Norm(x, x[0], 1e-5)):
            sending = copies.begin(4, 4096, torch.bfloat16)
            assert sending is not None
            assert len([*sending.filling()]) == 1
            copies.reduce(sending, norm)


def sampling(capability: tuple[int, int], pdl: bool) -> None:
    """All kinds, at a vocabulary of a Llama."""
    vocab = 128256
    buffers = SamplerBuffers.allocate(2, 2, vocab, 64, "cpu")
    buffers.enable_full()
    for kind in Kind:
        sample(torch.zeros(2, vocab), buffers, 2, kind, pdl)
    best = best_of_part(torch.zeros(2, vocab // 2), buffers, vocab // 2, pdl)
    sample_best(torch.cat([best, best], dim=1), buffers, pdl)


def drafting(capability: tuple[int, int], pdl: bool) -> None:
    """Between the runs of a head that knows a part of the tokens, or all of them."""
    vocab = 32000
    numbers = torch.zeros(8, dtype=torch.int32)
    for known in (torch.zeros(vocab, dtype=torch.int32), None):
        buffers = DraftBuffers.allocate(8, 2, 8, vocab, known, numbers[:2])
        pages = Pages(torch.zeros((2, 4), dtype=torch.int32), numbers[:2], 64)
        tokens = Tokens(numbers, numbers, numbers, numbers, drafts=numbers[:2])
        table = Table(pages.table, numbers, 64)
        advance(tokens, numbers[:2], [table], pages.table, vocab, buffers, pdl)
        move_rows(torch.zeros((len(Field), 8), dtype=torch.int32), 8, buffers, pdl)
        follow(tokens, numbers, numbers[:2], numbers, buffers, pdl)
        for goes_on in (True, False):
            guess(torch.zeros(2, vocab), buffers, pages, 0, 1, goes_on, pdl)
            guess(torch.zeros(2, vocab), buffers, pages, 1, 1, goes_on, pdl)
        mask(5, 2, 3, buffers, pages, pdl)
        guess(torch.zeros(6, vocab), buffers, pages, 1, 3, False, pdl)


CALLS: tuple[Callable[[tuple[int, int], bool], None], ...] = (
    linears,
    experts,
    normed_routers,
    experts_of_gpt_oss,
    attention,
    elementwise,
    collectives,
    sampling,
    drafting,
)


def main() -> None:
    """Compile for the architecture that is the first argument, such as 90."""
    architecture, *first = sys.argv[1:]
    capability = divmod(int(architecture), 10)
    compiler = Compiler(int(architecture), first=first == ["first"])
    JITFunction.run = lambda self, *args, **kwargs: compiler(self, *args, **kwargs)
    torch.cuda.get_device_capability = lambda *_: capability
    for call in CALLS:
        call(capability, capability >= (9, 0))


if __name__ == "__main__":
    main()
