"""What an engine's files say about it, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from slipstream.builder.contract import (
    TARGET_GRAPH,
    CacheSpec,
    Head,
    Pooling,
    bytes_per_token,
    kv_dtype_of,
    page_size_of,
    paged,
)
from slipstream.builder.engine import WEIGHTS, Engine, digest
from slipstream.builder.from_json import from_json
from slipstream.errors import EngineMismatchError, SlipstreamError
from slipstream.plugins.linear import WEIGHT_TYPES
from slipstream.plugins.operators import LOOKED_UP, PRODUCTS
from slipstream.server.text import format_bytes, format_count
from slipstream.weights.json import Origin
from slipstream.weights.safetensors import read_header

if TYPE_CHECKING:
    import onnx_ir as ir

    from slipstream.builder.parameters import Parameters

T = TypeVar("T")
HashStatus = Literal["ok", "changed", "missing", "not listed", "not checked"]
_DENSE = {number: name for name, number in WEIGHT_TYPES.items() if name != "int"}
_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
# Operators that read rows of a weight, not all of it.
_ROWS = ("Embedding", "Gather")
# Sequences of a step for which reports say what it reads, where that depends on them.
_BATCHES = (1, 16, 64)
_LINEARS = {
    ("slipstream", "Linear"): ("slipstream", "group_size"),
    ("slipstream", "ExpertLinear"): ("slipstream experts", "group_size"),
    ("com.microsoft", "MatMulNBits"): ("onnxruntime MatMulNBits", "block_size"),
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of an engine; ``size`` is in bytes, None for a missing file."""

    name: str
    size: int | None
    status: HashStatus


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A tensor of the weight file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of an engine: how many layers have so many, and how many a token takes."""

    layers: int
    experts: int
    top_k: int

    def distinct(self, tokens: int) -> float:
        """How many experts of a layer so many tokens choose, if each chooses evenly and by
        itself."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Bytes of weights: ``common`` is read by every step, ``experts`` as far as they are chosen.

    The table of an embedding that is not the head, too, is in neither: a step reads its tokens'
    rows. ``mixtures`` are the experts of the layers, one for all that have as many.
    """

    common: int
    experts: Mapping[Mixture, int]

    def read(self, tokens: int) -> int:
        """Bytes that a step of so many tokens reads, of ``Mixture.distinct`` experts."""
        parts = (size * m.distinct(tokens) / m.experts for m, size in self.experts.items())
        return self.common + round(sum(parts))

    def describe(self) -> list[tuple[str, str]]:
        """For people: the experts, and what steps read."""
        if not self.experts:
            return [("read by a step", f"{format_bytes(self.common)} of weights")]
        rows = [
            ("experts", f"{m.top_k} of {m.experts} for a token, in {m.layers} layers")
            for m in self.experts
        ]
        return rows + [(f"read at batch {batch}", self.at(batch)) for batch in _BATCHES]

    def at(self, tokens: int) -> str:
        """What a step of so many tokens reads, for people: ``9.8 GiB of weights, 82.4 experts a
        layer``."""
        found = " or ".join(f"{m.distinct(tokens):.1f}" for m in self.experts)
        chosen = f", {found} experts a layer if chosen evenly" if found else ""
        return f"{format_bytes(self.read(tokens))} of weights{chosen}"


def list_files(engine: Engine, *, verify: bool) -> list[FileEntry]:
    """The files that the manifest names, and those that it should; ``verify`` compares their
    hashes."""
    unlisted = [engine.path / name for name in engine.unlisted()]
    return [
        *(
            _file_entry(engine.path / name, expected if verify else None)
            for name, expected in engine.manifest.files.items()
        ),
        *(FileEntry(file.name, file.stat().st_size, "not listed") for file in unlisted),
    ]


def _file_entry(file: Path, expected: str | None) -> FileEntry:
    if not file.is_file():
        return FileEntry(file.name, None, "missing")
    status: HashStatus = "not checked"
    if expected is not None:
        status = "ok" if digest(file) == expected else "changed"
    return FileEntry(file.name, file.stat().st_size, status)


def describe_task(pooling: Pooling | None) -> str:
    """What an engine is for: ``embed: vectors of 1024 numbers, by the last token``."""
    if pooling is None:
        return "generate: text"
    if pooling.task == "score":
        return "score: how well a document answers a query"
    by = {"last": "by the last token", "mean": "by the mean of all tokens"}[pooling.mode]
    length = ", of length 1" if pooling.normalize else ""
    return f"embed: vectors of {pooling.dimensions} numbers{length}, {by}"


def describe_head(head: Head) -> str:
    """What guesses tokens: ``eagle3 of /heads/own, after layers 2, 15 and 27, 4096 tokens``."""
    *first, last = map(str, head.layers)
    layers = f"{', '.join(first)} and {last}" if first else last
    return f"{head.kind} of {head.source}, after layers {layers}, {head.vocab_size} tokens"


def list_weights(engine: Engine) -> list[WeightEntry]:
    """The tensors of the weight file, from its header alone (the safetensors format).

    Raises ``EngineMismatchError`` if there is no readable header.
    """
    origin = Origin(
        f"{WEIGHTS} of the engine {engine.path}",
        f"build it again: {engine.manifest.command}",
        EngineMismatchError,
    )
    tensors = read_header(engine.path / WEIGHTS, origin).values()
    return [WeightEntry(t.name, t.dtype, t.shape, t.size) for t in tensors]


def describe_kv(caches: Sequence[CacheSpec]) -> dict[str, str | int]:
    """The pages of keys and values in all layers; heads are those of the first paged cache, and
    left out if its pages are not PagedAttention's."""
    pages = paged(caches)
    described: dict[str, str | int] = {
        "dtype": kv_dtype_of(caches),
        "page_size": page_size_of(caches),
        "num_layers": sum(len(cache.layers) for cache in pages),
        "bytes_per_token": bytes_per_token(caches),
    }
    shape = pages[0].arrays[0].shape
    if len(shape) == 3 and shape[0] == 2:
        described["num_kv_heads"] = shape[1]
        described["head_dim"] = shape[2] // pages[0].page_size
    return described


