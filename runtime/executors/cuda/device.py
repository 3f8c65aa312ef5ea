"""The GPU as the executor sees it: streams, events, graphs and pinned memory.

Where Triton interprets its kernels (``TRITON_INTERPRET=1``, for tests without a GPU) everything
happens at once on the CPU and a captured graph is the function itself.
"""

from __future__ import annotations

import math
import mmap
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.builder.engine import RANKS, Manifest
from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.phases import phase
from slipstream.plugins.cuda.kernel_store import offer, read_kernels
from slipstream.plugins.cuda.launch import capability_of, has_pdl, interpreting
from slipstream.plugins.cuda.precompile import (
    Specialization,
    compile_kernels,
    prepare,
    record,
)
from slipstream.plugins.cuda.remembered import are_compiled, mark_of, remember

Work = Callable[[], None]


def both(first: Work, second: Work) -> Work:
    """One after the other."""

    def work() -> None:
        first()
        second()

    return work


_LITTLE_MEMORY = 1 << 30  # bytes
_GLANCE = 1e-5  # seconds between two looks at a device that is watched


class Event:
    """A point in the device's work that the host can wait for; one that is ``timed`` can be asked
    when it was."""

    def __init__(self, device: Device, *, timed: bool = False) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed) if device.is_cuda else None
        self._time = 0.0

    def record(self) -> None:
        """Put the point behind everything enqueued so far."""
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Let the host wait until the device is there; raises what whoever watches it does."""
        if self._event is None:
            return
        if not self._device.until(self._event.query):
            self._event.synchronize()

    def is_over(self) -> bool:
        """Whether the device is there."""
        return self._event is None or bool(self._event.query())

    def seconds_since(self, other: Event) -> float:
        """How long after another it was; both are timed, and over."""
        if self._event is None or other._event is None:
            return self._time - other._time
        return float(other._event.elapsed_time(self._event)) / 1e3


class CopyStream:
    """A second stream of a device, for copies beside its work."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device.is_cuda else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enqueue what is done inside here."""
        with torch.no_grad(), torch.cuda.stream(self._stream):  # None changes nothing
            yield

    def wait_for_work(self) -> None:
        """Let what is enqueued here from now on wait for all work so far."""
        if self._stream is not None:
            self._stream.wait_stream(self._device.stream)

    def let_work_wait(self) -> None:
        """Let work that is enqueued from now on wait for all that was enqueued here."""
        if self._stream is not None:
            self._device.stream.wait_stream(self._stream)


