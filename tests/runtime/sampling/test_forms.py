"""Rows that are held to a form, alone and beside everything else that may be asked of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.sampling.rows import random_logits, row
from tests.runtime.structured.forms import TINY_VOCAB, compiled, tiny_tokenizer

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler, token_logprobs
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.masks import MaskFiller, allowed_tokens
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

FORM = StructuredOutput(regex="[abc]{1,9}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, TINY_VOCAB)


@pytest.fixture
def ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {text: tokenizer.encode(text)[0] for text in "abcz"}


def held(compiler: GrammarCompiler, **params: Any) -> SamplingRow:  # noqa: ANN401
    chosen = SamplingParams(**{"temperature": 0, "structured": FORM, **params})
    made = row(chosen, seed=chosen.seed or 0)
    made.eos_token_ids = frozenset({1})
    made.constraint = compiler.compile(FORM).start()
    return made


def sampled(rows: list[SamplingRow], logits: Any) -> list[int]:  # noqa: ANN401
    sampler = Sampler(TINY_VOCAB)
    sampler.constrain(rows)
    return sampler.sample(logits, rows).token_ids


def test_only_what_the_form_allows_is_sampled(compiler: GrammarCompiler) -> None:
    rows = [held(compiler, temperature=5.0, seed=seed) for seed in range(40)]
    drawn = sampled(rows, random_logits(40, TINY_VOCAB))
    assert len(set(drawn)) > 1
    for token, each in zip(drawn, rows, strict=True):
        assert each.mask is not None and allowed_tokens(each.mask, TINY_VOCAB)[token]


def test_rows_without_a_form_are_as_before(compiler: GrammarCompiler, ids: dict[str, int]) -> None:
    logits = random_logits(2, TINY_VOCAB)
    logits[:, ids["z"]] = 50
    assert sampled([held(compiler), row(SamplingParams(temperature=0))], logits)[1] == ids["z"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, "c"),
        ({"logit_bias": {"a": 9}}, "a"),
        ({"allowed_token_ids": ["a", "b", "z"]}, "b"),
        ({"bad_words_token_ids": [["c"]]}, "b"),
        ({"allowed_token_ids": ["z"]}, "c"),  # the form wins
        ({"bad_words_token_ids": [["a"], ["b"], ["c"]], "allowed_token_ids": ["a", "b"]}, "c"),
        ({"presence_penalty": 2.0}, "b"),
    ],
)
def test_composes_with_other_edits(
    params: dict[str, Any], expected: str, compiler: GrammarCompiler, ids: dict[str, int]
) -> None:
    def named(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {ids[key]: each for key, each in value.items()}
        return [named(v) if isinstance(v, list) else ids[v] for v in value]

    given = {k: v if isinstance(v, float) else named(v) for k, v in params.items()}
    each = held(compiler, **given)
    if "presence_penalty" in params:
        each.output = [ids["c"]]
        each.position = 1
        assert each.constraint is not None
        each.constraint.take(ids["c"])
    logits = np.zeros((1, TINY_VOCAB), np.float32)
    logits[0, [ids[text] for text in "abcz"]] = [1, 2, 3, 9]
    assert sampled([each], logits) == [ids[expected]]


def test_the_end_waits_for_min_tokens(compiler: GrammarCompiler, ids: dict[str, int]) -> None:
    logits = np.zeros((1, TINY_VOCAB), np.float32)
    logits[0, [1, ids["a"]]] = [9, 5]
    for least, expected in ((0, 1), (3, ids["a"])):
        each = held(compiler, min_tokens=least)
        assert each.constraint is not None
        each.constraint.take(ids["b"])
        each.output, each.position = [ids["b"]], 1
        assert sampled([each], logits) == [expected]


def test_log_probabilities_are_those_of_the_model(compiler: GrammarCompiler) -> None:
    logits = random_logits(1, TINY_VOCAB)
    each = held(compiler, logprobs=2)
    sampler = Sampler(TINY_VOCAB)
    sampler.constrain([each])
    result = sampler.sample(logits, [each])
    assert result.logprobs == [token_logprobs(logits[0], result.token_ids[0], 2)]


def test_a_broken_row_fails(compiler: GrammarCompiler) -> None:
    sampler, rows = Sampler(TINY_VOCAB), [held(compiler)]
    sampler.constrain(rows)
    failed = sampler.sample(np.full((1, TINY_VOCAB), np.nan, np.float32), rows).failed
    assert isinstance(failed[0], ExecutionError)


def test_threads_fill_the_same_masks(compiler: GrammarCompiler, tmp_path: Path) -> None:
    forms = [f"[a-{last}]{{{i},9}}" for i in range(1, 9) for last in "bcxz"]
    constraints = [compiled(compiler, regex=form).start() for form in forms]
    alone, together = (
        np.zeros((len(forms), MaskFiller(TINY_VOCAB, threads).words), np.int32)
        for threads in (1, 4)
    )
    MaskFiller(TINY_VOCAB, 1).fill(constraints, alone)
    MaskFiller(TINY_VOCAB, 4).fill(constraints, together)
    assert (alone == together).all() and alone.any()
