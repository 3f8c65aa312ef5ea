"""The engine directory: its manifest, and the checks that come before anything is loaded.

Beside ``builder/contract.py`` all that the runtime knows of the builder; it imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import threading
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from slipstream import __version__
from slipstream.builder.check_contract import check_contract
from slipstream.builder.contract import (
    HEAD_GRAPH,
    LOGITS,
    TARGET_GRAPH,
    CacheSpec,
    GraphSpec,
    Head,
    Pooling,
)
from slipstream.builder.from_json import from_json
from slipstream.errors import EngineMismatchError
from slipstream.plugins.operators import OPERATORS
from slipstream.weights.json import Origin, is_file_name, read_fields, shortened
from slipstream.weights.parallel import in_parallel

FORMAT_VERSION = 5
MANIFEST = "engine.json"
GRAPH = "graph.onnx"
HEAD = "head.onnx"
WEIGHTS = "weights.safetensors"
RANKS = (1, 2, 4, 8)
TACTICS = "tactics.json"
COSTS = "step_costs.json"
KERNELS = "kernels.zip"
PLANS = "plans.json"
PAGE_LAYOUT = 2  # raised with how a page lies in memory, as files of pages outlive a process
# Ends the names of weights that plans hold themselves.
CONSTANT = ".constant"
# What the tokenizer is made of.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_PIECE = 1 << 24  # bytes of a file that are hashed by themselves
_READ = 1 << 22
_LARGEST = 2**31 - 1
_LONG = 10_000  # characters of a command


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can be asked for; the runtime may ask for less.

    max_batch_size  sequences in one step
    max_num_tokens  tokens in one step, prefill chunks and decodes together
    max_seq_len     tokens of one sequence, prompt and output together
    """

    max_batch_size: int = 64
    max_num_tokens: int = 512
    max_seq_len: int = 4096


