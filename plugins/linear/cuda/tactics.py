"""Which kernel runs a Linear, and with which tiles: by weight, shape and number of tokens.

The table has the tactics of ExpertLinear too (``expert_linear/cuda/tactics.py``).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from slipstream.errors import EngineMismatchError
from slipstream.plugins.cuda.detect import shared_memory
from slipstream.plugins.linear.cuda.packing import FLOAT4, in_words
from slipstream.plugins.linear.cuda.wide import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Tile,
    usual_tile,
)
from slipstream.weights.tensor import WeightFormat

log = logging.getLogger(__name__)

Kernel = Literal["gemv", "dot", "wide", "blas"]
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GEMV_TOKENS = 4
DOT_TOKENS = 256
# Up to this many tokens gemv is the better guess: its arithmetic grows with them.
_GUESS_GEMV_TOKENS = 2
PROCESSORS = 132  # of an H100; other GPUs differ by less than a factor of two
_SPARE_BYTES = 3 << 10  # of shared memory, for what Triton adds to the tiles


@dataclass(frozen=True, slots=True)
class Tactic:
    """A kernel and its tiles.

    block_n      rows of the result a program computes (gated: pairs of rows).
    block_k      gemv, dot of floats: elements of K a step; dot of integers: always one chunk.
    num_stages   gemv: vectors in flight a row; dot: steps in flight; wide: tiles of x in flight.
    fuse_norm    the RMS norm of x inside the kernel, and not by one before it.
    split_k      dot, wide: parts of K whose sums are added up in order, by as many programs.
    swap         dot: the weight is the left operand, as wgmma wants few tokens.
    block_m      rows of x of a tile; 0 for those of ``block_m`` in a Linear's dot.
    serial       dot: one program computes all parts of K, one after the other, to the same bits.
    rounds       dot of float8: x is rounded to it, by a scale a token or the weight's own, and the
                 weight not widened to x's type.
    """

    kernel: Kernel
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    fuse_norm: bool = False
    split_k: int = 1
    swap: bool = False
    block_m: int = 0
    serial: bool = False
    rounds: bool = False


def vector_size(fmt: WeightFormat) -> int:
    """Elements of a weight in 16 bytes."""
    return 128 // (fmt.bits or 16)


def weight_key(fmt: WeightFormat) -> str:
    """Short name of a format without its shape, such as ``int4g128z``."""
    if fmt.kind == "dense":
        return fmt.dtype
    if fmt.kind == "float8_e4m3":
        return "fp8block" if fmt.rows > 1 else "fp8"
    if fmt.kind == FLOAT4:
        return "mxfp4"
    if whole_rows(fmt):
        return "int8row"
    return f"int{fmt.bits}g{fmt.group}{fmt.zero[0]}"


def whole_rows(fmt: WeightFormat) -> bool:
    """Whether an integer weight has one scale a row."""
    return (
        fmt.kind == "int"
        and fmt.bits == 8
        and fmt.zero == "midpoint"
        and (fmt.group == fmt.shape[1])
    )


def can_stream(fmt: WeightFormat) -> bool:
    """Whether gemv and dot can read the rows of a weight in whole vectors."""
    return fmt.shape[1] % (4 if in_words(fmt) else vector_size(fmt)) == 0


def can_widen(fmt: WeightFormat, tokens: int, capability: tuple[int, int]) -> bool:
    """Whether wide is for a product: integers in whole chunks, on a Hopper GPU."""
    return capability == (9, 0) and LEAST_TOKENS <= tokens <= MOST_TOKENS and whole_chunks(fmt)


def whole_chunks(fmt: WeightFormat) -> bool:
    """Whether the words of an integer weight hold no padding."""
    return fmt.kind == "int" and fmt.shape[1] % (1024 // fmt.bits) == 0


def multiplies_in(fmt: WeightFormat) -> str:
    """The type in which many tokens are multiplied: "float8", "int8" or "dense"."""
    n, k = fmt.shape
    if fmt.activation not in ("token", "static"):
        return "dense"
    if fmt.kind == "float8_e4m3" and n % 16 == 0 and k % 16 == 0:
        return "float8"
    if whole_rows(fmt) and n % 8 == 0 and k % 8 == 0:
        return "int8"
    return "dense"


def describe(fmt: WeightFormat) -> str:
    """The kernels of a weight, for people: ``fp8: GEMV, dot, cuBLASLt float8``."""
    few = ["GEMV", "dot"] if can_stream(fmt) else []
    few += ["wide on sm_90"] if whole_chunks(fmt) else []
    many = f"cuBLASLt {multiplies_in(fmt)}"
    if fmt.kind == "dense":
        many = "cuBLAS"
    elif multiplies_in(fmt) == "dense":
        many = "dense fallback (dequantize, cuBLAS)"
    return f"{weight_key(fmt)}: {', '.join([*few, many])}"


def largest_dot(fmt: WeightFormat, capability: tuple[int, int]) -> int:
    """Tokens up to which dot is the better guess; more go to the BLAS library.

    That multiplies 16-bit weights as they are, and float8 ones twice as fast where the GPU can; an
    integer weight must first be written to memory as a dense one.
    """
    if fmt.kind == "float8_e4m3" and fmt.rows == 1 and capability >= (8, 9):
        return 32
    return 64 if fmt.kind == "dense" else 128


def default_tactic(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> Tactic:
    """A sensible tactic for a shape that nobody timed."""
    if not can_stream(fmt):
        return Tactic("blas")
    if tokens <= _GUESS_GEMV_TOKENS:
        return _default_gemv(fmt, gated)
    if can_widen(fmt, tokens, capability) and multiplies_in(fmt) != "int8":
        return wide_tactic(usual_tile(fmt.shape[0], tokens), gated)
    if tokens <= largest_dot(fmt, capability):
        return _default_dot(fmt, gated, tokens, capability)
    return Tactic("blas")


def _default_gemv(fmt: WeightFormat, gated: bool) -> Tactic:
    """What was quickest on an H100 for the shapes of an 8B Llama, by their kind.

    Rows of many vectors are shared by two warps, and few rows make small programs, so that there
    are enough of them. A gated thread has two rows for one, so it takes fewer.
    """
    lanes, warps = (64, 8) if fmt.shape[1] >= 128 * vector_size(fmt) and not gated else (32, 4)
    few = fmt.shape[0] < 6144 or gated
    rows_a_thread = 2 if few else 4
    rows = 32 * warps // lanes * rows_a_thread
    return Tactic(
        "gemv",
        block_n=rows // 2 if gated else rows,
        block_k=lanes * vector_size(fmt),
        num_warps=warps,
        num_stages=2 if few else 1,
        fuse_norm=True,
    )


def _default_dot(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> Tactic:
    width = fmt.shape[0] // (2 if gated else 1)
    if capability[0] == 9:
        found = _hopper_dot(fmt, width, tokens)
    else:
        crowded = gated and tokens > 32  # two sums of a tile no longer fit the registers
        block_n = 64 if width >= 64 * PROCESSORS and not crowded else 32
        split = _split(width, block_n, tokens, PROCESSORS)
        found = Tactic("dot", block_n, 64 if tokens > 32 else 128, num_stages=4, split_k=split)
    return fit_stages(found, fmt, gated, block_m(tokens), capability)


def _hopper_dot(fmt: WeightFormat, width: int, tokens: int) -> Tactic:
    """As ``_default_gemv``. With the weight on the left, wgmma takes few tokens as they are."""
    many = tokens > 32
    if fmt.kind == "dense":
        block_n = 32 if many and width <= 64 * 66 else 64
        split = 1 if many else min(_split(width, block_n, tokens, 128), 2)
        return Tactic("dot", block_n, 128, num_stages=6, split_k=split, swap=not many)
    if fmt.kind == "float8_e4m3":
        split = _split(width, 64, tokens, 128 if many else 256)
        return Tactic("dot", 64, 128, num_stages=6, split_k=split, swap=many)
    block_n, warps = (128, 8) if many else (64, 4)
    split = _split(width, block_n, tokens, 96 if many else 192)
    return Tactic("dot", block_n, 128, warps, 6, split_k=split, swap=True)


def wide_tactic(tile: Tile, gated: bool) -> Tactic:
    """The tactic of a tile of wide."""
    block_n = tile.rows // (2 if gated else 1)
    return Tactic("wide", block_n, num_stages=tile.stages, split_k=tile.split, block_m=tile.tokens)


def _split(width: int, block_n: int, tokens: int, programs: int) -> int:
    """By how many programs the K of a tile is shared, so that there are ``programs`` or more."""
    split = 1
    while split < 4 and -(-width // block_n) * split < programs and tokens <= 64:
        split *= 2
    return split


def fit_stages(
    tactic: Tactic, fmt: WeightFormat, gated: bool, tile: int, capability: tuple[int, int]
) -> Tactic:
    """A dot of ``tile`` rows of x with as many stages as shared memory holds, at least two."""
    elements = 1024 // fmt.bits if in_words(fmt) else tactic.block_k
    bits = fmt.bits or 16
    rows = tactic.block_n * (2 if gated else 1)
    stage = elements * ((1 if tactic.rounds else 2) * tile + rows * bits // 8)
    room = min(shared_memory(capability) - _SPARE_BYTES, 200 << 10)
    return replace(tactic, num_stages=max(2, min(tactic.num_stages, room // stage)))


def block_m(tokens: int) -> int:
    """Tokens of a tile of dot."""
    return next((size for size in (16, 32, 64) if tokens <= size), 128)


@dataclass(slots=True)
class Tactics:
    """The tactics that were timed on a GPU, by ``entry_key``.

    ``deterministic`` asks all operators for bits that no other row of the step changes; see
    ``fixed.FixedTactics``.
    """

    deterministic: ClassVar[bool] = False

    capability: tuple[int, int]
    device: str = ""
    entries: dict[str, Tactic] = field(default_factory=dict)

    def find(self, fmt: WeightFormat, gated: bool, tokens: int) -> Tactic:
        """The tactic that was timed for this shape and bucket of tokens, or the default."""
        bucket = next((size for size in BUCKETS if size >= tokens), None)
        found = self.entries.get(entry_key(fmt, gated, bucket)) if bucket else None
        # A key does not say whether x may be rounded.
        if found is not None and found.rounds and multiplies_in(fmt) != "float8":
            found = None
        return found or default_tactic(fmt, gated, tokens, self.capability)

    def to_json(self) -> str:
        """The table as the text of ``tactics.json``, a line an entry."""
        lines = [
            f"  {json.dumps(key)}: {json.dumps(_given(tactic))}"
            for key, tactic in sorted(self.entries.items())
        ]
        head = f'{{"device": {json.dumps(self.device)}, "capability": {[*self.capability]},'
        return f'{head}\n "entries": {{\n' + ",\n".join(lines) + "\n}}\n"

    @classmethod
    def from_json(cls, text: str) -> Tactics:
        """The table in a text; raises EngineMismatchError for anything this version does not
        know."""
        try:
            table = json.loads(text)
            _only(table, {"device", "capability", "entries"})
            major, minor = table["capability"]
            entries = {key: _tactic(entry) for key, entry in table["entries"].items()}
            return cls((int(major), int(minor)), str(table["device"]), entries)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise EngineMismatchError(
                f"tactics.json cannot be used: {error}; build the engine again, with --tune"
            ) from error

    @classmethod
    def load(cls, file: Path | None, capability: tuple[int, int], device: str) -> Tactics:
        """The table that ships for GPUs of this capability, and over it the one in ``file``, if
        that was timed on this very device, or on any if that has no name."""
        table = cls(capability, device)
        shipped = Path(__file__).with_name(f"tactics_sm{capability[0]}{capability[1]}.json")
        if shipped.exists():
            table.entries |= cls.from_json(shipped.read_text()).entries
        if file is not None and file.exists():
            timed = cls.from_json(file.read_text())
            if timed.device == (device or timed.device) and timed.capability == capability:
                table.entries |= timed.entries
            else:
                log.info("tactics.json was timed on %s, this is %s: not used", timed.device, device)
        return table


def _given(tactic: Tactic) -> dict[str, object]:
    """The fields that differ from their defaults."""
    usual = Tactic(tactic.kernel)
    return {
        name: value
        for name, value in asdict(tactic).items()
        if name == "kernel" or value != getattr(usual, name)
    }


def entry_key(fmt: WeightFormat, gated: bool, bucket: int, experts: str = "") -> str:
    """The key of a shape and bucket, such as ``int4g128z 28672x4096 gated 4``; that of experts says
    which part of them a token has: ``bfloat16 1536x2048 gated 8/128 4``."""
    n, k = fmt.shape
    parts = (weight_key(fmt), f"{n}x{k}", "gated" if gated else "", experts, str(bucket))
    return " ".join(filter(None, parts))


def _tactic(entry: dict[str, Any]) -> Tactic:
    _only(entry, {f.name for f in fields(Tactic)})
    tactic = Tactic(**entry)
    if tactic.kernel not in get_args(Kernel):
        raise ValueError(f"no kernel {tactic.kernel!r}; there are {', '.join(get_args(Kernel))}")
    return tactic


def _only(found: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
