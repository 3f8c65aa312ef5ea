"""checkpoint -> canonical graph -> passes -> engine directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from slipstream.builder.checked import checked
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
from slipstream.builder.engine import (
    GRAPH,
    KERNELS,
    MANIFEST,
    WEIGHTS,
    EngineLimits,
    Manifest,
    digest,
    engine_contents,
    is_engine,
)
from slipstream.builder.graph.describe import count_formats
from slipstream.builder.graph.ops import Ops
from slipstream.builder.graph.passes import run_passes
from slipstream.builder.graph.passes.set_kv_scales import SetKVScales
from slipstream.builder.graph.program import Program, StoredWeight, new_program
from slipstream.builder.head import HeadModel, compile_head, head_for
from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.options import BuildOptions
from slipstream.builder.output import check_output, publish, scratch
from slipstream.builder.pooling import StatedPooling, pooling_of, stated_pooling
from slipstream.builder.score import answers_of, write_score_template
from slipstream.builder.targets.base import check_runs_here, create_target
from slipstream.builder.weight_file import write_weights
from slipstream.errors import BuildError
from slipstream.plugins.operators import OPERATORS, STANDARD_DOMAINS
from slipstream.weights.tensor import KVScales, LazyTensor, WeightFormat
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
    generates, ``head`` for one without a head, whose program is the ``head_program``.
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
    def weight_bytes(self) -> int:
        """Size of the weight file's data."""
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
    program = _declare(checkpoint, stated, head, *pages)
    scales = _kv_scales(checkpoint.kv_scales, kv_dtype)
    scaling = [] if scales is None else [SetKVScales(scales)]
    run_passes(program, [*scaling, *target.pipeline(options)])
    beside = None
    if head is not None:
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        beside = compile_head(head, embedding, target.pipeline(options), *pages, program.stored)
    capability = target.capability(program, kv_dtype)
    check_runs_here(options.target, capability)
    return Plan(
        checkpoint, options, program, target.name, capability, limits, quantization,
        count_formats(formats), scales,
        None if stated is None else pooling_of(stated, config),
        None if head is None else head.described, beside,
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
    manifest = _write(planned, staging, origin, str(output), progress, compiler)
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


def _declare(
    checkpoint: Checkpoint,
    stated: StatedPooling | None,
    head: HeadModel | None,
    kv_dtype: str,
    page_size: int,
    max_seq_len: int,
) -> Program:
    """The canonical program of a checkpoint."""
    config, architecture = checkpoint.config, architecture_of(checkpoint.config.architecture)
    expected = architecture.shapes(config)
    if stated is not None and stated.task == "embed":
        heads = [f"{m.name}.weight" for m in architecture.modules if m.tied]
        expected = {name: shape for name, shape in expected.items() if name not in heads}
    program = new_program(config.architecture)
    used: set[str] = set()

    def tensor(name: str) -> LazyTensor:
        used.add(name)
        return checked(checkpoint.tensor(name), expected.get(name), checkpoint.path)

    decoder = architecture.decoder
    ops = Ops(program, decoder.caches(config, kv_dtype, page_size))
    tap = None if head is None else head.tap(ops)
    _build(decoder(ops, config, architecture, tensor, max_seq_len, tap), checkpoint, stated)
    program.contract, program.caches = ops.contract(GRAPH), ops.caches
    differing = used ^ set(expected)
    if differing:
        raise BuildError(
            f"the graph of {config.architecture} and its table of modules differ in "
            f"{len(differing)} tensors, such as {min(differing)}; correct the architecture's file"
        )
    return program


def _build(decoder: Decoder, checkpoint: Checkpoint, stated: StatedPooling | None) -> None:
    if stated is None:
        decoder.build()
    elif stated.task == "embed":
        decoder.build_states()
    else:
        decoder.build_answers(answers_of(checkpoint, stated))


def _write(
    planned: Plan,
    staging: Path,
    source: str,
    output: str,
    progress: Progress | None,
    compiler: Compiler | None,
) -> Manifest:
    total, done = planned.weight_bytes, 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    # First, because a tokenizer that cannot be read is no reason to wait for the weights.
    planned.checkpoint.write_tokenizer(staging)
    read_tokenizer(staging / "tokenizer.json")
    if planned.pooling is not None and planned.pooling.task == "score":
        write_score_template(staging)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(compiler, planned) if compiler is not None else None
        places = write_weights(staging / WEIGHTS, planned.weights, wrote)
    if compiled is not None and (kernels := compiled.result()) is not None:
        (staging / KERNELS).write_bytes(kernels)
    for program in planned.programs.values():
        assert program.contract is not None
        _place_weights(program, places, staging)
        ir.save(program.model, staging / program.contract.file)
    files = {file.name: digest(file) for file in sorted(staging.iterdir())}
    manifest = manifest_of(planned, files, source, output)
    (staging / MANIFEST).write_text(manifest.to_json())
    return manifest


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


def manifest_of(planned: Plan, files: dict[str, str], source: str, output: str) -> Manifest:
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
        head=planned.head,
        formats=planned.formats,
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
