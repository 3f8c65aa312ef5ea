"""The packages of TensorRT that may be installed: two flavours with one API.

``tensorrt_rtx`` makes plans without a GPU, for several at once, and ``tensorrt`` only for the GPU
that is there. Neither loads what the other, or another version of itself, has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType

from slipstream.plugins.cuda import detect
from slipstream.plugins.demands import Deed

# The modules that a flavour may be installed as.
FLAVOURS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "tensorrt": ("tensorrt", "tensorrt_bindings"),
    }
)
# The GPUs that tensorrt_rtx makes plans for, H100 and B200 not among them.
RTX_GPUS = (80, 86, 89, 120, 121)


def module_of(flavour: str) -> str | None:
    """The name of the module of a flavour that is installed; None if it is not."""
    return next((name for name in FLAVOURS[flavour] if find_spec(name) is not None), None)


def import_flavour(flavour: str) -> ModuleType | None:
    """The module of a flavour; None if it is not installed. ImportError if its libraries do not
    load."""
    name = module_of(flavour)
    return None if name is None else import_module(name)


def demands(deed: Deed, *, thorough: bool) -> tuple[str, ...]:
    """As ``plugins.demands.Demands`` of target tensorrt; plans are made and run by the same
    package."""
    gpu = detect.demands(deed, thorough=thorough)
    installed = [flavour for flavour in FLAVOURS if module_of(flavour) is not None]
    if not installed:
        return (*gpu, "no TensorRT is installed: pip install 'slipstream[tensorrt]'")
    if deed == "build" and installed == ["tensorrt"] and detect.gpu_capability() is None:
        return (
            "the package tensorrt makes plans only for a GPU that is here: pip install "
            "'slipstream[tensorrt]', which needs none",
        )
    if deed == "run" and installed == ["tensorrt_rtx"]:
        return (*gpu, *_not_made_for(detect.gpu_capability()))
    return gpu


def _not_made_for(capability: tuple[int, int] | None) -> tuple[str, ...]:
    if capability is None or 10 * capability[0] + capability[1] in RTX_GPUS:
        return ()
    return (
        f"tensorrt_rtx makes plans for sm_{', sm_'.join(map(str, RTX_GPUS))}, and this GPU is "
        f"{detect.sm(capability)}: use --target cuda, or pip install tensorrt and build here",
    )
