"""``slipstream inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from slipstream.builder.engine import Engine, Plans, open_engine
from slipstream.server.command import Command, CommandError
from slipstream.server.engine_summary import (
    FileEntry,
    StepWeights,
    WeightEntry,
    check_graphs,
    count_kernels,
    count_operators,
    describe_head,
    describe_kv,
    describe_parameters,
    describe_task,
    list_files,
    list_weights,
    parameters_of,
    read_graph,
    step_weights,
)
from slipstream.server.text import format_bytes, format_columns

_BIGGEST = 8


_DAMAGED = ("missing", "changed", "not listed")


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that is shown of an engine."""

    engine: Engine
    files: list[FileEntry]
    weights: list[WeightEntry]
    operators: dict[str, int]
    kernels: dict[str, int]
    step: StepWeights


@click.command(cls=Command)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--verify",
    is_flag=True,
    help="Compare every file with its hash (reads all of it), and graphs with operators' specs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def inspect(engine: Path, verify: bool, as_json: bool) -> None:
    """Show what is inside an engine: its manifest, files, weights and operators.

    Nothing is loaded, so this is quick and needs little memory. With --verify, damage, or a
    graph that no build makes, makes the exit status 1.

    \b
    Examples:
      slipstream inspect engine --verify
      slipstream inspect engine --json | jq .kv.bytes_per_token
    """
    opened = open_engine(engine)
    files = list_files(opened, verify=verify)
    contents = _Contents(opened, files, *_readable(opened, files, verify))
    click.echo(json.dumps(_as_json(contents), indent=2) if as_json else _as_text(contents))
    damaged = [file for file in files if file.status in _DAMAGED]
    if damaged:
        found = ", ".join(f"{file.name} is {file.status}" for file in damaged)
        raise CommandError(f"{found}; build the engine again: {opened.manifest.command}")


def _readable(
    engine: Engine, files: Sequence[FileEntry], verify: bool
) -> tuple[list[WeightEntry], dict[str, int], dict[str, int], StepWeights]:
    """Weights, operators, kernels and what a step reads; nothing of an engine that lacks or damages
    a file."""
    if any(file.status in _DAMAGED for file in files):
        return [], {}, {}, StepWeights(0, {})
    graph = read_graph(engine)
    if verify:
        check_graphs(engine)
    weights, step = list_weights(engine), step_weights(graph)
    return weights, count_operators(graph), count_kernels(graph), step


def _as_json(contents: _Contents) -> dict[str, object]:
    manifest, parameters = contents.engine.manifest, parameters_of(contents.engine)
    fields = asdict(manifest)
    fields["kv"] = describe_kv(manifest.caches)
    fields["files"] = [
        {**asdict(file), "sha256": manifest.files.get(file.name)} for file in contents.files
    ]
    return {
        "path": str(contents.engine.path),
        **fields,
        "weights": {
            "count": len(contents.weights),
            "nbytes": sum(weight.nbytes for weight in contents.weights),
            "by_dtype": _by_dtype(contents.weights),
            "biggest": [asdict(weight) for weight in _biggest(contents.weights)],
            "read_at_batch_1": contents.step.read(1),
        },
        "parameters": None if parameters is None else asdict(parameters),
        "experts": [
            {**asdict(mixture), "nbytes": nbytes}
            for mixture, nbytes in contents.step.experts.items()
        ],
        "operators": contents.operators,
        "linear_kernels": contents.kernels,
    }


def _as_text(contents: _Contents) -> str:
    sections: dict[str, Sequence[Sequence[object]]] = {
        "engine": _manifest_rows(contents.engine),
        "model": _model_rows(contents.engine),
        "files": [
            (file.name, "" if file.size is None else format_bytes(file.size), file.status)
            for file in contents.files
        ],
        "weights": [
            (dtype, f"{entry['count']} tensors", format_bytes(entry["nbytes"]))
            for dtype, entry in _by_dtype(contents.weights).items()
        ],
        "steps": contents.step.describe() if contents.weights else [],
        "biggest weights": [
            (
                weight.name,
                weight.dtype,
                "x".join(map(str, weight.shape)),
                format_bytes(weight.nbytes),
            )
            for weight in _biggest(contents.weights)
        ],
        "linear layers by kernel": list(contents.kernels.items()),
        "operators": list(contents.operators.items()),
    }
    return "\n\n".join(
        f"{title}\n{format_columns(rows)}" for title, rows in sections.items() if rows
    )


def _manifest_rows(engine: Engine) -> list[tuple[object, ...]]:
    manifest = engine.manifest
    kv = describe_kv(manifest.caches)
    per_token = int(kv["bytes_per_token"])
    return [
        ("path", str(engine.path)),
        ("task", describe_task(manifest.pooling)),
        ("target", f"{manifest.target} ({manifest.capability})"),
        *([("ranks", f"{manifest.ranks}; sizes are of one of them")] if manifest.ranks > 1 else []),
        ("made by", f"slipstream {manifest.slipstream_version}, format {manifest.format_version}"),
        ("command", manifest.command),
        ("quantization", manifest.quantization),
        ("checkpoint", "; ".join(f"{n} {name}" for name, n in manifest.formats.items())),
        *([("head", describe_head(manifest.head))] if manifest.head else []),
        ("plugins", ", ".join(f"{name} {v}" for name, v in manifest.plugins.items())),
        *_plan_rows(manifest.plans),
        *((name, str(value)) for name, value in asdict(manifest.limits).items()),
        ("KV cache", f"{kv['dtype']}, pages of {kv['page_size']} tokens"),
        ("KV per token", format_bytes(per_token)),
        ("KV of one sequence", format_bytes(per_token * manifest.limits.max_seq_len)),
    ]


def _plan_rows(plans: Plans | None) -> list[tuple[object, ...]]:
    if plans is None:
        return []
    files, gpus = len(set(plans.calls.values())), ", ".join(plans.gpus)
    made = f"{files} for {len(plans.calls)} calls, by {plans.flavour} {plans.version}, for {gpus}"
    return [("plans", made), ("unverified", plans.unverified)]


def _model_rows(engine: Engine) -> list[tuple[object, ...]]:
    rows, counted = engine.manifest.model.items(), parameters_of(engine)
    plain = [(name, str(v)) for name, v in rows if not isinstance(v, list | dict | None)]
    return [*([("parameters", describe_parameters(counted))] if counted else []), *plain]


def _by_dtype(weights: Sequence[WeightEntry]) -> dict[str, dict[str, int]]:
    counts, sizes = Counter[str](), Counter[str]()
    for weight in weights:
        counts[weight.dtype] += 1
        sizes[weight.dtype] += weight.nbytes
    return {dtype: {"count": counts[dtype], "nbytes": n} for dtype, n in sizes.most_common()}


def _biggest(weights: Sequence[WeightEntry]) -> list[WeightEntry]:
    return sorted(weights, key=lambda weight: -weight.nbytes)[:_BIGGEST]
