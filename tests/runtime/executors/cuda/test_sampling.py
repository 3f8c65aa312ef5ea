"""Sampling on the device against the CPU's sampler, with rows as the engine loop makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.runtime.structured.forms import TINY_VOCAB, tiny_tokenizer

from slipstream.errors import ExecutionError
from slipstream.plugins.draw_tokens.reference import draw_tokens
from slipstream.plugins.sampling import Field, Kind, reference
from slipstream.runtime.engine.step import SamplingRow, StepResult
from slipstream.runtime.executors.cuda.sampling import CUDASampler, PendingSample
from slipstream.runtime.sampling.logits_processors import process_logits
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler, token_logprobs
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput

Floats = NDArray[np.float32]

pytestmark = pytest.mark.kernel

SIZE = 1000


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(scale)


def row(
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (1, 2),
    output: Sequence[int] = (),
    eos: frozenset[int] = frozenset(),
    target: int | None = None,
    position: int | None = None,
) -> SamplingRow:
    """A row with lists of its own, at the end of ``output`` if not told otherwise."""
    position = len(output) if position is None else position
    return SamplingRow(params, list(prompt), list(output), 5, eos, target, position)


def greedy(**arguments: Any) -> SamplingParams:  # noqa: ANN401 - fields have many types
    return SamplingParams(temperature=0, **arguments)


class Device:
    """A sampler with as many rows as slots, and the host's wait for a step."""

    def __init__(self, device: str, rows: int, size: int = SIZE) -> None:
        self.device = device
        self.sampler = CUDASampler(rows, rows, size, 64, device)
        self.size = size

    def start(
        self, logits: Floats, rows: Sequence[SamplingRow], slots: Sequence[int] | None = None
    ) -> PendingSample:
        kind = self.sampler.kind(rows)
        padded = len(self.sampler.buffers.tokens)
        full = np.zeros((padded, self.size), np.float32)
        full[: len(rows)] = logits
        self.sampler.prepare(rows, slots or range(len(rows)), padded, kind)
        self.sampler.launch(torch.from_numpy(full).to(self.device), padded, kind)
        return self.sampler.fetch(len(rows), kind)

    def step(
        self, logits: Floats, rows: Sequence[SamplingRow], slots: Sequence[int] | None = None
    ) -> StepResult:
        pending = self.start(logits, rows, slots)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return pending.result(rows)

    def edited(self, index: int) -> Floats:
        assert self.sampler.buffers.full is not None
        edited: Floats = self.sampler.buffers.full.edited[index].cpu().numpy()
        return edited


def test_greedy_rows_are_copied_where_slots_change(device: str) -> None:
    """Their kernels read nothing else of what the device has; those of others read all."""
    steps = Device(device, 3)
    params = steps.sampler.buffers.params

    def tokens(slots: Sequence[int], position: int, last: SamplingParams) -> list[int]:
        logits = random_logits(2, SIZE, seed=position)
        rows = [row(greedy(), position=position), row(last, position=position)]
        found = steps.step(logits, rows, slots).token_ids
        assert found == logits.argmax(axis=1).tolist()
        assert steps.sampler.last_tokens[list(slots)].tolist() == found
        return params[Field.POSITION, :2].tolist()

    assert tokens((0, 2), 3, greedy()) == [3, 3]
    assert tokens((0, 2), 4, greedy()) == [3, 3], "no copy"
    assert tokens((2, 0), 5, greedy()) == [5, 5]
    drawn = SamplingParams(top_k=1)
    assert tokens((2, 0), 6, drawn) == [6, 6]
    assert tokens((2, 0), 7, drawn) == [7, 7]
    steps.sampler.clear()
    assert tokens((2, 0), 8, greedy()) == [8, 8]


EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": 1.5},
    {"frequency_penalty": -0.25, "logit_bias": {0: 3.5, 7: -100.0, 999: 20.0}},
    {"allowed_token_ids": [3, 4, 5, 31, 32, 999]},
    {"allowed_token_ids": [3, 4, 5], "bad_words_token_ids": [[4]], "presence_penalty": 0.5},
    {"min_tokens": 20, "stop_token_ids": [63, 64]},
    {"min_tokens": 20, "stop_token_ids": [63, 64], "ignore_eos": True},
    {"min_tokens": 5, "bad_words_token_ids": [[9], [998]], "logit_bias": {9: 50.0}},
]


class TestEdits:
    def test_equal_the_cpus(self, device: str) -> None:
        rng = np.random.default_rng(3)
        rows = [
            row(
                greedy(**arguments),
                prompt=rng.integers(0, SIZE, 20).tolist(),
                output=rng.integers(0, 12, 9).tolist(),
                eos=frozenset({17}),
            )
            for arguments in EDITS
        ]
        logits = random_logits(len(rows), SIZE)
        on_device = Device(device, len(rows))
        result = on_device.step(logits, rows)
        for i, sampling_row in enumerate(rows):
            expected = process_logits(logits[i], sampling_row)
            np.testing.assert_allclose(on_device.edited(i), expected, rtol=1e-6, atol=1e-6)
        assert result == Sampler(SIZE).sample(logits, rows)

    @pytest.mark.parametrize("count", [1000, 12000])
    def test_there_may_be_any_number_of_biases(self, count: int, device: str) -> None:
        bias = {i: float(i % 7) for i in range(0, 2 * count, 2)}
        size = 2 * count + 100
        rows = [row(greedy()), row(greedy(logit_bias=bias))]
        logits = random_logits(2, size)
        on_device = Device(device, 2, size)
        result = on_device.step(logits, rows)
        np.testing.assert_array_equal(on_device.edited(1), process_logits(logits[1], rows[1]))
        assert result == Sampler(size).sample(logits, rows)

    def test_a_slot_of_many_biases_may_change_hands(self, device: str) -> None:
        logits = random_logits(1, SIZE)
        on_device = Device(device, 1)
        for bias in ({3: 50.0}, {i: -float(i % 100) for i in range(600)}, {}, {9: 70.0}):
            rows = [row(greedy(logit_bias=bias))]
            assert on_device.step(logits, rows) == Sampler(SIZE).sample(logits, rows)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_the_allow_list_holds_even_if_all_of_it_is_forbidden(
        self, temperature: float, device: str
    ) -> None:
        shared: dict[str, Any] = {
            "temperature": temperature,
            "min_tokens": 5,
            "presence_penalty": 2.0,
            "logit_bias": {4: -100.0},
        }
        everything = [[token] for token in range(SIZE)]
        rows = [
            row(
                SamplingParams(allowed_token_ids=[4, 5], bad_words_token_ids=[[4]], **shared),
                output=[4, 5],
                eos=frozenset({5}),
            ),
            row(SamplingParams(bad_words_token_ids=everything, **shared), output=[4]),
        ]
        logits = random_logits(2, SIZE)
        logits[0, [4, 5]] = [2, 1]
        assert Device(device, 2).step(logits, rows) == Sampler(SIZE).sample(logits, rows)

    def test_the_end_is_possible_once_the_output_is_long_enough(self, device: str) -> None:
        on_device = Device(device, 1)
        logits = np.zeros((1, SIZE), np.float32)
        logits[0, 17] = 9
        params = greedy(min_tokens=2)
        first = row(params, eos=frozenset({17}))
        drawn = []
        for position in range(4):
            first.position = position
            drawn += on_device.step(logits, [first]).token_ids
        assert drawn == [0, 0, 17, 17]


