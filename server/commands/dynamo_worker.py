"""``slipstream dynamo-worker``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from slipstream.errors import InvalidRequestError, MissingDependencyError
from slipstream.runtime.kv_events.config import NAME, KvEventsConfig, with_kv_events
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.server.command import UNHEALTHY, Command
from slipstream.server.commands.serve import default_name
from slipstream.server.dynamo.options import DynamoOptions, dynamo_options
from slipstream.server.models import load_model
from slipstream.server.options import runtime_options


@click.command("dynamo-worker", cls=Command)
@click.argument("model")
@dynamo_options
@runtime_options
def dynamo_worker(model: str, dynamo: DynamoOptions, runtime: dict[str, Any]) -> None:
    """Answer the requests of NVIDIA Dynamo's frontends.

    MODEL is an engine, or a checkpoint, which is compiled on first use. Frontends find the worker,
    send requests to the one that has their beginning in its cache, and with --migration-limit go on
    elsewhere with those of a worker that dies. SIGTERM and Ctrl-C let running requests end.
    DYN_SYSTEM_PORT is where /health and /metrics are. With --disaggregation-mode, some workers
    compute prompts and others go on with them.

    \b
    Examples:
      slipstream dynamo-worker engine --served-model-name smollm2
      slipstream dynamo-worker engine --discovery-backend file --kv-cache-bytes 2G
      slipstream dynamo-worker engine --disaggregation-mode prefill
    """
    try:
        from slipstream.server.dynamo.worker import run
    except ImportError as error:
        raise MissingDependencyError(
            f"a worker of Dynamo needs {error.name}, which is not installed; install what "
            "docs/distributed.md names"
        ) from error
    options = replace(dynamo, served_model_name=dynamo.served_model_name or default_name(model))

    def load(own: KvEventsConfig) -> LoadedEngine:
        """With events of the cache as the options say, or else in a way of the worker's own."""
        tells = runtime.get("enable_prefix_caching", True)
        hands = {"kv_transfer_gib": options.kv_transfer_gib} if options.hands_over else {}
        given = with_kv_events({**({NAME: own} if tells else {}), **runtime, **hands})
        _check_events(given.get(NAME))
        return load_model(model, given)

    if run(load, options) is not None:
        click.get_current_context().exit(UNHEALTHY)


def _check_events(events: KvEventsConfig | None) -> None:
    """Raise ``InvalidRequestError`` where Dynamo could not hear the events that it is promised."""
    if events is not None and events.publishes and not events.binds:
        raise InvalidRequestError(
            f"{NAME} has endpoint {events.endpoint}, which is connected to, and Dynamo listens at "
            "the worker's own; give one that is bound, such as tcp://*:5557, or leave it out",
            param=NAME,
        )
