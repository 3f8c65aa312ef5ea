"""Which linears need 8 bits: measured by what 4 bits do to the hidden states after their layer.

Linears that read one x are fused at run time where their formats agree, and experts are stored as
one weight, so they are chosen together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.checkpoints import Checkpoint
from slipstream.quantize.algorithms.grid import range_grid, weight_range
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.plan import Plan
from slipstream.quantize.sites import multiplied_as_one
from slipstream.quantize.skeleton import States

WIDE = "int8_wo"
_WINDOWS = 4  # of the calibration text; the order of linears hardly changes with more


@dataclass(frozen=True, slots=True)
class _Choice:
    """Linears that are chosen together.

    ``error`` is the squared error of the hidden states, relative to their square, when these
    linears alone have 4 bits; ``more`` the bits that 8 take beyond that.
    """

    modules: tuple[str, ...]
    error: float
    more: int


def choose_qformats(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Sequence[NDArray[np.int32]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """The qformat of each quantized linear, by name: that of the plan, or 8 bits for those where
    every bit more helps most, as far as ``plan.options.auto_bits`` goes.

    ``progress`` is told the layers done and their number.
    """
    assert plan.options.auto_bits is not None
    choices = list(_measure(checkpoint, plan, calibration, progress))
    shapes = {module: plan.shape(module) for module in plan.schemes}
    weights = sum(n * k for n, k in map(plan.shape, plan.linears))
    spare = (plan.options.auto_bits - plan.effective_bits) * weights
    chosen = {module: scheme.name for module, scheme in plan.schemes.items()}
    for choice in sorted(choices, key=lambda choice: -choice.error / choice.more):
        if choice.more <= spare:
            spare -= choice.more
            chosen |= dict.fromkeys(choice.modules, WIDE)
    assert chosen.keys() == shapes.keys()
    return chosen


@torch.inference_mode()
def _measure(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Sequence[NDArray[np.int32]],
    progress: Callable[[int, int], None] | None,
) -> list[_Choice]:
    model = CheckpointModel(checkpoint)
    states = model.embed(calibration[:_WINDOWS])
    choices: list[_Choice] = []
    for layer in plan.layers:
        prefix = f"model.layers.{layer.index}."
        weights = model.weights(prefix)
        exact = _run(model, layer.index, weights, states)
        quantized = [module.removeprefix(prefix) for module in layer.linears]
        for names in multiplied_as_one(plan.config, layer.index, quantized):
            modules = tuple(map(prefix.__add__, names))
            rounded = weights | _rounded(plan, modules, prefix, weights)
            error = _distance(_run(model, layer.index, rounded, states), exact)
            choices.append(_Choice(modules, error, _more(plan, modules)))
        states = exact
        if progress is not None:
            progress(layer.index + 1, len(plan.layers))
    return choices


def _run(
    model: CheckpointModel, index: int, weights: Mapping[str, Tensor], states: list[States]
) -> list[States]:
    with model.skeleton.filled(index, weights) as layer:
        return [model.skeleton.run(layer, each) for each in states]


def _rounded(
    plan: Plan, modules: Sequence[str], prefix: str, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    made = {}
    for module in modules:
        name, scheme = module.removeprefix(prefix) + ".weight", plan.schemes[module]
        weight = weights[name]
        grid = range_grid(*weight_range(weight, scheme.group), scheme, f"{module}.weight")
        made[name] = grid.decode(grid.codes(weight))
    return made


def _distance(found: Sequence[States], exact: Sequence[States]) -> float:
    """Mean over tokens of |found - exact|² / |exact|²; tokens that are not finite count nothing."""
    parts = [
        (a.hidden - b.hidden).square().sum(-1) / b.hidden.square().sum(-1).clamp(min=1e-30)
        for a, b in zip(found, exact, strict=True)
    ]
    errors = torch.cat([part.reshape(-1) for part in parts])
    errors = errors[errors.isfinite()]
    return float(errors.mean()) if len(errors) else 0.0


def _more(plan: Plan, modules: Sequence[str]) -> int:
    """Bits that 8-bit codes of these linears take beyond those of the plan."""
    wide = plan.with_qformats(dict.fromkeys(modules, WIDE)).schemes
    narrow = plan.schemes
    return sum(
        8 * (wide[module].nbytes(plan.shape(module)) - narrow[module].nbytes(plan.shape(module)))
        for module in modules
    )
