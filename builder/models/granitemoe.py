"""Granite-MoE: Granite 3 whose MLPs are experts, and the blocks of its kin that have an MLP beside
them."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models import granite
from slipstream.builder.models.architecture import Architecture, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.experts import (
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    read_experts,
    with_experts,
    write_experts,
)
from slipstream.builder.models.mixtral import BLOCK, PARTS
from slipstream.builder.models.module import LAYER, Module, Stack
from slipstream.weights.json import Fields

_COUNT, _WIDTH = "num_local_experts", "intermediate_size"
_ROUTER = "router.layer"
_INPUT, _OUTPUT = (f"{LAYER}.{BLOCK}.{name}_linear" for name in ("input", "output"))


class GraniteMoEDecoder(ExpertDecoder, granite.GraniteDecoder):
    """Experts with the names of Mixtral's, and its own for the router."""

    block, router, parts = BLOCK, _ROUTER, PARTS


def read(keys: Fields) -> ModelConfig:
    """Four numbers and the experts."""
    config, routing = granite.read(keys), read_experts(keys, _COUNT, _WIDTH)
    return replace(config, extras={**config.extras, **routing, RENORMALIZE: True})


def write(config: ModelConfig) -> dict[str, Any]:
    """The same."""
    return {**granite.write(config), **write_experts(config, _COUNT, _WIDTH)}


def modules(*added: Module) -> tuple[Module, ...]:
    """The table, with these rows beside the experts of a layer."""
    experts = differing(
        expert_modules(BLOCK, *PARTS, router=_ROUTER),
        w1={"stack": Stack(_INPUT, 0, 2)},
        w3={"stack": Stack(_INPUT, 1, 2)},
        w2={"stack": Stack(_OUTPUT)},
    )
    return with_experts(granite.ARCHITECTURE.modules, (*experts, *added))


DEFAULTS = {**granite.ARCHITECTURE.defaults, "num_local_experts": 8, "num_experts_per_tok": 2}

ARCHITECTURE = Architecture("granitemoe", GraniteMoEDecoder, modules(), DEFAULTS, read, write)
