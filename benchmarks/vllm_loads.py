"""Whether another runtime loads what `slipstream quantize` writes, and says the same tokens.

    python benchmarks/vllm_loads.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/loads --site /tmp/site
    python benchmarks/vllm_loads.py MODEL /tmp/loads --loader transformers --formats fp8 int4_awq
    python benchmarks/vllm_loads.py MODEL /tmp/loads --make

The model, taken off the grid of its 4-bit file (``off_grid.py``), is quantized into DIRECTORY, a
checkpoint a format; what lies there is kept. The runtime goes on greedily with a few prompts, in a
process of its own, with ``--site`` as its PYTHONPATH. Its tokens are judged by our reading of the
same files, in float32 with inputs rounded as the format says: at every token, how far the logit of
what was said lies below the highest. A runtime rounds to bfloat16 on the way, so that near-ties may
fall otherwise: what that may do is taken from our own reading of the same files in bfloat16. Beside
them, the same of our own engine, and how many tokens both say alike before the first that differs:
from there on they answer different texts. Rows of other formats that
``--json`` has already stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = list[list[int]]

FORMATS = ("int4_awq", "int4_gptq", "int8_sq", "fp8", "fp8_block")
PROMPTS = (
    "Name three rivers of Europe.",
    "Write a function in Python that reverses a string.",
    "Why is the sky blue?",
    "Translate into French: the cat sleeps on the warm stone.",
)
NEW_TOKENS = 48
# What is proved is how files are read, not how good they are: little text serves.
CALIBRATION = {"calib_size": 8, "calib_max_seq_length": 256}
EVALUATED_CHARACTERS = 1000
# Times the mean and largest margin of what our own reading prefers once it rounds to bfloat16: a
# runtime rounds in other places, and in kernels of its own. vLLM was seen at 0.6 to 1.2 times;
# neighbouring columns swapped in one linear gave at least 2.4 times the largest, 5 times the mean.
TOLERANCE = 2
# A runtime on one GPU, without a network, compilation or a sampler that compiles itself.
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}


def say_vllm(checkpoint: str, prompts: Tokens, count: int) -> Tokens:
    """vLLM's greedy tokens; runs where vLLM can be imported, and Slipstream need not."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def say_transformers(checkpoint: str, prompts: Tokens, count: int) -> Tokens:
    """transformers' greedy tokens, loaded without an argument."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    said = []
    for ids in prompts:
        config = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
        out = model.generate(torch.tensor([ids]).to(model.device), **config)
        said.append(out[0, len(ids) :].tolist())
    return said


LOADERS = {"vllm": say_vllm, "transformers": say_transformers}


def make(model: Path, directory: Path, formats: list[str]) -> None:
    """The checkpoints that are not there yet, and the dense one that they are made of; one that was
    cut short is gone on with."""
    from accuracy import SEED, TEXTS, text_of
    from off_grid import OffGridCheckpoint, write_directory

    from slipstream.builder.checkpoints import open_checkpoint
    from slipstream.quantize.options import SCHEMES, QuantizeOptions
    from slipstream.quantize.quantize import quantize

    dense, text = directory / "dense", directory / "evaluation.txt"
    if not text.exists():
        text.write_text((TEXTS / "evaluation_prose.txt").read_text()[:EVALUATED_CHARACTERS])
    if not dense.exists():
        part = directory / "dense.part"
        write_directory(OffGridCheckpoint(open_checkpoint(model), SEED), part).rename(dense)
    for qformat in formats:
        if (directory / qformat).exists():
            continue
        started = time.perf_counter()
        options: Any = {"qformat": qformat, "eval_dataset": str(text)}
        options |= {} if SCHEMES[qformat].algorithm == "rtn" else CALIBRATION
        quantize(dense, directory / qformat, QuantizeOptions(**options), text_of, resume=True)
        seconds = time.perf_counter() - started
        size = megabytes(directory / qformat)
        print(f"made {qformat}: {size:.1f} MB, {seconds:.0f} s", flush=True)


def megabytes(checkpoint: Path) -> float:
    """Size of its weights."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e6


def encoded(checkpoint: Path) -> Tokens:
    """The prompts in the model's chat template."""
    from slipstream.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(checkpoint)
    chats = ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
    return [
        list(tokenizer.encode(tokenizer.apply_chat_template(chat), add_special_tokens=False))
        for chat in chats
    ]


def say_elsewhere(
    loader: str, checkpoint: Path, prompts: Tokens, site: str | None, seconds: float
) -> dict[str, Any] | str:
    """What a runtime says and what it ran on, from a process of its own, or why it does not."""
    stem = checkpoint.parent / f"{loader}-{checkpoint.name}"
    inputs, outputs, log = (Path(f"{stem}{end}") for end in ("-prompts.json", ".json", ".log"))
    inputs.write_text(json.dumps([str(checkpoint), prompts, NEW_TOKENS]))
    outputs.unlink(missing_ok=True)
    environment = {**os.environ, **OFFLINE} | ({"PYTHONPATH": site} if site else {})
    command = [sys.executable, __file__, "--child", loader, str(inputs), str(outputs)]
    with log.open("w") as file:
        try:
            subprocess.run(
                command, env=environment, stdout=file, stderr=file, timeout=seconds, check=True
            )
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} s ({log})"
        except subprocess.CalledProcessError:
            lines = [line for line in log.read_text().splitlines() if "Error" in line]
            return f"{lines[-1].strip() if lines else 'failed'} ({log})"
    found: dict[str, Any] = json.loads(outputs.read_text())
    return found


