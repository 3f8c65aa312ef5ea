"""Engines of several ranks on GPUs: natively where there are two, else in Triton's interpreter on
processes of the CPU."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_architectures import CONFIGS
from tests.mxfp4_models import save_mxfp4
from tests.runtime.executors.ranks.test_executor import until_ended
from tests.tiny_models import llama_tensors, save_llama, save_tiny

import slipstream
from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError, EngineMismatchError, ExecutionError
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.executors.cuda import buckets, runner
from slipstream.runtime.executors.cuda import device as cuda_device
from slipstream.runtime.executors.ranks.gpu.executor import CUDARankExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.loading import load
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.structured.output import StructuredOutput

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
GPUS = 8 if interpreting() else torch.cuda.device_count()
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LIMITS = {"max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 96, "kv_cache_bytes": 1 << 19}
PROMPTS = [[5, 6, 7, 8, 9, 10], [100, 3], list(range(40, 62))]
NEAR = 0.1  # of log probabilities: tokens that other sums may swap
# What a follower does before anything else: what ``conftest.py`` does here, and the tests below.
SITE = """
from tests.plugins.interpreter import repair
repair()
import torch
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.executors.cuda import buckets, runner
torch.set_num_threads(1)
buckets.MIXED_TOKENS, runner.PREPARED_SEQUENCES, tactics._GUESS_GEMV_TOKENS = (16,), 0, 0
"""
Engines = Callable[[int], Path]


def needs(ranks: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(ranks > GPUS, reason=f"needs {ranks} GPUs")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In the interpreter, few graphs and no GEMVs, here and in followers."""
    with pytest.MonkeyPatch.context() as patch:
        if interpreting():
            site = tmp_path_factory.mktemp("site")
            (site / "sitecustomize.py").write_text(SITE)
            root = Path(slipstream.__file__).parents[2]
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (site, root / "src", root))))
            patch.setattr(buckets, "MIXED_TOKENS", (16,))
            patch.setattr(runner, "PREPARED_SEQUENCES", 0)
            patch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
        yield


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """An engine of so many ranks, the same model each time, of a vocabulary that none divides."""
    directory = tmp_path_factory.mktemp("ranks")
    save_llama(directory / "model", llama_tensors(**SHAPE, vocab_size=321), **SHAPE, vocab_size=321)

    def engine(ranks: int) -> Path:
        path = directory / f"engine{ranks}"
        if not path.exists():
            build(directory / "model", path, BuildOptions("cuda", tp_size=ranks, max_seq_len=96))
        return path

    return engine


