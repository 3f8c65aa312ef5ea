"""Requests as they come in JSON: OpenAI's fields and vLLM's extra ones; others are refused.

Only shapes and sizes are checked here. What a value may be is ``SamplingParams``' to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import PydanticCustomError

from slipstream.runtime.sampling.params import NUMBERS
from slipstream.server.core.fields import Flag, Float, Ignored, Int, Several, Strict, only
from slipstream.server.core.limits import (
    MAX_ALLOWED,
    MAX_LISTED,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NAME,
    MAX_TEXT_LENGTH,
    MAX_TEXTS,
    MAX_TOKEN_IDS,
    MAX_TOOLS,
)
from slipstream.server.openai.form_fields import ResponseFormat, StructuredOutputs

OptionalInt = Int | None
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None
CountOrAll = Annotated[int, Field(strict=True, ge=-1, le=MAX_LOGPROBS)] | None
_Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
Texts = _Text | Annotated[list[_Text], Field(max_length=MAX_TEXTS, fail_fast=True)] | None
Tokens = Annotated[list[Int], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] | None
_Ids = Several[Int]

# What pydantic itself calls deprecated warns whoever looks whether it was sent.
_OLDER = Field(None, json_schema_extra={"deprecated": True})


_NO_SUFFIX = (
    "leave it out, or write the model's own marks of a gap into the prompt, such as "
    "<|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>"
)


def _describe(schema: dict[str, Any]) -> None:
    """Add to the JSON Schema of a request what is checked elsewhere: ranges, and what may not be
    empty."""
    for name, described in schema["properties"].items():
        for branch in described.get("anyOf", [described]):
            if name in NUMBERS and branch.get("type") in ("integer", "number"):
                branch.update({**NUMBERS[name].json_schema(), **branch})
            if name in _FILLED:
                _fill(branch)
            if name == "logit_bias" and branch.get("type") == "object":
                branch["additionalProperties"] = {"type": "number", "minimum": -100, "maximum": 100}


_FILLED = frozenset({"prompt", "messages", "allowed_token_ids"})


def _fill(branch: dict[str, Any]) -> None:
    """Say that a list holds something, and so do the lists in it; numbers are token ids."""
    if branch.get("type") == "integer":
        branch["minimum"] = 0
    if branch.get("type") == "array":
        branch["minItems"] = 1
        _fill(branch["items"])


def _few(most: int) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_many", f"has {len(value)} entries, at most {most}")
        return value

    return BeforeValidator(check)


class ModelRequest(Strict):
    """What all requests have in common."""

    model: str | None = Field(None, description="One of /v1/models; None is the first of them.")


class StreamOptions(Strict):
    """What a stream tells beside text."""

    include_usage: Flag = None
    continuous_usage_stats: Flag = None
    include_obfuscation: Ignored = None


class GenerationRequest(ModelRequest):
    """What completions and chats have in common."""

    model_config = ConfigDict(json_schema_extra=_describe)

    max_tokens: OptionalInt = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_N)] | None = None
    temperature: Float = None
    top_p: Float = None
    presence_penalty: Float = None
    frequency_penalty: Float = None
    seed: OptionalInt = None
    stop: Texts = None
    logit_bias: (
        Annotated[dict[str, Float], Field(max_length=MAX_TOKEN_IDS), _few(MAX_TOKEN_IDS)] | None
    ) = None
    stream: Flag = None
    stream_options: StreamOptions | None = None

    top_k: OptionalInt = None
    min_p: Float = None
    repetition_penalty: Float = None
    min_tokens: OptionalInt = None
    stop_token_ids: Tokens = None
    ignore_eos: Flag = None
    speculative: Flag = Field(
        None, description="False: guess no tokens. Answers are the same, and may come slower."
    )
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    allowed_token_ids: (
        Annotated[list[Int], Field(max_length=MAX_ALLOWED, fail_fast=True)] | None
    ) = None
    bad_words: Texts = None
    prompt_logprobs: CountOrAll = Field(None, description="-1: of all tokens.")
    logprob_token_ids: Annotated[_Ids, Field(min_length=1, max_length=MAX_LISTED)] | None = Field(
        None, description="Tokens to score in place of the likeliest; needs logprobs."
    )
    return_token_ids: Flag = None
    return_tokens_as_token_ids: Flag = Field(
        None, description="Tokens with log probabilities are called token_id:5."
    )
    priority: OptionalInt = None
    add_special_tokens: Flag = None
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1)] | None = Field(
        None, description="Only so many of a prompt's last tokens are read; -1: as many as fit."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)] | None = Field(
        None, description="Prompts are remembered among requests with the same one only."
    )
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = Field(
        None, description="The end of the answer's id."
    )
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None
    prompt_embeds: Annotated[Any, only(remedy="send a text or token ids")] = None
    logits_processors: Annotated[Any, only([])] = None
    kv_transfer_params: Annotated[Any, only({})] = None
    vllm_xargs: Annotated[Any, only({})] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    spaces_between_special_tokens: Ignored = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = _OLDER
    guided_regex: str | None = _OLDER
    guided_choice: Several[str] | None = _OLDER
    guided_grammar: str | None = _OLDER
    guided_whitespace_pattern: str | None = _OLDER
    guided_decoding_backend: Ignored = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: str | Several[str] | _Ids | Several[_Ids] | None = Field(
        description="A text or token ids, or a list of either; null begins a new document.",
        examples=["Once upon a time"],
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    echo: Flag = None
    logprobs: Count = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_N)] | None = Field(
        None, description="Completions to make, of which the n likeliest are told."
    )
    suffix: Annotated[Any, only("", remedy=_NO_SUFFIX)] = None


class ContentPart(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class Prediction(Strict):
    """A text that the answer is expected to resemble, such as a file that is to be edited."""

    type: Literal["content"]
    content: str | Several[ContentPart]

    @property
    def text(self) -> str:
        """The text, without parts of other kinds."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class CalledFunction(BaseModel):
    """Whom a past call called; most clients send the arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageCall(BaseModel):
    """A call of a tool in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    """A turn of a conversation; the model's chat template sees fields not named here too."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(examples=["user"])
    content: str | Several[ContentPart] | None = Field(None, examples=["Why is the sky blue?"])
    refusal: str | None = None
    tool_calls: Several[MessageCall] | None = None


class Function(BaseModel):
    """A function that the model may call; fields not named here have no effect."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: Flag = None


