"""Ollama's own client and its documented requests, on a model that counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import ollama
import pytest
from tests.server.openai.marked import MarkedDialect
from tests.server.openai.serving import Running, serving

from slipstream import __version__
from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    OutputParser,
    ReasoningText,
)
from slipstream.runtime.chat.options import ChatOptions, Tool
from slipstream.runtime.testing import counting_engine
from slipstream.server.core.http import respond
from slipstream.server.core.refusal import Refusal
from slipstream.server.ollama.reply import OllamaReply, as_response

# The model says ";!?-_\n" after a prompt that ends in ":", and "fghijklmn..." after "e".
Connect = Callable[[Running], ollama.Client]
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
GOING_ON: list[Any] = [*HELLO, {"role": "assistant", "content": "bade"}]
SCRIPT: dict[str, list[Event]] = {
    "f": [ReasoningText("hm")],
    "g": [CallBegin(0, "c0", "add"), CallArguments(0, '{"a":')],
    "h": [CallArguments(0, "1}")],
    "i": [CallBegin(1, "c1", "add")],
    "j": [CallArguments(1, '{"a":[2]}')],
    "k": [ContentText("done")],
    "l": [CallBegin(2, "c2", "cut"), CallArguments(2, '{"a')],
}
CALLS = [("add", {"a": 1}), ("add", {"a": [2]})]


@dataclass
class ScriptedParser:
    """Events for letters."""

    def push(self, text: str) -> list[Event]:
        """Those of a text."""
        return [event for char in text for event in SCRIPT.get(char, [])]

    def finish(self) -> list[Event]:
        """None."""
        return []


@dataclass
class ScriptedDialect(MarkedDialect):
    """A dialect whose answers are in the script."""

    marks: str = ""
    seen: list[Any] = field(default_factory=list)

    def messages(self, messages: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
        """As they are, and remembered."""
        self.seen = [dict(message) for message in messages]
        return self.seen

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser of one completion."""
        return ScriptedParser()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(served_model_name=("counting", "org/m:7b")) as running:
        yield running


@pytest.fixture(scope="module")
def dialect() -> ScriptedDialect:
    return ScriptedDialect()


@pytest.fixture(scope="module")
def scripted(dialect: ScriptedDialect) -> Iterator[Running]:
    with serving() as running:
        running.service.dialect = dialect
        yield running


@pytest.mark.parametrize("name", ["counting", "counting:latest", "org/m:7b"])
def test_a_raw_prompt_is_continued(server: Running, name: str, client: Connect) -> None:
    answer = client(server).generate(name, "abc", raw=True, options={"num_predict": 4})
    assert (answer.response, answer.model) == ("defg", name)
    assert answer.done and answer.done_reason == "length"
    assert (answer.prompt_eval_count, answer.eval_count) == (3, 4)
    assert answer.total_duration and answer.load_duration is not None
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert abs(sum(part or 0 for part in parts) - answer.total_duration) < 1000


def test_a_stream_joins_to_the_answer(server: Running, client: Connect) -> None:
    lines = list(client(server).generate("counting", "abc", raw=True, stream=True,
                                         options={"num_predict": 4, "stop": ["g"]}))  # fmt: skip
    assert "".join(line.response or "" for line in lines) == "def"
    assert [line.done for line in lines[-2:]] == [False, True]
    assert lines[-1].done_reason == "stop" and lines[-1].eval_count == 4


