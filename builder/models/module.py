"""A row of an architecture's table: all that is known of one module of a checkpoint.

Names are patterns: ``{i}`` stands for the decoder layer, ``{e}`` for the expert, as in
``model.layers.{i}.self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from slipstream.builder.models.config import ModelConfig

Role = Literal["linear", "norm", "embedding", "router", "expert", "vector"]
Shard = Literal["column", "row", "replicated", "vocabulary"]
LAYER = "model.layers.{i}"


@dataclass(frozen=True, slots=True)
class Extent:
    """The length of an axis: ``units`` of ``size`` elements; no unit is split between ranks."""

    units: int
    size: int = 1

    @property
    def length(self) -> int:
        """Elements of the axis."""
        return self.units * self.size


Measure = Callable[[ModelConfig], Extent]


def hidden(config: ModelConfig) -> Extent:
    """The residual stream."""
    return Extent(config.hidden_size)


def inner(config: ModelConfig) -> Extent:
    """Between the matrices of the MLP."""
    return Extent(config.intermediate_size)


def vocabulary(config: ModelConfig) -> Extent:
    """Tokens."""
    return Extent(config.vocab_size)


def heads(config: ModelConfig) -> Extent:
    """The queries of a token."""
    return Extent(config.num_heads, config.head_dim)


def kv_heads(config: ModelConfig) -> Extent:
    """The keys, or the values, of a token."""
    return Extent(config.num_kv_heads, config.head_dim)


def one_a_head(config: ModelConfig) -> Extent:
    """A number of each head of queries."""
    return Extent(config.num_heads)


def one(config: ModelConfig) -> Extent:
    """A single number, or row."""
    return Extent(1)


def head(config: ModelConfig) -> Extent:
    """One head."""
    return Extent(1, config.head_dim)


def everywhere(config: ModelConfig, layer: int) -> bool:
    """Every layer has it."""
    return True


def nowhere(config: ModelConfig, layer: int) -> bool:
    """No layer."""
    return False


@dataclass(frozen=True, slots=True)
class Stack:
    """Where a checkpoint of safetensors holds a module of all experts of a layer: in one tensor,
    an expert behind the other along its first axis.

    ``name`` is that of the tensor but for what may follow: nothing or ``.weight`` for weights,
    ``_bias`` for biases, other endings for what quantized weights are made of. Its rows are those
    of ``parts`` modules, of which this is number ``part``; they follow each other, or take turns
    (``interleaved``). ``transposed`` weights are ``[experts, columns, rows]``.
    """

    name: str
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """What a module is, by the name that Hugging Face checkpoints give it.

    ``rows`` measures its output, each part of a stacked weight apart; ``columns`` its input, None
    for a vector. A ``bare`` one is a tensor of its very name, without ``.weight``; then ``gguf`` is
    a whole name, too. ``bias`` is a fixed value or the flag of the configuration that has it.
    ``present`` says whether a layer has it; it is asked for layer 0 of a module outside of layers.
    ``unread`` says of a layer without it that checkpoints may hold one all the same.
    ``experts`` measures ``{e}``; ``stack`` says where a file may have those of a layer in one
    tensor. A ``tied`` module is the embedding again where the configuration ties them. ``offset``
    is what a norm adds to its stored weight before it multiplies by it; ``scale`` what an
    embedding's rows, or the logits of a head, are multiplied by, if they are; ``cap`` the c of a
    head whose logits are c·tanh(x / c), 0 for one that caps none. ``neighbours`` says that the
    rotary embedding turns rows 2i and 2i + 1 of a head, not rows i and i + half of those that it
    turns.

    ``reads`` names the module whose output is its x, up to things that commute with a scale of each
    channel: attention (over tokens), the product with a gate. Scales of channels are folded there
    if it is of the table; ``part`` says into which of its stacked rows. Modules that read the same
    are scaled together, so all readers must say so. None: nothing can be folded. ``stream`` names
    the module whose input is the residual stream with this one's output in it (for normed outputs,
    the output alone), or the layer, for its end.

    ``shard`` is the axis that ranks share: rows (``column`` parallel, after x·Wᵀ),
    columns (``row`` parallel), rows by token (``vocabulary``). ``adapter`` says that a low-rank
    adapter fits. ``gguf`` is its name in GGUF files, or those of the parts of its rows, which are
    apart there; ``gguf_permuted`` that its rows, head by head, are in llama.cpp's order there.
    """

    name: str
    role: Role
    rows: tuple[Measure, ...]
    columns: Measure | None = None
    bare: bool = False
    bias: bool | str = False
    present: Callable[[ModelConfig, int], bool] = everywhere
    unread: Callable[[ModelConfig, int], bool] = nowhere
    experts: Measure | None = None
    stack: Stack | None = None
    tied: bool = False
    offset: float = 0.0
    scale: Callable[[ModelConfig], float] | None = None
    cap: Callable[[ModelConfig], float] | None = None
    neighbours: bool = False
    reads: str | None = None
    part: int = 0
    stream: str | None = None
    shard: Shard = "replicated"
    adapter: bool = False
    gguf: str | tuple[str, ...] | None = None
    gguf_permuted: bool = False

    @property
    def gguf_names(self) -> tuple[str, ...]:
        """Its name in GGUF files, or its names."""
        return (self.gguf,) if isinstance(self.gguf, str) else self.gguf or ()

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of its weight: ``[N, K]``, or ``[N]``."""
        rows = sum(measure(config).length for measure in self.rows)
        return (rows,) if self.columns is None else (rows, self.columns(config).length)

    def biased(self, config: ModelConfig) -> bool:
        """Whether it has a bias."""
        return config.flag(self.bias) if isinstance(self.bias, str) else self.bias

    def places(self, config: ModelConfig) -> Iterator[str]:
        """Its name in every layer that has it, and for every expert."""
        if self.tied and config.tie_word_embeddings:
            return
        layers = range(config.num_layers if "{i}" in self.name else 1)
        experts = range(1 if self.experts is None else self.experts(config).units)
        for layer in layers:
            if self.present(config, layer):
                yield from (place(self.name, layer, expert) for expert in experts)

    def sharded(self, config: ModelConfig) -> tuple[int, tuple[Extent, ...]] | None:
        """The axis of its weight that ranks share, and the parts of it, each of which is dealt out
        in whole units; None for a module that every rank has whole."""
        if self.shard == "replicated":
            return None
        if self.shard == "row":
            assert self.columns is not None, self.name
            return 1, (self.columns(config),)
        return 0, tuple(measure(config) for measure in self.rows)


def place(pattern: str, layer: int, expert: int = 0) -> str:
    """A pattern with its numbers."""
    return pattern.replace("{i}", str(layer)).replace("{e}", str(expert))


@cache
def pattern(name: str) -> re.Pattern[str]:
    """What the places of a pattern look like; groups ``i`` and ``e`` are its numbers."""
    text = re.escape(name)
    for number in ("i", "e"):
        text = text.replace(re.escape(f"{{{number}}}"), rf"(?P<{number}>\d+)")
    return re.compile(text)
