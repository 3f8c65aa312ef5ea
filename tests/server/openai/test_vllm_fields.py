"""Fields of vLLM's requests: what they do, and which values of those that do nothing are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load
from slipstream.server.openai.closed_schema import without_others

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
}


def answer(server: Running, path: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    given = {"prompt": "abc"} if path == COMPLETIONS else {"messages": HELLO}
    response = server.post(path, {**given, "max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


def refusal(server: Running, path: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    given = {"prompt": "abc"} if path == COMPLETIONS else {"messages": HELLO}
    response = server.post(path, {**given, "max_tokens": 4, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_only_the_last_tokens_of_a_prompt_are_read(server: Running) -> None:
    fields = {"return_token_ids": True, "echo": True, "truncate_prompt_tokens": 2}
    made = answer(server, COMPLETIONS, **fields)
    (choice,) = made["choices"]
    assert choice["prompt_token_ids"] == [1, 2] and choice["text"] == "bcdefg"
    assert made["usage"]["prompt_tokens"] == 2
    longer = {**fields, "truncate_prompt_tokens": 99}
    assert answer(server, COMPLETIONS, **longer)["choices"][0]["text"] == "abcdefg"
    (choice,) = answer(server, COMPLETIONS, **fields, prompt=[5, 6, 7])["choices"]
    assert choice["prompt_token_ids"] == [6, 7]
    made = answer(server, CHAT, truncate_prompt_tokens=3, return_token_ids=True)
    assert made["prompt_token_ids"] == server.llm.tokenizer.encode(";a:")
    assert made["usage"]["prompt_tokens"] == 3


def test_a_prompt_that_is_too_long_may_be_cut_to_what_fits(server: Running) -> None:
    most = server.llm.config.max_seq_len
    for prompt in ("x" * (most + 5), [1] * (most + 5)):
        assert refusal(server, COMPLETIONS, prompt=prompt)["code"] == "context_length_exceeded"
        made = answer(server, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=-1)
        assert made["usage"]["prompt_tokens"] == most - 4
        assert made["usage"]["completion_tokens"] == 4
    for cut in (0, -2, 1.5):
        refused = refusal(server, COMPLETIONS, truncate_prompt_tokens=cut)
        assert refused["param"] == "truncate_prompt_tokens"


def test_prompts_are_remembered_within_a_salt(server: Running) -> None:
    prompt = [7] * 64

    def cached(**fields: Any) -> int:  # noqa: ANN401 - JSON
        usage = answer(server, COMPLETIONS, prompt=prompt, **fields)["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [cached(), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 0, 0]
    assert min(cached(), cached(cache_salt="a"), cached(cache_salt="b")) > 0
    assert refusal(server, COMPLETIONS, cache_salt="")["param"] == "cache_salt"


def test_a_caller_may_name_the_answer(server: Running) -> None:
    name = 'a"b'
    assert answer(server, COMPLETIONS, request_id=name)["id"] == f"cmpl-{name}"
    assert answer(server, CHAT, request_id=name)["id"] == f"chatcmpl-{name}"
    body = {"messages": HELLO, "max_tokens": 2, "stream": True, "request_id": name}
    lines = server.post(CHAT, body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    assert {event["id"] for event in events} == {f"chatcmpl-{name}"}


NEUTRAL = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "logits_processors": [],
    "vllm_xargs": {},
    "mm_processor_kwargs": {},
    "kv_transfer_params": None,
    "spaces_between_special_tokens": True,
}


def test_values_that_change_nothing_are_taken(server: Running) -> None:
    assert answer(server, COMPLETIONS, **NEUTRAL)["choices"][0]["text"] == "defg"
    answer(server, CHAT, **NEUTRAL, best_of=1, chat_template=None)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "length_penalty", 0.5),
        (COMPLETIONS, "logits_processors", ["x"]),
        (COMPLETIONS, "prompt_embeds", "AAAA"),
        (COMPLETIONS, "kv_transfer_params", {"do_remote_prefill": True}),
        (COMPLETIONS, "vllm_xargs", {"a": 1}),
        (CHAT, "best_of", 2),
        (CHAT, "chat_template", "{{ messages }}"),
        (CHAT, "guided_whitespace_pattern", " "),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    server: Running, path: str, field: str, value: object
) -> None:
    assert refusal(server, path, **{field: value})["param"] == field


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Iterator[Running]:
    """A server of a model that writes texts."""
    with serving(load(tiny_engine, {})) as running:
        yield running


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
        {"structured_outputs": {"json": json.dumps(PERSON), "whitespace_pattern": " "}},
        {"guided_json": PERSON, "guided_whitespace_pattern": " ?"},
    ],
    ids=["one way", "pattern", "older"],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_closed_objects_in_one_line(tiny: Running, path: str, form: dict[str, Any]) -> None:
    outputs = form.get("structured_outputs", {})
    if outputs:
        form = {"structured_outputs": {**outputs, "disable_additional_properties": True,
                                       "disable_fallback": True}}  # fmt: skip
    else:
        form = {**form, "guided_json": {**PERSON, "additionalProperties": False}}
    (choice,) = answer(tiny, path, **form, max_tokens=40, temperature=1.0, seed=3)["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert choice["finish_reason"] == "stop" and "\n" not in text
    assert list(json.loads(text)) == ["age"]
    if outputs.get("disable_any_whitespace"):
        assert text == json.dumps(json.loads(text))


def test_only_a_schema_can_be_closed(server: Running) -> None:
    for form in ({"regex": "a"}, {"json": "[1"}, {"json": True}):
        given = {**form, "disable_additional_properties": True}
        assert refusal(server, CHAT, structured_outputs=given)["param"] == "structured_outputs"


def test_objects_are_closed_where_properties_are_named() -> None:
    data = {"properties": {"no": "schema"}}
    schema = {
        "properties": {
            "properties": {"type": "object", "properties": {}},
            "any": {"type": "object"},
            "open": {"properties": {}, "additionalProperties": True},
            "joined": {"allOf": [data], "properties": {}},
        },
        "anyOf": [{"items": {"patternProperties": {"a": {}}}}, True],
        "enum": [data],
        "default": data,
    }
    closed = {"additionalProperties": False}
    assert without_others(schema) == {
        **schema,
        **closed,
        "properties": {
            **schema["properties"],  # type: ignore[dict-item]
            "properties": {"type": "object", "properties": {}, **closed},
        },
        "anyOf": [{"items": {"patternProperties": {"a": {}}, **closed}}, True],
    }
