"""The program of a follower: enqueues on its GPU what the first rank says.

    python -m slipstream.runtime.executors.ranks.gpu.process

Its standard input begins with a pickled ``Setup`` and stays open as long as the engine's process
lives; nothing else is said there.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from multiprocessing.connection import Connection

from slipstream.builder.engine import open_engine
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.plugins.collectives.cuda.multicast import leave_multicast_off
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.team import Team
from slipstream.runtime.executors.ranks.gpu.following import FollowingExecutor
from slipstream.runtime.executors.ranks.gpu.protocol import (
    LINE,
    Close,
    Head,
    Layers,
    Meet,
    Reserve,
    Rows,
    Setup,
    Time,
    Told,
)
from slipstream.runtime.executors.ranks.members import end_with_the_engine
from slipstream.runtime.executors.ranks.message import StepCodec
from slipstream.runtime.executors.ranks.region import Region


def main() -> None:
    """Run a rank."""
    setup: Setup = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_the_engine, daemon=True).start()
    leave_multicast_off()
    link = Connection(setup.link)
    try:
        follower = Follower(setup, link)
        while follower.follow():
            pass
    except EOFError:  # the engine was shut down
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine's process tells of it
        known = isinstance(error, SlipstreamError)
        what = f"rank {setup.rank}: {type(error).__name__}: {error}. Restart the engine"
        link.send(error if known else ExecutionError(what))
        os._exit(1)  # kernels that wait for other ranks are no reason to stay


class Follower:
    """An executor of one rank's weights that does as it is told."""

    def __init__(self, setup: Setup, link: Connection) -> None:
        """Load the weights, say so, and meet the others."""
        engine = open_engine(setup.engine)
        self._setup, self._link, self._ranks = setup, link, engine.manifest.ranks
        self._steps = [Region(descriptor) for descriptor in setup.steps]
        done = Region(setup.done).array(0, (self._ranks, LINE // 4), "int32")
        self._done = done[setup.rank]
        self._codec = StepCodec(engine.manifest.graphs, engine.manifest.caches)
        self._executor = FollowingExecutor(engine, setup.config, setup.rank, self._meet)
        self._done[0] += 1

    def follow(self) -> bool:
        """Do what is told next; False where it was the last."""
        told: Told = self._link.recv()
        if isinstance(told, Close):
            self._executor.shutdown()
            return False
        if isinstance(told, Reserve):
            self._executor.reserve_kv(told.num_bytes)
            self._link.send(0)
        elif isinstance(told, Time):
            self._executor.step_seconds()
        elif isinstance(told, Layers):
            batch = self._codec.read(self._steps[told.region], told.numbers)
            self._executor.layers(batch, eager=told.eager)
        elif isinstance(told, Head):
            self._executor.head(told.padded, told.kind)
        elif isinstance(told, Rows):
            self._executor.rows(told.rows)
        self._done[0] += 1
        return True

    def _meet(self, device: Device) -> Team:
        self._link.send(0)
        assert isinstance(self._link.recv(), Meet)
        return Team(self._setup.rank, self._ranks, device, self._setup.meeting, _nothing)


def _nothing() -> None:
    """Nobody is to be watched: this process ends with that of the engine."""


if __name__ == "__main__":
    main()
