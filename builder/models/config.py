"""What the builder knows of a model before it reads a weight."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slipstream.builder.from_json import from_json
from slipstream.errors import EngineMismatchError

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"]
FULL, SLIDING = "full_attention", "sliding_attention"
LONGEST = 2**31 - 1  # tokens of a sequence: positions are int32


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    The fields have the names and meanings of the ``rope_parameters`` of transformers; a kind reads
    only its own. ``attention_factor`` None means that it follows from ``factor``, ``mscale`` and
    ``mscale_all_dim`` (YaRN, arXiv 2309.00071), or from ``factor`` and the original length
    (LongRoPE, arXiv 2402.13753). ``partial_rotary_factor`` is the share of the pairs of a head that
    turn in a proportional one, whose frequencies are those of all pairs.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary angles: the base wavelength, the leading elements of a head that are rotated, and how
    frequencies are stretched."""

    theta: float
    dim: int
    scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder-only transformer.

    ``rotary_dim`` counts the leading elements of a head that are rotated. ``attention_bias`` is the
    bias of q, k and v. ``layer_kinds`` names the kind of each layer, as ``layer_types`` of
    transformers do; ``sliding_window`` is in tokens and that of layers of the kind
    ``sliding_attention``. ``ropes`` has the kinds of layers whose rotary angles are others than
    those of ``rope_theta``, ``rope_scaling`` and ``rotary_dim``. ``bos_token_id`` and
    ``eos_token_ids`` come from the model's configuration; a generation configuration beside it may
    name more. ``extras`` are constants (of JSON's types) that only the architecture's own file
    knows.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    rotary_dim: int
    sliding_window: int | None
    layer_kinds: tuple[str, ...]
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    ropes: dict[str, Rope] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have, as vLLM has it: YaRN and linear factors lengthen the
        context, by YaRN from the original one. An architecture with several kinds of rotary angles
        says the length that they make."""
        scaling, length = self.rope_scaling, self.max_position_embeddings
        if self.ropes or scaling.kind not in ("linear", "yarn"):
            return length
        original = length if scaling.kind == "linear" else scaling.original_max_position_embeddings
        return max(1, int(min(original * scaling.factor, LONGEST)))

    def window(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself included; 0 when it sees all before it."""
        sliding = self.layer_kinds[layer] == SLIDING
        return self.sliding_window if self.sliding_window and sliding else 0

    def rope(self, layer: int) -> Rope:
        """The rotary angles of a layer."""
        common = Rope(self.rope_theta, self.rotary_dim, self.rope_scaling)
        return self.ropes.get(self.layer_kinds[layer], common)

    def flag(self, name: str) -> bool:
        """A field, or one of ``extras``, that says yes or no."""
        return bool(self.extras[name] if name in self.extras else getattr(self, name))

    def with_flags(self, flags: Mapping[str, bool]) -> ModelConfig:
        """The same with other values of flags, each where it is."""
        extras = {name: value for name, value in flags.items() if name in self.extras}
        fields: dict[str, Any] = {name: flags[name] for name in flags if name not in extras}
        return dataclasses.replace(self, **fields, extras=self.extras | extras)

    def weight_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight by its Hugging Face name; None for one that is not in the table of
        its architecture."""
        # Imported here because the table is made of functions of this class.
        from slipstream.builder.models import architecture_of

        return architecture_of(self.architecture).shape(self, name)

    def to_json(self) -> dict[str, Any]:
        """This configuration as plain dicts, lists, strings and numbers."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """What ``to_json`` wrote; EngineMismatchError for a key that is missing, unknown or of
        another type."""
        try:
            return from_json(cls, data)
        except ValueError as error:
            raise EngineMismatchError(
                f"the engine's model configuration cannot be read ({error}); build the engine "
                "again with this Slipstream"
            ) from error

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The configuration that a Hugging Face ``config.json`` describes.

        A missing key gets the default of that architecture's class in transformers 5.23. Raises
        CheckpointError for an architecture, activation, rope type or value we cannot run.
        """
        # Imported here because that module builds this class.
        from slipstream.builder.models.huggingface_config import parse

        return parse(raw)
