"""The Hugging Face ``config.json``: the pieces that architectures read and write it with.

A missing key gets the default of that architecture's configuration class in transformers 5.23; both
spellings of the rotary parameters are read (``rope_theta`` and ``rope_scaling``, or
``rope_parameters``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast, get_args

from slipstream.builder.models import class_of, find_architecture
from slipstream.builder.models.config import (
    FULL,
    SLIDING,
    ModelConfig,
    Rope,
    RopeKind,
    RopeScaling,
)
from slipstream.weights.json import Fields, Origin, is_integer, shortened

_ORIGIN = Origin("config.json", "correct it or download the checkpoint again")
_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_LEAST_EPS = 1e-30  # far below all that is used, and not yet nothing as a float32
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
_ORIGINAL = "original_max_position_embeddings"
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# Which of RopeScaling's fields transformers reads for a kind.
_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", _ORIGINAL, *_YARN),
        "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
        "proportional": ("factor", "partial_rotary_factor"),
    }
)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """What ``ModelConfig.from_huggingface`` returns and raises."""
    given = Fields(raw, _ORIGIN)
    names = given.texts("architectures", ())
    architecture = find_architecture(names, given.optional_text("model_type"))
    values = {**_COMMON_DEFAULTS, **architecture.defaults, **raw, "model_type": architecture.name}
    return architecture.read(Fields(values, _ORIGIN))


def describe(config: ModelConfig) -> dict[str, Any]:
    """A Hugging Face ``config.json`` that is read as this configuration."""
    name, architecture = class_of(config.architecture)
    eos = config.eos_token_ids
    return {
        "architectures": [name],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": described_ropes(config),
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        **architecture.write(config),
    }


def read_decoder(
    keys: Fields,
    *,
    ropes: Mapping[str, Rope] | None = None,
    activations: Sequence[str] = ("silu",),
) -> ModelConfig:
    """What every decoder's config.json says: no biases, no windows, no norms of heads.

    ``ropes`` are the rotary angles by kind of layer, of an architecture that has several.
    """
    activation = keys.text("hidden_act")
    if activation not in activations:
        raise keys.origin.error(
            f"config.json: hidden_act is {activation!r}, but only "
            f"{' and '.join(map(repr, activations))} is supported; choose another model"
        )
    eps = keys.number("rms_norm_eps", positive=True)
    if not _LEAST_EPS <= eps <= 1:
        raise keys.refusal("rms_norm_eps", f"a number from {_LEAST_EPS} to 1")
    num_heads, num_kv_heads, head_dim = _heads(keys)
    ropes = {FULL: read_rope(keys, head_dim)} if ropes is None else dict(ropes)
    common = ropes.pop(FULL)
    num_layers = _count(keys, "num_hidden_layers", _MOST_LAYERS)
    return ModelConfig(
        architecture=keys.text("model_type"),
        vocab_size=_count(keys, "vocab_size"),
        hidden_size=_count(keys, "hidden_size"),
        intermediate_size=_count(keys, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_count(keys, "max_position_embeddings"),
        rms_norm_eps=eps,
        rope_theta=common.theta,
        rope_scaling=common.scaling,
        rotary_dim=common.dim,
        sliding_window=None,
        layer_kinds=(FULL,) * num_layers,
        attention_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        hidden_act=activation,
        bos_token_id=next(iter(_token_ids(keys, "bos_token_id")), None),
        eos_token_ids=_token_ids(keys, "eos_token_id"),
        ropes=ropes,
    )


def with_window(config: ModelConfig, keys: Fields, kinds: Iterable[str]) -> ModelConfig:
    """The configuration with layers of these kinds and, where one of them slides, the window; as it
    is where config.json has no window."""
    kinds = tuple(kinds)
    if not keys.has("sliding_window") or SLIDING not in kinds:
        return config
    window = _count(keys, "sliding_window")
    return dataclasses.replace(config, sliding_window=window, layer_kinds=kinds)


def layer_kinds(keys: Fields, default: Sequence[str]) -> tuple[str, ...]:
    """``layer_types``: ``full_attention`` or ``sliding_attention`` for each layer."""
    if not keys.has("layer_types"):
        return tuple(default)
    kinds = keys.texts("layer_types")
    if len(kinds) != len(default) or not set(kinds) <= {FULL, SLIDING}:
        raise keys.refusal("layer_types", f"{len(default)} entries, each {FULL!r} or {SLIDING!r}")
    return kinds


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The window and the kinds of layers, for an architecture that reads ``layer_types``."""
    if config.sliding_window is None:
        return {}
    return {"sliding_window": config.sliding_window, "layer_types": list(config.layer_kinds)}