def test_streams_are_lines_unless_told_otherwise(server: Running) -> None:
    body = {"model": "counting", "messages": HELLO, "options": {"num_predict": 2}}
    answer = server.post("/api/chat", body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == ";!"
    assert lines[-1]["done"] and "done_reason" not in lines[0]
    whole = server.post("/api/chat", {**body, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": ";!"}


def test_a_prompt_is_a_question_in_the_template(server: Running, client: Connect) -> None:
    asked = client(server).generate("counting", "hi", system="S", options={"num_predict": 2})
    said = client(server).chat("counting", [{"role": "system", "content": "S"}, *HELLO],
                               options={"num_predict": 2})  # fmt: skip
    assert asked.response == said.message.content == ";!"
    assert asked.prompt_eval_count == said.prompt_eval_count


def test_a_context_is_given_back_and_taken(server: Running, client: Connect) -> None:
    """The tokens of all that was asked and said: the model sees a conversation of one more turn."""
    asked: Any = {"options": {"num_predict": 2}}
    first = client(server).generate("counting", "hi", **asked)
    encode = server.llm.tokenizer.encode
    assert first.context == encode("u:hi;a:;!", False)
    second = client(server).generate("counting", "yo", context=first.context, **asked)
    assert second.context == encode("u:hi;a:;!u:yo;a:;!", False)
    assert second.prompt_eval_count == len(second.context) - 2
    lines = list(
        client(server).generate("counting", "yo", context=first.context, stream=True, **asked)
    )
    assert lines[-1].context == second.context and lines[0].context is None
    assert client(server).generate("counting", "hi", raw=True, **asked).context is None


def test_an_answer_is_gone_on_with(server: Running, client: Connect) -> None:
    answer = client(server).chat(
        "counting", GOING_ON, options={"num_predict": 3, "seed": -1, "num_ctx": 64}
    )
    assert answer.message.content == "fgh"


def test_log_probabilities(server: Running, client: Connect) -> None:
    asked: Any = {"raw": True, "logprobs": True, "top_logprobs": 2, "options": {"num_predict": 2}}
    answer = client(server).generate("counting", "abc", **asked)
    assert answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs] == ["d", "e"]
    likeliest = [next(iter(entry.top_logprobs or ())) for entry in answer.logprobs]
    assert [entry.token for entry in likeliest] == ["d", "e"]
    lines = client(server).generate("counting", "abc", stream=True, **asked)
    streamed = [entry for line in lines for entry in line.logprobs or ()]
    assert streamed == list(answer.logprobs)


def test_without_a_prompt_the_model_is_loaded(server: Running, client: Connect) -> None:
    answer = client(server).generate("counting", keep_alive=-1)
    assert (answer.response, answer.done, answer.done_reason) == ("", True, "load")
    chat = client(server).chat("counting", [])
    assert (chat.message.content, chat.done_reason) == ("", "load")
    (line,) = client(server).chat("counting", stream=True)
    assert line.done_reason == "load"


def test_calls_come_whole_and_thoughts_apart(scripted: Running, client: Connect) -> None:
    options = {"num_predict": 8}
    answer = client(scripted).chat("counting", GOING_ON, think=True, options=options)
    message = answer.message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    assert calls == CALLS
    # What was cut off is text.
    assert (message.thinking, message.content) == ("hm", 'donecut{"a')
    lines = list(client(scripted).chat("counting", GOING_ON, stream=True, options=options))
    streamed = [c for line in lines for c in line.message.tool_calls or ()]
    assert [(c.function.name, c.function.arguments) for c in streamed] == CALLS
    assert "".join(line.message.thinking or "" for line in lines) == "hm"
    assert "".join(line.message.content or "" for line in lines) == 'donecut{"a'
    generated = client(scripted).generate("counting", "hi", options={"num_predict": 1})
    assert generated.thinking is None


def test_a_function_is_a_tool_and_its_answer_finds_the_call(
    scripted: Running, dialect: ScriptedDialect, client: Connect
) -> None:
    def add(a: int) -> int:
        """Add.

        Args:
          a: A number.
        """
        return a

    def call(number: int) -> dict[str, Any]:
        return {"function": {"name": "add", "arguments": {"a": number}}}

    said: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call(1), call(2)]},
        {"role": "tool", "tool_name": "add", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    client(scripted).chat("counting", said, tools=[add], think="high", options={"num_predict": 1})
    assert dialect.asked is not None
    options = dialect.asked[0]
    assert [tool.name for tool in options.tools] == ["add"]
    assert isinstance(options.tools[0], Tool) and options.tools[0].description == "Add."
    assert (options.thinking, options.reasoning_effort) == (True, "high")
    _, turn, first, second = dialect.seen
    assert turn["reasoning_content"] == "hm"
    assert [c["function"]["arguments"] for c in turn["tool_calls"]] == ['{"a":1}', '{"a":2}']
    ids = [c["id"] for c in turn["tool_calls"]]
    assert [first["tool_call_id"], second["tool_call_id"]] == ids and first["name"] == "add"


def test_curl_sends_json_as_a_form_but_web_pages_may_not(server: Running) -> None:
    body = json.dumps(
        {"prompt": "abc", "raw": True, "stream": False, "options": {"num_predict": 1}}
    )
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{server.url}/api/generate", content=body, headers=form)
    assert answer.json()["response"] == "d"
    foreign = {**form, "Origin": "http://elsewhere.example"}
    answer = httpx.post(f"{server.url}/api/generate", content=body, headers=foreign)
    assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("generate", {"model": "other", "prompt": "a"}, 404, "model 'other' not found"),
        ("chat", {"model": "counting:7b", "messages": HELLO}, 404, "not found"),
        ("generate", {"prompt": "a", "suffix": "b"}, 400, "suffix: not supported"),
        ("generate", {"prompt": "a", "images": ["aa"]}, 400, "images"),
        ("generate", {"prompt": "a", "template": "{{.}}"}, 400, "--chat-template"),
        ("generate", {"prompt": "a", "context": [1], "raw": True}, 400, "without context"),
        ("generate", {"prompt": "a", "context": [1], "system": "s"}, 400, "leave out system"),
        ("generate", {"prompt": "a", "context": [1 << 40]}, 400, "context"),
        ("generate", {"prompt": "a", "context": [-1]}, 400, "context"),
        ("generate", {"prompt": "a", "width": 64}, 400, "width"),
        ("generate", {"prompt": "a", "think": "deep"}, 400, "think"),
        ("embeddings", {"prompt": "a"}, 400, "vectors"),
        ("generate", {"prompt": "a", "raw": True, "system": "s"}, 400, "without system"),
        ("generate", {"prompt": "a", "options": {"nonsense": 1}}, 400, "options.nonsense"),
        ("generate", {"prompt": "a", "options": {"mirostat": 2}}, 400, "not supported"),
        ("generate", {"prompt": "a", "options": {"temperature": -1}}, 400, "temperature"),
        ("generate", {"prompt": "a", "options": {"repeat_penalty": 0}}, 400, "repeat_penalty: "),
        ("generate", {"prompt": "a", "format": {"$ref": "#/nowhere"}}, 400, "nowhere"),
        ("generate", {"prompt": "a", "format": "yaml"}, 400, "format"),
        ("chat", {"messages": HELLO, "think": True}, 400, "does not support thinking"),
        ("chat", {"messages": HELLO, "tools": [{"function": {"name": "f"}}]}, 400,
         "does not support tools"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["aa"]}]}, 400, "images"),
        ("chat", {"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages"),
        ("embed", {"input": "a"}, 400, "vectors"),
        ("pull", {"model": "other"}, 404, "pulls no other"),
        ("create", {"model": "other", "from": "counting"}, 400, "makes"),
        ("copy", {"source": "counting", "destination": "other"}, 400, "copies"),
        ("push", {"model": "counting"}, 400, "pushes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_a_sentence(
    server: Running, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = server.post(f"/api/{path}", body)
    assert answer.status_code == status and list(answer.json()) == ["error"]
    assert words in answer.json()["error"]


def test_the_client_raises_its_error(server: Running, client: Connect) -> None:
    with pytest.raises(ollama.ResponseError, match="deletes") as caught:
        client(server).delete("counting")
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="not found"):
        next(iter(client(server).generate("other", "a", stream=True)))


def test_pulling_what_is_served_succeeds_at_once(server: Running, client: Connect) -> None:
    assert client(server).pull("counting").status == "success"
    assert [part.status for part in client(server).pull("counting:latest", stream=True)] == [
        "success"
    ]


def test_every_line_is_an_object_however_slow_the_model_is(
    monkeypatch: pytest.MonkeyPatch, client: Connect
) -> None:
    monkeypatch.setattr(respond, "PULSE_SECONDS", 0.002)
    with serving(counting_engine(delay=0.02)) as running:
        lines = list(client(running).generate("counting", "abc", raw=True, stream=True))
        assert "".join(line.response or "" for line in lines) == "defghijklmnopqrs"


def test_models_are_listed_with_their_tags(server: Running, client: Connect) -> None:
    names = ["counting:latest", "org/m:7b"]
    assert [model.model for model in client(server).list().models] == names
    running = client(server).ps().models
    assert [model.model for model in running] == names
    assert running[0].context_length == server.llm.config.max_seq_len
    assert httpx.get(f"{server.url}/api/version").json() == {"version": __version__}
    assert httpx.head(server.url).status_code == 200


def test_an_error_is_the_last_line_of_a_stream(server: Running) -> None:
    reply = OllamaReply("counting", server.service.texts, as_response)
    line = reply.error(Refusal("failed", "a step failed"))
    assert line == b'{"error": "a step failed"}\n' and reply.end() == b""
