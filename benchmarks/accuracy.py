"""What each quantization costs in accuracy, on SmolLM2 taken off the grid of its 4-bit file.

    python benchmarks/accuracy.py --json benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --rows int4_awq "KV fp8"

The only real model at hand is itself Q4_1, so a random rescaling of channels, which leaves its
function as it is, first takes the weights off their grid (``off_grid.py``). Calibration is
on 8 windows of 512 tokens of the prose that ships, evaluation on two of 2,048 tokens of the
technical text and prose that ship. Every figure is of the written file, read back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from off_grid import OffGridCheckpoint, write_directory

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.quantize.activations import KVQuant
from slipstream.quantize.calibration_data import evaluation_windows
from slipstream.quantize.evaluate import Accuracy, accuracy
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.options import SCHEMES, QuantizeOptions
from slipstream.quantize.quantize import Text, quantize
from slipstream.runtime.text.tokenizer import Tokenizer

TEXTS = Path(__file__).parents[1] / "quantize" / "texts"
SEED = 0
# Options of each row, and the goals: percent of perplexity, KL divergence in nats.
ROWS: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
    "int4_wo": ({"qformat": "int4_wo", "group_size": 64}, None, None),
    "int4_gptq": ({"qformat": "int4_gptq", "group_size": 64}, None, None),
    "int4_awq": ({"qformat": "int4_awq", "group_size": 64}, 12, 0.12),
    "int4_awq, 5 bits": ({"qformat": "int4_awq", "group_size": 64, "auto_bits": 5.0}, 8, 0.10),
    "int8_wo": ({"qformat": "int8_wo", "group_size": 64}, 0.5, 0.003),
    "int8_sq": ({"qformat": "int8_sq"}, 1.5, 0.015),
    "fp8": ({"qformat": "fp8"}, 2.2, 0.025),
    "fp8_block": ({"qformat": "fp8_block"}, 2.2, 0.025),
}
# Caches alone, the weights as they are.
CACHES: dict[str, tuple[KVQuant, float, float]] = {
    "KV int8": (KVQuant("int8"), 0.1, 0.001),
    "KV fp8": (KVQuant("fp8"), 0.8, 0.009),
}


def text_of(checkpoint: Checkpoint) -> Text:
    """The tokenizer of a checkpoint directory."""
    tokenizer = Tokenizer.from_directory(checkpoint.path)
    return Text(tokenizer.encode)


def measure(source: Path, evaluation: Path, options: dict[str, Any]) -> dict[str, float]:
    """Quantize and measure one row."""
    calibration: dict[str, Any] = {
        "calib_dataset": str(TEXTS / "calibration_prose.txt"),
        "calib_size": 8,
        "calib_max_seq_length": 512,
        "seed": SEED,
    }
    if SCHEMES[options["qformat"]].algorithm == "rtn":  # which has no use for data
        calibration = {}
    given = QuantizeOptions(eval_dataset=str(evaluation), **calibration, **options)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        report = quantize(source, Path(directory) / "out", given, text_of)
    assert report.accuracy is not None
    return {
        **_figures(report.accuracy),
        "bits": report.effective_bits,
        "quantize_s": report.seconds["quantize"],
        "total_s": time.perf_counter() - started,
    }


def measure_cache(source: Path, evaluation: Path, kv: KVQuant) -> dict[str, float]:
    """What rounding of keys and values costs."""
    checkpoint = open_checkpoint(source)
    windows = evaluation_windows(text_of(checkpoint).encode, evaluation)
    exact, rounded = CheckpointModel(checkpoint), CheckpointModel(checkpoint, kv=kv)
    found = accuracy(exact.logits(windows), rounded.logits(windows), windows)
    return _figures(found)


def _figures(found: Accuracy) -> dict[str, float]:
    return {
        "ppl_percent": 100 * found.increase,
        "ppl_percent_standard_error": 100 * found.increase_standard_error,
        "kl": found.kl_mean,
        "kl_p99": found.kl_p99,
        "top1_percent": 100 * found.top1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = default / "slipstream" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", type=Path, default=default)
    names = [*ROWS, *CACHES]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        source = write_directory(
            OffGridCheckpoint(open_checkpoint(arguments.model), SEED), Path(directory) / "model"
        )
        evaluation = Path(directory) / "evaluation.txt"
        parts = ("evaluation_technical.txt", "evaluation_prose.txt")
        evaluation.write_text("\n\n".join((TEXTS / name).read_text() for name in parts))
        for name in arguments.rows:
            if name in CACHES:
                kv, percent, kl = CACHES[name]
                figures = measure_cache(source, evaluation, kv)
            else:
                options, row_percent, row_kl = ROWS[name]
                figures = measure(source, evaluation, options)
                percent, kl = row_percent or math.inf, row_kl or math.inf
            missed = figures["ppl_percent"] > percent or figures["kl"] > kl
            results[name] = {**figures, "missed": missed}
            print(
                f"{name:18} ppl {figures['ppl_percent']:+7.2f} %  KL {figures['kl']:.4f}  "
                f"top-1 {figures['top1_percent']:.1f} %  bits {figures.get('bits', 32):.2f}  "
                f"{figures.get('quantize_s', 0):.0f} s{'  missed' if missed else ''}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
