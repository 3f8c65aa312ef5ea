"""Edits of logits against their definition, token by token, and transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.sampling.rows import Floats, random_logits, row, sample_one

from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.logits_processors import process_logits
from slipstream.runtime.sampling.params import SamplingParams


def slow_edit(logits: Floats, sampling_row: SamplingRow) -> list[float]:
    """Every edit, token by token, from its definition."""
    params, output = sampling_row.params, list(sampling_row.output)
    ending = set(params.stop_token_ids)
    if not params.ignore_eos:
        ending |= sampling_row.eos_token_ids
    edited = []
    for token, value in enumerate(logits.tolist()):
        banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        banned |= len(output) < params.min_tokens and token in ending
        for *beginning, last in params.bad_words_token_ids:
            heard = output[len(output) - len(beginning) :] if beginning else []
            banned |= last == token and heard == beginning
        value += (params.logit_bias or {}).get(token, 0.0)
        if token in output or token in sampling_row.prompt:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= output.count(token) * params.frequency_penalty
        value -= (token in output) * params.presence_penalty
        edited.append(-math.inf if banned else value)
    return edited


SIZE = 20
TOKENS = st.integers(0, SIZE - 1)


@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(TOKENS, min_size=1, max_size=12),
    output=st.lists(TOKENS, max_size=12),
    eos=st.frozensets(TOKENS, max_size=2),
    params=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
            "presence_penalty": st.sampled_from([-0.5, 0.0, 1.5]),
            "frequency_penalty": st.sampled_from([-0.25, 0.0, 0.75]),
            "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
            "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=15),
            "bad_words_token_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), max_size=8),
            "min_tokens": st.integers(0, 12),
            "stop_token_ids": st.lists(TOKENS, max_size=3),
            "ignore_eos": st.booleans(),
        },
    ),
)
def test_edits_equal_their_definition(
    seed: int, prompt: list[int], output: list[int], eos: frozenset[int], params: dict[str, Any]
) -> None:
    logits = random_logits(SIZE, seed=seed)
    before = logits.copy()
    sampling_row = row(SamplingParams(**params), prompt=prompt, output=output, eos_token_ids=eos)
    edited = process_logits(logits, sampling_row)
    np.testing.assert_allclose(edited, slow_edit(logits, sampling_row), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(100)
    prompt, output = [3, 7, 7, 20], [7, 50, 99]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([prompt + output]), torch.from_numpy(logits[None].copy()))
    params = SamplingParams(repetition_penalty=1.3)
    edited = process_logits(logits, row(params, prompt=prompt, output=output))
    np.testing.assert_allclose(edited, expected[0].numpy(), rtol=1e-6)


@given(
    allowed=st.lists(TOKENS, min_size=1, max_size=2),
    bad=st.lists(TOKENS, max_size=3),
    eos=st.frozensets(TOKENS, max_size=3),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_allow_list_holds_even_if_all_of_it_is_forbidden(
    allowed: list[int], bad: list[int], eos: frozenset[int], temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature,
        allowed_token_ids=allowed,
        bad_words_token_ids=[[token] for token in bad],
        min_tokens=5,
    )
    assert sample_one(random_logits(SIZE), row(params, eos_token_ids=eos)) in allowed


def test_a_vocabulary_of_bad_words_still_yields_the_likeliest() -> None:
    logits = random_logits(SIZE)
    params = SamplingParams(bad_words_token_ids=[[token] for token in range(SIZE)])
    assert sample_one(logits, row(params)) == logits.argmax()


class Read(list[int]):
    """Tokens that count how many of them were read."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        self.read += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found


def test_a_step_costs_what_is_new_however_long_prompt_and_output_are() -> None:
    prompt, output = Read([1, 2] * 5000), Read([3] * 1000)
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.5, bad_words_token_ids=[[19] * 999]
    )
    sampling_row = row(params, prompt=prompt, output=output)
    process_logits(random_logits(SIZE), sampling_row)
    prompt.read = output.read = 0
    for token in range(10):
        output.append(token)
        process_logits(random_logits(SIZE), sampling_row)
    assert prompt.read == 0
    assert output.read <= 10 * 4
