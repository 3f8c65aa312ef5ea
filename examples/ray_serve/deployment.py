"""Two replicas of an engine behind Ray Serve, which spreads requests and replaces what dies.

    pip install 'ray[serve]>=2.60'
    SLIPSTREAM_ENGINE=engine serve run examples.ray_serve.deployment:app

Each replica is the whole server in a process of Ray's: all of its HTTP interfaces, its limits and
its metrics are there, behind the address of Ray Serve.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from slipstream import AsyncLLM
from slipstream.server.core.http.app import Counting, create_app
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.service import Service


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=256,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=60,  # in which requests of a replica that goes may end
)
@serve.ingress()
class Slipstream:
    """An engine, and the application that serves it."""

    def __init__(self, engine: str, name: str, options: dict[str, Any]) -> None:
        """``name`` is that of the model in requests; ``options`` are the runtime's."""
        self.llm = AsyncLLM(engine, **options)
        # Ray's proxy is who is asked, by whatever name.
        self.options = ServerOptions(host="0.0.0.0", served_model_name=(name,))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this replica, which Ray asks for once it has been made."""
        # Imported here: Ray pickles this class with its globals, and routes hold locks.
        from slipstream.server.commands.api_process import APIS

        counting = Counting()
        return create_app(Service(self.llm, self.options, counting.tally), counting, APIS)

    def check_health(self) -> None:
        """Raise where the engine is unhealthy or closed: Ray then replaces the replica."""
        reason = self.llm.unhealthy or self.llm.closed
        if reason is not None:
            raise RuntimeError(reason)


app = Slipstream.bind(  # type: ignore[attr-defined]
    os.environ.get("SLIPSTREAM_ENGINE", "engine"),
    os.environ.get("SLIPSTREAM_MODEL", "slipstream"),
    {"max_batch_size": 16},
)
