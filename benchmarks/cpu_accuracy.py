"""How far 4-bit engines are from the float32 model: Slipstream and llama.cpp on the same GGUF.

    python benchmarks/cpu_accuracy.py --json benchmarks/results/cpu_accuracy.json

The weights are the same everywhere; what differs is how kernels round activations (and KV pages)
on the way. The reference is transformers in float32; the text is docs/architecture.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peers import ROOT, cpu_name, export_dense
from numpy.typing import NDArray

TOKENS = 1024
WINDOW = 512
Logits = NDArray[np.float32]


def windows(checkpoint: Path) -> list[list[int]]:
    """Token ids of the text, in windows."""
    from transformers import AutoTokenizer

    text = (ROOT / "docs" / "architecture.md").read_text()
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    ids: list[int] = tokenizer(text)["input_ids"][:TOKENS]
    return [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]


def reference(checkpoint: Path, texts: list[list[int]]) -> Logits:
    """Logits of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0].numpy() for ids in texts]
    return np.concatenate(rows)


def slipstream(engine: Path, texts: list[list[int]]) -> Logits:
    """Logits of an engine, straight from its executor."""
    from slipstream.builder.contract import KV, LOGITS
    from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
    from slipstream.runtime.loading import load
    from slipstream.runtime.sampling.params import SamplingParams

    executor: Any = load(engine, {}).executor
    executor.reserve_kv(256 << 20)
    rows: list[Logits] = []
    for ids in texts:
        steps = np.arange(len(ids), dtype=np.int32)
        batch = StepBatch(
            token_ids=np.array(ids, np.int32),
            positions=steps,
            query_start=np.array([0, len(ids)], np.int32),
            context_len=np.array([len(ids)], np.int32),
            logits_rows=steps,
            sampling=[SamplingRow(SamplingParams(temperature=0), ids, [], 0, target=0)] * len(ids),
            slots=np.array([0], np.int32),
            sampling_slots=np.full(len(ids), -1, np.int32),
            pages={KV: PagedInputs(np.arange(len(ids) // 32 + 1, dtype=np.int32)[None], steps)},
        )
        pending = executor.submit(batch)
        pending.result()
        rows.append(pending.binding.outputs[LOGITS].copy())
    return np.concatenate(rows)


def llama_cpp(gguf: Path, texts: list[list[int]]) -> Logits:
    """Logits of llama-cpp-python."""
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)
    rows: list[Logits] = []
    for ids in texts:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], np.float32))
    return np.concatenate(rows)


def compare(logits: Logits, expected: Logits, texts: list[list[int]]) -> dict[str, float]:
    """KL(reference ‖ ours), agreement of the likeliest token, and both perplexities."""
    ours, theirs = _log_softmax(logits), _log_softmax(expected)
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    rows = np.concatenate([np.arange(len(t) - 1) + WINDOW * i for i, t in enumerate(texts)])
    following = np.concatenate([np.array(t[1:]) for t in texts])
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "perplexity": float(np.exp(-ours[rows, following].mean())),
        "reference_perplexity": float(np.exp(-theirs[rows, following].mean())),
    }


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from slipstream.builder.build import build
    from slipstream.builder.options import BuildOptions

    fetch = [sys.executable, str(ROOT / "examples" / "fetch_smollm2.py")]
    done = subprocess.run(fetch, check=True, capture_output=True, text=True)
    gguf = Path(done.stdout.strip())
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        export_dense(gguf, checkpoint)
        texts = windows(checkpoint)
        expected = reference(checkpoint, texts)
        recipes = {
            "slipstream Q4_1": (gguf, BuildOptions()),
            "slipstream Q4_1, int8 KV": (gguf, BuildOptions(kv_cache_dtype="int8")),
            "slipstream Q4_1 on MatMulNBits": (gguf, BuildOptions(gemm_plugin="disable")),
            "slipstream float32": (checkpoint, BuildOptions()),
            "slipstream int8_wo": (checkpoint, BuildOptions(quantization="int8_wo")),
            "slipstream int4_wo": (checkpoint, BuildOptions(quantization="int4_wo")),
        }
        table = {"llama.cpp Q4_1": compare(llama_cpp(gguf, texts), expected, texts)}
        for number, (name, (source, options)) in enumerate(recipes.items()):
            engine = Path(scratch) / str(number)
            build(source, engine, options)
            table[name] = compare(slipstream(engine, texts), expected, texts)
    for name, figures in table.items():
        print(f"{name:32}" + "  ".join(f"{key} {value:.5f}" for key, value in figures.items()))
    if arguments.json:
        facts = {"cpu": cpu_name(), "tokens": sum(map(len, texts)), "table": table}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
