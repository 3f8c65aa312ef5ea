"""From the weights of a checkpoint to weights that a target's kernels hold: one pipeline for all.

What the target says is data. Each pass logs what it changed; what no kernel holds in any form
becomes dense at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.apply_input_transforms import ApplyInputTransforms
from slipstream.builder.graph.passes.convert_to_integers import ConvertToIntegers
from slipstream.builder.graph.passes.dequantize_unheld import DequantizeUnheld
from slipstream.builder.graph.passes.fit_groups import FitGroups
from slipstream.builder.graph.passes.quantize_fp8 import quantize_fp8_weights
from slipstream.builder.graph.passes.quantize_weights import QuantizeWeights
from slipstream.builder.graph.passes.rewrite import Holds
from slipstream.builder.graph.passes.round_activations import RoundActivations
from slipstream.builder.options import BuildOptions
from slipstream.weights.tensor import Kind, WeightFormat


@dataclass(frozen=True, slots=True)
class Kernels:
    """What preparation asks of a target.

    holds       what each kind of its kernels holds, the best kind first
    group_size  of weights that are quantized at build time, unless asked for
    integers    kinds of codes that become integers where a kernel holds those
    rounds      whether a kernel rounds x as a format says
    rounding    what the kernels do to x where none does, for the log
    dtype       what a weight becomes that no kernel holds
    fold_norms  whether norm weights are float32, so that a scale of x can become part of them
    """

    holds: Sequence[Holds]
    group_size: int
    integers: tuple[Kind, ...]
    rounds: Callable[[WeightFormat], bool]
    rounding: str
    dtype: str
    fold_norms: bool = False


def preparation(target: str, kernels: Kernels, options: BuildOptions) -> tuple[Pass, ...]:
    """The passes after which every quantized weight is held by a kernel; ``target`` is for the
    log."""
    groups = FitGroups(kernels.holds)

    def fits(fmt: WeightFormat) -> bool:
        return groups.fitting(fmt) is not None

    return (
        ApplyInputTransforms(fold_norms=kernels.fold_norms),
        *_quantization(kernels, options),
        ConvertToIntegers(kernels.integers, fits),
        RoundActivations(kernels.rounds, kernels.rounding),
        groups,
        DequantizeUnheld(fits, target, kernels.dtype),
    )


def _quantization(kernels: Kernels, options: BuildOptions) -> tuple[Pass, ...]:
    if options.quantization == "fp8":
        return (quantize_fp8_weights,)
    if options.bits is None:
        return ()
    group = options.group_size or kernels.group_size
    return (QuantizeWeights(options.bits, group, bool(options.symmetric)),)
