"""Engines of several graphs, caches and outputs: what runs is what the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.executors.two_graphs import CACHES, EMBEDDING, PAGE, attention, save_engine

from slipstream.builder.contract import (
    KV,
    LOGITS,
    TARGET_GRAPH,
    CacheArray,
    CacheSpec,
    GraphSpec,
    Output,
    bytes_per_token,
    ports_of,
)
from slipstream.builder.engine import open_engine
from slipstream.errors import CapacityError, ExecutionError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import CompletionOutput
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine

GREEDY = SamplingParams(temperature=0)
Chunk = tuple[list[int], int, int]  # all tokens so far, how many of them are computed, the slot


def step(
    chunks: Sequence[Chunk],
    tables: Sequence[Sequence[int]],
    page: int,
    caches: Sequence[str] = (KV,),
    **options: object,
) -> StepBatch:
    """The last tokens of every sequence, whose pages of all ``caches`` are in ``tables`` by its
    slot."""
    counts = [count for _, count, _ in chunks]
    positions = np.concatenate([np.arange(len(t) - n, len(t)) for t, n, _ in chunks])
    table = np.array([tables[slot] for _, _, slot in chunks], np.int32)
    owners = np.repeat(np.arange(len(chunks)), counts)
    slots = np.array([slot for _, _, slot in chunks], np.int32)
    mapping = table[owners, positions // page] * page + positions % page
    paged = PagedInputs(table, mapping.astype(np.int32))
    return StepBatch(
        token_ids=np.array([t for tokens, n, _ in chunks for t in tokens[-n:]], np.int32),
        positions=positions.astype(np.int32),
        query_start=np.cumsum([0, *counts]).astype(np.int32),
        context_len=np.array([len(tokens) for tokens, _, _ in chunks], np.int32),
        logits_rows=(np.cumsum(counts) - 1).astype(np.int32),
        sampling=[SamplingRow(GREEDY, tokens, [], seed=0) for tokens, _, _ in chunks],
        slots=slots,
        sampling_slots=slots,
        pages=dict.fromkeys(caches, paged),
        **options,  # type: ignore[arg-type]
    )


FIRST, SECOND = [3, 1, 4, 1, 5, 9, 2, 6] * 6, [2, 7, 1, 8]
TABLES = [[5, 2], [4, 3], [1, 0]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two-graphs")
    manifest = save_engine(path)
    read = open_engine(path).manifest
    assert replace(read, command=manifest.command) == manifest
    return path


@pytest.fixture
def executor(engine: Path) -> CPUExecutor:
    made = CPUExecutor(open_engine(engine), RuntimeConfig(max_batch_size=3, num_threads=1))
    assert made.reserve_kv(1 << 20) > 5
    return made


def run(
    executor: CPUExecutor, chunks: Sequence[Chunk], graph: str = TARGET_GRAPH
) -> list[np.ndarray]:
    """hidden and memory of every sequence in turn, checked against NumPy as far as it is known."""
    outputs = ("hidden", "memory") if graph == TARGET_GRAPH else ("hidden",)
    batch = step(chunks, TABLES, PAGE, graph=graph, outputs=outputs)
    result = executor.submit(batch).sample().result()
    assert list(result.outputs) == list(outputs)
    end = 0
    for index, (tokens, count, _) in enumerate(chunks):
        want = attention(tokens)
        begin, end = end, end + count
        np.testing.assert_allclose(result.outputs["hidden"][begin:end], want[-count:], atol=1e-4)
        assert result.token_ids[index] == (EMBEDDING @ want[-1]).argmax()
        if graph == TARGET_GRAPH:
            np.testing.assert_allclose(result.outputs["memory"][index], want.sum(0), atol=1e-3)
    return list(result.outputs.values())


def test_chunks_of_two_sequences_on_pages_and_states(executor: CPUExecutor) -> None:
    run(executor, [(FIRST[:20], 20, 0)])
    run(executor, [(SECOND[:3], 3, 2), (FIRST[:45], 25, 0)])
    run(executor, [(FIRST[:46], 1, 0), (SECOND, 1, 2)])
    run(executor, [(FIRST[:47], 1, 0)])


def test_a_slot_of_a_sequence_that_is_gone_begins_anew(executor: CPUExecutor) -> None:
    run(executor, [(FIRST[:20], 20, 1)])
    run(executor, [(SECOND, 4, 1)])


def test_a_second_graph_reads_what_the_first_has_written(executor: CPUExecutor) -> None:
    run(executor, [(FIRST[:40], 40, 0)])
    run(executor, [(FIRST[:41], 1, 0)], graph="draft")
    run(executor, [(FIRST[:41], 1, 0)])  # the state is the target's alone


def test_further_outputs_outlive_the_next_step(executor: CPUExecutor) -> None:
    first = run(executor, [(SECOND, 4, 1)])
    kept = [output.copy() for output in first]
    run(executor, [(FIRST[:4], 4, 0)])
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))


def test_what_is_not_asked_for_is_not_given(executor: CPUExecutor) -> None:
    result = executor.submit(step([(SECOND, 4, 1)], TABLES, PAGE)).sample().result()
    assert result.outputs == {} and len(result.token_ids) == 1
    logits = executor.logits(step([(SECOND, 4, 1)], TABLES, PAGE))
    assert logits.argmax() == result.token_ids[0]


def test_bytes_are_those_of_states_and_then_of_pages(engine: Path) -> None:
    executor = CPUExecutor(open_engine(engine), RuntimeConfig(max_batch_size=3, num_threads=1))
    states, page = 3 * 8 * 4, bytes_per_token(CACHES) * PAGE
    assert page == 2 * 8 * 4 * PAGE
    assert executor.reserve_kv(states + 2 * page) == 2
    assert executor.reserve_kv(states + 2 * page - 1) == 1
    with pytest.raises(CapacityError, match=f"no page beside {states} of states; one page takes"):
        executor.reserve_kv(states + page - 1)


# --- the counting model -------------------------------------------------------------------------


def counting(name: str, kind: str, window: int = 0) -> CacheSpec:
    array = CacheArray(f"{name}_array", "int32", (4,))
    if kind == "state":
        return CacheSpec(name, "state", (0,), (array,))
    return CacheSpec(name, "paged", (0,), (array,), 4, window)


COUNTED = (counting(KV, "paged"), counting("near", "paged", 6), counting("sum", "state"))
OUTPUTS = (Output(LOGITS, "float32", ("L", VOCAB_SIZE)), Output("hidden", "float32", ("T", 2)))
GRAPHS = {
    TARGET_GRAPH: GraphSpec("", tuple(ports_of(COUNTED)), OUTPUTS),
    "draft": GraphSpec("", tuple(ports_of(COUNTED[:1])), OUTPUTS),
}


@pytest.fixture
def counter() -> CountingExecutor:
    return CountingExecutor(8, GRAPHS, COUNTED)


COUNT_TABLES = [[7, 2, 3], [4, 5, 6]]
PROMPT = [10, 11, 12, 13, 14, 15, 16, 17, 18]


def counted(tokens: list[int], count: int, slot: int = 0, **options: object) -> StepBatch:
    return step([(tokens, count, slot)], COUNT_TABLES, 4, (KV, "near"), **options)


def test_the_counting_model_has_graphs_caches_and_outputs(counter: CountingExecutor) -> None:
    assert counter.submit(counted(PROMPT[:8], 8)).sample().result().token_ids == [18]
    for graph in ("draft", TARGET_GRAPH):
        result = (
            counter.submit(counted(PROMPT, 1, graph=graph, outputs=("hidden",))).sample().result()
        )
        assert result.token_ids == [19]
        assert result.outputs["hidden"].tolist() == [[18.0, 18.0]]


def test_a_state_is_of_its_slot(counter: CountingExecutor) -> None:
    counter.submit(counted(PROMPT[:8], 8)).sample().result()
    batch = counted(PROMPT, 1)
    batch.slots = batch.sampling_slots = np.array([1], np.int32)
    with pytest.raises(AssertionError, match="the state of sum is of another sequence"):
        counter.submit(batch)


@pytest.mark.parametrize(("column", "is_seen"), [(0, False), (1, True)])
def test_pages_behind_the_window_may_be_others(
    counter: CountingExecutor, column: int, is_seen: bool
) -> None:
    """The ninth token sees six: positions 3 to 8, of which the first page has one."""
    counter.submit(counted(PROMPT, 9)).sample().result()
    batch = counted([*PROMPT, 19], 1)
    paged = batch.pages["near"]
    table = paged.page_table.copy()
    table[0, column] = 0
    batch.pages = {**batch.pages, "near": PagedInputs(table, paged.slot_mapping)}
    if is_seen:
        with pytest.raises(AssertionError, match="pages of near hold another sequence"):
            counter.submit(batch)
    else:
        assert counter.submit(batch).sample().result().token_ids == [20]


def test_a_failed_step_leaves_garbage_in_every_cache(counter: CountingExecutor) -> None:
    counter.submit(counted(PROMPT[:8], 8)).sample().result()
    counter.fail_next = True
    with pytest.raises(ExecutionError):
        counter.submit(counted(PROMPT, 1)).sample().result()
    with pytest.raises(AssertionError, match="of another sequence"):
        counter.submit(counted(PROMPT, 1))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_the_loop_serves_such_a_contract(runs_ahead: bool) -> None:
    """Chunks, preemption and slots that others had, with everything verified in each step."""
    made = counting_engine(max_batch_size=4, max_num_tokens=8, enable_prefix_caching=False)
    executor = CountingExecutor(12, GRAPHS, COUNTED, runs_ahead=runs_ahead)
    engine: LoadedEngine = replace(made, executor=executor, caches=COUNTED)
    loop, factory = EngineLoop(engine), RequestFactory(engine)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for index in range(9):
        prompt = [(5 * index + i) % VOCAB_SIZE for i in range(3 + index)]
        loop.add_request(
            factory.request(prompt, params, request_id=str(index), output_kind="final")
        )
    finished: dict[str, CompletionOutput] = {}
    while loop.has_work:
        finished |= {o.request_id: o.outputs[0] for o in loop.step() if o.finished}
    assert loop.stats.num_preemptions > 0
    for index in range(9):
        last = 5 * index + 2 + index
        want = [(last + 1 + i) % VOCAB_SIZE for i in range(12)]
        assert finished[str(index)].token_ids == want
