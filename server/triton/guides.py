"""What an answer must look like, as TensorRT-LLM's clients say it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from slipstream.errors import InvalidRequestError
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import MAX_FORM_LENGTH
from slipstream.server.core.structural_tag import structural_tag
from slipstream.server.triton.interface import GUIDE, GUIDE_TYPE

_JSON = "json"


def guided(given: Mapping[str, object], tokenizer: Tokenizer) -> StructuredOutput | None:
    """The form that the inputs of ``given`` say; None if they do not.

    Raises ``InvalidRequestError`` naming the input.
    """
    kind, guide = given.get(GUIDE_TYPE), given.get(GUIDE)
    if kind is None and guide is None:
        return None
    if kind == _JSON and guide is None:
        return StructuredOutput(json=True)  # any value
    if kind == _JSON:
        raise InvalidRequestError(
            f"{GUIDE} says nothing where {GUIDE_TYPE} is json; leave it out, or send json_schema"
        )
    if not isinstance(kind, str) or kind not in _FORMS:
        raise InvalidRequestError(
            f"{GUIDE_TYPE}={kind!r:.80} is not known; send one of {', '.join([_JSON, *_FORMS])}"
        )
    if guide is None:
        raise InvalidRequestError(f"{GUIDE_TYPE} is {kind}, but {GUIDE} is missing; send it")
    text = guide if isinstance(guide, str) else json.dumps(guide)
    if len(text) > MAX_FORM_LENGTH:
        raise InvalidRequestError(
            f"{GUIDE} has {len(text)} characters; this server takes {MAX_FORM_LENGTH}"
        )
    try:
        return _FORMS[kind](text, tokenizer)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{GUIDE}: {error}") from error


def _schema(text: str, _: Tokenizer) -> StructuredOutput:
    schema = _decoded(text)
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"{text!r:.80} is no JSON schema; send an object")
    return StructuredOutput(json=schema)


def _regex(text: str, _: Tokenizer) -> StructuredOutput:
    return StructuredOutput(regex=text)


def _grammar(text: str, _: Tokenizer) -> StructuredOutput:
    """GBNF, which is what xgrammar takes, or Lark."""
    try:
        return StructuredOutput(grammar=any_to_lark(text))
    except (GbnfToLarkError, RecursionError) as error:
        raise InvalidRequestError(
            f"the grammar cannot be read ({error}); send GBNF, e.g. root ::= [0-9]+"
        ) from error


def _tag(text: str, tokenizer: Tokenizer) -> StructuredOutput:
    return structural_tag(_decoded(text), tokenizer)


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"this is no JSON ({error}); send an object") from error


_FORMS: Mapping[str, Callable[[str, Tokenizer], StructuredOutput]] = {
    "json_schema": _schema,
    "regex": _regex,
    "ebnf_grammar": _grammar,
    "structural_tag": _tag,
}
