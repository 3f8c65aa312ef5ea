"""NVLink multicast is left alone: not every machine that offers it lets a process use it."""

import os

_SWITCHES = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}


def leave_multicast_off() -> None:
    """Tell torch and NCCL before they set anything up; what the user has set stays."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
