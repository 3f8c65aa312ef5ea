"""Exploratory: kernels of a mixture of experts at few tokens, checked and then timed.

PYTHONPATH=src python benchmarks/gpu_try.py            # check, kernels, whole steps of Qwen3
PYTHONPATH=src python benchmarks/gpu_try.py check kernels --models qwen3 gpt-oss mixtral
PYTHONPATH=src python benchmarks/gpu_try.py steps --batches 1 16 64
"""

# ruff: noqa: E501

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slipstream.plugins.cuda.precompile import compile_kernels, record
from slipstream.plugins.expert_linear.cuda.experts import Experts, expert_linear
from slipstream.plugins.expert_linear.cuda.tactics import default_tactic
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.linear.cuda import linear as linear_module
from slipstream.plugins.linear.cuda.packing import packed_size, sections
from slipstream.plugins.linear.cuda.tactics import Tactic, Tactics, vector_size
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.normed_router import cuda as normed
from slipstream.plugins.normed_router.cuda import NormedRouter, Routing, normed_router
from slipstream.weights.tensor import WeightFormat

DEVICE, BF16, CAP = "cuda", torch.bfloat16, (9, 0)
TABLE = Tactics(CAP)


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    experts: int
    top_k: int
    kind: str = "bf16"
    bias: bool = False
    gate: str = "silu"


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),
    "qwen3-fp8": Shape(2048, 768, 128, 8, "fp8"),
    "qwen3-int4": Shape(2048, 768, 128, 8, "int4"),
    "gpt-oss": Shape(2880, 2880, 32, 4, "mxfp4", True, "clamped"),
    "mixtral": Shape(4096, 14336, 8, 2),
}


