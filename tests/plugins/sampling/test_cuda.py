"""The sampling kernels against their NumPy reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slipstream.plugins.sampling import BROKEN, Field, Kind, cuda, reference
from slipstream.plugins.sampling.cuda import SamplerBuffers, sample

Floats = NDArray[np.float32]

pytestmark = pytest.mark.kernel


class Arguments(TypedDict, total=False):
    temperature: float
    top_k: int
    top_p: float
    min_p: float


CASES: list[Arguments] = [
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 5},
    {"temperature": 1.0, "top_k": 700},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 2.0, "min_p": 0.3},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 30, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]
SEED = 0xFEDC_BA98_7654_3210


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(scale)


def run(
    logits: Floats,
    cases: Sequence[Arguments],
    device: str,
    *,
    kind: Kind = Kind.SAMPLE,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> SamplerBuffers:
    """Sample one row a case (and padding where there are more logits); row ``i`` has seed
    ``SEED + i`` and position ``i`` by default."""
    rows, count = len(logits), len(cases)
    slots = slots or range(count)
    buffers = SamplerBuffers.allocate(rows, max(slots) + 1, logits.shape[1], 64, device)
    buffers.tokens.fill_(-77)
    if kind is Kind.FULL:
        buffers.enable_full()
    block = np.zeros((len(Field), rows), np.int32)
    floats = block.view(np.float32)
    block[Field.SLOT] = -1
    block[Field.SLOT, :count] = slots
    block[Field.POSITION, :count] = positions or range(count)
    words = np.array(seeds or [SEED + i for i in range(count)], np.uint64).view(np.int32)
    block[Field.SEED_LOW, :count] = words[::2]
    block[Field.SEED_HIGH, :count] = words[1::2]
    for i, case in enumerate(cases):
        floats[Field.TEMPERATURE, i] = case["temperature"]
        block[Field.TOP_K, i] = case.get("top_k", 0)
        floats[Field.TOP_P, i] = case.get("top_p", 1)
        floats[Field.MIN_P, i] = case.get("min_p", 0)
        floats[Field.REPETITION_PENALTY, i] = 1
    buffers.params.copy_(torch.from_numpy(block))
    sample(torch.from_numpy(logits).to(device), buffers, rows, kind)
    return buffers


def tokens(buffers: SamplerBuffers) -> list[int]:
    result: list[int] = buffers.tokens.tolist()
    return result


def assert_drawn(logits: Floats, case: Arguments, buffers: SamplerBuffers, row: int) -> None:
    """The survivors and the token of a row are the reference's, up to rounding."""
    kept = logits >= buffers.thresholds[row].item()
    expected = reference.survivors(logits, **case)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / case["temperature"])
    assert weights[kept != expected].sum() <= 1e-5 * weights.sum()
    assert kept.sum() == pytest.approx(expected.sum(), rel=1e-3, abs=0)
    scores = reference.scores(logits, case["temperature"], SEED + row, row)
    token = tokens(buffers)[row]
    assert kept[token]
    assert scores[token] == pytest.approx(scores[kept].max(), abs=1e-4)


