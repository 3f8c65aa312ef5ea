"""Bits of a request do not depend on what it runs beside, nor on how it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import EngineMismatchError

# Over several parts of the keys, and several pages.
PROMPT = [5 + i * i % 90 for i in range(300)]
OTHERS = [[7 + (i + n) % 80 for i in range(n)] for n in (3, 20, 40, 64, 90)]
OWN = SamplingParams(temperature=0.9, seed=7, max_tokens=16, ignore_eos=True, logprobs=4)
OTHER = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PAGE_BYTES = 3 * 2 * 2 * 16 * 32 * 4  # of the tiny model


def open_llm(engine: Path, **options: Any) -> LLM:  # noqa: ANN401 - fields differ
    limits = {"max_batch_size": 64, "max_num_tokens": 512, "max_seq_len": 400}
    return LLM(engine, deterministic=True, **{**limits, "kv_cache_bytes": 16 << 20, **options})


def bits(llm: LLM, *, others: int = 0, own: SamplingParams = OWN) -> list[object]:
    """Tokens and log probabilities of a request that comes behind others."""
    prompts = [OTHERS[i % len(OTHERS)] for i in range(others)]
    output = llm.generate([*prompts, PROMPT], [*[OTHER] * others, own])[-1]
    completion = output.outputs[0]
    return [completion.token_ids, completion.logprobs, output.prompt_logprobs]


@pytest.fixture(scope="module")
def alone(tiny_engine: Path) -> list[object]:
    with open_llm(tiny_engine) as llm:
        return bits(llm)


def test_among_many(tiny_engine: Path, alone: list[object]) -> None:
    with open_llm(tiny_engine, num_threads=2) as llm:
        assert bits(llm, others=63) == alone


def test_behind_a_prefix_that_is_there(tiny_engine: Path, alone: list[object]) -> None:
    with open_llm(tiny_engine) as llm:
        assert [bits(llm), bits(llm)] == [alone, alone]
        assert llm.generate([PROMPT], OWN)[0].num_cached_tokens >= 256


@pytest.mark.parametrize("size", [1, 7, 64])
def test_in_chunks(tiny_engine: Path, alone: list[object], size: int) -> None:
    with open_llm(tiny_engine, max_num_tokens=size, max_batch_size=1) as llm:
        assert bits(llm) == alone


def test_when_its_pages_are_taken_and_computed_again(
    tiny_engine: Path, alone: list[object]
) -> None:
    memory = {"kv_cache_bytes": 17 * PAGE_BYTES, "enable_prefix_caching": False}
    with open_llm(tiny_engine, **memory) as llm:
        assert bits(llm, others=4) == alone
        assert llm.stats.num_preemptions > 0


def test_scores_of_a_prompt(tiny_engine: Path) -> None:
    own = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=3)
    with open_llm(tiny_engine) as llm:
        whole, among = bits(llm, own=own), bits(llm, own=own, others=9)
    with open_llm(tiny_engine, max_num_tokens=13, max_batch_size=1) as llm:
        assert [among, bits(llm, own=own)] == [whole, whole]


def test_products_of_onnxruntime_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    build(tiny_checkpoint, tmp_path / "engine", BuildOptions(gemm_plugin="disable"))
    with pytest.raises(EngineMismatchError, match=r"Gemm.*--gemm-plugin auto"):
        open_llm(tmp_path / "engine")
