"""The space in JSON as callers want it, grammars in GBNF, and what errors say of composed forms."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.runtime.structured.forms import TINY_VOCAB, Driver, compiled, tiny_tokenizer

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.grammar import Grammar
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ONE_WAY = '{"a": 1, "b": [2, 3]}'
CLOSE = '{"a":1,"b":[2,3]}'
WIDE = json.dumps(json.loads(CLOSE), indent=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, TINY_VOCAB)


@pytest.fixture(scope="module")
def driver(tokenizer: Tokenizer) -> Driver:
    return Driver(tokenizer, TINY_VOCAB)


def composed(**form: Any) -> StructuredOutput:  # noqa: ANN401 - any form
    """A form within a grammar, as chats have it."""
    grammar = Grammar({})
    return grammar.finish(f'"<" {grammar.wanted(StructuredOutput(**form))}')


@pytest.mark.parametrize("around", [False, True], ids=["alone", "composed"])
@pytest.mark.parametrize(
    ("space", "held", "broken"),
    [
        ({}, [ONE_WAY, CLOSE, WIDE], []),
        ({"disable_any_whitespace": False}, [ONE_WAY, CLOSE, WIDE], []),
        ({"disable_any_whitespace": True}, [ONE_WAY], [CLOSE, WIDE]),
        ({"whitespace_pattern": " ?"}, [ONE_WAY, CLOSE], [WIDE]),
        ({"whitespace_pattern": "[ \n]{1,9}"}, [ONE_WAY, CLOSE, WIDE], ['{\t"a":1,"b":[]}']),
    ],
)
def test_json_is_spaced_as_a_caller_says(
    space: dict[str, Any],
    held: list[str],
    broken: list[str],
    around: bool,
    compiler: GrammarCompiler,
    driver: Driver,
) -> None:
    form = {"json": SCHEMA, **space}
    grammar = compiler.compile(composed(**form) if around else StructuredOutput(**form))
    before = "<" if around else ""
    assert [driver.holds(grammar, before + text) for text in held] == [True] * len(held)
    assert [driver.holds(grammar, before + text) for text in broken] == [False] * len(broken)


def test_one_way_to_space_forces_more_tokens(compiler: GrammarCompiler) -> None:
    """All but the numbers and what may end them is certain."""

    def forced(**space: Any) -> list[int]:  # noqa: ANN401 - that of the form
        return compiled(compiler, json=SCHEMA, **space).start().forced()

    assert len(forced(disable_any_whitespace=True)) > len(forced())


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": 257 * " "}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": "\ud800"}, "surrogates"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_space_that_makes_no_sense_is_refused(form: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidRequestError, match=names):
        StructuredOutput(**form)


GBNF = """# A query.
root ::= "select " column (", " column)* " from t" [0-9]+
column ::= "a" | "b"
"""


@pytest.mark.parametrize("around", [False, True], ids=["alone", "composed"])
def test_grammars_may_be_gbnf(compiler: GrammarCompiler, driver: Driver, around: bool) -> None:
    form = composed(grammar=GBNF) if around else StructuredOutput(grammar=GBNF)
    grammar, before = compiler.compile(form), "<" if around else ""
    assert driver.holds(grammar, f"{before}select a, b from t12")
    assert not driver.holds(grammar, f"{before}select a,b from t1")
    assert not driver.holds(grammar, f"{before}select a from t")


@pytest.mark.parametrize(
    ("grammar", "names"),
    [
        ("root ::= foo", "'foo'"),
        ("root ::= [", "end of input"),
        ("root ::= " + 3000 * "(" + '"a"' + 3000 * ")", "nested too deep"),
        ('root ::= "' + 40_000 * "a" + '"', "at most 32768"),
    ],
    ids=["unknown", "cut", "deep", "long"],
)
def test_gbnf_that_cannot_be_read_says_why(
    grammar: str, names: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(InvalidRequestError, match=names) as caught:
        compiled(compiler, grammar=grammar)
    assert caught.value.param == "structured" and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"not": {}}}, 'the JSON schema cannot be held: Unimplemented keys: ["not"].'),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour."),
        ({"regex": "(a"}, 'the regex cannot be held: invalid regex "(a"'),
    ],
)
def test_within_a_grammar_the_same_is_said_of_a_form_as_alone(
    form: dict[str, Any], message: str, compiler: GrammarCompiler
) -> None:
    told = []
    for wanted in (StructuredOutput(**form), composed(**form)):
        with pytest.raises(InvalidRequestError) as caught:
            compiler.compile(wanted)
        told.append(str(caught.value))
    assert told[0] == told[1] and message in told[0] and "start:" not in told[0]
