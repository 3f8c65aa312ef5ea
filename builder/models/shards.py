"""Which part of each weight a rank has, by the axes that the table of an architecture names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.passes.fit_groups import refit
from slipstream.builder.models.architecture import PARTS, Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import Extent, Measure, Module, kv_heads
from slipstream.errors import BuildError
from slipstream.weights.tensor import (
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    pack_nibbles,
    reorder_rows,
)

TensorSource = Callable[[str], LazyTensor]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Shards:
    """The weights of one rank of ``ranks``; ``whole`` gives those of the checkpoint.

    Rows and columns are shared in the units of the table: heads whole, keys and values together
    with the queries that read them, so that where there are fewer of them than ranks (or their
    groups of queries are cut) several ranks have the same. A vocabulary that ranks do not divide
    ends in rows that nobody reads. Formats are the same on all ranks: groups of columns and blocks
    of rows that a cut would part are written as shorter ones, which changes no number.
    """

    architecture: Architecture
    model: ModelConfig
    whole: TensorSource
    rank: int = 0
    ranks: int = 1

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration with the heads of one rank."""
        if self.ranks == 1:
            return self.model
        model, extras = self.model, dict(self.model.extras)
        for key in self.architecture.kv_head_counts:
            extras[key] = len(_kv_heads(replace(model, num_kv_heads=extras[key]), 0, self.ranks))
        return replace(
            model,
            num_heads=_units(Extent(model.num_heads), self.ranks, "heads of attention"),
            num_kv_heads=len(_kv_heads(model, 0, self.ranks)),
            extras=extras,
        )

    @property
    def first_token(self) -> int:
        """The first token whose row of the embedding and of the head this rank has."""
        return self.rank * self.vocabulary

    @property
    def vocabulary(self) -> int:
        """Tokens of each rank, the last one's beyond the vocabulary included."""
        return -(-self.model.vocab_size // self.ranks)

    def tensor(self, name: str) -> LazyTensor:
        """This rank's part of a weight, a bias or a vector, by its name in the checkpoint."""
        return self.of(name, self.whole(name))

    def of(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """This rank's part of a tensor that stands for the one of that name."""
        module = self.architecture.module(_place(name))
        if self.ranks == 1 or module is None or module.shard == "replicated":
            return tensor
        if module.shard == "row":
            if name.endswith(".bias"):  # it is added once
                return tensor if self.rank == 0 else _zeros(tensor)
            return _columns(tensor, self.rank, self.ranks, self._width(module, name))
        rows = [self._rows(module, name, rank) for rank in range(self.ranks)]
        return _rows(tensor, rows, self.rank)

    def order(self, name: str) -> NDArray[np.int32] | None:
        """Which columns of the x of all ranks the codes of a module's part apply to, where they
        are ordered (act-order); None where they are this rank's own in their order."""
        module, transform = self.architecture.module(name), self.whole(f"{name}.weight").input
        shared = self.ranks > 1 and module is not None and module.shard == "row"
        if not shared or transform is None or transform.perm is None:
            return None
        return _slice(transform.perm, self.rank, self.ranks)

    def _width(self, module: Module, name: str) -> int:
        """Columns of a rank."""
        assert module.columns is not None, module.name
        extent = module.columns(self.architecture.layer_of(module, self.model, _place(name)))
        return _units(extent, self.ranks, f"columns of {name}") * extent.size

    def _rows(self, module: Module, name: str, rank: int) -> Rows:
        """The rows of a rank, part by part."""
        if module.shard == "vocabulary":
            first = rank * self.vocabulary
            rows: Rows = np.minimum(
                np.arange(first, first + self.vocabulary), self.model.vocab_size - 1
            )
            return rows
        config = self.architecture.layer_of(module, self.model, _place(name))
        start, chosen = 0, list[Rows]()
        for measure in module.rows:
            extent = measure(config)
            units = self._dealt(measure, extent, config, rank, name)
            chosen.append(start + (units[:, None] * extent.size + np.arange(extent.size)).ravel())
            start += extent.length
        return np.concatenate(chosen)

    def _dealt(
        self, measure: Measure, extent: Extent, config: ModelConfig, rank: int, name: str
    ) -> Rows:
        """The units of a rank."""
        if measure is kv_heads:
            return np.array(_kv_heads(config, rank, self.ranks), np.intp)
        count = _units(extent, self.ranks, f"rows of {name}")
        return np.arange(rank * count, (rank + 1) * count)


def _place(tensor: str) -> str:
    """The module of a tensor; a bare one is called as its module is."""
    stem, _, part = tensor.rpartition(".")
    return stem if part in PARTS else tensor


def _units(extent: Extent, ranks: int, what: str) -> int:
    if extent.units % ranks:
        raise BuildError(
            f"{extent.units} {what} cannot be shared by {ranks} ranks alike; use a tp_size that "
            "divides them, or 1"
        )
    return extent.units // ranks


def _kv_heads(config: ModelConfig, rank: int, ranks: int) -> list[int]:
    """The heads of keys and values of a rank: as many queries read each of them."""
    queries = _units(Extent(config.num_heads), ranks, "heads of attention")
    group = config.num_heads // config.num_kv_heads
    each = math.gcd(queries, group)
    return [(rank * queries + first) // group for first in range(0, queries, each)]


def _slice(array: NDArray[np.int32], rank: int, ranks: int) -> NDArray[np.int32]:
    width = len(array) // ranks
    return array[rank * width : (rank + 1) * width]


def _zeros(tensor: LazyTensor) -> LazyTensor:
    def load() -> QuantTensor:
        loaded = tensor.load()
        return replace(loaded, codes=np.zeros_like(loaded.codes))

    return replace(tensor, load=load)


def _rows(tensor: LazyTensor, rows: Sequence[Rows], rank: int) -> LazyTensor:
    """Some rows of a weight, in blocks that no rank's rows part."""
    form = tensor.format
    if form.rows > 1:
        form = replace(form, rows=math.gcd(form.rows, *(_run(order) for order in rows)))
        whole = tensor
        tensor = replace(tensor, format=form, load=lambda: refit(whole.load(), form))
    return reorder_rows(tensor, rows[rank])


def _run(rows: Rows) -> int:
    """A number that divides where each run of neighbours begins, there and in the whole."""
    begins = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    return math.gcd(*(int(number) for at in begins for number in (at, rows[at])))


def _columns(tensor: LazyTensor, rank: int, ranks: int, width: int) -> LazyTensor:
    """Some columns of a weight; of one whose columns are ordered, as they are stored."""
    fmt, start = tensor.format, rank * width
    whole_rows = fmt.group >= fmt.shape[1]
    group = width if whole_rows else math.gcd(fmt.group, width)
    form = replace(fmt, shape=(fmt.shape[0], width), group=group if fmt.group else 0)
    transform = _of_columns(tensor.input, rank, ranks)

    def load() -> QuantTensor:
        loaded = tensor.load()
        if fmt.group and not whole_rows:
            loaded = refit(loaded, replace(loaded.format, group=group))
        return _cut(loaded, form, start, transform)

    return LazyTensor(tensor.name, form, load, transform)


def _cut(
    tensor: QuantTensor, form: WeightFormat, start: int, transform: InputTransform | None
) -> QuantTensor:
    stop = start + form.shape[1]
    cells = slice(start // form.group, -(-stop // form.group)) if form.group else slice(None)
    if tensor.format.group > form.group:  # one cell a row
        cells = slice(None)

    def part(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if numbers is None else numbers[:, cells]

    packed = form.bits == 4 or form.kind == "float4_e2m1"
    codes = tensor.unpacked_codes()[:, start:stop] if packed else tensor.codes[:, start:stop]
    return replace(
        tensor,
        format=form,
        codes=pack_nibbles(np.ascontiguousarray(codes)) if packed else codes,
        scale=part(tensor.scale),
        zero=part(tensor.zero),
        offset=part(tensor.offset),
        input=transform,
    )


def _of_columns(transform: InputTransform | None, rank: int, ranks: int) -> InputTransform | None:
    """What is left to be done to a rank's own columns of x, or to those that were picked for it."""
    if transform is None or transform.scale is None:
        return None
    scale, perm = transform.scale, transform.perm
    width = len(scale) // ranks
    own = slice(rank * width, (rank + 1) * width)
    return InputTransform(scale=scale[own] if perm is None else scale[perm[own]])
