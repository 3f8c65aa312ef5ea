"""``slipstream serve``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from slipstream.server.command import UNHEALTHY, Command
from slipstream.server.core.logs import structured_logs
from slipstream.server.core.options import ServerOptions
from slipstream.server.models import load_model
from slipstream.server.options import runtime_options, server_options


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
    """
    # Imported here, with what it needs, so that bad usage is reported at once.
    from slipstream.server.anthropic.api import ANTHROPIC
    from slipstream.server.core.http.process import bind, run
    from slipstream.server.ollama.api import OLLAMA
    from slipstream.server.openai.api import OPENAI
    from slipstream.server.responses.api import RESPONSES

    listener = bind(server.host, server.port)
    with listener, structured_logs(server.log_format):
        engine = load_model(model, runtime)
        from slipstream.runtime.async_llm import AsyncLLM

        names = server.served_model_name or (default_name(model),)
        options = replace(server, served_model_name=names)
        apis = [OPENAI, RESPONSES, ANTHROPIC, OLLAMA]
        unhealthy = run(AsyncLLM.from_engine(engine), options, listener, apis)
    if unhealthy is not None:  # the log has said so
        click.get_current_context().exit(UNHEALTHY)


def default_name(model: str) -> str:
    """What a model is called in requests: a hub id as it is, a path by its last part."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
