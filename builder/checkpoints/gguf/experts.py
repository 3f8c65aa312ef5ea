"""All experts of a layer in one tensor, as llama.cpp stores them: served as one tensor an expert.

Experts are the first axis, so that one is a slice of the file's bytes and keeps its codes. Older
files have a tensor an expert, whose names slices are given: ``blk.0.ffn_up.3.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from slipstream.builder.checkpoints.gguf.file import GGUFTensor
from slipstream.errors import CheckpointError

_STACK = re.compile(
    r"(?P<place>blk\.\d+\.ffn_)(?P<name>gate|up|down|gate_up)_exps\.(?P<part>weight|bias)"
)
# Axes of one expert's.
_AXES = {"weight": 2, "bias": 1}


def unstacked(tensors: Mapping[str, GGUFTensor], experts: int) -> dict[str, GGUFTensor]:
    """The tensors of a file by name, each that holds ``experts`` experts split into theirs.

    Raises CheckpointError for one that holds another number of them.
    """
    found: dict[str, GGUFTensor] = {}
    for name, tensor in tensors.items():
        stack = _STACK.fullmatch(name)
        found |= {name: tensor} if stack is None else dict(_split(tensor, stack, experts))
    return found


def _split(
    tensor: GGUFTensor, stack: re.Match[str], experts: int
) -> Iterator[tuple[str, GGUFTensor]]:
    place, name, part = stack.groups()
    # The converter drops axes of one, and with it that of a single expert.
    axes = (1, *tensor.shape) if len(tensor.shape) == _AXES[part] else tensor.shape
    names = name.split("_")
    whole = len(axes) == _AXES[part] + 1 and axes[1] % len(names) == 0
    if not whole or axes[0] != experts or not experts:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, which are not "
            f"the rows of {experts} experts, as many as its metadata says; the GGUF file "
            "contradicts itself: download it again"
        )
    shape = (axes[1] // len(names), *axes[2:])
    size = tensor.size // (experts * len(names))
    for number in range(experts * len(names)):
        expert, which = divmod(number, len(names))
        slice_ = replace(tensor, shape=shape, offset=tensor.offset + number * size, size=size)
        yield f"{place}{names[which]}.{expert}.{part}", slice_
