"""Slipstream's backend: what Triton loads from its backend directory. The package has the rest."""

try:
    from slipstream.server.triton.backend import TritonPythonModel
except ModuleNotFoundError as error:
    if error.name != "slipstream":
        raise
    import sys

    raise ImportError(
        f"Slipstream is not installed for Triton's Python ({sys.prefix}, version "
        f"{sys.version_info.major}.{sys.version_info.minor}): install it there, or start "
        "tritonserver with the bin directory of its environment first on PATH"
    ) from error

__all__ = ["TritonPythonModel"]
