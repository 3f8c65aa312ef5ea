"""Requests as they come in JSON: Ollama's fields; others are refused.

Only shapes are checked here. What a value may be is ``SamplingParams``' to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from slipstream.server.core.fields import Flag, Float, Int, Several, Strict, only
from slipstream.server.core.limits import MAX_LOGPROBS, MAX_TEXT_LENGTH, MAX_TEXTS, MAX_VALUES

# What a server of one model, which is loaded with options of its own, has no use for.
Ignored = Annotated[Any, Field(description="Accepted for Ollama's clients; has no effect.")]
_OptionalInt = Int | None
_Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
_Texts = _Text | Annotated[list[_Text], Field(max_length=MAX_TEXTS, fail_fast=True)] | None
Think = Annotated[bool, Field(strict=True)] | Literal["low", "medium", "high", "max"] | None
Form = Literal["", "json"] | dict[str, Any] | None
_NO_IMAGES = only([], remedy="this server reads no images; leave it out")


# They configure Ollama's runner.
_RUNNER = frozenset(
    {"num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram",
     "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only",
     "draft_num_predict", "mirostat_tau", "mirostat_eta"}
)  # fmt: skip


class OllamaOptions(Strict):
    """How an answer is sampled; options of Ollama's runner are taken and not looked at."""

    num_predict: _OptionalInt = Field(default=None, description="Not above 0: what fits.")
    temperature: Float = None
    top_k: _OptionalInt = None
    top_p: Float = None
    min_p: Float = None
    seed: _OptionalInt = None
    stop: _Texts = None
    repeat_penalty: Float = None
    presence_penalty: Float = None
    frequency_penalty: Float = None
    repeat_last_n: _OptionalInt = Field(
        default=None, description="0 switches repeat_penalty off; otherwise it sees all tokens."
    )
    typical_p: Annotated[Float, only(1)] = None
    tfs_z: Annotated[Float, only(1)] = None
    mirostat: Annotated[_OptionalInt, only(0)] = None
    penalize_newline: Annotated[Flag, only(True)] = None

    @model_validator(mode="before")
    @classmethod
    def _without_runner(cls, values: Any) -> Any:  # noqa: ANN401 - JSON
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _RUNNER}


class ModelRequest(Strict):
    """What all requests have in common."""

    model: str | None = Field(None, description="One of /api/tags; null is the first of them.")
    keep_alive: Ignored = None
    options: OllamaOptions | None = None


class AnswerRequest(ModelRequest):
    """What both generating requests have in common."""

    stream: Flag = Field(None, description="Unless false, lines of JSON as they come.")
    format: Form = Field(None, description="`json`, or the JSON schema of the answer.")
    think: Think = None
    logprobs: Flag = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    truncate: Annotated[Flag, only(False, remedy="a prompt is never cut; leave it out")] = None
    shift: Annotated[Flag, only(False, remedy="a context is never shifted; leave it out")] = None


class GenerateRequest(AnswerRequest):
    """The body of ``/api/generate``."""

    prompt: str | None = Field(None, examples=["Why is the sky blue?"])
    system: str | None = None
    raw: Flag = Field(None, description="The prompt is given to the model as it is.")
    suffix: Annotated[str | None, only("", remedy="this server fills no gaps; leave it out")] = None
    template: Annotated[
        str | None, only("", remedy="give a template with --chat-template FILE; leave it out")
    ] = None
    context: Annotated[list[Int], Field(max_length=MAX_VALUES, fail_fast=True)] | None = Field(
        None, description="Of an earlier answer, which this prompt goes on with."
    )
    images: Annotated[list[Any] | None, _NO_IMAGES] = None
    width: Annotated[Any, only(0)] = None
    height: Annotated[Any, only(0)] = None
    steps: Annotated[Any, only(0)] = None


class OllamaCalledFunction(BaseModel):
    """A function with arguments."""

    name: str
    arguments: dict[str, Any] | str | None = None


class OllamaCall(BaseModel):
    """A call of the past."""

    function: OllamaCalledFunction
    id: str | None = None


class OllamaMessage(BaseModel):
    """One message; what else clients keep in it is not looked at."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[Any] | None, _NO_IMAGES] = None
    tool_calls: Several[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaFunction(BaseModel):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(BaseModel):
    """A tool; functions are the only kind."""

    function: OllamaFunction
    type: Literal["function"] | None = None


class OllamaChatRequest(AnswerRequest):
    """The body of ``/api/chat``."""

    messages: Several[OllamaMessage] | None = None
    tools: Several[OllamaTool] | None = None


class EmbedRequest(ModelRequest):
    """The body of ``/api/embed``."""

    input: str | Several[str] = Field(examples=["Why is the sky blue?"])
    truncate: Flag = Field(None, description="Unless false, longer texts are cut.")
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = None


class EmbeddingsRequest(ModelRequest):
    """The body of ``/api/embeddings``."""

    prompt: str | None = Field(None, examples=["Why is the sky blue?"])


class NamedRequest(BaseModel):
    """The body of requests about a model; ``name`` is the older name of ``model``."""

    model: str | None = None
    name: str | None = None
    stream: Flag = None
