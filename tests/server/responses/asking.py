"""What the tests of the Responses API ask, and of whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.server.openai.marked import MarkedDialect
from tests.server.openai.serving import Running

SCORED: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL: Any = {"type": "function", "name": "d", "parameters": SCHEMA, "strict": False}
# What the model says after ":" and past its end.
SAID = [
    ("message", ";"),
    ("reasoning", "?-"),
    ("message", "\nab"),
    ("function_call", "fg"),
    ("message", "ij"),
]


@dataclass
class Hearing(MarkedDialect):
    """Remembers the messages too."""

    heard: list[dict[str, Any]] = field(default_factory=list)

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As they are."""
        self.heard = super().messages(messages)
        return self.heard


def ask(running: Running, **changes: Any) -> Any:  # noqa: ANN401 - the client's types
    extra = {"ignore_eos": True, **changes.pop("extra_body", {})}
    given = {"model": "counting", "input": "hi", "max_output_tokens": 17, **changes}
    with running.client() as client:
        answer = client.responses.create(**given, extra_body=extra)
        return list(answer) if given.get("stream") else answer


def told(item: Any) -> tuple[str, str]:  # noqa: ANN401 - the client's types
    if item.type == "function_call":
        return item.type, item.arguments
    assert len(item.content) == 1
    return item.type, item.content[0].text


def without_ids(response: Any) -> dict[str, Any]:  # noqa: ANN401 - the client's types
    found = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        found.pop(name, None)
    for item in found["output"]:
        assert item.pop("id").startswith(("msg_", "rs_", "fc_"))
    return dict(found)
