"""Tokens a second with and without speculation, interleaved: SmolLM2 writes down a file once more.

python benchmarks/speculation.py ENGINE [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from slipstream import LLM, SamplingParams

TEXT = Path(__file__).parents[1] / "quantize" / "texts" / "evaluation_code.txt"
KINDS: dict[str, dict[str, Any]] = {
    "off": {},
    "ngram, auto": {"speculative": "ngram"},
    "ngram, 3": {"speculative": "ngram", "num_speculative_tokens": 3},
    "ngram, 7": {"speculative": "ngram", "num_speculative_tokens": 7},
    "prediction, auto": {"speculative": "ngram"},
}


def edits(count: int) -> list[tuple[str, str]]:
    """Prompts that ask for a file with a name changed, and the file as it was."""
    files = TEXT.read_text(encoding="utf-8")
    size = len(files) // count
    cuts = [files[i * size : i * size + 1000].rpartition("\n")[0] for i in range(count)]
    return [
        (f"File a.py:\n```python\n{cut}\n```\nFile b.py, a copy of a.py:\n```python\n", cut)
        for cut in cuts
    ]


def rate(llm: LLM, prompt: str, predicted: str, max_tokens: int) -> tuple[float, list[int]]:
    """Tokens a second after the first, and the tokens."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, prediction=predicted)
    (output,) = llm.stream(prompt, params, output_kind="final")
    times, tokens = output.metrics, output.outputs[0].token_ids
    assert times.finished_time is not None and times.first_token_time is not None
    return (len(tokens) - 1) / (times.finished_time - times.first_token_time), tokens


def main() -> None:
    """Print medians, the ratio to ``off`` in the median of answers and of all, and what was
    counted: steps, those of prompts too, drafts and how many were right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A prompt that comes from the cache is cut elsewhere, and so rounded: answers would differ.
    shared: dict[str, Any] = {"kv_cache_bytes": 64 << 20, "enable_prefix_caching": False}
    llms = {name: LLM(options.engine, **shared, **kind) for name, kind in KINDS.items()}
    rates: dict[str, list[float]] = {name: [] for name in KINDS}
    answers: dict[str, list[int]] = {}
    lengths: list[int] = []
    for _ in range(options.rounds):
        for prompt, text in edits(3):
            for name, llm in llms.items():
                predicted = text if name.startswith("prediction") else ""
                speed, tokens = rate(llm, prompt, predicted, options.max_tokens)
                assert answers.setdefault(prompt, tokens) == tokens, f"{name} says something else"
                rates[name].append(speed)
            lengths.append(len(answers[prompt]) - 1)
    report = {}
    for name, llm in llms.items():
        ratios = [a / b for a, b in zip(rates[name], rates["off"], strict=True)]
        stats, times = llm.stats.speculation, zip(rates[name], rates["off"], lengths, strict=True)
        taken = [(count / own, count / off) for own, off, count in times]
        drafted = 0 if stats is None else stats.num_draft_tokens
        accepted = 0 if stats is None else stats.num_accepted_tokens
        report[name] = {
            "tokens_per_second": median(rates[name]),
            "ratio_to_off": median(ratios),
            "ratio_of_all": sum(off for _, off in taken) / sum(own for own, _ in taken),
            "steps": llm.stats.step_tokens.count,
            "drafts": drafted,
            "accepted": accepted,
        }
        print(name, {key: round(value, 2) for key, value in report[name].items()})
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
