"""Weight formats in words, for build logs and manifests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from slipstream.weights.tensor import WeightFormat

_ZEROS = {"midpoint": "", "zero": ", zero points", "offset": ", offsets"}
_KINDS = {"float8_e4m3": "float8_e4m3", "float4_e2m1": "float4_e2m1", "codebook": "codebook of 16"}
_ACTIVATIONS = {
    "none": "",
    "token": ", activations rounded by token",
    "static": ", activations rounded by a fixed scale",
    "group": ", activations rounded by token and group",
    "block": ", activations rounded in blocks of 32",
}


def describe_format(fmt: WeightFormat) -> str:
    """What a weight holds: ``int4, groups of 128, zero points``; its shape is left out."""
    if fmt.kind == "dense":
        return fmt.dtype
    name = f"int{fmt.bits}" if fmt.kind == "int" else _KINDS[fmt.kind]
    zero = _ZEROS[fmt.zero] if fmt.kind == "int" else ""
    return f"{name}, {_scales(fmt)}{zero}{_ACTIVATIONS[fmt.activation]}"


def count_formats(formats: Iterable[WeightFormat]) -> dict[str, int]:
    """How many matrices there are of each format, most frequent first."""
    counts = Counter(describe_format(fmt) for fmt in formats if len(fmt.shape) == 2)
    return dict(counts.most_common())


def _scales(fmt: WeightFormat) -> str:
    if fmt.group >= fmt.shape[1] and fmt.rows == 1:
        return "a scale a row"
    return f"blocks of {fmt.rows}x{fmt.group}" if fmt.rows > 1 else f"groups of {fmt.group}"
