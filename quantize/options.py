"""What a quantization can be told, and the schemes it can be asked for.

Defaults live here; the command line and the Python API read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from slipstream.builder.options import OutputFormat
from slipstream.errors import BuildError

if TYPE_CHECKING:
    from slipstream.weights.tensor import Activation, Kind, WeightFormat

QFormat = Literal[
    "int4_awq", "int4_gptq", "int8_gptq", "int4_wo", "int8_wo", "int8_sq", "fp8", "fp8_static",
    "fp8_block", "w4a8_awq", "nvfp4",
]  # fmt: skip
KVDtype = Literal["auto", "fp8", "int8"]
Grouping = Literal["group", "channel", "tensor", "block"]
Algorithm = Literal["rtn", "awq", "gptq", "smoothquant", "modelopt"]

GROUP_SIZES = (32, 64, 128)
WHOLE_ROW = -1
DENSE = "dense"
PATTERN = "re:"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear is quantized, as plain data.

    ``grouping`` says what shares a scale: ``group`` elements of a row, a row, the whole weight, or
    a square block of ``group`` rows. ``group`` is 0 until a plan has chosen it for a linear; a plan
    sets it to K for a row and for the whole weight. ``modelopt`` as the algorithm is NVIDIA's.
    ``float8_inputs`` asks runtimes that can to round the inputs of integer weights to float8.
    """

    name: str
    kind: Kind
    bits: int
    grouping: Grouping
    algorithm: Algorithm
    symmetric: bool = True
    activation: Activation = "none"
    group: int = 0
    scale_dtype: str = "float16"
    float8_inputs: bool = False

    @property
    def rows(self) -> int:
        """Rows that share a scale."""
        return self.group if self.grouping == "block" else 1

    def weight_format(self, shape: tuple[int, ...]) -> WeightFormat:
        """The format of a weight ``[N, K]`` quantized so."""
        # Imported here because the command line shows its help without NumPy.
        from slipstream.weights.tensor import WeightFormat

        assert self.group, f"{self.name} has no group yet; a plan chooses it"
        return WeightFormat(
            shape,
            self.kind,
            self.scale_dtype,
            bits=self.bits,
            group=self.group,
            zero="midpoint" if self.symmetric else "zero",
            rows=self.rows,
            activation=self.activation,
        )

    def describe(self) -> str:
        """``int4_awq, groups of 64, zero points``."""
        sharing = {
            "group": f"groups of {self.group}",
            "channel": "a scale a row",
            "tensor": "one scale",
            "block": f"blocks of {self.rows} x {self.group}",
        }
        zeros = "" if self.symmetric else ", zero points"
        return f"{self.name}, {sharing[self.grouping]}{zeros}"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Size of a weight ``[N, K]`` quantized so: codes, scales and zero points."""
        n, k = shape
        groups = -(-n // self.rows) * -(-k // self.group)
        zeros = 0 if self.symmetric else groups * self.bits
        return (n * k * self.bits + groups * _DTYPE_BITS[self.scale_dtype] + zeros + 7) // 8


_DTYPE_BITS = {"float8_e4m3fn": 8, "float16": 16, "bfloat16": 16, "float32": 32}


def _schemes(*schemes: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({scheme.name: scheme for scheme in schemes})


_FP8: dict[str, Any] = {"kind": "float8_e4m3", "bits": 8, "scale_dtype": "float32"}
SCHEMES: Mapping[str, Scheme] = _schemes(
    Scheme("int4_awq", "int", 4, "group", "awq"),
    Scheme("int4_gptq", "int", 4, "group", "gptq"),
    Scheme("int8_gptq", "int", 8, "group", "gptq"),
    Scheme("int4_wo", "int", 4, "group", "rtn"),
    Scheme("int8_wo", "int", 8, "group", "rtn"),
    Scheme(
        "int8_sq", "int", 8, "channel", "smoothquant", activation="token", scale_dtype="float32"
    ),
    Scheme("fp8", grouping="channel", algorithm="rtn", activation="token", **_FP8),
    Scheme("fp8_static", grouping="tensor", algorithm="modelopt", activation="static", **_FP8),
    Scheme("fp8_block", grouping="block", algorithm="rtn", activation="group", **_FP8),
    Scheme("w4a8_awq", "int", 4, "group", "modelopt", float8_inputs=True),
    Scheme("nvfp4", "float4_e2m1", 4, "group", "modelopt", group=16, scale_dtype="float8_e4m3fn"),
)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize a checkpoint.

    qformat               of every linear of the decoder that no override or exclude names
    kv_cache_dtype        what the checkpoint asks of a runtime's KV cache: fp8 with calibrated
                          scales, int8 (which needs none), or auto: nothing
    group_size            elements along K that share a scale, and the side of fp8_block's blocks;
                          None: the largest of 128, 64 and 32 that divides every linear, one size
                          for the whole model, which is what most loaders expect; -1: the whole row
    symmetric             no zero points, which transformers does not load packed
    calib_dataset         a .txt or .jsonl file, ``self`` for text that the model writes, None for
                          the text that comes with this package
    calib_size            windows of calibration text
    calib_max_seq_length  tokens a window
    eval_dataset          a .txt or .jsonl file to measure the result on; None for the text that
                          comes with this package
    overrides             ``TARGET=QFORMAT``, the last that matches wins; a target is the name of a
                          linear or ``re:`` and a pattern that its name must match in full; the
                          QFORMAT ``dense`` leaves it as it is
    exclude               targets that stay dense
    auto_bits             mean bits a weight that linears may take, codes, scales and zeros
                          counted; which get 4 and which 8 bits follows from measured errors
    max_ppl_increase      percent by which perplexity may rise before the result is thrown away
    format                how the result is stored
    """

    qformat: QFormat = "int4_awq"
    kv_cache_dtype: KVDtype = "auto"
    group_size: int | None = None
    symmetric: bool = True
    calib_dataset: str | None = None
    calib_size: int = 32
    calib_max_seq_length: int = 512
    eval_dataset: str | None = None
    overrides: Sequence[str] = ()
    exclude: Sequence[str] = ()
    auto_bits: float | None = None
    max_ppl_increase: float | None = None
    seed: int = 0
    format: OutputFormat = "compressed-tensors"

    def __post_init__(self) -> None:
        """Check every value; BuildError says what was given and what is allowed."""
        _choice("qformat", self.qformat, tuple(SCHEMES))
        _choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVDtype))
        _choice("format", self.format, get_args(OutputFormat))
        if self.group_size is not None:
            _choice("group_size", self.group_size, (*GROUP_SIZES, WHOLE_ROW))
        for name, least in (("calib_size", 1), ("calib_max_seq_length", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise BuildError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_ppl_increase is not None and not self.max_ppl_increase >= 0:
            raise BuildError(
                f"max_ppl_increase is {self.max_ppl_increase}; it is a percentage of at least 0"
            )
        self._check_auto_bits()
        for target in self.exclude:
            Target.parse(target)
        qformats = [self.qformat, *(parse_override(override)[1] for override in self.overrides)]
        if self.group_size == WHOLE_ROW and "fp8_block" in qformats:
            raise BuildError(
                "group_size is -1, a scale for a whole row, and fp8_block has one for a square; "
                f"use {_listed(GROUP_SIZES)}, or fp8 for a scale a row"
            )

    def _check_auto_bits(self) -> None:
        if self.auto_bits is None:
            return
        if not 4 <= self.auto_bits <= 9:
            raise BuildError(f"auto_bits is {self.auto_bits}; it must be between 4 and 9")
        if SCHEMES[self.qformat].bits != 4 or SCHEMES[self.qformat].algorithm == "modelopt":
            raise BuildError(
                f"auto_bits chooses which linears of a 4-bit format get 8 bits, and qformat is "
                f"{self.qformat}; use int4_awq, int4_gptq or int4_wo"
            )

    def scheme(self, qformat: str) -> Scheme:
        """A scheme with what these options change of it; the group is a plan's to choose."""
        scheme = SCHEMES[qformat]
        if scheme.grouping != "group" or scheme.algorithm == "modelopt":
            return scheme
        return replace(scheme, symmetric=self.symmetric)


@dataclass(frozen=True, slots=True)
class Target:
    """Linears by name, or by a pattern that the whole name must match."""

    text: str
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> Target:
        """``model.layers.0.mlp.down_proj`` or ``re:.*down_proj``; BuildError for a bad pattern."""
        pattern = text.removeprefix(PATTERN)
        try:
            if not pattern:
                raise re.error("it is empty")
            return cls(text, re.compile(re.escape(text) if pattern == text else pattern))
        except re.error as error:
            raise BuildError(
                f"the target {text!r} cannot be read ({error}); write a linear's name such as "
                "model.layers.0.mlp.down_proj, or a pattern such as 're:.*down_proj'"
            ) from error

    def matches(self, module: str) -> bool:
        """Whether a linear of this name is meant."""
        return self.pattern.fullmatch(module) is not None


def parse_override(text: str) -> tuple[Target, str]:
    """``TARGET=QFORMAT`` in its parts; BuildError when it is none."""
    target, equals, qformat = text.rpartition("=")
    if not equals or qformat not in (*SCHEMES, DENSE):
        raise BuildError(
            f"the override {text!r} cannot be read; write TARGET=QFORMAT, for example "
            f"'re:.*down_proj=int8_wo', where QFORMAT is one of {', '.join((*SCHEMES, DENSE))}"
        )
    return Target.parse(target), qformat


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise BuildError(f"{name} is {value!r}; it must be one of {_listed(allowed)}")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
