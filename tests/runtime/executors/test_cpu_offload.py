"""An engine on the CPU with few pages, which keeps the others on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import save_tiny

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions, KVCacheDtype
from slipstream.errors import CapacityError, EngineMismatchError, InvalidRequestError
from slipstream.runtime.config import RuntimeConfig

PAGE_BYTES = 32 * 3 * 2 * 2 * 16 * 4  # tokens, layers, k and v, heads, elements, bytes of float32
# Of integers, and a scale a token and head.
NARROW_BYTES = {"int8": PAGE_BYTES * 5 // 16, "k16v8": PAGE_BYTES * 7 // 16}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
PROMPTS = [[first + i % 9 for i in range(80)] for first in (2, 20, 40)]
Answer = list[tuple[int, float]]


def answers(engine: Path, pages: int, rounds: int = 1, **options: Any) -> tuple[list[Answer], Any]:  # noqa: ANN401
    """Tokens and log probabilities of the prompts, one after the other, and the statistics."""
    told = []
    with LLM(engine, num_threads=1, kv_cache_bytes=pages, **options) as llm:
        for prompt in PROMPTS * rounds:
            (output,) = llm.generate([prompt], GREEDY)
            completion = output.outputs[0]
            scores = completion.logprobs or []
            told.append([(each.token_id, each.logprob) for each in scores])
        return told, llm.stats


def gib(num_bytes: int) -> float:
    return num_bytes / (1 << 30)


@pytest.fixture(params=["float32", "int8", "k16v8", "window"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Pages of one array, of two, and of two groups of caches."""
    kind: str = request.param
    config = CONFIGS["gemma2" if kind == "window" else "llama"]
    dtype: KVCacheDtype = "auto" if kind == "window" else kind  # type: ignore[assignment]
    limits = {"max_batch_size": 2, "max_num_tokens": 64, "max_seq_len": 128}
    options = BuildOptions(target="cpu", kv_cache_dtype=dtype, **limits)  # type: ignore[arg-type]
    build(save_tiny(config, tmp_path / "checkpoint"), tmp_path / kind, options)
    return tmp_path / kind


def test_answers_are_those_of_a_cache_with_room_to_the_bit(engine: Path) -> None:
    roomy, _ = answers(engine, 64 * PAGE_BYTES, 2)
    page = NARROW_BYTES.get(engine.name, PAGE_BYTES)
    tight, stats = answers(engine, 5 * page, 2, kv_offload_gib=gib(64 * PAGE_BYTES))
    assert tight == roomy
    assert stats.host_hits and stats.loaded.num_bytes and stats.stored.num_bytes
    assert stats.loaded.seconds > 0 and stats.stored.seconds > 0


def test_a_file_survives_the_engine(tiny_engine: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "kv_offload_gib": gib(64 * PAGE_BYTES),
        "kv_offload_path": str(tmp_path / "kv"),
    }
    before, _ = answers(tiny_engine, 16 * PAGE_BYTES, **options)
    after, stats = answers(tiny_engine, 16 * PAGE_BYTES, **options)
    assert after == before
    assert stats.host_hits == len(PROMPTS) * 64


def test_a_file_of_pages_that_lie_otherwise_is_refused(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "kv_offload_gib": gib(64 * PAGE_BYTES),
        "kv_offload_path": str(tmp_path / "kv"),
    }
    answers(tiny_engine, 16 * PAGE_BYTES, **options)
    monkeypatch.setattr("slipstream.builder.engine.PAGE_LAYOUT", 0)
    with pytest.raises(EngineMismatchError, match="another engine"):
        answers(tiny_engine, 16 * PAGE_BYTES, **options)


def test_options_that_do_nothing_are_refused(tiny_engine: Path) -> None:
    with pytest.raises(CapacityError, match="raise --kv-offload-gib"):
        LLM(tiny_engine, kv_offload_gib=gib(PAGE_BYTES - 1))
    for options, reason in (
        ({"kv_offload_gib": -1.0}, "must be at least 0"),
        ({"kv_offload_gib": 1.0, "enable_prefix_caching": False}, "without prefix caching"),
        ({"kv_offload_path": "kv"}, "kv_offload_gib is 0"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            RuntimeConfig().override(options)
