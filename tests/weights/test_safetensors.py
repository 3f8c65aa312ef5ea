"""The container of tensors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import (
    ArraySpec,
    read_header,
    write_safetensors,
)


def test_arrays_are_asked_for_one_by_one_and_must_fit_the_header(tmp_path: Path) -> None:
    made: list[int] = []

    def arrays() -> Any:  # noqa: ANN401 - a generator
        for size in (3, 5):
            made.append(size)
            yield np.arange(size, dtype=np.int32)

    specs = [ArraySpec(f"a{size}", np.dtype(np.int32), (size,)) for size in (3, 5)]
    write_safetensors(tmp_path / "x", specs, arrays())
    assert made == [3, 5]
    assert load_file(tmp_path / "x")["a5"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError):
        write_safetensors(tmp_path / "y", specs[::-1], arrays())


@pytest.mark.parametrize("length", [6 << 30, 100_000_000, 1 << 25, (1 << 63) + 5])
def test_a_header_is_no_larger_than_any_model_needs(tmp_path: Path, length: int) -> None:
    """A sparse file of 6 GiB: of its header as much is read as may be one, or nothing."""
    file = tmp_path / "a.safetensors"
    with file.open("wb") as sparse:
        sparse.write(length.to_bytes(8, "little") + b"{")
        sparse.truncate(6 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"a\.safetensors .*download"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**62] * 40_000},
        {"dtype": "x" * 40_000, "shape": [1]},
        {"shape": [2**62, 2**62]},
        {"shape": [1] * 33},
    ],
)
def test_a_shape_is_no_longer_than_any_tensor_has(tmp_path: Path, entry: dict[str, Any]) -> None:
    text = json.dumps({"a": {"dtype": "F32", "data_offsets": [0, 4], **entry}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 500
