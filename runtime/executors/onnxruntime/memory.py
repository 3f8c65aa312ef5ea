"""Memory of the device that a session runs on, by address: a NumPy array on a CPU, memory of the
provider on a GPU, whose copies are those of the CUDA runtime that the provider has loaded."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slipstream.builder.contract import ITEM_BYTES
from slipstream.errors import ExecutionError
from slipstream.runtime.executors.page_memory import free_bytes

# How ONNX numbers the types of elements.
ONNX_TYPES = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
_ANY_DIRECTION = 4  # cudaMemcpyDefault


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array of a device: where it starts, its dtype and shape, and what keeps it alive."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    owner: object

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


class Memory(Protocol):
    """Where the arrays of a session's steps lie."""

    @property
    def device(self) -> str:
        """As ONNX Runtime names it for bindings: ``cpu`` or ``cuda``."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """A new array; MemoryError, or what ONNX Runtime raises, if it cannot be had."""
        ...

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """Put ``values`` at the start of an array of their type."""
        ...

    def read(self, buffer: Buffer, rows: int) -> NDArray[Any]:
        """The first ``rows`` of an array of a type that NumPy has, until the next step writes
        them."""
        ...

    def copy_row(self, buffer: Buffer, source: int, destination: int) -> None:
        """Copy one index of the first axis over another."""
        ...

    def settle(self) -> None:
        """Wait until all that was written and copied is there for a session to read."""
        ...

    def free_bytes(self) -> int:
        """What can still be had."""
        ...


class HostMemory:
    """A CPU's memory, which costs nothing before it is first written."""

    device = "cpu"

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Bytes that NumPy maps."""
        shape = tuple(shape)
        owner = np.zeros(math.prod(shape) * ITEM_BYTES[dtype], np.uint8)
        return Buffer(owner.ctypes.data, dtype, shape, owner)

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """A copy."""
        view(buffer)[: values.size] = values.reshape(-1)

    def read(self, buffer: Buffer, rows: int) -> NDArray[Any]:
        """A view."""
        return view(buffer).reshape(buffer.shape)[:rows]

    def copy_row(self, buffer: Buffer, source: int, destination: int) -> None:
        """Bytes, whatever their type."""
        owner = buffer.owner
        assert isinstance(owner, np.ndarray)
        rows = owner.reshape(buffer.shape[0], buffer.row_bytes)
        rows[destination] = rows[source]

    def settle(self) -> None:
        """Nothing: copies are done when they return."""

    def free_bytes(self) -> int:
        """What the system counts as available."""
        return free_bytes()


class CUDAMemory:
    """A GPU's memory, copied on the stream that has no name. Steps end before their session
    returns, so reading waits for nothing; a session's own stream does not wait for that one, so
    what was written has to ``settle``."""

    device = "cuda"

    def __init__(self) -> None:
        self._cuda = _loaded_runtime()

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """From the provider's allocator."""
        shape = tuple(shape)
        owner = ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[dtype], "cuda", 0)
        buffer = Buffer(owner.data_ptr(), dtype, shape, owner)
        size = ctypes.c_size_t(shape[0] * buffer.row_bytes)
        self._done("cudaMemset", ctypes.c_void_p(buffer.address), 0, size)
        return buffer

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """A copy from the host."""
        values = np.ascontiguousarray(values)
        self._copy(buffer.address, values.ctypes.data, values.nbytes)

    def read(self, buffer: Buffer, rows: int) -> NDArray[Any]:
        """A copy on the host."""
        values = np.empty((rows, *buffer.shape[1:]), buffer.dtype)
        self._copy(values.ctypes.data, buffer.address, values.nbytes)
        return values

    def copy_row(self, buffer: Buffer, source: int, destination: int) -> None:
        """A copy on the device."""
        size = buffer.row_bytes
        self._copy(buffer.address + destination * size, buffer.address + source * size, size)

    def settle(self) -> None:
        """The driver may still be copying after a call for a copy returned."""
        self._done("cudaStreamSynchronize", ctypes.c_void_p())

    def free_bytes(self) -> int:
        """As the driver counts it."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._done("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def _copy(self, destination: int, source: int, size: int) -> None:
        places = ctypes.c_void_p(destination), ctypes.c_void_p(source)
        self._done("cudaMemcpy", *places, ctypes.c_size_t(size), _ANY_DIRECTION)

    def _done(self, name: str, *arguments: object) -> None:
        """Call a function of the runtime; ExecutionError if it fails."""
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise ExecutionError(f"{name} failed with error {status} of the CUDA runtime")


def view(buffer: Buffer) -> NDArray[Any]:
    """The elements of an array of the host, flat."""
    owner = buffer.owner
    assert isinstance(owner, np.ndarray)
    return owner.view(buffer.dtype)


def _loaded_runtime() -> ctypes.CDLL:
    """The CUDA runtime of this process; ExecutionError if the provider has loaded none."""
    for name in _RUNTIMES:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
    raise ExecutionError(
        f"onnxruntime's CUDA provider has loaded none of {', '.join(_RUNTIMES)}; install a release "
        "of onnxruntime-gpu for CUDA 12 or 13"
    )
