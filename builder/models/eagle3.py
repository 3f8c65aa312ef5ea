"""Heads that guess what a model says next from what it has computed: EAGLE-3 (arXiv 2503.01840),
its versions with more norms, and P-EAGLE, which guesses several tokens at once.

A head is a decoder of few layers. Its first one reads the embedding of a token beside what the
target, or the head itself, made of the token before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import (
    DRAFTS,
    HEAD_GRAPH,
    HIDDEN,
    NEXT_HIDDEN,
    CacheSpec,
    Source,
    attention_cache,
)
from slipstream.builder.graph.ops import Ops
from slipstream.builder.models.architecture import Architecture, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder, Floats, Rotary
from slipstream.builder.models.llama import read
from slipstream.builder.models.module import LAYER, Extent, Module, hidden, vocabulary
from slipstream.builder.models.shards import TensorSource
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

# Of ``ModelConfig.extras``, as config.json calls them; the last three follow from the files.
DRAFT_VOCAB, TARGET_SIZE = "draft_vocab_size", "target_hidden_size"
BEFORE_RESIDUAL, BEFORE_FC = "norm_before_residual", "norm_before_fc"
FC_NORM, NORM_OUTPUT = "fc_norm", "norm_output"
NUM_STATES, OWN_EMBEDDING, FIRST = "num_states", "own_embedding", "first"
MASK = "mask_hidden"
_MOST_STATES = 8
_FIRST = "model.layers.0."


def _flag(name: str) -> Callable[[ModelConfig, int], bool]:
    return lambda config, layer: bool(config.extras[name])


def _states(config: ModelConfig) -> Extent:
    """The hidden states of a token, side by side."""
    return Extent(config.extras[NUM_STATES], config.extras[TARGET_SIZE])


def _state(config: ModelConfig) -> Extent:
    return Extent(1, config.extras[TARGET_SIZE])


def _seen(config: ModelConfig) -> Extent:
    """What attention reads of a token."""
    return Extent(1 + config.extras[FIRST], config.hidden_size)


def _draft_vocabulary(config: ModelConfig) -> Extent:
    return Extent(config.extras[DRAFT_VOCAB])


def _norm_of_state(number: int) -> Module:
    def present(config: ModelConfig, layer: int) -> bool:
        return bool(config.extras[FC_NORM]) and number < int(config.extras[NUM_STATES])

    return Module(f"model.fc_norm.{number}", "norm", (_state,), present=present)


def _in_layer(config: ModelConfig, layer: int) -> ModelConfig:
    return replace(config, extras={**config.extras, FIRST: layer == 0})


_OF_ONE = {"columns": _seen, "reads": None}
MODULES = (
    Module("model.embed_tokens", "embedding", (vocabulary,), hidden, present=_flag(OWN_EMBEDDING)),
    *map(_norm_of_state, range(_MOST_STATES)),
    Module("model.input_norm", "norm", (_states,), present=_flag(BEFORE_FC)),
    Module("model.fc", "linear", (hidden,), _states),
    Module(f"{LAYER}.hidden_norm", "norm", (hidden,), present=lambda config, layer: layer == 0),
    *differing(DECODER[1:-1], q_proj=_OF_ONE, k_proj=_OF_ONE, v_proj=_OF_ONE),
    Module("lm_head", "linear", (_draft_vocabulary,), hidden),
)


@dataclass(frozen=True, slots=True)
class Fused:
    """The tap of a target's graph: states of some layers, brought to the size of the head."""

    ops: Ops
    config: ModelConfig
    tensor: TensorSource
    layers: Sequence[int]

    def __call__(self, streams: Sequence[ir.Value]) -> None:
        """The output ``hidden [T, width]``."""
        with self.ops.scope("head"):
            states = [streams[layer] for layer in self.layers]
            if self.config.extras[FC_NORM]:
                names = (f"model.fc_norm.{number}" for number in range(len(states)))
                states = [self._norm(x, name) for x, name in zip(states, names, strict=True)]
            x = self.ops.concat(states)
            if self.config.extras[BEFORE_FC]:
                x = self._norm(x, "model.input_norm")
            self.ops.output(self.ops.linear(x, self.tensor("model.fc.weight")), HIDDEN)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.ops.rms_norm(x, self.tensor(f"{name}.weight"), self.config.rms_norm_eps)


