"""Answers of CPU engines with and without drafts: the same, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.speculation.hostile import NAME, hostile

from slipstream import LLM, SamplingParams
from slipstream.runtime.request import CompletionOutput
from slipstream.runtime.structured.output import StructuredOutput

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["xx", "yyyy"]}, "b": {"type": "boolean"}},
          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5, "n": 2},
    {"temperature": 0.7, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "seed": 7, "presence_penalty": 1.0, "min_tokens": 10},
    {"temperature": 0, "bad_words_token_ids": [[30], [31, 32]], "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 8, "structured": StructuredOutput(json=SCHEMA)},
    {"temperature": 0, "structured": StructuredOutput(regex="[a-f ]{5,40}"), "logprobs": 0},
    {"temperature": 1.0, "seed": 9, "stop": ["e"], "ignore_eos": True},
    {"temperature": 0, "speculative": False},
]
PROMPTS = [list(range(20, 75)) + list(range(20, 30 + i)) for i in range(len(KINDS))]


def answers(engine: Path, **options: Any) -> list[list[CompletionOutput]]:  # noqa: ANN401
    params = [SamplingParams(**{"max_tokens": 40, **kind}) for kind in KINDS]
    with LLM(engine, num_threads=1, **options) as llm:
        outputs = llm.generate(PROMPTS, params)
        again = llm.generate(PROMPTS, params)  # prefixes are cached now
        for one, other in zip(outputs, again, strict=True):
            assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
        return [output.outputs for output in outputs]


def texts(found: Sequence[Sequence[CompletionOutput]]) -> list[list[int]]:
    pairs = zip(PROMPTS, found, strict=True)
    return [prompt + each.token_ids for prompt, outputs in pairs for each in outputs]


ROOM: dict[str, Any] = {"kv_cache_bytes": 16 << 20}
# One thing after the other; pages of 6 sequences; prompts in chunks of 24.
SCHEDULES: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_batch_size": 1},
    "chunked": {"max_num_tokens": 24, "max_batch_size": 8},
    "preempted": {"kv_cache_bytes": 12 * 32 * 3 * 2 * 2 * 16 * 4},
}


@pytest.fixture(scope="module")
def plain(tiny_engine: Path) -> dict[str, list[list[CompletionOutput]]]:
    return {name: answers(tiny_engine, **{**ROOM, **each}) for name, each in SCHEDULES.items()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("proposer", ["ngram", NAME])
def test_drafts_change_no_answer(
    tiny_engine: Path,
    plain: dict[str, list[list[CompletionOutput]]],
    schedule: str,
    proposer: str,
) -> None:
    expected = plain[schedule]
    options = {**ROOM, **SCHEDULES[schedule], "speculative": proposer, "num_speculative_tokens": 7}
    with hostile(texts(expected)):
        found = answers(tiny_engine, **options)
    assert texts(found) == texts(expected)
    if schedule in ("together", "alone"):  # else prompts are cut elsewhere, and rounded so
        assert found == expected


def test_lengths_by_load_change_no_answer(
    tiny_engine: Path, plain: dict[str, list[list[CompletionOutput]]]
) -> None:
    config = '{"method": "suffix"}'
    assert answers(tiny_engine, **ROOM, speculative_config=config) == plain["together"]


@pytest.mark.parametrize("count", [1, 7])
def test_long_contexts_are_cut_as_without_drafts(tiny_engine: Path, count: int) -> None:
    """Where attention splits its keys by the length of the context, every row by its own."""
    prompt = [20 + i % 50 for i in range(250)]
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    found = []
    for options in ({}, {"speculative": "ngram", "num_speculative_tokens": count}):
        with LLM(tiny_engine, num_threads=1, **ROOM, **options) as llm:
            found.append(llm.generate([prompt], replace(params, logprobs=1))[0].outputs)
            drafts = llm.stats.speculation
    assert found[0] == found[1]
    assert drafts is not None and drafts.num_accepted_tokens > 0


def test_a_draft_model_changes_no_answer(
    tiny_engine: Path, plain: dict[str, list[list[CompletionOutput]]]
) -> None:
    """The same model, so that greedy guesses are right."""
    options = {"speculative": "draft", "num_speculative_tokens": 3}
    assert (
        answers(tiny_engine, **ROOM, **options, speculative_model=str(tiny_engine))
        == (plain["together"])
    )
    with LLM(tiny_engine, **ROOM, **options, speculative_model=str(tiny_engine)) as llm:
        llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        drafts = llm.stats.speculation
    assert drafts is not None and drafts.num_accepted_tokens >= 0.9 * drafts.num_draft_tokens > 20