def read_graph(engine: Engine, graph: str = TARGET_GRAPH) -> ir.Graph:
    """A graph of an engine, its weights unread; ``EngineMismatchError`` if it cannot be read."""
    # Imported here because only reports about an engine need a graph library.
    import onnx_ir as ir

    name = engine.manifest.graphs[graph].file
    try:
        return ir.load(engine.path / name).graph
    except Exception as error:  # protobuf's errors share no public base class
        raise _unreadable(engine, name, error) from error


def check_graphs(engine: Engine) -> None:
    """Check every graph against the specs of its operators, the contract in the manifest and the
    weight file; ``EngineMismatchError`` says what is wrong."""
    # Imported here because only reports about an engine need a graph library.
    import onnx_ir as ir

    from slipstream.builder.graph.program import Program
    from slipstream.builder.graph.verifier import program_problem

    manifest = engine.manifest
    for spec in manifest.graphs.values():
        try:
            program = Program(
                ir.load(engine.path / spec.file), contract=spec, caches=manifest.caches
            )
            problem = program_problem(program) or _data_problem(engine, program.graph)
        except Exception as error:  # what a crafted file makes of a graph library is anything
            raise _unreadable(engine, spec.file, error) from error
        if problem:
            raise EngineMismatchError(
                f"{spec.file} of the engine {engine.path} is not as it was built: {problem}; build "
                f"it again: {manifest.command}"
            )


def _data_problem(engine: Engine, graph: ir.Graph) -> str | None:
    """What is wrong with where weights lie."""
    import onnx_ir as ir

    size = (engine.path / WEIGHTS).stat().st_size
    for value in graph.initializers.values():
        data = value.const_value
        if not isinstance(data, ir.ExternalTensor):
            continue
        offset, length = data.offset or 0, data.length or data.nbytes
        if data.location != WEIGHTS or not 0 <= offset <= offset + length <= size:
            return f"weight {value.name} is not inside {WEIGHTS}"
        if length != data.nbytes:
            return f"weight {value.name} has {length} bytes, not {data.nbytes}"
    return None


