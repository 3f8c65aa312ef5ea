"""The executor of GPUs with a micro engine: in Triton's interpreter, or on a GPU natively."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.runtime.executors.cuda.torch_kernels import in_torch
from tests.runtime.executors.two_graphs import save_engine
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.contract import bytes_per_token
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError, EngineMismatchError, MissingDependencyError
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime import executors
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.sequence import child_seed
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.cuda import buckets, inputs, runner, spared
from slipstream.runtime.executors.cuda import device as cuda_device
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.inputs import Shape
from slipstream.runtime.loading import load
from slipstream.runtime.request import RequestOutput

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SHAPE = {
    **TINY_SHAPE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LIMITS = {"max_batch_size": 2, "max_num_tokens": 16, "max_seq_len": 96, "kv_cache_bytes": 1 << 17}
PROMPTS = [[5, 6, 7, 8, 9, 10], [100, 3], list(range(40, 62))]


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True, **params})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    build(checkpoint, checkpoint / "engine", BuildOptions(target="cuda", max_seq_len=96))
    return checkpoint / "engine"


@pytest.fixture(scope="module")
def llm(engine: Path) -> Iterator[LLM]:
    """One for all tests: capturing takes the interpreter seconds, and a GEMV one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "MIXED_TOKENS", (16,))
        patch.setattr(runner, "PREPARED_SEQUENCES", 0)  # a step of one is captured on its way
        if interpreting():
            patch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
        with LLM(engine, enable_prefix_caching=False, **LIMITS) as llm:
            yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[RequestOutput]:
    return [llm.generate([prompt], greedy(logprobs=2))[0] for prompt in PROMPTS]


def reference(checkpoint: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities ``[T, vocab]`` by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def test_tokens_follow_transformers(checkpoint: Path, alone: list[RequestOutput]) -> None:
    for output in alone:
        completion = output.outputs[0]
        table = reference(checkpoint, [*output.prompt_token_ids, *completion.token_ids])
        rows = table[len(output.prompt_token_ids) - 1 : -1]
        assert completion.logprobs is not None and len(completion.token_ids) == 4
        for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            assert float(row.max() - row[token]) < 0.05
            assert entry.logprob == pytest.approx(float(row[token]), abs=0.05)
            assert entry.rank == 1 and len(entry.top) == 2


def test_a_batch_that_waits_and_is_padded_says_the_same(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    outputs = llm.generate(PROMPTS, greedy())
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in alone]
    assert llm.stats.kv_cache_usage == 0


def test_what_is_captured_between_requests_writes_to_nobodys_pages(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "MIXED_TOKENS", (16,))
    monkeypatch.setattr(runner, "PREPARED_SEQUENCES", 2)
    if interpreting():
        monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
    with LLM(engine, **LIMITS | {"max_batch_size": 4}) as llm:
        # A token of each page, and the last of each slot, are somebody's.
        first = llm.generate([list(range(40, 108))[:80]], greedy(max_tokens=2))[0]
        executor = llm._loop._engine.executor
        assert isinstance(executor, CUDAExecutor)
        memory = executor.runner.memory
        kept = [*memory.pages.values(), executor.runner._sampler.last_tokens]
        before = [each.view(torch.uint8).clone() for each in kept]
        count = 0
        while llm._loop.prepare():
            count += 1
        assert count == 3, "a decode of two, and its head in two kinds"
        after = [each.view(torch.uint8) for each in kept]
        assert all(map(torch.equal, before, after))
        again = llm.generate([list(range(40, 108))[:80]], greedy(max_tokens=2))[0]
    assert again.num_cached_tokens and again.outputs[0].token_ids == first.outputs[0].token_ids


@pytest.mark.parametrize("served", [(1,), (2,)])
def test_decodes_beside_prompts_say_the_same_with_their_kernel(
    engine: Path,
    alone: list[RequestOutput],
    served: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captured for as many as there are, and for more: a prompt is then among the first rows."""
    monkeypatch.setattr(buckets, "MIXED_TOKENS", (16,))
    monkeypatch.setattr(buckets, "MIXED_DECODES", served)
    monkeypatch.setattr(spared.Spared, "choose", lambda _self, wanted, *_: wanted)
    monkeypatch.setattr(runner, "PREPARED_SEQUENCES", 0)
    loaded: list[tuple[int, int, int]] = []
    load = inputs.StepInputs.load

    def noted(self: inputs.StepInputs, batch: StepBatch, shape: Shape, *rest: Any) -> None:  # noqa: ANN401
        if shape.rows:
            prompts = int((np.diff(batch.query_start) > 1).sum())
            loaded.append((rest[0].first, prompts, shape.decodes))
        load(self, batch, shape, *rest)

    monkeypatch.setattr(inputs.StepInputs, "load", noted)
    in_parts = in_torch() if interpreting() else nullcontext()
    with in_parts, LLM(engine, enable_prefix_caching=False, **LIMITS) as llm:
        outputs = llm.generate(PROMPTS, [greedy(max_tokens=count) for count in (4, 2, 4)])
    assert (1, 1, served[0]) in loaded, "a decode by its kernel, a prompt in blocks"
    for output, known in zip(outputs, alone, strict=True):
        said = output.outputs[0].token_ids
        assert said == known.outputs[0].token_ids[: len(said)]


def test_prompt_scores_come_from_the_host(checkpoint: Path, llm: LLM) -> None:
    """More rows than a batch has sequences, beside a request that the device samples."""
    scored, other = (greedy(max_tokens=2, prompt_logprobs=1), greedy(max_tokens=2))
    first = llm.generate([PROMPTS[0]], scored)[0]
    table = reference(checkpoint, [*PROMPTS[0], *first.outputs[0].token_ids])
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    for position, entry in enumerate(first.prompt_logprobs[1:]):
        assert entry is not None and entry.token_id == PROMPTS[0][position + 1]
        assert entry.logprob == pytest.approx(float(table[position, entry.token_id]), abs=0.05)
    both = llm.generate([PROMPTS[0], PROMPTS[1]], [scored, other])
    assert both[0].outputs[0].token_ids == first.outputs[0].token_ids
    assert len(both[1].outputs[0].token_ids) == 2


@pytest.mark.slow
def test_the_deterministic_mode_says_the_same_bits_alone_beside_others_and_in_chunks(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the interpreter can tell: its products of other tiles are other sums."""
    monkeypatch.setattr(buckets, "MIXED_TOKENS", (16,))
    monkeypatch.setattr(runner, "PREPARED_SEQUENCES", 0)
    params, found = greedy(logprobs=2, max_tokens=3), []
    for size in (16, 5):
        limits = LIMITS | {"max_num_tokens": size}
        with LLM(engine, deterministic=True, **limits) as llm:
            found += [llm.generate([PROMPTS[2]], params)[0], llm.generate([PROMPTS[2]], params)[0]]
            found.append(llm.generate([PROMPTS[1], PROMPTS[2]], params)[1])
    said = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in found]
    assert all(each == said[0] for each in said)


@pytest.mark.slow
def test_a_seed_says_the_same_in_any_company(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=11, max_tokens=4, ignore_eos=True, top_k=50)
    alone = llm.generate([PROMPTS[1]], params)[0].outputs[0].token_ids
    other = SamplingParams(temperature=0.7, seed=4, max_tokens=3, ignore_eos=True)
    assert llm.generate(PROMPTS[:2], [other, params])[1].outputs[0].token_ids == alone
    seeds = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=4, ignore_eos=True) for seed in (1, 2)
    ]
    first, second = (o.outputs[0].token_ids for o in llm.generate([PROMPTS[1]] * 2, seeds))
    assert first != second


