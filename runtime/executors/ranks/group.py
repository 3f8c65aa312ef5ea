"""The processes of an engine's ranks: started together, and ended together when one is lost."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path

from slipstream.builder.engine import Engine
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.plugins.collectives.native import memory_size, turns
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.ranks.members import (
    PAUSE,
    Member,
    end,
    ended,
    finish,
    kill,
    named,
    start,
)
from slipstream.runtime.executors.ranks.protocol import SLOT_BYTES, Answer, Reserve, Setup, Step
from slipstream.runtime.executors.ranks.region import Region
from slipstream.runtime.executors.ranks.silence import SILENCE, Silence

_PROGRAM = "slipstream.runtime.executors.ranks.process"


class RankGroup:
    """Asks all ranks the same and waits for their answers.

    A rank that ends, fails, or hangs is not replaced: the others wait for what it would have given
    them, so all are killed, and ``lost`` says why, for good. ``processes`` are their numbers.
    """

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Start them, and wait until each has loaded its weights; raises what one raised."""
        self.steps, self.results = Region.make(), Region.make()
        self._ranks = engine.manifest.ranks
        self._exchange = Region.make(memory_size(self._ranks, SLOT_BYTES))
        self._turns = self._exchange.map(memory_size(self._ranks, SLOT_BYTES))
        # Before the step counts as unanswered: who hangs says more.
        self._silence = min(SILENCE, config.step_timeout / 2)
        self._lost: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._members: list[Member] = []
        regions = (self.steps, self.results, self._exchange)
        self._finish = weakref.finalize(self, finish, os.getpid(), self._members, regions)
        try:
            for rank in range(self._ranks):
                self._members.append(self._start(engine.path, config, rank))
            self._collect()
        except BaseException:
            self._finish()
            raise
        self.processes = tuple(member.process.pid for member in self._members)
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    @property
    def lost(self) -> str | None:
        """Why no rank runs any more; None while they do."""
        return self._lost

    def reserve(self, num_bytes: int) -> int:
        """Pages of every rank, each with so many bytes for them."""
        self.tell(Reserve(num_bytes))
        pages = {answer for answer in self.answers() if isinstance(answer, int)}
        assert len(pages) == 1, pages
        return pages.pop()

    def tell(self, question: Reserve | Step) -> None:
        """Ask all ranks; their ``answers`` are to be taken before they are asked again.

        Raises ExecutionError where one is lost.
        """
        if self._lost is not None or self._closed:
            raise ExecutionError(self._lost or "the engine was shut down")
        try:
            for member in self._members:
                member.link.send(question)
        except OSError as error:
            raise self._lose(ExecutionError(self._gone(rank=None))) from error

    def answers(self) -> list[Answer]:
        """What all ranks say; raises what one raised, or ExecutionError where one is lost."""
        try:
            return self._collect(watched=True)
        except SlipstreamError as error:
            raise self._lose(error) from None

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        self._finish()

    def _start(self, engine: Path, config: RuntimeConfig, rank: int) -> Member:
        regions = [region.descriptor for region in (self._exchange, self.steps, self.results)]
        return start(_PROGRAM, lambda link: Setup(engine, config, rank, link, *regions), regions)

    def _collect(self, *, watched: bool = False) -> list[Answer]:
        """An answer of each rank; one that is ``watched`` may not be silent."""
        answers: dict[int, Answer] = {}
        silence = Silence(self._silence)
        while len(answers) < self._ranks:
            waiting = [rank for rank in range(self._ranks) if rank not in answers]
            links = {self._members[rank].link: rank for rank in waiting}
            ready = connection.wait([*links], PAUSE)
            for link in ready:
                assert isinstance(link, Connection)
                answers[links[link]] = self._receive(link, links[link])
            stuck = silence.stuck(self._late(waiting)) if watched and not ready else []
            if stuck:
                what = f"has done nothing for {self._silence:g} seconds"
                raise ExecutionError(self._named(stuck, what))
        return [answers[rank] for rank in range(self._ranks)]

    def _receive(self, link: Connection, rank: int) -> Answer:
        try:
            answer: Answer = link.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # its files are closed before it has ended
                self._members[rank].process.wait(PAUSE)
            raise ExecutionError(self._gone(rank)) from None
        if isinstance(answer, SlipstreamError):
            raise answer
        return answer

    def _late(self, waiting: Sequence[int]) -> dict[int, int]:
        """The ranks for which all wait, and their processes: those that have met the others the
        least often."""
        met = turns(self._turns, self._ranks)
        newest = max(met)
        behind = {rank: (newest - met[rank]) & 0xFFFFFFFF for rank in waiting}
        most = max(behind.values())
        return {rank: self.processes[rank] for rank in waiting if behind[rank] == most}

    def _gone(self, rank: int | None) -> str:
        """Why the link to a rank is closed."""
        unknown = [*range(self._ranks)] if rank is None else [rank]
        return self._lost or self._ended() or self._named(unknown, "does not listen any more")

    def _ended(self) -> str | None:
        """How the first rank ended that has; None where all run."""
        return ended(dict(enumerate(self._members)), self._ranks)

    def _named(self, ranks: Sequence[int], what: str) -> str:
        return named(ranks, self._ranks, what)

    def _lose(self, error: SlipstreamError) -> SlipstreamError:
        """End all ranks because of an error, which is to be raised."""
        with self._lock:
            self._lost = self._lost or str(error)
        end(self._members)
        return error

    def watch(self) -> bool:
        """Whether all ranks run; if one does not, the others are ended."""
        why = self._ended()
        if self._lost is not None or self._closed or why is None:
            return self._lost is None and not self._closed
        with self._lock:
            self._lost = self._lost or why
        kill(self._members)
        return False


def _watch(group: weakref.ref[RankGroup]) -> None:
    """Notice a rank that ends while nothing is asked of it."""
    while (found := group()) is not None and found.watch():
        del found
        time.sleep(PAUSE)
