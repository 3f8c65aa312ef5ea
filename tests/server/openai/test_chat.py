"""``/v1/chat/completions`` through OpenAI's own client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 5},
    "OpenAI's newer name": {"max_completion_tokens": 5, "max_tokens": 9},
    "several": {"max_tokens": 4, "n": 3},
    "stop": {"max_tokens": 20, "stop": ["-_"]},
    "end of sequence": {"max_tokens": 50},
    "logprobs": {"max_tokens": 3, "logprobs": True, "top_logprobs": 2},
    "logprobs of several": {"max_tokens": 3, "logprobs": True, "n": 2, "stop": ["?"]},
}


def joined(chunks: list[ChatCompletionChunk], index: int) -> tuple[str, Any, list[str]]:
    """Text, finish reason and tokens of one choice of a stream."""
    choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
    assert choices[0].delta.role == "assistant" and choices[0].delta.content == ""
    assert all(choice.finish_reason is None for choice in choices[:-1])
    tokens = [t.token for c in choices if c.logprobs for t in c.logprobs.content or ()]
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason, tokens


@pytest.mark.parametrize("name", CASES)
def test_a_stream_joins_to_the_answer_in_one_piece(server: Running, name: str) -> None:
    client, case = server.client(), {"model": "counting", "messages": HELLO, **CASES[name]}
    whole = client.chat.completions.create(**case)
    chunks = list(
        client.chat.completions.create(**case, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        tokens = [t.token for t in (choice.logprobs and choice.logprobs.content) or ()]
        expected = (choice.message.content, choice.finish_reason, tokens)
        assert joined(chunks, choice.index) == expected
    assert whole.usage is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert not chunks[-1].choices and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("plain", ";!?-_", "length"),
        ("OpenAI's newer name", ";!?-_", "length"),
        ("stop", ";!?", "stop"),
        ("end of sequence", ";!?-_\n", "stop"),
    ],
)
def test_texts(server: Running, name: str, text: str, reason: str) -> None:
    answer = server.client().chat.completions.create(
        model="counting", messages=HELLO, **CASES[name]
    )
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == reason
    assert answer.usage is not None and answer.usage.prompt_tokens == len("u:hi;a:")


def test_usage_in_every_chunk_when_asked_for(server: Running) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = server.client().chat.completions.create(
        model="counting", messages=HELLO, max_tokens=3, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts[-1] == 3 and counts == sorted(counts)


def test_logprobs_have_openais_shape(server: Running) -> None:
    answer = server.client().chat.completions.create(
        model="counting", messages=HELLO, **CASES["logprobs"]
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.bytes, first.logprob) == (";", [ord(";")], -0.375)
    assert [top.token for top in first.top_logprobs] == [";"]


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "u:hi;a:"),
        (
            [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
            "u:a\nb;a:",
        ),
        ([{"role": "developer", "content": "x"}], "s:x;a:"),
        ([{"role": "user", "content": "hi", "name": "bob"}], "u:hi;a:"),
    ],
)
def test_messages_reach_the_template_as_text(server: Running, messages: Any, prompt: str) -> None:  # noqa: ANN401
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert server.llm.tokenizer.decode(tokens) == prompt


def test_the_async_client_streams(server: Running) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model="counting", messages=HELLO, max_tokens=6, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def main() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client) for _ in range(10)))

    assert asyncio.run(main()) == [";!?-_\n"] * 10


def test_a_real_template_and_the_last_message_to_go_on_with(tiny_engine: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the fox"}]
    with serving(load(tiny_engine, {})) as running:

        def prompt(**options: Any) -> str:  # noqa: ANN401 - those of the request
            answer = running.post("/tokenize", {"messages": messages, **options}).json()
            return running.llm.tokenizer.decode(answer["tokens"], skip_special_tokens=False)

        turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthe fox"
        assert prompt() == f"{turns}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt(add_generation_prompt=False) == f"{turns}<|im_end|>\n"
        assert prompt(continue_final_message=True) == turns
        answer = running.client().chat.completions.create(
            model="counting",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=3,
            temperature=0,
            logprobs=True,
            extra_body={"continue_final_message": True, "top_k": 5, "prompt_logprobs": 0},
        )
        content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
        assert content and len(content) == 3
        assert answer.usage and answer.model_extra
        assert len(answer.model_extra["prompt_logprobs"]) == answer.usage.prompt_tokens
