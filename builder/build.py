"""checkpoint -> canonical graph -> passes -> engine directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx_ir as ir

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.base import Checkpoint, check_read
from slipstream.builder.contract import (
    HEAD_GRAPH,
    TARGET_GRAPH,
    CacheSpec,
    GraphSpec,
    Head,
    Pooling,
    bytes_per_token,
)
from slipstream.builder.declare import declare
from slipstream.builder.engine import (
    KERNELS,
    MANIFEST,
    WEIGHTS,
    EngineLimits,
    Manifest,
    Plans,
    digest,
    engine_contents,
    is_engine,
    weight_file,
)
from slipstream.builder.graph.describe import count_formats
from slipstream.builder.graph.passes import run_passes
from slipstream.builder.graph.passes.set_kv_scales import SetKVScales
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.builder.head import compile_head, head_for
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.builder.output import check_output, publish, scratch
from slipstream.builder.pooling import pooling_of, stated_pooling
from slipstream.builder.score import write_score_template
from slipstream.builder.targets.base import PlanningTarget, check_runs_here, create_target
from slipstream.builder.weight_file import write_weights
from slipstream.errors import BuildError
from slipstream.phases import phase
from slipstream.plugins.operators import OPERATORS, STANDARD_DOMAINS
from slipstream.weights.tensor import KVScales, WeightFormat
from slipstream.weights.tokenizer import read_tokenizer

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
# Makes an engine's file of kernels, or none.
Compiler = Callable[["Plan"], bytes | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled program whose weights have not been read: what ``--estimate`` prints and
    ``build`` writes.

    Sizes are in bytes. ``quantization`` is what the build applies, or ``checkpoint`` when weights
    come quantized and are kept. ``formats`` counts the checkpoint's matrices by what they hold.
    ``kv_scales`` are those that float8 pages use; None is 1. ``pooling`` is None for an engine that
    generates, ``head`` for one without a head, whose program is the ``head_program``. ``others``
    are the programs of the ranks after the first, if the engine has several: the same graph, and
    weights of the same sizes. Sizes are those of one rank.
    """

    checkpoint: Checkpoint
    options: BuildOptions
    program: Program
    target: str
    capability: str
    limits: EngineLimits
    quantization: str
    formats: dict[str, int]
    kv_scales: KVScales | None = None
    pooling: Pooling | None = None
    head: Head | None = None
    head_program: Program | None = None
    others: tuple[Program, ...] = ()

    @property
    def programs(self) -> dict[str, Program]:
        """That of every graph."""
        head = {} if self.head_program is None else {HEAD_GRAPH: self.head_program}
        return {TARGET_GRAPH: self.program, **head}

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """The contract of every graph."""
        contracts = {name: program.contract for name, program in self.programs.items()}
        return {name: each for name, each in contracts.items() if each is not None}

    @property
    def caches(self) -> tuple[CacheSpec, ...]:
        """What the graphs remember."""
        return tuple(cache for program in self.programs.values() for cache in program.caches)

    @property
    def weights(self) -> list[StoredWeight]:
        """Every weight of the engine; graphs share those of one name."""
        stored = [program.stored for program in self.programs.values()]
        return list({name: weight for each in stored for name, weight in each.items()}.values())

    @property
    def ranks(self) -> int:
        """How many processes run the engine together."""
        return 1 + len(self.others)

    @property
    def weight_bytes(self) -> int:
        """Size of a weight file's data."""
        return sum(part.nbytes for weight in self.weights for part in weight.parts)

    @property
    def sequence_kv_bytes(self) -> int:
        """KV pages of one sequence of the full length."""
        return bytes_per_token(self.caches) * self.limits.max_seq_len


def plan(source: str | Path, options: BuildOptions) -> Plan:
    """Compile a checkpoint as far as is possible without reading its weights.

    Raises CheckpointError for what cannot be read, BuildError for options that do not fit it.
    """
    return compile_checkpoint(open_checkpoint(source, strict=options.strict_tensors), options)