def read_rope(keys: Fields, head_dim: int) -> Rope:
    """The rotary angles of all layers, from the old or the new spelling."""
    spelling = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    given = keys.fields(spelling, {})
    if any(isinstance(value, Mapping) for value in given.values.values()):
        raise keys.refusal(spelling, "one rope type, the same for every layer")
    return _rope(given, keys, head_dim)


def read_ropes(keys: Fields, head_dim: int) -> dict[str, Rope]:
    """The rotary angles by kind of layer, from ``rope_parameters`` of that form."""
    given = keys.fields_by_name("rope_parameters")
    if FULL not in given:
        raise keys.refusal("rope_parameters", f"an entry for each kind of layer, {FULL!r} first")
    return {kind: _rope(fields, keys, head_dim) for kind, fields in given.items()}


def head_size(keys: Fields) -> int:
    """``head_dim``, or what the heads make of the residual stream."""
    return _heads(keys)[2]


def rotary_fraction(dim: int, head_dim: int) -> float:
    """The ``partial_rotary_factor`` of which transformers, which cuts the product with the head to
    an integer, makes ``dim``."""
    fraction = dim / head_dim
    return fraction if int(head_dim * fraction) == dim else math.nextafter(fraction, 1)


def _heads(keys: Fields) -> tuple[int, int, int]:
    """Query heads, key/value heads and the size of a head."""
    heads = _count(keys, "num_attention_heads")
    has_kv = keys.has("num_key_value_heads")
    kv_heads = _count(keys, "num_key_value_heads") if has_kv else heads
    if heads % kv_heads:
        raise keys.origin.error(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}; correct config.json or download the checkpoint again"
        )
    if keys.has("head_dim"):
        return heads, kv_heads, _count(keys, "head_dim")
    hidden = _count(keys, "hidden_size")
    if hidden < heads:
        raise keys.refusal("hidden_size", f"an integer of at least num_attention_heads {heads}")
    return heads, kv_heads, hidden // heads


