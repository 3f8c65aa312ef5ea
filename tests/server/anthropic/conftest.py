"""Servers that are shared by the tests of a file, and Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.runtime.chat.templates import QWEN
from tests.server.anthropic.clients import close_clients
from tests.server.openai.marked import MarkedDialect
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load


@pytest.fixture(autouse=True)
def _clients() -> Iterator[None]:
    yield
    close_clients()


@pytest.fixture(scope="module")
def dialect() -> MarkedDialect:
    """Thoughts from f to i, calls from l to q with a name up to n."""
    return MarkedDialect("filqn")


@pytest.fixture(scope="module")
def chat(dialect: MarkedDialect) -> Iterator[Running]:
    """A server whose model counts, in that dialect."""
    with serving() as running:
        running.service.dialect = dialect
        yield running


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random model with the chat template of Qwen 3."""
    template = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    template.write_text(QWEN)
    with serving(load(tiny_engine, {"chat_template": str(template)})) as running:
        # Requests cannot say a seed, and greedily this model writes white space for ever.
        running.service.defaults = replace(running.service.defaults, temperature=1.0, seed=1)
        yield running
