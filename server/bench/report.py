"""Reports of measurements: for people, and as JSON with all that is needed to repeat them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np

from slipstream import __version__
from slipstream.builder.contract import kv_dtype_of
from slipstream.builder.engine import WEIGHTS, Engine, open_engine
from slipstream.cores import usable_cores
from slipstream.errors import InvalidRequestError
from slipstream.plugins import library
from slipstream.server.engine_summary import (
    StepWeights,
    describe_parameters,
    parameters_of,
    read_graph,
    step_weights,
)
from slipstream.server.text import format_bytes, format_columns, printable

_PERCENTILES = (50, 90, 99)
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark, of ``batch`` sequences at a time; ``timings`` are samples in seconds,
    ``rates`` plain numbers."""

    benchmark: str
    engine: Path
    batch: int
    settings: Mapping[str, int]
    timings: Mapping[str, Sequence[float]]
    rates: Mapping[str, float]

    def publish(self, json_file: Path | None) -> None:
        """Print the report, and write it to a file if one is given.

        Raises ``InvalidRequestError`` if the file cannot be written.
        """
        click.echo(self._as_text())
        if json_file is None:
            return
        text = json.dumps(self._as_dict(), indent=2) + "\n"
        try:
            json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(
                f"{json_file} cannot be written ({error.strerror}); choose another --json file"
            ) from error

    def _as_text(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        timings = [
            (_spaced(name), *(f"{value:10.2f}" for value in values.values()))
            for name, values in self._distributions().items()
        ]
        head = ("milliseconds", *(f"{column:>10}" for column in distribution([0])))
        rates = [(_spaced(name), f"{value:10,.1f}") for name, value in self.rates.items()]
        return "\n".join(
            [
                f"{self.benchmark} of {self.engine} ({_described(open_engine(self.engine))})",
                f"on {cpu_name()}, slipstream {__version__}",
                f"with {settings}",
                f"a step of {self.batch} tokens reads {self._weights().at(self.batch)}",
                "",
                format_columns([head, *timings]),
                "",
                format_columns(rates),
            ]
        )

    def _weights(self) -> StepWeights:
        return step_weights(read_graph(open_engine(self.engine)))

    def _distributions(self) -> dict[str, dict[str, float]]:
        # Answers of one token have no time between tokens.
        return {name: distribution(taken) for name, taken in self.timings.items() if taken}

    def _as_dict(self) -> dict[str, object]:
        return {
            "benchmark": self.benchmark,
            "settings": dict(self.settings),
            "milliseconds": self._distributions(),
            "rates": dict(self.rates),
            "weights_read_by_a_step": self._weights().read(self.batch),
            "engine": _engine_summary(open_engine(self.engine)),
            "environment": environment(),
        }


def distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of at least one sample, in milliseconds."""
    values = np.asarray(seconds, np.float64) * 1000
    points = np.percentile(values, _PERCENTILES)
    named = {f"p{p}": float(point) for p, point in zip(_PERCENTILES, points, strict=True)}
    return {"mean": float(values.mean()), **named}


def cpu_name() -> str:
    """The processor as its maker calls it, where that can be found out."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Versions and hardware."""
    return {
        "slipstream": __version__,
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cores": usable_cores(),
        "instruction_sets": list(library.isas()),
    }


def _engine_summary(engine: Engine) -> dict[str, object]:
    manifest = engine.manifest
    return {
        "path": str(engine.path),
        "target": manifest.target,
        "architecture": manifest.model["architecture"],
        "quantization": manifest.quantization,
        "kv_dtype": kv_dtype_of(manifest.caches),
        "weight_bytes": (engine.path / WEIGHTS).stat().st_size,
        "limits": asdict(manifest.limits),
        "command": manifest.command,
    }


def _described(engine: Engine) -> str:
    manifest = engine.manifest
    size = format_bytes((engine.path / WEIGHTS).stat().st_size)
    kv_dtype = kv_dtype_of(manifest.caches)
    architecture = printable(str(manifest.model["architecture"]))
    parameters = parameters_of(engine)
    counted = "" if parameters is None else f"{describe_parameters(parameters)}, "
    return f"{architecture}, {counted}{size} of weights, {kv_dtype} KV"


def _spaced(name: str) -> str:
    return name.replace("_", " ")