def compile_checkpoint(checkpoint: Checkpoint, options: BuildOptions) -> Plan:
    """``plan`` for a checkpoint that is open."""
    config, target = checkpoint.config, create_target(options.target)
    target.check(config, options)
    head = head_for(checkpoint, options, target)
    limits = _limits(config, options, target.limits)
    formats = [checkpoint.tensor(name).format for name in checkpoint.names()]
    quantization = _quantization(formats, options)
    kv_dtype = target.kv_dtype(
        _with_kv_dtype(options, checkpoint.kv_scales), quantization == "none"
    )
    check_read(checkpoint)
    stated = stated_pooling(checkpoint.pooling, options)
    pages = kv_dtype, target.page_size, limits.max_seq_len
    scales = _kv_scales(checkpoint.kv_scales, kv_dtype)
    scaling = [] if scales is None else [SetKVScales(scales)]
    limited = replace(options, **asdict(limits))

    def compiled(rank: int) -> Program:
        program = declare(checkpoint, stated, head, (rank, options.tp_size), *pages)
        run_passes(program, [*scaling, *target.pipeline(limited)])
        return program

    program, *others = _alike([compiled(rank) for rank in range(options.tp_size)])
    beside = None
    if head is not None:
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        lowering = target.pipeline(limited)
        beside = compile_head(head, embedding, lowering, *pages, program.stored)
    capability = target.capability(program, kv_dtype)
    check_runs_here(options.target, capability)
    return Plan(
        checkpoint, options, program, target.name, capability, limits, quantization,
        count_formats(formats), scales,
        None if stated is None else pooling_of(stated, config),
        None if head is None else head.described, beside, tuple(others),
    )  # fmt: skip


def build(
    source: str | Path,
    output: Path,
    options: BuildOptions,
    progress: Progress | None = None,
    compiler: Compiler | None = None,
) -> Manifest:
    """Write the engine of a checkpoint to ``output``, replacing an engine that stands there.

    ``progress`` is told the bytes written and the bytes in all. ``compiler`` works in a thread
    while weights are written. Nothing is left behind when the
    build fails, and until it has succeeded the old engine stays. Raises CheckpointError, and
    BuildError, also for an ``output`` that holds anything but an engine.
    """
    with _write_errors(output):
        check_output(output, "engine", engine_contents, *_local(source))
    with phase("plan"):
        planned = plan(source, options)
    with _write_errors(output), scratch(output) as staging:
        return _make(planned, staging, source, output, progress, compiler)


def build_once(
    source: str | Path, output: Path, options: BuildOptions, progress: Progress | None = None
) -> bool:
    """``build`` into a place that others build the same engine into: False if one was there, or
    was made by a process that this one waited for."""
    with _write_errors(output), scratch(output, wait=True) as staging:
        if is_engine(output):
            return False
        _make(plan(source, options), staging, source, output, progress)
    return True


def _make(
    planned: Plan,
    staging: Path,
    source: str | Path,
    output: Path,
    progress: Progress | None,
    compiler: Compiler | None = None,
) -> Manifest:
    # Whoever has to build it again may be in another directory.
    origin = next((str(path.absolute()) for path in _local(source)), str(source))
    manifest = write_engine(planned, staging, origin, str(output), progress, compiler)
    check_output(output, "engine", engine_contents)
    publish(staging, output)
    return manifest


def _local(source: str | Path) -> Iterator[Path]:
    if (path := Path(source)).exists():
        yield path


@contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(f"cannot write the engine {output}: {error.strerror or error}") from error


def _with_kv_dtype(options: BuildOptions, scales: KVScales | None) -> BuildOptions:
    """A checkpoint that was calibrated for a float8 cache gets one unless another is asked for."""
    if options.kv_cache_dtype != "auto" or scales is None:
        return options
    return replace(options, kv_cache_dtype="fp8")


def _kv_scales(scales: KVScales | None, kv_dtype: str) -> KVScales | None:
    if scales is not None and kv_dtype != "float8_e4m3fn":
        log.warning(
            "the checkpoint's KV scales are for fp8 and are not used: pages are %s", kv_dtype
        )
        return None
    return scales


def _quantization(formats: Iterable[WeightFormat], options: BuildOptions) -> str:
    if options.quantization == "none" and any(format.kind != "dense" for format in formats):
        return "checkpoint"
    return options.quantization


