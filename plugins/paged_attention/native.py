"""The compiled PagedAttention called without a session, for tests and measurements."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins import library
from slipstream.plugins.paged_attention.reference import Attributes, Floats, Inputs

_POINTERS = (
    *("qkv", "cos", "sin", "kv_cache", "kv_scales"),
    *("query_start", "context_len", "page_table", "slot_mapping"),
    *("q_norm", "k_norm", "sinks", "output"),
)
_SIZES = (
    *("tokens", "sequences", "max_pages", "num_pages", "rotary_half", "layer"),
    *("num_heads", "num_kv_heads", "head_dim", "page_size", "sliding_window"),
)
_KV_TYPES = {"float32": 0, "float16": 1, "int8": 2, "float8_e4m3fn": 3}


class _Args(ctypes.Structure):
    """``PagedAttentionArgs`` of ``cpu.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("kv_type", ctypes.c_int32),
        *(
            (name, ctypes.c_float)
            for name in ("scale", "soft_cap", "norm_eps", "k_scale", "v_scale")
        ),
    )


@cache
def _function() -> ctypes._NamedFuncPointer:
    function = library.load().slipstream_paged_attention
    function.argtypes = (ctypes.POINTER(_Args), ctypes.c_char_p, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def _pointer(array: NDArray[np.generic] | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous, f"an array of shape {array.shape} is not contiguous"
    return array.ctypes.data


def arguments(inputs: Inputs, attributes: Attributes, output: Floats) -> ctypes.Structure:
    """The C struct that points into ``inputs`` and ``output``, which must outlive it."""
    values: dict[str, int | float | None] = {
        name: getattr(attributes, name) for name in attributes.__dataclass_fields__
    }
    values |= {name: _pointer(getattr(inputs, name)) for name in inputs.__dataclass_fields__}
    values |= {
        "output": _pointer(output),
        "tokens": inputs.qkv.shape[0],
        "sequences": len(inputs.context_len),
        "max_pages": inputs.page_table.shape[1],
        "num_pages": inputs.kv_cache.shape[1],
        "rotary_half": inputs.cos.shape[1],
        "kv_type": _KV_TYPES[inputs.kv_cache.dtype.name],
    }
    if inputs.kv_cache.dtype.name != "float8_e4m3fn":
        values |= {"k_scale": 1.0, "v_scale": 1.0}
    return _Args(**values)


def paged_attention(inputs: Inputs, attributes: Attributes, isa: str, threads: int = 1) -> Floats:
    """The same as ``reference.paged_attention``, by a compiled kernel on ``threads`` threads.

    All arrays must be C-contiguous, of the spec's dtypes. ``isa`` is one of ``library.isas()``;
    ValueError otherwise.
    """
    width = attributes.num_heads * attributes.head_dim
    output = np.full((inputs.qkv.shape[0], width), np.nan, np.float32)
    args = arguments(inputs, attributes, output)
    if _function()(ctypes.byref(args), isa.encode(), threads) != 0:
        raise ValueError(f"no kernels for {isa!r}; this machine has {', '.join(library.isas())}")
    return output
