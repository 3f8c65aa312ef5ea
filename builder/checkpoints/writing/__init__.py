"""Writing quantized checkpoints: one layout a file, chosen by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import cast

from slipstream.builder.checkpoints.quantized.layout import Layout, cannot_store
from slipstream.builder.options import OutputFormat
from slipstream.weights.tensor import InputTransform, WeightFormat

Weights = Mapping[str, tuple[WeightFormat, InputTransform | None]]
_LAYOUTS: dict[OutputFormat, str] = {
    "compressed-tensors": "slipstream.builder.checkpoints.quantized.compressed_tensors.writer",
    "gptq": "slipstream.builder.checkpoints.quantized.gptq.writer",
    "awq": "slipstream.builder.checkpoints.quantized.awq.writer",
}


def create_layout(
    name: OutputFormat, weights: Weights, float8_inputs: Collection[str] = ()
) -> Layout:
    """The layout of this name, for a checkpoint of these quantized weights (by tensor name).

    ``float8_inputs`` are the modules of integer weights whose inputs a runtime should round to
    float8 a token, which their format does not say. Raises BuildError naming the first weight that
    the layout cannot hold, and why.
    """
    formats = [form for form, _ in weights.values()]
    layout = cast("Layout", import_module(_LAYOUTS[name]).create(formats, frozenset(float8_inputs)))
    for tensor, (form, transform) in weights.items():
        reason = layout.refusal(form, transform)
        if tensor.endswith("embed_tokens.weight"):
            reason = "it is the embedding, for which only a dense form is known"
        if reason:
            raise cannot_store(name, tensor, reason)
    return layout
