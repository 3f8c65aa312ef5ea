"""Drafts in the sampler: what is drawn is what would be drawn without them."""

from __future__ import annotations

import numpy as np
import pytest
from tests.runtime.engine.driving import GRAMMARS

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepResult, reject
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import VOCAB_SIZE

VOCAB = 50


def row(params: SamplingParams, output: list[int], drafts: list[int], seed: int = 0) -> SamplingRow:
    position = len(output) + len(drafts)
    return SamplingRow(params, [1, 2], output, seed, position=position, drafts=drafts)


def test_drawn_tokens_have_the_distribution_of_the_model() -> None:
    """100,000 draws of first and of second tokens, of which a third is accepted."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1.5, (2, VOCAB)).astype(np.float32)
    chances = [np.exp(x) / np.exp(x).sum() for x in (first, second)]
    count, params = 75_000, SamplingParams(temperature=1)
    drafts = rng.choice(np.argsort(-first)[:3], count).tolist()
    rows = [r for i in range(count) for r in _pair(params, drafts[i], i)]
    logits = np.tile(np.stack([first, second]), (count, 1))
    tokens = np.array(Sampler(VOCAB, 1).sample(logits, rows).token_ids).reshape(count, 2)
    accepted = tokens[:, 0] == drafts
    assert (tokens[~accepted, 1] == REJECTED).all()
    assert accepted.sum() + count > 80_000
    for drawn, chance in zip((tokens[:, 0], tokens[accepted, 1]), chances, strict=True):
        expected = chance * len(drawn)
        statistic = ((np.bincount(drawn, minlength=VOCAB) - expected) ** 2 / expected).sum()
        assert statistic < 85.4  # of 49 degrees of freedom, once in a thousand times


def _pair(params: SamplingParams, draft: int, seed: int) -> tuple[SamplingRow, SamplingRow]:
    return (
        SamplingRow(params, (), (), seed),
        SamplingRow(params, (), (), seed, position=1, drafts=(draft,)),
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=1, frequency_penalty=1.5, presence_penalty=0.5),
        SamplingParams(temperature=1, repetition_penalty=1.7),
        SamplingParams(temperature=1, bad_words_token_ids=[[3], [4, 5], [5, 4, 6]], logprobs=2),
        SamplingParams(temperature=1, min_tokens=4, stop_token_ids=list(range(25))),
        SamplingParams(temperature=1, logit_bias={3: 50}, allowed_token_ids=[3, 4, 5]),
    ],
)
def test_right_drafts_give_what_single_steps_give(params: SamplingParams) -> None:
    logits = np.random.default_rng(1).normal(0, 2, (5, VOCAB)).astype(np.float32)
    sampler, output = Sampler(VOCAB, 1), [4]
    single, expected = row(params, output, []), []
    for position in range(5):
        single.position = len(output)
        result = sampler.sample(logits[position : position + 1], [single])
        expected.append((result.token_ids[0], result.logprobs[0]))
        output.append(result.token_ids[0])
    drafts = output[1:]
    rows = [row(params, [4], drafts[:i]) for i in range(5)]
    for _ in range(2):  # rows are used again, and what was drafted has left no trace
        result = sampler.sample(logits, rows)
        assert list(zip(result.token_ids, result.logprobs, strict=True)) == expected
    wrong = [
        row(params, [4], [*drafts[:2], (drafts[2] + 1) % VOCAB, *drafts[3:]][:i]) for i in range(5)
    ]
    result = sampler.sample(logits, wrong)
    assert result.token_ids == [*drafts[:3], REJECTED, REJECTED]
    assert result.logprobs[3:] == [None, None]


def test_what_was_penalized_in_vain_is_forgotten() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2, repetition_penalty=2)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, :3] = (1.0, 0.9, 0.8)
    sampler, used = Sampler(VOCAB, 1), row(params, [], [0])
    assert sampler.sample(logits, [used]).token_ids != [0]
    used.drafts = ()
    assert sampler.sample(logits, [used]).token_ids == [0]


def test_forms_hold_at_every_drafted_position_and_stay_where_they_are() -> None:
    form = StructuredOutput(regex="a[bc]d")
    grammar = GRAMMARS.compile(form)
    constraint, params = grammar.start(), SamplingParams(temperature=0, structured=form)
    rows = [row(params, [], drafts) for drafts in ([], [0], [0, 2])]
    for each in rows:
        each.constraint = constraint
    sampler, logits = Sampler(VOCAB_SIZE, 1), np.zeros((3, VOCAB_SIZE), np.float32)
    logits[:, 2] = 1
    sampler.constrain(rows)
    assert sampler.sample(logits, rows).token_ids == [0, 2, 3]
    assert constraint.num_valid([0, 1, 3]) == 3 and constraint.num_valid([0, 3]) == 1


def test_a_row_that_failed_after_a_wrong_draft_has_not_failed() -> None:
    params = SamplingParams(temperature=0)
    rows = [row(params, [], []), row(params, [], [7])]
    for first, failed in ((7, {1}), (6, set())):
        result = StepResult([first, -1], [None, None], failed={1: ExecutionError("broken")})
        reject(rows, result)
        assert set(result.failed) == failed
