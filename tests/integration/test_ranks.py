"""Engines of several ranks compute what one device does: every family, every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.integration.test_architectures import CONFIGS
from tests.integration.test_quantized_engines import SCHEMES
from tests.quantized_models import MemoryCheckpoint, quantized_llama
from tests.rank_threads import run_in_chunks
from tests.tiny_models import save_tiny

from slipstream.builder import build as builder
from slipstream.builder.options import BuildOptions

Logits = NDArray[np.float32]
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, 75))
# One of each family, with what ranks have to share in it; the others are slow.
FAMILIES = (
    "cohere2-untied-biases", "glm4", "granite-tied-biases", "llama-biases", "mistral-window",
    "ministral-both", "ministral3", "olmo2-tied-biases", "olmo3", "phi3", "qwen2", "qwen3",
    "mixtral", "qwen3-moe-dense-layers", "qwen2-moe", "olmoe-clipped", "flex-olmo",
    "granitemoeshared", "granitemoehybrid", "glm4-moe", "ernie4-5-moe", "gpt-oss", "smollm3",
    "gemma", "gemma2", "gemma3-ropes", "gemma4-shared-wide-cap", "gemma4-experts",
)  # fmt: skip
OTHERS = tuple(name for name in CONFIGS if name not in FAMILIES)
# Heads of keys that 4 ranks have twice each.
BY_FOUR = ("llama-tied", "olmo2", "gpt-oss-full")


def logits(source: Any, directory: Path, **options: Any) -> Logits:  # noqa: ANN401
    """Of an engine that is built of a checkpoint, on disk or in memory."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(source, MemoryCheckpoint):
            patch.setattr(builder, "open_checkpoint", lambda _, strict: source)
        builder.build(str(directory / "source"), directory / "engine", BuildOptions("cpu", **options))
    return run_in_chunks(directory / "engine", PROMPTS)


def assert_alike(made: Logits, expected: Logits, tolerance: float) -> None:
    """Close, and the same greedy token at every position."""
    assert np.abs(made - expected).max() < tolerance * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_array_equal(made.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *((name, 2) for name in FAMILIES),
        *((name, 4) for name in BY_FOUR),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_families(name: str, ranks: int, tmp_path: Path) -> None:
    save_tiny(CONFIGS[name], tmp_path / "source")
    one = logits(None, tmp_path)
    assert_alike(logits(None, tmp_path, tp_size=ranks), one, 1e-4)


@pytest.mark.parametrize("plugin", ["auto", "disable"])
@pytest.mark.parametrize("name", SCHEMES)
def test_formats(name: str, plugin: str, tmp_path: Path) -> None:
    if plugin == "disable" and "of 16" in name and "zero" in name:
        pytest.skip("one device refuses them")
    checkpoint = quantized_llama(SCHEMES[name])
    options: dict[str, Any] = {"gemm_plugin": plugin, "kv_cache_dtype": "float32"}
    one = logits(checkpoint, tmp_path, **options)
    two = logits(checkpoint, tmp_path, tp_size=2, **options)
    print(name, plugin, np.abs(one - two).max() / np.abs(one).max(), (one.argmax(-1) != two.argmax(-1)).sum())
