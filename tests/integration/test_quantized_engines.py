"""CPU engines of quantized checkpoints against dense ones of the weights that they stand for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import random_blocks
from tests.integration.test_architectures import run_in_chunks
from tests.quantized_models import (
    RAGGED,
    MemoryCheckpoint,
    Scheme,
    float4,
    float8,
    integers,
    nf4,
    quantized_llama,
    with_input,
)
from tests.tiny_models import save_llama

from slipstream.builder import build as builder
from slipstream.builder.build import compile_checkpoint
from slipstream.builder.checkpoints.gguf.blocks import decode
from slipstream.builder.contract import kv_dtype_of
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError, CheckpointError
from slipstream.weights.tensor import KVScales, QuantTensor

Logits = NDArray[np.float32]
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, 75))
INT8_ACTIVATIONS = 0.03  # what rounding x costs here, relative to the size of the logits
SCHEMES: dict[str, dict[str, Scheme]] = {
    "int4 ragged groups": {"proj": integers(4, 128)},
    "int4 zero points": {"proj": integers(4, 32, "zero")},
    "int4 zero points of 16": {"proj": integers(4, 64, "zero", beyond=True)},
    "int4 offsets": {"proj": integers(4, 32, "offset", dtype="float32")},
    "int4 rows": {"proj": integers(4, 0, dtype="bfloat16")},
    "int4 groups of 16": {"proj": integers(4, 16, "zero")},
    "int8 rows": {"proj": integers(8, 0, activation="token")},
    "int8 static": {"proj": integers(8, 0, activation="static", dtype="float32")},
    "int8 groups of 16": {"proj": integers(8, 16), "lm_head": integers(8, 16)},
    "float8 rows": {"proj": float8(activation="static")},
    "float8 blocks": {"proj": float8(128, 128, activation="group", dtype="bfloat16")},
    "nvfp4": {"proj": float4},
    "nf4": {"proj": nf4},
    "act-order": {"proj": with_input(integers(4, 64, "zero"), order=3)},
    "pre-scale": {"proj": with_input(integers(8, 64), scale=3)},
    "both": {
        "o_proj": with_input(integers(4, 128), order=1, scale=1),
        "down_proj": with_input(integers(4, 128), order=2, scale=2),
        "proj": integers(4, 128),
    },
    "every q, k, v its own": {
        "layers.0.self_attn.k": with_input(integers(4, 64), order=5),
        "layers.0.self_attn.v": integers(8, 64),
        "layers.1.self_attn.v": integers(8, 16),
        "layers.1.mlp.up": float8(),
        "layers.1.mlp.down": float4,
        "proj": integers(4, 64),
    },
}


def run(checkpoint: MemoryCheckpoint, directory: Path, **options: Any) -> Logits:  # noqa: ANN401
    """Logits of an engine of a checkpoint in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "open_checkpoint", lambda _, strict: checkpoint)
        builder.build("memory", directory, BuildOptions(target="cpu", **options))
    return run_in_chunks(directory, PROMPTS)


def exact(checkpoint: MemoryCheckpoint, directory: Path, **changes: Any) -> Logits:  # noqa: ANN401
    """Logits of a float32 engine of its effective weights."""
    tied = checkpoint.config.tie_word_embeddings
    shape = {**RAGGED, "tie_word_embeddings": tied, **changes}
    directory.mkdir(exist_ok=True)
    dense = save_llama(directory / "checkpoint", checkpoint.effective(), **shape)
    builder.build(dense, directory / "engine", BuildOptions(target="cpu"))
    return run_in_chunks(directory / "engine", PROMPTS)


def distance(got: Logits, want: Logits) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", SCHEMES)
def test_an_engine_computes_what_its_weights_say(name: str, tmp_path: Path) -> None:
    checkpoint = quantized_llama(SCHEMES[name])
    want = exact(checkpoint, tmp_path / "exact")
    for plugin in ("auto", "disable"):
        if plugin == "disable" and "of 16" in name and "zero" in name:
            continue  # refused, below
        got = run(checkpoint, tmp_path / plugin, gemm_plugin=plugin, kv_cache_dtype="float32")
        assert distance(got, want) < INT8_ACTIVATIONS, plugin


