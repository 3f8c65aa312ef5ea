"""The fields that say what an answer must look like: OpenAI's, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slipstream.server.core.fields import Flag, Ignored, Several, Strict
from slipstream.server.core.limits import MAX_NAME


class JsonSchema(Strict):
    """A schema with a name; without the schema any object will do."""

    name: Annotated[str, Field(max_length=MAX_NAME)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag = Field(None, description="The schema is always held.")


class ResponseFormat(Strict):
    """OpenAI's way to say what an answer must look like."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(Strict):
    """vLLM's way: exactly one of them."""

    json_: str | dict[str, Any] | bool | None = Field(None, alias="json")
    json_object: Flag = None
    regex: str | None = None
    choice: Several[str] | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = Field(
        None, description="What may stand between the parts of JSON, beside nothing."
    )
    disable_any_whitespace: Flag = Field(
        None, description="JSON is spaced in one way, which is written in fewer steps."
    )
    disable_additional_properties: Flag = Field(
        None, description="Objects of a schema have the properties that it names, and no others."
    )
    disable_fallback: Ignored = None
