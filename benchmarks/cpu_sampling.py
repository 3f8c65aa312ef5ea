"""Milliseconds that 32 rows take to be sampled on this CPU, of a vocabulary of 49,152 tokens.

python benchmarks/cpu_sampling.py [--threads 2] [--json FILE]

Each row has some 30 likely tokens above noise, as rows of a language model have; ``flat`` has noise
alone, of which a nucleus is a third of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peers import cpu_name

from slipstream import SamplingParams
from slipstream.cores import usable_cores
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.draws import Drawer

ROWS, VOCAB, ROUNDS, LIKELY = 32, 49152, 200, 30
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "all tokens": {"temperature": 1.0},
    "flat, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}


def logits(flat: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 ``[32, 49152]``."""
    rng = np.random.default_rng(0)
    rows = (2.5 * rng.standard_normal((ROWS, VOCAB)) - 5).astype(np.float32)
    if not flat:
        for row in rows:
            row[rng.integers(0, VOCAB, LIKELY)] += np.linspace(14, 4, LIKELY)
    return rows


def milliseconds(kind: str, threads: int) -> float:
    """The median of the rounds."""
    rows = logits(kind.startswith("flat"))
    drawer, taken = Drawer(VOCAB, threads), []
    params = SamplingParams(**KINDS[kind])
    for position in range(ROUNDS):
        wanted = [SamplingRow(params, (), (), seed, position=position) for seed in range(ROWS)]
        start = time.perf_counter()
        drawer.draw(rows, range(ROWS), wanted)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def main() -> None:
    """Print a line a kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = {kind: milliseconds(kind, options.threads) for kind in KINDS}
    for kind, taken in figures.items():
        print(f"{kind:18}{taken:8.3f} ms")
    if options.json:
        facts = {"cpu": cpu_name(), "threads": options.threads, "milliseconds": figures}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
