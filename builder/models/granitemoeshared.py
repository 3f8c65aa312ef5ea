"""Granite-MoE with an MLP beside the experts that every token takes."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models import granitemoe
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.granitemoe import GraniteMoEDecoder
from slipstream.builder.models.module import LAYER, Extent, Module, hidden
from slipstream.weights.json import Fields

SHARED_WIDTH = "shared_intermediate_size"
_SHARED, _INPUT, _OUTPUT = "shared_mlp", "input_linear", "output_linear"


class GraniteMoESharedDecoder(GraniteMoEDecoder):
    """An MLP whose gate and up weights are stacked in the checkpoint."""

    shared = _SHARED

    def shared_mlp(self, x: ir.Value, name: str) -> ir.Value | None:
        """output_linear(silu(gate) * up), both halves of input_linear(x)."""
        if not self.config.extras[SHARED_WIDTH]:
            return None
        gated = self.ops.gated_activation(self.linear(x, f"{name}.{_INPUT}"))
        return self.linear(gated, f"{name}.{_OUTPUT}")


def read(keys: Fields) -> ModelConfig:
    """The width of the MLP as well."""
    config = granitemoe.read(keys)
    return replace(config, extras={**config.extras, SHARED_WIDTH: keys.integer(SHARED_WIDTH)})


def write(config: ModelConfig) -> dict[str, Any]:
    """The same."""
    return {**granitemoe.write(config), SHARED_WIDTH: config.extras[SHARED_WIDTH]}


def _inner(config: ModelConfig) -> Extent:
    return Extent(config.extras[SHARED_WIDTH])


def _has_it(config: ModelConfig, layer: int) -> bool:
    return int(config.extras[SHARED_WIDTH]) > 0


_BOTH = f"{LAYER}.{_SHARED}.{_INPUT}"
# llama.cpp's files have gate and up apart, so there is no name of both.
MODULES = granitemoe.modules(
    Module(_BOTH, "linear", (_inner, _inner), hidden, present=_has_it, shard="column"),
    Module(
        f"{LAYER}.{_SHARED}.{_OUTPUT}",
        "linear",
        (hidden,),
        _inner,
        present=_has_it,
        reads=_BOTH,
        part=1,
        stream=LAYER,
        shard="row",
    ),
)
DEFAULTS = {**granitemoe.DEFAULTS, SHARED_WIDTH: 0}

ARCHITECTURE = Architecture(
    "granitemoeshared", GraniteMoESharedDecoder, MODULES, DEFAULTS, read, write
)
