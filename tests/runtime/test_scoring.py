from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import save_tiny

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError, EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.loading import load
from slipstream.runtime.scoring import window_logits
from slipstream.runtime.testing import counting_engine


def windows(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 320, length).astype(np.int32) for length in lengths]


def logits_of(
    engine: Path, given: Sequence[NDArray[np.int32]], options: Mapping[str, Any]
) -> list[NDArray[np.float32]]:
    return list(window_logits(load(engine, {"kv_cache_bytes": 1 << 20, **options}), given))


def test_logits_are_those_that_score_prompts(tiny_engine: Path) -> None:
    (window,) = given = windows(70)
    (logits,) = logits_of(tiny_engine, given, {})
    with LLM(tiny_engine, kv_cache_bytes=1 << 20) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([window.tolist()], params)
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert output.prompt_logprobs is not None
    for position, scored in enumerate(output.prompt_logprobs[1:]):
        assert scored is not None
        expected = log_p[position, window[position + 1]]
        assert scored.logprob == pytest.approx(expected, abs=1e-5)
    assert output.outputs[0].token_ids == [int(logits[-1].argmax())]


def test_chunks_change_nothing(tiny_engine: Path) -> None:
    given = windows(150, 3, 97)
    whole = logits_of(tiny_engine, given, {})
    chunked = logits_of(tiny_engine, given, {"max_num_tokens": 64})
    assert [len(block) for block in whole] == [150, 3, 97]
    assert [len(block) for block in chunked] == [64, 64, 22, 3, 64, 33]
    np.testing.assert_allclose(np.concatenate(chunked), np.concatenate(whole), atol=1e-4)


def test_a_cache_with_a_window_lends_the_pages_that_a_batch_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turn: of the five pages that a text has, no more than three are ever wanted."""
    checkpoint = save_tiny(CONFIGS["gemma4-shared"], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions())
    given = windows(150)
    whole = logits_of(tmp_path / "engine", given, {})
    named = list[tuple[int, int]]()
    run = CPUExecutor.logits

    def spied(self: CPUExecutor, batch: StepBatch) -> NDArray[np.float32]:
        tables = [batch.pages[name].page_table for name in ("kv", "window")]
        named.append((int(tables[0].max()), int(tables[1].max())))
        return run(self, batch)

    monkeypatch.setattr(CPUExecutor, "logits", spied)
    limits = {"max_num_tokens": 16, "max_batch_size": 1}
    chunked = logits_of(tmp_path / "engine", given, limits)
    assert max(far for far, _ in named) == 4 and max(near for _, near in named) == 2
    np.testing.assert_allclose(np.concatenate(chunked), np.concatenate(whole), atol=1e-3)


def test_blocks_outlive_the_step(tiny_engine: Path) -> None:
    given = windows(40, 40)
    blocks = logits_of(tiny_engine, given, {})
    (alone,) = logits_of(tiny_engine, given[:1], {})
    np.testing.assert_array_equal(blocks[0], alone)
    assert not np.array_equal(blocks[0], blocks[1])


def test_what_cannot_be_scored(tiny_engine: Path) -> None:
    with pytest.raises(InvalidRequestError, match="513 tokens, but max_seq_len is 512"):
        logits_of(tiny_engine, windows(513), {})
    page = 32 * 768
    with pytest.raises(CapacityError, match="holds 64 tokens, a window has 65"):
        logits_of(tiny_engine, windows(65), {"kv_cache_bytes": 2 * page})
    with pytest.raises(EngineMismatchError, match="does not show logits"):
        list(window_logits(counting_engine(), windows(4)))


@pytest.mark.gpu
def test_a_gpu_engine_is_scored_by_its_own_kernels(
    tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.plugins.linear.cuda import tactics
    from slipstream.runtime.executors.cuda.runner import StepRunner

    # Steps run kernel by kernel here, and without GEMVs, which take the interpreter a second each.
    monkeypatch.setattr(StepRunner, "capture", lambda *_: None)
    monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
    limits = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 128}
    build(tiny_checkpoint, tmp_path / "engine", BuildOptions(target="cuda", dtype="float16"))
    given = windows(40, 24)
    blocks = logits_of(tmp_path / "engine", given, limits)
    assert [len(block) for block in blocks] == [32, 8, 24]
    expected = np.concatenate(logits_of(tiny_engine, given, {}))
    found = np.concatenate(blocks)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
