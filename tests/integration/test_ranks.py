"""Engines of several ranks compute what one device does: every family, every format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.integration.test_architectures import CONFIGS
from tests.integration.test_quantized_engines import SCHEMES
from tests.integration.test_quantized_experts import FORMATS, quantized
from tests.quantized_models import MemoryCheckpoint, quantized_llama
from tests.rank_threads import run_in_chunks
from tests.tiny_models import llama_tensors, save_llama, save_tiny

from slipstream.builder import build as builder
from slipstream.builder.contract import LOGITS, STATES
from slipstream.builder.options import BuildOptions
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import BuildError

Logits = NDArray[np.float32]
ROUNDING = 0.01  # what other sums cost where products round x to int8
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, 75))
# Every day, what ranks share in ways that differ most; the others are slow.
FAMILIES = ("llama-biases", "olmo2-tied-biases", "ministral3", "qwen2-moe", "gpt-oss")
DAILY_SCHEMES = ("int4 ragged groups", "int4 zero points", "int8 static", "float8 blocks",
                 "act-order")  # fmt: skip
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}


def some(names: Collection[str], daily: Collection[str], *more: int) -> list[Any]:
    """Parameters of a test, of which those that are not for every day are slow."""
    assert set(daily) <= set(names)
    return [
        pytest.param(name, *more, marks=[] if name in daily else pytest.mark.slow) for name in names
    ]


def logits(
    source: MemoryCheckpoint | None,
    directory: Path,
    output: str = LOGITS,
    **options: Any,  # noqa: ANN401 - fields of BuildOptions
) -> Logits:
    """Of an engine that is built of a checkpoint, in memory or in the folder ``source``."""
    with pytest.MonkeyPatch.context() as patch:
        if source is not None:
            patch.setattr(builder, "open_checkpoint", lambda _, strict: source)
        chosen = BuildOptions("cpu", **options)
        builder.build(str(directory / "source"), directory / "engine", chosen)
    return run_in_chunks(directory / "engine", PROMPTS, output)


def assert_alike(made: Logits, expected: Logits, tolerance: float) -> None:
    """Close, and the same greedy token at every position."""
    assert np.abs(made - expected).max() < tolerance * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_array_equal(made.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *some(CONFIGS, FAMILIES, 2),
        # Heads of keys that ranks have twice each.
        *some(("llama-tied", "gpt-oss-full"), ("llama-tied",), 4),
    ],
)
def test_families(name: str, ranks: int, tmp_path: Path) -> None:
    save_tiny(CONFIGS[name], tmp_path / "source")
    one = logits(None, tmp_path)
    assert_alike(logits(None, tmp_path, tp_size=ranks), one, 1e-4)


@pytest.mark.parametrize("name", some(SCHEMES, DAILY_SCHEMES))
def test_formats(name: str, tmp_path: Path) -> None:
    """Widths of which a rank's part ends in the midst of groups and of blocks."""
    checkpoint, options = quantized_llama(SCHEMES[name]), {"kv_cache_dtype": "float32"}
    one = logits(checkpoint, tmp_path, **options)
    assert_alike(logits(checkpoint, tmp_path, tp_size=2, **options), one, ROUNDING)


@pytest.mark.parametrize("name", some(("act-order", "float8 blocks"), ("act-order",)))
def test_kernels_of_onnxruntime(name: str, tmp_path: Path) -> None:
    """Which add up in another order on every width, so that tokens nearly tied may differ."""
    checkpoint, options = quantized_llama(SCHEMES[name]), {"gemm_plugin": "disable"}
    one, two = (logits(checkpoint, tmp_path, tp_size=n, **options) for n in (1, 2))
    assert np.abs(two - one).max() < 0.02 * np.abs(one).max()


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_weights_that_the_build_quantizes(tied: bool, tmp_path: Path) -> None:
    """The head keeps 8 bits, whether ranks gather its logits or not, in a vocabulary that they do
    not divide."""
    changes = {"vocab_size": 321, "tie_word_embeddings": tied}
    arrays = llama_tensors(**changes)
    if tied:
        del arrays["lm_head.weight"]
    save_llama(tmp_path / "source", arrays, **changes)
    one, two = (logits(None, tmp_path, tp_size=n, quantization="int4_wo") for n in (1, 2))
    assert two.shape[-1] == 321
    assert_alike(two, one, ROUNDING)


@pytest.mark.parametrize("name", some(FORMATS, ("gptq act-order",)))
def test_formats_of_experts(name: str, tmp_path: Path) -> None:
    """Those of all experts of a layer, stacked; act-order of the last matrix among them."""
    quantized(tmp_path / "source", *FORMATS[name])
    one, two = (logits(None, tmp_path, tp_size=n, kv_cache_dtype="float32") for n in (1, 2))
    assert_alike(two, one, ROUNDING)


def test_vectors_and_scores(tmp_path: Path) -> None:
    """Of answers that different ranks have the rows of."""
    checkpoint = quantized_llama({})
    for stated in (StatedPooling("embed"), StatedPooling("score", answers=(5, 300))):
        checkpoint = replace(checkpoint, pooling=stated)
        one, two = (logits(checkpoint, tmp_path, STATES, tp_size=n) for n in (1, 2))
        np.testing.assert_allclose(two, one, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
            "6 heads of attention",
        ),
        ({"intermediate_size": 330}, "330 rows of model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save_llama(tmp_path / "source", llama_tensors(**changes), **changes)
    with pytest.raises(BuildError, match=rf"^{told} cannot be shared by 4 ranks alike"):
        builder.build(tmp_path / "source", tmp_path / "engine", BuildOptions("cpu", tp_size=4))
