"""Answers of GPU engines with and without drafts: the same bits in the deterministic mode, and
otherwise the same up to tokens that are nearly alike."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_cuda_engine import FORMATS, PAGE, config_of
from tests.runtime.executors.test_cpu_speculation import KINDS, PROMPTS
from tests.runtime.speculation.hostile import NAME, hostile
from tests.tiny_models import calm, save_tiny

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.contract import bytes_per_token
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.request import CompletionOutput

pytestmark = pytest.mark.gpu
LIMITS: dict[str, Any] = {"max_num_tokens": 512, "max_seq_len": 512, "kv_cache_bytes": 64 << 20}
SCHEDULES: dict[str, dict[str, Any]] = {
    "together": {"max_batch_size": 16},
    "alone": {"max_batch_size": 1},
    "chunked": {"max_batch_size": 16, "max_num_tokens": 24},
    "preempted": {"max_batch_size": 16, "pages": 16},
}
# Of the likeliest token's log probability over the next one's, below which they are nearly alike.
# Products of fp8 round x to 8 bits where there are many rows, as there are with drafts.
NEAR, NEAR_FP8 = 0.1, 0.3


@pytest.fixture(scope="module", params=["bf16", "fp8", "int4", "experts", "two-caches"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"drafts-{request.param}")
    checkpoint = save_tiny(config_of(request.param), path / "checkpoint")
    if request.param == "two-caches":  # else bfloat16 decides what is said
        calm(checkpoint)
    build(checkpoint, path / "engine", BuildOptions(target="cuda", **FORMATS[request.param]))
    return path / "engine"


def answers(
    engine: Path,
    kinds: list[dict[str, Any]],
    **options: Any,  # noqa: ANN401 - fields of RuntimeConfig, or how many pages there are
) -> list[list[CompletionOutput]]:
    if (pages := options.pop("pages", None)) is not None:
        size = bytes_per_token(open_engine(engine).manifest.caches)
        options["kv_cache_bytes"] = pages * PAGE * size
    params = [SamplingParams(**{"max_tokens": 40, **kind}) for kind in kinds]
    with LLM(engine, **{**LIMITS, **options}) as llm:
        llm.generate(PROMPTS[: len(kinds)], params)
        outputs = llm.generate(PROMPTS[: len(kinds)], params)  # prefixes are cached now
        if options.get("speculative") == NAME and options["num_speculative_tokens"] != "auto":
            drafts = llm.stats.speculation
            assert drafts is not None and drafts.num_draft_tokens > drafts.num_accepted_tokens > 0
        return [output.outputs for output in outputs]


def texts(found: list[list[CompletionOutput]]) -> list[list[int]]:
    pairs = zip(PROMPTS, found, strict=False)
    return [prompt + each.token_ids for prompt, outputs in pairs for each in outputs]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_the_deterministic_mode_drafts_change_no_bit(engine: Path, schedule: str) -> None:
    """Greedy and sampled, penalized, biased, held to forms, siblings; of an adversary and of
    proposers that look up and ask a model, the same one."""
    options = {**SCHEDULES[schedule], "deterministic": True}
    expected = answers(engine, KINDS, **options)
    with hostile(texts(expected)):
        for proposer in (NAME, "ngram", "suffix"):
            found = answers(
                engine, KINDS, **options, speculative=proposer, num_speculative_tokens=7
            )
            assert found == expected, proposer


def test_a_draft_model_changes_no_bit(engine: Path) -> None:
    options: dict[str, Any] = {"deterministic": True, "max_batch_size": 16}
    expected = answers(engine, KINDS, **options)
    options |= {"speculative": "draft", "speculative_model": str(engine)}
    if "two-caches" in str(engine):
        pytest.skip("a draft model has no windows")
    assert answers(engine, KINDS, **options, num_speculative_tokens=3) == expected


@pytest.mark.parametrize("length", [3, 7, "auto"])
def test_otherwise_the_first_difference_is_between_tokens_nearly_alike(
    engine: Path, length: int | str
) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0, "logprobs": 2, "ignore_eos": True}] * 10
    plain = answers(engine, kinds, max_batch_size=16)
    with hostile(texts(plain)):
        found = answers(
            engine, kinds, max_batch_size=16, speculative=NAME, num_speculative_tokens=length
        )
    for (one,), (other,) in zip(plain, found, strict=True):
        check_first_difference(engine, one, other)


def check_first_difference(engine: Path, one: CompletionOutput, other: CompletionOutput) -> None:
    """Where answers begin to differ, the likeliest tokens of the first are nearly alike."""
    near = NEAR_FP8 if "fp8" in str(engine) else NEAR
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if same < len(one.token_ids):
        assert one.logprobs is not None
        first, second = (value for value, _ in one.logprobs[same].top.values())
        assert first - second < near, (same, one.token_ids, other.token_ids)


def test_what_a_step_costs_is_known_at_the_start(engine: Path) -> None:
    with LLM(engine, **LIMITS, max_batch_size=16, speculative="ngram") as llm:
        executor = llm._loop._engine.executor
        assert isinstance(executor, CUDAExecutor)
        seconds = executor.step_seconds()
    assert {1, 2, 4, 8, 16, 32, 64, 128} <= set(seconds)
    assert all(0 < each < 1 for each in seconds.values())
