"""The plots of a report: error and bits by layer, perplexity. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slipstream.quantize.evaluate import Accuracy

if TYPE_CHECKING:
    from slipstream.quantize.report.record import LinearRow, Report

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def draw(report: Report, path: Path) -> None:
    """Write all plots of a report as one PNG."""
    figure = Figure(figsize=(12, 8.5), dpi=120, layout="constrained")
    figure.suptitle(f"{report.source}: {report.qformat}", fontsize=13)
    grid = figure.add_gridspec(2, 3)
    errors, bits = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :2])
    _draw_errors(errors, report.linears)
    _draw_bits(bits, report)
    _draw_perplexity(figure.add_subplot(grid[1, 2]), report.accuracy)
    figure.savefig(path, metadata={"Software": "slipstream"})


def _draw_errors(axes: Axes, linears: Iterable[LinearRow]) -> None:
    """One line a kind of linear; of a layer's experts the mean."""
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for linear in linears:
        if linear.layer is not None and linear.error > 0:
            lines[linear.kind][linear.layer].append(linear.error)
    for index, (kind, points) in enumerate(lines.items()):
        axes.plot(
            list(points),
            [fmean(errors) for errors in points.values()],
            label=kind,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
        )
    if lines:
        axes.set_yscale("log")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _label(axes, "Error of each linear's output", "layer", "relative squared error")


def _draw_bits(axes: Axes, report: Report) -> None:
    """Bits a weight of each layer's linears together, and of the whole model."""
    weights: dict[int, int] = defaultdict(int)
    sizes: dict[int, int] = defaultdict(int)
    for linear in report.linears:
        if linear.layer is not None:
            weights[linear.layer] += linear.weights
            sizes[linear.layer] += linear.bytes
    layers = list(weights)
    axes.bar(layers, [8 * sizes[layer] / weights[layer] for layer in layers], color=_COLOURS[5])
    axes.axhline(
        report.effective_bits,
        color=_COLOURS[1],
        linewidth=1.2,
        label=f"all of them: {report.effective_bits:.2f}",
    )
    axes.set_ylim(0, 1.2 * max((8 * sizes[layer] / weights[layer] for layer in layers), default=1))
    axes.legend(loc="upper right", frameon=False)
    _label(axes, "Bits a weight, scales included", "layer", "bits")


def _draw_perplexity(axes: Axes, accuracy: Accuracy | None) -> None:
    """Before and after; the error bar of the second is that of the difference."""
    if accuracy is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "accuracy not measured", ha="center", va="center")
        return
    before, after = accuracy.reference.value, accuracy.candidate.value
    paired = before * accuracy.increase_standard_error
    axes.bar(["before", "as written"], [before, after], color=[_COLOURS[5], _COLOURS[4]], width=0.6)
    axes.errorbar(["as written"], [after], yerr=[paired], color="black", capsize=6, linewidth=1.2)
    for place, value in enumerate((before, after)):
        axes.text(place, value / 2, f"{value:.4g}", ha="center", va="center")
    axes.set_ylim(0, 1.15 * (max(before, after) + paired))
    _label(axes, f"Perplexity: {accuracy.change}", f"KL {accuracy.kl_mean:.4g} nats", "perplexity")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "layer":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
