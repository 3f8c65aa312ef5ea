"""What the builder knows of a model before it reads a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from slipstream.errors import EngineMismatchError

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    The fields have the names and meanings of the ``rope_parameters`` of transformers; a kind reads
    only its own. ``attention_factor`` None means that it follows from ``factor``, ``mscale`` and
    ``mscale_all_dim`` (YaRN, arXiv 2309.00071).
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


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder-only transformer.

    ``rotary_dim`` counts the leading elements of a head that are rotated. ``attention_bias`` is the
    bias of q, k and v. ``sliding_window`` is in tokens; ``sliding_layers`` says layer by layer who
    uses it. ``bos_token_id`` and ``eos_token_ids`` come from the model's configuration; a
    generation configuration beside it may name more.
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
    sliding_layers: tuple[bool, ...]
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def window(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself included; 0 when it sees all before it."""
        return self.sliding_window if self.sliding_window and self.sliding_layers[layer] else 0

    def weight_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight by its Hugging Face name; None for a name that only one
        architecture has."""
        hidden, q = self.hidden_size, self.num_heads * self.head_dim
        kv, inner = self.num_kv_heads * self.head_dim, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("embed_tokens", "lm_head"), (self.vocab_size, hidden)),
            **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), (hidden,)),
            **dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,)),
            **dict.fromkeys(("k_proj", "v_proj"), (kv, hidden)),
            **dict.fromkeys(("gate_proj", "up_proj"), (inner, hidden)),
            **{"q_proj": (q, hidden), "o_proj": (hidden, q), "down_proj": (hidden, inner)},
        }
        *_, module, kind = ("", *name.split("."))
        shape = shapes.get(module)
        return shape[:1] if shape and kind == "bias" else shape

    def to_json(self) -> dict[str, Any]:
        """This configuration as plain dicts, lists, strings and numbers."""
        data = dataclasses.asdict(self)
        data["sliding_layers"] = list(self.sliding_layers)
        data["eos_token_ids"] = list(self.eos_token_ids)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """What ``to_json`` wrote; EngineMismatchError when its keys are not ours."""
        values = _known_keys(cls, data)
        values["rope_scaling"] = RopeScaling(**_known_keys(RopeScaling, values["rope_scaling"]))
        values["sliding_layers"] = tuple(values["sliding_layers"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**values)

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The configuration that a Hugging Face ``config.json`` describes.

        A missing key gets the default of that architecture's class in transformers 5.23. Raises
        CheckpointError for an architecture, activation, rope type or value we cannot run.
        """
        # Imported here because that module builds this class.
        from slipstream.builder.models.huggingface_config import parse

        return parse(raw)


def _known_keys(cls: type[ModelConfig] | type[RopeScaling], data: object) -> dict[str, Any]:
    expected = {f.name for f in dataclasses.fields(cls)}
    found = set(data) if isinstance(data, Mapping) else set()
    if found != expected:
        raise EngineMismatchError(
            f"the engine's model configuration has unknown keys {sorted(found - expected)} and "
            f"lacks {sorted(expected - found)}; build the engine again with this Slipstream"
        )
    return dict(cast("Mapping[str, Any]", data))
