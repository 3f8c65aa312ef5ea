"""The pre-norm decoder that most open models share: its modules, its graph, and the hooks where
architectures differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import LOGITS, STATES, CacheSpec, Source, attention_cache
from slipstream.builder.graph.ops import Attributes
from slipstream.builder.graph.rank_ops import RankOps
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig, Rope
from slipstream.builder.models.module import (
    LAYER,
    Module,
    head,
    heads,
    hidden,
    inner,
    kv_heads,
    vocabulary,
)
from slipstream.builder.models.norms import LayerNorms
from slipstream.builder.models.rope import halves_of_neighbours, rotary_frequencies
from slipstream.builder.models.shards import Shards, TensorSource
from slipstream.weights.tensor import (
    LazyTensor,
    QuantTensor,
    WeightFormat,
    reorder_rows,
    row_slice,
)

Rotary = tuple[ir.Value, ir.Value]
# Makes something of the residual stream before the first layer and after each.
Tap = Callable[[Sequence[ir.Value]], None]
Floats = NDArray[np.float32]
# Gates by the names that configurations have for them.
GATE_OF = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ATTENTION, _MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
_BEFORE_ATTENTION, _BEFORE_MLP = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"


def _has_qk_norms(config: ModelConfig, layer: int) -> bool:
    return config.qk_norm


def _qkv(letter: str) -> Module:
    return Module(
        f"{_ATTENTION}.{letter}_proj",
        "linear",
        (heads if letter == "q" else kv_heads,),
        hidden,
        bias="attention_bias",
        reads=_BEFORE_ATTENTION,
        shard="column",
        adapter=True,
        gguf=f"blk.{{i}}.attn_{letter}",
    )


def _qk_norm(letter: str) -> Module:
    name, gguf = f"{_ATTENTION}.{letter}_norm", f"blk.{{i}}.attn_{letter}_norm"
    return Module(name, "norm", (head,), present=_has_qk_norms, gguf=gguf)


def _gate_up(which: str) -> Module:
    return Module(
        f"{_MLP}.{which}_proj",
        "linear",
        (inner,),
        hidden,
        bias="mlp_bias",
        reads=_BEFORE_MLP,
        shard="column",
        adapter=True,
        gguf=f"blk.{{i}}.ffn_{which}",
    )


EMBEDDING = Module(
    "model.embed_tokens",
    "embedding",
    (vocabulary,),
    hidden,
    shard="vocabulary",
    gguf="token_embd",
)
O_PROJ = Module(
    f"{_ATTENTION}.o_proj",
    "linear",
    (hidden,),
    heads,
    bias="o_bias",
    reads=f"{_ATTENTION}.v_proj",
    stream=_BEFORE_MLP,
    shard="row",
    adapter=True,
    gguf="blk.{i}.attn_output",
)
DOWN_PROJ = Module(
    f"{_MLP}.down_proj",
    "linear",
    (hidden,),
    inner,
    bias="mlp_bias",
    reads=f"{_MLP}.up_proj",
    stream=LAYER,
    shard="row",
    adapter=True,
    gguf="blk.{i}.ffn_down",
)
DECODER = (
    EMBEDDING,
    Module(_BEFORE_ATTENTION, "norm", (hidden,), gguf="blk.{i}.attn_norm"),
    *map(_qkv, "qkv"),
    *map(_qk_norm, "qk"),
    O_PROJ,
    Module(_BEFORE_MLP, "norm", (hidden,), gguf="blk.{i}.ffn_norm"),
    *map(_gate_up, ("gate", "up")),
    DOWN_PROJ,
    Module("model.norm", "norm", (hidden,), gguf="output_norm"),
    Module(
        "lm_head", "linear", (vocabulary,), hidden, tied=True, shard="vocabulary", gguf="output"
    ),
)


@dataclass(slots=True)
class Decoder:
    """Declares one model on an operator surface; subclasses override what their architecture
    changes.

    ``tensor`` gives a weight by its Hugging Face name; no sequence has more than ``max_seq_len``
    tokens. What an architecture gives beside logits,
    such as the hidden states of some layers, it says with ``ops.output`` where it makes them; a
    ``tap`` does so for any architecture.
    On one of several ranks ``tensor`` gives this rank's ``shards`` and ``config`` has its heads;
    what linears make that share their columns is added up (``linear``).
    """

    norms: ClassVar[LayerNorms] = LayerNorms()

    ops: RankOps
    config: ModelConfig
    architecture: Architecture
    tensor: TensorSource
    max_seq_len: int
    shards: Shards
    tap: Tap | None = None

    @classmethod
    def caches(cls, config: ModelConfig, kv_dtype: str, page_size: int) -> tuple[CacheSpec, ...]:
        """What the layers remember of a sequence: pages of one cache, unless an architecture has
        layers of several kinds."""
        layers = range(config.num_layers)
        return (attention_cache(kv_dtype, layers, page_size, config.num_kv_heads, config.head_dim),)

    def build(self) -> None:
        """token_ids ─ embedding ─ layers ─ rows ─ norm ─ head ─ logits."""
        x = self.last_norm(self.ops.pick_rows(self.layers()))
        logits = self.capped(self.ops.linear(x, self.head()))
        self.ops.output(self.whole_rows(logits), LOGITS)

    def build_states(self) -> None:
        """token_ids ─ embedding ─ layers ─ rows ─ norm ─ states: what is pooled to a vector."""
        x = self.ops.pick_rows(self.layers())
        self.ops.output(self.norm(x, "model.norm"), STATES)

    def build_answers(self, tokens: Sequence[int]) -> None:
        """As ``build``, with the logits of these tokens alone, which make a score, as states."""
        x = self.last_norm(self.ops.pick_rows(self.layers()))
        answers = self.ops.linear(x, dense_rows(self.head(), tokens, self.shards.first_token))
        self.ops.output(self.capped(self.ops.all_reduce(answers)), STATES)

    def layers(self) -> ir.Value:
        """The residual stream after the last layer."""
        rotaries = self.rotaries()
        streams = [self.embed()]
        for layer in range(self.config.num_layers):
            with self.ops.scope(f"layers.{layer}"):
                streams.append(self.layer(streams[-1], rotaries[self.rope(layer)], layer))
        if self.tap is not None:
            self.tap(streams)
        return streams[-1]

    def head(self) -> LazyTensor:
        """The matrix that makes logits."""
        tied = self.config.tie_word_embeddings
        return self.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

    def whole_rows(self, logits: ir.Value) -> ir.Value:
        """The logits of all tokens, of those of each rank."""
        gathered, ranks = self.ops.all_gather(logits), self.shards.ranks
        if ranks * self.shards.vocabulary == self.config.vocab_size:
            return gathered
        return self.ops.columns(gathered, 0, self.config.vocab_size)

    def capped(self, logits: ir.Value) -> ir.Value:
        """Logits, soft-capped where the architecture does that."""
        cap = self.architecture.logits_cap(self.config)
        return self.ops.soft_cap(logits, cap) if cap else logits

    def embed(self) -> ir.Value:
        """The rows of the tokens."""
        weight = self.tensor("model.embed_tokens.weight")
        tokens, shards = self.ops.input(Source.TOKEN_IDS), self.shards
        rows = (
            self.ops.embedding(tokens, weight)
            if shards.ranks == 1
            else self.ops.embedding_shard(tokens, weight, shards.first_token)
        )
        # After the lookup: a table of scaled rows would be a second one beside that of a tied head.
        scale = self.embedding_scale()
        return rows if scale == 1 else self.ops.scale(rows, scale)

    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied by."""
        return self.architecture.embedding_scale(self.config)

    def last_norm(self, x: ir.Value) -> ir.Value:
        """The norm before the head, times what logits are multiplied by."""
        weight, scale = self.norm_weight("model.norm"), self.architecture.logits_scale(self.config)
        if scale != 1:
            weight = changed(weight, lambda values: values * np.float32(scale))
        return self.normed(x, weight)

    def normed(self, x: ir.Value, weight: LazyTensor) -> ir.Value:
        """A norm of the residual stream."""
        return self.ops.rms_norm(x, weight, self.eps())

    def eps(self) -> float:
        """The epsilon of norms of the residual stream."""
        return self.config.rms_norm_eps

    def rope(self, layer: int) -> Rope:
        """The rotary angles of a layer."""
        return self.config.rope(layer)

    def rotaries(self) -> Mapping[Rope, Rotary]:
        """Cosines and sines of every kind of rotary angle that a layer has."""
        positions = self.ops.input(Source.POSITIONS)
        ropes = dict.fromkeys(map(self.rope, range(self.config.num_layers)))
        length = self.max_seq_len
        return {r: self.ops.rotary(positions, *rotary_frequencies(r, length)) for r in ropes}

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + attention(x), then + mlp(·), with the norms of the architecture before and after
        both."""
        ops, norms, prefix = self.ops, self.norms, f"model.layers.{layer}."
        with ops.scope("attn"):
            normed = self._if_named(x, prefix, norms.before_attention)
            attended = self.attention(normed, rotary, layer, prefix + "self_attn.")
            x = ops.add(x, self._if_named(attended, prefix, norms.after_attention))
        with ops.scope("mlp"):
            normed = self._if_named(x, prefix, norms.before_mlp)
            fed = self.mlp(normed, prefix + "mlp.")
            return ops.add(x, self._if_named(fed, prefix, norms.after_mlp))

    def attention(self, x: ir.Value, rotary: Rotary, layer: int, prefix: str) -> ir.Value:
        """o_proj(PagedAttention(q_proj(x) | k_proj(x) | v_proj(x)))."""
        qkv = self.qkv(x, prefix)
        norms = [self.norm_weight(f"{prefix}{name}_norm") for name in self.normed_heads(layer)]
        attributes, sinks = self.attention_attributes(layer), f"{prefix}sinks"
        sink = self.tensor(sinks) if self.architecture.has(self.config, sinks) else None
        attended = self.ops.paged_attention(qkv, rotary, norms, attributes, sink)
        return self.linear(attended, f"{prefix}o_proj")

    def normed_heads(self, layer: int) -> str:
        """Which heads of a layer have a norm of their own: ``qk``, ``q`` or none."""
        return "qk" if self.config.qk_norm else ""

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """q, k and v of x, side by side."""
        return self.side_by_side(x, prefix, "qkv_proj", ("q_proj", "k_proj", "v_proj"))

    def attention_attributes(self, layer: int) -> Attributes:
        """Attributes of a layer's PagedAttention."""
        config = self.config
        return {
            "layer": layer,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "scale": config.head_dim**-0.5,
            "sliding_window": config.window(layer) or 0,
            "soft_cap": 0.0,
            "norm_eps": config.rms_norm_eps,
        }

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """down_proj(act(gate_proj(x)) * up_proj(x)), act being that of the configuration."""
        gate_up = self.side_by_side(x, prefix, "gate_up_proj", ("gate_proj", "up_proj"))
        gated = self.ops.gated_activation(gate_up, GATE_OF[self.config.hidden_act])
        return self.linear(gated, f"{prefix}down_proj")

    def side_by_side(
        self, x: ir.Value, prefix: str, stacked: str, parts: Sequence[str]
    ) -> ir.Value:
        """Projections of one x, which some checkpoints hold ``stacked``."""
        if self.architecture.module(prefix + stacked) is not None:
            return self.linear(x, prefix + stacked)
        return self.ops.concat([self.linear(x, prefix + part) for part in parts])

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """A projection of the table, with its bias if it has one; whole, where ranks share its
        columns."""
        parts = ("weight", "bias") if self.architecture.has_bias(self.config, name) else ("weight",)
        with self.ops.scope(name.rsplit(".", 1)[-1]):
            order = self.shards.order(name)
            if order is not None:
                x = self.ops.pick_columns(self.ops.all_gather(x), order, f"{name}.own_columns")
            y = self.ops.linear(x, *(self._rows(name, part) for part in parts))
            return self.reduced(y, name)

    def reduced(self, y: ir.Value, name: str) -> ir.Value:
        """What a module of the table made, of all ranks if they share its columns."""
        module = self.architecture.module(name)
        return y if module is None or module.shard != "row" else self.ops.all_reduce(y)

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """A norm of the table."""
        return self.normed(x, self.norm_weight(name))

    def _if_named(self, x: ir.Value, prefix: str, name: str | None) -> ir.Value:
        return x if name is None else self.norm(x, prefix + name)

    def _rows(self, name: str, part: str) -> LazyTensor:
        """A weight or a bias, its rows as PagedAttention turns them."""
        tensor, module = self.tensor(f"{name}.{part}"), self.architecture.module(name)
        if module is None or not module.neighbours:
            return tensor
        (rows,) = module.rows
        order = halves_of_neighbours(rows(self.config), self.config.rotary_dim)
        return reorder_rows(tensor, order)

    def norm_weight(self, name: str) -> LazyTensor:
        """What a norm of the table multiplies by."""
        module, weight = self.architecture.module(name), self.tensor(f"{name}.weight")
        if module is None or not module.offset:
            return weight
        offset = np.float32(module.offset)
        return changed(weight, lambda values: values + offset)