def _rope(given: Fields, keys: Fields, head_dim: int) -> Rope:
    """Angles from their own object, or from keys beside it."""

    def either(key: str, default: float) -> float:
        source = given if given.has(key) else keys
        return source.number(key, default, positive=True)

    theta = either("rope_theta", 10000.0)
    fraction = either("partial_rotary_factor", 1.0)
    kind = given.values.get("rope_type", given.values.get("type", "default"))
    whole = kind == "proportional"  # its fraction is one of the frequencies
    # A fraction that is written in decimals may fall just short of the elements it means.
    dim = head_dim if whole else int(head_dim * min(fraction, 1.0) + 1e-3)
    if fraction > 1 or dim < 2 or dim % 2:
        source = given if given.has("partial_rotary_factor") else keys
        wanted = f"the part of a head of {head_dim} elements that is rotated, in pairs of elements"
        raise source.refusal("partial_rotary_factor", wanted)
    if kind not in get_args(RopeKind):
        raise keys.origin.error(
            f"config.json: rope type {shortened(kind)} with keys "
            f"{shortened(sorted(given.values))} is not supported; "
            f"expected one of {', '.join(get_args(RopeKind))}"
        )
    scaling = _scaling(cast("RopeKind", kind), given, keys)
    if kind == "longrope":
        short, long = (_divisors(given, name, dim // 2) for name in ("short_factor", "long_factor"))
        scaling = dataclasses.replace(scaling, short_factor=short, long_factor=long)
    if whole:
        scaling = dataclasses.replace(scaling, partial_rotary_factor=fraction)
    return Rope(theta, dim, scaling)


def _divisors(given: Fields, key: str, count: int) -> tuple[float, ...]:
    """What the frequencies are divided by, one by one."""
    divisors = given.numbers(key)
    if len(divisors) != count or min(divisors) <= 0:
        raise given.refusal(key, f"{count} positive numbers, one for each pair that is rotated")
    return divisors


def _scaling(kind: RopeKind, given: Fields, keys: Fields) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, given.number("factor", positive=True))
    if kind == "proportional":
        return RopeScaling(kind, given.number("factor", 1.0, positive=True))
    longest = _count(keys, "max_position_embeddings")
    # A value beside the rope parameters wins over one inside them, as in transformers.
    source = keys if keys.values.get(_ORIGINAL) else given
    original = source.integer(_ORIGINAL, longest, minimum=1, maximum=_LARGEST)
    if kind == "llama3":
        low = given.number("low_freq_factor", positive=True)
        high = given.number("high_freq_factor", positive=True)
        if low >= high:
            raise given.refusal("high_freq_factor", f"a number above low_freq_factor {low}")
        factor = given.number("factor", positive=True)
        return RopeScaling(kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    factor = given.number("factor", longest / original, positive=True)
    attention_factor = given.optional_number("attention_factor")
    if kind == "longrope":
        return RopeScaling(kind, factor, original, attention_factor=attention_factor)
    default = RopeScaling()
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor=attention_factor,
        beta_fast=given.number("beta_fast", default.beta_fast, positive=True),
        beta_slow=given.number("beta_slow", default.beta_slow, positive=True),
        mscale=given.optional_number("mscale"),
        mscale_all_dim=given.optional_number("mscale_all_dim"),
        truncate=given.flag("truncate", default.truncate),
    )


def described_ropes(
    config: ModelConfig, head_dims: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """``rope_parameters``, by kind of layer where those differ; ``head_dims`` are those of kinds
    whose heads may be others than the configuration's."""
    common = Rope(config.rope_theta, config.rotary_dim, config.rope_scaling)
    if not config.ropes and not head_dims:
        return _described(common, config.head_dim)
    ropes = {FULL: common, **config.ropes}
    return {
        kind: _described(rope, head_dims.get(kind, config.head_dim)) for kind, rope in ropes.items()
    }


def _described(rope: Rope, head_dim: int) -> dict[str, Any]:
    values = dataclasses.asdict(rope.scaling)
    given = {name: values[name] for name in _ROPE_FIELDS[rope.scaling.kind]}
    fraction = rotary_fraction(rope.dim, head_dim)
    return {
        "rope_type": rope.scaling.kind,
        "rope_theta": rope.theta,
        **{
            name: list(v) if isinstance(v, tuple) else v
            for name, v in given.items()
            if v is not None
        },
        **({} if fraction == 1 else {"partial_rotary_factor": fraction}),
    }


def _token_ids(keys: Fields, key: str) -> tuple[int, ...]:
    """One token, several or none."""
    given = keys.values.get(key)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    found = tuple(token for token in ids if is_integer(token) and -1 <= token <= _LARGEST)
    if len(found) != len(ids):
        raise keys.refusal(key, "token ids or null")
    return tuple(token for token in found if token >= 0)  # -1 is none, too


def _count(keys: Fields, key: str, maximum: int = _LARGEST) -> int:
    return keys.integer(key, minimum=1, maximum=maximum)
