"""How Triton kernels are launched."""

from __future__ import annotations

import os
from functools import cache

import torch

# Steps of more tokens launch their kernels one after the other: each fills the GPU by itself.
PDL_TOKENS = 64


def launch_options(*, num_warps: int, num_stages: int = 1, pdl: bool = False) -> dict[str, object]:
    """Keyword arguments of a kernel launch.

    ``pdl`` asks for programmatic dependent launch: the kernel may begin while the one before it
    still runs, and must call ``gdc_wait`` before it reads what that one wrote.
    """
    options: dict[str, object] = {"num_warps": num_warps, "num_stages": num_stages}
    if pdl:  # the interpreter does not know the option
        options["launch_pdl"] = True
    return options


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; in the interpreter that of a Hopper."""
    if interpreting():
        return 9, 0
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; where there is none, those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_pdl(device: torch.device) -> bool:
    """Whether a device can overlap the start of a kernel with the end of the one before it."""
    if interpreting() or device.type == "cpu":
        return False
    return capability_of(device) >= (9, 0)
