"""Whether the contract of a step that a manifest states holds together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from slipstream.builder.contract import (
    BOUND_SOURCES,
    DRAFTS,
    HEAD_GRAPH,
    HIDDEN,
    ITEM_BYTES,
    LOGITS,
    NEXT_HIDDEN,
    STATES,
    TARGET_GRAPH,
    CacheSpec,
    GraphSpec,
    Port,
    Source,
    hidden_port,
    layer_ports_of,
    paged,
    ports_of,
)

# What no page or slot of a layer reaches.
_MOST_BYTES, _MOST_AXES = 1 << 40, 8
_LARGEST = 2**31 - 1
_FLOATS = ("float32", "bfloat16", "float16")


def check_contract(graphs: Mapping[str, GraphSpec], caches: Sequence[CacheSpec]) -> None:
    """Raise ValueError, naming the place, unless graphs and caches fit together."""
    _unique([cache.name for cache in caches], "caches")
    _unique([array.name for cache in caches for array in cache.arrays], "arrays of caches")
    for cache in caches:
        problem = _cache_problem(cache)
        _require(not problem, f"cache {cache.name} has {problem}")
    sizes = {cache.page_size for cache in paged(caches)}
    _require(
        len(sizes) == 1, f"caches have pages of {sorted(sizes) or 'no'} tokens, not all the same"
    )
    for name, graph in graphs.items():
        _check_graph(f"graph {name}", graph, caches)
    target = graphs.get(TARGET_GRAPH)
    found = [] if target is None else [o for o in target.outputs if o.name in (LOGITS, STATES)]
    _require(
        len(found) == 1, f"graphs has no {TARGET_GRAPH} with one of the outputs {LOGITS}, {STATES}"
    )
    _check_head(graphs)
    rows, *columns = found[0].shape or ("",)
    fits = rows == "L" and len(columns) == 1 and isinstance(columns[0], int)
    fits = fits and 0 < int(columns[0]) <= _LARGEST
    _require(fits, f"output {found[0].name} has shape {list(found[0].shape)}, not [L, columns]")


def _check_head(graphs: Mapping[str, GraphSpec]) -> None:
    """What a head takes is what the target graph, and itself, gives."""
    if HEAD_GRAPH not in graphs:
        return
    head = graphs[HEAD_GRAPH]
    given = graphs[TARGET_GRAPH].output(HIDDEN), head.output(NEXT_HIDDEN), head.output(DRAFTS)
    port = next((p for p in head.inputs if p.source is Source.HIDDEN), None)
    dtype, width = ("", None) if port is None else (port.dtype, port.shape[1])
    told = [(each.dtype, each.shape) for each in given if each is not None]
    wanted = [(dtype, ("T", width)), (dtype, ("L", width)), ("int32", ("L",))]
    _require(told == wanted, f"graph {HEAD_GRAPH} takes {width} numbers of a token, not as given")


def _cache_problem(cache: CacheSpec) -> str | None:
    layers = set(cache.layers)
    if not layers or not cache.arrays or len(layers) < len(cache.layers) or min(layers) < 0:
        return "no layers, a layer twice or below 0, or no arrays"
    for array in cache.arrays:
        sized = array.dtype in ITEM_BYTES and all(size > 0 for size in array.shape)
        if not sized or len(array.shape) > _MOST_AXES or array.nbytes > _MOST_BYTES:
            return f"an array {array.name} of dtype {array.dtype} and shape {list(array.shape)}"
    is_paged = cache.kind == "paged"
    numbers = 0 <= cache.page_size <= _LARGEST and 0 <= cache.window <= _LARGEST
    if (cache.page_size > 0) != is_paged or not numbers or (cache.window and not is_paged):
        return f"page_size {cache.page_size} and window {cache.window}, but is {cache.kind}"
    return None


def _check_graph(place: str, graph: GraphSpec, caches: Sequence[CacheSpec]) -> None:
    _unique([port.name for port in graph.inputs], f"inputs of {place}")
    _unique([output.name for output in graph.outputs], f"outputs of {place}")
    known = {port.name: port for port in (*ports_of(caches), *layer_ports_of(caches))}
    for port in graph.inputs:
        fits = port == known.get(port.name) or _is_hidden(port)
        _require(fits, f"input {port.name} of {place} is none that these caches and a step have")
    arrays = [
        (port.name, port.dtype, port.shape) for port in graph.inputs if port.source in BOUND_SOURCES
    ]
    for output in graph.outputs:
        told = f"output {output.name} of {place}"
        _require(output.dtype in ITEM_BYTES, f"{told} has dtype {output.dtype}")
        if output.updates is None:
            named = {size for size in output.shape if isinstance(size, str)}
            _require(named <= {"T", "S", "L"}, f"{told} has shape {list(output.shape)}")
        else:
            shapes = (output.updates, output.dtype, output.shape)
            _require(shapes in arrays, f"{told} updates {output.updates}, which is no such input")


def _is_hidden(port: Port) -> bool:
    width = port.shape[-1] if len(port.shape) == 2 else 0
    fits = isinstance(width, int) and 0 < width <= _LARGEST and port.dtype in _FLOATS
    return fits and port == hidden_port(int(width), port.dtype)


def _unique(names: Sequence[str], of: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    _require(not twice, f"{of} has {', '.join(twice)} twice")


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(problem)
