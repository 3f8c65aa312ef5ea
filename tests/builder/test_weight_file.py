from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors import deserialize

from slipstream.builder import weight_file
from slipstream.builder.graph.program import StoredWeight
from slipstream.builder.weight_file import ALIGNMENT, write_weights
from slipstream.errors import BuildError
from slipstream.weights.safetensors import ArraySpec

DTYPES: dict[ir.DataType, Any] = {ir.DataType.FLOAT: np.float32, ir.DataType.UINT8: np.uint8}
NAMES = {ir.DataType.FLOAT: "F32", ir.DataType.UINT8: "U8"}


def stored(**arrays: NDArray[Any]) -> StoredWeight:
    """One weight of these parts."""
    parts = tuple(ArraySpec.of(name, array) for name, array in arrays.items())
    return StoredWeight(parts, lambda: tuple(arrays.values()))


def sample(dtype: ir.DataType, *shape: int) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 100, shape).astype(DTYPES[dtype])


def write(path: Path, *weights: StoredWeight) -> dict[str, tuple[int, int]]:
    return write_weights(path, weights, lambda _: None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_what_was_written(tmp_path: Path, dtype: ir.DataType) -> None:
    arrays = {"a.b": sample(dtype, 3, 5), "number": sample(dtype), "none": sample(dtype, 0, 4)}
    file = tmp_path / "w.safetensors"
    write(file, *(stored(**{name: array}) for name, array in arrays.items()))
    read = dict(deserialize(file.read_bytes()))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name]["shape"] == list(array.shape)
        assert read[name]["dtype"] == NAMES[dtype]
        assert bytes(read[name]["data"]) == array.tobytes()


def test_places_are_where_the_data_lies(tmp_path: Path) -> None:
    """onnxruntime reads by these places, not by the header."""
    arrays = {f"w{size}": sample(ir.DataType.UINT8, size) for size in (7, 64, 3, 128, 1, 64000)}
    file = tmp_path / "w.safetensors"
    places = write(file, *(stored(**{name: array}) for name, array in arrays.items()))
    content = file.read_bytes()
    for name, (offset, size) in places.items():
        assert content[offset : offset + size] == arrays[name].tobytes()
    assert max(offset + size for offset, size in places.values()) == len(content)
    for name, array in arrays.items():
        assert array.nbytes % ALIGNMENT or places[name][0] % ALIGNMENT == 0, name


def test_every_element_lies_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    """A vector of floats behind one of an odd number of halves, as a GPU views them."""
    arrays: dict[str, NDArray[Any]] = {
        "bytes": np.ones(3, np.uint8),
        "halves": np.ones(5, np.float16),
        "floats": np.ones(4, np.float32),
        "longs": np.ones(3, np.int64),
    }
    places = write(tmp_path / "w", *(stored(**{name: arrays[name]}) for name in arrays))
    for name, (offset, _) in places.items():
        assert offset % arrays[name].itemsize == 0, name


def test_parts_of_a_weight_stay_together_and_progress_tells_every_byte(tmp_path: Path) -> None:
    first = stored(codes=sample(ir.DataType.UINT8, 4, 16), scale=sample(ir.DataType.FLOAT, 3))
    second = stored(dense=sample(ir.DataType.FLOAT, 16))
    told: list[int] = []
    places = write_weights(tmp_path / "w", [first, second], told.append)
    assert places["scale"][0] == sum(places["codes"])
    assert sorted(told) == [12, 64, 64]


def lazy(weight: StoredWeight, before: Callable[[], object]) -> StoredWeight:
    """The weight, whose data comes after something else."""

    def load() -> tuple[NDArray[np.generic], ...]:
        before()
        return weight.load()

    return StoredWeight(weight.parts, load)


def test_weights_of_more_bytes_than_the_largest_come_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "usable_cores", lambda: 4)
    told: list[str] = []
    weights = [
        lazy(stored(**{name: sample(ir.DataType.FLOAT, 16)}), partial(told.append, "load"))
        for name in "abcd"
    ]
    write_weights(tmp_path / "w", weights, lambda _: told.append("wrote"))
    assert told == ["load", "wrote"] * 4


def test_a_few_weights_are_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "usable_cores", lambda: 16)
    meeting = threading.Barrier(4, timeout=60)
    arrays = {f"w{i}": sample(ir.DataType.UINT8, 65 + i) for i in range(4)}
    weights = [lazy(stored(**{name: arrays[name]}), meeting.wait) for name in arrays]
    arrays["largest"] = sample(ir.DataType.UINT8, 1001)
    places = write(tmp_path / "w", *weights, stored(largest=arrays["largest"]))
    content = (tmp_path / "w").read_bytes()
    for name, (offset, size) in places.items():
        assert content[offset : offset + size] == arrays[name].tobytes()


def test_an_error_of_one_weight_keeps_the_others_from_being_made(tmp_path: Path) -> None:
    loads: list[str] = []

    def broken() -> None:
        loads.append("load")
        raise ValueError("damaged")

    weights = [lazy(stored(**{f"w{i}": sample(ir.DataType.UINT8, 64)}), broken) for i in range(50)]
    with pytest.raises(ValueError, match="damaged"):
        write(tmp_path / "w", *weights)
    assert len(loads) < 50


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float16),
        np.zeros((4, 4), np.float64),
        np.zeros((4, 4), np.int32),
        np.zeros((2, 8), np.float32),
        np.zeros(16, np.float32),
        np.zeros((4, 3), np.float32),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_an_array_that_is_not_what_was_declared(tmp_path: Path, array: NDArray[Any]) -> None:
    part = ArraySpec("layers.0.w", np.dtype(np.float32), (4, 4))
    with pytest.raises(
        BuildError, match=r"weight layers\.0\.w was declared float32 \(4, 4\) but holds"
    ):
        write(tmp_path / "w", StoredWeight((part,), lambda: (array,)))


def test_strided_arrays_are_written_in_order(tmp_path: Path) -> None:
    array = sample(ir.DataType.FLOAT, 6, 4).T
    places = write(tmp_path / "w", stored(w=array))
    offset, size = places["w"]
    assert (tmp_path / "w").read_bytes()[offset : offset + size] == array.tobytes()
