"""Names of models, which Ollama's clients give with and without the tag ``:latest``."""

from __future__ import annotations

from slipstream.server.core.refusal import Refusal
from slipstream.server.core.service import Service

_LATEST = ":latest"


def served(service: Service, name: str | None) -> str:
    """The name to answer with, as it was asked for; raises ``Refusal`` for a model that is not
    served."""
    if name is None:
        return service.names[0]
    if tagged(name) not in map(tagged, service.names):
        raise Refusal(
            "not_found",
            f"model {name!r:.100} not found; this server has {', '.join(service.names)}",
            param="model",
        )
    return name


def tagged(name: str) -> str:
    """A name with its tag."""
    return name if ":" in name.rpartition("/")[2] else name + _LATEST
