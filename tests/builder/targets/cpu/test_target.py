"""Quantized engines of tiny models against dense engines of the same, dequantized, weights."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import TinyModel, tiny
from tests.integration.test_architectures import run_in_chunks
from tests.tiny_models import LLAMA, Arrays, llama_tensors, save_llama

from slipstream.builder.build import build, plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.weights.rtn import largest_group, quantize_rtn
from slipstream.weights.tensor import numpy_dtype

Logits = NDArray[np.float32]
PROMPTS = np.random.default_rng(0).integers(0, 40, (2, 75))
# Relative to the size of the logits: what rounding activations to int8 costs here.
INT8_ACTIVATIONS = 0.03
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "odd feed-forward": {"intermediate_size": 250},
    "odd stream": {"hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
    "groups of 32 only": {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24},
}


def logits(checkpoint: Path, directory: Path, **options: Any) -> Logits:  # noqa: ANN401
    build(checkpoint, directory, BuildOptions(**options))
    return run_in_chunks(directory, PROMPTS)


def distance(got: Logits, want: Logits) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def rounded(arrays: Arrays, options: BuildOptions) -> Arrays:
    """The weights that a quantized engine stands for."""
    out = dict(arrays)
    for name, array in arrays.items():
        group = largest_group(array.shape[-1], options.group_size or 32)
        if array.ndim == 2 and group is not None:
            head = name in ("model.embed_tokens.weight", "lm_head.weight")
            out[name] = quantize_rtn(
                array,
                bits=8 if head or options.bits == 8 else 4,
                group_size=group,
                symmetric=bool(options.symmetric),
            ).dequantize()
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(quantization="int4_wo", group_size=32),
        BuildOptions(quantization="int4_wo", group_size=64, symmetric=True),
        BuildOptions(quantization="int8_wo", group_size=128),
        BuildOptions(quantization="int8_wo", group_size=64, symmetric=True),
    ],
    ids=lambda o: f"{o.quantization}-{o.group_size}-{'symmetric' if o.symmetric else 'asymmetric'}",
)
def test_both_kernels_compute_what_the_rounded_weights_say(
    tmp_path: Path, options: BuildOptions, shape: str
) -> None:
    changes = SHAPES[shape]
    arrays = llama_tensors(**changes)
    checkpoint = save_llama(tmp_path / "checkpoint", arrays, **changes)
    exact = save_llama(tmp_path / "rounded", rounded(arrays, options), **changes)
    common = {
        "quantization": options.quantization,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "kv_cache_dtype": "float32",
    }
    want = logits(exact, tmp_path / "dense")
    ours = logits(checkpoint, tmp_path / "auto", **common)
    theirs = logits(checkpoint, tmp_path / "disable", gemm_plugin="disable", **common)
    unrounded = logits(checkpoint, tmp_path / "unrounded")
    assert distance(ours, want) < INT8_ACTIVATIONS
    assert distance(theirs, want) < INT8_ACTIVATIONS
    if options.bits == 4 and shape != "odd stream":
        assert distance(unrounded, want) > 1.5 * INT8_ACTIVATIONS, "the test must tell them apart"


@pytest.mark.parametrize("quantization", ["none", "int4_wo"])
def test_narrow_pages_cost_little(tmp_path: Path, quantization: str) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    results = {
        dtype: logits(checkpoint, tmp_path / dtype, quantization=quantization, kv_cache_dtype=dtype)
        for dtype in ("float32", "float16", "int8", "k16v8")
    }
    # Behind int8 activations a small difference can become one of a whole code.
    small, large = {"none": (2e-3, 0.02), "int4_wo": (0.01, 0.03)}[quantization]
    assert 0 < distance(results["float16"], results["float32"]) < small
    assert 0 < distance(results["int8"], results["float32"]) < large
    assert 0 < distance(results["k16v8"], results["float32"]) < large


@pytest.mark.parametrize(
    ("gemm_plugin", "expected"),
    [
        ("auto", {"Embedding", "Linear", "PagedAttention", "TopToken"}),
        ("disable", {"Embedding", "MatMulNBits", "PagedAttention", "TopToken"}),
    ],
)
def test_kernels_of_a_quantized_model(tmp_path: Path, gemm_plugin: Any, expected: set[str]) -> None:  # noqa: ANN401
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    options = BuildOptions(quantization="int4_wo", gemm_plugin=gemm_plugin)
    program = plan(checkpoint, options).program
    found = {node.op_type for node in program.graph if node.domain}
    if gemm_plugin == "disable":
        expected = expected | {"SkipSimplifiedLayerNormalization", "QuickGelu"}
    assert found == expected
    assert not program.nodes("Gemm")
    linears = program.nodes("Linear") or program.nodes("MatMulNBits")
    assert len(linears) == 4 * LLAMA["num_hidden_layers"] + 1, "q, k, v and gate, up are fused"


@pytest.mark.parametrize(
    ("gemm_plugin", "expected"),
    [
        ("auto", {"Embedding": 1, "Linear": 9, "PagedAttention": 2, "TopToken": 1}),
        (
            "disable",
            {
                "PagedAttention": 2,
                "SkipSimplifiedLayerNormalization": 3,
                "QuickGelu": 2,
                "TopToken": 1,
            },
        ),
    ],
)
def test_kernels_of_a_dense_model(
    tmp_path: Path,
    gemm_plugin: Any,  # noqa: ANN401
    expected: dict[str, int],
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    program = plan(checkpoint, BuildOptions(gemm_plugin=gemm_plugin)).program
    assert Counter(node.op_type for node in program.graph if node.domain) == expected
    assert len(program.nodes("Gemm")) == (0 if gemm_plugin == "auto" else 9)


@pytest.mark.parametrize(
    ("stored", "asked", "size"),
    [
        ("bfloat16", "auto", 2),
        ("float16", "auto", 2),
        ("float32", "auto", 4),
        ("bfloat16", "float32", 4),
        ("float32", "bfloat16", 2),
        ("float32", "float16", 2),
    ],
)
def test_the_type_of_dense_weights(
    tmp_path: Path,
    stored: str,
    asked: Any,  # noqa: ANN401
    size: int,
) -> None:
    """An engine stores numbers of that type, and computes what they say."""
    tied = {"tie_word_embeddings": True}
    arrays = llama_tensors(**tied)
    kept = {n: a.astype(numpy_dtype(stored)) for n, a in arrays.items()}
    narrow = numpy_dtype(stored if asked == "auto" else asked)
    said = {n: (a.astype(narrow) if a.ndim == 2 else a).astype(np.float32) for n, a in kept.items()}
    checkpoint = save_llama(tmp_path / "stored", kept, **tied)
    made = plan(checkpoint, BuildOptions(dtype=asked))
    matrices = sum(a.size for n, a in arrays.items() if a.ndim == 2 and n != "lm_head.weight")
    assert 0 <= made.weight_bytes - size * matrices < 8192
    got = logits(checkpoint, tmp_path / "got", dtype=asked)
    exact = save_llama(tmp_path / "exact", said, **tied)
    assert distance(got, logits(exact, tmp_path / "want", gemm_plugin="disable")) < 2e-6
    if (stored, asked) != ("float32", "auto"):
        unrounded = save_llama(tmp_path / "unrounded", arrays, **tied)
        assert distance(got, logits(unrounded, tmp_path / "whole")) > 2e-5, "they must differ"


def test_narrow_weights_are_not_for_float32_kernels(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    with pytest.raises(BuildError, match="dtype bfloat16 does not run on ONNX Runtime's kernels"):
        plan(checkpoint, BuildOptions(dtype="bfloat16", gemm_plugin="disable"))


def test_a_width_that_no_group_divides_stays_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = SHAPES["odd feed-forward"]
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors(**changes), **changes)
    with caplog.at_level(logging.WARNING):
        program = plan(checkpoint, BuildOptions(quantization="int4_wo")).program
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    (message,) = caplog.messages
    assert message.startswith(f"2 weights ({names[0]}, …) stay dense")
    dense = [node for node in program.nodes("Linear") if node.attributes["weight_type"].as_int()]
    assert [node.inputs[1].name for node in dense if node.inputs[1]] == [
        f"{name}.packed" for name in names
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_gguf_blocks_stay_quantized_through_both_kernels(
    tmp_path: Path, kind: Type, tied: bool
) -> None:
    model = with_tokenizer(tiny(tied=tied))
    model.tensors = {n: 0.2 * a if a.ndim == 2 else a for n, a in model.tensors.items()}
    model.kinds = {name: kind for name, values in model.tensors.items() if values.ndim == 2}
    file = model.write(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(file)
    arrays = {n: checkpoint.tensor(n).load().dequantize() for n in checkpoint.names()}
    exact = save_llama(
        tmp_path / "exact",
        arrays,
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
    )
    want = logits(exact, tmp_path / "dense")
    for plugin in ("auto", "disable"):
        directory = tmp_path / plugin
        got = logits(file, directory, gemm_plugin=plugin, kv_cache_dtype="float32")
        assert distance(got, want) < 0.04
        program = plan(file, BuildOptions(gemm_plugin=plugin)).program
        nodes = [*program.nodes("Linear"), *program.nodes("Embedding")]
        assert not program.nodes("Gemm") and nodes
        assert all(node.attributes["weight_type"].as_int() == 0 for node in nodes)


def with_tokenizer(model: TinyModel) -> TinyModel:
    model.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(38)] + ["a", "aa"],
        "tokenizer.ggml.merges": ["a a"],
    }
    return model


@pytest.mark.parametrize("head_dim", [20, 520])
def test_heads_that_the_kernel_cannot_run_are_refused(tmp_path: Path, head_dim: int) -> None:
    arrays = llama_tensors(head_dim=head_dim)
    checkpoint = save_llama(tmp_path / "checkpoint", arrays, head_dim=head_dim)
    with pytest.raises(BuildError, match=f"heads of {head_dim} elements; the cpu target runs"):
        plan(checkpoint, BuildOptions())