class Shared:
    """Engines that tests ask one after the other: each is loaded when it is asked, and stays for
    the next. Of several ranks a process has one at a time."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._open: dict[bool, tuple[object, LoadedEngine, LLM]] = {}

    def ask(self, ranks: int, *params: SamplingParams, **options: Any) -> list[RequestOutput]:  # noqa: ANN401
        """What an engine of so many ranks, with these options, answers to ``PROMPTS``."""
        key, several = (ranks, options), ranks > 1
        if several not in self._open or self._open[several][0] != key:
            self._close(several)
            engine = load(self._engines(ranks), {**LIMITS, **options})
            self._open[several] = key, engine, LLM.from_engine(engine)
        llm = self._open[several][2]
        return [output for each in params for output in llm.generate(PROMPTS, each)]

    def close(self) -> None:
        """Let go of all."""
        for several in list(self._open):
            self._close(several)

    def _close(self, several: bool) -> None:
        if several in self._open:
            _, engine, llm = self._open.pop(several)
            llm.shutdown()
            assert_ended(engine)


@pytest.fixture(scope="module")
def shared(engines: Engines) -> Iterator[Shared]:
    found = Shared(engines)
    yield found
    found.close()


@pytest.fixture
def alone(shared: Shared) -> None:
    """For tests that load engines of their own."""
    shared.close()


def assert_ended(engine: LoadedEngine) -> None:
    """The processes of ranks end because they are asked to."""
    if isinstance(engine.executor, CUDARankExecutor):
        until_ended(engine.executor.followers.processes)
        assert engine.executor.lost is None


def answers(engine: Path, *params: SamplingParams, **options: Any) -> list[RequestOutput]:  # noqa: ANN401
    loaded = load(engine, {**LIMITS, **options})
    with LLM.from_engine(loaded) as llm:
        made = [output for each in params for output in llm.generate(PROMPTS, each)]
    assert_ended(loaded)
    return made


def assert_alike(made: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """The same greedy tokens, up to one of two that nearly tie."""
    for output, other in zip(made, expected, strict=True):
        ours, theirs = output.outputs[0], other.outputs[0]
        assert ours.logprobs is not None and theirs.logprobs is not None
        entries = zip(ours.logprobs, theirs.logprobs, strict=True)
        for mine, one in entries:
            assert mine.logprob == pytest.approx(one.logprob, abs=NEAR)
            if mine.token_id != one.token_id:
                assert one.top[mine.token_id][0] > one.logprob - NEAR
                break


def greedy(**more: Any) -> SamplingParams:  # noqa: ANN401
    given = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 4, **more}
    return SamplingParams(**given)


@needs(2)
def test_answers_are_those_of_one_device(shared: Shared) -> None:
    assert_alike(shared.ask(2, greedy()), shared.ask(1, greedy()))


@needs(2)
def test_the_best_of_each_part_is_enough(shared: Shared) -> None:
    """Where nobody reads logits, they are not gathered; and a step in which somebody does takes the
    same tokens."""
    made = shared.ask(2, greedy(), greedy(logprobs=None))
    known, found = made[: len(PROMPTS)], made[len(PROMPTS) :]
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in known]


@pytest.mark.slow
@needs(2)
def test_a_seed_says_the_same_again(shared: Shared) -> None:
    """All ranks go on with what the first has drawn: else a second run would differ."""
    params = SamplingParams(temperature=1.0, seed=7, n=2, max_tokens=6, ignore_eos=True)
    first, second = (
        [c.token_ids for o in shared.ask(2, params) for c in o.outputs] for _ in range(2)
    )
    assert first == second and len({tuple(ids) for ids in first}) > 1


@pytest.mark.slow
@needs(2)
def test_what_requests_may_ask_for(shared: Shared) -> None:
    """Penalties, forms, scores of prompts, drafts of the host, and copies of pages."""
    asked = (
        greedy(repetition_penalty=1.5, logit_bias={7: 3.0}),
        greedy(structured=StructuredOutput(regex="[a-z ]+"), logprobs=4),
        greedy(prompt_logprobs=1, max_tokens=2),
        greedy(max_tokens=12),
    )
    options = {"speculative": "ngram", "enable_prefix_caching": True}
    one, two = (shared.ask(ranks, *asked, **options) for ranks in (1, 2))
    assert_alike(two, one)
    for ours, theirs in zip(two, one, strict=True):
        scores = zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True)
        for mine, other in scores:
            if mine is not None and other is not None:
                assert mine.logprob == pytest.approx(other.logprob, abs=NEAR)


@pytest.mark.slow
@needs(4)
def test_answers_of_four_ranks(shared: Shared) -> None:
    """Whose heads of keys and values two have each."""
    assert_alike(shared.ask(4, greedy()), shared.ask(1, greedy()))


@needs(2)
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (signal.SIGKILL, "rank 1 of 2 was killed by signal 9"),
        pytest.param(
            signal.SIGSTOP, "rank 1 of 2 has done nothing for 2 seconds", marks=pytest.mark.slow
        ),
    ],
    ids=["killed", "hung"],
)
@pytest.mark.usefixtures("alone")
def test_a_lost_rank_ends_requests(sent: int, reason: str, engines: Engines) -> None:
    async def ask(llm: AsyncLLM) -> AsyncIterator[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        while True:  # a GPU may have answered before the loss is seen
            async for output in llm.generate([5, 6, 7], params):
                yield output

    async def main() -> None:
        engine = load(
            engines(2), {**LIMITS, "step_timeout": 4.0 if sent == signal.SIGSTOP else 600}
        )
        executor = engine.executor
        assert isinstance(executor, CUDARankExecutor)
        (process,) = executor.followers.processes
        async with AsyncLLM.from_engine(engine) as llm:
            told = 0
            with pytest.raises(ExecutionError, match=reason):
                async for _ in ask(llm):
                    told += 1
                    if told == 2:
                        os.kill(process, sent)
            until_ended((process,))
            assert reason in str(llm.unhealthy)
            with pytest.raises(ExecutionError, match=reason):
                async for _ in ask(llm):
                    pass

    asyncio.run(asyncio.wait_for(main(), 300))


@needs(2)
@pytest.mark.usefixtures("alone")
def test_pages_that_no_rank_has_are_refused(engines: Engines) -> None:
    """As often as they are asked for: what was begun is let go of."""
    for _ in range(2):
        with pytest.raises(CapacityError, match="hold no page"):
            LLM(engines(2), **LIMITS | {"kv_cache_bytes": 64})


def test_too_few_gpus(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(EngineMismatchError, match=r"4 ranks, .* sees 3; .* --tp-size 2, or"):
        cuda_device.require(open_engine(engines(4)).manifest)


@pytest.mark.gpu
@needs(2)
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization": "int4_wo", "group_size": 32},
        {"quantization": "int8_wo", "group_size": 32},
        {"kv_cache_dtype": "fp8"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_formats_natively(options: dict[str, Any], tmp_path: Path) -> None:
    """Captured, where other sums of products of 8 bits are further apart; on two and on four."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    save_llama(tmp_path / "model", llama_tensors(**shape), **shape)
    assert_ranks_agree(tmp_path, [ranks for ranks in (2, 4) if ranks <= GPUS], **options)