def _limits(config: ModelConfig, options: BuildOptions, default: EngineLimits) -> EngineLimits:
    longest = config.context_length
    asked = options.max_seq_len or longest
    if asked > longest:
        raise BuildError(
            f"max_seq_len is {asked}, but the model's configuration says {longest} positions; use "
            f"at most {longest}"
        )
    return EngineLimits(
        options.max_batch_size or default.max_batch_size,
        options.max_num_tokens or default.max_num_tokens,
        asked,
    )


def _alike(programs: list[Program]) -> list[Program]:
    """The programs of all ranks, which differ in what their weights hold and in nothing else."""
    first, *others = [
        (
            [(node.name, *(value and value.name for value in node.inputs)) for node in each.graph],
            [weight.parts for weight in each.stored.values()],
        )
        for each in programs
    ]
    assert all(other == first for other in others), "ranks have graphs of their own"
    return programs


def write_engine(
    planned: Plan,
    staging: Path,
    source: str,
    output: str,
    progress: Progress | None = None,
    compiler: Compiler | None = None,
) -> Manifest:
    """Write the files of an engine into a directory; ``source`` and ``output`` are what its
    manifest says to build it again from, and to."""
    total, done = planned.weight_bytes * planned.ranks, 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    # First, because a tokenizer that cannot be read is no reason to wait for the weights.
    with phase("tokenizer"):
        planned.checkpoint.write_tokenizer(staging)
        read_tokenizer(staging / "tokenizer.json")
    if planned.pooling is not None and planned.pooling.task == "score":
        write_score_template(staging)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(_kernels, compiler, planned) if compiler is not None else None
        with phase("weights"):
            places = write_weights(staging / WEIGHTS, planned.weights, wrote)
            for rank, other in enumerate(planned.others, start=1):
                same = write_weights(staging / weight_file(rank), [*other.stored.values()], wrote)
                assert same == places, "the graph has one place for a weight of all ranks"
        with phase("wait for kernels"):
            kernels = None if compiled is None else compiled.result()
    if kernels is not None:
        (staging / KERNELS).write_bytes(kernels)
    for program in planned.programs.values():
        assert program.contract is not None
        _place_weights(program, places, staging)
        ir.save(program.model, staging / program.contract.file)
    target = create_target(planned.target)
    plans = (
        target.plans(planned.program, planned.limits, staging)
        if isinstance(target, PlanningTarget)
        else None
    )
    with phase("hashes"):
        files = {file.name: digest(file) for file in sorted(staging.iterdir())}
    manifest = manifest_of(planned, files, source, output, plans)
    (staging / MANIFEST).write_text(manifest.to_json())
    return manifest


def _kernels(compiler: Compiler, planned: Plan) -> bytes | None:
    with phase("kernels"):
        return compiler(planned)


def _place_weights(program: Program, places: Mapping[str, tuple[int, int]], staging: Path) -> None:
    """Tell a graph where in the file its weights are."""
    for value in program.graph.initializers.values():
        if value.name is not None and value.name in places:
            offset, length = places[value.name]
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                offset,
                length,
                value.dtype,
                shape=value.shape,
                name=value.name,
                base_dir=staging,
            )


def manifest_of(
    planned: Plan, files: dict[str, str], source: str, output: str, plans: Plans | None = None
) -> Manifest:
    """The manifest of a compiled program whose files have these hashes."""
    nodes = [node for program in planned.programs.values() for node in program.graph]
    used = {node.op_type for node in nodes if node.domain not in STANDARD_DOMAINS}
    return Manifest(
        target=planned.target,
        capability=planned.capability,
        model=planned.checkpoint.config.to_json(),
        limits=planned.limits,
        graphs=planned.graphs,
        caches=planned.caches,
        quantization=planned.quantization,
        pooling=planned.pooling,
        plans=plans,
        head=planned.head,
        formats=planned.formats,
        ranks=planned.ranks,
        plugins={name: OPERATORS[name].version for name in OPERATORS if name in used},
        source=source,
        command=_recipe(planned).command(source, output),
        files=files,
    )


def _recipe(planned: Plan) -> BuildOptions:
    """The options, for whoever builds again from another directory."""
    if planned.head is None:
        return planned.options
    return replace(planned.options, speculative_model=planned.head.source)
