"""What a tensor's Hugging Face name says of its place in a decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# Ends of tensors that some checkpoints carry and that the configuration already says.
REDUNDANT = ("rotary_emb.inv_freq",)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def linears(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The linears of decoder layers, by the names and shapes of a checkpoint's tensors."""
    for name, shape in shapes.items():
        if _LAYER.match(name) and name.endswith(".weight") and len(shape) == 2:
            yield name.removesuffix(".weight")


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor is of; None for the embedding, the last norm and the head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