class TestBadWords:
    """Words of several tokens, whose end is forbidden only where they have begun."""

    WORDS = ((3, 4), (3, 5, 6), (7,))

    @pytest.mark.parametrize("arguments", [{}, {"allowed_token_ids": [3, 4, 5, 6, 7]}])
    def test_are_forbidden_step_by_step(self, arguments: dict[str, Any], device: str) -> None:
        logits = np.zeros((1, SIZE), np.float32)
        logits[0, [3, 4, 5, 6, 7]] = [1, 4, 3, 2, 9]
        sampling_row = row(greedy(bad_words_token_ids=self.WORDS, **arguments))
        output: list[int] = sampling_row.output  # type: ignore[assignment]
        on_device = Device(device, 1)
        for forced in (3, 5, 3, 4, 9):
            sampling_row.position = len(output)
            expected = Sampler(SIZE).sample(logits, [sampling_row])
            assert on_device.step(logits, [sampling_row]) == expected
            output.append(forced)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), TINY_VOCAB)


class TestForms:
    """Rows that are held to a form, against the CPU's sampler."""

    VOCAB = TINY_VOCAB

    def held(self, compiler: GrammarCompiler, **params: Any) -> SamplingRow:  # noqa: ANN401
        form = StructuredOutput(regex="[a-f]{4,6}")
        each = row(SamplingParams(**{"temperature": 0, "structured": form, **params}))
        each.eos_token_ids = frozenset({1})
        each.constraint = compiler.compile(form).start()
        return each

    @pytest.mark.parametrize(
        "params",
        [
            {},
            {"min_tokens": 6},
            {"allowed_token_ids": [1, 70, 71, 72, 90]},
            {"allowed_token_ids": [300]},
            {"bad_words_token_ids": [[67], [68, 69]]},
            {"logit_bias": {67: 5.0, 300: 50.0}},
            {"repetition_penalty": 3.0, "frequency_penalty": 1.0},
            {"logprobs": 3},
        ],
    )
    def test_equal_the_cpus_to_the_end(
        self, params: dict[str, Any], compiler: GrammarCompiler, device: str
    ) -> None:
        each, plain = self.held(compiler, **params), row(greedy())
        on_device, on_host = Device(device, 2, self.VOCAB), Sampler(self.VOCAB)
        output: list[int] = each.output  # type: ignore[assignment]
        for step in range(6):
            assert each.constraint is not None
            each.position = len(output)
            logits = np.abs(random_logits(2, self.VOCAB, seed=step))
            on_host.constrain([each, plain])
            expected = on_host.sample(logits, [each, plain])
            got = on_device.step(logits, [each, plain], [1, 0])
            assert got.token_ids == expected.token_ids
            output.append(got.token_ids[0])
            each.constraint.take(output[-1])
            if each.constraint.complete:
                break
        assert len(output) >= 4

    def test_a_token_that_was_forced_is_the_one_that_penalties_see(
        self, compiler: GrammarCompiler, device: str
    ) -> None:
        each = self.held(compiler, repetition_penalty=50.0)
        on_device, on_host = Device(device, 1, self.VOCAB), Sampler(self.VOCAB)
        output: list[int] = each.output  # type: ignore[assignment]
        logits = np.ones((1, self.VOCAB), np.float32)
        logits[0, 66:70] = [8, 7, 6, 5]
        first = on_device.step(logits, [each]).token_ids[0]
        others = [token for token in (66, 67, 68, 69) if token != first]
        assert each.constraint is not None
        # While a step for the next place is on its way, two tokens become known, not its own.
        for token in (first, others[-1]):
            output.append(token)
            each.constraint.take(token)
        each.position = 1
        on_device.step(logits, [each])
        each.position = 2
        on_host.constrain([each])
        expected = on_host.sample(logits, [each]).token_ids
        assert on_device.step(logits, [each]).token_ids == expected


