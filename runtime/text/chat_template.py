"""Chat templates: Jinja programs from a checkpoint, in a sandbox set up as in ``transformers``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slipstream.errors import CheckpointError, InvalidRequestError

# What a template may stumble over when messages lack what it expects, besides its own complaints.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Raises ``CheckpointError`` if ``source`` is not a Jinja template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja ({error}); "
                "mend chat_template.jinja in the engine directory"
            ) from error

    def render(self, messages: object, tools: object, variables: Mapping[str, Any]) -> str:
        """The prompt; ``InvalidRequestError`` if messages are malformed or the template objects."""
        checked = _checked_messages(messages)
        try:
            return self._template.render(
                **_plain("chat_template_kwargs", dict(variables)),
                messages=checked,
                tools=_plain("tools", tools),
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(
                f"the chat template refused these messages: {error}; "
                "send roles and contents that this model's template accepts",
                param="messages",
            ) from error


def select_template(templates: Mapping[str, str], *, with_tools: bool) -> str:
    """The name of the template: ``tool_use`` for tools where there is one, else ``default``."""
    if with_tools and "tool_use" in templates:
        return "tool_use"
    if "default" in templates:
        return "default"
    raise InvalidRequestError(
        "this model has no default chat template "
        f"(it has: {', '.join(sorted(templates)) or 'none'}); "
        "send a plain prompt, or put a chat_template.jinja into the engine directory",
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
    # Templates test for a key, not for null, which clients send for what is absent.
    checked: list[dict[str, Any]] = _plain("messages", list(messages))
    return [{k: v for k, v in message.items() if v is not None} for message in checked]


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


class _GenerationBlocks(Extension):
    """``{% generation %}`` blocks mark assistant text for training; here they are just text."""

    tags = {"generation"}  # noqa: RUF012 - as declared by Extension

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    # Jinja's own tojson escapes HTML characters and sorts keys.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
