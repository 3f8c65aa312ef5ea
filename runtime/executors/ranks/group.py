"""The processes of an engine's ranks: started together, and ended together when one is lost."""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

from slipstream.builder.engine import Engine
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.interpreter import interpreter
from slipstream.plugins.collectives.native import memory_size, turns
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.ranks.protocol import SLOT_BYTES, Answer, Reserve, Setup, Step
from slipstream.runtime.executors.ranks.region import Region

# With -P, lest files of the working directory, perhaps a stranger's engine, be taken for modules.
_PROGRAM = ("-P", "-m", "slipstream.runtime.executors.ranks.process")
_PAUSE = 0.25  # seconds between two looks at ranks that have not answered
# A rank that others wait for and that has computed nothing for so long is stopped or stuck.
SILENCE = 10.0
_Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class _Member:
    process: _Process
    link: Connection


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
        self._silence = min(SILENCE, config.step_timeout)
        self._lost: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._members: list[_Member] = []
        regions = (self.steps, self.results, self._exchange)
        self._finish = weakref.finalize(self, _finish, os.getpid(), self._members, regions)
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

    def _start(self, engine: Path, config: RuntimeConfig, rank: int) -> _Member:
        here, there = socketpair()
        regions = [region.descriptor for region in (self._exchange, self.steps, self.results)]
        with there:
            setup = Setup(engine, config, rank, there.fileno(), *regions)
            # In a session of its own: a terminal's Ctrl-C is for the engine's process.
            process = subprocess.Popen(
                (interpreter(), *_PROGRAM),
                stdin=subprocess.PIPE,
                pass_fds=(there.fileno(), *regions),
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(pickle.dumps(setup))
            process.stdin.flush()
        except BrokenPipeError:  # it has ended, which is noticed where it is waited for
            pass
        return _Member(process, Connection(here.detach()))

    def _collect(self, *, watched: bool = False) -> list[Answer]:
        """An answer of each rank; one that is ``watched`` may not be silent."""
        answers: dict[int, Answer] = {}
        silence = _Silence(self._silence)
        while len(answers) < self._ranks:
            waiting = [rank for rank in range(self._ranks) if rank not in answers]
            links = {self._members[rank].link: rank for rank in waiting}
            ready = connection.wait([*links], _PAUSE)
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
                self._members[rank].process.wait(_PAUSE)
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
        for rank, member in enumerate(self._members):
            code = member.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                return self._named([rank], how)
        return None

    def _named(self, ranks: Sequence[int], what: str) -> str:
        names = " and ".join(map(str, ranks))
        return f"rank {names} of {self._ranks} {what}. Restart the engine"

    def _lose(self, error: SlipstreamError) -> SlipstreamError:
        """End all ranks because of an error, which is to be raised."""
        with self._lock:
            self._lost = self._lost or str(error)
        _end(self._members)
        return error

    def watch(self) -> bool:
        """Whether all ranks run; if one does not, the others are ended."""
        why = self._ended()
        if self._lost is not None or self._closed or why is None:
            return self._lost is None and not self._closed
        with self._lock:
            self._lost = self._lost or why
        _kill(self._members)
        return False


class _Silence:
    """Since when processes have been asleep, or stopped, without computing anything between."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: dict[int, tuple[int | None, float]] = {}

    def stuck(self, processes: dict[int, int]) -> list[int]:
        """The ranks, of those by their processes, that have been silent for too long."""
        now, stuck = time.monotonic(), []
        for rank, process in processes.items():
            used = _asleep_after(process)
            before, since = self._seen.get(rank, (None, now))
            if used is None or used != before:
                since = now
            self._seen[rank] = used, since
            if now - since > self._seconds:
                stuck.append(rank)
        return stuck


def _asleep_after(process: int) -> int | None:
    """How many ticks a process has computed that sleeps or is stopped, see proc_pid_stat(5); None
    for one that waits for a core or a disk, and where the system does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "RD" else int(fields[10]) + int(fields[11])


def _watch(group: weakref.ref[RankGroup]) -> None:
    """Notice a rank that ends while nothing is asked of it."""
    while (found := group()) is not None and found.watch():
        del found
        time.sleep(_PAUSE)


def _kill(members: Sequence[_Member]) -> None:
    for member in members:
        member.process.kill()


def _end(members: list[_Member]) -> None:
    _kill(members)
    for member in _taken(members):
        member.process.wait()
        member.link.close()
        if member.process.stdin is not None:
            member.process.stdin.close()


def _finish(process: int, members: list[_Member], regions: Sequence[Region]) -> None:
    if os.getpid() != process:  # it was forked from the one whose ranks they are
        return
    _end(members)
    for region in regions:
        region.close()


def _taken(members: list[_Member]) -> Iterator[_Member]:
    while members:
        yield members.pop()
