"""``slipstream triton-repo``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, get_args

import click

from slipstream.builder.engine import is_engine
from slipstream.server.command import Command
from slipstream.server.models import engine_path
from slipstream.server.options import runtime_options
from slipstream.server.triton.repository import Deployment, VersionPolicy, write_repository

_DEFAULTS = {name: field.default for name, field in Deployment.__dataclass_fields__.items()}


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory to write models/ and backends/ into; other models there are kept.",
)
@click.option("--name", help="The model's name in URLs.  [default: that of the engine's directory]")
@click.option(
    "--version",
    type=click.IntRange(min=1),
    default=_DEFAULTS["version"],
    help="Version to write; others of this model are kept.",
)
@click.option(
    "--version-policy",
    type=click.Choice(get_args(VersionPolicy)),
    default=_DEFAULTS["version_policy"],
    help="Versions that Triton serves.",
)
@click.option(
    "--instances",
    type=click.IntRange(min=1),
    default=_DEFAULTS["instances"],
    help="Processes, each with weights and a KV cache of its own. One shares its batch among all "
    "requests, which is what one device needs.",
)
@click.option(
    "--copy-engine",
    is_flag=True,
    help="Copy the engine into the repository, which can then be moved or mounted alone. That of a "
    "checkpoint is always copied.",
)
@click.option(
    "--ensemble",
    is_flag=True,
    help="Write a model `ensemble` beside it, with TensorRT-LLM's names and shapes for its "
    "clients.",
)
@runtime_options
def triton_repo(
    model: str,
    output: Path,
    name: str | None,
    runtime: dict[str, Any],
    **deployment: Any,  # noqa: ANN401 - fields of Deployment
) -> None:
    """Write a model repository for the Triton Inference Server.

    MODEL is an engine, or a checkpoint, which is compiled on first use. OUTPUT/models is for
    tritonserver's --model-repository. OUTPUT/backends/slipstream belongs beside the backend
    "python" of Triton, in the directory that --backend-directory names.

    \b
    Examples:
      slipstream triton-repo engine -o triton --name smollm2
      slipstream triton-repo engine -o triton --copy-engine --max-batch-size 16 --kv-cache-bytes 2G
    """
    engine = engine_path(model, runtime)
    # What the cache holds may be gone tomorrow.
    deployment["copy_engine"] |= not is_engine(Path(model))
    plan = Deployment(name or engine.resolve().name, **deployment)
    written = write_repository(output, engine, plan, runtime)
    click.echo(f"wrote {written.model} and {written.backend}")
    click.echo()
    click.echo(
        f"next: copy {shlex.quote(str(written.backend))} into the backends of Triton, "
        "/opt/tritonserver/backends in NVIDIA's container, and run\n"
        f"tritonserver --model-repository {shlex.quote(str(written.model.parent))}"
    )
