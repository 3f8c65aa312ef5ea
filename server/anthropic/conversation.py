"""Anthropic's messages, tools and thinking as a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool, ToolChoice
from slipstream.server.anthropic.protocol import (
    Block,
    ClientTool,
    CountRequest,
    Message,
    OtherBlock,
    RedactedThinkingBlock,
    TextBlock,
    TextOrOther,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

# Claude Code's note to Anthropic's billing, in a block of its own: it changes with every request,
# and the model's prefix with it.
_BILLING = "x-anthropic-billing-header:"


def conversation_of(request: CountRequest) -> Conversation:
    """The conversation of a request; one that ends with the assistant's turn is gone on with.

    Raises ``InvalidRequestError`` for blocks and tools that this server does not know.
    """
    messages = list(_system(request))
    for index, message in enumerate(request.messages):
        messages += _turn(message, f"messages[{index}].content")
    going_on = request.messages[-1].role == "assistant"
    if going_on and messages and messages[-1].get("tool_calls"):
        raise InvalidRequestError(
            "messages ends with a tool_use; give its tool_result in a message of the user"
        )
    return Conversation(messages, going_on=going_on, options=_options(request))


def _options(request: CountRequest) -> ChatOptions:
    choice, thinking, config = request.tool_choice, request.thinking, request.output_config
    return ChatOptions(
        tools=[_tool(tool, index) for index, tool in enumerate(request.tools or ())],
        tool_choice=_choice(request),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        thinking=None if thinking is None else thinking.type != "disabled",
        reasoning_effort=None if config is None else config.effort,
        thinking_budget=None if thinking is None else thinking.budget_tokens,
    )


def _tool(tool: ClientTool, index: int) -> Tool:
    if tool.type not in (None, "custom"):
        called = f", {tool.name!r:.80}," if tool.name else ""
        raise InvalidRequestError(
            f"tools[{index}]{called} is of type {tool.type!r:.80}, which is not supported by this "
            "server; give tools with an input_schema, which the client runs"
        )
    if tool.name is None:
        raise InvalidRequestError(f"tools[{index}].name is missing", param="tools")
    if tool.input_schema is None:
        raise InvalidRequestError(
            f"tools[{index}], {tool.name!r:.80}, has no input_schema; give the JSON schema of its "
            "input"
        )
    return Tool(tool.name, tool.description, tool.input_schema, strict=bool(tool.strict))


def _choice(request: CountRequest) -> ToolChoice:
    choice = request.tool_choice
    if choice is None or choice.type == "auto":
        return "auto"
    if choice.type == "any":
        return "required"
    return "none" if choice.type == "none" else NamedTool(choice.name or "")


def _system(request: CountRequest) -> Iterator[dict[str, Any]]:
    blocks = enumerate(request.system or ())
    texts = [_text(block, f"system[{index}]") for index, block in blocks]
    if told := [text for text in texts if not text.startswith(_BILLING)]:
        yield {"role": "system", "content": "\n".join(told)}


def _turn(message: Message, where: str) -> list[dict[str, Any]]:
    blocks = [
        _known(block, message.role, f"{where}[{i}]") for i, block in enumerate(message.content)
    ]
    if message.role == "assistant":
        return [_said(blocks)]
    return list(_told(message.role, blocks, where))


def _known(block: Block, role: str, where: str) -> Block:
    """A block where it may stand; raises ``InvalidRequestError`` for others."""
    taken: dict[str, tuple[type, ...]] = {
        "user": (TextBlock, ToolResultBlock),
        "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
        "system": (TextBlock,),
    }
    if isinstance(block, OtherBlock):
        raise _unsupported(block, where)
    if not isinstance(block, taken[role]):
        raise InvalidRequestError(
            f"{where} is a block of type {block.type!r}, which a message of the role {role!r} does "
            "not have; move it"
        )
    return block


def _unsupported(block: OtherBlock, where: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where} is a block of type {block.type!r:.80}, which is not supported by this server; "
        "give its text in a block like {'type': 'text', 'text': '...'}"
    )


def _text(block: TextOrOther, where: str) -> str:
    if isinstance(block, OtherBlock):
        raise _unsupported(block, where)
    return block.text


def _said(blocks: Iterable[Block]) -> dict[str, Any]:
    """A turn of the assistant: its blocks of text are one text that was cut by calls."""
    content = thoughts = ""
    calls = []
    for block in blocks:
        match block:
            case TextBlock():
                content += block.text
            case ThinkingBlock():
                thoughts += block.thinking
            case ToolUseBlock():
                calls.append(_call(block))
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _told(role: str, blocks: Sequence[Block], where: str) -> Iterator[dict[str, Any]]:
    """What the assistant is told: a message for every result, and one for texts side by side."""
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": role, "content": "\n".join(texts)}
                texts = []
            yield _result(block, f"{where}[{index}].content")
    if texts:
        yield {"role": role, "content": "\n".join(texts)}


def _result(block: ToolResultBlock, where: str) -> dict[str, Any]:
    """Templates know no failed calls: the text says so."""
    inner = enumerate(block.content or ())
    text = "\n".join(_text(part, f"{where}[{index}]") for index, part in inner)
    content = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
