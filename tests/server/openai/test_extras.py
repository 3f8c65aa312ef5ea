"""What vLLM's completions and chats take and tell beside OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def complete(server: Running, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    response = server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chat(server: Running, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    response = server.post(CHAT, {"messages": HELLO, "max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(server: Running, path: str, **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    lines = server.post(path, {"max_tokens": 4, "stream": True, **fields}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]


def test_the_best_of_several_are_told_in_their_order(server: Running) -> None:
    sampled = {"temperature": 1.0, "seed": 5, "logprobs": 0, "prompt": ["abc", "x"]}
    every = complete(server, n=8, **sampled)
    for position in (0, 1):
        made = every["choices"][8 * position : 8 * position + 8]
        likely = sorted((-sum(c["logprobs"]["token_logprobs"]), c["text"]) for c in made)
        assert likely[0][0] < likely[2][0], "some are likelier than others"
        best = complete(server, n=2, best_of=8, **sampled)
        told = best["choices"][2 * position : 2 * position + 2]
        sums = [-sum(c["logprobs"]["token_logprobs"]) for c in told]
        assert sums == [each for each, _ in likely[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"] == every["usage"], "what was generated is counted, told or not"


def test_best_of_needs_no_log_probabilities_and_tells_none(server: Running) -> None:
    (choice,) = complete(server, best_of=3, seed=5)["choices"]
    assert choice["logprobs"] is None and len(choice["text"]) == 4
    assert len(complete(server, best_of=1, stream=False)["choices"]) == 1


def test_token_ids_of_completions(server: Running) -> None:
    (choice,) = complete(server, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == [0, 1, 2] and choice["token_ids"] == [3, 4, 5, 6]
    assert "token_ids" not in complete(server)["choices"][0]
    # A stop string holds text back, and with it its tokens.
    fields = {"prompt": "abc", "n": 2, "stop": ["efz"], "return_token_ids": True}
    told: list[list[int]] = [[], []]
    prompts = []
    for chunk in chunks(server, COMPLETIONS, **fields):
        (choice,) = chunk["choices"]
        told[choice["index"]] += choice["token_ids"]
        prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    assert told == [[3, 4, 5, 6]] * 2 and prompts == [[0, 1, 2]] * 2


def test_token_ids_of_chats(server: Running) -> None:
    answer = chat(server, return_token_ids=True)
    prompt = server.llm.tokenizer.encode("u:hi;a:")
    ids = answer["choices"][0]["token_ids"]
    assert answer["prompt_token_ids"] == prompt
    assert server.llm.tokenizer.decode(ids) == answer["choices"][0]["message"]["content"]
    events = chunks(server, CHAT, messages=HELLO, return_token_ids=True)
    assert [e["prompt_token_ids"] for e in events if "prompt_token_ids" in e] == [prompt]
    assert "prompt_token_ids" in events[0] and "token_ids" not in events[0]["choices"][0]
    assert [i for e in events for i in e["choices"][0].get("token_ids", [])] == ids
    assert "prompt_token_ids" not in chat(server)


def test_tokens_may_be_called_by_their_ids(server: Running) -> None:
    named = {"return_tokens_as_token_ids": True, "prompt_logprobs": 0}
    (choice,) = complete(server, logprobs=1, **named)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (3, 4, 5, 6)]
    assert list(choice["logprobs"]["top_logprobs"][0]) == ["token_id:3"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["prompt_logprobs"][1]["1"]["decoded_token"] == "b"
    answer = chat(server, logprobs=True, top_logprobs=1, **named)
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert first["token"].startswith("token_id:")
    assert first["top_logprobs"][0]["token"] == first["token"]
    assert bytes(first["bytes"]).decode() == answer["choices"][0]["message"]["content"][0]


def test_listed_tokens_are_scored_in_place_of_the_likeliest(server: Running) -> None:
    (choice,) = complete(server, logprobs=1, logprob_token_ids=[7, 0])["choices"]
    # The counting model's own: token i has -(1 + i % 8) / 8.
    assert choice["logprobs"]["top_logprobs"][0] == {"d": -0.5, "h": -1.0, "a": -0.125}
    content = chat(server, logprobs=True, logprob_token_ids=[7, 0])["choices"][0]["logprobs"]
    tops = content["content"][0]["top_logprobs"]
    assert [(top["token"], top["logprob"]) for top in tops] == [("h", -1.0), ("a", -0.125)]
    assert server.post(CHAT, {"messages": HELLO, "logprob_token_ids": [7]}).status_code == 400


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Iterator[Running]:
    """A server of a model that scores every token."""
    with serving(load(tiny_engine, {})) as running:
        yield running


def test_all_tokens_of_a_prompt_within_what_an_answer_may_hold(tiny: Running) -> None:
    size = tiny.llm.tokenizer.vocab_size
    fields = {"prompt": [5, 9], "max_tokens": 1, "prompt_logprobs": -1}
    (choice,) = complete(tiny, **fields)["choices"]
    first, scores = choice["prompt_logprobs"]
    assert first is None and len(scores) >= size
    assert sorted(entry["rank"] for entry in scores.values())[:3] == [1, 2, 3]
    too_long = [5] * (1 + (1 << 19) // size)
    response = tiny.post(COMPLETIONS, {**fields, "prompt": [too_long[:200]] * 200})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"


def test_a_batch_of_conversations_is_answered_by_their_places(server: Running) -> None:
    messages = [[{"role": "user", "content": text}] for text in ("hi", "abc", "x")]
    body = {"messages": messages, "max_tokens": 3, "return_token_ids": True, "logprobs": True}
    answer = server.post(f"{CHAT}/batch", body).json()
    alone = [chat(server, messages=each, max_tokens=3) for each in messages]
    assert answer["object"] == "chat.completion"
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert [c["message"] for c in answer["choices"]] == [a["choices"][0]["message"] for a in alone]
    assert all(len(c["token_ids"]) == len(c["logprobs"]["content"]) == 3 for c in answer["choices"])
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer["usage"][count] == sum(a["usage"][count] for a in alone)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO}, "messages"),
        ({"messages": [HELLO, []]}, "messages"),
        ({"messages": [HELLO] * 3000}, "messages"),
    ],
)
def test_what_a_batch_is_not(server: Running, changes: dict[str, Any], param: str) -> None:
    response = server.post(f"{CHAT}/batch", {"messages": [HELLO], **changes})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_invocation_is_what_its_body_says(server: Running) -> None:
    text = server.post("/invocations", {"prompt": "abc", "max_tokens": 4}).json()
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "defg")
    turn = server.post("/invocations", {"messages": HELLO, "max_tokens": 4}).json()
    assert turn["choices"][0]["message"] == chat(server)["choices"][0]["message"]
    stream = server.post("/invocations", {"prompt": "a", "max_tokens": 2, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    for body, words, param in (
        ({"text": "a"}, "none of messages, prompt, input", None),
        ({"prompt": "a", "foo": 1}, "unknown field 'foo'", "foo"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature: ", "temperature"),
        ({"input": "a"}, "gives no hidden states", None),
    ):
        error = server.post("/invocations", body).json()["error"]
        assert words in error["message"] and error["param"] == param


def test_health_is_also_a_ping_and_answers_are_counted(server: Running) -> None:
    counted = "slipstream:http_requests_total {2} {0} {1}"
    before = server.samples()
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("HEAD", "/health")):
        response = httpx.request(method, server.url + path)
        assert response.status_code == 200
        name = counted.format(method, 200, path)
        wanted = before.get(name, 0) + 1
        server.wait(lambda name=name, wanted=wanted: server.samples().get(name) == wanted)  # type: ignore[misc]
    assert httpx.get(f"{server.url}/nowhere/{id(before)}").status_code == 404
    assert server.post(COMPLETIONS, {"prompt": ""}).status_code == 400
    for name in (counted.format("POST", 400, COMPLETIONS), counted.format("GET", 404, "none")):
        server.wait(lambda name=name: name in server.samples())  # type: ignore[misc]
    samples = server.samples()
    assert not [name for name in samples if str(id(before)) in name]


def test_the_load_is_the_requests_that_run_or_wait() -> None:
    def load() -> int:
        count: int = httpx.get(f"{running.url}/load").json()["server_load"]
        return count

    device = GatedDevice()
    with serving(engine_on(device)) as running, device, ThreadPoolExecutor() as clients:
        assert load() == 0
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}
        asked = [clients.submit(running.post, COMPLETIONS, body) for _ in range(2)]
        running.wait(lambda: running.service.places.requests == 2)
        assert load() == 2, "requests are counted, not their completions"
        device.permits.release(100)
        assert all(each.result(60).status_code == 200 for each in asked)
        assert load() == 0


def test_steps_and_the_cache_are_in_the_metrics(server: Running) -> None:
    before = server.samples()
    complete(server, max_tokens=5)
    samples = server.samples()
    tokens, steps = "slipstream:iteration_tokens_total_sum", "slipstream:step_time_seconds_count"
    # Three of the prompt and four that were generated before the last; a step more may run ahead.
    assert 7 <= samples[tokens] - before[tokens] <= 8
    assert 5 <= samples[steps] - before[steps] <= 6
    asked = "slipstream:request_params_max_tokens_sum"
    assert samples[asked] - before[asked] == 5
