"""Engines of several ranks for GPUs compute what one GPU does: every format, families that share
in ways that differ; in Triton's interpreter, or on one GPU natively for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.cuda_rank_threads import logits_of_ranks
from tests.integration.test_architectures import CONFIGS
from tests.integration.test_quantized_engines import SCHEMES
from tests.integration.test_quantized_experts import FORMATS, quantized
from tests.integration.test_ranks import some
from tests.quantized_models import MemoryCheckpoint, quantized_llama
from tests.tiny_models import llama_tensors, save_llama, save_tiny

from slipstream.builder import build as builder
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not interpreting(), reason="ranks are threads, which share no GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
Logits = NDArray[np.float32]
CHUNKS = (17, 3)
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, sum(CHUNKS)))
# Norms of differences over those of logits: of sums in parts and in bfloat16, and what these make
# of an x that is rounded to 8 bits.
ROUNDING, CODES = 0.03, 0.06


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GEMVs, which take the interpreter a second each."""
    monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
    yield


def logits(source: MemoryCheckpoint | None, directory: Path, **options: Any) -> Logits:  # noqa: ANN401
    """Of an engine that is built of a checkpoint, in memory or in the folder ``source``."""
    with pytest.MonkeyPatch.context() as patch:
        if source is not None:
            patch.setattr(builder, "open_checkpoint", lambda _, strict: source)
        chosen = BuildOptions("cuda", max_seq_len=128, **options)
        builder.build(str(directory / "source"), directory / "engine", chosen)
    return logits_of_ranks(directory / "engine", PROMPTS, CHUNKS)


def assert_near(made: Logits, expected: Logits, limit: float) -> None:
    assert np.linalg.norm(made - expected) < limit * np.linalg.norm(expected)


@pytest.mark.parametrize("name", some(SCHEMES, ()))
def test_formats(name: str, tmp_path: Path) -> None:
    """Widths of which a rank's part ends in the midst of groups and of blocks."""
    checkpoint = quantized_llama(SCHEMES[name], num_hidden_layers=1)
    one, two = (logits(checkpoint, tmp_path, tp_size=ranks) for ranks in (1, 2))
    assert_near(two, one, CODES)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *some(CONFIGS, ("olmo2-tied-biases",), 2),
        *some(("llama-tied", "gpt-oss-full"), (), 4),
    ],
)
def test_families(name: str, ranks: int, tmp_path: Path) -> None:
    """A mixture may choose other experts where two nearly tie, so of those it is the median
    position that is near."""
    save_tiny(CONFIGS[name], tmp_path / "source")
    one, two = (logits(None, tmp_path, tp_size=each) for each in (1, ranks))
    distances = np.linalg.norm(two - one, axis=-1) / np.linalg.norm(one, axis=-1)
    assert np.median(distances) < CODES


@pytest.mark.parametrize("name", some(FORMATS, ()))
def test_formats_of_experts(name: str, tmp_path: Path) -> None:
    quantized(tmp_path / "source", *FORMATS[name])
    one, two = (logits(None, tmp_path, tp_size=ranks) for ranks in (1, 2))
    distances = np.linalg.norm(two - one, axis=-1) / np.linalg.norm(one, axis=-1)
    assert np.median(distances) < CODES


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"quantization": "int4_wo", "group_size": 32},
                {"kv_cache_dtype": "fp8"},
                {"dtype": "float16"},
            )
        ),
    ],
    ids=str,
)
def test_what_the_build_makes(options: dict[str, Any], tmp_path: Path) -> None:
    """A vocabulary that ranks do not divide, tied, so that a part is read in two ways."""
    changes = {"vocab_size": 321, "tie_word_embeddings": True, "num_hidden_layers": 1}
    arrays = llama_tensors(**changes)
    del arrays["lm_head.weight"]
    save_llama(tmp_path / "source", arrays, **changes)
    one, two = (logits(None, tmp_path, tp_size=ranks, **options) for ranks in (1, 2))
    assert two.shape[-1] == 321
    assert_near(two, one, CODES)
