"""``slipstream serve``."""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from slipstream.builder.engine import open_engine
from slipstream.cores import usable_cores
from slipstream.server.command import UNHEALTHY, Command
from slipstream.server.core.logs import structured_logs
from slipstream.server.core.options import ServerOptions
from slipstream.server.models import begin, engine_path, load_model
from slipstream.server.options import runtime_options, server_options

_CORES_FOR_ONE = 4
_MOST = 4


@click.command(cls=Command)
@click.argument("model")
@server_options
@runtime_options
def serve(model: str, server: ServerOptions, runtime: dict[str, Any]) -> None:
    """Serve a model over the HTTP interfaces of OpenAI, Anthropic and Ollama.

    MODEL is an engine, or a checkpoint, which is compiled on first use. OpenAI's clients are given
    http://HOST:PORT/v1 as their base URL, Anthropic's http://HOST:PORT; a browser finds a page to
    chat at http://HOST:PORT/. SIGTERM and Ctrl-C let running requests end; a second one does not
    wait for them. An engine that becomes unhealthy (its device fails step after step, or hangs)
    ends the server with exit status 70, so that it can be started again.

    \b
    Examples:
      slipstream serve engine --port 8000
      slipstream serve Qwen/Qwen3-0.6B --served-model-name qwen --api-key secret
      slipstream serve engine --host 0.0.0.0 --log-format json --max-queued-requests 64
      slipstream serve engine --api-processes 4
    """
    begin(model)
    # Imported here, with what it needs, so that bad usage is reported at once.
    from slipstream.server.core.http.listener import bind

    listener = bind(server.host, server.port)
    with listener, structured_logs(server.log_format):
        names = server.served_model_name or (default_name(model),)
        options = replace(server, served_model_name=names)
        count = options.api_processes
        if count is None:
            count = _api_processes(model, runtime)
        serve_in = _serve_before_others if count else _serve_here
        unhealthy = serve_in(model, runtime, replace(options, api_processes=count), listener)
    if unhealthy is not None:  # the log has said so
        click.get_current_context().exit(UNHEALTHY)


def _serve_here(
    model: str, runtime: dict[str, Any], options: ServerOptions, listener: socket.socket
) -> str | None:
    """Serve with one process, to the end; returns what ails the engine."""
    from slipstream.server.commands.api_process import APIS
    from slipstream.server.core.http.process import run

    engine = load_model(model, runtime)
    from slipstream.runtime.async_llm import AsyncLLM

    return run(AsyncLLM.from_engine(engine), options, listener, APIS)


def _serve_before_others(
    model: str, runtime: dict[str, Any], options: ServerOptions, listener: socket.socket
) -> str | None:
    """The same with processes that answer the requests."""
    from slipstream.server.core.processes.supervisor import Supervisor
    from slipstream.server.responses.store import Store, answers_of

    def shared(options: ServerOptions, settled: Callable[[], Awaitable[object]]) -> Any:  # noqa: ANN401
        store = Store(options.max_stored_responses, options.max_stored_bytes)
        return answers_of(store, settled)

    command = [sys.executable, "-P", "-m", "slipstream.server.commands.api_process"]
    assert options.api_processes is not None
    with Supervisor(command, options, listener, options.api_processes, shared) as supervisor:
        return supervisor.run(load_model(model, runtime))


def _api_processes(model: str, runtime: dict[str, Any]) -> int:
    """How many processes are to answer requests where nobody says.

    None beside an engine of a CPU: it makes fewer tokens than one process passes on, on cores that
    others would take from it. Before a GPU, whose process must not wait for the interpreter, as
    many as keep up with the fastest engines we know.
    """
    cores = usable_cores()
    if cores < _CORES_FOR_ONE:
        return 0
    engine = open_engine(engine_path(model, runtime))
    return min(cores // _CORES_FOR_ONE, _MOST) if engine.manifest.on_gpu else 0


def default_name(model: str) -> str:
    """What a model is called in requests: a hub id as it is, a path by its last part."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
