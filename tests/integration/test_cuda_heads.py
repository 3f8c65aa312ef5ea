"""Engines with a head on a GPU: no answer changes, in the deterministic mode no bit of one, and
what is sampled is spread as without."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.eagle3_heads import MASK_TOKEN, random_tensors, save_head, specforge
from tests.integration.test_cuda_speculation import (
    LIMITS,
    SCHEDULES,
    answers,
    check_first_difference,
)
from tests.runtime.executors.test_cpu_speculation import KINDS
from tests.runtime.speculation.test_eagle3 import counting
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.speculation.speculator import Speculator

pytestmark = pytest.mark.gpu
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int4": {"quantization": "int4_wo", "group_size": 32},
    "masked": {},
}
VOCAB, DRAWS = 50, 100_000
# Of a chi-squared statistic with 49 degrees of freedom, beyond which one in a million is.
UNLIKELY = 112


@pytest.fixture(scope="module", params=FORMATS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a random head, of the kind that guesses one by one or all at once."""
    path = tmp_path_factory.mktemp(f"head-{request.param}")
    checkpoint = save_tiny(LlamaConfig(**TINY_SHAPE), path / "checkpoint")
    masked = request.param == "masked"
    config = specforge(pard_token=MASK_TOKEN) if masked else specforge()
    tensors = random_tensors(config)
    if masked:
        mask = np.random.default_rng(1).normal(0, 1, (1, 192)).astype(np.float32)
        tensors = {**tensors, "mask_hidden": mask}
    head = save_head(path / "head", config, tensors)
    options = {"target": "cuda", "speculative_model": str(head), **FORMATS[request.param]}
    build(checkpoint, path / "engine", BuildOptions(**options))
    return path / "engine"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_the_deterministic_mode_guesses_change_no_bit(engine: Path, schedule: str) -> None:
    options = {**SCHEDULES[schedule], "deterministic": True}
    expected = answers(engine, KINDS, **options)
    for length in (3, 7):
        more: dict[str, Any] = {"speculative": "eagle3", "num_speculative_tokens": length}
        assert answers(engine, KINDS, **options, **more) == expected, length


