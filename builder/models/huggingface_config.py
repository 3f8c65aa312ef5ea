"""The Hugging Face ``config.json`` of the supported architectures.

A missing key gets the default of that architecture's configuration class in transformers 5.23; both
spellings of the rotary parameters are read (``rope_theta`` and ``rope_scaling``, or
``rope_parameters``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from slipstream.builder.models import ARCHITECTURES, load_architecture
from slipstream.builder.models.architecture import Architecture, Sliding
from slipstream.builder.models.config import ModelConfig, RopeKind, RopeScaling
from slipstream.errors import CheckpointError

_COMMON_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """What ``ModelConfig.from_huggingface`` returns and raises."""
    architecture = _architecture(raw)
    values = {**_COMMON_DEFAULTS, **architecture.defaults, **raw}
    if values["hidden_act"] != "silu":
        raise CheckpointError(
            f"config.json: hidden_act is {values['hidden_act']!r}, but only 'silu' is "
            "supported; choose a model of the plain Llama, Mistral, Qwen2 or Qwen3 design"
        )
    num_layers = _integer(values, "num_hidden_layers")
    num_heads, num_kv_heads, head_dim = _heads(values)
    max_positions = _integer(values, "max_position_embeddings")
    theta, partial, scaling = _rope(values, max_positions)
    window, sliding_layers = _sliding(values, architecture.sliding, num_layers)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=_integer(values, "hidden_size"),
        intermediate_size=_integer(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(values, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=int(head_dim * partial),
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_bias=_flag(values, architecture.attention_bias),
        o_bias=_flag(values, architecture.o_bias),
        mlp_bias=_flag(values, architecture.mlp_bias),
        qk_norm=architecture.qk_norm,
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        hidden_act=values["hidden_act"],
        bos_token_id=next(iter(_token_ids(values, "bos_token_id")), None),
        eos_token_ids=_token_ids(values, "eos_token_id"),
    )


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    names = raw.get("architectures") or []
    for name in names or ARCHITECTURES:
        if name in ARCHITECTURES:
            architecture = load_architecture(name)
            if names or raw.get("model_type") == architecture.name:
                return architecture
    given = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise CheckpointError(
        f"config.json: architecture {given} is not supported; expected one of "
        f"{', '.join(ARCHITECTURES)}"
    )


def _heads(values: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads and the size of a head."""
    heads = _integer(values, "num_attention_heads")
    missing_kv = values["num_key_value_heads"] is None
    kv_heads = heads if missing_kv else _integer(values, "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}; correct config.json or download the checkpoint again"
        )
    if values["head_dim"] is not None:
        return heads, kv_heads, _integer(values, "head_dim")
    return heads, kv_heads, _integer(values, "hidden_size") // heads


def _sliding(
    values: Mapping[str, Any], rule: Sliding, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The window, None when no layer uses one, and which layers use it."""
    layers: tuple[bool, ...] = (False,) * num_layers
    if values["sliding_window"] is not None:
        if rule == "every_layer":
            layers = (True,) * num_layers
        elif rule == "by_layer_type" and _flag(values, "use_sliding_window"):
            layers = _layers_by_type(values, num_layers)
    return (_integer(values, "sliding_window") if any(layers) else None), layers


def _layers_by_type(values: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    kinds = values.get("layer_types")
    if kinds is None:
        first = _integer(values, "max_window_layers", 0)
        return tuple(layer >= first for layer in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json: layer_types is {kinds!r}; expected {num_layers} entries, each "
            "'full_attention' or 'sliding_attention'"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _rope(values: Mapping[str, Any], max_positions: int) -> tuple[float, float, RopeScaling]:
    """Base wavelength, rotated fraction of a head and scaling, from the old or the new spelling."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if given.get(key) is None:
            given[key] = values.get(key)
    theta = 10000.0 if given["rope_theta"] is None else _number(given, "rope_theta")
    partial = 1.0
    if given["partial_rotary_factor"] is not None:
        partial = _number(given, "partial_rotary_factor")
    kind: Any = given.get("rope_type", given.get("type", "default"))
    if kind not in get_args(RopeKind) or any(isinstance(v, Mapping) for v in given.values()):
        raise CheckpointError(
            f"config.json: rope type {kind!r} with keys {sorted(given)} is not supported; expected "
            f"one of {', '.join(get_args(RopeKind))}, the same for every layer"
        )
    if kind == "default":
        return theta, partial, RopeScaling()
    return theta, partial, _scaling(kind, given, values, max_positions)


def _scaling(
    kind: RopeKind, given: dict[str, Any], values: Mapping[str, Any], max_positions: int
) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind, _number(given, "factor"))
    # A value beside the rope parameters wins over one inside them, as in transformers.
    outer = values.get("original_max_position_embeddings")
    original = outer or given.get("original_max_position_embeddings") or max_positions
    if kind == "llama3":
        return RopeScaling(
            kind,
            _number(given, "factor"),
            int(original),
            low_freq_factor=_number(given, "low_freq_factor"),
            high_freq_factor=_number(given, "high_freq_factor"),
        )
    default = RopeScaling()
    ratio = max_positions / original
    return RopeScaling(
        kind,
        ratio if given.get("factor") is None else _number(given, "factor"),
        int(original),
        attention_factor=given.get("attention_factor"),
        beta_fast=float(given.get("beta_fast") or default.beta_fast),
        beta_slow=float(given.get("beta_slow") or default.beta_slow),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=bool(given.get("truncate", default.truncate)),
    )


def _token_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One token, several or none."""
    given = values[key]
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"config.json: {key} is {given!r}; expected token ids or null")
    return tuple(ids)


def _integer(values: Mapping[str, Any], key: str, minimum: int = 1) -> int:
    value = values.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    raise CheckpointError(
        f"config.json: {key} is {value!r}; expected an integer of at least {minimum}"
    )


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise CheckpointError(f"config.json: {key} is {value!r}; expected a positive number")


def _flag(values: Mapping[str, Any], key: str | bool) -> bool:
    value = key if isinstance(key, bool) else values.get(key)
    if isinstance(value, bool):
        return value
    raise CheckpointError(f"config.json: {key} is {value!r}; expected true or false")
