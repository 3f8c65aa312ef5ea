"""Rows after drafts, on the device: each is edited as if its drafts were output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.runtime.structured.forms import TINY_VOCAB, tiny_tokenizer

from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepResult, reject
from slipstream.runtime.executors.cuda.sampling import CUDASampler
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.masks import MaskFiller
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.kernel

EOS = frozenset({7})
FORM = StructuredOutput(regex="[a-f]{3,8}x")
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"bad_words_token_ids": [[30], [40, 41], [41, 42]], "allowed_token_ids": list(range(30, 60))},
    {"min_tokens": 4, "logit_bias": {7: 30.0}},
    {"structured": FORM, "frequency_penalty": 2.0, "min_tokens": 4, "logprobs": 2},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


def run_of(
    params: SamplingParams,
    output: list[int],
    drafts: Sequence[int],
    tokenizer: Tokenizer | None = None,
) -> list[SamplingRow]:
    """The row after ``output`` and those after each of its ``drafts``."""
    form = None
    if params.structured is not None and tokenizer is not None:
        form = GrammarCompiler(tokenizer, TINY_VOCAB).compile(params.structured).start()
        for token in output:
            form.take(token)
    return [
        SamplingRow(params, [3, 41, 5], output, 5, EOS, None, len(output) + count, constraint=form,
                    drafts=drafts[:count])
        for count in range(len(drafts) + 1)
    ]  # fmt: skip


class Device:
    def __init__(self, device: str, rows: int, slots: int) -> None:
        self.device, self.sampler = device, CUDASampler(rows, slots, TINY_VOCAB, 64, device)

    def step(
        self, logits: np.ndarray[Any, Any], rows: list[SamplingRow], slots: list[int]
    ) -> StepResult:
        kind, padded = self.sampler.kind(rows), len(self.sampler.buffers.tokens)
        full = np.zeros((padded, TINY_VOCAB), np.float32)
        full[: len(rows)] = logits
        self.sampler.prepare(rows, slots, padded, kind)
        self.sampler.launch(torch.from_numpy(full).to(self.device), padded, kind)
        pending = self.sampler.fetch(len(rows), kind)
        if self.device == "cuda":
            torch.cuda.synchronize()
        result = pending.result(rows)
        reject(rows, result)
        return result


def test_rows_after_drafts_are_the_cpus_over_steps(device: str, tokenizer: Tokenizer) -> None:
    """Some drafts are right and others wrong; what wrong ones left is not seen in the next step,
    nor by what follows tokens that came from elsewhere."""
    rng = np.random.default_rng(0)
    text = tokenizer.encode("abcabdex")
    assert len(text) > 4
    outputs = [text[:1] if "structured" in kind else [40] for kind in KINDS]
    params = [SamplingParams(**{"temperature": 0, **kind}) for kind in KINDS]
    on_device, accepted = Device(device, 3 * len(KINDS), len(KINDS)), 0
    for step in range(2):
        rows, slots = list[SamplingRow](), list[int]()
        for slot, (param, output) in enumerate(zip(params, outputs, strict=True)):
            drafts = [41, 42] if param.structured is None else text[len(output) : 3]
            drafts = drafts[: 2 - step] if param.structured is None or not step else []
            run = run_of(param, output, drafts, tokenizer)
            rows += run
            slots += [slot] * len(run)
        logits = rng.standard_normal((len(rows), TINY_VOCAB), dtype=np.float32) * 3
        for index, row in enumerate(rows[1:]):  # most drafts are what is likeliest
            if row.drafts and rng.uniform() < 0.7:
                logits[index, row.drafts[-1]] = 60
        for row in rows:
            if row.form is not None:
                row.mask = np.zeros(-(-TINY_VOCAB // 32), np.int32)
                MaskFiller(TINY_VOCAB).fill([row.form], row.mask[None])
        expected = Sampler(TINY_VOCAB).sample(logits, rows)
        found = on_device.step(logits, rows, slots)
        assert found.token_ids == expected.token_ids
        assert [each is None for each in found.logprobs] == [e is None for e in expected.logprobs]
        for slot, token in zip(slots, found.token_ids, strict=True):
            if token != REJECTED:
                outputs[slot] = [*outputs[slot], token]
        accepted += sum(
            bool(row.drafts) and token != REJECTED
            for row, token in zip(rows, found.token_ids, strict=True)
        )
        for slot in (0, 1, 2):  # as if a form had forced them
            outputs[slot] = [*outputs[slot], 50 + step]
    assert accepted > 3


def test_a_sequence_without_drafts_is_packed_as_before(device: str) -> None:
    """A row of its own slot's bits, whether or not others have drafts."""
    on_device = Device(device, 6, 3)
    banned = SamplingParams(temperature=0, bad_words_token_ids=[[1, 2]], allowed_token_ids=[2, 9])
    rows = [*run_of(SamplingParams(temperature=0), [4], [5]), *run_of(banned, [1], [])]
    rows += run_of(banned, [9], [1, 9])
    logits = np.zeros((6, TINY_VOCAB), np.float32)
    logits[:, 2], logits[:, 9], logits[3, 1] = 9, 8, 99
    found = on_device.step(logits, rows, [0, 0, 1, 2, 2, 2])
    assert found.token_ids == Sampler(TINY_VOCAB).sample(logits, rows).token_ids
    assert found.token_ids[2:4] == [9, 2]


VOCAB = 50


def chi_squared(counts: np.ndarray[Any, Any], chances: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The statistic of draws, rare tokens together, and a value that one in a million exceeds (by
    Wilson and Hilferty)."""
    expected, order = chances * counts.sum(), np.argsort(-chances)
    bins = np.minimum((expected[order].cumsum() - expected[order]) // 12, 30).astype(int)
    seen, wanted = (np.bincount(bins, each[order]) for each in (counts, expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((seen - wanted) ** 2 / wanted).sum()), limit


def test_tokens_after_right_and_wrong_drafts_are_drawn_from_their_rows(device: str) -> None:
    """100,000 of them on a GPU, of a vocabulary of 50: the first of each run whether or not a draft
    was there, and those after drafts that were right."""
    draws, sequences = (100_000, 2000) if device == "cuda" else (96, 8)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3, VOCAB), dtype=np.float32) * 1.5
    chances = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    drafts = chances.argmax(1)[:2].tolist()
    sampler = CUDASampler(3 * sequences, sequences, VOCAB, 64, device)
    logits = torch.from_numpy(np.tile(rows, (sequences, 1))).to(device)
    counts = np.zeros((3, VOCAB))
    for start in range(0, draws, sequences):
        runs = [run_of(SamplingParams(temperature=1.0), [4], drafts) for _ in range(sequences)]
        flat = [replace(row, seed=start + number) for number, run in enumerate(runs) for row in run]
        slots = [slot for slot in range(sequences) for _ in range(3)]
        kind = sampler.kind(flat)
        sampler.prepare(flat, slots, len(flat), kind)
        sampler.launch(logits, len(flat), kind)
        pending = sampler.fetch(len(flat), kind)
        if device == "cuda":
            torch.cuda.synchronize()
        result = pending.result(flat)
        reject(flat, result)
        for index, token in enumerate(result.token_ids):
            # A row counts if all before it did.
            if token != REJECTED:
                counts[index % 3, token] += 1
    assert counts[0].sum() == draws > counts[1].sum() > counts[2].sum() > 0
    for seen, row in zip(counts[: 3 if device == "cuda" else 1], chances, strict=False):
        found, limit = chi_squared(seen, row)
        assert found < limit
        assert chi_squared(seen, np.roll(row, 1))[0] > limit or device != "cuda"
