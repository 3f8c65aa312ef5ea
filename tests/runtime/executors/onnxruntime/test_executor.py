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


def test_a_cache_without_a_slot_is_refused(engine: Path) -> None:
    opened = open_engine(engine)
    executor = ONNXRuntimeExecutor(opened, runtime_config(opened, {}))
    with pytest.raises(CapacityError, match=f"hold no slot of a sequence; one takes {SLOT_BYTES}"):
        executor.reserve_kv(SLOT_BYTES - 1)
    assert executor.reserve_kv(3 * SLOT_BYTES) == 3


def test_deterministic_is_refused(engine: Path) -> None:
    with pytest.raises(EngineMismatchError, match=r"number of tokens.*another target"):
        LLM(engine, deterministic=True)
