"""Copies an engine's weight file to the GPU at the speed of the bus."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.executors.cuda.device import Device
from slipstream.weights.json import Origin
from slipstream.weights.safetensors import StoredTensor, read_header

_CHUNK = 16 << 20
_READERS = 8
_ALIGNMENT = 64  # of the file
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes that lie together in the file and on the device."""

    begin: int
    size: int
    place: int


def load_weights(
    file: Path, device: Device, names: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, or those of these ``names``, as views of one allocation
    on the device.

    Raises CapacityError when the device has no room for it, EngineMismatchError for a damaged file.
    """
    again = Origin(file, "build the engine again", EngineMismatchError)
    tensors = [t for t in read_header(file, again).values() if names is None or t.name in names]
    runs = list(_runs(sorted(tensors, key=lambda tensor: tensor.offset)))
    size = max((run.place + run.size for run in runs), default=0)
    free = device.free_memory()
    if size > free:
        raise CapacityError(
            f"the weights take {size >> 20} MiB and the GPU has {free >> 20} MiB free; stop what "
            "else uses it, or quantize: --quantization int4_wo"
        )
    data = torch.empty(size, dtype=torch.uint8, device=device.torch)
    _copy(file, runs, data, device)
    places = {tensor.name: _place(runs, tensor.offset) for tensor in tensors}
    return {
        tensor.name: data[places[tensor.name] : places[tensor.name] + tensor.size]
        .view(_DTYPES[tensor.dtype])
        .reshape(tensor.shape)
        for tensor in tensors
    }


def _runs(tensors: Sequence[StoredTensor]) -> Iterator[_Run]:
    """Tensors in the order of the file, those without a gap together, as aligned as they are
    there."""
    begin = end = tensors[0].offset if tensors else 0
    place = 0
    for tensor in tensors:
        if tensor.offset != end:
            yield _Run(begin, end - begin, place)
            place += -(-(end - begin + _ALIGNMENT) // _ALIGNMENT) * _ALIGNMENT
            place += (tensor.offset - begin) % _ALIGNMENT
            begin = tensor.offset
        end = tensor.offset + tensor.size
    if tensors:
        yield _Run(begin, end - begin, place)


def _place(runs: Sequence[_Run], offset: int) -> int:
    run = runs[bisect_right(runs, offset, key=lambda run: run.begin) - 1]
    return run.place + offset - run.begin


def _copy(file: Path, runs: Sequence[_Run], data: torch.Tensor, device: Device) -> None:
    """Readers fill pinned buffers from the page cache while the device copies from others."""
    chunks = [
        _Run(run.begin + at, min(_CHUNK, run.size - at), run.place + at)
        for run in runs
        for at in range(0, run.size, _CHUNK)
    ]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_READERS, initializer=device.use) as pool:
            shares = [chunks[reader::_READERS] for reader in range(_READERS)]
            for done in [pool.submit(_read, descriptor, data, s, device) for s in shares]:
                done.result()
    finally:
        os.close(descriptor)


def _read(descriptor: int, data: torch.Tensor, chunks: Iterable[_Run], device: Device) -> None:
    buffer = device.pinned((min(_CHUNK, max(data.numel(), 1)),), torch.uint8)
    view = buffer.numpy().data
    for chunk in chunks:
        part, done = view[: chunk.size], 0
        while done < len(part):
            done += os.preadv(descriptor, [part[done:]], chunk.begin + done)
        data[chunk.place : chunk.place + chunk.size].copy_(buffer[: chunk.size])