def count_operators(graph: Iterable[ir.Node]) -> dict[str, int]:
    """How many nodes there are of every operator, most frequent first."""
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph)
    return dict(counts.most_common())


def count_kernels(graph: Iterable[ir.Node]) -> dict[str, int]:
    """How many linear layers run on every kernel, most frequent first."""
    counts = Counter(kernel for node in graph if (kernel := _kernel(node)))
    for node in graph:
        found = _told(node, PRODUCTS, dict[str, int])
        counts.update({f"TensorRT {kind}": count for kind, count in found.items()})
    return dict(counts.most_common())


def step_weights(graph: ir.Graph) -> StepWeights:
    """What a step of a graph reads of its weights."""
    # Imported here because only reports about an engine need a graph library.
    import onnx_ir as ir

    common: dict[str, int] = {}
    sizes, layers = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for node in graph:
        stored = [value.const_value for value in node.inputs if value is not None]
        rows = _told(node, LOOKED_UP, tuple[str, ...])
        found = {
            w.name: w.nbytes
            for w in stored
            if isinstance(w, ir.ExternalTensor) and w.name and w.name not in rows
        }
        if node.op_type == "ExpertLinear":
            kind = node.attributes["experts"].as_int(), node.attributes["top_k"].as_int()
            sizes[kind] += sum(found.values())
            layers[kind] += node.attributes.get_int("reduce", 0)
        elif node.op_type not in _ROWS:
            common |= found
    mixtures = {Mixture(layers[kind], *kind): size for kind, size in sizes.items()}
    return StepWeights(sum(common.values()), mixtures)


def parameters_of(engine: Engine) -> Parameters | None:
    """Of an engine's model; None where its architecture is not installed, or its configuration is
    none that a build writes."""
    # Imported here because only reports about an engine need the tables of models.
    from slipstream.builder.models.config import ModelConfig
    from slipstream.builder.parameters import count_parameters

    try:
        return count_parameters(ModelConfig.from_json(engine.manifest.model))
    except (SlipstreamError, LookupError, TypeError, ValueError, ArithmeticError):
        return None


def describe_parameters(parameters: Parameters) -> str:
    """``30.5 billion, 3.3 billion for a token``."""
    active = f", {format_count(parameters.active)} for a token"
    return format_count(parameters.total) + active * (parameters.active < parameters.total)


def _told(node: ir.Node, key: str, kind: type[T]) -> T:
    """What a call of a function says of it; EngineMismatchError for what no build writes."""
    try:
        told = node.metadata_props.get(key)
        return kind() if told is None else from_json(kind, json.loads(told))
    except ValueError as error:
        raise EngineMismatchError(
            f"{node.name} of the graph has no readable {key} ({error}); build the engine again"
        ) from error


def _kernel(node: ir.Node) -> str | None:
    if (node.domain, node.op_type) == ("", "Gemm"):
        weight = node.inputs[1]
        dtype = None if weight is None else weight.dtype
        return f"onnxruntime Gemm {'float32' if dtype is None else _TYPES[dtype.name]}"
    known = _LINEARS.get((node.domain, node.op_type))
    if known is None:
        return None
    name, group = known
    dense = _DENSE.get(node.attributes.get_int("weight_type", 0))
    if dense is not None:
        return f"{name} {dense}"
    bits, size = (node.attributes[key].as_int() for key in ("bits", group))
    return f"{name} int{bits}, groups of {size}"


def _unreadable(engine: Engine, name: str, error: Exception) -> EngineMismatchError:
    return EngineMismatchError(
        f"{name} of the engine {engine.path} cannot be read ({error}); build it again: "
        f"{engine.manifest.command}"
    )
