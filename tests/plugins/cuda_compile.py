"""Compiles every kernel that a host function launches, for GPUs that are not there.

Run as a program, without Triton's interpreter: it calls the functions of ``CALLS`` on CPU tensors
of real sizes with launching replaced by compiling, and prints a line for every kernel.

    python tests/plugins/cuda_compile.py 80 90
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


class Compiler:
    """Stands in for ``JITFunction.run``: compiles for some architectures and launches nothing."""

    def __init__(self, architectures: list[int]) -> None:
        self.architectures = architectures
        self.done: set[tuple[object, ...]] = set()

    def __call__(self, fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ANN401
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        names = [parameter.name for parameter in fn.params]
        values = dict(zip(names, args, strict=False)) | kwargs
        constant = {p.name for p in fn.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values.get(name, _default(fn, name))
            kind = "constexpr" if name in constant or value is None else _type(value)
            signature[name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = (fn.__name__, *signature.values(), *constants.values(), *options.values())
        if key in self.done:
            return
        self.done.add(key)
        for architecture in self.architectures:
            if architecture < 89 and "*fp8e4nv" in signature.values():
                continue  # such engines ask for sm_89
            if options.get("launch_pdl") and architecture < 90:
                continue
            source = ASTSource(fn, signature, constants, attributes)
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target=target, options=options)
            shared = compiled.metadata.shared
            print(f"{fn.__name__} sm_{architecture} {shared} bytes of shared memory {options}")


def _default(fn: Any, name: str) -> Any:  # noqa: ANN401
    return next(p.default for p in fn.params if p.name == name)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    architectures = [int(argument) for argument in sys.argv[1:]]
    compiler = Compiler(architectures)
    JITFunction.run = lambda self, *args, **kwargs: compiler(self, *args, **kwargs)  # type: ignore[method-assign]
    pdl = [False, True] if max(architectures) >= 90 else [False]
    for call in CALLS:
        for each in pdl:
            call(each)


CALLS: list[Callable[[bool], object]] = []

if __name__ == "__main__":
    main()
