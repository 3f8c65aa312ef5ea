"""What requests say of the form of answers, in every field that clients know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.structured.output import WHITESPACE, StructuredOutput
from slipstream.runtime.testing import counting_tokenizer
from slipstream.server.openai.forms import form_field, form_of
from slipstream.server.openai.protocol import ChatRequest, CompletionRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"type": "structural_tag", "triggers": ["<f"],
       "structures": [{"begin": "<f=get>", "schema": SCHEMA, "end": "</f>"}]}  # fmt: skip
NEWER = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f"],
         "tags": [{"type": "tag", "begin": "<f=get>", "end": "</f>",
                   "content": {"type": "json_schema", "json_schema": SCHEMA}}]}}  # fmt: skip


def form(**fields: Any) -> StructuredOutput | None:  # noqa: ANN401 - JSON
    """The form that a completion and a chat with these fields have."""
    completion = CompletionRequest.model_validate({"prompt": "a", **fields})
    chat = ChatRequest.model_validate({"messages": [], **fields})
    made = form_of(completion, counting_tokenizer())
    assert form_of(chat, counting_tokenizer()) == made
    return made


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "description": "d", "strict": True, "schema": SCHEMA}}},
            StructuredOutput(json=SCHEMA),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            StructuredOutput(json={"type": "object"}),
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, StructuredOutput(json=SCHEMA)),
        ({"structured_outputs": {"json": "true"}}, StructuredOutput(json="true")),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=["a", "b"])),
        ({"structured_outputs": {"grammar": "start: /a/"}}, StructuredOutput(grammar="start: /a/")),
        ({"guided_json": SCHEMA}, StructuredOutput(json=SCHEMA)),
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"guided_choice": ["a"]}, StructuredOutput(choice=["a"])),
        ({"guided_grammar": "start: /a/"}, StructuredOutput(grammar="start: /a/")),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutput(regex="a")),
    ],
)  # fmt: skip
def test_every_field(fields: dict[str, Any], expected: StructuredOutput | None) -> None:
    assert form(**fields) == expected


def test_the_field_is_named() -> None:
    request = CompletionRequest.model_validate({"prompt": "a", "guided_regex": "a"})
    assert form_field(request) == "guided_regex"
    with pytest.raises(InvalidRequestError, match="give one of them"):
        form(guided_regex="a", response_format={"type": "json_object"})


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": TAG},
        {"response_format": NEWER},
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        {"structured_outputs": {"structural_tag": NEWER}},
    ],
    ids=["format", "newer", "text", "object"],
)
def test_a_structural_tag_is_a_grammar_of_free_text_with_tags(fields: dict[str, Any]) -> None:
    import llguidance

    made = form(**fields)
    assert made is not None and made.grammar is not None
    assert not llguidance.LLMatcher.validate_grammar(
        llguidance.grammar_from("lark", made.grammar), None
    )
    assert '"<f"' in made.grammar and '"=get>"' in made.grammar and '"</f>"' in made.grammar


def test_space_in_a_structural_tag_is_bounded_whatever_its_schema_says() -> None:
    for extra in ({}, {"x-guidance": {"whitespace_pattern": " *"}}, {"x-guidance": 5}):
        tag = {**TAG, "structures": [{"begin": "<f", "schema": {**SCHEMA, **extra}, "end": ""}]}
        made = form(response_format=tag)
        assert made is not None and json.dumps(WHITESPACE) in (made.grammar or "")


def test_a_trigger_that_is_one_token_is_that_token() -> None:
    tag = {**TAG, "triggers": ["<eos>"]}
    tag["structures"] = [{"begin": "<eos>get", "schema": SCHEMA, "end": ""}]
    made = form(response_format=tag)
    eos = counting_tokenizer().eos_token_id
    assert made is not None and f'TAG_TEXT <[{eos}]> "get"' in (made.grammar or "")


@pytest.mark.parametrize(
    "tag",
    [
        [],
        {},
        {"triggers": ["<f"], "structures": []},
        {"triggers": [""], "structures": TAG["structures"]},
        {"triggers": ["<g"], "structures": TAG["structures"]},
        {"triggers": ["<f"], "structures": ["x"]},
        {"format": {**NEWER["format"], "at_least_one": True}},  # type: ignore[dict-item]
        {"format": {"type": "any_text"}},
        {"triggers": ["<f"], "structures": [*TAG["structures"]] * 600},
    ],
    ids=lambda tag: str(tag)[:40],
)
def test_a_malformed_structural_tag_is_refused(tag: Any) -> None:  # noqa: ANN401 - JSON
    with pytest.raises(InvalidRequestError, match="structural tag") as caught:
        form(structured_outputs={"structural_tag": json.dumps(tag)})
    assert caught.value.param == "structured_outputs"
