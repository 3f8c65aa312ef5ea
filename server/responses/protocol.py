"""Requests of the Responses API as they come in JSON; unknown fields are refused.

Only shapes and sizes are checked here. What kinds of items, tools and choices there are is told
where they are read, by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slipstream.server.core.fields import Flag, Float, Ignored, Int, Several, Strict, only
from slipstream.server.core.limits import (
    MAX_LOGPROBS,
    MAX_NAME,
    MAX_TEXT_LENGTH,
    MAX_TEXTS,
    MAX_TOOLS,
)

_Stop = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
_Value = Annotated[str, Field(max_length=512)]
_Included = Literal["reasoning.encrypted_content", "message.output_text.logprobs"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Part(BaseModel):
    """A part of a message, of thoughts or of what a tool returned; only text is understood."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(BaseModel):
    """An item of the input: a message, thoughts, a call of a function or what that returned.

    Those of an answer can be sent back as they are.
    """

    model_config = ConfigDict(extra="allow")

    type: str | None = Field(None, examples=["message"])
    role: str | None = Field(None, examples=["user"])
    content: str | Several[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Several[Part] | None = None


class FunctionTool(BaseModel):
    """A tool; functions are the only kind. Fields not named here have no effect."""

    type: str = Field(examples=["function"])
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: Flag = None


class AllowedTool(BaseModel):
    """One of the tools; what else is told of it is not looked at."""

    type: str = Field(examples=["function"])
    name: str | None = None


class ToolChoice(AllowedTool):
    """The tool that must be called, or the ``tools`` that may be; functions are the only kind."""

    mode: Literal["auto", "required"] | None = None
    tools: Several[AllowedTool] | None = None


class TextFormat(Strict):
    """What the text of an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag = Field(None, description="The schema is always held.")


class TextConfig(Strict):
    """How an answer is written."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium")] = None


class Reasoning(Strict):
    """How the model thinks."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None


class StreamOptions(Strict):
    """What a stream tells; nothing can be chosen."""

    include_obfuscation: Ignored = None


class ResponseRequest(Strict):
    """The body of ``/v1/responses``."""

    model: str | None = Field(None, description="One of /v1/models; None is the first of them.")
    input: str | Several[Item] | None = Field(None, examples=["Why is the sky blue?"])
    instructions: str | None = None
    previous_response_id: str | None = None
    store: Flag = Field(None, description="Keep the answer for later requests, unless false.")
    stream: Flag = None
    stream_options: StreamOptions | None = None
    include: Several[_Included] | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], _Value] | None = Field(None, max_length=16)

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: Flag = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None

    max_output_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    temperature: Float = None
    top_p: Float = None
    truncation: Annotated[Any, only("disabled", remedy="send a shorter input")] = None
    background: Annotated[Any, only(False, remedy="stream the answer")] = None
    conversation: Annotated[Any, only(remedy="send previous_response_id")] = None
    prompt: Annotated[Any, only(remedy="send input")] = None
    context_management: Annotated[Any, only([])] = None
    moderation: Annotated[Any, only()] = None

    # Beside OpenAI's, with the names that they have in chats.
    seed: Int | None = None
    top_k: Int | None = None
    min_p: Float = None
    presence_penalty: Float = None
    frequency_penalty: Float = None
    repetition_penalty: Float = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_TEXTS, fail_fast=True)] | None = None
    ignore_eos: Flag = None
    priority: Int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Annotated[int, Field(strict=True, ge=-1)] | None = Field(
        None, description="Most tokens of thoughts; -1 is no bound."
    )

    max_tool_calls: Ignored = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    client_metadata: Ignored = None

    @property
    def scored(self) -> bool:
        """Whether log probabilities of texts are told."""
        return "message.output_text.logprobs" in (self.include or ())
