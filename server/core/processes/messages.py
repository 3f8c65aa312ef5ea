"""What the processes of a server tell each other, beside what requests are made of."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.runtime.loaded_engine import Model
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.metrics import Tally
from slipstream.server.core.options import ServerOptions

# Questions of a member: for its ``Setup``, and for ``Gathered`` metrics of all; and to it: for what
# it has ``Counted``.
SETUP, METRICS, COUNTED = "setup", "metrics", "counted"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a member is to serve, and which row of the shared places is its own."""

    model: Model
    options: ServerOptions
    rows: int
    row: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A member listens."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A member is to take no more requests, and end those that it has."""


@dataclass(frozen=True, slots=True)
class Drained:
    """It has none any more; it goes on refusing."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A member is to end; ``now``: whatever it has open."""

    now: bool


@dataclass(frozen=True, slots=True)
class Counted:
    """What a member has counted so far."""

    tally: Tally
    answers: HttpTally
