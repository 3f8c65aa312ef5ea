"""GGUF metadata as the Hugging Face configuration it was converted from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.gguf.special_tokens import end_token_ids, token_id
from slipstream.builder.models import architectures
from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING
from slipstream.builder.models.huggingface_config import rotary_fraction
from slipstream.errors import CheckpointError
from slipstream.weights.json import is_integer, shortened

# Divisors of frequencies: Llama 3's, and those of LongRoPE.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_EXPERT_COUNT, _NEXTN = "expert_count", "nextn_predict_layers"
# What llama.cpp's converter takes for Llama 3 models; it stores only the factors they give.
_LLAMA3 = MappingProxyType(
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
)

_STILL = 1e20  # divided by so much, no angle is one


def huggingface_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """A ``config.json`` from metadata, the shapes of the tensors by GGUF name, and those of
    ``ROPE_FACTORS`` [rotary_dim/2] that the file has."""
    keys = _Keys(str(metadata.get("general.architecture")), metadata)
    architecture = _architecture(keys)
    assert architecture.gguf is not None
    keys = replace(keys, by_layer=frozenset(architecture.gguf.by_layer.values()))
    experts = keys.get(_EXPERT_COUNT, 0)
    if experts and not _has_experts(architecture):
        raise CheckpointError(
            f"the GGUF file is a mixture of {shortened(experts)} experts, which is not supported; "
            "use a dense model"
        )
    if "token_embd.weight" not in shapes:
        raise CheckpointError("the GGUF file has no token_embd.weight; download it again")
    heads = keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", keys.count("embedding_length") // heads)
    rotary_dim = keys.count("rope.dimension_count", head_dim, maximum=head_dim)
    theta = keys.number("rope.freq_base", 10000.0)
    found = {
        "model_type": architecture.name,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_epsilon", None)
        or keys.need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_theta": theta,
            "partial_rotary_factor": rotary_fraction(rotary_dim, head_dim),
            **_rope_scaling(keys, rope_factors, theta, rotary_dim),
        },
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": token_id(metadata, "bos"),
        "eos_token_id": end_token_ids(metadata),
        "use_qk_norm": any(name.endswith("attn_q_norm.weight") for name in shapes),
        "attention_k_eq_v": any(
            name.endswith("attn_k.weight") and name.replace("attn_k", "attn_v") not in shapes
            for name in shapes
        ),
        **_own_keys(architecture.gguf, keys),
    }
    return {**found, **architecture.gguf.concluded(found)}


def block_count(metadata: Mapping[str, Any]) -> int:
    """How many blocks a file has, those behind the decoder's layers included."""
    return _Keys(str(metadata.get("general.architecture")), metadata).count("block_count")


def _architecture(keys: _Keys) -> Architecture:
    """That of the file's general.architecture, with the mark that the file has if any has one."""
    found = [a for a in architectures() if a.gguf is not None and a.gguf.name == keys.architecture]
    if not found:
        known = dict.fromkeys(a.gguf.name for a in architectures() if a.gguf is not None)
        raise CheckpointError(
            f"the GGUF file's general.architecture is {keys.architecture[:80]!r}, which is not "
            f"supported; expected one of {', '.join(known)}"
        )
    return max(found, key=lambda a: _fit(a, keys))


def _fit(architecture: Architecture, keys: _Keys) -> tuple[bool, int]:
    """Whether both have experts or both have none; then 1 for a mark that the file has, -1 for one
    that it lacks, 0 without one."""
    assert architecture.gguf is not None
    mark = architecture.gguf.mark
    alike = _has_experts(architecture) == bool(keys.get(_EXPERT_COUNT, 0))
    return alike, 0 if mark is None else 1 if keys.get(mark, 0) else -1


def _has_experts(architecture: Architecture) -> bool:
    """Whether it is a mixture of experts."""
    return any(module.role == "expert" for module in architecture.modules)


