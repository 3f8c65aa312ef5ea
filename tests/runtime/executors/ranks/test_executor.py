"""Engines of several ranks as processes: what they answer, and what happens when one is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.tiny_models import llama_tensors, save_llama

import slipstream
from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError, ExecutionError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.executors.ranks.executor import RankExecutor
from slipstream.runtime.loading import load
from slipstream.runtime.structured.output import StructuredOutput

PROMPTS = ["the quick brown fox", "the cat sat on the mat " * 8, "jumps"]
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
# Of an engine that is built here; what it does is proven in tests/integration/test_ranks.py.
OPTIONS = {"max_num_tokens": 64, "kv_cache_bytes": 4 << 20}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """An engine of so many ranks, the same model each time."""
    directory = tmp_path_factory.mktemp("ranks")
    save_llama(directory / "model", llama_tensors())

    def engine(ranks: int) -> Path:
        path = directory / f"engine{ranks}"
        if not path.exists():
            build(directory / "model", path, BuildOptions("cpu", tp_size=ranks))
        return path

    yield engine


def answers(engine: Path, *params: SamplingParams) -> list[tuple[list[int], str]]:
    loaded = load(engine, {**OPTIONS, "speculative": "ngram"})
    with LLM.from_engine(loaded) as llm:
        made = [
            (completion.token_ids, completion.text)
            for each in params
            for output in llm.generate(PROMPTS, each)
            for completion in output.outputs
        ]
    if isinstance(loaded.executor, RankExecutor):
        until_ended(loaded.executor.group.processes)
        assert loaded.executor.lost is None, "they were asked to end"
    return made


def test_answers_are_those_of_one_device(engines: Callable[[int], Path]) -> None:
    """Greedy and seeded ones, prefixes from the cache, copied pages, drafts and forms."""
    asked = (
        SamplingParams(temperature=0, max_tokens=24),
        SamplingParams(temperature=0.9, seed=7, n=2, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=12, structured=StructuredOutput(regex="[a-z ]+")),
    )
    one = answers(engines(1), *asked)
    assert answers(engines(2), *asked) == one


def test_ranks_are_started_where_python_is_embedded(
    engines: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Triton's stub, whose own program must not be started once more."""
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\nexit 3\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    assert answers(engines(2), SamplingParams(temperature=0, max_tokens=2))


@pytest.mark.slow
def test_answers_of_four_ranks(engines: Callable[[int], Path]) -> None:
    asked = SamplingParams(temperature=0, max_tokens=24)
    assert answers(engines(4), asked) == answers(engines(1), asked)


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_ended(processes: tuple[int, ...]) -> None:
    for _ in range(6000):
        if not any(map(running, processes)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{[p for p in processes if running(p)]} still run")


@pytest.mark.parametrize(
    ("sent", "options", "reason"),
    [
        (signal.SIGKILL, {}, "rank 1 of 2 was killed by signal 9"),
        (signal.SIGSTOP, {"step_timeout": 4.0}, "rank 1 of 2 has done nothing for 2 seconds"),
    ],
    ids=["killed", "hung"],
)
def test_a_lost_rank_ends_requests_and_the_other_ranks(
    sent: int, options: dict[str, float], reason: str, engines: Callable[[int], Path]
) -> None:
    async def main() -> None:
        engine = load(engines(2), {**OPTIONS, **options})
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        processes = executor.group.processes
        async with AsyncLLM.from_engine(engine) as llm:
            told = 0
            with pytest.raises(ExecutionError, match=reason):
                async for _ in llm.generate("the cat", LONG):
                    told += 1
                    if told == 2:
                        os.kill(processes[1], sent)
            until_ended(processes)
            assert reason in str(llm.unhealthy)
            with pytest.raises(ExecutionError, match=reason):
                async for _ in llm.generate("the cat", LONG):
                    pass

    asyncio.run(asyncio.wait_for(main(), 300))


def test_a_rank_that_is_lost_while_nobody_asks_is_noticed(engines: Callable[[int], Path]) -> None:
    async def main() -> None:
        engine = load(engines(2), OPTIONS)
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        async with AsyncLLM.from_engine(engine) as llm:
            assert llm.unhealthy is None
            os.kill(executor.group.processes[0], signal.SIGKILL)
            until_ended(executor.group.processes)
            while llm.unhealthy is None:
                await asyncio.sleep(0.01)
            assert "rank 0 of 2 was killed by signal 9" in llm.unhealthy

    asyncio.run(asyncio.wait_for(main(), 300))


def test_pages_that_no_rank_has_are_refused(engines: Callable[[int], Path]) -> None:
    with pytest.raises(CapacityError, match="hold no page"):
        LLM(engines(2), kv_cache_bytes=64)


def test_ranks_take_no_module_from_the_working_directory(
    engines: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a stranger's engine."""
    engine = engines(2)
    (tmp_path / "numpy.py").write_text("raise SystemExit('this is not numpy')")
    monkeypatch.setenv("PYTHONPATH", str(Path(slipstream.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    load(engine, OPTIONS).executor.shutdown()


_PROGRAM = """
import sys
from slipstream.runtime.loading import load
engine = load(sys.argv[1], {})
print(*engine.executor.group.processes, flush=True)
sys.stdin.read()
"""


def test_ranks_end_with_the_process_of_their_engine(engines: Callable[[int], Path]) -> None:
    command, pipe = [sys.executable, "-c", _PROGRAM, str(engines(2))], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        ranks = tuple(map(int, child.stdout.readline().split()))
        assert len(ranks) == 2 and all(map(running, ranks))
        child.kill()
    until_ended(ranks)
