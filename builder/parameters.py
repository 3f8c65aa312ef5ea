"""How many numbers a model has, and how many of them one token is multiplied by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.experts import EXPERTS, TOP_K


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
        shape = module.shape(config)
        each = math.prod(shape) + (shape[0] if module.biased(config) else 0)
        number = each * sum(1 for _ in module.places(config))
        total += number
        active += number if module.experts is None else round(number * chosen_share(config))
    return Parameters(total, active)


def chosen_share(config: ModelConfig) -> float:
    """The part of a layer's experts that a token chooses; 1 for a model without experts."""
    experts: int = config.extras.get(EXPERTS, 1)
    chosen: int = config.extras.get(TOP_K, experts)
    return chosen / experts


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """How many of a layer's experts so many tokens choose, if each chooses evenly and by itself."""
    return experts * (1 - (1 - top_k / experts) ** tokens)
