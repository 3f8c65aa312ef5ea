"""Two processes that tell each other messages and ask each other questions."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.remote.frames import FrameReader, frame

_LOG = logging.getLogger(__name__)
Answerer = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Question:
    """Something to be answered, by whoever is there for questions of this name."""

    number: int
    name: str
    argument: Any


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question, or why there is none."""

    number: int
    value: Any
    error: SlipstreamError | None = None


def packed(message: object) -> bytes:
    """A message as it is sent. Both ends are processes of one server, which trust each other."""
    return frame(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


class Link(asyncio.Protocol):
    """One end of a connection; belongs to one event loop.

    Messages arrive in the order in which they were sent.
    """

    def __init__(self, answerers: Mapping[str, Answerer]) -> None:
        """Questions are answered by those in ``answerers``, by name."""
        self._answerers = answerers
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._received: Callable[[Any], None] | None = None
        self._lost: Callable[[], None] | None = None
        self._held: list[object] = []  # that came before anybody listened
        self.is_lost = False

    @classmethod
    async def over(cls, connection: socket.socket, answerers: Mapping[str, Answerer]) -> Self:
        """A link over a connected Unix socket, which it owns."""
        link = cls(answerers)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: link, sock=connection)
        return link

    def listen(self, received: Callable[[Any], None], lost: Callable[[], None]) -> None:
        """Pass messages that are no questions to ``received``, those that have come too; ``lost``
        hears, once, that the other end is gone."""
        self._received, self._lost = received, lost
        held, self._held = self._held, []
        for message in held:
            received(message)
        if self.is_lost:
            lost()

    def send(self, message: object) -> None:
        """Send a message; one that nobody is there to read is dropped."""
        self.send_packed(packed(message))

    def send_packed(self, message: bytes) -> None:
        """The same for one that is packed already."""
        if self._transport is not None and not self.is_lost:
            self._transport.write(message)

    async def ask(self, name: str, argument: Any = None) -> Any:  # noqa: ANN401 - by the name
        """The answer to a question. Raises what the other end answers it with, and
        ``ExecutionError`` if that is gone."""
        if self.is_lost:
            raise _gone()
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(Question(number, name, argument))
            return await self._asked[number]
        finally:
            del self._asked[number]

    @property
    def waiting_bytes(self) -> int:
        """How much the other end has not read."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def close(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hear what the other end says."""
        for message in self._frames.feed(data):
            self._take(pickle.loads(message))

    def connection_lost(self, error: Exception | None) -> None:
        """Tell those who wait."""
        self.is_lost = True
        for future in self._asked.values():
            if not future.done():
                future.set_exception(_gone())
        for task in self._tasks:
            task.cancel()
        if self._lost is not None:
            self._lost()

    def _take(self, message: object) -> None:
        if isinstance(message, Question):
            task = asyncio.get_running_loop().create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Answer):
            self._hear(message)
        elif self._received is None:
            self._held.append(message)
        else:
            self._received(message)

    async def _answer(self, question: Question) -> None:
        try:
            value = await self._answerers[question.name](question.argument)
        except SlipstreamError as error:
            self.send(Answer(question.number, None, error))
        except Exception as error:  # noqa: BLE001 - a defect: who waits must hear of it
            _LOG.exception("a question failed")
            self.send(Answer(question.number, None, ExecutionError(f"it failed: {error!r}")))
        else:
            self.send(Answer(question.number, value))

    def _hear(self, answer: Answer) -> None:
        future = self._asked.get(answer.number)
        if future is None or future.done():
            return
        if answer.error is None:
            future.set_result(answer.value)
        else:
            future.set_exception(answer.error)


def _gone() -> ExecutionError:
    return ExecutionError("the process that was asked has ended; send the request again")
