"""The container of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from slipstream.weights.safetensors import (
    ArraySpec,
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
