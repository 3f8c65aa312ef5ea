"""What an architecture's file declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from slipstream.builder.models.decoder import Decoder

Sliding = Literal["never", "every_layer", "by_layer_type"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How an architecture reads ``config.json`` and which class declares its graph.

    ``defaults`` are those of the architecture's configuration class in transformers. A bias is a
    fixed value or the key of config.json that has it.
    """

    name: str
    decoder: type[Decoder]
    defaults: Mapping[str, Any]
    sliding: Sliding = "never"
    attention_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: bool = False
