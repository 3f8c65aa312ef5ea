"""Triton's interpreter with its defects mended: as it comes, it truncates bfloat16, loses a carry
in float8, multiplies the bits of bfloat16 matrices, cannot count to a tensor in NumPy 2.4, and
looks through all its names at every call of every function of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from slipstream.plugins.cuda.launch import interpreting


class _Sums:
    """Of products of matrices: the type in which they are added up."""

    type: type[np.floating[Any]] = np.float32


@contextmanager
def sums_in_float64() -> Iterator[None]:
    """Products have the same bits wherever a row stands in a matrix, as on a GPU: in what order
    the host's library adds up float32 depends on that."""
    _Sums.type = np.float64
    try:
        yield
    finally:
        _Sums.type = np.float32


@cache
def repair() -> None:
    """Corrects the interpreter, once; does nothing where kernels are compiled."""
    if not interpreting():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: np.dtype(np.float32),
        tl.float16: np.dtype(np.float16),
        tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
        tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    }

    def floats(data: Any, dtype: Any) -> Any:  # noqa: ANN401 - the interpreter is untyped
        return np.ascontiguousarray(data).view(types[dtype]).reshape(data.shape)

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:  # noqa: ANN401
        return floats(data, source).astype(types[target]).view(f"u{types[target].itemsize}")

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:  # noqa: ANN401
        x, y = (floats(t.data, t.dtype.scalar).astype(np.float32) for t in (a, b))
        sums = x @ y if _Sums.type == np.float32 else x.astype(_Sums.type) @ y.astype(_Sums.type)
        return interpreter.TensorHandle(sums.astype(np.float32) + d.data, d.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:  # noqa: ANN401
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @cache
    def patch_language_for_good(function: Any) -> Any:  # noqa: ANN401
        patch_language(function)
        return interpreter._LangPatchScope()  # of which nothing is to be restored

    patch, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_language_for_good
    # Half of the time: whether integers overflow is computed, and told only to who debugs.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