class TestGreedy:
    @pytest.mark.parametrize("size", [50, 1000, 2048, 5001])
    @pytest.mark.parametrize("kind", list(Kind))
    def test_is_the_first_of_the_largest(self, size: int, kind: Kind, device: str) -> None:
        logits = random_logits(4, size)
        logits[1, [size // 2, size - 1]] = logits[1].max() + 1
        logits[2] = 0
        logits[3] = -np.inf
        logits[3, size - 2] = -3e38
        buffers = run(logits, [{"temperature": 0}] * 4, device, kind=kind)
        assert tokens(buffers) == logits.argmax(axis=1).tolist()
        assert buffers.last_tokens.tolist() == tokens(buffers)

    @pytest.mark.parametrize(("size", "parts"), [(50, 2), (5001, 2), (4097, 4), (9, 8)])
    def test_the_best_of_parts_is_that_of_all(self, size: int, parts: int, device: str) -> None:
        """Of a vocabulary that is filled up to what ranks divide, with what nobody reads."""
        logits, width = random_logits(7, size), -(-size // parts)
        logits[1, [0, size // 2, size - 1]] = logits[1].max() + 1  # ties between parts
        logits[2] = [0.0, -0.0] * (size // 2) + [0.0] * (size % 2)
        logits[3] = -np.inf
        logits[3, size - 2] = -3e38
        for row, value in ((4, np.nan), (5, np.inf), (6, -np.inf)):
            logits[row, :] = np.where(np.arange(size) == size // 3, value, logits[row])
        logits[6] = -np.inf
        whole = run(logits, [{"temperature": 0}] * 7, device, kind=Kind.GREEDY)
        padded = np.pad(logits, ((0, 0), (0, parts * width - size)), constant_values=np.nan)
        buffers = run(logits, [{"temperature": 0}] * 7, device, kind=Kind.GREEDY)
        buffers.tokens.fill_(-77)
        found = []
        for first in range(0, parts * width, width):
            part = torch.from_numpy(padded[:, first : first + width].copy()).to(device)
            found.append(cuda.best_of_part(part, buffers, first).clone())
        cuda.sample_best(torch.cat(found, dim=1), buffers)
        assert tokens(buffers) == tokens(whole)
        assert tokens(buffers)[:4] == logits[:4].argmax(axis=1).tolist()
        assert tokens(buffers)[4:] == [BROKEN] * 3
        assert buffers.last_tokens.tolist() == whole.last_tokens.tolist()

    def test_padding_is_left_alone(self, device: str) -> None:
        logits = random_logits(4, 300)
        buffers = run(logits, [{"temperature": 0}] * 2, device, kind=Kind.GREEDY, slots=[4, 1])
        first, second = logits[:2].argmax(axis=1).tolist()
        assert tokens(buffers) == [first, second, -77, -77]
        assert buffers.last_tokens.tolist() == [0, second, 0, 0, first]

    def test_rows_may_be_apart(self, device: str) -> None:
        logits = torch.from_numpy(random_logits(3, 400)).to(device)
        buffers = SamplerBuffers.allocate(3, 3, 300, 8, device)
        buffers.params[Field.SLOT] = torch.arange(3, dtype=torch.int32)
        sample(logits[:, :300], buffers, 3, Kind.GREEDY)
        assert tokens(buffers) == logits[:, :300].argmax(dim=1).tolist()


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_rows_are_reported(value: float, kind: Kind, device: str) -> None:
    cases: list[Arguments] = [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 1, "top_k": 3},
        {"temperature": 1, "top_p": 0.5},
    ]
    logits = random_logits(4, 2100)
    if value == -math.inf:
        logits[1:] = value
    else:
        logits[[1, 2, 3], [0, 777, 2099]] = value
    buffers = run(logits, cases, device, kind=kind)
    assert tokens(buffers) == [int(logits[0].argmax()), BROKEN, BROKEN, BROKEN]
    assert buffers.last_tokens.tolist()[1:] == [0, 0, 0]


class TestDraws:
    @pytest.mark.parametrize(("size", "scale"), [(50, 2.0), (1000, 1.0), (5001, 4.0)])
    def test_equal_the_reference(self, size: int, scale: float, device: str) -> None:
        logits = random_logits(len(CASES), size, seed=size, scale=scale)
        buffers = run(logits, CASES, device)
        for row, case in enumerate(CASES):
            assert_drawn(logits[row], case, buffers, row)

    @pytest.mark.parametrize(("size", "scale"), [(1000, 0.3), (5001, 1.0)])
    def test_equal_it_when_the_candidates_are_too_many_to_list(
        self, size: int, scale: float, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda, "CANDIDATES", 16)
        cases = [case for case in CASES if case.get("top_k", 0) or case.get("top_p", 1) < 1]
        logits = random_logits(len(cases), size, seed=size, scale=scale)
        buffers = run(logits, cases, device)
        for row, case in enumerate(cases):
            assert_drawn(logits[row], case, buffers, row)
        assert (buffers.state_int[:, 2] > 16).sum() > len(cases) // 2

    def test_ties_at_the_edge_are_kept(self, device: str) -> None:
        logits = np.zeros((4, 3000), np.float32)
        logits[:3, 100:110] = 5
        logits[2, 100:105] = -0.0
        cases: list[Arguments] = [
            {"temperature": 1, "top_k": 7},
            {"temperature": 1, "top_k": 11},
            {"temperature": 1, "top_k": 6},
            {"temperature": 1, "top_p": 0.4},
        ]
        thresholds = run(logits, cases, device).thresholds.tolist()
        assert thresholds == [5, 0, 0, 0]

    def test_impossible_tokens_are_never_drawn(self, device: str) -> None:
        logits = np.full((12, 2500), -np.inf, np.float32)
        logits[:, [5, 2400]] = 0
        cases: list[Arguments] = [
            {"temperature": 1000},
            {"temperature": 1, "top_k": 50},
            {"temperature": 1, "top_p": 0.999},
        ]
        drawn = tokens(run(logits, cases * 4, device))
        assert set(drawn) == {5, 2400}

    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
    def test_extreme_logits_and_temperatures(self, device: str) -> None:
        row = np.array([3e38, -3e38, 0, -np.inf, 2.9e38], np.float32)
        cases: list[Arguments] = [
            {"temperature": 1.1e-5},
            {"temperature": 1000, "top_p": 0.9},
            {"temperature": 1000, "top_k": 4},
            {"temperature": 1000, "min_p": 0.1},
        ]
        assert tokens(run(np.stack([row] * 4), cases, device)) == [0] * 4


class TestRandomNumbers:
    def chi_square(self, drawn: Sequence[int], logits: Floats, temperature: float) -> float:
        weights = np.exp(logits.astype(np.float64) / temperature)
        expected = weights / weights.sum() * len(drawn)
        counts = np.bincount(drawn, minlength=len(logits))
        return float(((counts - expected) ** 2 / expected).sum())

    def test_philox_is_the_published_one(self) -> None:
        # The known answer of the Random123 library for counter 0 and key 0.
        zero = reference.philox(0, 0, 4)
        assert [f"{word:08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]

    @pytest.mark.parametrize("by", ["seed", "position"])
    def test_reference_draws_fit_the_probabilities(self, by: str) -> None:
        logits = random_logits(12, seed=5, scale=1.0)
        pairs = [(i * 0x1_0000_0003, 7) if by == "seed" else (SEED, i) for i in range(8000)]
        drawn = [reference.draw(logits, seed, at, temperature=0.7) for seed, at in pairs]
        # 11 degrees of freedom: the 99.99th percentile is 37.4.
        assert self.chi_square(drawn, logits, 0.7) < 37.4
        assert self.chi_square(drawn, logits, 0.8) > 37.4, "the test can tell 0.7 from 0.8"

    def test_kernel_draws_fit_too(self, device: str) -> None:
        rows = 8000 if device == "cuda" else 40
        logits = random_logits(6, seed=6, scale=0.5)
        cases: list[Arguments] = [{"temperature": 1.0, "top_k": 5}] * rows
        drawn = tokens(run(np.stack([logits] * rows), cases, device))
        kept = reference.survivors(logits, 1.0, 5)
        assert set(drawn) <= set(np.flatnonzero(kept).tolist())
        ids = np.cumsum(kept) - 1
        # 4 degrees of freedom: the 99.99th percentile is 23.5.
        assert self.chi_square(ids[drawn].tolist(), logits[kept], 1.0) < 23.5

    def test_every_bit_of_the_seed_and_the_position_count(self, device: str) -> None:
        seeds = [SEED, SEED ^ 1, SEED ^ 2**31, SEED ^ 2**32, SEED ^ 2**63, SEED, SEED]
        positions = [0, 0, 0, 0, 0, 1, 2**20]
        logits = np.zeros((7, 4000), np.float32)
        cases: list[Arguments] = [{"temperature": 1.0}] * 7
        drawn = tokens(run(logits, cases, device, seeds=seeds, positions=positions))
        assert len(set(drawn)) == 7

    def test_a_row_does_not_depend_on_batch_slot_or_kind(self, device: str) -> None:
        cases = [*CASES[:10:3], CASES[12], CASES[15]]
        logits = random_logits(len(cases), 2500, seed=9)
        together = tokens(run(logits, cases, device))
        for kind in (Kind.SAMPLE, Kind.FULL):
            order = list(range(len(cases)))[::-1]
            padded = np.concatenate([logits[order], np.zeros((2, 2500), np.float32)])
            buffers = run(
                padded,
                [cases[i] for i in order],
                device,
                kind=kind,
                seeds=[SEED + i for i in order],
                positions=order,
                slots=[i + 3 for i in order],
            )
            assert tokens(buffers)[: len(cases)] == [together[i] for i in order]