@dataclass(frozen=True, slots=True)
class Plans:
    """What TensorRT made of the functions that a graph calls.

    The package ``flavour`` of ``version`` made the plans, and nothing else loads them; ``gpus`` are
    those that they run on, such as ``sm_89``. ``calls`` has the file of each call by the name of
    its node. ``unverified`` says what nobody has seen of them.
    """

    flavour: str
    version: str
    gpus: tuple[str, ...]
    calls: dict[str, str]
    unverified: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of engine.json.

    ``graphs``, by name, and the ``caches`` that they share are the contract of a step. ``formats``
    counts the matrices of the checkpoint by what they hold there. ``ranks`` run the graphs
    together, each with its own ``weight_file`` and with caches of the sizes said here. ``pooling``
    says what is made of the output of an engine that does not generate, None for one that does,
    ``head`` what guesses tokens in a graph beside the target's, None where nothing does, and
    ``plans`` who runs the functions that a graph calls, None where it calls none. ``source`` is the
    checkpoint and ``command`` the build that made the engine, so that a mismatch can be mended.
    ``files`` holds the ``digest`` of every other file.
    """

    target: str
    model: dict[str, Any]
    limits: EngineLimits
    graphs: dict[str, GraphSpec]
    caches: tuple[CacheSpec, ...]
    quantization: str
    plugins: dict[str, int]
    source: str
    command: str
    files: dict[str, str]
    pooling: Pooling | None = None
    plans: Plans | None = None
    head: Head | None = None
    capability: str = "any"
    formats: dict[str, int] = field(default_factory=dict)
    ranks: int = 1
    slipstream_version: str = __version__
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_dict(raw: object) -> Manifest:
        """From parsed JSON; ValueError names a field that is missing, unknown, of another type or
        at odds with the others."""
        manifest = from_json(Manifest, raw)
        check_contract(manifest.graphs, manifest.caches)
        for name, limit in asdict(manifest.limits).items():
            if not 1 <= limit <= _LARGEST:
                raise ValueError(f"limits.{name} is {limit}, not from 1 to {_LARGEST}")
        if manifest.ranks not in RANKS:
            raise ValueError(f"ranks is {manifest.ranks}, not one of {RANKS}")
        plans = () if manifest.plans is None else manifest.plans.calls.values()
        graphs = [graph.file for graph in manifest.graphs.values()]
        for name in (*manifest.files, *graphs, *plans):
            if not is_file_name(name):
                raise ValueError(f"files has {shortened(name)}, which is no file of the engine")
        pools = manifest.graphs[TARGET_GRAPH].output(LOGITS) is None
        if pools != (manifest.pooling is not None):
            raise ValueError("pooling does not say what is made of the output of the target graph")
        if (manifest.head is None) == (HEAD_GRAPH in manifest.graphs):
            raise ValueError(f"head does not say what the graph {HEAD_GRAPH} is")
        if manifest.pooling and not 1 <= manifest.pooling.vocab_size <= _LARGEST:
            raise ValueError(f"pooling.vocab_size is {manifest.pooling.vocab_size}")
        if not isinstance(manifest.model.get("architecture"), str):
            raise ValueError("model.architecture is no text")
        return manifest

    @property
    def on_gpu(self) -> bool:
        """Whether an NVIDIA GPU runs the engine."""
        return self.capability.startswith("sm_")

    @property
    def vocab_size(self) -> int:
        """The width of the logits, which may exceed the number of tokens; as wide as they would be
        in an engine that has none."""
        if self.pooling is not None:
            return self.pooling.vocab_size
        logits = self.graphs[TARGET_GRAPH].output(LOGITS)
        assert logits is not None and isinstance(logits.shape[1], int)
        return logits.shape[1]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine directory whose manifest has been read and fits this Slipstream."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """A name for all files, this version of Slipstream and how it lays out pages, of which
        nothing can be told."""
        identity = json.dumps([__version__, PAGE_LAYOUT, self.manifest.files], sort_keys=True)
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def verify_files(self, in_vain: Event | None = None, threads: int | None = None) -> None:
        """Compare every file with its hash; EngineMismatchError names the first that differs, is
        missing, or has no hash to be compared with.

        Another thread that sets ``in_vain`` ends this soon, with whatever comes of it. It takes no
        more than so many ``threads``.
        """
        for name in self.unlisted():
            raise self._mismatch(
                f"{name} of the engine {self.path} has no hash in {MANIFEST}, so it was not built "
                "with it"
            )
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise self._mismatch(f"{name} is missing from the engine {self.path}")
            if digest(file, in_vain, threads) != expected:
                raise self._mismatch(
                    f"{name} of the engine {self.path} was changed or damaged after it was built"
                )

    def unlisted(self) -> list[str]:
        """Files that running the engine reads and that are there, but of which the manifest has no
        hash."""
        graphs = [graph.file for graph in self.manifest.graphs.values()]
        weights = map(weight_file, range(self.manifest.ranks))
        plans = () if self.manifest.plans is None else self.manifest.plans.calls.values()
        read = dict.fromkeys((*graphs, *weights, TACTICS, COSTS, KERNELS, *plans, *_TEXT_FILES))
        return [
            name for name in read if name not in self.manifest.files and (self.path / name).exists()
        ]

    def write_file(self, name: str, data: bytes) -> None:
        """Add or replace a file, and its hash in the manifest."""
        self._replace(name, data)
        files = {**self.manifest.files, name: digest(self.path / name)}
        self._replace(MANIFEST, replace(self.manifest, files=files).to_json().encode())

    def _replace(self, name: str, data: bytes) -> None:
        new = self.path / f".{name}.new"
        new.write_bytes(data)
        new.replace(self.path / name)

    def _mismatch(self, found: str) -> EngineMismatchError:
        return EngineMismatchError(f"{found}; build it again: {self.manifest.command}")


def weight_file(rank: int) -> str:
    """The file of a rank's weights, in each of which they lie at the same places: the graph names
    that of the first."""
    return WEIGHTS if rank == 0 else f"weights.rank{rank}.safetensors"


def digest(file: Path, in_vain: Event | None = None, threads: int | None = None) -> str:
    """The hash of a file: the SHA-256, in hex, of the SHA-256 of each of its pieces of 16 MiB one
    after another, so that several cores can share a large file, or so many ``threads``; another
    once ``in_vain`` is set."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        pieces = range(0, size, _PIECE)
        found = dict.fromkeys(pieces, b"")

        # A buffer for each thread: memory that is taken and given back for every read is mapped
        # anew every time, which holds up all threads of the process.
        buffers = threading.local()

        def hash_piece(start: int) -> None:
            if in_vain is None or not in_vain.is_set():
                if not hasattr(buffers, "read"):
                    buffers.read = memoryview(bytearray(min(_READ, size)))
                found[start] = _piece_hash(stream.fileno(), start, buffers.read)

        in_parallel(hash_piece, pieces, threads)
    return hashlib.sha256(b"".join(found.values())).hexdigest()


