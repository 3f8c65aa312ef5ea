"""What an answer must look like, in OpenAI's field and in vLLM's."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import check_form
from slipstream.server.core.refusal import naming
from slipstream.server.core.structural_tag import structural_tag
from slipstream.server.openai.closed_schema import without_others
from slipstream.server.openai.form_fields import ResponseFormat, StructuredOutputs
from slipstream.server.openai.protocol import GenerationRequest

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}

_NOT_OF_FORMS = {"disable_fallback", "disable_additional_properties"}


def form_field(request: GenerationRequest) -> str | None:
    """The field that says what the answer must look like; raises ``InvalidRequestError`` if several
    do."""
    names = ("response_format", "structured_outputs", *_GUIDED)
    given = [name for name in names if getattr(request, name) is not None]
    if request.response_format is not None and request.response_format.type == "text":
        given.remove("response_format")
    if len(given) > 1:
        raise InvalidRequestError(
            f"{' and '.join(given)} all say what the answer must look like; give one of them",
            param=given[1],
        )
    return given[0] if given else None


def form_of(request: GenerationRequest, tokenizer: Tokenizer) -> StructuredOutput | None:
    """What the answer must look like; raises ``InvalidRequestError``."""
    field, pattern = form_field(request), request.guided_whitespace_pattern
    if pattern is not None and field != "guided_json":
        raise InvalidRequestError(
            "guided_whitespace_pattern goes with guided_json; give both, or leave it out",
            param="guided_whitespace_pattern",
        )
    if field is None:
        return None
    with naming({"structured": field}):
        if request.response_format is not None and field == "response_format":
            return _of_format(request.response_format, tokenizer)
        if request.structured_outputs is not None:
            return _of_outputs(request.structured_outputs, tokenizer)
        return StructuredOutput.from_dict(
            {_GUIDED[field]: getattr(request, field), "whitespace_pattern": pattern}
        )


def _of_format(form: ResponseFormat, tokenizer: Tokenizer) -> StructuredOutput:
    if form.type == "json_object":
        return StructuredOutput(json_object=True)
    if form.type == "structural_tag":
        return structural_tag(form.model_dump(exclude_none=True), tokenizer)
    if form.json_schema is None:
        raise InvalidRequestError(
            "response_format is of type json_schema without one; give 'json_schema': {'name': "
            "'answer', 'schema': {...}}",
            param="structured",
        )
    schema = form.json_schema.schema_
    return StructuredOutput(json={"type": "object"} if schema is None else schema)


def _of_outputs(form: StructuredOutputs, tokenizer: Tokenizer) -> StructuredOutput:
    values = form.model_dump(by_alias=True, exclude_none=True, exclude=_NOT_OF_FORMS)
    tag = values.pop("structural_tag", None)
    if tag is None:
        if form.disable_additional_properties:
            values["json"] = _closed(values.get("json"))
        return StructuredOutput.from_dict(values)
    if values:
        raise InvalidRequestError(
            f"a structured output is one of its fields; structural_tag and {next(iter(values))} "
            "were given",
            param="structured",
        )
    try:
        given = json.loads(tag) if isinstance(tag, str) else tag
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"structural_tag is no JSON ({error}); give an object", param="structured"
        ) from error
    return structural_tag(given, tokenizer)


def _closed(schema: object) -> dict[str, Any]:
    """A schema whose objects have the properties that it names, and no others."""
    if isinstance(schema, str):
        with suppress(ValueError, RecursionError):
            schema = json.loads(schema)
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            "disable_additional_properties is of a JSON schema that is an object; give one as json",
            param="structured",
        )
    check_form(schema, "structured_outputs.json", param="structured")
    return without_others(schema)
