"""Two engines on the CPU: what one has computed of a prompt, the other goes on with."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_architectures import CONFIGS
from tests.runtime.handover.prefill_process import PrefillProcess, prefill_process
from tests.runtime.handover.workers import Worker, worker_on
from tests.tiny_models import save_tiny

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.loading import load

COUNT = 24
PROMPTS = [[2 + (length + 7 * i) % 50 for i in range(length)] for length in (2, 32, 33, 80, 97)]
LIMITS: dict[str, Any] = {"num_threads": 1, "kv_cache_bytes": 64 << 20}
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 48, "max_seq_len": 128}
HANDS = {"kv_transfer_gib": 1 / 16}


def alone(engine: Path, prompts: list[list[int]]) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=COUNT)
    with LLM(engine, **LIMITS) as llm:
        outputs = [llm.generate([prompt], greedy)[0] for prompt in prompts]
    return [output.outputs[0].token_ids for output in outputs]


async def handed(engine: Path, directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The answers of a pair, of which the second computes one token of each prompt."""

    async def both(first: Worker, second: Worker, prompt: list[int]) -> list[int]:
        return await second.decode(await first.prefill(prompt), prompt, count=COUNT)

    async with (
        worker_on(load(engine, {**LIMITS, **HANDS}), directory) as first,
        worker_on(load(engine, {**LIMITS, **HANDS}), directory) as second,
    ):
        answers = [await both(first, second, prompt) for prompt in prompts]
        stats = second.llm.stats
        assert stats.handed == sum(map(len, prompts)) - len(prompts)
        # A step for the last token of each prompt, and one for each token that another one follows.
        assert stats.step_tokens.sum == sum(map(len, answers))
        assert not second.exchange.stats.lost and not second.files
        # All at once, while others are computed.
        mixed = [[*prompt[1:], 1] for prompt in prompts]
        at_once = await asyncio.gather(*(both(first, second, prompt) for prompt in mixed))
        assert at_once == alone(engine, mixed)
        assert second.exchange.stats.received.prompts == 2 * len(prompts)
        return answers


@pytest.mark.parametrize("kind", ["float32", "int8", "k16v8", "fp8", "window"])
def test_answers_are_those_of_one_engine(kind: str, tmp_path: Path) -> None:
    config = CONFIGS["gemma2" if kind == "window" else "llama"]
    dtype: Any = "auto" if kind == "window" else kind
    engine = tmp_path / "engine"
    options = BuildOptions(target="cpu", kv_cache_dtype=dtype, **SIZES)
    build(save_tiny(config, tmp_path / "checkpoint"), engine, options)
    assert asyncio.run(handed(engine, tmp_path, PROMPTS)) == alone(engine, PROMPTS)


def test_engines_with_other_pages_compute_by_themselves(tmp_path: Path) -> None:
    engines = []
    checkpoint = save_tiny(CONFIGS["llama"], tmp_path / "checkpoint")
    dtype: Any
    for dtype in ("float32", "int8"):
        made = tmp_path / dtype
        build(checkpoint, made, BuildOptions(target="cpu", kv_cache_dtype=dtype, **SIZES))
        engines.append(made)

    async def run() -> list[int]:
        async with (
            worker_on(load(engines[0], {**LIMITS, **HANDS}), tmp_path) as first,
            worker_on(load(engines[1], {**LIMITS, **HANDS}), tmp_path) as second,
        ):
            told = await first.prefill(PROMPTS[3])
            answer = await second.decode(told, PROMPTS[3], count=COUNT)
            assert second.exchange.stats.lost == {"engine": 1}
            return answer

    assert [asyncio.run(run())] == alone(engines[1], [PROMPTS[3]])


@pytest.mark.real_model
def test_smollm2_answers_as_one_engine_does(smollm2_engine: Path, tmp_path: Path) -> None:
    with LLM(smollm2_engine, **LIMITS) as llm:
        text = "The first thing to know about rivers is that they carry water to the sea. " * 5
        prompts = [llm.tokenizer.encode(text[cut:]) for cut in (0, 40, 200)]
    assert asyncio.run(handed(smollm2_engine, tmp_path, prompts)) == alone(smollm2_engine, prompts)


def test_a_process_that_is_killed_leaves_what_it_has_handed_over(
    tiny_engine: Path, tmp_path: Path
) -> None:
    prompt, late = PROMPTS[3], PROMPTS[4]
    options = {**LIMITS, **HANDS}

    async def run(first: PrefillProcess) -> list[list[int]]:
        async with worker_on(load(tiny_engine, options), tmp_path, timeout=0.5) as second:
            told = await asyncio.to_thread(first.ask, prompt)
            taken_never = await asyncio.to_thread(first.ask, late)
            first.process.kill()
            first.process.wait()
            answers = [await second.decode(told, prompt, count=COUNT)]
            assert second.llm.stats.handed == len(prompt) - 1
            # What nobody took goes when its time has come, though its owner is gone.
            (path,) = [next(tmp_path.glob("slipstream-*")) / name for name in second.files]
            assert path.name == taken_never["transfer_id"]
            os.utime(path, (0, 0))
            while second.files:
                await asyncio.sleep(0.01)
            answers.append(await second.decode(taken_never, late, count=COUNT))
            assert second.exchange.stats.lost == {"missing": 1}
            return answers

    with prefill_process(tiny_engine, tmp_path, options) as first:
        assert asyncio.run(run(first)) == alone(tiny_engine, [prompt, late])