def say_ours(checkpoint: Path, prompts: Tokens, target: str) -> Tokens:
    """Greedy tokens of our own engine of the same files."""
    import tempfile

    from slipstream.builder.build import build
    from slipstream.builder.options import BuildOptions
    from slipstream.runtime.llm import LLM
    from slipstream.runtime.sampling.params import SamplingParams

    options: Any = {"target": target, "max_seq_len": 1024, "max_batch_size": 8}
    with tempfile.TemporaryDirectory() as directory:
        build(checkpoint, Path(directory) / "engine", BuildOptions(**options))
        with LLM(Path(directory) / "engine", kv_cache_bytes=256 << 20) as llm:
            params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
            outputs = llm.generate(prompts, params)
            return [list(output.outputs[0].token_ids) for output in outputs]


def logits(checkpoint: Path, prompts: Tokens, said: Tokens, dtype: str) -> NDArray[np.float32]:
    """Our reading's, ``[tokens, vocab]``: of each token said, given those before it."""
    import torch

    from slipstream.builder.checkpoints import open_checkpoint
    from slipstream.quantize.forward import CheckpointModel

    windows = [np.array(p + s, np.int32) for p, s in zip(prompts, said, strict=True)]
    model = CheckpointModel(open_checkpoint(checkpoint), getattr(torch, dtype))
    # No window is longer than a block of logits.
    blocks = zip(prompts, model.logits(windows), strict=True)
    return np.concatenate([block[len(prompt) - 1 : -1] for prompt, block in blocks])


def margins(exact: NDArray[np.float32], tokens: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """How far tokens lie below the likeliest, in units of the logits."""
    below = exact.max(axis=1) - exact[np.arange(len(tokens)), tokens]
    return {
        "likeliest": int((below == 0).sum()),
        "mean_margin": round(float(below.mean()), 4),
        "largest_margin": round(float(below.max()), 4),
    }


def alike(ours: Tokens, theirs: Tokens) -> list[int]:
    """How many tokens of each answer are the same before the first that differs."""
    pairs = (zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=True))
    return [next((i for i, (a, b) in enumerate(p) if a != b), NEW_TOKENS) for p in pairs]


def judged(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One format: the row of the table."""
    prompts = encoded(checkpoint)
    row: dict[str, Any] = {"megabytes": round(megabytes(checkpoint), 1)}
    started = time.perf_counter()
    found = say_elsewhere(
        arguments.loader, checkpoint, prompts, arguments.site, arguments.seconds_each
    )
    row["seconds"] = round(time.perf_counter() - started, 1)
    if isinstance(found, str):
        return {**row, "passed": False, "error": found}
    said, ours = found["said"], say_ours(checkpoint, prompts, arguments.target)
    exact = logits(checkpoint, prompts, said, "float32")
    theirs = margins(exact, np.concatenate(said))
    rounded = margins(exact, logits(checkpoint, prompts, said, "bfloat16").argmax(axis=1))
    engine = margins(logits(checkpoint, prompts, ours, "float32"), np.concatenate(ours))
    allowed = {name: TOLERANCE * rounded[name] for name in ("mean_margin", "largest_margin")}
    return {
        **row,
        "passed": all(theirs[name] <= most for name, most in allowed.items()),
        "tokens": len(exact),
        **theirs,
        "our_reading_in_bfloat16": rounded,
        "our_engine": engine,
        "alike": alike(ours, said),
        **found,
    }


def line(qformat: str, row: dict[str, Any]) -> str:
    """A row as text."""
    verdict = "ok" if row["passed"] else "FAILED"
    start = f"{qformat:10} {verdict:7}{row['megabytes']:7.1f} MB {row['seconds']:6.1f} s  "
    if "error" in row:
        return start + str(row["error"])
    parts = [("", row), ("our reading in bfloat16 ", row["our_reading_in_bfloat16"])]
    parts.append(("our engine ", row["our_engine"]))
    told = "; ".join(
        f"{name}{part['likeliest']} of {row['tokens']}, largest margin {part['largest_margin']:.3f}"
        for name, part in parts
    )
    return f"{start}likeliest by our logits {told}; as our engine for {row['alike']} tokens"


def child(loader: str, inputs: Path, outputs: Path) -> None:
    """The runtime's own process."""
    from importlib.metadata import version

    import torch

    said = LOADERS[loader](*json.loads(inputs.read_text()))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {name: version(name) for name in (loader, "torch")}
    outputs.write_text(json.dumps({"device": device, "versions": versions, "said": said}))


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--make", action="store_true", help="write the checkpoints and stop")
    parser.add_argument("--loader", choices=LOADERS, default="vllm")
    parser.add_argument("--site", help="PYTHONPATH of the other runtime")
    parser.add_argument("--target", default="auto", help="of our own engine")
    parser.add_argument("--seconds-each", type=float, default=150)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    make(arguments.model, arguments.directory, arguments.formats)
    rows: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["formats"]
    for qformat in [] if arguments.make else arguments.formats:
        rows[qformat] = judged(arguments.directory / qformat, arguments)
        print(line(qformat, rows[qformat]), flush=True)
        if arguments.json:
            result = {"loader": arguments.loader, "tolerance": TOLERANCE, "formats": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
