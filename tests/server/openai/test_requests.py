"""What is refused, in what words, and that nothing else is."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.server.openai.serving import Running, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A tool in OpenAI's shape."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def deep(depth: int) -> dict[str, Any]:
    """A schema of lists in lists."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, after a check of its shape."""
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize(
    ("changes", "words", "param"),
    [
        ({"foo": 1}, "unknown field 'foo'", "foo"),
        ({"prompt": ["a", 1]}, "prompt: ", "prompt"),
        ({"prompt": []}, "0 prompts", "prompt"),
        ({"prompt": ""}, "the prompt has 0 tokens", "prompt"),
        ({"prompt": "a" * 300}, "the prompt has 300 tokens", "prompt"),
        ({"prompt": [10**30]}, "vocabulary", "prompt"),
        ({"prompt": [-1]}, "vocabulary", "prompt"),
        ({"temperature": "hot"}, "temperature: input should be a valid number", "temperature"),
        ({"temperature": -1}, "temperature=-1.0 is not a number in", "temperature"),
        ({"max_tokens": 0}, "max_tokens 0 needs echo", "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens: input should be a valid integer", "max_tokens"),
        ({"n": 0}, "n: input should be greater", "n"),
        ({"n": 10**9}, "n: input should be less", "n"),
        ({"prompt": ["a"] * 3000}, "3000 prompts of 1 completions", "prompt"),
        ({"logprobs": 21}, "logprobs: input should be less than or equal to 20", "logprobs"),
        ({"best_of": 2, "n": 3}, "best_of=2 is less than n=3", "best_of"),
        ({"best_of": 2, "stream": True}, "does not go with a stream", "best_of"),
        ({"best_of": 129}, "best_of: input should be less", "best_of"),
        ({"best_of": 128, "prompt": ["a"] * 100}, "100 prompts of 128", "best_of"),
        ({"suffix": "x"}, "the model's own marks of a gap", "suffix"),
        ({"logprob_token_ids": [1]}, "needs logprobs", "logprob_token_ids"),
        (
            {"logprob_token_ids": [1], "logprobs": 1, "echo": True, "max_tokens": 0},
            "needs logprobs, and tokens",
            "logprob_token_ids",
        ),
        ({"logprob_token_ids": [], "logprobs": 1}, "at least 1 item", "logprob_token_ids"),
        ({"logprob_token_ids": [500], "logprobs": 1}, "holds token 500", "logprob_token_ids"),
        ({"prompt_logprobs": -2}, "prompt_logprobs: ", "prompt_logprobs"),
        ({"stop": [""]}, "stop holds ''", "stop"),
        ({"stop": ["a"] * 100}, "stop: ", "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias key", "logit_bias"),
        ({"logit_bias": {"500": 1}}, "logit_bias holds token 500", "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "needs stream", "stream_options"),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "unknown field 'stream_options.x'",
            "stream_options.x",
        ),
        ({"stream": True, "prompt_logprobs": 1}, "not told in streams", "prompt_logprobs"),
        ({"response_format": {"type": "json"}}, "'json_object'", "response_format"),
        (
            {"response_format": {"type": "json_schema"}},
            "of type json_schema without one",
            "response_format",
        ),
        ({"structured_outputs": {}}, "none was given", "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "['regex', 'choice'] was given",
            "structured_outputs",
        ),
        ({"structured_outputs": {"choice": []}}, "give a list of texts", "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{"}}, "is no JSON", "structured_outputs"),
        (
            {
                "structured_outputs": {
                    "structural_tag": {
                        "triggers": ["<f"],
                        "structures": [{"begin": "<g>", "schema": {}, "end": ""}],
                    }
                }
            },
            "every begin starts with a trigger",
            "structured_outputs",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "give one of them", "guided_choice"),
        ({"guided_regex": "a" * 300_000}, "has 300000 characters", "guided_regex"),
        ({"structured_outputs": {"json": deep(100)}}, "more than 64 deep", "structured_outputs"),
    ],
)
def test_a_bad_completion_is_400_and_says_why(
    server: Running, changes: dict[str, Any], words: str, param: str | None
) -> None:
    response = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, **changes})
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert words in error["message"] and error["param"] == param


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages is [], expected a non-empty list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": "hi"}, "messages: input should be a valid list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a part of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "a part of type 'text' without its text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages.0.tool_calls.0.function is missing",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "messages[0].function_call is not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools: input should be 'function'"),
        ({"tools": [tool("f")]}, "this model's chat template knows no tools"),
        ({"tools": [tool("f")] * 2}, "two tools are named 'f'"),
        ({"tools": [tool("{{ 7 * 7 }}")]}, "tools[0] is called '{{ 7 * 7 }}'"),
        ({"tools": [tool("<tool_call>")]}, "tools[0] is called '<tool_call>'"),
        ({"tools": [tool("f")] * 600}, "tools: list should have at most 512 items"),
        ({"tools": [tool("f", deep(80))]}, "tools[0] is nested more than 64 deep"),
        ({"tools": [tool("f", {"description": "a" * 300_000})]}, "tools[0] has 300"),
        ({"tool_choice": "required"}, "tool_choice is 'required', but there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice names 'g'",
        ),
        ({"tool_choice": "any"}, "tool_choice: input should be 'auto', 'none' or 'required'"),
        ({"functions": [{}]}, "functions: not supported by this server; send tools"),
        ({"function_call": "auto"}, "function_call: not supported by this server; send tool_c"),
        ({"thinking_token_budget": -2}, "thinking_token_budget: input should be greater"),
        ({"audio": {"voice": "x"}}, "audio: not supported"),
        ({"modalities": ["text", "audio"]}, "modalities: not supported"),
        ({"reasoning_effort": "lots"}, "reasoning_effort: input should be 'none', 'minimal'"),
        ({"adapters": []}, "unknown field 'adapters'"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": 2}, "logprobs: input should be a valid boolean"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs holds messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "cannot both be true"),
    ],
)
def test_a_bad_chat_is_400_and_says_why(
    server: Running, changes: dict[str, Any], words: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **changes}
    response = server.post(CHAT, body)
    error = error_of(response)
    assert response.status_code == 400 and words in error["message"]
    assert error["param"] in changes


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"},
        {"tools": [tool("f")], "tool_choice": "none", "reasoning_effort": "high"},
        {"tool_choice": "auto", "include_reasoning": False, "thinking_token_budget": -1},
        {"stop": None, "seed": None, "n": None, "stream_options": None, "logit_bias": None},
        {"parallel_tool_calls": False, "modalities": ["text"], "priority": 0},
        {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "bad_words": ["z"]},
        {
            "min_tokens": 1,
            "ignore_eos": True,
            "allowed_token_ids": [64],
            "skip_special_tokens": True,
        },
    ],
)
def test_what_has_no_effect_or_is_vllms_is_taken(server: Running, changes: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **changes}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b"{", JSON, "no valid JSON"),
        (b"", JSON, "must be a JSON object"),
        (b"[1]", JSON, "must be a JSON object"),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, "must be a JSON object"),
        (b'{"prompt": "\\ud800"}', JSON, "not valid Unicode"),
        (b'{"prompt": "a", "temperature": NaN}', JSON, "temperature=nan"),
        (b"[" * 10_000, JSON, "cannot be read"),
        (b'{"prompt": "\xff"}', JSON, "cannot be read"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", JSON, "cannot be read"),
    ],
)
def test_a_malformed_body_is_400(
    server: Running, content: bytes, headers: dict[str, str], words: str
) -> None:
    response = httpx.post(server.url + COMPLETIONS, content=content, headers=headers, timeout=60)
    assert response.status_code == 400 and words in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_paths_and_methods(server: Running, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path, timeout=60)
    assert response.status_code == status and error_of(response)["message"]


