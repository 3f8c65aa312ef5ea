"""Compiles Triton kernels and their launchers in processes of their own, before they are launched.

Compiling holds the interpreter's lock, so threads would take turns. ``record`` finds out which
kernels some work launches, without launching any; ``compile_kernels`` puts them into Triton's
cache on disk, from where the launch takes them. Run as a module, this file is such a process: it
reads its share from stdin.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from slipstream.cores import usable_cores

# Options that a launch gives; Triton derives the others from them and from the GPU.
_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg", "debug", "instrumentation_mode")
_WARP = 32
_UNWRITTEN = (torch.empty, torch.empty_like)
_MOST_WORKERS = 16  # each is an interpreter with Triton in it


@dataclass(frozen=True, slots=True)
class Specialization:
    """One compiled form of a kernel, as Triton's own cache tells them apart."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def record(works: Sequence[Callable[[], object]]) -> list[Specialization]:
    """The kernels that ``works`` launch and that this process has not compiled.

    Not even those that it has compiled run: what they read may be the result of one that does not.
    What they would have written is zeros for torch's own kernels, which do run: indices that are in
    range.
    """
    found: dict[str, Specialization] = {}
    run = triton.JITFunction.run

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: ANN401
        options = json.loads(compile["specialization_data"])["options"]
        found[f"{fn.module}.{fn.name} {key}"] = Specialization(
            fn.module,
            fn.name,
            dict(compile["signature"]),
            dict(compile["constants"]),
            dict(compile["configs"][0]),
            {name: options[name] for name in _OPTIONS if name in options},
        )
        return True  # neither compile nor launch

    def compile_only(kernel: Any, *args: Any, **options: Any) -> object:  # noqa: ANN401
        return run(kernel, *args, **{**options, "warmup": True})

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    triton.JITFunction.run = compile_only
    try:
        with _Zeros():
            for work in works:
                work()
    finally:
        triton.JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = before
    return list(found.values())


class _Zeros(TorchFunctionMode):
    """Memory that nothing has written yet holds zeros."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what it returns
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in _UNWRITTEN else made


def compile_kernels(kernels: Sequence[Specialization], capability: tuple[int, int]) -> None:
    """Compile ``kernels`` for a GPU into Triton's cache, on several cores; whatever fails here is
    left to the launch, which reports it."""
    workers = min(usable_cores(), len(kernels), _MOST_WORKERS)
    if workers < 2:
        return
    architecture = capability[0] * 10 + capability[1]
    processes = []
    for worker in range(workers):
        with tempfile.TemporaryFile() as share:  # a pipe would hold us up until it is read
            share.write(pickle.dumps((architecture, kernels[worker::workers])))
            share.seek(0)
            try:
                command = [sys.executable, "-m", __name__]
                processes.append(subprocess.Popen(command, stdin=share, stderr=subprocess.DEVNULL))
            except OSError:  # no interpreter to start, or no room for one
                break
    for process in processes:
        process.wait()


def _compile(kernel: Specialization, architecture: int) -> None:
    function = getattr(import_module(kernel.module), kernel.name)
    language = GluonASTSource if function.is_gluon() else ASTSource
    source = language(function, kernel.signature, kernel.constants, kernel.attributes)
    target = GPUTarget("cuda", architecture, _WARP)
    compiled = triton.compile(source, target=target, options=kernel.options)
    # What passes the arguments is C, which the first launch would wait for.
    CudaLauncher(source, compiled.metadata)


def main() -> None:
    """Compile the share of the process that started this one."""
    architecture, kernels = pickle.load(sys.stdin.buffer)
    for kernel in kernels:
        try:
            _compile(kernel, architecture)
        except Exception:  # noqa: BLE001 - the launch will meet and report it
            continue


if __name__ == "__main__":
    main()
