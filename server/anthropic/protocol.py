"""Requests as Anthropic's clients send them; fields that are not named here are refused.

Only shapes and sizes are checked here. What a value may be is ``SamplingParams``' to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from slipstream.server.core.fields import Flag, Float, Several, Strict
from slipstream.server.core.limits import MAX_TEXT_LENGTH, MAX_TEXTS, MAX_TOOLS

_Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
Ignored = Annotated[Any, Field(description="Accepted for Anthropic's clients; has no effect.")]


class TextBlock(BaseModel):
    """Text; what else it has, such as ``cache_control``, has no effect."""

    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(BaseModel):
    """Thoughts of a past turn; the signature is not looked at."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(BaseModel):
    """Thoughts of a past turn that nobody here can read; they are left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(BaseModel):
    """A call of a tool in a turn of the assistant."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OtherBlock(BaseModel):
    """A block that this server does not understand, such as an image."""

    type: str


def _tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in _KNOWN else "other"


_KNOWN = frozenset({"text", "thinking", "redacted_thinking", "tool_use", "tool_result"})


def _as_blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _only_text(value: object) -> str:
    return "text" if _tag(value) == "text" else "other"


TextOrOther = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")],
    Discriminator(_only_text),
]
# A text stands for one block of it.
Texts = Annotated[
    Several[TextOrOther],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextOrOther]),
]


class ToolResultBlock(BaseModel):
    """What a call came to."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: Flag = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_tag),
]


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Several[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])
    ]


class ClientTool(BaseModel):
    """A tool that the client runs; those with a type of their own would be the server's to know."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(None, description="JSON schema of its input.")
    strict: Flag = None


class Choice(BaseModel):
    """Whether tools are called; ``name`` is that of the tool of type ``tool``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Flag = None

    @model_validator(mode="after")
    def _named(self) -> Choice:
        if self.type == "tool" and self.name is None:
            raise PydanticCustomError("unnamed", "of type tool needs the 'name' of one")
        return self


class Thinking(BaseModel):
    """Whether and how long the model thinks; ``omitted`` thoughts are blocks without text."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    """The schema that an answer is held to."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """What an answer looks like, and how much thought goes into it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


def _nothing(value: object) -> object:
    if value:
        raise PydanticCustomError("unsupported", "not supported by this server; leave it out")
    return value


Unsupported = Annotated[Any, AfterValidator(_nothing)]


class CountRequest(Strict):
    """The body of ``/v1/messages/count_tokens``."""

    model: str | None = Field(None, description="One of /v1/models; None is the first of them.")
    messages: Annotated[Several[Message], Field(min_length=1)]
    system: Texts | None = None
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        None, description="The older place of output_config.format."
    )
    cache_control: Ignored = None
    context_management: Ignored = None
    speed: Ignored = None
    user_profile_id: Ignored = None
    workspace_id: Ignored = None
    mcp_servers: Unsupported = None

    @property
    def form(self) -> OutputFormat | None:
        """The schema that the answer is held to."""
        config = self.output_config
        return (config and config.format) or self.output_format


class MessagesRequest(CountRequest):
    """The body of ``/v1/messages``."""

    max_tokens: Annotated[int, Field(strict=True, ge=1)]
    stream: Flag = None
    stop_sequences: Annotated[list[_Text], Field(max_length=MAX_TEXTS, fail_fast=True)] | None = (
        None
    )
    temperature: Float = None
    top_p: Float = None
    top_k: Annotated[int, Field(strict=True)] | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    inference_geo: Ignored = None
    diagnostics: Ignored = None
    container: Unsupported = None
