"""Batches of events over ZMQ, in the frames of vLLM."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from slipstream.errors import InvalidRequestError, MissingDependencyError
from slipstream.runtime.kv_events.config import NAME, KvEventsConfig
from slipstream.runtime.kv_events.events import Event

_LOG = logging.getLogger(__name__)
_INBOX = "inproc://batches"
_RANK = 0  # one engine has one cache
_END = (-1).to_bytes(8, "big", signed=True)
_LINGER = 1000  # milliseconds for the last batches to leave in
_MOST = 2**31 - 1  # messages that a socket may be told to hold
_PATIENCE = 5.0  # seconds until an end is not waited for any more


class Publisher:
    """A PUB socket, and a ROUTER socket for who missed something, in a thread of their own.

    A batch is three frames: topic, number (8 bytes, big-endian, from 0 on) and
    ``[seconds, events, 0]`` in msgpack. Asked for a number, the ROUTER sends all batches from that
    on which are kept, number and batch each, and at the end number -1 with an empty batch.

    Raises ``MissingDependencyError`` without pyzmq or msgspec, and ``InvalidRequestError`` for an
    address that cannot be had.
    """

    def __init__(self, config: KvEventsConfig) -> None:
        try:
            import msgspec
            import zmq
        except ImportError as error:
            raise MissingDependencyError(
                f"{NAME} needs {error.name}, which is not installed; install it: "
                "pip install 'slipstream[kv-events]', or leave enable_kv_cache_events off"
            ) from error
        self._zmq, self._encode = zmq, msgspec.msgpack.Encoder().encode
        self._topic = config.topic.encode()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.Context()
        try:
            self._open(config)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise InvalidRequestError(
                f"{NAME} has endpoint {config.endpoint} and replay_endpoint "
                f"{config.replay_endpoint}, which cannot be had ({error}); choose others",
                param=NAME,
            ) from error
        self._thread = threading.Thread(
            target=self._serve, name="slipstream-kv-events", daemon=True
        )
        self._thread.start()

    def _open(self, config: KvEventsConfig) -> None:
        zmq = self._zmq
        self._inbox = self._socket(zmq.PULL, config.max_queue_size)
        self._inbox.bind(_INBOX)
        self._outbox = self._socket(zmq.PUSH, config.max_queue_size)
        self._outbox.connect(_INBOX)
        self._events = self._socket(zmq.PUB, config.hwm, _LINGER)
        if config.binds:
            self._events.bind(config.endpoint)
        else:
            self._events.connect(config.endpoint)
        self._replay = None
        if config.replay_endpoint is not None:
            # An answer, beside half as many that the library still counts when all are read; what
            # is beyond, it drops.
            most = min(2 * (config.buffer_steps + 1), _MOST)
            self._replay = self._socket(zmq.ROUTER, most, _LINGER)
            self._replay.bind(config.replay_endpoint)

    def _socket(self, kind: int, most: int, linger: int = 0) -> Any:  # noqa: ANN401 - imported late
        made = self._context.socket(kind)
        made.set_hwm(most)
        made.setsockopt(self._zmq.LINGER, linger)
        return made

    @property
    def endpoints(self) -> tuple[str, str | None]:
        """Where events are told, and told again, with the ports that were taken."""
        last = self._zmq.LAST_ENDPOINT
        replay = None if self._replay is None else self._replay.getsockopt_string(last)
        return self._events.getsockopt_string(last), replay

    def publish(self, events: Sequence[Event]) -> None:
        """Send a batch."""
        self._outbox.send(self._encode([time.time(), events, _RANK]))

    def close(self) -> None:
        """Send what waits, and end."""
        self._outbox.send(b"")
        self._thread.join()
        # The library was seen to wait for good where a subscriber left at that moment.
        end = threading.Thread(target=self._context.destroy, daemon=True)
        end.start()
        end.join(_PATIENCE)

    def _serve(self) -> None:
        zmq, number = self._zmq, 0
        poller = zmq.Poller()
        for each in filter(None, (self._inbox, self._replay)):
            poller.register(each, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._replay in ready:
                self._send_again()
            if self._inbox not in ready:
                continue
            batch = self._inbox.recv()
            if not batch:
                return
            self._kept.append((number.to_bytes(8, "big"), batch))
            self._events.send_multipart((self._topic, *self._kept[-1]))
            number += 1

    def _send_again(self) -> None:
        assert self._replay is not None
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            _LOG.warning("a subscriber asked for %s; it must be a number of 8 bytes", frames[1:])
            return
        client, _, first = frames
        for number, batch in [*self._kept, (_END, b"")]:
            if number >= first or not batch:
                self._replay.send_multipart((client, b"", number, batch))