class Device:
    """One GPU, one stream of work, and one pool of memory for all captured graphs.

    Graphs may share the pool because they never run at the same time. One that is only ``planned``,
    of this compute capability, need not be there: its tensors hold nothing and nothing runs, for
    kernels that are compiled before there is a GPU. Of several, ``index`` says which it is.

    ``watch`` is called again and again while the host waits for the device, and raises why that is
    in vain: a kernel that waits for another rank's waits for ever where there is none.
    """

    def __init__(self, planned: tuple[int, int] | None = None, index: int = 0) -> None:
        self.is_planned = planned is not None
        self.is_cuda = not self.is_planned and not interpreting()
        self._index = index
        self.watch: Callable[[], None] | None = None
        self.use()
        here = torch.device("cuda", index) if self.is_cuda else torch.device("cpu")
        self.torch = torch.device("meta") if self.is_planned else here
        self.capability = planned or capability_of(self.torch)
        self.has_pdl = has_pdl(self.torch)
        self._stream = torch.cuda.Stream() if self.is_cuda else None
        self._pool = torch.cuda.graph_pool_handle() if self.is_cuda else None
        self.captures = 0  # so far

    @property
    def name(self) -> str:
        """As the driver calls it; nothing for one that is only planned."""
        if self.is_planned:
            return ""
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else "Triton interpreter"

    def use(self) -> None:
        """Have this thread mean this GPU where it names none."""
        if self.is_cuda and self._index:  # the first is meant anyway
            torch.cuda.set_device(self._index)

    def until(self, is_over: Callable[[], bool]) -> bool:
        """Wait for the device while somebody watches; False where nobody does."""
        if self.watch is None:
            return False
        while not is_over():
            self.watch()
            time.sleep(_GLANCE)
        self.watch()  # where that is in vain, what waited is let go, and has made nothing
        return True

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enqueue what is done inside on the executor's stream."""
        with torch.no_grad():
            if self._stream is None:
                yield
            else:
                with torch.cuda.stream(self._stream):
                    yield

    def prepare(self, kernels: Path) -> None:
        """Get ready to compile, or to take what a file of kernels has; while other threads work."""
        if self.is_cuda:
            offer(read_kernels(kernels))
            prepare()

    def compile(
        self,
        works: Callable[[], Sequence[Work]],
        engine: str | None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Compile every kernel that ``works`` launch, on all cores, once ``ready`` returns; nothing
        is launched.

        They are not even looked at where this machine has compiled those of ``engine`` before, a
        name that tells all apart that launch other kernels.
        """
        if not self.is_cuda:
            return
        mark = None if engine is None else mark_of(engine, self.name)
        known = mark is not None and are_compiled(mark)
        kernels: list[Specialization] = []
        if not known:
            with self.work(), phase("finding the kernels"):
                kernels = record(works())
            self.synchronize()
        if ready is not None:
            ready()
        compile_kernels(kernels, self.capability)
        if mark is not None and not known:
            remember(mark, kernels)

    def capture(self, work: Work) -> Work:
        """``work``, run once to compile its kernels and then captured: calling it replays it."""
        with self.work():
            work()
        self.captures += 1
        if not self.is_cuda:
            return work
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Memory that torch keeps for reuse is no use to a capture, and cannot be given back in one.
        # Given back before each, as ``torch.cuda.graph`` does it, it is taken again after each.
        if torch.cuda.mem_get_info(self.torch)[0] < _LITTLE_MEMORY:
            torch.cuda.empty_cache()
        with self.work():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def seconds(self, work: Work, times: int) -> float:
        """How long some work takes, on average of so many times."""
        with self.work():
            work()
            self.synchronize()
            began = time.perf_counter()
            for _ in range(times):
                work()
        self.synchronize()
        return (time.perf_counter() - began) / times

    def peak(self, work: Work) -> int:
        """Bytes that some work takes of a GPU while it runs."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with self.work():
            work()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        if self._stream is not None and not self.until(self._stream.query):
            self._stream.synchronize()

    def comes_to_rest(self, seconds: float) -> bool:
        """Whether everything that was enqueued is done within so many seconds."""
        ends = time.monotonic() + seconds
        while self._stream is not None and not self._stream.query():
            if time.monotonic() > ends:
                return False
            time.sleep(_GLANCE)
        return True

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from and to by itself."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.is_cuda)

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where all work is enqueued; of a GPU."""
        assert self._stream is not None
        return self._stream

    def locked(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Much of the host's memory, in bytes, pinned until ``unlock``; CapacityError if there is
        not so much. What ``pinned`` gives is rounded up to a power of two. Whole pages of its own:
        no page may be pinned twice."""
        try:
            pages = mmap.mmap(-1, math.prod(shape))
        except (OSError, OverflowError, ValueError) as error:
            raise _no_host_memory(shape, str(error)) from error
        memory = torch.frombuffer(pages, dtype=torch.uint8).view(shape)
        if self.is_cuda:
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if status != runtime.cudaError.success:
                raise _no_host_memory(shape, f"cudaHostRegister: {status}")
        return memory

    def unlock(self, memory: torch.Tensor) -> None:
        """Undo ``locked``."""
        if self.is_cuda:
            runtime = torch.cuda.cudart()
            runtime.cudaHostUnregister(memory.data_ptr())

    def index(self, rows: NDArray[np.int32]) -> torch.Tensor:
        """Numbers of rows on the device, int64."""
        wide = torch.from_numpy(rows.astype(np.int64))
        return (wide.pin_memory() if self.is_cuda else wide).to(self.torch, non_blocking=True)

    def free_memory(self) -> int:
        """Bytes that can still be allocated, those that torch keeps for reuse included."""
        if not self.is_cuda:
            return 1 << 30
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.torch)
        return int(free)


def _no_host_memory(shape: tuple[int, ...], reason: str) -> CapacityError:
    size = math.prod(shape)
    return CapacityError(
        f"{size} bytes of pinned memory for pages cannot be had ({reason}): lower --kv-offload-gib"
    )


def require(manifest: Manifest) -> None:
    """Raise EngineMismatchError unless there are GPUs that can run an engine, one a rank."""
    if interpreting():
        return
    if not torch.cuda.is_available():
        again = shlex.join(["slipstream", "build", manifest.source, "-o", "ENGINE"])
        raise EngineMismatchError(
            f"the engine is for an NVIDIA GPU, and torch {torch.__version__} {_why_no_gpu()}; or "
            f"build one for a CPU: {again} --target cpu"
        )
    if 1 < manifest.ranks > (count := torch.cuda.device_count()):
        raise EngineMismatchError(
            f"the engine has {manifest.ranks} ranks, each of which takes a GPU, and torch sees"
            f" {count}; build it again with --tp-size {_largest(count)}, or see whether"
            " CUDA_VISIBLE_DEVICES hides some"
        )
    major, minor = torch.cuda.get_device_capability(0)
    if major * 10 + minor < int(manifest.capability.removeprefix("sm_")):
        raise EngineMismatchError(
            f"the engine needs a GPU of {manifest.capability} or newer and this one "
            f"({torch.cuda.get_device_name(0)}) is sm_{major}{minor}; build it again "
            f"without the fp8 in: {manifest.command}"
        )


def _largest(count: int) -> int:
    """The most ranks that so many GPUs run."""
    return max((ranks for ranks in RANKS if ranks <= count), default=1)


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "was built without CUDA: install torch from https://pytorch.org with CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        return f"cannot use one ({reason}): update the driver for CUDA {torch.version.cuda}"
    return "finds none: check nvidia-smi"
