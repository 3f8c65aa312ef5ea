from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from slipstream.errors import ExecutionError, InvalidRequestError
from slipstream.quantize.evaluate import accuracy, perplexity

VOCAB = 67
Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


def sample(
    lengths: Sequence[int], seed: int = 0
) -> tuple[list[Floats], list[Floats], list[Tokens]]:
    """Logits of a reference and of something like it, and windows."""
    rng = np.random.default_rng(seed)
    reference = [rng.normal(0, 4, (n, VOCAB)).astype(np.float32) for n in lengths]
    candidate = [
        (logits + rng.normal(0, 0.7, logits.shape)).astype(np.float32) for logits in reference
    ]
    windows = [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    return reference, candidate, windows


def scored(
    logits: Sequence[Floats], windows: Sequence[Tokens]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that predict something, and what they should predict."""
    rows = np.concatenate([block[:-1] for block in logits])
    targets = np.concatenate([window[1:] for window in windows])
    return torch.from_numpy(rows).double(), torch.from_numpy(targets).long()


def split(blocks: Sequence[Floats], sizes: Sequence[int]) -> Iterator[Floats]:
    """The same rows in blocks of other sizes."""
    rows, start = np.concatenate(blocks), 0
    for size in sizes:
        yield rows[start : start + size]
        start += size
    if start < len(rows):
        yield rows[start:]


def test_perplexity_is_that_of_torch() -> None:
    _, logits, windows = sample([9, 2, 40])
    losses = torch.nn.functional.cross_entropy(*scored(logits, windows), reduction="none")
    measured = perplexity(logits, windows)
    assert measured.tokens == 48
    assert measured.nll == pytest.approx(losses.mean().item(), rel=1e-12)
    assert measured.value == pytest.approx(losses.mean().exp().item(), rel=1e-12)
    error = losses.std().item() / math.sqrt(48)
    assert measured.nll_standard_error == pytest.approx(error, rel=1e-12)
    assert measured.standard_error == pytest.approx(error * measured.value, rel=1e-12)


def test_accuracy_is_that_of_torch() -> None:
    reference, candidate, windows = sample([30, 5, 100])
    (ours, targets), (theirs, _) = scored(candidate, windows), scored(reference, windows)
    measured = accuracy(reference, candidate, windows)
    functional = torch.nn.functional
    kl = functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    assert measured.kl_mean == pytest.approx(kl.mean().item(), rel=1e-10)
    assert measured.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-10)
    assert measured.kl_standard_error == pytest.approx(kl.std().item() / math.sqrt(132), rel=1e-10)
    assert measured.top1 == (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    difference = functional.cross_entropy(
        ours, targets, reduction="none"
    ) - functional.cross_entropy(theirs, targets, reduction="none")
    assert measured.tokens == measured.reference.tokens == 132
    assert measured.log_ratio == pytest.approx(difference.mean().item(), rel=1e-10)
    paired = difference.std().item() / math.sqrt(132)
    assert measured.log_ratio_standard_error == pytest.approx(paired, rel=1e-10)
    ratio = measured.candidate.value / measured.reference.value
    assert measured.increase == pytest.approx(ratio - 1, rel=1e-9)
    assert measured.increase_standard_error == pytest.approx(paired * ratio, rel=1e-9)
    assert measured.reference == perplexity(reference, windows)
    assert measured.candidate == perplexity(candidate, windows)


def test_pairing_makes_the_error_small() -> None:
    reference, _, windows = sample([500])
    noise = np.random.default_rng(1).normal(0, 0.01, reference[0].shape).astype(np.float32)
    measured = accuracy(reference, [reference[0] + noise], windows)
    assert measured.increase_standard_error * 50 < (
        measured.candidate.standard_error / measured.candidate.value
    )


def test_a_model_agrees_with_itself() -> None:
    reference, _, windows = sample([20, 20])
    measured = accuracy(reference, [block.copy() for block in reference], windows)
    assert (measured.kl_mean, measured.kl_p99, measured.top1) == (0, 0, 1)
    assert measured.increase == measured.increase_standard_error == 0


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    measured = perplexity([np.full((50, VOCAB), 3.0, np.float32)], [np.arange(50, dtype=np.int32)])
    assert measured.value == pytest.approx(VOCAB, rel=1e-12)
    assert measured.standard_error == pytest.approx(0, abs=1e-12)


def test_a_tiny_divergence_is_not_rounding() -> None:
    """A shift of one logit by e: KL is p(1 - p)e²/2 to leading order, here near 1e-9."""
    logits = np.zeros((2000, VOCAB), np.float32)
    shifted = logits.copy()
    shifted[:, 5] = 2.0**-11
    measured = accuracy([logits], [shifted], [np.zeros(2000, np.int32)])
    p = 1 / VOCAB
    assert measured.kl_mean == pytest.approx(p * (1 - p) * 2.0**-22 / 2, rel=1e-3)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    reference, candidate, windows = sample([60])
    moved = [block + np.float32(1024) for block in candidate]
    exact = [block - np.float32(1024) for block in moved]  # what rounding has left
    assert accuracy(reference, moved, windows).kl_mean == pytest.approx(
        accuracy(reference, exact, windows).kl_mean, rel=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    first=st.lists(st.integers(1, 25), max_size=6),
    second=st.lists(st.integers(1, 25), max_size=6),
)
def test_blocks_of_any_size_give_the_same(
    lengths: list[int], first: list[int], second: list[int]
) -> None:
    lengths = [*lengths, 4]
    reference, candidate, windows = sample(lengths)
    total = sum(lengths)
    cuts = [sizes if sum(sizes) < total else [] for sizes in (first, second)]
    measured = accuracy(split(reference, cuts[0]), split(candidate, cuts[1]), windows)
    whole = accuracy(reference, candidate, windows)
    assert measured.kl_mean == pytest.approx(whole.kl_mean, rel=1e-12)
    assert measured.tokens == whole.tokens == total - len(lengths)
    assert measured.top1 == whole.top1


def test_blocks_are_read_side_by_side() -> None:
    reference, candidate, windows = sample([10, 10, 10])
    read: list[str] = []

    def blocks(name: str, found: Sequence[Floats]) -> Iterator[Floats]:
        for block in found:
            read.append(name)
            yield block

    accuracy(blocks("reference", reference), blocks("candidate", candidate), windows)
    assert read == ["reference", "candidate"] * 3


def test_forbidden_tokens_are_no_nan() -> None:
    reference, candidate, windows = sample([30])
    for block in (reference[0], candidate[0]):
        block[:, VOCAB - 1] = -np.inf
    windows[0] %= VOCAB - 1
    shorter = [block[:, :-1] for block in (reference[0], candidate[0])]
    measured = accuracy(reference, candidate, windows)
    expected = accuracy([shorter[0]], [shorter[1]], windows)
    assert measured.kl_mean == pytest.approx(expected.kl_mean, rel=1e-12)
    assert measured.increase == pytest.approx(expected.increase, rel=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    reference, candidate, windows = sample([30])
    candidate[0][7, 3] = value
    with pytest.raises(ExecutionError, match="logits of the candidate hold"):
        accuracy(reference, candidate, windows)


def test_other_vocabularies_are_an_error() -> None:
    reference, candidate, windows = sample([30])
    with pytest.raises(InvalidRequestError, match="66 and 67 tokens"):
        accuracy([reference[0][:, 1:]], candidate, windows)


def test_too_little_text_is_an_error() -> None:
    _, logits, windows = sample([1, 2])
    with pytest.raises(InvalidRequestError, match="1 tokens to predict"):
        perplexity(logits, windows)
