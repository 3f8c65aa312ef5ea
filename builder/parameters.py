"""How many numbers a model has, and how many of them one token is multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        number = sum(_numbers(module, seen) for seen in _layers(module, config))
        experts = module.experts
        total += number * (1 if experts is None else experts(config).units)
        active += number * (1 if experts is None else config.extras[TOP_K])
    return Parameters(total, active)


def _numbers(module: Module, config: ModelConfig) -> int:
    """Those of a weight and its bias, of one expert if it is of experts."""
    shape = module.shape(config)
    return math.prod(shape) + (shape[0] if module.biased(config) else 0)


def _layers(module: Module, config: ModelConfig) -> Iterator[ModelConfig]:
    """The configuration as each layer that has a module has it; once, for one outside of layers
    that is no copy."""
    if "{i}" in module.name:
        in_layer = architecture_of(config.architecture).in_layer
        numbers = range(config.num_layers)
        yield from (in_layer(config, i) for i in numbers if module.present(config, i))
    elif module.present(config, 0) and not (module.tied and config.tie_word_embeddings):
        yield config


def chosen_share(config: ModelConfig) -> float:
    """The part of a layer's experts that a token chooses; 1 for a model without experts."""
    experts: int = config.extras.get(EXPERTS, 0)  # 0, too, in families where only some have them
    return config.extras[TOP_K] / experts if experts else 1.0
