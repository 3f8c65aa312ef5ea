"""A directory with a head that guesses tokens, of SpecForge or of speculators.

SpecForge's config.json is that of the head's layers, with keys of its own beside; that of
speculators has it inside, as ``transformer_layer_config``. Their tensors have the same names, but
that the first layer of SpecForge's is ``midlayer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import unknown_tensor
from slipstream.builder.checkpoints.huggingface.reader import read_config, stored_weights
from slipstream.builder.checkpoints.names import REDUNDANT
from slipstream.builder.checkpoints.quantized import quantization_config
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.eagle3 import (
    BEFORE_FC,
    BEFORE_RESIDUAL,
    DRAFT_VOCAB,
    FC_NORM,
    FIRST,
    MASK,
    NORM_OUTPUT,
    NUM_STATES,
    OWN_EMBEDDING,
    TARGET_SIZE,
)
from slipstream.builder.models.huggingface_config import layer_kinds, with_window
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import LazyTensor

_SPECULATORS, _LAYER = "speculators_model_type", "transformer_layer_config"
_INSIDE, _STATES = "eagle_config", "eagle_aux_hidden_state_layer_ids"
# The names that are known for the token of places which a head guesses at once.
_MASK_TOKENS = ("pard_token", "ptd_token_id", "mask_token_id")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# From a token of the head to its own of the target, and which those are: the first says it all.
_OFFSETS, _KNOWN = "d2t", "t2d"
_FC, _EMBEDDING = "model.fc.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class HeadCheckpoint:
    """A head on disk, with weights by the names of its architecture.

    ``layers`` are how many layers of the target its states have gone through, None where it does
    not say. ``tokens`` has the target's token for each that it knows, None where they are the same.
    ``mask_token`` is that of a head which guesses several at once, None of another.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    layers: tuple[int, ...] | None
    tokens: NDArray[np.int32] | None
    mask_token: int | None

    def tensor(self, name: str) -> LazyTensor:
        """One weight, not yet read."""
        if name not in self.tensors:
            raise unknown_tensor(self.path, name, tuple(self.tensors))
        return self.tensors[name]


def open_head(path: Path) -> HeadCheckpoint:
    """Reads config.json, the headers and which tokens the head knows.

    Raises CheckpointError for what is no such head, or is one that cannot be read.
    """
    raw, stored = read_config(path), _renamed(stored_weights(path))
    if _FC not in stored or "model.layers.0.hidden_norm.weight" not in stored:
        raise CheckpointError(
            f"{path} is no EAGLE-3 head: it has no fc.weight, or no hidden_norm in its first "
            "layer; give one of SpecForge or speculators, or use a smaller model with "
            "--speculative draft"
        )
    if quantization_config(path, raw) is not None:
        raise CheckpointError(
            f"{path} is quantized, and heads are read dense only: give the head in bfloat16, which "
            "--quantization quantizes with its model"
        )
    offsets, _ = stored.pop(_OFFSETS, None), stored.pop(_KNOWN, None)
    config = _read(raw, stored)
    tokens = _tokens(config, offsets)
    if tokens is None and config.extras[DRAFT_VOCAB] < config.vocab_size:
        raise CheckpointError(
            f"{path} knows {config.extras[DRAFT_VOCAB]} of {config.vocab_size} tokens and has no "
            f"tensor {_OFFSETS} that says which; download it again"
        )
    tensors = {name: tensor.dense() for name, tensor in stored.items()}
    mask_token = _mask_token(raw, config, tensors[MASK]) if MASK in tensors else None
    return HeadCheckpoint(path, config, tensors, _layers(raw), tokens, mask_token)


def _renamed(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """By the names of the architecture, without what the configuration already says."""
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(REDUNDANT)}
    names = {name: _name(name) for name in kept}
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in kept.items()}


def _name(name: str) -> str:
    bare = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
    whole = bare in (_OFFSETS, _KNOWN, MASK) or bare.startswith("lm_head.")
    return bare if whole else f"model.{bare}"


def _read(raw: Fields, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    """The configuration of the layers, and as extras that of the head."""
    wrapped = raw.has(_SPECULATORS)
    keys = raw.fields(_LAYER) if wrapped else raw
    kind = keys.choice("model_type", tuple(_CLASSES), "llama")
    given = {**keys.values, "architectures": [_CLASSES[kind]], "model_type": kind}
    layers = ModelConfig.from_huggingface({**given, "tie_word_embeddings": False})
    kinds = layer_kinds(keys, layers.layer_kinds)
    inside = raw.fields(_INSIDE, {})
    if not inside.flag("use_aux_hidden_state", True):
        raise inside.refusal("use_aux_hidden_state", "true: a head that reads several layers")
    width, inputs = layers.hidden_size, stored[_FC].shape[-1]
    target = raw.integer(TARGET_SIZE, width, minimum=1)
    before_fc = raw.flag(BEFORE_FC, inside.flag(BEFORE_FC, False))
    extras = {
        DRAFT_VOCAB: raw.integer(DRAFT_VOCAB, layers.vocab_size, minimum=1),
        TARGET_SIZE: target,
        NUM_STATES: max(1, inputs // target),
        BEFORE_RESIDUAL: raw.flag(BEFORE_RESIDUAL, wrapped),
        BEFORE_FC: before_fc,
        FC_NORM: raw.flag(FC_NORM, False),
        NORM_OUTPUT: raw.flag(NORM_OUTPUT, False),
        OWN_EMBEDDING: _EMBEDDING in stored,
        FIRST: False,
    }
    return replace(with_window(layers, keys, kinds), extras=extras)


def _layers(raw: Fields) -> tuple[int, ...] | None:
    """How many layers come before each state. Lists of SpecForge that begin with 1 name layers by
    their index from 0, whose outputs they mean, as SGLang tells them apart."""
    place = raw if raw.has(_STATES) else raw.fields(_INSIDE, {})
    if not place.has(_STATES):
        return None
    layers = place.integers(_STATES)
    by_index = layers[:1] == (1,) and not raw.has(_SPECULATORS)
    return tuple(layer + 1 for layer in layers) if by_index else layers


def _mask_token(raw: Fields, config: ModelConfig, mask: LazyTensor) -> int:
    width = config.extras[NUM_STATES] * config.extras[TARGET_SIZE]
    if math.prod(mask.format.shape) != width:
        raise CheckpointError(
            f"{raw.origin.file}: tensor {MASK} has shape {list(mask.format.shape)}, not "
            f"[1, {width}]; download the head again"
        )
    for name in _MASK_TOKENS:
        if raw.has(name):
            return raw.integer(name, maximum=config.vocab_size - 1)
    raise raw.refusal(_MASK_TOKENS[0], "the token of places that are guessed at once")


def _tokens(config: ModelConfig, offsets: StoredTensor | None) -> NDArray[np.int32] | None:
    """What is stored is how much larger the target's token is."""
    count = config.extras[DRAFT_VOCAB]
    if offsets is None:
        return None
    if offsets.dtype not in ("I64", "I32") or offsets.shape != (count,):
        raise CheckpointError(
            f"{offsets.path}: tensor {_OFFSETS} is {offsets.dtype} {list(offsets.shape)}, not I64 "
            f"[{count}]; download the head again"
        )
    tokens = np.arange(count) + offsets.map().astype(np.int64)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise CheckpointError(
            f"{offsets.path}: tensor {_OFFSETS} leads to tokens from {tokens.min()} to "
            f"{tokens.max()} of {config.vocab_size}; it is of another model: download the head "
            "again"
        )
    return None if (tokens == np.arange(config.vocab_size)[:count]).all() else tokens.astype("i4")
