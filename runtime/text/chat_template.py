"""Chat templates: messages into the text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from slipstream.errors import InvalidRequestError
from slipstream.weights.json import Origin
from slipstream.weights.template_sizes import TemplateLimitError
from slipstream.weights.templates import compile_template, limited_work

# What a template may stumble over when messages lack what it expects, besides its own complaints.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
_REMEDY = "give another with --chat-template FILE (chat_template in Python)"
_ORIGIN = Origin("the chat template", _REMEDY)

# As in transformers: it ends in a space, so that a template that trims what it is given is seen.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Raises ``CheckpointError`` if ``source`` is not a Jinja template."""
        self._source = source
        self._template = compile_template(source, _ORIGIN)

    def render(
        self,
        messages: object,
        tools: object,
        variables: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt; ``InvalidRequestError`` if messages are malformed or the template objects.

        ``continue_final_message`` ends it with what the last message says.
        """
        checked = self._known_roles(_with_reasoning(_checked_messages(messages)))
        if not continue_final_message:
            return self._render(checked, tools, variables)
        final = _tag(checked[-1]) if "content" in self._source else None
        text = "" if final is None else self._render(checked, tools, variables)
        if final is None or final.strip() not in text or _TAG.strip() not in text:
            raise InvalidRequestError(
                "continue_final_message is true, but the last message has no text, or this model's "
                "chat template does not show it as it is; leave it out",
                param="continue_final_message",
            )
        before, _, after = text.rpartition(_TAG.strip())
        # A template may trim what it is given; then nothing may follow the text.
        return before if after.startswith(" ") else before.rstrip()

    def _known_roles(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """OpenAI's newer name for who instructs, which few templates know, as its older name."""
        if "developer" in self._source:
            return messages
        older = {"developer": "system"}
        return [
            {**message, "role": older.get(message["role"], message["role"])} for message in messages
        ]

    def _render(
        self, checked: list[dict[str, Any]], tools: object, variables: Mapping[str, Any]
    ) -> str:
        try:
            with limited_work():
                return self._template.render(
                    **_plain("chat template arguments", dict(variables)),
                    messages=checked,
                    tools=_plain("tools", tools),
                )
        except TemplateLimitError as error:
            raise InvalidRequestError(
                f"the chat template does too much: {error}; send fewer or shorter messages, or "
                f"{_REMEDY}",
                param="messages",
            ) from error
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template refused these messages: {error}; "
                "send roles and contents that this model's template accepts",
                param="messages",
            ) from error


def _tag(message: dict[str, Any]) -> str | None:
    """Mark the end of what a message says, its last text if it has parts; return that."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _TAG
        return content
    parts = content if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _TAG
            return text
    return None


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an assistant thought has had several names; templates get all of them."""
    named = []
    for message in messages:
        thought = next((message[name] for name in _REASONING if name in message), None)
        more = {} if thought is None else {"reasoning_content": thought}
        known = {} if thought is None else {"thinking": thought}
        named.append({**known, **message, **more})
    return named


def select_template(templates: Mapping[str, str], *, with_tools: bool) -> str:
    """The name of the template: ``tool_use`` for tools where there is one, else ``default``."""
    if with_tools and "tool_use" in templates:
        return "tool_use"
    if "default" in templates:
        return "default"
    raise InvalidRequestError(
        "this model has no default chat template "
        f"(it has: {', '.join(sorted(templates)) or 'none'}); "
        f"send a plain prompt, or {_REMEDY}",
        param="messages",
    )


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequestError(
            f"messages is {messages!r:.80}, expected a non-empty list of dicts; "
            "use e.g. [{'role': 'user', 'content': 'Hello'}]",
            param="messages",
        )
    for index, message in enumerate(messages):
        _check_message(index, message)
    # Templates test for a key, not for null, which clients send for what is absent; but of a
    # message that calls tools some know by null that it says nothing.
    checked: list[dict[str, Any]] = _plain("messages", list(messages))
    return [
        {k: v for k, v in message.items() if v is not None or (k == "content" and calls)}
        for message in checked
        for calls in [message.get("tool_calls")]
    ]


def _check_message(index: int, message: object) -> None:
    remedy = "use e.g. {'role': 'user', 'content': 'Hello'}"
    if not isinstance(message, dict):
        raise InvalidRequestError(
            f"messages[{index}] is {message!r:.80}, expected a dict; {remedy}", param="messages"
        )
    if not isinstance(role := message.get("role"), str) or not role:
        raise InvalidRequestError(
            f"messages[{index}]['role'] is {role!r:.80}, expected a name; {remedy}",
            param="messages",
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise InvalidRequestError(
            f"messages[{index}]['content'] is {content!r:.80}, expected text or a list of parts; "
            f"{remedy}",
            param="messages",
        )


def _plain(name: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    # A copy of plain JSON types: a template can reach no method of a caller's object and change
    # nothing.
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{name} cannot be expressed as JSON ({error}); "
            "use text, numbers, booleans, lists and dicts",
            param=name,
        ) from error