def changed(weight: LazyTensor, change: Callable[[Floats], Floats]) -> LazyTensor:
    """A function of a dense weight, in float32."""
    form = replace(weight.format, dtype="float32")

    def load() -> QuantTensor:
        return QuantTensor(weight.name, form, change(weight.load().dequantize()))

    return LazyTensor(weight.name, form, load)


def dense_rows(weight: LazyTensor, rows: Sequence[int], first: int) -> LazyTensor:
    """Some rows, in float32, of a weight that begins with row ``first``; zeros for those that it
    does not have."""
    block, name = weight.format.rows, f"{weight.name}.{'+'.join(map(str, rows))}"
    form = WeightFormat((len(rows), weight.format.shape[1]))

    def load() -> QuantTensor:
        whole = weight.load()
        values = np.zeros(form.shape, np.float32)
        for place, row in enumerate(row - first for row in rows):
            if 0 <= row < weight.format.shape[0]:
                values[place] = _block_of(whole, row).dequantize()[row % block]
        return QuantTensor(name, form, values)

    return LazyTensor(name, form, load)


def _block_of(weight: QuantTensor, row: int) -> QuantTensor:
    """The rows that share their scales with this one."""
    start = row - row % weight.format.rows
    return row_slice(weight, start, min(start + weight.format.rows, weight.format.shape[0]))
