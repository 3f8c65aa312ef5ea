"""The processes of all ranks but the first: started together, and ended together when one is
lost."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path

from slipstream.builder.engine import Engine
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.ranks.gpu.protocol import LINE, REGIONS, Layers, Setup, Told
from slipstream.runtime.executors.ranks.members import (
    PAUSE,
    Member,
    ended,
    finish,
    kill,
    named,
    start,
)
from slipstream.runtime.executors.ranks.message import StepCodec
from slipstream.runtime.executors.ranks.region import Region
from slipstream.runtime.executors.ranks.silence import SILENCE, Silence

_PROGRAM = "slipstream.runtime.executors.ranks.gpu.process"
_PATIENCE = 5.0  # seconds until a follower that was told to end is killed


class Followers:
    """Tells the other ranks what the first is about to do.

    A rank that ends, fails or hangs is not replaced: the others' GPUs wait for what it would have
    given them, so all followers are killed, and ``lost`` says why, for good. ``ranks`` is how many
    there are with the first, ``processes`` are the numbers of the others' processes. Ranks find
    each other at the file ``meeting``. ``on_loss`` is called, from any thread, when the others have
    ended.
    """

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Start them; each loads its weights, and answers."""
        self.ranks = engine.manifest.ranks
        self._codec = StepCodec(engine.manifest.graphs, engine.manifest.caches)
        self._regions = [Region.make() for _ in range(REGIONS)]
        self._progress = Region.make()
        self._done = self._progress.array(0, (self.ranks, LINE // 4), "int32")
        # Before the step counts as unanswered: who hangs says more.
        self._silence = min(SILENCE, config.step_timeout / 2)
        self._told = self._steps = 0
        self.on_loss: Callable[[], None] | None = None
        self._error: SlipstreamError | None = None
        self._closed = False
        self._lock = threading.Lock()
        directory = tempfile.mkdtemp(prefix="slipstream-ranks-")
        self.meeting = Path(directory) / "meeting"
        self._members: list[Member] = []
        regions = (*self._regions, self._progress)
        own = os.getpid()
        self._finish = weakref.finalize(self, _finish, own, self._members, regions, directory)
        steps = tuple(region.descriptor for region in self._regions)
        done, meeting = self._progress.descriptor, self.meeting
        try:
            for rank in range(1, self.ranks):
                setup = partial(_setup, engine.path, config, rank, steps, done, meeting)
                self._members.append(start(_PROGRAM, setup, (*steps, done)))
        except BaseException:
            self._finish()
            raise
        self.processes = tuple(member.process.pid for member in self._members)
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    @property
    def lost(self) -> str | None:
        """Why no rank runs any more; None while they do."""
        return None if self._error is None else str(self._error)

    def check(self) -> None:
        """Raise why no rank runs any more, if so."""
        if self._error is not None:
            raise self._error

    def tell(self, what: Told) -> None:
        """Have all followers do it; raises ExecutionError where one is lost."""
        if self._error is not None or self._closed:
            raise ExecutionError(self.lost or "the engine was shut down")
        message = pickle.dumps(what)
        self._told += 1
        try:
            for member in self._members:
                member.link.send_bytes(message)
        except OSError as error:
            why = self._await_end() or self._named([], "does not listen any more")
            self._lose(ExecutionError(why))
            assert self._error is not None
            raise self._error from error

    def tell_step(self, batch: StepBatch, eager: bool) -> None:
        """Have all followers enqueue the layers of a step."""
        region = self._steps % REGIONS
        self._steps += 1
        self.tell(Layers(region, self._codec.write(batch, self._regions[region]), eager))

    def tell_last(self, what: Told) -> bool:
        """Have all followers end; that they do is no loss any more. False where one is lost."""
        try:
            self.tell(what)
        except SlipstreamError:
            return False
        self._closed = True
        return True

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise why no rank runs any more in place of what this has made of the work inside."""
        try:
            yield
        except RuntimeError:
            ends = time.monotonic() + 4 * PAUSE  # the end of a process is seen a little later
            while self._error is None and time.monotonic() < ends:
                time.sleep(PAUSE / 10)
            self.check()
            raise

    def await_answers(self) -> None:
        """Wait until all followers have done what they were told last; raises what one raised."""
        waiting = {member.link: rank for rank, member in enumerate(self._members, 1)}
        while waiting:
            for link in connection.wait([*waiting], PAUSE):
                assert isinstance(link, Connection)
                if self._has_answered(link):
                    del waiting[link]
            self.check()

    def close(self, *, told: bool = False) -> None:
        """End the processes, those that were ``told`` to end by themselves."""
        self._closed = True
        if told and self._error is None:
            _await_ends(self._members)
        self._finish()

    def _has_answered(self, link: Connection) -> bool:
        """Take an answer, which is an error where a follower has failed; the end of a process is
        for those who watch it."""
        with self._lock, suppress(EOFError, OSError):
            answer = link.recv()
            if isinstance(answer, SlipstreamError):
                self._error = self._error or answer
            return True
        time.sleep(PAUSE)
        return False

    def _await_end(self) -> str | None:
        """How a process ended whose files are closed, which is some time before it has: a GPU's
        memory is to be given back. None if it takes too long."""
        ends = time.monotonic() + _PATIENCE
        while (why := self._ended()) is None and time.monotonic() < ends:
            time.sleep(PAUSE / 10)
        return why

    def _ended(self) -> str | None:
        return ended(dict(enumerate(self._members, 1)), self.ranks)

    def _named(self, ranks: Sequence[int], what: str) -> str:
        return named(ranks or range(1, self.ranks), self.ranks, what)

    def watch(self, silence: Silence) -> bool:
        """Whether all followers run; if one does not, the others are ended."""
        why = self._ended()
        if self._closed:
            return False
        if self._error is not None:
            self._lose(self._error)
            return False
        if why is not None:
            self._lose(self._last_word() or ExecutionError(why))
            return False
        late = [r for r in range(1, self.ranks) if int(self._done[r, 0]) != self._told]
        stuck = silence.stuck({rank: self.processes[rank - 1] for rank in late})
        if stuck:
            what = f"has done nothing for {self._silence:g} seconds"
            self._lose(ExecutionError(self._named(stuck, what)))
        return not stuck

    def _last_word(self) -> SlipstreamError | None:
        """What a follower has said before it ended."""
        with self._lock:
            for member in self._members:
                with suppress(EOFError, OSError):
                    while member.link.poll():
                        said = member.link.recv()
                        if isinstance(said, SlipstreamError):
                            return said
        return None

    def _lose(self, error: SlipstreamError) -> None:
        with self._lock:
            self._error = self._error or error
        kill(self._members)
        _await_ends(self._members)
        if self.on_loss is not None:
            self.on_loss()

    def silence(self) -> Silence:
        """Tells followers that hang."""
        return Silence(self._silence)


def _setup(
    engine: Path,
    config: RuntimeConfig,
    rank: int,
    steps: tuple[int, ...],
    done: int,
    meeting: Path,
    link: int,
) -> Setup:
    return Setup(engine, config, rank, link, steps, done, meeting)


def _watch(found: weakref.ref[Followers]) -> None:
    """Look after followers, whatever the engine's thread waits for."""
    followers = found()
    silence = None if followers is None else followers.silence()
    while followers is not None and silence is not None and followers.watch(silence):
        del followers
        time.sleep(PAUSE)
        followers = found()


def _await_ends(members: Sequence[Member]) -> None:
    ends = time.monotonic() + _PATIENCE
    for member in members:
        with suppress(subprocess.TimeoutExpired):
            member.process.wait(max(0.0, ends - time.monotonic()))


def _finish(process: int, members: list[Member], regions: Sequence[Region], directory: str) -> None:
    finish(process, members, regions)
    if os.getpid() == process:
        shutil.rmtree(directory, ignore_errors=True)
