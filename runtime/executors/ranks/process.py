"""The program of a rank: follows what the engine's process says, until that ends.

    python -m slipstream.runtime.executors.ranks.process

Its standard input begins with a pickled ``Setup`` and stays open as long as the engine's process
lives; nothing else is said there.
"""

from __future__ import annotations

import pickle
import sys
import threading
from multiprocessing.connection import Connection

from slipstream.builder.contract import SAMPLED
from slipstream.builder.engine import open_engine
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.plugins.collectives.native import join, memory_size
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.executors.ranks.members import end_with_the_engine
from slipstream.runtime.executors.ranks.message import StepCodec
from slipstream.runtime.executors.ranks.protocol import SLOT_BYTES, Made, Reserve, Setup, Step
from slipstream.runtime.executors.ranks.region import Region


def main() -> None:
    """Run a rank."""
    setup: Setup = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_the_engine, daemon=True).start()
    link = Connection(setup.link)
    try:
        rank = _Rank(setup)
        link.send(0)
        while True:
            link.send(rank.answer(link.recv()))
    except EOFError:  # the engine was shut down
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine's process tells of it
        known = isinstance(error, SlipstreamError)
        link.send(error if known else ExecutionError(f"{type(error).__name__}: {error}"))


class _Rank:
    """An executor of one rank's weights, and the memory that it shares."""

    def __init__(self, setup: Setup) -> None:
        engine = open_engine(setup.engine)
        ranks, self._rank = engine.manifest.ranks, setup.rank
        self._steps, self._results = Region(setup.steps), Region(setup.results)
        self._exchange = Region(setup.exchange).map(memory_size(ranks, SLOT_BYTES))
        join(self._exchange, setup.rank, ranks)
        self._codec = StepCodec(engine.manifest.graphs, engine.manifest.caches)
        self._executor = CPUExecutor(engine, setup.config, setup.rank)

    def answer(self, asked: Reserve | Step) -> int | list[Made]:
        """Do what is asked."""
        if isinstance(asked, Reserve):
            return self._executor.reserve_kv(asked.num_bytes)
        batch = self._codec.read(self._steps, asked.numbers)
        outputs = self._executor.run(batch)
        made: list[Made] = []
        if self._rank == 0:
            offset = 0
            for name in (*SAMPLED, *batch.outputs):
                if name in outputs:
                    array = outputs[name]
                    made.append(Made(name, offset, array.shape, array.dtype.name))
                    self._results.array(offset, array.shape, array.dtype.name)[:] = array
                    offset += -(-array.nbytes // 64) * 64
        return made


if __name__ == "__main__":
    main()