@pytest.mark.parametrize("length", [3, "auto"])
def test_otherwise_the_first_difference_is_between_tokens_nearly_alike(
    engine: Path, length: int | str
) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0, "logprobs": 2, "ignore_eos": True}] * 10
    plain = answers(engine, kinds, max_batch_size=16)
    more: dict[str, Any] = {"speculative": "eagle3", "num_speculative_tokens": length}
    found = answers(engine, kinds, max_batch_size=16, **more)
    for (one,), (other,) in zip(plain, found, strict=True):
        check_first_difference(engine, one, other)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 50 tokens in which token i + 7 comes after i, and a head that knows that."""
    path = tmp_path_factory.mktemp("knowing")
    checkpoint, config, tensors = counting(path, vocab=VOCAB)
    head = save_head(path / "head", config, tensors)
    build(checkpoint, path / "engine", BuildOptions(target="cuda", speculative_model=str(head)))
    return path / "engine"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [3, 7, "auto"])
def test_right_guesses_save_steps(knowing: Path, schedule: str, length: int | str) -> None:
    prompts = [[start] * 40 for start in (1, 2, 5)]
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    options: dict[str, Any] = {**LIMITS, **SCHEDULES[schedule]}
    if (pages := options.pop("pages", None)) is not None:
        options["kv_cache_bytes"] = pages * 64 * (3 * 2 * 2 * 16 * 2 + 2 * 4 * 16 * 2)
    options |= {"speculative": "eagle3", "num_speculative_tokens": length}
    with LLM(knowing, **options) as llm:
        for _ in range(2):
            for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
                counted = [(prompt[0] + 7 * i) % VOCAB for i in range(1, 151)]
                assert output.outputs[0].token_ids == counted
        stats = llm.stats.speculation
    assert stats is not None
    if length != "auto":  # a step may be too cheap here to save any
        assert stats.num_accepted_tokens > 450
    assert stats.num_accepted_tokens >= 0.98 * stats.num_draft_tokens


# None of them needs the host between two tokens, so the device leads.
ALONE: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2.0, "seed": 5, "n": 2},
    {"temperature": 1.7, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    {"temperature": 1.8, "seed": 7, "min_tokens": 10, "logit_bias": {3: 2.0}},
    {"temperature": 0, "stop_token_ids": [40], "logprobs": 30},
    {"temperature": 1.9, "seed": 8, "allowed_token_ids": list(range(45)), "prompt_logprobs": 1},
    {"temperature": 2.0, "seed": 9, "max_tokens": 23, "bad_words_token_ids": [[30]]},
    {"temperature": 0.8, "seed": 10, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0, "presence_penalty": 0.7, "min_tokens": 4},
    {"temperature": 0, "speculative": False},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_device_that_leads_changes_no_bit(
    knowing: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts that are right and wrong, and steps that are captured on the way."""
    led = 0
    lead = Speculator.lead

    def count(self: Speculator, *given: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401
        nonlocal led
        counts, offered = lead(self, *given)
        led += sum(counts)
        return counts, offered

    monkeypatch.setattr(Speculator, "lead", count)
    options: dict[str, Any] = {**LIMITS, **SCHEDULES[schedule], "deterministic": True}
    if (pages := options.pop("pages", None)) is not None:
        options["kv_cache_bytes"] = pages * 64 * (3 * 2 * 2 * 16 * 2 + 2 * 4 * 16 * 2)
    params = [SamplingParams(**{"max_tokens": 60, "ignore_eos": True, **kind}) for kind in ALONE]
    prompts = [[start + 1] * (30 + 5 * start) for start in range(len(ALONE))]
    found = []
    for length in (None, 1, 3, 7, "auto"):
        more: dict[str, Any] = {"speculative": "eagle3", "num_speculative_tokens": length}
        with LLM(knowing, **options, **(more if length else {})) as llm:
            found.append([each.outputs for each in llm.generate(prompts, params)])
        assert found[-1] == found[0], length
        assert led > 60 or length in (None, "auto")  # a step may be too cheap for some to pay
        led = 0


def test_tokens_are_drawn_as_without(knowing: Path) -> None:
    """How far each is from the one before it, of 100,000 that are drawn with other seeds, half of
    which were guessed."""
    spread = {}
    for first, options in (
        (0, {"speculative": "off"}),
        (10_000, {"speculative": "eagle3", "num_speculative_tokens": 3}),
    ):
        with LLM(knowing, **{**LIMITS, "max_batch_size": 64, **options}) as llm:
            params = [
                SamplingParams(temperature=2.0, seed=first + i, max_tokens=401, ignore_eos=True)
                for i in range(DRAWS // 400)
            ]
            outputs = llm.generate([[i % VOCAB, 3] for i in range(len(params))], params)
            stats = llm.stats.speculation
        found = [pair for output in outputs for pair in pairwise(output.outputs[0].token_ids)]
        spread[first] = Counter((after - before) % VOCAB for before, after in found)
    assert stats is not None and 0.3 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.8
    plain, drafted = (np.array([each[i] for i in range(VOCAB)], float) for each in spread.values())
    assert plain.sum() == drafted.sum() == DRAWS and min(plain) > 100
    assert ((plain - drafted) ** 2 / (plain + drafted)).sum() < UNLIKELY
    assert 0.4 < plain[7] / DRAWS < 0.7


def test_what_guesses_cost_is_known_at_the_start(engine: Path) -> None:
    options: dict[str, Any] = {"speculative": "eagle3", "num_speculative_tokens": "auto"}
    with LLM(engine, **LIMITS, max_batch_size=16, **options) as llm:
        executor = llm._loop._engine.executor
        assert isinstance(executor, CUDAExecutor)
        seconds = executor.guess_seconds()
    assert {(1, 3), (16, 3), (1, 7), (4, 1)} <= set(seconds)
    assert all(0 < each < 1 for each in seconds.values())