def test_an_unknown_model_is_404_everywhere(server: Running) -> None:
    message = [{"role": "user", "content": "hi"}]
    for path, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": message}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = server.post(path, {**body, "model": "gpt-4"})
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


def test_served_names() -> None:
    with serving(served_model_name=("org/first", "second")) as running:
        client = running.client()
        assert [model.id for model in client.models.list()] == ["org/first", "second"]
        assert client.models.retrieve("org/first").id == "org/first"
        for name, answered in (("second", "second"), ("org/first", "org/first")):
            answer = client.completions.create(model=name, prompt="a", max_tokens=1)
            assert answer.model == answered
        unnamed = running.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).json()
        assert unnamed["model"] == "org/first"


def test_tokens_and_back(server: Running) -> None:
    answer = server.post("/tokenize", {"prompt": "abc", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [0, 1, 2],
        "token_strs": ["a", "b", "c"],
    }
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "abc"}
    for tokens in ([-1], [73], [10**20], "x", [True]):
        response = server.post("/detokenize", {"tokens": tokens})
        assert response.status_code == 400 and error_of(response)
    for body in ({}, {"prompt": "a", "messages": []}):
        assert server.post("/tokenize", body).status_code == 400
    info = httpx.get(f"{server.url}/tokenizer_info", timeout=60).json()
    assert info["eos_token"] == "<eos>" and "messages" not in info and info["chat_template"]


def test_what_the_server_says_of_itself(server: Running) -> None:
    get = {
        path: httpx.get(server.url + path, timeout=60)
        for path in ("/health", "/version", "/", "/metrics")
    }
    assert {response.status_code for response in get.values()} == {200}
    assert list(get["/version"].json()) == ["version"]
    assert get["/"].headers["content-type"].startswith("text/html")
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert {COMPLETIONS, CHAT, "/tokenize", "/metrics"} <= set(paths)
    assert "422" not in paths[CHAT]["post"]["responses"]