class TestHistory:
    """Greedy rows whose penalty makes every token depend on all before."""

    PARAMS = greedy(repetition_penalty=3.0, frequency_penalty=1.0)

    def expected(self, logits: Floats, prompt: Sequence[int], count: int) -> list[int]:
        output: list[int] = []
        for _ in range(count):
            sampling_row = row(self.PARAMS, prompt=prompt, output=output)
            output += Sampler(SIZE).sample(logits, [sampling_row]).token_ids
        return output

    def test_the_device_appends_while_it_runs_ahead_of_the_host(self, device: str) -> None:
        logits = np.abs(random_logits(1, SIZE))
        prompt = [int(logits.argmax()), 3]
        sampling_row = row(self.PARAMS, prompt=prompt)
        on_device = Device(device, 2)
        output: list[int] = sampling_row.output  # type: ignore[assignment]
        pending: PendingSample | None = None
        for position in range(8):
            sampling_row.position = position
            started = on_device.start(logits, [sampling_row], [1])
            if pending is not None:
                if device == "cuda":
                    torch.cuda.synchronize()
                output += pending.result([sampling_row]).token_ids
            pending = started
        expected = self.expected(logits, prompt, 8)
        assert output == expected[:7]
        assert on_device.sampler.last_tokens.tolist() == [0, expected[7]]

    def test_a_sequence_may_move_and_come_back(self, device: str) -> None:
        logits = np.abs(random_logits(1, SIZE, seed=1))
        sampling_row = row(self.PARAMS)
        output: list[int] = sampling_row.output  # type: ignore[assignment]
        on_device = Device(device, 2)
        for slot in (0, 0, 1, 1, 0, 0):
            sampling_row.position = len(output)
            output += on_device.step(logits, [sampling_row], [slot]).token_ids
        assert output == self.expected(logits, [1, 2], 6)

    def test_a_slot_may_change_hands(self, device: str) -> None:
        logits = np.abs(random_logits(1, SIZE, seed=2))
        on_device = Device(device, 1)
        for prompt in ([5], [6, 7, 8], [9]):
            sampling_row = row(self.PARAMS, prompt=prompt)
            output: list[int] = sampling_row.output  # type: ignore[assignment]
            for _ in range(3):
                sampling_row.position = len(output)
                output += on_device.step(logits, [sampling_row]).token_ids
            assert output == self.expected(logits, prompt, 3)

    def test_the_last_token_may_be_on_the_device_only(self, device: str) -> None:
        logits = np.abs(random_logits(1, SIZE, seed=3))
        best = int(logits.argmax())
        on_device = Device(device, 1)
        on_device.sampler.last_tokens[0] = best
        ahead = row(self.PARAMS, position=1)
        known = row(self.PARAMS, output=[best])
        assert on_device.step(logits, [ahead]) == Sampler(SIZE).sample(logits, [known])


@pytest.mark.parametrize("size", [300, SIZE, 5001])
def test_logprobs_equal_the_cpus(size: int, device: str) -> None:
    logits = random_logits(6, size, seed=size)
    logits[1] = 0
    logits[2, 20:] = -np.inf
    logits[3, 250:] = np.round(logits[3, 250:])
    counts = (0, 20, 20, 20, 5, None)
    rows = [
        row(SamplingParams(temperature=0.9, top_k=50, logprobs=count, logit_bias={5: 4.0}))
        for count in counts
    ]
    result = Device(device, 6, size).step(logits, rows)
    for i, (token, got) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        if counts[i] is None:
            assert got is None
            continue
        want = token_logprobs(logits[i], token, counts[i] or 0)
        assert got is not None
        assert (got.token_id, got.rank) == (token, want.rank)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert list(got.top) == list(want.top)
        for (value, rank), (expected, expected_rank) in zip(
            got.top.values(), want.top.values(), strict=True
        ):
            assert value == pytest.approx(expected, abs=1e-5)
            assert rank == expected_rank


