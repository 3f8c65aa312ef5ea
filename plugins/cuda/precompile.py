"""Compiles Triton kernels and their launchers in processes of their own, before they are launched.

Compiling holds the interpreter's lock, so threads would take turns. ``record`` finds out which
kernels some work launches, without launching any, also for a GPU that is not there
(``standing_in``); ``compile_kernels`` puts them into Triton's cache on disk, from where the launch
takes them. Run as a module, this file is such a process: it reads its share from stdin.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager, triton_key
from triton.runtime.jit import JITCallable

from slipstream.cores import usable_cores
from slipstream.errors import ExecutionError
from slipstream.interpreter import interpreter

log = logging.getLogger(__name__)
# Options that a launch gives; Triton derives the others from them and from the GPU.
_OPTIONS = (
    "num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid",
    "debug", "instrumentation_mode",
)  # fmt: skip
_WARP = 32
_UNWRITTEN = (torch.empty, torch.empty_like)
_MOST_WORKERS = 16  # each is an interpreter with Triton in it
_recording = False


@dataclass(frozen=True, slots=True)
class Specialization:
    """One compiled form of a kernel, as Triton's own cache tells them apart."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """What Triton compiles."""
        function = getattr(import_module(self.module), self.name)
        settle_key(function)
        kind = _gluon_source() if function.is_gluon() else ASTSource
        return kind(function, self.signature, self.constants, self.attributes)


def settle_key(function: Any) -> None:  # noqa: ANN401
    """Give a kernel its key in Triton's cache, after the functions that it calls.

    Triton counts the constants of those only if it has seen them before the kernel: a key would
    depend on what else a process has compiled, and other processes would not find it.
    """
    _settle(function, set())


def _settle(function: Any, begun: set[int]) -> None:  # noqa: ANN401
    # A name in the code may be an attribute's, even one that is called like the function itself.
    begun.add(id(function))
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if isinstance(called, JITCallable) and called.hash is None and id(called) not in begun:
            _settle(called, begun)
    function.cache_key  # noqa: B018 - computed where it is read first


def _gluon_source() -> type[ASTSource]:
    # Imported late: not every engine has such kernels.
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _StandIn:
    """What Triton asks a driver for before a launch."""

    target: GPUTarget

    def get_current_device(self) -> GPUTarget:
        """The key under which Triton keeps what it compiles in this process."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """For what to compile."""
        return self.target


@contextmanager
def standing_in(capability: tuple[int, int]) -> Iterator[None]:
    """Triton and torch take the machine for one with a GPU of this compute capability, for work
    on tensors without data (device ``meta``) that is recorded."""
    driver, tell = triton.runtime.driver, torch.cuda.get_device_capability
    before = driver._active
    driver.set_active(_StandIn(_target(capability)))
    torch.cuda.get_device_capability = lambda *_: capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = tell
        driver.set_active(before)


def recording() -> bool:
    """Whether what is launched is recorded and does not run: a call like another adds nothing."""
    return _recording


def record(works: Sequence[Callable[[], object]]) -> list[Specialization]:
    """The kernels that ``works`` launch and that this process has not compiled.

    Not even those that it has compiled run: what they read may be the result of one that does not.
    What they would have written is zeros for torch's own kernels, which do run: indices that are in
    range.
    """
    found: dict[str, Specialization] = {}
    noted: list[tuple[dict[str, object], str]] = []
    run = triton.JITFunction.run

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: ANN401
        # Compiled, as far as its next launch in another layer is concerned.
        forms = fn.jit_function.device_caches[compile["device"]][0]
        forms[key] = object()
        noted.append((forms, key))
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

    global _recording
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    triton.JITFunction.run = compile_only
    _recording = True
    try:
        with _Zeros():
            for work in works:
                work()
    finally:
        _recording = False
        triton.JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = before
        for forms, key in noted:
            del forms[key]
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


def prepare() -> None:
    """Do what Triton does before the first kernel of a process: hash all of itself, and compile
    and load what loads kernels. Not for two threads at once."""
    triton_key()
    triton.runtime.driver.active.get_current_target()


def compile_kernels(kernels: Sequence[Specialization], capability: tuple[int, int]) -> None:
    """Compile ``kernels`` for a GPU into Triton's cache, and what launches them, on several cores;
    whatever fails here is left to the launch, which reports it."""
    target = _target(capability)
    there, missing = list[Specialization](), list[Specialization]()
    for kernel in kernels:
        (there if _is_compiled(kernel, target) else missing).append(kernel)
    processes = _start(missing, capability)
    _compile_launchers(there, target)
    for process in processes:
        process.wait()


def compile_in_forks(kernels: Sequence[Specialization], capability: tuple[int, int]) -> None:
    """The same for a process that has neither other threads nor a device, which is forked: nothing
    is imported again, and whoever is done takes the next kernel."""
    workers = min(usable_cores(), len(kernels), _MOST_WORKERS)
    work = partial(_try_to_compile, target=_target(capability))
    if workers < 2:
        for kernel in kernels:
            work(kernel)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        ordered = sorted(kernels, key=_expected_work, reverse=True)
        for _ in pool.imap_unordered(work, ordered):
            pass


def _expected_work(kernel: Specialization) -> int:
    """What takes long to compile comes first, lest all wait for it in the end: code that is
    unrolled over large tiles."""
    sizes = (value for value in kernel.constants.values() if type(value) is int and value > 1)
    return math.prod(sizes)


def compiled_kernels(
    kernels: Sequence[Specialization], capability: tuple[int, int]
) -> Iterator[Any]:
    """Triton's compiled form of each of ``kernels`` that compiles."""
    for kernel in kernels:
        try:
            yield _compiled(kernel, _target(capability))
        except Exception as error:  # noqa: BLE001 - the launch will meet and report it
            log.info("%s does not compile: %s", kernel.name, str(error)[:200])


