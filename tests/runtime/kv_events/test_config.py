from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.kv_events.config import NAME, KvEventsConfig, with_kv_events

EVENTS = {"enable_kv_cache_events": True, "endpoint": "tcp://*:7000", "buffer_steps": 7}


@pytest.mark.parametrize(
    "given",
    [
        EVENTS,
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:7000", "buffer_steps": 7}',
        KvEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:7000", buffer_steps=7),
    ],
)
def test_an_object_its_json_and_a_dataclass_say_the_same(given: object) -> None:
    config = with_kv_events({NAME: given, "max_batch_size": 3})
    assert config == {NAME: KvEventsConfig(**EVENTS), "max_batch_size": 3}  # type: ignore[arg-type]
    assert config[NAME].publishes


@pytest.mark.parametrize(
    ("given", "publishes"),
    [
        ({}, False),
        ({"publisher": "zmq"}, False),
        ({"enable_kv_cache_events": True}, True),
        ({"enable_kv_cache_events": True, "publisher": "null"}, False),
    ],
)
def test_what_publishes(given: dict[str, Any], publishes: bool) -> None:
    assert with_kv_events({NAME: given})[NAME].publishes is publishes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": 1}, "'port'"),
        ({"publisher": "kafka"}, "one of zmq, null"),
        ({"hwm": 0}, "at least 1"),
        ("{", NAME),
        (7, "must be an object"),
    ],
)
def test_what_means_nothing_is_refused(given: object, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        with_kv_events({NAME: given})


def test_events_need_the_prefix_cache() -> None:
    with pytest.raises(InvalidRequestError, match="enable_prefix_caching"):
        RuntimeConfig(
            enable_prefix_caching=False,
            kv_events_config=KvEventsConfig(enable_kv_cache_events=True),
        )
