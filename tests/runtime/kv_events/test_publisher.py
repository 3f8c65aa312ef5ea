from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.runtime.kv_events.mirror import Mirror, random_traffic, shared_paths

from slipstream.errors import InvalidRequestError, MissingDependencyError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.runtime.kv_events.publisher import Publisher
from slipstream.runtime.testing import counting_engine

END = (-1).to_bytes(8, "big", signed=True)
OPTIONS: dict[str, Any] = {
    "enable_kv_cache_events": True,
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
    "topic": "kv",
}


class Subscriber:
    """A router: a SUB socket that asks for what it missed; it decodes with no type of ours."""

    def __init__(self, publisher: Publisher) -> None:
        zmq = pytest.importorskip("zmq")
        self.decode = pytest.importorskip("msgspec").msgpack.decode
        events, replay = publisher.endpoints
        self.context = zmq.Context()
        self.events = self.context.socket(zmq.SUB)
        self.events.connect(events)
        self.events.subscribe(b"kv")
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(replay)
        for each in (self.events, self.replay):
            each.setsockopt(zmq.RCVTIMEO, 30_000)
        self.mirror = Mirror()
        self.next = 0

    def ask(self, first: int) -> list[tuple[int, bytes]]:
        """Past batches from a number on, with their numbers."""
        self.replay.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        while (frames := self.replay.recv_multipart())[1] != END:
            found.append((int.from_bytes(frames[1], "big"), frames[2]))
        assert frames == [b"", END, b""]
        return found

    def catch_up(self) -> None:
        for number, batch in self.ask(self.next):
            self.apply(number, batch)

    def hear(self) -> None:
        """Wait for one batch."""
        topic, number, batch = self.events.recv_multipart()
        assert topic == b"kv" and len(number) == 8
        self.apply(int.from_bytes(number, "big"), batch)

    def apply(self, number: int, batch: bytes) -> None:
        if number < self.next:  # was sent again
            return
        assert number == self.next, "a batch is missing"
        seconds, events, rank = self.decode(batch)
        assert seconds > 1.7e9 and rank == 0
        self.mirror.apply(events)
        self.next += 1


@contextmanager
def subscribed(publisher: Publisher) -> Iterator[Subscriber]:
    subscriber = Subscriber(publisher)
    try:
        yield subscriber
    finally:
        subscriber.context.destroy(linger=0)


@contextmanager
def looping(**options: Any) -> Iterator[EngineLoop]:  # noqa: ANN401 - of KvEventsConfig
    pytest.importorskip("zmq")
    pytest.importorskip("msgspec")
    config = KvEventsConfig(**{**OPTIONS, **options})
    loop = EngineLoop(counting_engine(24, max_seq_len=80, kv_events_config=config))
    try:
        yield loop
    finally:
        loop.shutdown()


def test_a_subscriber_that_comes_late_has_the_tree_and_hears_the_end() -> None:
    with looping() as loop:
        publisher = loop.kv_events.publisher
        assert publisher is not None
        random_traffic(loop, seed=0)
        with subscribed(publisher) as subscriber:
            subscriber.catch_up()
            assert subscriber.mirror.clears == 1 and subscriber.next > 20
            while not subscriber.events.poll(10):  # until it is subscribed
                publisher.publish([])
            random_traffic_again(loop, subscriber)
            shared = shared_paths(loop.scheduler.kv)
            assert shared
            while subscriber.mirror.paths != shared:  # what is still on its way, or fail
                subscriber.hear()
            loop.shutdown()
            while subscriber.mirror.clears == 1:
                subscriber.hear()
            assert not subscriber.mirror.paths


def random_traffic_again(loop: EngineLoop, subscriber: Subscriber) -> None:
    """More of it, of which the subscriber hears as it happens and then asks for the rest."""
    subscriber.catch_up()
    before = subscriber.next
    random_traffic(loop, seed=1)
    while subscriber.next < before + 20:
        subscriber.hear()
    subscriber.catch_up()


def test_only_so_many_batches_are_kept() -> None:
    with looping(buffer_steps=3) as loop:
        publisher = loop.kv_events.publisher
        assert publisher is not None
        with subscribed(publisher) as subscriber:
            for _ in range(5):
                publisher.publish([])
            assert wait_for(subscriber, last=5) == [3, 4, 5]
            subscriber.replay.send_multipart([b"", b"nonsense!"])  # is passed over
            assert [number for number, _ in subscriber.ask(5)] == [5]
            for _ in range(20):  # nothing of an answer is dropped because of those before
                assert [number for number, _ in subscriber.ask(0)] == [3, 4, 5]


def wait_for(subscriber: Subscriber, last: int) -> list[int]:
    numbers: list[int] = []
    while not numbers or numbers[-1] < last:  # none is kept yet, perhaps
        numbers = [number for number, _ in subscriber.ask(0)]
    return numbers


def test_an_address_in_use_is_refused() -> None:
    with looping() as loop:
        publisher = loop.kv_events.publisher
        assert publisher is not None
        taken = publisher.endpoints[1]
        config = KvEventsConfig(**{**OPTIONS, "replay_endpoint": taken})
        with pytest.raises(InvalidRequestError, match="cannot be had"):
            Publisher(config)


@pytest.mark.parametrize("missing", ["zmq", "msgspec"])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r"slipstream\[kv-events\]"):
        Publisher(KvEventsConfig(enable_kv_cache_events=True))
