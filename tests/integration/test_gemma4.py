"""The engine loop on layers that read the keys and values of others, some within a window: greedy
tokens are those of transformers, however the work is scheduled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.test_architectures import CONFIGS, PROMPT_TOKENS, run_in_chunks
from tests.runtime.executors.test_cpu import Harness, greedy
from tests.tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from slipstream.builder.build import build
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions

TOKENS = 24
LENGTHS = (60, 70, 5, 33)  # of prompts: some reach over the window of 17, and over pages of 32
PROMPTS = [np.random.default_rng(n).integers(2, 320, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma4")
    return save_tiny(CONFIGS["gemma4-shared"], directory / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    build(checkpoint, checkpoint.parent / "engine", BuildOptions())
    return checkpoint.parent / "engine"


@pytest.fixture(scope="module")
def expected(checkpoint: Path, engine: Path) -> list[list[int]]:
    """The tokens of each prompt alone, which transformers finds the most likely, too."""
    tokens = [serve(engine, [prompt], enable_prefix_caching=False)[0][0] for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return tokens


def serve(
    engine: Path,
    prompts: list[list[int]],
    **options: Any,  # noqa: ANN401
) -> tuple[list[list[int]], Harness]:
    """The answers to prompts that come together."""
    harness = Harness(engine, **{"kv_cache_bytes": 1 << 22, **options})
    for i, prompt in enumerate(prompts):
        harness.add(str(i), prompt, greedy(max_tokens=TOKENS))
    harness.run()
    harness.assert_idle()
    harness.loop.shutdown()
    return [harness.tokens(str(i)) for i in range(len(prompts))], harness


def test_layers_that_share_have_no_pages_of_their_own(engine: Path) -> None:
    caches = open_engine(engine).manifest.caches
    layers = {cache.name: (cache.layers, cache.window) for cache in caches}
    assert layers == {"kv": ((2,), 0), "window": ((0, 1), 17)}


def test_tokens_are_the_same_in_a_batch_and_in_chunks(
    engine: Path, expected: list[list[int]]
) -> None:
    assert serve(engine, PROMPTS, enable_prefix_caching=False)[0] == expected
    assert serve(engine, PROMPTS, max_num_tokens=16)[0] == expected


def test_a_prefix_of_both_groups_is_hit(engine: Path, expected: list[list[int]]) -> None:
    harness = Harness(engine, kv_cache_bytes=1 << 22)
    for name in ("first", "again"):
        harness.add(name, PROMPTS[1], greedy(max_tokens=TOKENS))
        harness.run()
        assert harness.tokens(name) == expected[1]
    assert harness.outputs["first"].num_cached_tokens == 0
    assert harness.outputs["again"].num_cached_tokens == 64
    harness.loop.shutdown()


@pytest.mark.parametrize("caching", [True, False])
def test_what_was_preempted_goes_on(engine: Path, expected: list[list[int]], caching: bool) -> None:
    page_bytes = sum(cache.bytes_per_page for cache in open_engine(engine).manifest.caches)
    tokens, harness = serve(
        engine, PROMPTS, kv_cache_bytes=5 * page_bytes, enable_prefix_caching=caching
    )
    assert harness.loop.stats.num_preemptions > 0
    assert tokens == expected


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"quantization": "int8_wo", "group_size": 32}, 0.12),
        ({"kv_cache_dtype": "int8"}, 0.05),
        ({"kv_cache_dtype": "float16"}, 0.003),
    ],
    ids=str,
)
def test_what_rounding_costs(
    checkpoint: Path, options: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    """Scores are not scaled, so they double what other families show of it."""
    prompts = np.random.default_rng(0).integers(0, 320, (2, PROMPT_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        exact = model(torch.tensor(prompts)).logits.numpy()
    build(checkpoint, tmp_path / "engine", BuildOptions(**options))
    found = run_in_chunks(tmp_path / "engine", prompts)
    assert np.linalg.norm(found - exact) < limit * np.linalg.norm(exact)
