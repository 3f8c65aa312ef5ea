"""``/v1/completions`` through OpenAI's own client."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from tests.server.openai.serving import Running, serving

from slipstream.runtime.llm import LLM
from slipstream.runtime.loading import load
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine

CASES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "abc", "max_tokens": 5},
    "tokens": {"prompt": [0, 1, 2], "max_tokens": 5},
    "texts": {"prompt": ["abc", "x"], "max_tokens": 3},
    "token lists": {"prompt": [[0, 1], [20]], "max_tokens": 3},
    "several of each": {"prompt": ["a", "b"], "n": 2, "max_tokens": 3},
    "stop": {"prompt": "a", "stop": ["ef", "zz"], "max_tokens": 20},
    "stop at a space": {"prompt": "7", "stop": " .", "max_tokens": 20},
    "end of sequence": {"prompt": "-", "max_tokens": 20},
    "stop token": {"prompt": "a", "extra_body": {"stop_token_ids": [5]}, "max_tokens": 20},
    "default length": {"prompt": "a"},
    "echo": {"prompt": "abc", "echo": True, "max_tokens": 2},
    "echo of tokens": {"prompt": [0, 1, 2], "echo": True, "max_tokens": 2},
    "logprobs": {"prompt": "a", "logprobs": 1, "max_tokens": 3},
    "echo with logprobs": {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 2},
    "only the prompt": {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0},
    "seed": {"prompt": "a", "seed": 3, "temperature": 1.0, "max_tokens": 4},
    "long": {"prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_stream_joins_to_the_answer_in_one_piece(server: Running, name: str) -> None:
    client, case = server.client(), {"model": "counting", **CASES[name]}
    whole = client.completions.create(**case)
    texts: dict[int, str] = {choice.index: "" for choice in whole.choices}
    reasons: dict[int, Any] = {}
    tokens: dict[int, list[str]] = {index: [] for index in texts}
    offsets: dict[int, list[int]] = {index: [] for index in texts}
    usage = None
    for chunk in client.completions.create(
        **case, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons, "a choice went on after its end"
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert [texts[c.index] for c in whole.choices] == [c.text for c in whole.choices]
    assert [reasons[c.index] for c in whole.choices] == [c.finish_reason for c in whole.choices]
    for choice in whole.choices:
        if choice.logprobs is not None:
            assert tokens[choice.index] == choice.logprobs.tokens
            assert offsets[choice.index] == choice.logprobs.text_offset
    assert usage is not None and whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("name", "texts", "reason", "completion_tokens"),
    [
        ("text", ["defgh"], "length", 5),
        ("tokens", ["defgh"], "length", 5),
        ("texts", ["def", "yzA"], "length", 6),
        ("several of each", ["bcd", "bcd", "cde", "cde"], "length", 12),
        ("stop", ["bcd"], "stop", 5),
        ("stop at a space", ["89"], "stop", 4),
        ("end of sequence", ["_\n"], "stop", 3),
        ("stop token", ["bcde"], "stop", 5),
        ("default length", ["bcdefghijklmnopq"], "length", 16),
        ("echo", ["abcde"], "length", 2),
        ("only the prompt", ["abc"], "length", 0),
        ("seed", ["eimq"], "length", 4),
    ],
)
def test_texts_and_usage(
    server: Running, name: str, texts: list[str], reason: str, completion_tokens: int
) -> None:
    answer = server.client().completions.create(model="counting", **CASES[name])
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert {choice.finish_reason for choice in answer.choices} == {reason}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == completion_tokens
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_logprobs_have_openais_shape(server: Running) -> None:
    case = CASES["echo with logprobs"]
    (choice,) = server.client().completions.create(model="counting", **case).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c", "d", "e"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    # The counting model's own: token i has -(1 + i % 8) / 8.
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.375, -0.5, -0.625]
    assert choice.logprobs.top_logprobs == [
        None,
        {"b": -0.25},
        {"c": -0.375},
        {"d": -0.5},
        {"e": -0.625},
    ]


def test_prompt_logprobs_have_vllms_shape(server: Running) -> None:
    answer = server.post("/v1/completions", {"prompt": "ab", "prompt_logprobs": 1, "max_tokens": 1})
    assert answer.json()["choices"][0]["prompt_logprobs"] == [
        None,
        {"1": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}},
    ]


def test_many_clients_at_once_get_their_own_tokens() -> None:
    async def ask(running: Running) -> list[str]:
        async with running.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="counting", prompt=[i, i], max_tokens=4)
                    for i in range(40)
                )
            )
        return [answer.choices[0].text for answer in answers]

    with serving(counting_engine(12, max_batch_size=8)) as running:
        texts = asyncio.run(ask(running))
        alphabet = running.llm.tokenizer.decode(range(44))
    assert texts == [alphabet[i + 1 : i + 5] for i in range(40)]


def test_lm_evals_scoring_request_gives_the_logprobs_of_the_engine(tiny_engine: Path) -> None:
    """The request and the reading of lm-eval's ``local-completions``."""
    contexts = [[5, 9, 30, 31], [40, 41]]
    continuations = [[7, 8, 200], [3]]
    prompts = [c + d for c, d in zip(contexts, continuations, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    with LLM(tiny_engine) as llm:
        outputs = llm.generate(prompts, params)
    with serving(load(tiny_engine, {})) as running:
        request = {
            "model": "counting",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        choices = running.post("/v1/completions", request).json()["choices"]
        for context, choice, output in zip(contexts, choices, outputs, strict=True):
            scores = output.prompt_logprobs
            assert scores is not None
            wanted = [entry for entry in scores[len(context) :] if entry is not None]
            logprobs = choice["logprobs"]
            got = logprobs["token_logprobs"][len(context) : -1]
            assert math.isclose(sum(got), sum(entry.logprob for entry in wanted), abs_tol=1e-4)
            tops = logprobs["top_logprobs"][len(context) : -1]
            greedy = [token == max(top.values()) for token, top in zip(got, tops, strict=True)]
            assert greedy == [entry.rank == 1 for entry in wanted]