def _own_keys(family: GGUFFamily, keys: _Keys) -> dict[str, Any]:
    for key, value in family.only.items():
        if keys.get(key, value) != value:
            raise CheckpointError(
                f"the GGUF file's {keys.architecture}.{key} is {shortened(keys.get(key, None))}, "
                f"and only {value} is supported; use another model"
            )
    found = {
        ours: keys.layer_kinds(theirs) if ours == "layer_types" else keys.get(theirs, None)
        for ours, theirs in family.keys.items()
    }
    found |= {ours: keys.of_layers(theirs) for ours, theirs in family.by_layer.items()}
    return {ours: value for ours, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Keys:
    """Metadata under the prefix of the architecture; lists of ``by_layer`` may hold different
    values, of which the first is given."""

    architecture: str
    metadata: Mapping[str, Any]
    by_layer: frozenset[str] = frozenset()

    def get(self, key: str, default: Any) -> Any:  # noqa: ANN401  a metadata value has any type
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            differs = any(other != value[0] for other in value) and key not in self.by_layer
            if not value or differs:
                raise CheckpointError(
                    f"the GGUF file's {self.architecture}.{key} differs between layers "
                    f"({shortened(value)}), which is not supported; use a model whose layers are "
                    "alike"
                )
            return value[0]
        return default if value is None else value

    def layers(self) -> int:
        """The decoder layers, after which there may be some that predict further tokens."""
        blocks, more = self.count("block_count"), self.get(_NEXTN, 0)
        if is_integer(more) and 0 <= more < blocks:
            return blocks - more
        raise CheckpointError(
            f"the GGUF file's {self.architecture}.{_NEXTN} is {shortened(more)}, of {blocks} "
            "blocks; download it again"
        )

    def layer_kinds(self, key: str) -> list[str] | None:
        """What a list that says of each layer whether it has a window says; None without one."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, list):
            return None
        return [SLIDING if windowed else FULL for windowed in value]

    def of_layers(self, key: str) -> list[Any]:
        """A value for each layer, whether the file says so or has one for all."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, list) else [value] * self.layers()

    def need(self, key: str) -> Any:  # noqa: ANN401
        value = self.get(key, None)
        if value is None:
            raise CheckpointError(
                f"the GGUF file has no {self.architecture}.{key}; download it again or convert it "
                "again"
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise CheckpointError(
            f"the GGUF file's {self.architecture}.{key} is {shortened(value)}; expected a positive "
            "number: "
            "download it again"
        )

    def count(self, key: str, default: int | None = None, maximum: int = 2**31 - 1) -> int:
        value = self.need(key) if default is None else self.get(key, default)
        if is_integer(value) and 0 < value <= maximum:
            return value
        raise CheckpointError(
            f"the GGUF file's {self.architecture}.{key} is {shortened(value)}; expected a positive "
            f"integer of at most {maximum}: download it again"
        )


def _rope_scaling(
    keys: _Keys, factors: Mapping[str, NDArray[np.float32]], theta: float, rotary_dim: int
) -> dict[str, Any]:
    divisors, *longrope = (factors.get(name) for name in ROPE_FACTORS)
    if divisors is not None:
        return _by_divisors(divisors.astype(np.float64).ravel(), theta, rotary_dim)
    short, long = (None if each is None else each.ravel().tolist() for each in longrope)
    if short is not None or long is not None:
        attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
        by_length = {"short_factor": short, "long_factor": long}
        return {"rope_type": "longrope", "attention_factor": attention_factor, **by_length}
    # Without a type it is linear; the factor's first name was another.
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", None))
    if kind == "none" or (kind == "linear" and not factor):
        return {"rope_type": "default"}
    if keys.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"the GGUF file's {kind} rope scaling has an attn_factor of its own, which is not "
            "supported; use the model's Hugging Face checkpoint"
        )
    if factor is None:
        factor = keys.need("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor}
    optional = {
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    for ours, theirs in optional.items():
        value = keys.get(f"rope.scaling.{theirs}", None)
        if value is not None:
            scaling[ours] = value
    return scaling


def _by_divisors(divisors: NDArray[np.float64], theta: float, rotary_dim: int) -> dict[str, Any]:
    """Those of Llama 3, or such that turn the first pairs and keep the others where they are."""
    turning = int(np.count_nonzero(divisors == 1))
    still = divisors[turning:]
    if len(divisors) == rotary_dim // 2 and len(still) and (still >= _STILL).all():
        return {"rope_type": "proportional", "partial_rotary_factor": 2 * turning / rotary_dim}
    return _llama3_scaling(divisors, theta, rotary_dim)


def _llama3_scaling(factors: NDArray[np.float64], theta: float, rotary_dim: int) -> dict[str, Any]:
    """The llama3 parameters whose per-frequency divisors are ``factors``."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factor = float(factors.max(initial=1.0))
    frequency = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            "the GGUF file's rope_freqs.weight is not the frequency scaling of a Llama 3 model; "
            "use the model's Hugging Face checkpoint"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
