from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.server.options import build_options

EVERYTHING = BuildOptions(
    target="cpu",
    quantization="int4_wo",
    dtype="float32",
    group_size=128,
    symmetric=True,
    kv_cache_dtype="int8",
    task="embed",
    pooling="mean",
    speculative_model="a head",
    gemm_plugin="disable",
    ort_attention="pages",
    ort_activations="int8",
    strict_tensors=True,
    tp_size=2,
    max_batch_size=3,
    max_num_tokens=17,
    max_seq_len=99,
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": "int3"}, "quantization is 'int3'; it must be one of none, int8_wo, int4"),
        ({"quantization": None}, "quantization is None"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype is 'fp4'.* float32, bfloat16, float16, int8"),
        ({"dtype": "half"}, "dtype is 'half'; it must be one of auto, float32, bfloat16, float16"),
        ({"task": "chat"}, "task is 'chat'; it must be one of auto, generate, embed, score"),
        ({"pooling": "cls"}, "pooling is 'cls'; it must be one of auto, last, mean"),
        ({"pooling": "mean", "task": "generate"}, "an engine for task generate makes no vectors"),
        ({"gemm_plugin": "on"}, "gemm_plugin is 'on'; it must be one of auto, disable"),
        ({"ort_activations": "int4"}, "ort_activations is 'int4'; it must be one of exact, int8"),
        ({"group_size": 48}, "group_size is 48; it must be one of 32, 64, 128"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be at least 1"),
        ({"max_num_tokens": -1}, "max_num_tokens is -1; it must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0; it must be at least 1"),
        ({"max_batch_size": 9, "max_num_tokens": 8}, "max_num_tokens is 8, less than max_batch"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        BuildOptions(**values)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize(
    "ignored", [{"group_size": 32}, {"symmetric": True}, {"symmetric": False}], ids=str
)
def test_an_option_that_would_be_ignored_is_refused(
    quantization: str, ignored: dict[str, Any]
) -> None:
    (name,) = ignored
    message = f"{name} is .*, but quantization {quantization} makes no groups of integers; leave it"
    with pytest.raises(BuildError, match=message):
        BuildOptions(**ignored, quantization=quantization)  # type: ignore[arg-type]


def test_bits() -> None:
    assert BuildOptions().bits is None
    assert BuildOptions(quantization="int8_wo").bits == 8
    assert BuildOptions(quantization="int4_wo").bits == 4


def test_a_default_build_needs_no_options() -> None:
    assert BuildOptions().command("model", "engine") == "slipstream build model -o engine"


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        EVERYTHING,
        replace(EVERYTHING, symmetric=False),
        *(
            BuildOptions(**{n: getattr(EVERYTHING, n), "quantization": "int4_wo"})
            for n in BuildOptions.__dataclass_fields__
        ),
    ],
)
def test_the_command_line_reads_back_the_command(options: BuildOptions) -> None:
    seen: list[tuple[str, str, BuildOptions]] = []

    @click.command()
    @click.argument("checkpoint")
    @click.option("-o", "--output")
    @build_options
    def build(checkpoint: str, output: str, options: BuildOptions) -> None:
        seen.append((checkpoint, output, options))

    source, target = "a model's/dir; rm", "an engine"
    words = shlex.split(options.command(source, target))
    assert words[:2] == ["slipstream", "build"]
    result = CliRunner().invoke(build, words[2:])
    assert result.exit_code == 0, result.output
    assert seen == [(source, target, options)]


def test_everything_differs_from_the_defaults() -> None:
    """So that the test above covers every field, also those that are added."""
    for name in BuildOptions.__dataclass_fields__:
        assert getattr(EVERYTHING, name) != getattr(BuildOptions(), name), name
