"""Times every tactic of the Linears and experts of a model on the GPU that is there.

    python benchmarks/gpu_linear.py --formats bf16 int4 --buckets 1 16 64 --tactics tactics.json
    python benchmarks/gpu_linear.py --models qwen3-30b-a3b gpt-oss-20b --only experts

Weights are cold, launches are replayed from a graph, and each line shows the quickest tactic, the
default one and the quickest of each kernel beside the floor: the bytes of the weight over the read
bandwidth, or the operations over those that cuBLAS does on large 16-bit matrices. Of experts
those count that the tokens choose, by random logits: "of 128" says how many, and how many rows each
has; cuBLAS has no product by expert. ``--seconds`` ends a model in a format early; the tactics of
what was timed by then are stored all the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch
from gpu import FORMATS, MODELS, read_bandwidth, shape_of, usual_formats
from gpu_models import random_plan, random_weights

from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.tuning import Problem, Tuned, tune
from slipstream.plugins.expert_linear.cuda.tuning import ExpertProblem
from slipstream.plugins.linear.cuda.tactics import BUCKETS, Tactic, Tactics
from slipstream.plugins.linear.cuda.tuning import LinearProblem
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.tuning import problems

_OPERATIONS = 8e14  # a second, of an H100
_LAYERS = 3  # enough distinct weights; smaller ones are copied
_KINDS: dict[str, type[Problem]] = {"linears": LinearProblem, "experts": ExpertProblem}


def line(form: str, tuned: Tuned, rate: float) -> str:
    """The quickest tactic of one problem beside the default and cuBLAS."""
    problem, tokens = tuned.problem, tuned.tokens
    times = {timing.tactic: timing.seconds * 1e6 for timing in tuned.timings}
    best = tuned.timings[0]
    kernels = {t.kernel: us for t, us in reversed(times.items())}  # the quickest of each is last
    nbytes = problem.nbytes(tokens)
    floor = max(nbytes / rate, _operations(problem, tokens) / _OPERATIONS)
    return (
        f"{form} {problem.key(tokens):44} best {best.seconds * 1e6:7.1f} "
        f"default {times.get(tuned.usual, float('nan')):7.1f} "
        f"{' '.join(f'{kernel} {us:7.1f}' for kernel, us in sorted(kernels.items()))} "
        f"floor {floor * 1e6:7.1f} us "
        f"{nbytes / best.seconds / 1e12:5.2f} TB/s "
        f"{_choice(problem, tokens)}{_short(best.tactic)}"
    )


def _operations(problem: Problem, tokens: int) -> float:
    n, k = problem.weights[0].format.shape
    return 0.0 if isinstance(problem, ExpertProblem) else 2.0 * n * k * tokens


def _choice(problem: Problem, tokens: int) -> str:
    if not isinstance(problem, ExpertProblem):
        return ""
    distinct = problem.distinct(tokens)
    rows = tokens * problem.top_k / distinct
    return f"{distinct:.1f} of {problem.shape.number}, {rows:.1f} rows  "


def _short(tactic: Tactic) -> str:
    return " ".join(str(value) for value in asdict(tactic).values())


def time_all(
    model: str,
    form: str,
    arguments: argparse.Namespace,
    table: Tactics,
    rate: float,
) -> None:
    """Time the shapes of a model in a format, print them, and store what was quickest."""
    started = time.monotonic()
    shape = {**shape_of(model, form), "num_hidden_layers": _LAYERS}
    options = BuildOptions(target="cuda", tp_size=arguments.tp_size, **FORMATS[form])
    plan = random_plan(shape, options)
    weights = random_weights(plan)
    kinds = tuple(_KINDS[kind] for kind in arguments.only)
    found = [p for p in problems(plan.program.graph, weights) if isinstance(p, kinds)]
    for tuned in tune(found, arguments.buckets, table):
        print(line(form, tuned, rate), flush=True)
        if arguments.tactics:
            arguments.tactics.write_text(table.to_json())
        if time.monotonic() - started > arguments.seconds:
            print(f"{model} {form} is cut short")
            break
    print(f"{model} {form} took {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-8b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="Default: the model's usual.")
    parser.add_argument("--only", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--buckets", nargs="+", type=int, default=list(BUCKETS))
    parser.add_argument("--tp-size", type=int, default=1, help="Those of one rank of so many.")
    parser.add_argument("--seconds", type=float, default=600, help="For a model in a format.")
    parser.add_argument("--tactics", type=Path, help="Where to store the quickest; added to.")
    arguments = parser.parse_args()
    device = Device()
    table = Tactics(device.capability, device.name)
    if arguments.tactics and arguments.tactics.exists():
        table = Tactics.from_json(arguments.tactics.read_text())
    rate = read_bandwidth()
    for model in arguments.models:
        for form in arguments.formats or usual_formats(model):
            time_all(model, form, arguments, table, rate)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
