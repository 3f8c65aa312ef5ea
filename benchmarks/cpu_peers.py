"""SmolLM2-135M on a CPU: Slipstream, llama.cpp and onnxruntime-genai side by side in one run.

    pip install -e '.[dev]' llama-cpp-python onnxruntime-genai
    python benchmarks/cpu_peers.py --json benchmarks/results/cpu_peers.json

Each peer lives in a process of its own and measures itself when it is told to; only one works at a
time, in rounds that interleave them. llama.cpp and Slipstream read the same Q4_1 GGUF;
onnxruntime-genai gets its own int4 build (block 32, accuracy level 4) of the same weights.
Concurrency: llama.cpp's Python binding serves one context, so its eight requests run in turn;
onnxruntime-genai runs them as one static batch; Slipstream batches them in flight.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from slipstream import SamplingParams

ROOT = Path(__file__).parents[1]
DECODE, CONCURRENT = 64, 8
# How a package is imported that is not called so.
_MODULES = {"llama-cpp-python": "llama_cpp", "onnxruntime-genai": "onnxruntime_genai"}
Prompt = list[int]


class Peer(Protocol):
    """An engine that completes prompts of token ids greedily, to a given length."""

    def complete(self, prompt: Prompt, new_tokens: int) -> float:
        """Generate ``new_tokens`` for one prompt; the time at which the first of them was there."""
        ...

    def complete_all(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """Generate ``new_tokens`` for every prompt, in the way that serves them all soonest."""
        ...


class Slipstream:
    """This project."""

    def __init__(self, model: str, threads: int) -> None:
        from slipstream import LLM

        self._llm = LLM(model, num_threads=threads, enable_prefix_caching=False)

    def complete(self, prompt: Prompt, new_tokens: int) -> float:
        """A stream of tokens."""
        arrivals = [time.perf_counter() for _ in self._llm.stream(prompt, self._params(new_tokens))]
        return arrivals[0]

    def complete_all(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """One call; requests share steps."""
        self._llm.generate(list(prompts), self._params(new_tokens))

    @staticmethod
    def _params(new_tokens: int) -> SamplingParams:
        from slipstream import SamplingParams

        return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)


class LlamaCpp:
    """llama-cpp-python on the GGUF itself."""

    def __init__(self, model: str, threads: int) -> None:
        from llama_cpp import Llama

        self._llm = Llama(
            model,
            n_ctx=8192,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def complete(self, prompt: Prompt, new_tokens: int) -> float:
        """The binding's own generator."""
        self._llm.reset()
        made = self._llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
        next(made)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(made)
        return first

    def complete_all(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """One context, prompts in turn."""
        for prompt in prompts:
            self.complete(prompt, new_tokens)


class OnnxRuntimeGenAI:
    """onnxruntime-genai on its own int4 model."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = json.loads((Path(model) / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        (Path(model) / "genai_config.json").write_text(json.dumps(config))
        self._og, self._model = og, og.Model(model)

    def complete(self, prompt: Prompt, new_tokens: int) -> float:
        """A batch of one."""
        return self._generate([prompt], new_tokens)

    def complete_all(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """One static batch; prompts are of one length."""
        self._generate(prompts, new_tokens)

    def _generate(self, prompts: Sequence[Prompt], new_tokens: int) -> float:
        import numpy as np

        params = self._og.GeneratorParams(self._model)
        length = len(prompts[0]) + new_tokens
        params.set_search_options(
            do_sample=False, max_length=length, min_length=length, batch_size=len(prompts)
        )
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return first


PEERS: dict[str, Callable[[str, int], Peer]] = {
    "slipstream": Slipstream,
    "llama.cpp": LlamaCpp,
    "onnxruntime-genai": OnnxRuntimeGenAI,
}


def measure(peer: Peer, rng: np.random.Generator) -> dict[str, float]:
    """Tokens per second of each task, on new random prompts every time."""

    def prompt(length: int) -> Prompt:
        made: Prompt = rng.integers(20, 40000, length).tolist()
        return made

    def rates(length: int) -> tuple[float, float]:
        start = time.perf_counter()
        first = peer.complete(prompt(length), DECODE + 1)
        return length / (first - start), DECODE / (time.perf_counter() - first)

    result: dict[str, float] = {}
    _, result["decode"] = rates(64)
    result["prefill_512"], result["decode_at_512"] = rates(512)
    result["prefill_4k"], result["decode_at_4k"] = rates(4000)
    start = time.perf_counter()
    peer.complete_all([prompt(32) for _ in range(CONCURRENT)], DECODE)
    result["concurrent_8"] = CONCURRENT * DECODE / (time.perf_counter() - start)
    return result


def serve(name: str, model: str, threads: int, pipe: Connection) -> None:
    """A peer's process: one measurement for every seed that arrives."""
    import numpy as np

    peer = PEERS[name](model, threads)
    peer.complete([1, 2, 3, 4] * 8, 8)
    pipe.send("ready")
    while (seed := pipe.recv()) is not None:
        pipe.send(measure(peer, np.random.default_rng(seed)))


def prepare(gguf: Path, scratch: Path) -> dict[str, str]:
    """The model of every peer, made from one GGUF."""
    engine, genai = scratch / "engine", scratch / "genai"
    subprocess.run(
        [sys.executable, "-m", "slipstream.server.cli", "build", gguf, "-o", engine], check=True
    )
    checkpoint = scratch / "checkpoint"
    export_dense(gguf, checkpoint)
    command = f"-m onnxruntime_genai.models.builder -i {checkpoint} -o {genai} -p int4 -e cpu"
    options = "--extra_options int4_block_size=32 int4_accuracy_level=4"
    builder = [sys.executable, *shlex.split(f"{command} {options}")]
    with (scratch / "genai.log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(builder, check=True, stdout=log, stderr=log, env=environment)
    return {"slipstream": str(engine), "llama.cpp": str(gguf), "onnxruntime-genai": str(genai)}


def export_dense(gguf: Path, directory: Path) -> None:
    """The GGUF's weights as a float32 Hugging Face checkpoint."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    weights = {
        key: value.contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"
    }
    save_file(weights, directory / "model.safetensors")
    config = {
        key: value for key, value in model.config.to_dict().items() if key != "quantization_config"
    }
    config["architectures"] = ["LlamaForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config, default=str))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def run(models: dict[str, str], rounds: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """Interleaved measurements of every peer."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, model in models.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, model, threads, theirs), daemon=True).start()
        assert pipes[name].recv() == "ready"
    results: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for seed in range(rounds):
        for name, pipe in pipes.items():
            time.sleep(0.5)  # lets the previous peer's spinning threads go to sleep
            pipe.send(seed)
            results[name].append(pipe.recv())
        print(f"round {seed + 1} of {rounds}", file=sys.stderr)
    for pipe in pipes.values():
        pipe.send(None)
    return results


def report(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians in tokens/s, and ours over theirs as the median of the rounds' ratios."""
    ours = results["slipstream"]
    table: dict[str, dict[str, float]] = {}
    print(f"{'tokens/s (median)':24}" + "".join(f"{name:>22}" for name in results))
    for task in ours[0]:
        row = {name: statistics.median(r[task] for r in rounds) for name, rounds in results.items()}
        ratios = {
            f"vs {name}": statistics.median(
                a[task] / b[task] for a, b in zip(ours, rounds, strict=True)
            )
            for name, rounds in results.items()
            if name != "slipstream"
        }
        table[task] = row | ratios
        cells = [
            f"{row[name]:10.1f}"
            + (f" ({ratios[f'vs {name}']:4.2f}x)" if f"vs {name}" in ratios else "")
            for name in results
        ]
        print(f"{task:24}" + "".join(f"{cell:>22}" for cell in cells))
    return table


def cpu_name() -> str:
    """The processor as the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    # Imported here because peers run in processes of their own, without this package.
    from slipstream.cores import usable_cores

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--models", type=json.loads, help="JSON of peer -> model, to skip the preparation"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models
        if models is None:
            fetch = [sys.executable, str(ROOT / "examples" / "fetch_smollm2.py")]
            gguf = Path(
                subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
            )
            models = prepare(gguf, Path(scratch))
        results = run(models, arguments.rounds, arguments.threads)
    table = report(results)
    if arguments.json:
        packages = ("slipstream", "onnxruntime", "llama-cpp-python", "onnxruntime-genai", "numpy")
        facts = {"cpu": cpu_name(), "threads": arguments.threads, "rounds": arguments.rounds}
        versions = {name: version(name) for name in packages if find_spec(_MODULES.get(name, name))}
        text = json.dumps({**facts, "versions": versions, "tokens_per_second": table}, indent=2)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
