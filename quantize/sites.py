"""Where scales of channels can be folded, by the table of the architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import LAYER, Extent, Module, pattern, place


@dataclass(frozen=True, slots=True)
class Source:
    """The module of a layer whose output, up to things that commute with a scale of its channels,
    is what a site reads: its rows (or elements) from ``start`` on, ``extent`` of them.

    ``offset`` is what a norm adds to its stored weight.
    """

    name: str
    start: int
    extent: Extent
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Site:
    """Linears of a layer, by their name in it, that read one x.

    ``source`` is None where nothing can be folded. ``stream`` is the module whose input is the
    residual stream with the linears' output in it, empty for the end of the layer, None for linears
    whose output is not added to it.
    """

    linears: tuple[str, ...]
    source: Source | None = None
    stream: str | None = None

    @property
    def key(self) -> str:
        """The linear that stands for all of them."""
        return self.linears[0]


def layer_sites(config: ModelConfig, layer: int, linears: Iterable[str]) -> tuple[Site, ...]:
    """The sites of a layer, whose linears are given by their names in it, in the order in which
    data flows; a linear that the table does not know is one of its own."""
    table, rows = architecture_of(config.architecture), _rows(config, layer, linears)
    config = table.in_layer(config, layer)
    groups: dict[str, list[str]] = {}
    for module in table.modules:
        for name, (row, expert) in rows.items():
            if row is module:
                reads = place(module.reads, layer, expert or 0) if module.reads else name
                groups.setdefault(reads, []).append(name)
    sites = [_site(config, names, *rows[names[0]]) for names in groups.values()]
    return (*sites, *(Site((name,)) for name, (row, _) in rows.items() if row is None))


def by_expert(
    config: ModelConfig, layer: int, tensors: Iterable[str]
) -> dict[int | None, list[str]]:
    """The tensors of a layer, by their names in it, that are no expert's (None), and those of each
    expert."""
    names = list(tensors)
    rows = _rows(config, layer, {name.rpartition(".")[0] for name in names})
    parts: dict[int | None, list[str]] = {None: []}
    for name in names:
        parts.setdefault(rows[name.rpartition(".")[0]][1], []).append(name)
    return parts


def multiplied_as_one(
    config: ModelConfig, layer: int, linears: Iterable[str]
) -> list[tuple[str, ...]]:
    """The linears of a layer, by their names in it, that are best of one scheme: those that read
    one x, and those of all experts that read as much of theirs, which are stored as one weight."""
    rows = _rows(config, layer, linears)
    groups: dict[str, list[str]] = {}
    for site in layer_sites(config, layer, rows):
        row, expert = rows[site.key]
        same = site.key if row is None or expert is None else row.reads or row.name
        groups.setdefault(same, []).extend(site.linears)
    return [tuple(names) for names in groups.values()]


def _rows(
    config: ModelConfig, layer: int, modules: Iterable[str]
) -> dict[str, tuple[Module | None, int | None]]:
    """The row and the expert of each module of a layer, by its name in it."""
    table, prefix = architecture_of(config.architecture), f"model.layers.{layer}."
    found: dict[str, tuple[Module | None, int | None]] = {}
    for name in modules:
        row = table.module(prefix + name)
        match = None if row is None else pattern(row.name).fullmatch(prefix + name)
        expert = None if match is None else match.groupdict().get("e")
        found[name] = row, None if expert is None else int(expert)
    return found


def _site(config: ModelConfig, names: list[str], first: Module | None, expert: int | None) -> Site:
    assert first is not None and first.columns is not None, names
    stream = None if first.stream is None else _in_layer(first.stream)
    source = _source(config, first, first.columns(config), expert or 0)
    return Site(tuple(names), source, stream)


def _source(config: ModelConfig, reader: Module, columns: Extent, expert: int) -> Source | None:
    """None where the table has no such module, or its rows are not those of x."""
    reads, modules = reader.reads, architecture_of(config.architecture).modules
    roles = ("norm", "linear", "expert")
    module = next((m for m in modules if m.name == reads and m.role in roles), None)
    if module is None or reads is None or not reads.startswith(LAYER):
        return None
    extents = [measure(config) for measure in module.rows]
    extent = extents[reader.part]
    shared = columns.size == extent.size and columns.units % extent.units == 0
    if columns.length != extent.length and not shared:
        return None
    starts = list(accumulate((e.length for e in extents), initial=0))
    name = _in_layer(reads).replace("{e}", str(expert))
    return Source(name, starts[reader.part], extent, module.offset)


def _in_layer(pattern: str) -> str:
    return pattern.removeprefix(LAYER).removeprefix(".")
