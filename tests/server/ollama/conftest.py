"""Ollama's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import ollama
import pytest
from tests.server.openai.serving import Running


@pytest.fixture
def client() -> Iterator[Callable[[Running], ollama.Client]]:
    """Clients of servers, closed with the test."""
    with ExitStack() as stack:

        def connect(running: Running) -> ollama.Client:
            made = ollama.Client(host=running.url, timeout=60)
            stack.callback(made.close)
            return made

        yield connect
