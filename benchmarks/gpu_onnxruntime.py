"""Target onnxruntime on an NVIDIA GPU beside target cuda and onnxruntime-genai, in one run.

    python benchmarks/gpu_onnxruntime.py CHECKPOINT --genai GENAI_DIR --json FILE

Decode: 128 tokens in, 256 out, ms a token from the difference to a run of one token, at 1, 16, 32
and 64 requests. Greedy, prompts of random tokens, no prefix is shared. ``GENAI_DIR`` is a model
that ``python -m onnxruntime_genai.models.builder -e cuda -p int4`` made of the same checkpoint, in
groups of 32 without zero points, as ours are; what fails, or is not given, is left out. Every
engine runs in a process of its own, one after the other in each of ``--rounds``, and the median
counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

INPUT, OUTPUT, BATCHES = 128, 256, (1, 16, 32, 64)
_GROUP = 32
Figures = dict[int, float]


def main() -> None:
    """Measure everything that is there and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--genai", nargs="*", default=[], help="models of onnxruntime-genai")
    parser.add_argument("--engines", type=Path, help="where ours are, or are built to stay")
    parser.add_argument("--quantization", default="int4_wo")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as directory:
        contenders = _contenders(args, args.engines or Path(directory))
        rounds: dict[str, list[Figures]] = defaultdict(list)
        for _ in range(args.rounds):
            for name, (measure, model) in contenders.items():
                rounds[name].append(_alone(measure, model))
                print(f"{name:36}", *_listed(rounds[name][-1]), flush=True)
    medians = {
        name: {
            n: statistics.median(f[n] for f in found if n in f) for n in BATCHES if n in found[0]
        }
        for name, found in rounds.items()
    }
    print(f"medians of {args.rounds}")
    for name, figures in medians.items():
        print(f"{name:36}", *_listed(figures))
    if args.json:
        args.json.write_text(json.dumps(medians, indent=1) + "\n")


def _listed(figures: Figures) -> list[str]:
    return [f"{n:3} requests {ms:7.2f} ms" for n, ms in figures.items()] or ["failed"]


def _contenders(
    args: argparse.Namespace, directory: Path
) -> dict[str, tuple[Callable[[str], Figures], str]]:
    """What measures a model, and the model, by the name of each."""
    from slipstream.builder.build import build
    from slipstream.builder.options import BuildOptions, OrtAttention

    kinds: list[tuple[str, OrtAttention]] = [
        ("cuda", "auto"), ("onnxruntime", "slots"), ("onnxruntime", "pages"),
    ]  # fmt: skip
    found: dict[str, tuple[Callable[[str], Figures], str]] = {}
    limits: dict[str, Any] = {"max_batch_size": max(BATCHES), "max_seq_len": INPUT + OUTPUT}
    for dtype in args.dtypes:
        for target, attention in kinds:
            name = f"{target} {attention} {dtype}"
            options = BuildOptions(
                target=target, dtype=dtype, quantization=args.quantization,
                group_size=_GROUP if args.quantization == "int4_wo" else None,
                symmetric=True if args.quantization == "int4_wo" else None,
                ort_attention=attention, **limits,
            )  # fmt: skip
            if not (directory / name).exists():
                build(args.checkpoint, directory / name, options)
            found[name] = slipstream, str(directory / name)
            if target == "onnxruntime":
                found[f"{name}, for one alone"] = for_one, str(directory / name)
    for model in args.genai:
        found[f"onnxruntime-genai {Path(model).name}"] = genai, model
    return found


def for_one(engine: str) -> Figures:
    """Ours, told that there will be one request at a time."""
    return slipstream(engine, 1)


def slipstream(engine: str, requests: int = max(BATCHES)) -> Figures:
    """Ours, for so many requests at once."""
    from slipstream import LLM, SamplingParams

    with LLM(engine, enable_prefix_caching=False, max_batch_size=requests) as llm:

        def run(prompts: list[list[int]], tokens: int) -> None:
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))

        return _decode(run, [batch for batch in BATCHES if batch <= requests])


def genai(model: str) -> Figures:
    """One static batch of onnxruntime-genai."""
    import numpy as np
    import onnxruntime_genai as og

    loaded = og.Model(model)

    def run(prompts: list[list[int]], tokens: int) -> None:
        params = og.GeneratorParams(loaded)
        length = INPUT + tokens
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=length, min_length=length
        )
        generator = og.Generator(loaded, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()

    return _decode(run, BATCHES)


def _decode(run: Callable[[list[list[int]], int], None], batches: Sequence[int]) -> Figures:
    """Milliseconds a step of each batch that runs."""
    rng, figures = random.Random(0), Figures()
    for batch in batches:
        prompts = [[rng.randrange(1000, 30000) for _ in range(INPUT)] for _ in range(batch)]
        try:
            run(prompts, 8)  # graphs are captured, memory is taken
            seconds = {}
            for tokens in (1, OUTPUT):
                start = time.perf_counter()
                run(prompts, tokens)
                seconds[tokens] = time.perf_counter() - start
        except RuntimeError as error:  # what a peer does not take
            print(f"{batch} requests: {error}")
            continue
        figures[batch] = 1e3 * (seconds[OUTPUT] - seconds[1]) / (OUTPUT - 1)
    return figures


def _alone(measure: Callable[[str], Figures], model: str) -> Figures:
    """The figures of a process of its own; none if it fails."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, measure, model))
    process.start()
    there.close()
    try:
        figures: Figures = here.recv()
    except EOFError:
        figures = {}
    process.join()
    return figures


def _send(pipe: Connection, measure: Callable[[str], Figures], model: str) -> None:
    pipe.send(measure(model))


if __name__ == "__main__":
    main()
