"""Granite 4, as far as all of its layers are attention: Granite-MoE with a shared MLP, which may
stand alone, and perhaps without rotary embedding."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models import granite, granitemoe, granitemoeshared
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import FULL, ModelConfig, Rope
from slipstream.builder.models.experts import EXPERTS, RENORMALIZE, TOP_K, WIDTH
from slipstream.builder.models.granitemoeshared import SHARED_WIDTH, GraniteMoESharedDecoder
from slipstream.builder.models.rope import unrotated
from slipstream.weights.json import Fields

_ROTATED = "rotated"
_POSITIONS, _KINDS = "position_embedding_type", ("layer_types", "layers_block_type")


class GraniteMoEHybridDecoder(GraniteMoESharedDecoder):
    """The shared MLP alone where there are no experts."""

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """The experts and the shared MLP, or that alone."""
        if self.config.extras[EXPERTS]:
            return super().mlp(x, prefix)
        alone = self.shared_mlp(x, prefix.removesuffix("mlp.") + self.shared)
        assert alone is not None, "its width is checked when config.json is read"
        return alone

    def rope(self, layer: int) -> Rope:
        """The rotary angles, 0 where positions are not embedded."""
        rope = self.config.rope(layer)
        return rope if self.config.extras[_ROTATED] else unrotated(rope)


def _read(keys: Fields) -> ModelConfig:
    _check_layers(keys)
    config = granitemoe.read(keys) if keys.integer("num_local_experts") else _without(keys)
    own = {
        SHARED_WIDTH: keys.integer(SHARED_WIDTH, minimum=1),
        _ROTATED: keys.choice(_POSITIONS, ("rope", "nope"), "nope") == "rope",
    }
    return replace(config, extras=config.extras | own)


def _without(keys: Fields) -> ModelConfig:
    """Granite whose layers have no experts."""
    config = granite.read(keys)
    none = {EXPERTS: 0, TOP_K: 0, WIDTH: config.intermediate_size, RENORMALIZE: True}
    return replace(config, extras=config.extras | none)


def _check_layers(keys: Fields) -> None:
    """CheckpointError unless all layers are attention; what config.json leaves out is not."""
    key = next((key for key in _KINDS if keys.has(key)), _KINDS[0])
    kinds = keys.texts(key, ("mamba",))
    others = sorted(set(kinds) - {"attention", FULL})
    if others:
        raise keys.origin.error(
            f"config.json: {key} has layers of the kind {', '.join(others):.80}, but only attention"
            " is supported; choose a Granite 4 whose name has no h, such as granite-4.0-micro"
        )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **granitemoeshared.write(config),
        _POSITIONS: "rope" if config.extras[_ROTATED] else "nope",
        _KINDS[0]: [FULL] * config.num_layers,
    }


def _has_experts(config: ModelConfig, layer: int) -> bool:
    return int(config.extras[EXPERTS]) > 0


ARCHITECTURE = Architecture(
    "granitemoehybrid",
    GraniteMoEHybridDecoder,
    tuple(
        replace(m, present=_has_experts) if m.role in ("router", "expert") else m
        for m in granitemoeshared.MODULES
    ),
    {**granitemoeshared.DEFAULTS, SHARED_WIDTH: 1024},
    _read,
    _write,
)
