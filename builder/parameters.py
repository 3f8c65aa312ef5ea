"""How many numbers a model has, and how many of them one token is multiplied by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.experts import EXPERTS, TOP_K
from slipstream.builder.models.module import Module


@dataclass(frozen=True, slots=True)
class Parameters:
    """Weights and biases of a model: ``active`` are those of ``total`` that are no expert's, or an
    expert's that a token chooses."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> Parameters:
    """By the table of the architecture; an embedding that is the head, too, counts once."""
    total = active = 0
    for module in architecture_of(config.architecture).modules:
        shape, experts = module.shape(config), module.experts
        each = math.prod(shape) + (shape[0] if module.biased(config) else 0)
        number = each * _layers(module, config)
        total += number * (1 if experts is None else experts(config).units)
        active += number * (1 if experts is None else config.extras[TOP_K])
    return Parameters(total, active)


def _layers(module: Module, config: ModelConfig) -> int:
    """How many layers have a module; 1 for one outside of layers that is no copy."""
    if "{i}" in module.name:
        return sum(module.present(config, layer) for layer in range(len(config.layer_kinds)))
    return int(not (module.tied and config.tie_word_embeddings))


def chosen_share(config: ModelConfig) -> float:
    """The part of a layer's experts that a token chooses; 1 for a model without experts."""
    experts: int = config.extras.get(EXPERTS, 1)
    chosen: int = config.extras.get(TOP_K, experts)
    return chosen / experts
