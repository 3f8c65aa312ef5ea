"""The executor of the CPU, and the engine loop on it, with a tiny engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.contract import CacheSpec
from slipstream.builder.engine import digest
from slipstream.builder.options import BuildOptions, KVCacheDtype
from slipstream.errors import CapacityError, ExecutionError, InvalidRequestError
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors import cpu
from slipstream.runtime.executors.cpu import CPUExecutor, useful_threads
from slipstream.runtime.loading import load
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import RequestFactory

PAGE_BYTES = 32 * 3 * 2 * 2 * 16 * 4  # tokens, layers, k and v, heads, elements, bytes of float32
LONG = list(range(2, 62))  # 60 tokens: two pages


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params})


class Harness:
    """An engine loop on the CPU whose pages are counted."""

    def __init__(self, engine: Path, **options: Any) -> None:  # noqa: ANN401
        self.loaded = load(engine, {"num_threads": 1, "kv_cache_bytes": 16 * PAGE_BYTES, **options})
        self.loop, self.factory = EngineLoop(self.loaded), RequestFactory(self.loaded)
        self.kv = self.loop.scheduler.kv
        self.outputs: dict[str, RequestOutput] = {}

    @property
    def executor(self) -> CPUExecutor:
        assert isinstance(self.loaded.executor, CPUExecutor)
        return self.loaded.executor

    def add(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        request = self.factory.request(prompt, params, request_id=name, output_kind="cumulative")
        self.loop.add_request(request)

    def step(self) -> None:
        self.outputs |= {output.request_id: output for output in self.loop.step()}
        running = [s.allocation for s in self.loop.scheduler.running if s.allocation]
        self.kv.check_invariants(running)

    def run(self) -> None:
        while self.loop.has_work:
            self.step()

    def tokens(self, name: str) -> list[int]:
        return self.outputs[name].outputs[0].token_ids

    def reason(self, name: str) -> str | None:
        return self.outputs[name].outputs[0].finish_reason

    def assert_idle(self) -> None:
        assert not self.loop.has_work
        assert self.kv.num_available == self.kv.num_pages
        self.kv.check_invariants([])


@pytest.fixture
def harness(tiny_engine: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(**options: Any) -> Harness:  # noqa: ANN401
        made.append(Harness(tiny_engine, **options))
        return made[-1]

    yield make
    for each in made:
        each.loop.shutdown()


@pytest.fixture(scope="module")
def expected(tiny_engine: Path) -> list[int]:
    """40 greedy tokens after ``LONG``."""
    with LLM(tiny_engine) as llm:
        return llm.generate(LONG, greedy(max_tokens=40))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("dtype", "page_bytes"),
    [
        *[("float32", PAGE_BYTES), ("float16", PAGE_BYTES // 2)],
        *[("int8", PAGE_BYTES * 5 // 16), ("k16v8", PAGE_BYTES * 7 // 16)],
    ],
)
def test_bytes_become_pages(
    tiny_checkpoint: Path,
    tmp_path: Path,
    dtype: KVCacheDtype,
    page_bytes: int,
) -> None:
    build(tiny_checkpoint, tmp_path / "engine", BuildOptions(kv_cache_dtype=dtype))
    executor = load(tmp_path / "engine", {"num_threads": 1}).executor
    for given, pages in [(page_bytes, 1), (2 * page_bytes - 1, 1), (3 * page_bytes, 3)]:
        assert executor.reserve_kv(given) == pages
    for given in (page_bytes - 1, 0, -5):
        with pytest.raises(CapacityError, match=f"{given} bytes .* one page takes {page_bytes} b"):
            executor.reserve_kv(given)
    executor.shutdown()


def test_by_default_the_cache_holds_what_the_limits_can_use(tiny_engine: Path) -> None:
    executor = load(tiny_engine, {"max_seq_len": 64, "max_batch_size": 5}).executor
    assert executor.reserve_kv(None) == 5 * 64 // 32
    executor.shutdown()


def test_three_pages_are_enough_to_serve_all_by_preemption(
    harness: Callable[..., Harness], expected: list[int]
) -> None:
    h = harness(kv_cache_bytes=3 * PAGE_BYTES, enable_prefix_caching=False)
    assert h.kv.num_pages == 3
    alone = harness()
    short = LONG[:20]
    alone.add("b", short, greedy(max_tokens=40))
    alone.run()
    h.add("a", LONG, greedy(max_tokens=30))
    h.add("b", short, greedy(max_tokens=40))
    h.run()
    assert h.loop.stats.num_preemptions > 0
    assert h.tokens("a") == expected[:30]
    assert h.tokens("b") == alone.tokens("b")
    h.assert_idle()


def test_what_could_never_run_is_refused(harness: Callable[..., Harness]) -> None:
    h = harness(kv_cache_bytes=PAGE_BYTES)
    with pytest.raises(CapacityError, match="60 prompt tokens and max_tokens 8 do not fit in the"):
        h.add("a", LONG, greedy())
    with pytest.raises(InvalidRequestError, match=r"the prompt has 512 tokens; .* 1 to 511"):
        h.add("a", [2] * 512, greedy())
    with pytest.raises(InvalidRequestError, match="prompt token ids range from 2 to 320; the voc"):
        h.add("a", [2, 320], greedy())
    h.add("a", LONG[:25], greedy())
    h.run()
    assert len(h.tokens("a")) == 8
    h.assert_idle()


# Steps before the abort, and tokens before it.
STAGES = {
    "waiting": (0, 0),
    "first chunk on its way": (1, 0),
    "mid-prefill": (3, 0),
    "prefill done": (0, 1),
    "decoding": (0, 3),
    "last token on its way": (0, 7),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [1, 2])
def test_abort_at_every_stage_gives_the_pages_back(
    harness: Callable[..., Harness], expected: list[int], stage: str, n: int
) -> None:
    """A prompt of 60 tokens in chunks of 16, then 8 tokens, beside a request that goes on."""
    h = harness(max_num_tokens=16, enable_prefix_caching=False)
    h.add("a", LONG, greedy(n=n))
    if n == 1:
        h.add("other", LONG[:3], greedy(max_tokens=20))
    steps, tokens = STAGES[stage]
    for _ in range(steps):
        h.step()
    while tokens and ("a" not in h.outputs or len(h.tokens("a")) < tokens):
        h.step()
    assert "a" not in h.outputs or not h.outputs["a"].finished
    h.loop.abort("a")
    h.run()
    assert h.reason("a") == "abort"
    assert h.tokens("a") == expected[:tokens]
    assert n == 2 or len(h.tokens("other")) == 20
    h.assert_idle()
    h.add("again", LONG, greedy())
    h.run()
    assert h.tokens("again") == expected[:8]


def test_a_step_that_fails_on_the_device_ends_its_requests_only(
    tiny_engine: Path, expected: list[int]
) -> None:
    """onnxruntime itself refuses a token outside the vocabulary, were one to come so far."""
    h = Harness(tiny_engine)
    unchecked = replace(h.loaded, vocab_size=1 << 20)
    h.loop, h.factory = EngineLoop(unchecked), RequestFactory(unchecked)
    h.kv = h.loop.scheduler.kv
    h.add("bad", [2, 5000, 3], greedy())
    h.add("beside", LONG[:4], greedy())
    h.step()
    h.add("later", LONG, greedy())
    h.run()
    for name in ("bad", "beside"):
        assert h.reason(name) == "error"
        error = h.outputs[name].error
        assert isinstance(error, ExecutionError)
        assert "the step failed in onnxruntime" in str(error) and "vocabulary" in str(error)
    assert h.tokens("later") == expected[:8]
    h.assert_idle()
    h.loop.shutdown()


def test_undefined_logits_are_a_failure(tiny_engine: Path, tmp_path: Path) -> None:
    """The last norm of this engine is undefined; nobody is handed a token made of that."""
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    file = engine / "weights.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])["model.norm.weight.float32"]["data_offsets"]
    data[start + begin : start + end] = np.full(64, np.nan, np.float32).tobytes()
    file.write_bytes(data)
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"][file.name] = digest(file)
    (engine / "engine.json").write_text(json.dumps(manifest))
    h = Harness(engine)
    for name, temperature in (("greedy", 0.0), ("random", 1.0)):
        h.add(name, LONG, greedy(temperature=temperature, logprobs=2))
        h.run()
        assert h.reason(name) == "error"
        assert "the largest logit of a row is nan" in str(h.outputs[name].error)
        h.assert_idle()
    h.loop.shutdown()


def test_a_failure_to_start_a_step_is_one_of_the_device_too(
    harness: Callable[..., Harness], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = harness()

    def fail(*_: object) -> None:
        raise MemoryError("no memory for the logits")

    with monkeypatch.context() as patch:
        patch.setattr(h.executor, "_binding", fail)
        h.add("a", LONG, greedy())
        h.run()
    assert h.reason("a") == "error" and "no memory for the logits" in str(h.outputs["a"].error)
    h.assert_idle()
    h.add("b", LONG, greedy())
    h.run()
    assert h.tokens("b") == expected[:8]


def test_the_python_api_raises_and_lives(tiny_engine: Path, expected: list[int]) -> None:
    loaded = replace(load(tiny_engine, {"num_threads": 1}), vocab_size=1 << 20)
    with LLM.from_engine(loaded) as llm:
        with pytest.raises(ExecutionError, match="a step failed on the device"):
            llm.generate([[2, 5000], LONG], greedy())
        assert llm.stats.kv_cache_usage == 0
        assert llm.generate(LONG, greedy())[0].outputs[0].token_ids == expected[:8]


def test_siblings_read_the_copy_of_their_leaders_page(
    harness: Callable[..., Harness], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = harness(enable_prefix_caching=False)
    page_size = h.loaded.config.page_size
    prompt = LONG
    assert len(prompt) % page_size > 1, "its last page is partial"
    h.add("alone", prompt, greedy())
    h.run()
    moves: list[Move] = []
    submit = h.executor.submit

    def record(batch: StepBatch) -> object:
        moves.extend(batch.moves)
        return submit(batch)

    monkeypatch.setattr(h.executor, "submit", record)
    h.add("n", prompt, greedy(n=3))
    h.run()
    assert len(moves) == 2
    tokens = [each.token_ids for each in h.outputs["n"].outputs]
    assert tokens == [h.tokens("alone")] * 3
    h.assert_idle()


def test_bindings_are_reused_by_steps_of_one_shape(harness: Callable[..., Harness]) -> None:
    h = harness(enable_prefix_caching=False)
    for name in "abc":
        h.add(name, LONG[:7], greedy(max_tokens=20))
        h.run()
    assert h.tokens("a") == h.tokens("b") == h.tokens("c")
    # A prefill of 7 tokens and a decode, both on one page.
    assert len(h.executor._bindings) == 2


def test_threads_do_not_change_the_tokens(tiny_engine: Path, expected: list[int]) -> None:
    for threads in (1, 2, 3):
        with LLM(tiny_engine, num_threads=threads) as llm:
            tokens = llm.generate(LONG, greedy(max_tokens=40))[0].outputs[0].token_ids
        assert tokens == expected


@pytest.mark.parametrize(
    ("megabytes", "layers", "threads"),
    [(0, 2, 1), (97, 30, 8), (600, 16, 64), (4600, 32, 64), (97, 0, 64)],
)
def test_a_small_model_takes_few_threads(
    megabytes: int, layers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "usable_cores", lambda: 64)
    caches = [CacheSpec("kv", "paged", tuple(range(layers)), ())] if layers else []
    assert useful_threads(megabytes * 10**6, caches) == threads
    monkeypatch.setattr(cpu, "usable_cores", lambda: 2)
    assert useful_threads(megabytes * 10**6, caches) == min(threads, 2)


@pytest.mark.parametrize("num_bytes", [1 << 46, 1 << 62, 1 << 80])
def test_memory_that_cannot_be_had_is_refused(tiny_engine: Path, num_bytes: int) -> None:
    with pytest.raises(CapacityError, match=rf"^{num_bytes} bytes of KV cache cannot be had"):
        LLM(tiny_engine, kv_cache_bytes=num_bytes)


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_text_is_the_text(tiny_engine: Path, n: int) -> None:
    """Random byte-level tokens: most are pieces of characters that never become whole."""
    with LLM(tiny_engine, num_threads=1) as llm:
        for seed in range(20):
            params = SamplingParams(
                temperature=2.0, max_tokens=60, seed=seed, n=n, ignore_eos=True,
                stop=["he"] if seed % 3 == 0 else [],
            )  # fmt: skip
            whole = llm.generate("the quick", params)[0]
            pieces = [""] * n
            tokens: list[list[int]] = [[] for _ in range(n)]
            for output in llm.stream("the quick", params, output_kind="delta"):
                for completion in output.outputs:
                    pieces[completion.index] += completion.text
                    tokens[completion.index] += completion.token_ids
            *_, last = llm.stream("the quick", params)
            assert pieces == [c.text for c in whole.outputs] == [c.text for c in last.outputs]
            assert tokens == [c.token_ids for c in whole.outputs]
            assert n == 1 or tokens[0] != tokens[1]


def test_logprobs_are_those_of_transformers(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=7, logprobs=5, prompt_logprobs=3,
                            ignore_eos=True)  # fmt: skip
    with LLM(tiny_engine, max_num_tokens=16) as llm:
        outputs = llm.generate([LONG, LONG[:5], LONG[3:40]], params)
    for output in outputs:
        completion = output.outputs[0]
        tokens = output.prompt_token_ids + completion.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        table = torch.log_softmax(logits.double(), -1).numpy()
        assert output.prompt_logprobs is not None and completion.logprobs is not None
        first, *scores = output.prompt_logprobs + list(completion.logprobs)
        assert first is None and len(scores) == len(tokens) - 1
        for position, (score, token) in enumerate(zip(scores, tokens[1:], strict=True)):
            assert score is not None and score.token_id == token
            row = table[position]
            assert score.logprob == pytest.approx(row[token], abs=2e-4)
            assert abs(score.rank - 1 - int((row > row[token]).sum())) <= 1
            count = 3 if position < len(output.prompt_token_ids) - 1 else 5
            assert [rank for _, rank in score.top.values()] == list(range(1, count + 1))
            best = np.sort(row)[::-1][:count]
            values = [value for value, _ in score.top.values()]
            np.testing.assert_allclose(values, best, atol=2e-4)
            for other, (value, _) in score.top.items():
                assert value == pytest.approx(row[other], abs=2e-4)
        total = sum(score.logprob for score in completion.logprobs)
        assert completion.cumulative_logprob == pytest.approx(total)
