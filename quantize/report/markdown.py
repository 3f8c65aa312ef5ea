"""A report for people, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.quantize.report.record import LinearRow, Report

_COLUMNS = (
    *("linear", "scheme", "group", "bits", "bytes", "weight error", "output error"),
    *("clip", "alpha", "damping", "tokens"),
)


def render(report: Report, plots: str) -> str:
    """The report as Markdown; ``plots`` is the line that shows them or says why there are none."""
    parts = [
        f"# Quantization of {report.source}",
        _table(("", ""), _summary(report)),
        plots,
        "## Accuracy",
        _accuracy(report),
        "## Worst layers",
        "An option for each that would spare it, at the price of memory:",
        _table(
            ("linear", "error", "option"),
            [
                (f"`{row.name}`", _number(row.error), f"`{row.suggestion()}`")
                for row in report.worst()
            ],
        ),
        *_remarks(report),
        "## Linears",
        "Errors are relative and squared: of the weight, and of the output on the data.",
        _table(_COLUMNS, [_cells(rows) for rows in _together(report.linears)]),
        "## Run",
        _table(("", ""), _run(report)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report) -> list[tuple[str, str]]:
    smaller = report.size_before / report.size if report.size else 0.0
    rows = [
        ("output", f"`{report.output}`"),
        ("scheme", f"{report.qformat}, KV cache {report.kv_cache_dtype}"),
        ("size", f"{_mib(report.size)}, from {_mib(report.size_before)} ({smaller:.2f}x smaller)"),
        (
            "bits a weight",
            f"{report.effective_bits:.2f} in the linears quantized, "
            f"{report.bits_per_parameter:.2f} in the whole model",
        ),
        (
            "loads in",
            ", ".join(["Slipstream", *(n for n, why in report.loaders.items() if not why)]),
        ),
    ]
    if report.accuracy is not None:
        found = report.accuracy
        rows += [
            ("perplexity", found.change),
            ("KL divergence", f"{found.kl_mean:.4g} mean, {found.kl_p99:.4g} 99th percentile"),
            ("same top token", f"{found.top1:.2%}"),
        ]
    return rows


def _accuracy(report: Report) -> str:
    if report.accuracy is None:
        return "Not measured."
    found = report.accuracy
    rows = [
        ("before", str(found.reference), "", "", ""),
        (
            "as written",
            str(found.candidate),
            found.change,
            f"{found.kl_mean:.4g} ± {found.kl_standard_error:.2g} (99th percentile "
            f"{found.kl_p99:.4g})",
            f"{found.top1:.2%}",
        ),
    ]
    table = _table(("", "perplexity", "change", "KL (nats)", "same top token"), rows)
    return (
        f"{table}\n\nOver {found.tokens} tokens, on the file as written and read back. The "
        "error of the change is paired: both models predict the same tokens."
    )


def _remarks(report: Report) -> list[str]:
    same: dict[tuple[str, str], list[LinearRow]] = {}
    for linear in report.linears:
        if linear.fallback:
            same.setdefault((linear.of_experts("*"), linear.fallback), []).append(linear)
    fallbacks = [f"`{_numbered(rows)}`: {fallback}" for (_, fallback), rows in same.items()]
    remarks = [*report.refusals(), *report.notes, *fallbacks]
    return ["## Remarks", "\n".join(f"* {remark}" for remark in remarks)] if remarks else []


def _run(report: Report) -> list[tuple[str, str]]:
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    return [
        ("calibration", report.calibration or "none: no data was used"),
        ("seed", str(report.seed)),
        ("time", f"{sum(report.seconds.values()):.1f} s ({stages})"),
        ("peak memory", _mib(report.peak_memory)),
        ("versions", ", ".join(f"{name} {v}" for name, v in report.versions.items())),
        ("options", ", ".join(f"{name}={value}" for name, value in report.options.items())),
    ]


def _numbered(rows: Sequence[LinearRow]) -> str:
    """The name of a linear, or that of the same one of several experts with their numbers."""
    numbers = ", ".join(str(row.expert) for row in rows)
    return rows[0].name if len(rows) == 1 else rows[0].of_experts(f"{{{numbers}}}")


def _together(linears: Iterable[LinearRow]) -> Iterable[list[LinearRow]]:
    """The linears, those of a layer's experts that are of one scheme as one: of their numbers,
    means are shown."""
    same: dict[tuple[str, str, int], list[LinearRow]] = {}
    for row in linears:
        same.setdefault((row.of_experts("*"), row.scheme, row.group), []).append(row)
    return same.values()


def _cells(rows: Sequence[LinearRow]) -> tuple[str, ...]:
    row, tokens = rows[0], sorted({row.tokens_seen for row in rows})
    name = f"`{row.name}`" if len(rows) == 1 else f"`{row.of_experts('*')}` ({len(rows)})"
    sizes = (str(row.group), f"{row.bits:.2f}", str(sum(row.bytes for row in rows)))
    numbers: tuple[Sequence[float | None], ...] = (
        *([row.weight_error for row in rows], [row.output_error for row in rows]),
        *([row.clip for row in rows], [row.alpha for row in rows], [row.damping for row in rows]),
    )
    seen = " to ".join(map(str, (tokens[0], tokens[-1])[: len(tokens)]))
    return (name, row.scheme, *sizes, *map(_mean, numbers), seen)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(fmean(known) if known else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