@pytest.mark.gpu
@needs(2)
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "olmo2-tied-biases", "gemma2"])
def test_families_natively(name: str, tmp_path: Path) -> None:
    save_tiny(CONFIGS[name], tmp_path / "model")
    assert_ranks_agree(tmp_path, [2])


@pytest.mark.gpu
@needs(2)
@pytest.mark.usefixtures("alone")
def test_mxfp4_natively(tmp_path: Path) -> None:
    """Experts as gpt-oss ships them, of whose blocks ranks have parts. In float16: in bfloat16 two
    experts of one token tie, and other sums choose the other."""
    packed, _ = save_mxfp4(tmp_path, intermediate_size=256)
    packed.rename(tmp_path / "model")
    assert_ranks_agree(tmp_path, [ranks for ranks in (2, 4) if ranks <= GPUS], dtype="float16")


def assert_ranks_agree(directory: Path, ranks: Sequence[int], **options: Any) -> None:  # noqa: ANN401
    """Engines of the model in a directory answer on so many ranks what they do on one."""
    made = []
    for count in (1, *ranks):
        chosen = BuildOptions("cuda", tp_size=count, max_seq_len=96, **options)
        build(directory / "model", directory / f"engine{count}", chosen)
        made.append(answers(directory / f"engine{count}", greedy(max_tokens=12)))
    for found in made[1:]:
        assert_alike(found, made[0])


@pytest.mark.gpu
@needs(2)
def test_a_server_whose_rank_is_lost_ends(engines: Engines) -> None:
    """While steps are on their way, so that a kernel of the first rank waits for ever."""
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "slipstream.server.cli", "serve", str(engines(2))]
    command += ["--port", "0", "--kv-cache-bytes", str(1 << 26)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        log, address = "", None
        while address is None:
            line = server.stderr.readline()
            assert line, log
            log, address = log + line, re.search(r"http://\S+", line)
        url = f"{address[0]}/v1/completions"
        ended = threading.Event()
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()

        def ask() -> None:
            body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 80, "ignore_eos": True}).encode()
            while not ended.is_set():
                request = urllib.request.Request(url, body)
                request.add_header("Content-Type", "application/json")
                try:
                    urllib.request.urlopen(request, timeout=30).read()
                except OSError:
                    return

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        time.sleep(3)
        (follower,) = children(server.pid)
        os.kill(follower, signal.SIGKILL)
        try:
            assert server.wait(60) == 70
        finally:
            ended.set()
            server.kill()
        for client in clients:
            client.join(30)
        until_ended((follower, server.pid))


def children(process: int) -> list[int]:
    """Processes that one has started and that are Python's."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [c for c in found if "ranks.gpu.process" in Path(f"/proc/{c}/cmdline").read_text()]