class TestSteps:
    def test_two_may_be_on_their_way(self, device: str) -> None:
        on_device = Device(device, 3)
        logits = random_logits(2, 3, SIZE)
        rows = [row(greedy()), row(SamplingParams(seed=3)), row(greedy(logprobs=1))]
        first = on_device.start(logits[0], rows)
        for sampling_row in rows:
            sampling_row.position = 1
        second = on_device.start(logits[1, :2], rows[:2])
        if device == "cuda":
            torch.cuda.synchronize()
        drawn = first.result(rows)
        assert drawn.token_ids[::2] == logits[0, ::2].argmax(axis=1).tolist()
        assert drawn.logprobs[2] is not None
        assert second.result(rows[:2]).token_ids[0] == logits[1, 0].argmax()
        assert drawn.token_ids[1] == reference.draw(logits[0, 1], 5, 0, 1.0)
        assert second.result(rows[:2]).token_ids[1] == reference.draw(logits[1, 1], 5, 1, 1.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(
        "arguments", [{"temperature": 0}, {}, {"top_k": 2}, {"logprobs": 1, "logit_bias": {3: 1}}]
    )
    def test_broken_logits_are_reported(
        self, value: float, arguments: dict[str, Any], device: str
    ) -> None:
        logits = random_logits(2, SIZE)
        logits[1, 42] = value
        rows = [row(SamplingParams(**arguments)) for _ in range(2)]
        failed = Device(device, 2).step(logits, rows).failed
        assert list(failed) == [1] and isinstance(failed[1], ExecutionError)
        assert "expected a finite number" in str(failed[1])

    def test_logprobs_notice_a_broken_logit_that_is_not_allowed(self, device: str) -> None:
        logits = random_logits(1, SIZE)
        logits[0, 42] = math.nan
        rows = [row(greedy(allowed_token_ids=[1], logprobs=0))]
        failed = Device(device, 1).step(logits, rows).failed
        assert "expected a finite number" in str(failed[0])


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"temperature": 0}, Kind.GREEDY),
        ({"temperature": 0, "top_k": 3, "min_tokens": 2}, Kind.GREEDY),
        ({"temperature": 0, "min_tokens": 3, "stop_token_ids": [5]}, Kind.FULL),
        ({"top_k": 3}, Kind.SAMPLE),
        ({"logprobs": 0}, Kind.FULL),
        ({"logprobs": -1}, Kind.SAMPLE),
        ({"temperature": 0, "logprobs": -1}, Kind.SAMPLE),  # whose logits are read
        ({"logit_bias": {1: 1.0}}, Kind.FULL),
        ({"allowed_token_ids": [4]}, Kind.FULL),
        ({"bad_words_token_ids": [[4]]}, Kind.FULL),
        ({"presence_penalty": 1.0}, Kind.FULL),
    ],
    ids=str,
)
def test_kind_is_that_of_the_most_demanding_row(arguments: dict[str, Any], kind: Kind) -> None:
    sampler = CUDASampler(1, 1, 10, 8, "cpu")
    rows = [row(greedy()), row(SamplingParams(**arguments), output=[1, 2])]
    assert sampler.kind(rows) is kind
    assert sampler.kind(rows[:1]) is Kind.GREEDY
    assert sampler.kind([]) is Kind.GREEDY


@pytest.mark.parametrize(
    "arguments",
    [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05}],
)
def test_the_reference_has_the_cpus_distribution(arguments: dict[str, Any]) -> None:
    logits = random_logits(60, seed=2, scale=1.5)
    params = SamplingParams(temperature=0.8, **arguments)
    kept = reference.survivors(logits, 0.8, params.top_k, params.top_p, params.min_p)
    weights = np.where(kept, np.exp((logits - logits.max()).astype(np.float64) / 0.8), 0)
    uniforms = ((np.arange(2000) + 0.5) / 2000 * 2.0**53).astype(np.int64)
    row, top_k = (np.full(2000, value, np.int32) for value in (0, params.top_k))
    temperature, top_p, min_p = (
        np.full(2000, value, np.float32) for value in (0.8, params.top_p, params.min_p)
    )
    drawn, _ = draw_tokens(logits[None], row, temperature, top_k, top_p, min_p, uniforms)
    shares = np.bincount(drawn, minlength=60) / 2000
    assert np.abs(shares - weights / weights.sum()).max() <= 1.01 / 2000