def fmt(kind: str, n: int, k: int) -> WeightFormat:
    return {
        "bf16": WeightFormat((n, k), "dense", "bfloat16"),
        "fp8": WeightFormat((n, k), "float8_e4m3", "float32", 8, k),
        "int4": WeightFormat((n, k), "int", "float16", 4, 128, "midpoint"),
        "mxfp4": WeightFormat((n, k), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    }[kind]


def weight(kind: str, n: int, k: int) -> DeviceWeight:
    form = fmt(kind, n, k)
    blob = torch.zeros(packed_size(form), dtype=torch.uint8, device=DEVICE)
    for name, part in sections(form).items():
        to = blob[part.start : part.start + part.nbytes]
        if name == "codes" and kind == "bf16":
            to.view(BF16).normal_(0, 0.02)
        elif name == "codes" and kind == "fp8":
            rows = to.view(n, k)
            for row in rows.split(4096):
                row.copy_(
                    (torch.randn(row.shape, device=DEVICE) * 50)
                    .to(torch.float8_e4m3fn)
                    .view(torch.uint8)
                )
        elif name == "codes":
            to.random_(0, 255)
        elif part.dtype == "float32":
            to.view(torch.float32).fill_(4e-4)
        elif part.dtype == "float16":
            to.view(torch.float16).fill_(4e-3)
        else:
            to.fill_(120)  # 2**-7
    return DeviceWeight.from_blob(blob, form)


def layer(s: Shape, reduce: bool) -> Experts:
    n, k = (s.hidden, s.inner) if reduce else (2 * s.inner, s.hidden)
    bias = torch.randn(s.experts * n, device=DEVICE).to(BF16) if s.bias else None
    return Experts(
        weight(s.kind, s.experts * n, k), s.experts, bias, reduce=reduce, gated=not reduce,
        gate=GATES[s.gate],
    )  # fmt: skip


def router_of(s: Shape) -> NormedRouter:
    return NormedRouter.of(
        weight("bf16", s.experts, s.hidden),
        torch.rand(s.hidden, device=DEVICE).to(BF16) + 0.5,
        1e-6,
        torch.randn(s.experts, device=DEVICE).to(BF16) if s.bias else None,
        routing=Routing(s.top_k, renormalize=1),
    )


def us(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds a call of a graph of all calls."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def separate(x: Tensor, r: NormedRouter, pdl: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    kept, normed.FUSED_TOKENS = normed.FUSED_TOKENS, 0
    try:
        return normed_router(x, r, TABLE, pdl=pdl)
    finally:
        normed.FUSED_TOKENS = kept


# ---- check -------------------------------------------------------------------------------------


def check(models: list[str]) -> None:
    torch.manual_seed(0)
    for name in models:
        s = SHAPES[name]
        r = router_of(s)
        for tokens in (1, 3, 16):
            x = torch.randn(tokens, s.hidden, device=DEVICE).to(BF16)
            fused = normed_router(x, r, TABLE, pdl=True)
            apart = separate(x, r)
            y = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
            y = (y * r.norm_weight.double()).to(BF16)
            logits = y.double() @ r.weight.codes.double().T
            logits += 0 if r.bias is None else r.bias.double()
            share = logits.softmax(1)
            want, ids = share.topk(s.top_k)
            want = want / want.sum(1, keepdim=True)
            same = (fused[1] == ids).float().mean().item()
            off = (fused[2] - want).abs().max().item()
            assert same > 0.9 and off < 5e-3, (name, tokens, same, off)
            assert (fused[1] == apart[1]).float().mean() > 0.9, (name, tokens)
            assert (fused[0].float() - apart[0].float()).abs().max() < 0.05
            assert not r.counters.any()
        one = [normed_router(x, r, TABLE, pdl=True) for _ in range(200)]
        assert all(torch.equal(a, b) for o in one for a, b in zip(o, one[0], strict=True))
        check_experts(name, s)
        print(f"{name}: as the reference says (experts the same: {same:.3f}, weights {off:.1e})")


def check_experts(name: str, s: Shape) -> None:
    """The sums and products of one token are those of the kernels of many."""
    for reduce in (False, True):
        e = layer(s, reduce)
        n, k = e.format.shape
        ids = torch.randperm(s.experts, device=DEVICE)[: s.top_k].to(torch.int32)[None]
        f = torch.rand(1, s.top_k, device=DEVICE) if reduce else None
        x = torch.randn(s.top_k if reduce else 1, k, device=DEVICE).to(BF16)
        res = torch.randn(1, n, device=DEVICE).to(BF16) if reduce else None
        many = [None if t is None else t.repeat(16, 1) for t in (x, ids, f, res)]
        dot = default_tactic(e.shape(s.top_k), 16, CAP)
        want = expert_linear(many[0], e, many[1], many[2], many[3], tactic=dot)
        want = want[: 1 if reduce else s.top_k].float()
        for tactic in tactics(s, reduce):
            for early in (False, True):
                got = expert_linear(x, e, ids, f, res, tactic=tactic, pdl=True, early=early)
                off = ((got.float() - want).norm() / want.norm()).item()
                assert off < 2e-2, (name, reduce, tactic, off)
        if s.kind == "bf16":
            w = e.weight.codes.view(s.experts, n, k)[ids[0].long()].float()
            y = torch.einsum("rk,rnk->rn", x.float().expand(s.top_k, k), w)
            if reduce:
                y = (y * f.T).sum(0, keepdim=True) + res.float()
            else:
                g, u = y.chunk(2, 1)
                y = torch.nn.functional.silu(g) * u
            off = ((got.float() - y).norm() / y.norm()).item()
            assert off < 1e-2, (name, reduce, "torch", off)
        del e
        torch.cuda.empty_cache()


# ---- kernels -----------------------------------------------------------------------------------


def tactics(s: Shape, reduce: bool) -> list[Tactic]:
    n, k = (s.hidden, s.inner) if reduce else (2 * s.inner, s.hidden)
    form = fmt(s.kind, n, k)
    if reduce:
        choices = [
            (4, 32, 1, 3), (4, 32, 2, 3), (4, 32, 2, 2), (4, 32, 1, 4), (8, 32, 1, 3), (2, 32, 2, 3),
            (4, 16, 2, 3), (4, 16, 4, 3), (4, 64, 2, 3), (4, 16, 1, 3), (8, 64, 2, 2), (2, 32, 4, 2),
        ]  # fmt: skip
    else:
        choices = [
            (4, 32, 2, 2), (4, 32, 4, 1), (4, 32, 4, 2), (8, 32, 2, 2), (2, 32, 4, 2), (4, 64, 4, 2),
            (8, 64, 4, 2), (4, 32, 6, 1), (8, 32, 4, 1), (2, 32, 2, 4), (4, 32, 2, 4), (4, 16, 4, 2),
        ]  # fmt: skip
    found = []
    for warps, lanes, rows, stages in choices:
        block = 32 * warps // lanes * rows
        found.append(
            Tactic(
                "gemv", block if reduce else block // 2, lanes * vector_size(form), warps, stages
            )
        )
    return found


def short(t: Tactic, form: WeightFormat) -> str:
    return f"w{t.num_warps} q{t.block_k // vector_size(form)} n{t.block_n} d{t.num_stages}"


def kernels(models: list[str]) -> None:
    for name in models:
        s = SHAPES[name]
        route(name, s)
        experts(name, s)
        gc.collect()
        torch.cuda.empty_cache()


def route(name: str, s: Shape) -> None:
    routers = [router_of(s) for _ in range(8)]
    print(f"{name}: us of norm + router + choice, in a chain with a copy between")
    for tokens in (1, 4, 8, 16):
        x = torch.randn(tokens, s.hidden, device=DEVICE).to(BF16)
        line = [f"  T {tokens:3} apart {us([partial(separate, x, r) for r in routers] * 4):6.2f}"]
        for warps in (1, 2, 4, 8):
            normed.WARPS = warps
            if s.hidden / warps > 2100:
                continue
            found = us([partial(normed_router, x, r, TABLE, pdl=True) for r in routers] * 4)
            line.append(f"warps {warps} {found:6.2f}")
        normed.WARPS = 0
        print("  ".join(line))


def experts(name: str, s: Shape) -> None:
    copies = 2 if s.kind == "bf16" and s.experts * s.inner > 90000 else 3
    ups, downs = [layer(s, False) for _ in range(copies)], [layer(s, True) for _ in range(copies)]
    torch.manual_seed(1)
    routes = [
        torch.randperm(s.experts, device=DEVICE)[: s.top_k].to(torch.int32)[None] for _ in range(24)
    ]
    f = torch.full((1, s.top_k), 1 / s.top_k, device=DEVICE)
    x = torch.randn(1, s.hidden, device=DEVICE).to(BF16)
    inner = torch.randn(s.top_k, s.inner, device=DEVICE).to(BF16)

    def up(t: Tactic, i: int) -> Tensor:
        return expert_linear(x, ups[i % copies], routes[i % 24], tactic=t, pdl=True)

    def down(t: Tactic, i: int, h: Tensor = inner, early: bool = False) -> Tensor:
        return expert_linear(
            h, downs[i % copies], routes[i % 24], f, x, tactic=t, pdl=True, early=early
        )

    both = {"up": (up, tactics(s, False), ups[0]), "down": (down, tactics(s, True), downs[0])}
    works = [partial(call, t, 0) for call, found, _ in both.values() for t in found]
    compile_kernels(record(works), CAP)
    best = {}
    for kind, (call, found, e) in both.items():
        usual = default_tactic(e.shape(s.top_k), 1, CAP)
        nbytes = e.weight.nbytes / s.experts * s.top_k
        times = []
        for t in dict.fromkeys([usual, *found]):
            try:
                times.append((us([partial(call, t, i) for i in range(24)]), t))
            except Exception as error:  # noqa: BLE001
                print("   ", short(t, e.format), repr(error)[:100])
        times.sort(key=lambda pair: pair[0])
        best[kind] = times[0][1]
        print(
            f"{name} {kind}: floor {nbytes / 3.11e6:6.2f} us at 3.11 TB/s; guess {short(usual, e.format)}"
        )
        print("   " + " | ".join(f"{t:6.2f} {short(c, e.format)}" for t, c in times[:7]))
    usual = [default_tactic(e.shape(s.top_k), 1, CAP) for e in (ups[0], downs[0])]
    r = [router_of(s) for _ in range(copies)]

    def whole(t: list[Tactic], early: bool, fused: bool, i: int) -> Tensor:
        route = normed_router if fused else separate
        arguments = (x, r[i % copies], TABLE) if fused else (x, r[i % copies])
        route(*arguments, pdl=True)
        return down(t[1], i, up(t[0], i), early)

    chosen = [best["up"], best["down"]]
    for label, t in (("guess", usual), ("best", chosen)):
        line = []
        for fused in (False, True):
            for early in (False, True):
                found = us([partial(whole, t, early, fused, i) for i in range(24)])
                line.append(
                    f"{'fused' if fused else 'apart'}{' early' if early else ''} {found:6.2f}"
                )
        print(f"{name} MLP of a layer, tiles {label}: " + "  ".join(line))


# ---- whole steps -------------------------------------------------------------------------------


def steps(batches: list[int], name: str) -> None:
    from gpu import MODELS, Runner
    from gpu_models import Routes, random_engine

    from slipstream.builder.options import BuildOptions

    for label, fused, fetch in (
        ("all", 16, True), ("no fetch of rows", 16, False), ("norm and router apart", 0, False),
    ):  # fmt: skip
        started = time.perf_counter()
        normed.FUSED_TOKENS, linear_module.FETCH_ROWS = fused, fetch
        routes = Routes(MODELS[name]["num_hidden_layers"])
        engine = random_engine(
            MODELS[name],
            BuildOptions(target="cuda", max_seq_len=1024),
            enable_prefix_caching=False,
            max_batch_size=max(batches),
            max_num_tokens=2048,
        )
        runner = Runner(engine, routes)
        ready = time.perf_counter() - started
        line = []
        for batch in batches:
            runner.seconds(batch, 128, 8)
            length = 256 if batch == 1 else 64
            pairs = [
                (runner.seconds(batch, 128, length) - runner.seconds(batch, 128, 1)) / (length - 1)
                for _ in range(5 if batch == 1 else 3)
            ]
            line.append(
                f"batch {batch}: {statistics.median(pairs) * 1e3:6.3f} ms ({routes.distinct(batch)} experts)"
            )
        print(f"{name} bf16, {label}: " + "  ".join(line) + f"  [ready {ready:.0f} s]", flush=True)
        if label == "all":
            from gpu import profile

            for key, value in profile(runner).items():
                print(f"    {key:50} {value:9.1f}")
        runner.loop.shutdown()
        routes.close()
        del engine, runner, routes
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["check", "kernels", "steps"])
    parser.add_argument("--models", nargs="+", default=["qwen3", "gpt-oss", "mixtral"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--steps-of", default="qwen3-30b-a3b")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with torch.no_grad():
        if "check" in arguments.parts:
            check(arguments.models)
        if "kernels" in arguments.parts:
            kernels(arguments.models)
    print(f"kernels took {time.perf_counter() - started:.0f} s", flush=True)
    if "steps" in arguments.parts:
        steps(arguments.batches, arguments.steps_of)


if __name__ == "__main__":
    main()
