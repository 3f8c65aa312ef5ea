"""What an answer must look like, in OpenAI's field and in vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import StructTag

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.grammar import bounded
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import MAX_TOOLS
from slipstream.server.core.refusal import naming
from slipstream.server.openai.protocol import (
    GenerationRequest,
    ResponseFormat,
    StructuredOutputs,
)

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


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
    field = form_field(request)
    if field is None:
        return None
    with naming({"structured": field}):
        if request.response_format is not None and field == "response_format":
            return _of_format(request.response_format, tokenizer)
        if request.structured_outputs is not None:
            return _of_outputs(request.structured_outputs, tokenizer)
        return StructuredOutput.from_dict({_GUIDED[field]: getattr(request, field)})


def _of_format(form: ResponseFormat, tokenizer: Tokenizer) -> StructuredOutput:
    if form.type == "json_object":
        return StructuredOutput(json_object=True)
    if form.type == "structural_tag":
        return _of_tag(form.model_dump(exclude_none=True), tokenizer)
    if form.json_schema is None:
        raise InvalidRequestError(
            "response_format is of type json_schema without one; give 'json_schema': {'name': "
            "'answer', 'schema': {...}}",
            param="structured",
        )
    schema = form.json_schema.schema_
    return StructuredOutput(json={"type": "object"} if schema is None else schema)


def _of_outputs(form: StructuredOutputs, tokenizer: Tokenizer) -> StructuredOutput:
    values = form.model_dump(by_alias=True, exclude_none=True)
    tag = values.pop("structural_tag", None)
    if tag is None:
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
    return _of_tag(given, tokenizer)


def _of_tag(tag: Any, tokenizer: Tokenizer) -> StructuredOutput:  # noqa: ANN401 - JSON
    """Free text in which tags stand, each from its trigger on held to a schema."""
    if not isinstance(tag, Mapping):
        raise _malformed()
    form = tag.get("format", tag)
    try:
        triggers = [str(trigger) for trigger in form["triggers"]]
        structures = list(_structures(form))
        tags = [_struct_tag(structure, triggers, tokenizer) for structure in structures]
        special = any(t.trigger.startswith("<[") for t in tags)
        grammar = StructTag.to_grammar(tags, assume_special=special)
    except (KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise _malformed() from error
    return StructuredOutput(grammar=grammar)


def _structures(form: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Beginning, schema and end of every tag, in vLLM's older form or xgrammar's newer one."""
    if form.get("at_least_one") or form.get("stop_after_first"):
        raise InvalidRequestError(
            "a structural tag with at_least_one or stop_after_first is not supported by this "
            "server; leave them out, or give a grammar",
            param="structured",
        )
    listed: Sequence[Any] = form["structures"] if "structures" in form else form["tags"]
    if len(listed) > MAX_TOOLS:
        raise InvalidRequestError(
            f"a structural tag has {len(listed)} tags; this server takes {MAX_TOOLS}",
            param="structured",
        )
    for structure in listed:
        content = structure.get("content", {"json_schema": structure.get("schema")})
        yield structure["begin"], content["json_schema"], structure["end"]


def _struct_tag(
    structure: tuple[str, Any, str], triggers: Sequence[str], tokenizer: Tokenizer
) -> StructTag:
    begin, schema, end = structure
    trigger = next((t for t in triggers if t and begin.startswith(t)), None)
    if trigger is None:
        raise _malformed()
    token, rest = tokenizer.token_to_id(trigger), begin[len(trigger) :]
    if token is not None and trigger.startswith("<"):  # one token, which no text is
        trigger = f"<[{token}]>"
    return StructTag(
        trigger=trigger, begin=trigger + rest, grammar=json.dumps(bounded(schema or {})), end=end
    )


def _malformed() -> InvalidRequestError:
    return InvalidRequestError(
        "a structural tag is {'type': 'structural_tag', 'triggers': ['<f'], 'structures': "
        "[{'begin': '<f=name>', 'schema': {...}, 'end': '</f>'}]}, or with 'format' of type "
        "triggered_tags; every begin starts with a trigger",
        param="structured",
    )
