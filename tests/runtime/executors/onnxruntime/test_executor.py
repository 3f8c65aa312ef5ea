"""The engine loop on an engine of target onnxruntime, beside our CPU engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError, EngineMismatchError, ExecutionError
from slipstream.runtime.engine.step import PagedInputs, StepBatch
from slipstream.runtime.executors.onnxruntime.executor import ONNXRuntimeExecutor
from slipstream.runtime.executors.onnxruntime.memory import Buffer, HostMemory
from slipstream.runtime.loading import runtime_config

PROMPTS = [[3 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate((1, 40, 5, 17, 90, 2))]
LENGTH = 128
# Layers, keys and values, heads, positions, elements, bytes of float32.
SLOT_BYTES = 3 * 2 * 2 * (LENGTH + 1) * 16 * 4


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "engine"
    options = BuildOptions(target="onnxruntime", dtype="float32", max_seq_len=LENGTH)
    build(tiny_checkpoint, path, options)
    return path


def greedy(**more: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 10, "ignore_eos": True, **more})


def tokens(engine: Path, params: SamplingParams, **options: Any) -> list[list[list[int]]]:  # noqa: ANN401
    with LLM(engine, **options) as llm:
        outputs = llm.generate(PROMPTS, params)
        return [[list(c.token_ids) for c in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 3, "max_num_tokens": 16},  # chunks beside decodes, slots taken again
        {"kv_cache_bytes": 2 * SLOT_BYTES + 1},  # two slots for six sequences
        {"speculative": "ngram", "num_speculative_tokens": 3},
    ],
    ids=["at once", "in chunks", "few slots", "with guesses"],
)
def test_tokens_are_those_of_our_cpu_engine(
    options: dict[str, Any], engine: Path, tiny_engine: Path
) -> None:
    assert tokens(engine, greedy(), **options) == tokens(tiny_engine, greedy())


def test_siblings_copy_the_slot_of_their_prompt(engine: Path, tiny_engine: Path) -> None:
    params = greedy(n=3, temperature=1.0, seed=5)
    assert tokens(engine, params) == tokens(tiny_engine, params)


def test_log_probabilities_and_prompts_longer_than_a_batch(engine: Path, tiny_engine: Path) -> None:
    """Rows of logits beyond those of a batch, in the order of the prompt."""
    params, found = greedy(prompt_logprobs=0, max_tokens=1, logprobs=2), []
    for path in (engine, tiny_engine):
        with LLM(path, max_batch_size=2) as llm:
            (output,) = llm.generate([PROMPTS[4]], params)
        assert output.prompt_logprobs is not None
        found.append([entry.logprob for entry in output.prompt_logprobs if entry is not None])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_best_tokens_of_the_graph_are_those_of_its_logits(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU hands them out."""
    want = tokens(engine, greedy())

    class OnDevice(ONNXRuntimeExecutor):
        def gather(self, *_: Any) -> Any:  # noqa: ANN401
            raise AssertionError("logits left the device")

        def __init__(self, *given: Any) -> None:  # noqa: ANN401
            super().__init__(*given)
            self.picks_on_device = True

    place = f"{ONNXRuntimeExecutor.__module__}.{ONNXRuntimeExecutor.__name__}"
    monkeypatch.setattr(place, OnDevice)
    assert tokens(engine, greedy()) == want
    assert tokens(engine, greedy(), speculative="ngram", num_speculative_tokens=2) == want
    with pytest.raises((AssertionError, ExecutionError), match="logits left the device"):
        tokens(engine, greedy(temperature=1.0))


def test_a_step_reads_what_was_written_and_copied_before_it(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a copy may still be on its way when the call for it returned."""
    want = tokens(engine, greedy(n=2, temperature=1.0, seed=5))

    class Late(HostMemory):
        def __init__(self) -> None:
            self.waiting: list[Callable[[], None]] = []

        def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
            self.waiting.append(partial(super().write, buffer, values.copy()))

        def copy_row(self, buffer: Buffer, source: int, destination: int) -> None:
            self.waiting.append(partial(super().copy_row, buffer, source, destination))

        def settle(self) -> None:
            while self.waiting:
                self.waiting.pop(0)()

    monkeypatch.setattr(f"{ONNXRuntimeExecutor.__module__}.HostMemory", Late)
    assert tokens(engine, greedy(n=2, temperature=1.0, seed=5)) == want


def step(sequences: dict[int, tuple[int, list[int]]]) -> StepBatch:
    """The next tokens of sequences, by slot with where they begin; all logits are wanted."""
    slots = np.array([*sequences], np.int32)
    starts, tokens = zip(*sequences.values(), strict=True)
    counts = np.array([len(each) for each in tokens], np.int32)
    positions = np.concatenate(
        [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, counts, strict=True)]
    )
    owners = np.repeat(slots, counts)
    return StepBatch(
        token_ids=np.concatenate(tokens).astype(np.int32),
        positions=positions,
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_len=np.array(starts, np.int32) + counts,
        logits_rows=np.arange(counts.sum(), dtype=np.int32),
        sampling=[],
        slots=np.arange(len(slots), dtype=np.int32),
        sampling_slots=np.empty(0, np.int32),
        pages={"kv": PagedInputs(slots[:, None], owners * (LENGTH + 1) + positions)},
    )


@pytest.mark.parametrize("length", [1, 37, LENGTH - 1])
@pytest.mark.parametrize("padded_to_widths", [False, True])
def test_what_is_written_for_padding_hurts_no_sequence(
    padded_to_widths: bool, length: int, engine: Path
) -> None:
    """A sequence waits in a slot between two that decode, also one that its slot just holds, and
    is then computed as if it had been alone."""
    opened = open_engine(engine)
    waiting = [3 + (7 * i) % 300 for i in range(length)]

    def last(*companions: dict[int, tuple[int, list[int]]]) -> NDArray[np.float32]:
        executor = ONNXRuntimeExecutor(opened, runtime_config(opened, {"max_batch_size": 3}))
        executor._captures = padded_to_widths
        executor.reserve_kv(None)
        executor.logits(step({1: (0, waiting)}))
        for more in companions:
            executor.logits(step(more))
        return executor.logits(step({1: (length, [9])}))

    decodes = [{0: (n, [5 + n]), 2: (n, [8 + n])} for n in range(4)]
    np.testing.assert_allclose(last(*decodes), last(), rtol=1e-4, atol=1e-4)


def test_a_step_larger_than_any_before_moves_its_inputs(engine: Path) -> None:
    opened = open_engine(engine)
    found = []
    for limits in ({"max_batch_size": 2, "max_num_tokens": 4}, {"max_batch_size": 2}):
        executor = ONNXRuntimeExecutor(opened, runtime_config(opened, limits))
        executor.reserve_kv(None)
        steps = ({0: (0, [5])}, {1: (0, [3 + i for i in range(100)])}, {0: (1, [6])})
        found.append([executor.logits(step(each)) for each in steps])
    for small, large in zip(*found, strict=True):
        np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-5)


def test_a_cache_without_a_slot_is_refused(engine: Path) -> None:
    opened = open_engine(engine)
    executor = ONNXRuntimeExecutor(opened, runtime_config(opened, {}))
    with pytest.raises(CapacityError, match=f"hold no slot of a sequence; one takes {SLOT_BYTES}"):
        executor.reserve_kv(SLOT_BYTES - 1)
    assert executor.reserve_kv(3 * SLOT_BYTES) == 3


def test_deterministic_is_refused(engine: Path) -> None:
    with pytest.raises(EngineMismatchError, match=r"number of tokens.*another target"):
        LLM(engine, deterministic=True)
