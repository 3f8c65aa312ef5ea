"""The tensors of experts one by one, of checkpoints that hold those of a layer in one tensor."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import Module, Stack, pattern, place
from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import StoredTensor


def by_expert(
    stored: Mapping[str, StoredTensor], modules: Iterable[Module], config: ModelConfig
) -> dict[str, StoredTensor]:
    """All tensors, those of a ``Module.stack`` in the parts that belong to one module each.

    What is called ``STACK``, ``STACK.weight`` or ``STACK_bias`` becomes the ``weight`` or ``bias``
    of the module of every expert; any other ending stays what it is (``STACK_scales`` becomes
    ``scales``). Raises CheckpointError for a tensor of other experts than those of the
    configuration.
    """
    stacks = [(pattern(m.stack.name), m) for m in modules if m.stack is not None]
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        found = [(match, m) for stack, m in stacks if (match := _match(stack, name))]
        parts = [part for match, m in found for part in _parts(tensor, match, m, config)]
        tensors |= {part.name: part for part in parts} if found else {name: tensor}
    return tensors


def _match(stack: re.Pattern[str], name: str) -> re.Match[str] | None:
    match = stack.match(name)
    return match if match and name[match.end() :][:1] in ("", ".", "_") else None


def _parts(
    tensor: StoredTensor, match: re.Match[str], module: Module, config: ModelConfig
) -> Iterator[StoredTensor]:
    """What a tensor holds of one module, expert by expert."""
    assert module.stack is not None and module.experts is not None, module.name
    experts, layer = module.experts(config).units, int(match["i"])
    ending = tensor.name[match.end() :].lstrip("._") or "weight"
    rows = tensor.shape[2 if _is_transposed(module.stack, ending) else 1 :][:1]
    if tensor.shape[:1] != (experts,) or not rows or rows[0] % module.stack.parts:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, but by the "
            f"configuration it is of {experts} experts with {module.stack.parts} modules each; "
            "config and weights are of different models: download both again"
        )
    for expert in range(experts):
        name = f"{place(module.name, layer, expert)}.{ending}"
        yield _part(tensor, name, expert, module.stack, _is_transposed(module.stack, ending))


def _is_transposed(stack: Stack, ending: str) -> bool:
    return stack.transposed and ending == "weight"


def _part(
    tensor: StoredTensor, name: str, expert: int, stack: Stack, transposed: bool
) -> StoredTensor:
    """The rows of one module in those of an expert."""
    shape, itemsize = list(tensor.shape[1:]), tensor.numpy_dtype().itemsize
    behind = itertools.accumulate(reversed(shape), operator.mul, initial=1)
    strides = [itemsize * elements for elements in behind][-2::-1]
    if transposed:
        shape, strides = shape[::-1], strides[::-1]
    shape[0] //= stack.parts
    offset = tensor.offset + expert * (tensor.size // tensor.shape[0])
    offset += stack.part * strides[0] * (1 if stack.interleaved else shape[0])
    if stack.interleaved:
        strides[0] *= stack.parts
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = last + itemsize if math.prod(shape) else 0
    return replace(
        tensor, name=name, shape=tuple(shape), offset=offset, size=size, strides=tuple(strides)
    )
