"""Requests that ask for more than sampling, beside others: all stay in graphs and run ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.executors.cuda.test_executor import LIMITS, SHAPE, greedy, reference
from tests.tiny_models import save_tiny
from transformers import LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.cuda import buckets
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.pending import StartedCUDAStep

pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
VOCAB = SHAPE["vocab_size"]
SPECIAL: dict[str, dict[str, Any]] = {
    "words": {"bad_words_token_ids": [[5, 6], [7, 8, 9]]},
    "prompt scores": {"prompt_logprobs": 2},
    "biases": {"logit_bias": {i: float(i % 5) for i in range(VOCAB)}},
    "long lists": {"logprobs": 25},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    build(checkpoint, checkpoint / "engine", BuildOptions(target="cuda", max_seq_len=96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "MIXED_TOKENS", (16,))
        if interpreting():
            patch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
        limits = {**LIMITS, "max_batch_size": 4}
        with LLM(checkpoint / "engine", enable_prefix_caching=False, **limits) as llm:
            yield llm


class Watch:
    """What the device was asked for: steps kernel by kernel, and steps begun ahead of the host."""

    def __init__(self, executor: CUDAExecutor, patch: pytest.MonkeyPatch) -> None:
        self.steps = self.eager = self.ahead = 0
        runner = executor.runner
        submit, by_kernel = executor.submit, runner._by_kernel

        def noted_submit(batch: StepBatch) -> StartedCUDAStep:
            self.steps += 1
            self.ahead += bool((batch.token_ids < 0).any())
            return submit(batch)

        def noted_by_kernel(*arguments: Any) -> torch.Tensor:  # noqa: ANN401
            self.eager += 1
            return by_kernel(*arguments)

        patch.setattr(executor, "submit", noted_submit)
        patch.setattr(runner, "_by_kernel", noted_by_kernel)


def executor_of(llm: LLM) -> CUDAExecutor:
    executor = llm._loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    return executor


@pytest.mark.parametrize("name", SPECIAL)
def test_the_others_stay_in_their_graphs_and_run_ahead(
    name: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7], [100, 3], [9, 9, 8, 7]]
    plain = greedy(max_tokens=5)
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts[:2], plain)]
    watch = Watch(executor_of(llm), monkeypatch)
    outputs = llm.generate(prompts, [plain, plain, greedy(max_tokens=5, **SPECIAL[name])])
    assert [o.outputs[0].token_ids for o in outputs[:2]] == expected
    assert watch.eager == 0, "a step was launched kernel by kernel"
    assert watch.ahead == watch.steps - 1 == 4, "a step waited for the host"


def test_words_of_several_tokens_are_forbidden_where_they_have_begun(
    checkpoint: Path, llm: LLM
) -> None:
    prompt = [5, 6, 7]
    free = llm.generate([prompt], greedy(max_tokens=6))[0].outputs[0].token_ids
    word = free[1:4]
    barred = llm.generate([prompt], greedy(max_tokens=6, bad_words_token_ids=[word]))[0].outputs[0]
    assert barred.token_ids[:3] == free[:3] and barred.token_ids[3] != free[3]
    rows = reference(checkpoint, [*prompt, *barred.token_ids])[len(prompt) - 1 : -1]
    rows[3, word[-1]] = -torch.inf
    for row, token in zip(rows, barred.token_ids, strict=True):
        assert float(row.max() - row[token]) < 0.05


def test_lists_of_any_length_come_from_the_device(checkpoint: Path, llm: LLM) -> None:
    for count in (25, -1):
        params = SamplingParams(
            temperature=0, max_tokens=2, ignore_eos=True, logprobs=count, prompt_logprobs=count
        )
        output = llm.generate([[5, 6, 7, 8]], params)[0]
        completion = output.outputs[0]
        table = reference(checkpoint, [5, 6, 7, 8, *completion.token_ids])
        assert output.prompt_logprobs is not None and completion.logprobs is not None
        entries = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert len(entries) == 5
        for row, entry in zip(table, entries, strict=False):
            assert entry is not None and len(entry.top) == (VOCAB if count < 0 else count)
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=0.05)
            values = [value for value, _ in entry.top.values()]
            assert values == sorted(values, reverse=True)
