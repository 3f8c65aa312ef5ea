"""Copies an engine's weight file to the GPU at the speed of the bus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.executors.cuda.device import Device
from slipstream.weights.json import Origin
from slipstream.weights.safetensors import read_header

_CHUNK = 16 << 20
_READERS = 8
_DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def load_weights(file: Path, device: Device) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, as views of one allocation on the device.

    Raises CapacityError when the device has no room for it, EngineMismatchError for a damaged file.
    """
    again = Origin(file, "build the engine again", EngineMismatchError)
    tensors = read_header(file, again).values()
    start = min((tensor.offset for tensor in tensors), default=0)
    size = max((tensor.offset + tensor.size for tensor in tensors), default=0) - start
    free = device.free_memory()
    if size > free:
        raise CapacityError(
            f"the weights take {size >> 20} MiB and the GPU has {free >> 20} MiB free; stop what "
            "else uses it, or quantize: --quantization int4_wo"
        )
    data = torch.empty(size, dtype=torch.uint8, device=device.torch)
    _copy(file, start, data, device)
    return {
        tensor.name: data[tensor.offset - start : tensor.offset - start + tensor.size]
        .view(_DTYPES[tensor.dtype])
        .reshape(tensor.shape)
        for tensor in tensors
    }


def _copy(file: Path, start: int, data: torch.Tensor, device: Device) -> None:
    """Readers fill pinned buffers from the page cache while the device copies from others."""
    size = data.numel()
    chunks = range(0, size, _CHUNK)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            shares = [chunks[reader::_READERS] for reader in range(_READERS)]
            for done in [pool.submit(_read, descriptor, start, data, s, device) for s in shares]:
                done.result()
    finally:
        os.close(descriptor)


def _read(
    descriptor: int, start: int, data: torch.Tensor, chunks: Iterable[int], device: Device
) -> None:
    buffer = device.pinned((min(_CHUNK, max(data.numel(), 1)),), torch.uint8)
    view = buffer.numpy().data
    for begin in chunks:
        end = min(begin + _CHUNK, data.numel())
        part = view[: end - begin]
        done = 0
        while done < len(part):
            done += os.preadv(descriptor, [part[done:]], start + begin + done)
        data[begin:end].copy_(buffer[: end - begin])
