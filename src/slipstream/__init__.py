"""Slipstream: checkpoint -> quantized engine -> in-flight batching -> tokens."""

from typing import TYPE_CHECKING, Any

from slipstream import errors

if TYPE_CHECKING:
    from slipstream.runtime.async_llm import AsyncLLM
    from slipstream.runtime.llm import LLM
    from slipstream.runtime.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__", "errors"]

_LAZY = {
    "LLM": "slipstream.runtime.llm",
    "AsyncLLM": "slipstream.runtime.async_llm",
    "SamplingParams": "slipstream.runtime.sampling.params",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute has any type
    # Importing the package must stay free of onnxruntime and tokenizers, so names load on first
    # use.
    if name not in _LAZY:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
