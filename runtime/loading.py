"""From an engine directory, or a checkpoint that is built on the way, to what the engine loop
needs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

from slipstream.builder.contract import page_size_of
from slipstream.builder.engine import Engine, is_engine, open_engine
from slipstream.cores import usable_cores
from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.phases import phase
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors import begin_loading, check_device, create_executor
from slipstream.runtime.kv_events.config import with_kv_events
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import INTERACTIVE, SamplingParams
from slipstream.runtime.speculation.config import spelled_out
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.weights.json import Origin, read_fields

# Up to so many cores hash with all of them, more with half: imports beside threads that compute on
# every core take longer than hashes on half of them.
_FEW_CORES = 4
# Far above what the largest vocabularies and batches take.
_MOST_TABLE_BYTES = 1 << 32
# Options that a target's executor has no use for, and what to do instead.
_GPU = {
    "num_threads": "it is for a GPU; leave it out",
    "kv_offload_path": "a GPU copies pages to memory, not to a file; leave it out",
}
_ON_THE_HOST = ("kv_offload_gib", "kv_transfer_gib")
_UNUSED = {
    "cpu": {
        "kv_cache_free_gpu_memory_fraction": "it is for a CPU, where kv_cache_bytes sets the size "
        "of the KV cache"
    },
    "cuda": _GPU,
    "tensorrt": _GPU,
    "onnxruntime": dict.fromkeys(
        _ON_THE_HOST,
        "its executor keeps no pages on the host; leave it out, or build for target cpu or cuda",
    ),
}
_UNUSED_BY_RANKS = dict.fromkeys(
    _ON_THE_HOST, "its ranks keep no pages on the host; leave it out, or build with tp_size 1"
)


def load(model: str | Path, options: Mapping[str, Any]) -> LoadedEngine:
    """Load an engine, after building it into the cache if ``model`` is a checkpoint.

    ``options`` are, where not None, fields of ``RuntimeConfig``, ``speculative_config`` (see
    ``spelled_out``) and, with a checkpoint, fields of ``BuildOptions``. Raises CheckpointError,
    BuildError, EngineMismatchError or InvalidRequestError.
    """
    options = {name: value for name, value in spelled_out(options).items() if value is not None}
    runtime = {
        name: value for name, value in options.items() if name in RuntimeConfig.__dataclass_fields__
    }
    others = {name: value for name, value in options.items() if name not in runtime}
    engine = open_engine(_engine_path(model, runtime, others))
    config = runtime_config(engine, runtime)
    _check_tables(config, engine.manifest.vocab_size)
    begin_loading(engine)
    # Hashing releases the interpreter and reads the files into memory, from where the device gets
    # them: it begins first, beside the import of what drives the device; so does the tokenizer.
    in_vain = Event()
    with ThreadPoolExecutor(2) as pool:
        verified = pool.submit(_verify, engine, in_vain)
        text = pool.submit(_tokenizer, engine, config)
        try:
            with phase("import of the device's libraries"):
                check_device(engine)
        except BaseException:
            in_vain.set()
            raise
        try:
            tokenizer = text.result()
            with phase("executor"):
                executor = create_executor(engine, config)
        finally:
            with phase("wait for hashes"):
                verified.result()  # a file that was changed is why the others failed, if they did
    return LoadedEngine(
        executor=executor,
        tokenizer=tokenizer,
        config=config,
        caches=engine.manifest.caches,
        vocab_size=engine.manifest.vocab_size,
        generation_defaults=generation_defaults(engine.path, engine.manifest.command),
        fingerprint=engine.fingerprint,
        interactive_defaults=generation_defaults(engine.path, engine.manifest.command, INTERACTIVE),
        pooling=engine.manifest.pooling,
        engine=engine,
    )


def _tokenizer(engine: Engine, config: RuntimeConfig) -> Tokenizer:
    with phase("tokenizer"):
        return Tokenizer.from_directory(
            engine.path, engine.manifest.vocab_size, config.chat_template
        )


def _verify(engine: Engine, in_vain: Event) -> None:
    cores = usable_cores()
    with phase("hashes"):
        engine.verify_files(in_vain, cores if cores <= _FEW_CORES else cores // 2)


def _engine_path(model: str | Path, runtime: Mapping[str, Any], others: Mapping[str, Any]) -> Path:
    path = Path(model)
    if is_engine(path):
        if others:
            raise InvalidRequestError(
                f"{model} is an engine, so {', '.join(others)} cannot be set: known options are "
                f"{', '.join(RuntimeConfig.__dataclass_fields__)}; what a build decides is decided "
                f"by slipstream build"
            )
        return path
    # Loaded by name: serving an engine must not need the compiler and its libraries.
    cache = import_module("slipstream.builder.cache")
    known = [*RuntimeConfig.__dataclass_fields__, *cache.BuildOptions.__dataclass_fields__]
    unknown = sorted(others.keys() - known)
    if unknown:
        raise InvalidRequestError(
            f"unknown option {', '.join(unknown)}; known options: {', '.join(dict.fromkeys(known))}"
        )
    built: Path = cache.cached_engine(model, {**runtime, **others})
    return built


def runtime_config(engine: Engine, runtime: Mapping[str, Any]) -> RuntimeConfig:
    """The configuration of an engine with these fields of it, and the engine's own limits.

    Raises InvalidRequestError for what the engine was not built for, and for a field that would be
    ignored.
    """
    limits = asdict(engine.manifest.limits)
    for name, limit in limits.items():
        if runtime.get(name, 0) > limit:
            raise InvalidRequestError(
                f"{name} is {runtime[name]}, but {engine.path} was built for {limit}; ask for "
                f"less, or build again "
                f"with --{name.replace('_', '-')} {runtime[name]}"
            )
    for name, reason in _unused(engine).items():
        if runtime.get(name):
            raise InvalidRequestError(f"{name} does nothing for {engine.path}: {reason}")
    if {"kv_cache_bytes", "kv_cache_free_gpu_memory_fraction"} <= runtime.keys():
        raise InvalidRequestError(
            "kv_cache_bytes says how large the KV cache is, so kv_cache_free_gpu_memory_fraction "
            "does nothing; leave one of them out"
        )
    page_size = page_size_of(engine.manifest.caches)
    if runtime.get("page_size", page_size) != page_size:
        raise InvalidRequestError(
            f"page_size is {runtime['page_size']}, but {engine.path} was built for {page_size}; "
            "leave it out"
        )
    limits["max_batch_size"] = min(
        limits["max_batch_size"], runtime.get("max_num_tokens", limits["max_num_tokens"])
    )
    return RuntimeConfig(**{**limits, "page_size": page_size, **with_kv_events(runtime)})


def _unused(engine: Engine) -> dict[str, str]:
    """Options that an engine has no use for, and why."""
    target = engine.manifest.target
    unused = dict(_UNUSED.get(target, {}))
    if engine.manifest.ranks > 1:
        unused |= _UNUSED_BY_RANKS
    if target == "onnxruntime":
        # Loaded by name: engines of other targets must not need ONNX Runtime.
        provider = import_module("slipstream.runtime.executors.onnxruntime.provider")
        if provider.wanted_provider(engine.manifest) == provider.CPU:
            unused |= _UNUSED["cpu"]
    return unused


def _check_tables(config: RuntimeConfig, vocab_size: int) -> None:
    """CapacityError for limits whose tables (pages of sequences, tokens, rows of logits) no machine
    should hold."""
    pages = config.max_batch_size * (config.max_seq_len // config.page_size + 1)
    size = 4 * (pages + config.max_num_tokens + config.max_batch_size * vocab_size)
    if size > _MOST_TABLE_BYTES:
        raise CapacityError(
            f"the tables of max_batch_size {config.max_batch_size}, max_num_tokens "
            f"{config.max_num_tokens} and max_seq_len {config.max_seq_len} take {size >> 20} MiB; "
            "ask for less: --max-batch-size, --max-num-tokens or --max-seq-len"
        )


def generation_defaults(
    directory: Path, command: str, otherwise: Mapping[str, Any] | None = None
) -> SamplingParams:
    """What generation_config.json recommends, and for fields it does not name ``otherwise``;
    ``command`` builds the engine again.

    Raises CheckpointError for values of another type or out of range.
    """
    file = directory / "generation_config.json"
    if not file.is_file():
        return SamplingParams.from_dict(otherwise or {})
    origin = Origin(file, f"correct it in the checkpoint and build again: {command}")
    config = read_fields(file, origin)
    greedy = {} if config.flag("do_sample", True) else {"temperature": 0.0}
    try:
        return SamplingParams.from_generation_config({**config.values, **greedy}, otherwise)
    except InvalidRequestError as error:
        raise origin.refusal(f"cannot be used ({error!s:.300})") from error