@pytest.mark.parametrize("plugin", ["auto", "disable"])
def test_a_tied_weight_with_act_order_becomes_dense(plugin: str, tmp_path: Path) -> None:
    """Rows of an embedding have no order of x; the same goes for groups that no kernel holds."""
    schemes = {"embed": with_input(integers(8, 64), order=1, scale=2), "proj": integers(4, 64)}
    checkpoint = quantized_llama(schemes, tie_word_embeddings=True)
    got = run(checkpoint, tmp_path / "engine", gemm_plugin=plugin, kv_cache_dtype="float32")
    assert distance(got, exact(checkpoint, tmp_path / "exact")) < INT8_ACTIVATIONS


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quants_stay_integers(kind: Type, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    schemes = {"proj": blocks_of(kind), "embed": blocks_of(kind)}
    checkpoint = quantized_llama(schemes, tie_word_embeddings=True, **changes)
    got = run(checkpoint, tmp_path / "engine", kv_cache_dtype="float32")
    want = exact(checkpoint, tmp_path / "exact", **changes)
    assert distance(got, want) < 0.06
    if kind not in (Type.Q2_K, Type.Q3_K):  # their embeddings are dense: 4 bits in groups of 16
        sizes = compiled(checkpoint).weights
        assert not [w for w in sizes if len(w.parts[0].shape) == 2], "no matrix is dense"


def blocks_of(kind: Type) -> Scheme:
    """Random codes of a GGUF type, with numbers of a healthy size."""

    def quantize(name: str, w: NDArray[np.float32]) -> QuantTensor:
        tensor = decode(name, kind, w.shape, random_blocks(kind, *w.shape).reshape(-1))
        assert tensor.scale is not None
        codes, rng = tensor.unpacked_codes(), np.random.default_rng(0)
        scale = rng.uniform(0.05, 0.1, tensor.scale.shape) / codes.std()
        offset = None if tensor.offset is None else (-codes.mean() * scale).astype(np.float32)
        return replace(tensor, scale=scale.astype(np.float32), offset=offset)

    return quantize


def test_a_width_without_groups_is_dense_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = quantized_llama({"proj": integers(8)}, intermediate_size=250)
    with caplog.at_level(logging.WARNING):
        got = run(checkpoint, tmp_path / "engine", kv_cache_dtype="float32")
    assert caplog.messages == [
        "2 weights (model.layers.0.mlp.down_proj.weight, …): target cpu has no kernel for int8, a "
        "scale a row; they become float32"
    ]
    want = exact(checkpoint, tmp_path / "exact", intermediate_size=250)
    assert distance(got, want) < INT8_ACTIVATIONS


def test_zero_points_beyond_the_bits_need_our_kernel(tmp_path: Path) -> None:
    checkpoint = quantized_llama(SCHEMES["int4 zero points of 16"])
    with pytest.raises(BuildError, match=r"has the zero point \d+, which 4 bits of MatMulNBits cannot hold"):
        run(checkpoint, tmp_path / "engine", gemm_plugin="disable")
    assert not (tmp_path / "engine").exists()


def test_the_manifest_says_what_came_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = quantized_llama(SCHEMES["every q, k, v its own"])
    run(checkpoint, tmp_path / "engine")
    manifest = open_engine(tmp_path / "engine").manifest
    assert manifest.quantization == "checkpoint"
    assert manifest.formats == {
        "int4, groups of 64": 10,
        "float32": 2,
        "int8, groups of 64": 1,
        "int8, groups of 16": 1,
        "float8_e4m3, a scale a row, activations rounded by token": 1,
        "float4_e2m1, groups of 16": 1,
    }


class TestKVScales:
    """A float8 cache in the units of the checkpoint."""

    def test_auto_takes_fp8_pages_in_its_units(self, tmp_path: Path) -> None:
        fine = KVScales((0.03, 0.02), (0.01, 0.015))
        plain = quantized_llama({})
        want = exact(plain, tmp_path / "exact")
        calibrated = replace(plain, kv_scales=fine)
        assert kv_dtype_of(compiled(calibrated).caches) == "float8_e4m3fn"
        assert compiled(calibrated).kv_scales == fine
        assert 1e-4 < distance(run(calibrated, tmp_path / "fine"), want) < 0.05
        # The unit is in use: with a tiny one every key and value saturates.
        coarse = replace(plain, kv_scales=KVScales((1e-5, 1e-5), (1e-5, 1e-5)))
        assert distance(run(coarse, tmp_path / "coarse"), want) > 0.1

    def test_pages_without_scales_have_unit_one(self, tmp_path: Path) -> None:
        checkpoint = quantized_llama({})
        want = exact(checkpoint, tmp_path / "exact")
        got = run(checkpoint, tmp_path / "engine", kv_cache_dtype="fp8")
        assert 1e-4 < distance(got, want) < 0.05
        assert kv_dtype_of(open_engine(tmp_path / "engine").manifest.caches) == "float8_e4m3fn"
        assert kv_dtype_of(compiled(checkpoint).caches) == "float32"

    def test_other_pages_do_without(self, caplog: pytest.LogCaptureFixture) -> None:
        checkpoint = quantized_llama({}, kv_scales=KVScales((1.0, 1.0), (1.0, 1.0)))
        planned = compiled(checkpoint, kv_cache_dtype="float16")
        assert (kv_dtype_of(planned.caches), planned.kv_scales) == ("float16", None)
        assert "scales are for fp8 and are not used: pages are float16" in caplog.text

    @pytest.mark.parametrize("k", [(1.0,), (1.0, 0.0), (1.0, float("nan"))])
    def test_scales_that_fit_no_model_are_refused(self, k: tuple[float, ...]) -> None:
        checkpoint = quantized_llama({}, kv_scales=KVScales(k, (1.0, 1.0)))
        with pytest.raises(CheckpointError, match=r"has \d scales of k for 2 layers"):
            compiled(checkpoint)


def compiled(checkpoint: MemoryCheckpoint, **options: Any) -> builder.Plan:  # noqa: ANN401
    return compile_checkpoint(checkpoint, BuildOptions(target="cpu", **options))