def _piece_hash(descriptor: int, start: int, buffer: memoryview) -> bytes:
    state, end = hashlib.sha256(), start + _PIECE
    while count := os.preadv(descriptor, [buffer[: end - start]], start):
        state.update(buffer[:count])
        start += count
    return state.digest()


def is_engine(path: Path) -> bool:
    """Whether a path looks like an engine directory."""
    return (path / MANIFEST).is_file()


def engine_contents(path: Path) -> set[str] | None:
    """The names of the files that make up the engine in a directory, of any version of Slipstream;
    None if there is none."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return {MANIFEST, *map(str, files)} if isinstance(files, dict) else None


def open_engine(path: Path) -> Engine:
    """Read and check a manifest; EngineMismatchError says what was found, what is needed and how
    to mend it.

    Hashes are not compared here: ``Engine.verify_files`` does that, so that loading can overlap it.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise EngineMismatchError(
            f"{path} holds no {MANIFEST}, so it is no engine; make one with: slipstream build "
            f"CHECKPOINT -o {path}"
        )
    again = f"build it again: slipstream build CHECKPOINT -o {path}"
    raw = read_fields(file, Origin(file, again, EngineMismatchError)).values
    if "format_version" not in raw:
        raise _unreadable(f"{file} has no format_version, so it is no engine manifest", path)
    command = _build_command(raw.get("command"), path)
    if raw["format_version"] != FORMAT_VERSION:
        other = shortened(raw["format_version"])
        found = f"{file} has format {other} and Slipstream {__version__} reads"
        raise _unreadable(f"{found} format {FORMAT_VERSION}", path, command)
    try:
        manifest = Manifest.from_dict(raw)
    except ValueError as error:
        raise _unreadable(
            f"{file} lacks or misnames a field ({error!s:.400})", path, command
        ) from error
    for name, version in manifest.plugins.items():
        known = name in OPERATORS
        ours = str(OPERATORS[name].version) if known else "none"
        if str(version) != ours:
            found = f"{file} needs version {version} of operator {name} and Slipstream"
            remedy = "" if known else "; install the package that brings it"
            raise _unreadable(f"{found} {__version__} has {ours}{remedy}", path, command)
    return Engine(path, replace(manifest, command=command))


def _unreadable(found: str, path: Path, command: str | None = None) -> EngineMismatchError:
    again = command or _build_command(None, path)
    return EngineMismatchError(f"{found}; build it again: {again}")


def _build_command(told: object, path: Path) -> str:
    """The command of a manifest, writing to where the engine is now, if it is one that
    ``BuildOptions.command`` could have written: errors ask for it to be run, and an engine may come
    from a stranger."""
    try:
        words = shlex.split(told) if isinstance(told, str) and len(told) < _LONG else []
    except ValueError:  # a quotation that does not end
        words = []
    ours = words[:2] == ["slipstream", "build"] and words[3:4] == ["-o"] and len(words) > 4
    if ours and all(map(str.isprintable, words)) and shlex.join(words) == told:
        return shlex.join([*words[:4], str(path), *words[5:]])
    return f"slipstream build CHECKPOINT -o {shlex.quote(str(path))}"
