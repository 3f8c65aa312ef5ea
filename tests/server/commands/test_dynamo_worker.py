from __future__ import annotations

import sys
from types import ModuleType

import pytest
from click.testing import CliRunner

from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.server.cli import slipstream


def test_a_worker_without_dynamo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamo.common.backend.worker", None)
    result = CliRunner().invoke(slipstream, ["dynamo-worker", "engine"])
    assert result.exit_code == 1
    assert "docs/distributed.md" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--discovery-backend", "paper"], "paper"),
        (["--namespace", ""], "namespace is empty"),
        (["--drain-timeout", "-1"], "drain_timeout"),
    ],
)
def test_bad_usage(words: list[str], named: str) -> None:
    result = CliRunner().invoke(slipstream, ["dynamo-worker", "engine", *words])
    assert result.exit_code == 2 and named in result.output


def test_events_that_dynamo_would_not_hear_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("slipstream.server.dynamo.worker")
    vars(module)["run"] = lambda load, options: load(KvEventsConfig())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    events = '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:5557"}'
    words = ["dynamo-worker", "engine", "--kv-events-config", events]
    result = CliRunner().invoke(slipstream, words)
    assert result.exit_code != 0 and "which is connected to" in result.output