class ChatTool(BaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """One of the tools."""

    name: str


class NamedChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedFunction(BaseModel):
    """One of the tools, by its name; what else is told of it is not looked at."""

    type: Literal["function"] = "function"
    function: Function


class AllowedFunctions(Strict):
    """The tools that may be called, or of which one must be."""

    mode: Literal["auto", "required"]
    tools: Several[AllowedFunction]


class AllowedChoice(Strict):
    """The model is shown all tools, and calls none but these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


class Templated(ModelRequest):
    """Messages and how a chat template turns them into a prompt."""

    model_config = ConfigDict(json_schema_extra=_describe)

    messages: Several[ChatMessage] | None = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Several[dict[str, Any]] | None = Field(
        None, description="Given to templates that write documents into the prompt."
    )
    chat_template: Annotated[
        Any, only(remedy="leave it out, or start the server with --chat-template FILE")
    ] = None
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedChoice | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class ChatRequest(Templated, GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    messages: Several[ChatMessage]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: Flag = None
    top_logprobs: Count = None

    parallel_tool_calls: Flag = None
    thinking_token_budget: Annotated[int, Field(strict=True, ge=-1)] | None = Field(
        None, description="Most tokens of thoughts; -1 is no bound."
    )
    include_reasoning: Flag = Field(None, description="False leaves thoughts out of the answer.")
    echo: Flag = Field(
        None, description="The answer begins with the last message, if that is the assistant's."
    )
    functions: Annotated[Any, only([], remedy="send tools")] = None
    function_call: Annotated[Any, only("none", remedy="send tool_choice")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    best_of: Annotated[Any, only(1, remedy="send n")] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    prediction: Prediction | None = None
    prompt_cache_options: Ignored = None


class BatchChatRequest(ChatRequest):
    """The body of ``/v1/chat/completions/batch``: several conversations."""

    messages: Annotated[Several[Several[ChatMessage]], Field(min_length=1)]  # type: ignore[assignment]
    stream: Annotated[Any, only(False)] = None
    n: Annotated[Any, only(1, remedy="repeat a conversation")] = None
    prompt_logprobs: Annotated[Any, only(remedy="send one conversation at a time")] = None

    def each(self) -> list[ChatRequest]:
        """A request for every conversation."""
        return [self.model_copy(update={"messages": messages}) for messages in self.messages]


class TokenizeRequest(Templated):
    """The body of ``/tokenize``: a ``prompt``, or ``messages``."""

    prompt: str | None = None
    add_special_tokens: Flag = None
    return_token_strs: Flag = None


class DetokenizeRequest(ModelRequest):
    """The body of ``/detokenize``."""

    tokens: Several[Annotated[int, Field(strict=True, ge=0)]]
