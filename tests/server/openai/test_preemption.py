"""Answers held to forms, with pages for a third of them: whoever is preempted says the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.runtime.chat.templates import QWEN
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load

_WORDS = {
    "type": "object",
    "properties": {"words": {"type": "string", "pattern": "^[a-z]{40}$"}},
    "required": ["words"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
_TOOL = {"type": "function", "function": {"name": "say", "strict": True, "parameters": _WORDS}}
_LARK = 'start: /[a-z]{15}/ " jumps over the lazy dog and back " /[a-z]{15}/'
_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Say what you like to say."}]}
_TEXT: dict[str, Any] = {"prompt": "It was a dark and stormy night, and then "}
_PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {**_CHAT, **_PLAIN, "guided_json": _WORDS}),
    ("chat/completions", {**_CHAT, **_PLAIN, "tools": [_TOOL], "tool_choice": "required"}),
    ("chat/completions", {**_CHAT, "thinking_token_budget": 30, "guided_regex": "[x-z]{25}"}),
    ("completions", {**_TEXT, "guided_regex": "[a-f]{50}", "logprobs": 1}),
    ("completions", {**_TEXT, "guided_grammar": _LARK}),
    ("completions", {**_TEXT, "guided_choice": ["ab" * 25, "ac" * 25], "n": 2}),
    ("completions", {**_TEXT, "max_tokens": 50}),
]


@pytest.fixture(scope="module")
def tight(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random model in a cache of 17 pages."""
    template = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    template.write_text(QWEN)
    whole = load(tiny_engine, {"kv_cache_bytes": 1 << 20})
    page = (1 << 20) // whole.executor.reserve_kv(1 << 20)
    whole.executor.shutdown()
    options = {"chat_template": str(template), "kv_cache_bytes": 17 * page}
    with serving(load(tiny_engine, options)) as running:
        yield running


def ask(running: Running, number: int, stream: bool) -> list[Any]:
    """What the choices of an answer came to, without what differs from call to call."""
    path, fields = ASKED[number]
    body = {"max_tokens": 150, "temperature": 1, "seed": number, **fields, "stream": stream}
    with httpx.stream("POST", f"{running.url}/v1/{path}", json=body, timeout=60) as response:
        response.read()
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    told: dict[int, dict[str, Any]] = {}
    for part in map(json.loads, lines if stream else [response.text]):
        for choice in part["choices"]:
            _add(told.setdefault(choice["index"], {"reason": None}), choice)
    return [told[index] for index in sorted(told)]


def _add(told: dict[str, Any], choice: dict[str, Any]) -> None:
    said = choice.get("delta") or choice.get("message") or choice
    calls = [call["function"] for call in said.get("tool_calls") or ()]
    texts = [(name, said.get(name)) for name in ("reasoning_content", "content", "text")]
    texts += [(name, call.get(name)) for call in calls for name in ("name", "arguments")]
    for name, text in texts:
        told[name] = told.get(name, "") + (text or "")
    told["reason"] = choice["finish_reason"] or told["reason"]
    if choice.get("logprobs"):
        told.setdefault("scores", []).extend(choice["logprobs"]["token_logprobs"])


def test_forms_survive_preemption_and_are_found_in_the_prefix_cache(tight: Running) -> None:
    numbers = range(len(ASKED))
    alone = [ask(tight, number, stream=False) for number in numbers]
    assert all(choice["reason"] for choices in alone for choice in choices)
    before = tight.samples()
    assert before["slipstream:num_preemptions_total"] == 0
    preempted = hits = 0.0
    with ThreadPoolExecutor(len(ASKED)) as pool:
        for _ in range(20):  # they met in the first round, unless this machine is very busy
            together = list(pool.map(lambda number: ask(tight, number, stream=True), numbers))
            assert together == alone
            now = tight.samples()
            preempted = now["slipstream:num_preemptions_total"]
            name = "slipstream:prefix_cache_hits_total"
            hits = now[name] - before[name]
            if preempted and hits:
                return
    raise AssertionError(f"{preempted} preemptions, {hits} hits")
