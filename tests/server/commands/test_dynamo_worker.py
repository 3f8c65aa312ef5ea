from __future__ import annotations

import pytest
from click.testing import CliRunner

from slipstream.server.cli import slipstream


def test_a_worker_without_dynamo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dynamo.common.backend.worker", None)
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
