"""Speed on an NVIDIA GPU: shapes of known models with random weights, each figure beside its floor.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --models qwen3-30b-a3b --measures decode prefill throughput_256
    python benchmarks/gpu.py --formats fp8 --measures contexts prefixes lognormal sampled
    python benchmarks/gpu.py --formats bf16 --measures forms --tokenizer engines/smollm2
    python benchmarks/gpu.py --formats fp8 bf16 --measures verification speculation speculation_auto
    python benchmarks/gpu.py --measures decode --deterministic
    python benchmarks/gpu.py --tp-size 2 --formats bf16 fp8
    python benchmarks/gpu.py --tp-size 2 --hollow --models llama-70b --formats fp8 --measures decode

What is asked stands in ``gpu_loads.py``, and ``gpu_vllm.py`` asks another engine for it. Prompts
are random tokens, no prefix is shared unless a measure is of that, sampling is greedy; in "company"
one request of 64 asks for more than that. The floor of a decode step is the bytes it must read over
the measured read bandwidth, those of experts if every token chooses among all alike; that of a
prefill, its products over the measured rate; of several ranks those of one. Experts a layer: how
many different ones the last step of a decode chose. Every model and format is measured in a process
of its own: one that fails, or takes longer than ``--seconds``, ends no other, and what it had
measured is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_hollow import write_hollow_engine
from gpu_loads import LOADS, LONGEST, Ask, Loads
from gpu_models import (
    Routes,
    matrices,
    random_engine,
    random_plan,
    write_random_engine,
)
from gpu_shapes import (
    GPT_OSS_20B,
    LLAMA_8B,
    LLAMA_70B,
    MIXTRAL_8X7B,
    MXFP4,
    QWEN3_30B_A3B,
    SMOLLM2,
)
from gpu_speculation import OPTIONS as SYNTHETIC
from gpu_speculation import by_load, fixed_lengths, steady, table
from gpu_speculation import drafting as drafting_ms
from gpu_speculation import verification as verification_ms

from slipstream.builder.build import Plan
from slipstream.builder.engine import TACTICS, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.loading import load
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.engine_kernels import compile_again

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int4": {"quantization": "int4_wo", "group_size": 128, "symmetric": True},
    "mxfp4": {},  # the experts, as the checkpoint has them
}
MODELS = {
    "llama-8b": LLAMA_8B,
    "llama-70b": LLAMA_70B,
    "smollm2": SMOLLM2,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "gpt-oss-20b": GPT_OSS_20B,
}
# vLLM 0.26.0 with these shapes and measures (benchmarks/README.md): an 8B on one H200, mixtures of
# experts on one H100 80GB.
VLLM: dict[str, dict[str, float]] = {
    "llama-8b bf16": {
        "decode_1": 4.94, "decode_16": 5.18, "decode_64": 6.15, "prefill_2048": 55.2,
        "prefill_8192": 218.4, "throughput_512_256": 10101,
    },
    "llama-8b fp8": {
        "decode_1": 3.47, "decode_16": 3.61, "decode_64": 4.42, "prefill_2048": 34.0,
        "prefill_8192": 149.2,
    },
    "llama-8b int4": {
        "decode_1": 3.82, "decode_16": 3.98, "decode_64": 5.99, "prefill_2048": 54.5,
        "prefill_8192": 226.3, "throughput_512_256": 9588,
    },
    # Of two H200s, with TP2.
    "llama-8b bf16 on 2": {
        "decode_1": 3.50, "decode_16": 3.74, "decode_64": 4.21, "prefill_2048": 41.7,
        "throughput_256_of_512_256": 16331,
    },
    "qwen3-30b-a3b bf16": {
        "decode_1": 4.74, "decode_16": 17.7, "decode_64": 23.9, "prefill_2048": 83,
        "throughput_256_of_512_256": 3926,
    },
    "qwen3-30b-a3b fp8": {"decode_1": 4.56},
    "gpt-oss-20b mxfp4": {
        "decode_1": 3.38, "prefill_2048": 54, "throughput_256_of_512_256": 11434,
    },
}  # fmt: skip
# What one request of a batch may ask for beside sampling.
COMPANY: dict[str, dict[str, Any]] = {
    "plain": {},
    "words": {"bad_words_token_ids": [[1, 2], [3, 4, 5]]},
    "prompt_scores": {"prompt_logprobs": 5},
    "biases": {"logit_bias": dict.fromkeys(range(1000), 1.0)},
    "long_lists": {"logprobs": 100},
}
# Which a model with random weights does not come to the end of.
FORM = StructuredOutput(
    json={
        "type": "array",
        "minItems": 1000,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 3},
                "age": {"type": "integer"},
                "kind": {"enum": ["person", "animal", "plant"]},
            },
            "required": ["name", "age", "kind"],
            "additionalProperties": False,
        },
    }
)
Figures = dict[str, float]
_CHILD = multiprocessing.get_context("fork")  # which finds all modules there


@dataclass(frozen=True, slots=True)
class Cell:
    """A model in a format, what of it is measured, and with which tactics."""

    model: str
    form: str
    measures: list[str]
    tactics: Path | None
    tokenizer: Path | None = None
    tp_size: int = 1
    hollow: bool = False
    deterministic: bool = False

    @property
    def name(self) -> str:
        """As a report calls it."""
        ranks = "" if self.tp_size == 1 else f" on {self.tp_size}"
        mode = " deterministic" if self.deterministic else ""
        return f"{self.model} {self.form}{ranks}{mode}"

    def plan(self) -> Plan:
        """Its compiled program."""
        longest = 8192 if self.model == "smollm2" else LONGEST if self.keeps_prefixes else 8448
        options = BuildOptions(
            target="cuda", max_seq_len=longest, tp_size=self.tp_size, **FORMATS[self.form]
        )
        return random_plan(shape_of(self.model, self.form), options, head=self.has_head)

    @property
    def has_head(self) -> bool:
        """Whether it has an EAGLE-3 head, which takes memory and a little of every step."""
        return self.tp_size == 1 and bool(set(WITH_HEAD) & set(self.measures))

    @property
    def keeps_prefixes(self) -> bool:
        """Whether prompts that were computed are found again."""
        return bool(set(WITH_PREFIXES) & set(self.measures))


def shape_of(model: str, form: str) -> dict[str, Any]:
    """The config.json of a model whose weights are stored in a format."""
    return {**MODELS[model], **(MXFP4 if form == "mxfp4" else {})}


def usual_formats(model: str) -> list[str]:
    """Those in which people run a model."""
    return ["mxfp4"] if model == "gpt-oss-20b" else ["bf16", "fp8", "int4"]


class Runner:
    """One engine under measurement."""

    def __init__(self, engine: LoadedEngine, routes: Routes) -> None:
        self.engine, self.routes = engine, routes
        self.grammars = GrammarCompiler(engine.tokenizer, engine.vocab_size)
        started = time.perf_counter()
        self.loop = EngineLoop(engine)
        self.capture_seconds = time.perf_counter() - started
        self.loads = Loads(self.run, engine.vocab_size)
        self._ids = itertools.count()

    def seconds(
        self,
        count: int,
        input_len: int,
        output_len: int,
        form: StructuredOutput | None = None,
        **one: Any,  # noqa: ANN401 - sampling parameters
    ) -> float:
        """Until all of ``count`` requests that come at once are done, held to a form if there is
        one; the last asks for ``one``."""
        asks = [Ask(prompt, output_len) for prompt in self.loads.prompts(count, input_len)]
        asks[-1] = replace(asks[-1], sampling=one)
        return self.run(asks, form)

    def run(self, asks: Sequence[Ask], form: StructuredOutput | None = None) -> float:
        """Seconds until all are done that come at once."""
        requests = [self._request(ask, form) for ask in asks]
        torch.cuda.synchronize()
        started = time.perf_counter()
        for request in requests:
            self.loop.add_request(request)
        ends = set()
        while self.loop.has_work:
            ends |= {output.outputs[0].finish_reason for output in self.loop.step()}
        if ends != {"length"}:
            raise RuntimeError(f"requests ended by {ends}; {self.loop.unhealthy}")
        return time.perf_counter() - started

    def _request(self, ask: Ask, form: StructuredOutput | None) -> Request:
        asked = {"temperature": 0, **ask.sampling}
        params = SamplingParams(
            max_tokens=ask.output_len, ignore_eos=True, structured=form, **asked
        )
        grammar = self.grammars.compile(params.structured) if params.structured else None
        name = str(next(self._ids))
        return Request(name, ask.prompt, params, output_kind="final", grammar=grammar)


def decode(runner: Runner) -> Figures:
    """ms a token at batch 1, 16 and 64, and ms to the first of 128 tokens."""
    figures = {}
    for batch in (1, 16, 64):
        figures[f"decode_{batch}"] = runner.loads.decode_ms(batch)
        if (distinct := runner.routes.distinct(batch)) is not None:
            figures[f"experts_a_layer_{batch}"] = distinct
    figures["ttft_128"] = statistics.median(runner.seconds(1, 128, 1) for _ in range(5)) * 1e3
    return figures


def load_measure(name: str) -> Callable[[Runner], Figures]:
    """One of the loads that are asked of other engines, too."""
    return lambda runner: dict(LOADS[name](runner.loads))


def throughput_warm(runner: Runner) -> Figures:
    """The first of those once more, when a load like it has had all graphs captured that it takes:
    as it shrinks at the end, it comes to a new size every few steps."""
    runner.seconds(512, 512, 256)
    return {"throughput_warm_512_256": 512 * 256 / runner.seconds(512, 512, 256)}


def throughput_256(runner: Runner) -> Figures:
    """Output tokens a second of 256 requests that come at once, and of as many again: the first
    time graphs are captured on the way."""
    name = "throughput_256_of_512_256"
    first, again = (256 * 256 / runner.seconds(256, 512, 256) for _ in range(2))
    return {name: first, f"{name}_again": again}


def company(runner: Runner) -> Figures:
    """Output tokens a second of 64 requests, plain and with one that asks for more."""
    figures = {}
    for name, one in COMPANY.items():
        runner.seconds(64, 128, 8, **one)
        times = [runner.seconds(64, 128, 128, **one) for _ in range(3)]
        figures[f"company_{name}"] = 64 * 128 / statistics.median(times)
    return figures


def forms(runner: Runner) -> Figures:
    """ms a token of 64 requests, plain and all held to a schema, without forced tokens."""
    if runner.engine.config.enable_jump_decoding:
        print("forms needs --tokenizer")
        return {}
    figures = {}
    for name, form in (("plain", None), ("held", FORM)):
        runner.seconds(64, 128, 8, form)
        pairs = [
            (runner.seconds(64, 128, 256, form) - runner.seconds(64, 128, 1, form)) / 255
            for _ in range(5)
        ]
        figures[f"forms_{name}"] = statistics.median(pairs) * 1e3
    figures["forms_cost"] = figures["forms_held"] / figures["forms_plain"] - 1
    return figures


def verification(runner: Runner) -> Figures:
    """ms of a step of 1, 2, 4 and 8 rows at batch 1, by the device alone and with the host, and of
    what a head guesses after it."""
    return {**verification_ms(runner, runner.loop), **drafting_ms(runner.loop)}


def speculation(runner: Runner) -> Figures:
    """How much faster three drafts make a batch, of which are right that draws say so."""
    return fixed_lengths(runner, runner.loop)


def speculation_auto(runner: Runner) -> Figures:
    """The same where load decides on their number, and both while all of a batch run."""
    return {**by_load(runner, runner.loop), **steady(runner.loop)}


def profile(runner: Runner) -> Figures:
    """µs of every kernel in a step of one decode, and how long the GPU idles between two."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    runner.seconds(1, 128, 64)
    with record(activities=[ProfilerActivity.CUDA]) as profiler:
        runner.seconds(1, 128, 64)
    events = sorted(
        (e for e in profiler.events() if str(e.device_type).endswith("CUDA")),
        key=lambda e: e.time_range.start,
    )
    decodes = events[len(events) // 4 :]
    steps = sum(event.name == "argmax_combine_kernel" for event in decodes)
    spent: dict[str, float] = defaultdict(float)
    busy, idle, end = 0.0, 0.0, decodes[0].time_range.start
    for event in decodes:
        spent[event.name] += event.time_range.elapsed_us()
        idle += max(0.0, event.time_range.start - end)
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    figures = {"gpu_busy_us_per_step": busy / steps, "gpu_idle_us_per_step": idle / steps}
    # Kernels overlap: the next begins, and prefetches, while the last still runs.
    for name, time_us in sorted(spent.items(), key=lambda item: -item[1])[:12]:
        figures[f"us {name[:60]}"] = time_us / steps
    return figures


MEASURES: dict[str, Callable[[Runner], Figures]] = {
    "decode": decode,
    "prefill": load_measure("prefill"),
    "throughput": load_measure("throughput"),
    "contexts": load_measure("contexts"),
    "long_prefill": load_measure("long_prefill"),
    "prefixes": load_measure("prefixes"),
    "lognormal": load_measure("lognormal"),
    "sampled": load_measure("sampled"),
    "throughput_warm": throughput_warm,
    "throughput_256": throughput_256,
    "company": company,
    "forms": forms,
    "verification": verification,
    "speculation": speculation,
    "speculation_auto": speculation_auto,
    "profile": profile,
}


# The rows of drafts take memory, and whoever could guess the host a little time.
WITH_HEAD = ("verification", "speculation", "speculation_auto")
# Prompts of others are known there, and some are long.
WITH_PREFIXES = ("contexts", "long_prefill", "prefixes", "lognormal", "sampled")
USUAL = [name for name in MEASURES if name not in (*WITH_HEAD, *WITH_PREFIXES)]


def floors(plan: Plan, form: str, read_rate: float) -> Figures:
    """ms below which no step can be: bytes of weights, or products, over the measured rates."""
    found = list(matrices(plan))
    layers = [m for m in found if m.format.shape[0] != plan.checkpoint.config.vocab_size]
    per_token = 2 * sum(matrix.products for matrix in layers)
    rate = product_rate(torch.float8_e4m3fn if form == "fp8" else torch.bfloat16)
    result = {
        f"decode_{batch}": sum(matrix.read(batch) for matrix in found) / read_rate * 1e3
        for batch in (1, 16, 64)
    }
    for length in (2048, 8192):
        result[f"prefill_{length}"] = per_token * length / rate * 1e3
    return result


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GiB."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return data.nbytes / _seconds(lambda: data.sum())


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of cuBLAS on random numbers: 2,048 tokens, a weight of 28,672 by 4,096."""
    m, n, k = 2048, 28672, 4096
    a = torch.randn(m, k, device="cuda").to(dtype)
    b = torch.randn(n, k, device="cuda").to(dtype)
    if dtype == torch.float8_e4m3fn:
        one_a = torch.ones(m, 1, device="cuda")
        one_b = torch.ones(1, n, device="cuda")
        call = lambda: torch._scaled_mm(  # noqa: E731
            a, b.t(), one_a, one_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        call = lambda: a @ b.t()  # noqa: E731
    return 2 * m * n * k / _seconds(call)


def _seconds(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def environment() -> dict[str, str]:
    """What a result depends on."""
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu_driver_clock": gpu,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def measure(cell: Cell, report: Connection) -> None:
    """Send all that is known of a cell, after each of its measures."""
    started = time.perf_counter()
    rate, plan = read_bandwidth(), cell.plan()
    floor, peer = floors(plan, cell.form, rate), VLLM.get(cell.name, {})
    routes = Routes(plan.checkpoint.config.num_layers)
    options: dict[str, Any] = dict(SYNTHETIC) if cell.has_head else {}
    options |= {
        "enable_prefix_caching": cell.keeps_prefixes,
        "enable_jump_decoding": cell.tokenizer is None,
        "deterministic": cell.deterministic,
    }
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="slipstream-", dir=scratch(plan)) as directory:
        if cell.hollow:
            engine = hollow_engine(plan, Path(directory), cell.tactics, options)
        elif cell.tp_size == 1:
            engine = random_engine(plan, cell.tactics, **options)
        else:
            engine = written_engine(plan, Path(directory), cell.tactics, options, figures)
    if cell.tokenizer is not None:
        tokenizer = Tokenizer.from_directory(cell.tokenizer, engine.vocab_size)
        engine = replace(engine, tokenizer=tokenizer)
    torch.cuda.synchronize()
    figures["make_weights_s"] = time.perf_counter() - started - figures.get("load_s", 0.0)
    runner = Runner(engine, routes)
    figures["compile_and_capture_s"] = runner.capture_seconds
    if "load_s" in figures:
        figures["start_s"] = figures["load_s"] + runner.capture_seconds
    rates = {"read_tb_per_s": rate / 1e12}
    for name in cell.measures:
        measured = time.perf_counter()
        try:
            figures |= MEASURES[name](runner)
        except Exception as error:  # noqa: BLE001 - the other figures are still wanted
            print(f"{cell.name} {name} failed: {error!r}"[:2000], flush=True)
        figures[f"{name}_took_s"] = time.perf_counter() - measured
        report.send({**rates, "figures": figures, "floors": floor, "vllm": peer})
    runner.loop.shutdown()


def written_engine(
    plan: Plan, directory: Path, tactics: Path | None, options: dict[str, Any], figures: Figures
) -> LoadedEngine:
    """An engine of several ranks, from a directory; ``load_s`` is how long it took to load that."""
    write_random_engine(plan, directory)
    if tactics is not None:
        open_engine(directory).write_file(TACTICS, tactics.read_bytes())
    compile_again(open_engine(directory), torch.cuda.get_device_capability())
    torch.cuda.empty_cache()
    begun = time.perf_counter()
    engine = load(directory, options)
    figures["load_s"] = time.perf_counter() - begun
    return engine


def hollow_engine(
    plan: Plan, directory: Path, tactics: Path | None, options: dict[str, Any]
) -> LoadedEngine:
    """An engine whose ranks make their weights."""
    path = directory / "engine"
    path.mkdir()
    write_hollow_engine(plan, path, directory)
    if tactics is not None:
        open_engine(path).write_file(TACTICS, tactics.read_bytes())
    return load(path, options)


def scratch(plan: Plan) -> str | None:
    """Where the files of an engine are quickly written: memory, if there is room."""
    memory = Path("/dev/shm")
    size = 1.2 * plan.weight_bytes * plan.ranks
    room = memory.is_dir() and shutil.disk_usage(memory).free > size
    return str(memory) if plan.ranks > 1 and room else None


def entries(cell: Cell, seconds: float) -> Iterator[dict[str, Any]]:
    """What ``measure`` sends, in at most so many seconds; it runs in a process of its own."""
    reader, writer = _CHILD.Pipe(duplex=False)
    process = _CHILD.Process(target=measure, args=(cell, writer))
    process.start()
    writer.close()
    ends = time.monotonic() + seconds
    try:
        while reader.poll(max(0.0, ends - time.monotonic())):
            yield reader.recv()
        print(f"{cell.name} took more than {seconds:.0f} s", flush=True)
        process.kill()
    except EOFError:
        pass
    process.join()
    if process.exitcode:
        print(f"{cell.name} ended with {process.exitcode}", flush=True)


def show(cell: Cell, entry: dict[str, Any]) -> None:
    """Every figure of a cell beside its floor and vLLM's."""
    print(f"--- {cell.name}")
    if cell.has_head:
        print(table(entry["figures"]), flush=True)
    for name, value in entry["figures"].items():
        others = (("floor", entry["floors"].get(name)), ("vllm", entry["vllm"].get(name)))
        beside = [f"{label} {x:8.2f}" for label, x in others if x]
        print(f"{name:64}{value:10.3f}   {'   '.join(beside)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-8b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="Default: the model's usual.")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=USUAL)
    parser.add_argument("--tactics", type=Path, help="What gpu_linear.py stored.")
    parser.add_argument("--tp-size", type=int, default=1, help="GPUs that share every layer.")
    parser.add_argument(
        "--hollow", action="store_true", help="Ranks make their weights; nothing is told of starts."
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="Bits do not depend on who else is served."
    )
    parser.add_argument("--tokenizer", type=Path, help="Directory of one, for forms.")
    parser.add_argument("--seconds", type=float, default=600, help="For a model in a format.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = environment()
    given = arguments.measures, arguments.tactics, arguments.tokenizer, arguments.tp_size
    for model in arguments.models:
        for form in arguments.formats or usual_formats(model):
            cell = Cell(model, form, *given, arguments.hollow, arguments.deterministic)
            entry = None
            for entry in entries(cell, arguments.seconds):
                report.setdefault(model, {})[form] = entry
                if arguments.json:
                    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
            if entry:
                show(cell, entry)


if __name__ == "__main__":
    main()
