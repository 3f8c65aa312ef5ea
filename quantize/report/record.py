"""What a quantization did and what it cost, as JSON, Markdown and plots."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slipstream.quantize.evaluate import Accuracy
from slipstream.quantize.report import markdown

log = logging.getLogger(__name__)

STEM = "quantization_report"
NO_PLOTS = "No plots: matplotlib is not installed (pip install 'slipstream[quantize]')."
_WORST = 5
# What is suggested for a linear that came out badly with fewer bits than this, and the scheme.
_FEW_BITS, _MORE_BITS = 6, "int8_wo"
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PACKAGES = (
    "slipstream",
    "numpy",
    "torch",
    "transformers",
    "compressed-tensors",
    "nvidia-modelopt",
)


@dataclass(frozen=True, slots=True)
class LinearRow:
    """What happened to one linear.

    ``weights`` counts its elements and ``bytes`` what they take with their scales. Errors are
    relative squared ones: ``weight_error`` is |W' - W|² / |W|²; ``output_error`` is
    tr(D H Dᵀ) / tr(W H Wᵀ) with D = W' - W and H the Gram matrix of the inputs, None where no data
    was seen. ``clip`` is the mean fraction of the range that was kept, ``alpha`` the exponent of
    the scaling of channels, ``damping`` what was added to H; None where the algorithm has none.
    ``fallback`` says what was done instead of what was asked for, and why.
    """

    name: str
    scheme: str
    group: int
    weights: int
    bytes: int
    weight_error: float
    output_error: float | None = None
    clip: float | None = None
    alpha: float | None = None
    damping: float | None = None
    fallback: str | None = None
    tokens_seen: int = 0

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.bytes / self.weights

    @property
    def error(self) -> float:
        """That of the output, or of the weight where no data was seen."""
        return self.weight_error if self.output_error is None else self.output_error

    @property
    def layer(self) -> int | None:
        """The number in its name: 3 for ``model.layers.3.mlp.up_proj``."""
        found = re.search(r"\.(\d+)\.", self.name)
        return None if found is None else int(found[1])

    @property
    def kind(self) -> str:
        """The last part of its name: ``up_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def expert(self) -> int | None:
        """The number of the expert that it is of."""
        found = _EXPERT.search(self.name)
        return None if found is None else int(found[1])

    def of_experts(self, which: str) -> str:
        """Its name with ``which`` in the place of the number of its expert."""
        return _EXPERT.sub(lambda _: f".experts.{which}.", self.name)

    def suggestion(self) -> str:
        """The option that would spare this linear, with all experts of its layer if it is of one:
        they are stored as one weight."""
        prefix, experts, _ = self.name.partition(".experts.")
        target = f"'re:{re.escape(prefix + experts)}.*'" if experts else self.name
        few = self.bits < _FEW_BITS
        return f"--override {target}={_MORE_BITS}" if few else f"--exclude {target}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        return {**values, "bits": self.bits}


@dataclass(frozen=True, slots=True)
class Report:
    """One run of ``slipstream quantize``.

    ``size`` and ``size_before`` are bytes of all tensors and ``parameters`` how many numbers they
    stand for. ``accuracy`` compares the file as written with the checkpoint, None when that was not
    asked for. ``calibration`` says on what, empty when no data was used. ``peak_memory`` is in
    bytes, ``seconds`` by stage in order. ``loaders`` are other runtimes by name, with the reason
    why they do not load the files, empty where they do.
    """

    source: str
    output: str
    qformat: str
    kv_cache_dtype: str
    linears: Sequence[LinearRow]
    size: int
    size_before: int
    parameters: int
    accuracy: Accuracy | None
    calibration: str
    seed: int
    seconds: Mapping[str, float]
    peak_memory: int
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    loaders: Mapping[str, str] = field(default_factory=dict)

    @property
    def effective_bits(self) -> float:
        """Bits a weight of the quantized linears, scales included."""
        weights = sum(linear.weights for linear in self.linears)
        return 8 * sum(linear.bytes for linear in self.linears) / weights if weights else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits a parameter of the whole model, what stays dense included."""
        return 8 * self.size / self.parameters

    def worst(self) -> list[LinearRow]:
        """The linears with the largest errors, worst first."""
        measured = [linear for linear in self.linears if math.isfinite(linear.error)]
        return sorted(measured, key=lambda linear: -linear.error)[:_WORST]

    def refusals(self) -> list[str]:
        """A sentence for each loader that does not take the files."""
        return [f"{loader} does not load it: {why}" for loader, why in self.loaders.items() if why]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is None."""
        plain = {
            name: getattr(self, name)
            for name in (
                *("source", "output", "qformat", "kv_cache_dtype", "size", "size_before"),
                *("parameters", "effective_bits", "bits_per_parameter", "calibration", "seed"),
                *("seconds", "peak_memory", "options", "versions", "notes", "loaders"),
            )
        }
        worst = [
            {"name": linear.name, "error": linear.error, "suggestion": linear.suggestion()}
            for linear in self.worst()
        ]
        found: dict[str, Any] = _finite(
            {
                **plain,
                "accuracy": None if self.accuracy is None else self.accuracy.as_dict(),
                "worst": worst,
                "linears": [linear.as_dict() for linear in self.linears],
            }
        )
        return found

    def write(self, directory: Path) -> list[Path]:
        """Write ``quantization_report.json``, ``.md`` and, with matplotlib, ``.png``.

        They come last: the first lists all files of the directory, which are what another run may
        replace.
        """
        plotted = find_spec("matplotlib") is not None
        paths = [directory / f"{STEM}.{kind}" for kind in ("json", "md", "png")[: 2 + plotted]]
        files = sorted({*directory.iterdir(), *paths})
        content = {**self.as_dict(), "files": [file.name for file in files]}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        paths[0].write_text(text + "\n", encoding="utf-8")
        plots = NO_PLOTS
        if not plotted:
            log.info(NO_PLOTS)
        else:
            # Loaded by name: plots are an extra, and importing matplotlib takes a second.
            import_module("slipstream.quantize.report.plots").draw(self, paths[-1])
            plots = f"![Error and bits by layer, perplexity]({STEM}.png)"
        paths[1].write_text(markdown.render(self, plots), encoding="utf-8")
        return paths


def peak_memory() -> int:
    """The most memory that this process has had at once, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Of Python, the machine, and the packages that a result depends on, where installed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
