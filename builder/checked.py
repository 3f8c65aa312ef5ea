"""Weights that are what their configuration says, and made of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slipstream.errors import CheckpointError
from slipstream.weights.tensor import LazyTensor, QuantTensor, is_finite


def checked(tensor: LazyTensor, shape: tuple[int, ...] | None, path: Path) -> LazyTensor:
    """A weight of the checkpoint at ``path`` that has the shape its configuration says, if that
    says any; it raises CheckpointError when it is loaded with numbers that are none."""
    if shape not in (None, tensor.format.shape):
        raise CheckpointError(
            f"{path}: tensor {tensor.name} has shape {list(tensor.format.shape)}, but by the "
            f"configuration it is {list(shape or ())}; config and weights are of different "
            "models: download both again"
        )

    def load() -> QuantTensor:
        loaded = tensor.load()
        for part, numbers in loaded.numbers().items():
            if not is_finite(numbers):
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} holds infinite or undefined numbers among its "
                    f"{part}; the checkpoint is damaged: download it again"
                )
        return loaded

    return replace(tensor, load=load)
