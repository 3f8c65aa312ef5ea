"""Schemas that others wrote: either refused with the reason, or right about every document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runtime.structured.forms import TINY_VOCAB, Driver, compiled, schemas, tiny_tokenizer

from slipstream.errors import InvalidRequestError
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.text.tokenizer import Tokenizer

# What a JSON document may look like, all of which a model may write.
STYLES: tuple[dict[str, object], ...] = ({}, {"separators": (",", ":")}, {"indent": 2})
# Of the selection, which has one schema for each reason to refuse.
LEAST_HELD = 47


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
    compiler, driver = GrammarCompiler(tokenizer, vocab_size), Driver(tokenizer, vocab_size)
    held = 0
    for case in schemas():
        try:
            grammar = compiled(compiler, json=case["schema"])
        except InvalidRequestError as error:
            assert error.param == "structured" and "cannot be held: " in str(error)
            continue
        held += 1
        for test in case["tests"]:
            for style in STYLES:
                text = json.dumps(test["data"], ensure_ascii=False, **style)  # type: ignore[arg-type]
                assert driver.holds(grammar, text) == test["valid"], (case["name"], text)
    assert held >= LEAST_HELD


def test_a_tiny_vocabulary(tmp_path: Path) -> None:
    check(tiny_tokenizer(tmp_path), TINY_VOCAB)


@pytest.mark.real_model
def test_the_vocabulary_of_smollm2(smollm2_engine: Path) -> None:
    check(Tokenizer.from_directory(smollm2_engine), 49152)
