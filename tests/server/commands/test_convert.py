from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter, kv_arrays
from slipstream.builder.checkpoints.names import layer_of, linears
from slipstream.builder.checkpoints.quantized import create_layout
from slipstream.server.cli import slipstream
from slipstream.weights.rtn import Bits, quantize_rtn
from slipstream.weights.tensor import QuantTensor


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["convert", *map(str, arguments)])


def write(
    source: Checkpoint, directory: Path, *, symmetric: bool, bits: Bits = 4, kv: bool = False
) -> Path:
    """The tiny checkpoint in 4 or 8 bits, as compressed-tensors."""
    shapes = {name: source.tensor(name).format.shape for name in source.names()}
    weights: dict[str, QuantTensor] = {
        f"{module}.weight": quantize_rtn(
            source.tensor(f"{module}.weight"), bits=bits, group_size=32, symmetric=symmetric
        )
        for module in linears(shapes)
    }
    directory.mkdir()
    formats = {name: (tensor.format, None) for name, tensor in weights.items()}
    writer = DirectoryWriter(directory, create_layout("compressed-tensors", formats), 4)
    for layer in (None, *range(3)):
        names = [name for name in source.names() if layer_of(name) == layer]
        tensors = [weights.get(name) or source.tensor(name).load() for name in names]
        more = kv_arrays((0.5, 0.25), layer) if kv and layer is not None else None
        writer.write(0 if layer is None else layer + 1, tensors, more)
    writer.describe(source, kv_scales=kv)
    source.write_tokenizer(directory)
    return directory


@pytest.fixture
def source(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


def assert_same(one: Path, other: Path) -> None:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert set(first.names()) == set(second.names())
    for name in first.names():
        mine, theirs = first.tensor(name).load(), second.tensor(name).load()
        assert replace(mine.format, zero="zero") == replace(theirs.format, zero="zero"), name
        assert np.array_equal(mine.codes.view(np.uint8), theirs.codes.view(np.uint8)), name
        assert np.array_equal(mine.dequantize(), theirs.dequantize()), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_layout_goes_to_every_other_and_back(
    source: Checkpoint, tmp_path: Path, symmetric: bool
) -> None:
    first = write(source, tmp_path / "first", symmetric=symmetric)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    previous = first
    for layout in ("gptq", "awq", "gptq", "compressed-tensors", "awq", "compressed-tensors"):
        output = tmp_path / f"{previous.name}-{layout}"
        result = run(previous, "-o", output, "--format", layout)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"wrote {output} in ")
        config = json.loads((output / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == layout
        assert_same(first, output)
        previous = output
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_kv_scales_go_along(source: Checkpoint, tmp_path: Path) -> None:
    first = write(source, tmp_path / "first", symmetric=True, kv=True)
    result = run(first, "-o", tmp_path / "second", "--format", "compressed-tensors")
    assert result.exit_code == 0, result.output
    scales = open_checkpoint(tmp_path / "second").kv_scales
    assert scales is not None and scales.k == (0.5,) * 3 and scales.v == (0.25,) * 3
    refused = run(first, "-o", tmp_path / "third", "--format", "gptq")
    assert refused.exit_code == 1 and "no place; use --format compressed-tensors" in refused.stderr


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    source: Checkpoint, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first = write(source, tmp_path / "first", symmetric=True, bits=8)
    cases = [
        (
            first,
            "awq",
            "_proj.weight cannot be stored as awq: it is 8-bit int",
        ),
        (tiny_checkpoint, "gptq", "is not quantized, so there is nothing to convert"),
        (tmp_path / "missing", "gptq", "does not exist"),
    ]
    for given, layout, message in cases:
        result = run(given, "-o", tmp_path / "out", "--format", layout)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ") and message in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_nothing_that_exists_is_touched(source: Checkpoint, tmp_path: Path) -> None:
    first = write(source, tmp_path / "first", symmetric=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    for output in (tmp_path / "out", first):
        result = run(first, "-o", output, "--format", "gptq")
        assert result.exit_code == 1 and "choose another -o" in result.stderr
    assert (tmp_path / "out" / "precious").read_text() == "data"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out"], "--format"),
        (["--format", "gptq"], "--output"),
        (["-o", "x", "--format", "exl2"], "'exl2'"),
    ],
)
def test_bad_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2 and message in result.stderr
