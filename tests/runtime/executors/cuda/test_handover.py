"""A prompt that one GPU engine computes and another goes on with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_architectures import CONFIGS
from tests.runtime.handover.prefill_process import PrefillProcess, prefill_process
from tests.runtime.handover.workers import worker_on
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.executors.cuda import buckets, runner
from slipstream.runtime.loading import load

MICRO = {
    **TINY_SHAPE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Else a token of a prompt may have other bits alone than in a chunk.
HANDS = {"kv_transfer_gib": 1 / 64, "deterministic": True}


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what padding computes
def test_pages_go_from_one_engine_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "MIXED_TOKENS", (16,))
    monkeypatch.setattr(runner, "PREPARED_SEQUENCES", 0)
    if interpreting():
        monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
    engine, prompt = tmp_path / "engine", [5 + i % 60 for i in range(70)]  # a page and a part
    build(save_tiny(LlamaConfig(**MICRO), tmp_path / "tiny"), engine, BuildOptions(target="cuda"))
    limits: dict[str, Any] = {"max_batch_size": 2, "max_num_tokens": 16, "max_seq_len": 96}
    options = {**limits, **HANDS, "kv_cache_bytes": 1 << 17}

    async def run() -> None:
        async with (
            worker_on(load(engine, options), tmp_path) as first,
            worker_on(load(engine, options), tmp_path) as second,
        ):
            told = await first.prefill(prompt)
            whole = await first.decode(None, prompt, count=4)
            assert await second.decode(told, prompt, count=4) == whole
            assert second.llm.stats.handed == len(prompt) - 1
            assert second.llm.stats.step_tokens.sum == 4
            assert not second.exchange.stats.lost and not second.files

    asyncio.run(run())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "window"])
def test_two_processes_answer_as_one_engine_does(kind: str, tmp_path: Path) -> None:
    config = CONFIGS["gemma2"] if kind == "window" else LlamaConfig(**TINY_SHAPE)
    dtype: Any = "fp8" if kind == "fp8" else "auto"
    engine = tmp_path / "engine"
    built = BuildOptions(target="cuda", kv_cache_dtype=dtype, max_seq_len=512)
    build(save_tiny(config, tmp_path / "tiny"), engine, built)
    options = {"max_batch_size": 8, "max_num_tokens": 256, "kv_cache_bytes": 64 << 20, **HANDS}
    lengths = (2, 64, 65, 190, 300, 401)
    prompts = [[2 + (length + 7 * i) % 50 for i in range(length)] for length in lengths]
    with LLM(engine, **options) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=24)
        alone = [llm.generate([each], greedy)[0].outputs[0].token_ids for each in prompts]

    async def handed(first: PrefillProcess) -> list[list[int]]:
        async with worker_on(load(engine, options), tmp_path) as second:

            async def answer(prompt: list[int]) -> list[int]:
                told = await asyncio.to_thread(first.ask, prompt)
                return await second.decode(told, prompt, count=24)

            answers = [await answer(prompt) for prompt in prompts]
            stats = second.llm.stats
            assert stats.handed == sum(lengths) - len(lengths)
            assert not second.exchange.stats.lost and not second.files
            # Again, from its cache, beside others that are computed.
            mixed = [[*prompt[1:], 3] for prompt in prompts]
            told = [await asyncio.to_thread(first.ask, prompt) for prompt in mixed]
            await asyncio.gather(
                *(second.decode(each, prompt) for each, prompt in zip(told, mixed, strict=True)),
                *(second.decode(None, prompt) for prompt in prompts),
            )
            assert second.exchange.stats.lost == {"none": len(prompts)}
            return answers

    with prefill_process(engine, tmp_path, options) as first:
        assert asyncio.run(handed(first)) == alone
