"""What a layout of quantized checkpoints is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import BuildError
from slipstream.weights.tensor import InputTransform, QuantTensor, WeightFormat

Settings = Mapping[str, Any]
HEAD = "lm_head"
_SMALLEST_GROUP = 16
# Linears that other runtimes multiply as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A quantized weight as a layout stores it: arrays by what follows the module's name
    (``weight_packed``), and what the configuration has to say of the module, as JSON."""

    arrays: Mapping[str, NDArray[np.generic]]
    settings: Settings


class Layout(Protocol):
    """How a toolchain stores quantized weights."""

    @property
    def name(self) -> str:
        """As users know it."""

    @property
    def holds_kv_scales(self) -> bool:
        """Whether a checkpoint of this layout can have scales of an fp8 KV cache."""

    def refusal(self, form: WeightFormat, transform: InputTransform | None) -> str | None:
        """Why a weight of this format, with this ``input``, cannot be stored; None if it can."""

    def encode(self, tensor: QuantTensor) -> Encoded:
        """A quantized weight ``[N, K]``; BuildError naming it if it cannot be stored exactly."""

    def config(
        self, modules: Mapping[str, Settings], dense: Sequence[str], kv_scales: bool
    ) -> dict[str, Any]:
        """The ``quantization_config`` for what ``encode`` said of each module, the linears that
        are dense, and whether each layer has scales of an fp8 KV cache."""

    def loaders(self, modules: Mapping[str, Settings]) -> Mapping[str, str]:
        """What else loads a checkpoint of such modules, by name: empty, or why it does not."""


def cannot_store(layout: str, name: str, reason: str) -> BuildError:
    """The error for a tensor that a layout cannot hold exactly."""
    return BuildError(
        f"{name} cannot be stored as {layout}: {reason}; use another --format"
        + ("" if layout == "compressed-tensors" else ", such as compressed-tensors")
    )


def left_alone(modules: Mapping[str, Settings], dense: Sequence[str]) -> list[str]:
    """The linears that a configuration has to name as not quantized, the head among them."""
    return [*dense, *(() if HEAD in modules else (HEAD,))]


def unlike_siblings(modules: Mapping[str, Settings]) -> str:
    """The first linear that is not quantized as those that are multiplied with it; or nothing."""
    for module, settings in modules.items():
        place, _, kind = module.rpartition(".")
        siblings = next((names for names in FUSED if kind in names), ())
        for sibling in siblings:
            if modules.get(f"{place}.{sibling}") != settings:
                return f"{module} and {sibling} are multiplied as one and have different schemes"
    return ""


def even_groups(tensor: QuantTensor, size: int | None = None) -> QuantTensor:
    """The tensor with groups of ``size``, by default ``even_group``'s, that divide K: the scales
    of a group are repeated for its parts."""
    form = tensor.format
    group = size or even_group(form)
    assert group and form.rows == 1, form
    if group == form.group:
        return tensor
    assert form.group % group == 0, (form, group)
    times = form.group // group

    def finer(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
        if numbers is None:
            return None
        return np.repeat(numbers, times, axis=1)[:, : form.shape[1] // group]

    return replace(
        tensor,
        format=replace(form, group=group),
        scale=finer(tensor.scale),
        zero=finer(tensor.zero),
        offset=finer(tensor.offset),
    )


def even_group(form: WeightFormat) -> int | None:
    """The largest part of a group that divides K; None if that is too small to be of use."""
    k = form.shape[1]
    group = math.gcd(min(form.group, k), k)
    return group if group >= min(_SMALLEST_GROUP, form.group) else None


def exact_cast(
    numbers: NDArray[np.generic], dtype: type[np.generic], layout: str, name: str
) -> NDArray[np.generic]:
    """``numbers`` in another type; BuildError if one of them changes."""
    with np.errstate(over="ignore"):
        cast = numbers.astype(dtype)
    if not np.array_equal(cast.astype(np.float32), numbers.astype(np.float32)):
        raise cannot_store(
            layout, name, f"its scales are {numbers.dtype} and do not fit {np.dtype(dtype).name}"
        )
    return cast