def test_siblings_get_their_prompt_by_a_copy_of_its_page(llm: LLM) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 3}
    executor = llm._loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    moved, move = list[bool](), executor._move_pages

    def checked(moves: Sequence[Move]) -> None:
        move(moves)
        cache = executor.runner.memory.pages["kv_cache"]
        for _, source, target in moves:
            moved.append(torch.equal(cache[:, source], cache[:, target]))
            assert cache[:, source].any()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_move_pages", checked)
        (forked,) = llm.generate(PROMPTS[0], greedy(n=2, seed=3, **sampled))
    seeds = [child_seed(3, index) for index in range(2)]
    lonely = [llm.generate(PROMPTS[0], greedy(seed=seed, **sampled))[0] for seed in seeds]
    assert moved == [True]
    assert [each.token_ids for each in forked.outputs] == [o.outputs[0].token_ids for o in lonely]


def test_memory_for_no_page_is_refused(engine: Path) -> None:
    executor = load(engine, LIMITS).executor
    with pytest.raises(CapacityError, match=r"100 bytes of KV cache hold no page; one page takes"):
        executor.reserve_kv(100)
    executor.shutdown()


def test_more_memory_than_there_is_shrinks_with_a_message(
    engine: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = load(engine, LIMITS).executor
    assert isinstance(executor, CUDAExecutor)
    monkeypatch.setattr(executor, "_free_after_largest_step", lambda: 1 << 16)
    monkeypatch.setattr(executor.runner, "capture", lambda *_: None)
    page = bytes_per_token(open_engine(engine).manifest.caches) * 64
    with caplog.at_level(logging.WARNING):
        assert executor.reserve_kv(1 << 40) == ((1 << 16) + page) // page
    assert "the GPU has no more free" in caplog.text
    executor.shutdown()


class TestEnvironment:
    """One sentence and one remedy for a machine that cannot run the engine."""

    def test_no_torch(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(executors, "find_spec", lambda name: None if name == "torch" else 1)
        with pytest.raises(MissingDependencyError, match=r"needs torch, .* 'slipstream\[cuda\]'"):
            load(engine, LIMITS)

    def test_torch_without_cuda(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_device, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(EngineMismatchError, match="was built without CUDA: install torch"):
            cuda_device.require(open_engine(engine).manifest)

    def test_driver_too_old(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def init() -> None:
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

        monkeypatch.setattr(cuda_device, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "init", init)
        with pytest.raises(EngineMismatchError, match=r"is too old .* update the driver for CUDA"):
            cuda_device.require(open_engine(engine).manifest)

    def test_gpu_too_old(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_device, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
        with pytest.raises(
            EngineMismatchError, match=r"needs a GPU of sm_89 or newer and this one \(NVIDIA A100"
        ):
            cuda_device.require(replace(open_engine(engine).manifest, capability="sm_89"))

    def test_weights_that_do_not_fit(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_device.Device, "free_memory", lambda self: 10)
        with pytest.raises(CapacityError, match=r"the GPU has 0 MiB free; stop what else uses it"):
            load(engine, LIMITS)


def test_a_contract_of_more_than_the_kernels_run_is_refused(tmp_path: Path) -> None:
    manifest = save_engine(tmp_path)
    graph = ir.load(tmp_path / "target.onnx").graph
    with pytest.raises(EngineMismatchError, match="graphs target, draft, caches kv, sum and outp"):
        CUDAExecutor.from_weights(manifest, RuntimeConfig(), graph, {})
