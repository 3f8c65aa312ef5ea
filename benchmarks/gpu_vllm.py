"""vLLM beside ``gpu.py``: the same loads, on an 8B Llama shape with weights of its own making.

    python benchmarks/gpu_vllm.py --format bf16 --json vllm.json
    python benchmarks/gpu_vllm.py --loads contexts lognormal --seconds 200
    python benchmarks/gpu_vllm.py --model /tmp/model

Needs vLLM and nothing of ours; its defaults hold but for the length of a sequence. fp8 is its own,
made as weights are loaded: a scale a tensor, and of x one a token. Figures are written one by one.
With ``--model`` it only writes the directory that ``vllm serve --load-format dummy`` takes, with a
tokenizer that has a word for every token, for ``http_load.py --address``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_loads import LOADS, LONGEST, Ask, Loads
from gpu_shapes import LLAMA_8B

FORMATS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"quantization": "fp8"}}


def write_model(directory: Path) -> None:
    """What vLLM reads of a model whose weights it makes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    size = LLAMA_8B["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, *(f"\u0120w{i}" for i in range(size))])}
    vocab = {word: i for word, i in words.items() if i < size}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    last = max(vocab, key=vocab.__getitem__)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": last}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    config = {**LLAMA_8B, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": size - 1}
    (directory / "config.json").write_text(json.dumps(config))


class Runner:
    """vLLM in this process."""

    def __init__(self, model: Path, form: str, more: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=LONGEST,
            seed=0,
            **FORMATS[form],
            **more,
        )

    def seconds(self, asks: list[Ask]) -> float:
        """Until all requests are done."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=ask.output_len,
                ignore_eos=True,
                detokenize=False,
                **{"temperature": 0.0, **ask.sampling},
            )
            for ask in asks
        ]
        prompts: Any = [{"prompt_token_ids": ask.prompt} for ask in asks]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        pairs = zip(asks, outputs, strict=True)
        wrong = [a for a, o in pairs if len(o.outputs[0].token_ids) != a.output_len]
        if wrong:
            raise RuntimeError(f"{len(wrong)} answers are not as long as was asked")
        return seconds

    def settings(self) -> dict[str, Any]:
        """What it has decided on."""
        config = self.llm.llm_engine.vllm_config
        return {
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "enable_prefix_caching": config.cache_config.enable_prefix_caching,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        }


def measure(arguments: argparse.Namespace) -> None:
    """All loads that still begin in time."""
    import torch
    import vllm

    started, form = time.monotonic(), arguments.format
    more = dict(pair.split("=", 1) for pair in arguments.option)
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        runner = Runner(Path(directory), form, {k: json.loads(v) for k, v in more.items()})
        figures: dict[str, float] = {"start_s": time.monotonic() - started}
        report = {"vllm": vllm.__version__, "torch": torch.__version__, "format": form}
        told = {**report, "settings": runner.settings(), "figures": figures}
        loads = Loads(runner.seconds, LLAMA_8B["vocab_size"])
        loads.warm_up()
        for name in arguments.loads:
            if time.monotonic() > started + arguments.seconds:
                print(f"no time for {name}", flush=True)
                continue
            try:
                for figure, value in LOADS[name](loads):
                    figures[figure] = value
                    print(f"vllm {form} {figure:24}{value:10.3f}", flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
            except Exception as error:  # noqa: BLE001 - the other figures are still wanted
                print(f"vllm {form} {name} failed: {error!r}"[:2000], flush=True)


def main() -> None:
    """Measure, or write a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=FORMATS, default="fp8")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--option", nargs="*", default=[], help="NAME=JSON of vllm.LLM.")
    parser.add_argument("--seconds", type=float, default=3600, help="After which none begins.")
    parser.add_argument("--model", type=Path, help="Only write this directory.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.model:
        write_model(arguments.model)
        return
    measure(arguments)


if __name__ == "__main__":
    main()
