"""Makes one plan, in a process of its own: TensorRT aborts its process where it meets a defect,
and the first plan of a process is the same bit for bit whenever it is made.

A script that needs nothing but TensorRT's module. Reads a job as JSON: the ``module``, the
``model`` file, where ``plan`` and ``report`` go, the ``gpus`` to make it for (none: the one that is
here), and ``profiles``, each the least and the greatest shape of every input by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

_TABLE = "Layers:"


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Write the plan and return its report, or only the ``errors`` of TensorRT."""
    trt = import_module(job["module"])
    log = _log_of(trt)
    builder = trt.Builder(log)
    typed = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(1 << typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["model"]):
        return {"errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    plan = builder.build_serialized_network(network, _config(trt, builder, job))
    if plan is None:
        return {"errors": log.errors}
    Path(job["plan"]).write_bytes(plan)
    return {
        "version": trt.__version__,
        "inputs": _described(map(network.get_input, range(network.num_inputs))),
        "outputs": _described(map(network.get_output, range(network.num_outputs))),
        "unread": _unread(network),
        "table": log.table,
    }


def _config(trt: Any, builder: Any, job: dict[str, Any]) -> Any:  # noqa: ANN401 - of two packages
    config = builder.create_builder_config()
    # Only then the table of layers names what each computes, and with which types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["gpus"]:
        config.num_compute_capabilities = len(job["gpus"])
        for index, gpu in enumerate(job["gpus"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{gpu}"), index)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, most) in shapes.items():
            profile.set_shape(name, least, most, most)
        config.add_optimization_profile(profile)
    return config


def _described(tensors: Iterable[Any]) -> dict[str, Any]:
    return {t.name: {"dtype": t.dtype.name, "shape": list(t.shape)} for t in tensors}


def _unread(network: Any) -> list[str]:  # noqa: ANN401
    """Inputs that no layer reads: the parser has been seen to ignore some in silence."""
    read = set()
    for layer in map(network.get_layer, range(network.num_layers)):
        found = map(layer.get_input, range(layer.num_inputs))
        read |= {tensor.name for tensor in found if tensor is not None}
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    return [name for name in names if name not in read]


def _log_of(trt: Any) -> Any:  # noqa: ANN401
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and the one message that is the table of layers."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.table = ""

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith(_TABLE):
                self.table = message

    return Log()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    Path(asked["report"]).write_text(json.dumps(make(asked)))
