"""Items of the Responses API as a conversation, and what is asked of the model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.options import AllowedTools, ChatOptions, NamedTool, Tool, ToolChoice
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.server.core.refusal import naming
from slipstream.server.core.sampling import FIELDS, sampling_params
from slipstream.server.responses.protocol import (
    AllowedTool,
    FunctionTool,
    Item,
    Part,
    ResponseRequest,
    TextFormat,
)

# What is told of parameters, which the API calls otherwise.
NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
_ROLES = {"user": "user", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def conversation_of(request: ResponseRequest, messages: Sequence[dict[str, Any]]) -> Conversation:
    """The conversation of ``messages`` after a request's instructions; raises
    ``InvalidRequestError``."""
    return Conversation(
        _instructed(request.instructions, messages),
        variables=request.chat_template_kwargs or {},
        options=_options(request),
    )


def params_of(request: ResponseRequest, defaults: SamplingParams) -> SamplingParams:
    """How tokens are chosen; raises ``InvalidRequestError``."""
    given = {name: getattr(request, name, None) for name in FIELDS}
    given["max_tokens"] = request.max_output_tokens
    given["logprobs"] = _logprobs(request)
    with naming({**NAMES, "structured": "text"}):
        given["structured"] = _form(request.text.format if request.text else None)
        return sampling_params(defaults, {k: v for k, v in given.items() if v is not None})


def _logprobs(request: ResponseRequest) -> int | None:
    if request.top_logprobs and not request.scored:
        raise _refused(
            "top_logprobs needs 'message.output_text.logprobs' among include", "top_logprobs"
        )
    return (request.top_logprobs or 0) if request.scored else None


def messages_of(given: str | Sequence[Item] | None) -> list[dict[str, Any]]:
    """An input as messages in the shape of chats; what the assistant thought, said and called in a
    row is one of them. Raises ``InvalidRequestError``."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    turn: AssistantTurn | None = None
    for index, item in enumerate(given or ()):
        said = _said(item, index)
        if said is not None:
            turn = said if turn is None else _joined(turn, said)
            continue
        if turn is not None:
            messages.append(_message_of(turn))
            turn = None
        messages.append(_told(item, index))
    if turn is not None:
        messages.append(_message_of(turn))
    return messages


def _message_of(turn: AssistantTurn) -> dict[str, Any]:
    """A turn of the assistant in the shape of chats."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [call.in_message() for call in turn.calls]
    return message


def _instructed(
    instructions: str | None, messages: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Instructions and the system's messages after them as one: many templates take no more."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    texts = [instructions or "", *(message["content"] for message in messages[:first])]
    system = "\n\n".join(filter(None, texts))
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *messages[first:]]


def _joined(turn: AssistantTurn, more: AssistantTurn) -> AssistantTurn:
    return AssistantTurn(
        turn.reasoning + more.reasoning, turn.content + more.content, [*turn.calls, *more.calls]
    )


def _said(item: Item, index: int) -> AssistantTurn | None:
    """What an item is of an assistant's turn; None: it is of somebody else."""
    match item.type or "message":
        case "message" if item.role == "assistant":
            return AssistantTurn(content=_text(item.content, index, "content"))
        case "reasoning":
            return AssistantTurn(reasoning=_text(item.content or [], index, "content"))
        case "function_call":
            name = _given(item.name, index, "name")
            call_id = _given(item.call_id, index, "call_id")
            return AssistantTurn(calls=[ToolCall(call_id, name, item.arguments or "{}")])
    return None


def _told(item: Item, index: int) -> dict[str, Any]:
    """The message of somebody else."""
    match item.type or "message":
        case "message":
            role = _ROLES.get(_given(item.role, index, "role"))
            if role is None:
                raise _refused(f"input[{index}].role is {item.role!r:.40}; use user, assistant, "
                               "system or developer")  # fmt: skip
            return {"role": role, "content": _text(item.content, index, "content")}
        case "function_call_output":
            call_id = _given(item.call_id, index, "call_id")
            text = _text(item.output, index, "output")
            return {"role": "tool", "tool_call_id": call_id, "content": text}
    raise _refused(
        f"input[{index}] is of type {item.type!r:.40}, which is not supported by this server; it "
        "takes message, reasoning, function_call and function_call_output"
    )


def _text(content: str | Sequence[Part] | None, index: int, field: str) -> str:
    if content is None:
        raise _refused(f"input[{index}].{field} is missing; give a text")
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"input[{index}].{field}") for part in content)


def _part_text(part: Part, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in (*_TEXTS, "refusal"):
        raise _refused(
            f"{where} has a part of type {part.type!r:.40}, which is not supported by this server; "
            "it takes texts only"
        )
    if text is None:
        raise _refused(f"{where} has a part of type {part.type!r} without its text; give it")
    return text


def _given(value: str | None, index: int, field: str) -> str:
    if not value:
        raise _refused(f"input[{index}].{field} is missing")
    return value


def _refused(message: str, param: str = "input") -> InvalidRequestError:
    return InvalidRequestError(message, param=param)


def _options(request: ResponseRequest) -> ChatOptions:
    effort = request.reasoning.effort if request.reasoning else None
    budget = request.thinking_token_budget
    return ChatOptions(
        tools=[_tool(tool, index) for index, tool in enumerate(request.tools or ())],
        tool_choice=_choice(request),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        thinking=None if effort is None else effort != "none",
        reasoning_effort=effort,
        thinking_budget=None if budget == -1 else budget,
    )


def _tool(tool: FunctionTool, index: int) -> Tool:
    if tool.type != "function":
        raise _refused(
            f"tools[{index}] is of type {tool.type!r:.40}, which is not supported by this server; "
            "it takes functions only",
            "tools",
        )
    if tool.name is None:
        raise _refused(f"tools[{index}].name is missing", "tools")
    return Tool(tool.name, tool.description, tool.parameters, strict=bool(tool.strict))


def _choice(request: ResponseRequest) -> ToolChoice:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.type == "function" and choice.name is not None:
        return NamedTool(choice.name)
    if choice.type == "allowed_tools" and choice.mode and choice.tools is not None:
        names = [_allowed(tool, index) for index, tool in enumerate(choice.tools)]
        return AllowedTools(names, required=choice.mode == "required")
    raise _refused(
        f"tool_choice is of type {choice.type!r:.40}; use auto, none, required, "
        "{'type': 'function', 'name': '...'}, or {'type': 'allowed_tools', 'mode': 'auto', "
        "'tools': [{'type': 'function', 'name': '...'}]}",
        "tool_choice",
    )


def _allowed(tool: AllowedTool, index: int) -> str:
    if tool.type != "function" or tool.name is None:
        raise _refused(
            f"tool_choice.tools[{index}] is of type {tool.type!r:.40}; give functions by name, "
            "like {'type': 'function', 'name': '...'}",
            "tool_choice",
        )
    return tool.name


def _form(form: TextFormat | None) -> StructuredOutput | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutput(json_object=True)
    if form.schema_ is None:
        raise _refused(
            "text.format is of type json_schema without its schema; give 'schema': {...}",
            "structured",
        )
    return StructuredOutput(json=form.schema_)