@dataclass(slots=True)
class HeadDecoder(Decoder):
    """``tokens`` has the target's token for each that the head knows, None where those are the
    same; ``mask_token`` stands for one that is not known yet, in a head that guesses several."""

    tokens: NDArray[np.int32] | None = field(kw_only=True)
    mask_token: int | None = field(kw_only=True)

    @classmethod
    def caches(cls, config: ModelConfig, kv_dtype: str, page_size: int) -> tuple[CacheSpec, ...]:
        """One, which keeps every token."""
        heads = config.num_kv_heads, config.head_dim
        layers = range(config.num_layers)
        return (attention_cache(kv_dtype, layers, page_size, *heads, name=HEAD_GRAPH),)

    def build(self) -> None:
        """token_ids, hidden ─ layers ─ rows ─ norm ─ head ─ drafts; rows ─ next_hidden."""
        ops = self.ops
        rows = ops.pick_rows(self.layers())
        normed = self.last_norm(rows)
        logits = ops.linear(normed, self.tensor("lm_head.weight"))
        ops.output(normed if self.config.extras[NORM_OUTPUT] else rows, NEXT_HIDDEN)
        ops.output(ops.likeliest(logits, self.tokens), DRAFTS)

    def layers(self) -> ir.Value:
        """The residual stream after the last layer."""
        rotaries = self.rotaries()
        with self.ops.scope("layers.0"):
            x = self.first_layer(self.embed(), self.hidden(), rotaries[self.rope(0)])
        for layer in range(1, self.config.num_layers):
            with self.ops.scope(f"layers.{layer}"):
                x = self.layer(x, rotaries[self.rope(layer)], layer)
        return x

    def hidden(self) -> ir.Value:
        """What is given of each token, or what stands for that where there is none."""
        ops, given = self.ops, self.ops.hidden(self.config.hidden_size)
        if self.mask_token is None:
            return given
        return ops.replace_rows(given, ops.input(Source.TOKEN_IDS), self.mask_token, self.masked())

    def masked(self) -> LazyTensor:
        """fc(norms(mask_hidden)), ``[hidden_size]``."""
        config, mask = self.config, self.tensor(MASK)
        names = [f"model.fc_norm.{n}" for n in range(config.extras[NUM_STATES])]
        own = [self.tensor(f"{name}.weight") for name in names if config.extras[FC_NORM]]
        whole = self.tensor("model.input_norm.weight") if config.extras[BEFORE_FC] else None
        fc, form = self.tensor("model.fc.weight"), WeightFormat((config.hidden_size,))

        def load() -> QuantTensor:
            states = mask.load().dequantize().reshape(config.extras[NUM_STATES], -1)
            if own:
                weights = np.stack([norm.load().dequantize() for norm in own])
                states = _normed(states, weights, config.rms_norm_eps)
            x = states.reshape(-1)
            if whole is not None:
                x = _normed(x, whole.load().dequantize(), config.rms_norm_eps)
            return QuantTensor(mask.name, form, fc.load().dequantize() @ x)

        return LazyTensor(mask.name, form, load)

    def first_layer(self, x: ir.Value, given: ir.Value, rotary: Rotary) -> ir.Value:
        """The layer that reads the embedding of a token, x, beside what is given of it."""
        ops = self.ops
        with ops.scope("attn"):
            normed = self.norm(given, f"{_FIRST}hidden_norm")
            both = ops.concat([self.norm(x, f"{_FIRST}input_layernorm"), normed])
            attended = self.attention(both, rotary, 0, f"{_FIRST}self_attn.")
            x = ops.add(normed if self.config.extras[BEFORE_RESIDUAL] else given, attended)
        with ops.scope("mlp"):
            fed = self.mlp(self.norm(x, f"{_FIRST}post_attention_layernorm"), f"{_FIRST}mlp.")
            return ops.add(x, fed)


ARCHITECTURE = Architecture("eagle3", HeadDecoder, MODULES, {}, read, in_layer=_in_layer)


def _normed(x: Floats, weight: Floats, eps: float) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight
    return normed