def _target(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", capability[0] * 10 + capability[1], _WARP)


def _is_compiled(kernel: Specialization, target: GPUTarget) -> bool:
    """Whether Triton will find a kernel when it is launched."""
    backend, source = make_backend(target), kernel.source()
    options = backend.parse_options({**kernel.options, **source.parse_options()})
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"
    return name in (
        get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name) or ()
    )


def _start(
    kernels: Sequence[Specialization], capability: tuple[int, int]
) -> list[subprocess.Popen[bytes]]:
    """Processes that compile a share of ``kernels`` each."""
    processes: list[subprocess.Popen[bytes]] = []
    workers = min(usable_cores(), len(kernels), _MOST_WORKERS)
    for worker in range(workers if workers > 1 else 0):
        with tempfile.TemporaryFile() as share:  # a pipe would hold us up until it is read
            share.write(pickle.dumps((capability, kernels[worker::workers])))
            share.seek(0)
            try:
                command = [interpreter(), "-P", "-m", __name__]
                processes.append(subprocess.Popen(command, stdin=share, stderr=subprocess.DEVNULL))
            except (ExecutionError, OSError):  # no interpreter to start, or no room for one
                break
    return processes


def _compile_launchers(kernels: Sequence[Specialization], target: GPUTarget) -> None:
    """Compile the C that passes arguments, on all cores: a compiler of its own holds no lock."""
    alike = {tuple(kernel.signature.values()): kernel for kernel in kernels}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for kernel in alike.values():
            pool.submit(_compile, kernel, target)


def _compile(kernel: Specialization, target: GPUTarget) -> None:
    compiled = _compiled(kernel, target)
    # What passes the arguments is C, which the first launch would wait for.
    CudaLauncher(compiled.src, compiled.metadata)


def _try_to_compile(kernel: Specialization, target: GPUTarget) -> None:
    with suppress(Exception):  # the launch will meet and report it
        _compile(kernel, target)


def _compiled(kernel: Specialization, target: GPUTarget) -> Any:  # noqa: ANN401
    return triton.compile(kernel.source(), target=target, options=kernel.options)


def main() -> None:
    """Compile the share of the process that started this one."""
    capability, kernels = pickle.load(sys.stdin.buffer)
    for kernel in kernels:
        _try_to_compile(kernel, _target(capability))


if __name__ == "__main__":
    main()
